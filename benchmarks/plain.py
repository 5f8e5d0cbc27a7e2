"""Plain loops as published, the baseline of ours: ImageFolder, Pillow, a DataLoader of processes.

Written from the papers and the known behaviour of the released code: DeepCluster of 2018 (arXiv 1807.05520) and
DeepCluster-v2 (arXiv 2006.09882). Float32, or on a GPU float16 with a scaled loss (AMP). N images, B batch, V crops of an
image, P components, K clusters.
"""

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from input import published_transform
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.settings import Settings

# Called with the name of a step at its end.
Count = Callable[[str], None]


class Steps:
    """Training steps of SGD in float32, or with AMP."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device, *, amp: bool) -> None:
        self.optimizers, self.device, self.amp = optimizers, device, amp
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp)

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, torch.float16, enabled=self.amp)

    def descend(self, loss: Tensor) -> None:
        """Make one step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()


def loaded(images: ImageFolder, settings: Settings, batch: int, **rest: Any) -> Iterator[Any]:
    """Yield the batches of a DataLoader with `settings.workers` processes."""
    pinned = settings.device.startswith("cuda")
    return iter(DataLoader(images, batch, num_workers=settings.workers or 0, pin_memory=pinned, **rest))


def sgd(weights: Any, settings: Settings, momentum: float) -> torch.optim.SGD:
    """Return the published optimizer."""
    return torch.optim.SGD(weights, lr=settings.lr, momentum=momentum, weight_decay=settings.weight_decay)


# DeepCluster of 2018


def epoch_2018(trunk: Trunk, data: Path, settings: Settings, count: Count, *, amp: bool) -> None:
    """Run the published loop, step by step."""
    features_ND = _features(trunk, data, settings, amp=amp)
    count("features")
    points_NP = _whitening(features_ND, settings.pca)
    count("whitening")
    labels_N = _kmeans(points_NP, settings)
    count("clustering")
    _training(trunk, data, labels_N, settings, amp=amp)
    count("training")


def _features(trunk: Trunk, data: Path, settings: Settings, *, amp: bool) -> NDArray[np.float32]:
    """Step 1: extract features."""
    trunk.eval()
    rows, device = [], next(trunk.parameters()).device
    images = ImageFolder(str(data), published_transform("cluster view", settings.image_size))
    with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=amp):
        for images_BCHW, _ in loaded(images, settings, FEATURE_BATCH):
            rows.append(trunk(images_BCHW.to(device, non_blocking=True)).float().cpu().numpy())
    return np.concatenate(rows)


def _whitening(features_ND: NDArray[np.float32], n_components: int) -> NDArray[np.float32]:
    """Step 2: PCA, whitening, unit rows."""
    if importlib.util.find_spec("faiss"):
        import faiss  # type: ignore[import-untyped,unused-ignore]

        matrix = faiss.PCAMatrix(features_ND.shape[1], n_components, -0.5)
        matrix.train(features_ND)
        points_NP: NDArray[np.float32] = matrix.apply(features_ND)
    else:
        from sklearn.decomposition import PCA

        points_NP = PCA(n_components, whiten=True).fit_transform(features_ND)
    points_NP /= np.linalg.norm(points_NP, axis=1, keepdims=True)
    return points_NP


def _kmeans(points_NP: NDArray[np.float32], settings: Settings) -> NDArray[np.int64]:
    """Step 3: cluster."""
    if not importlib.util.find_spec("faiss"):
        from sklearn.cluster import KMeans

        kmeans = KMeans(settings.n_clusters, init="random", n_init=1, max_iter=settings.kmeans_iterations, tol=0)
        labels_N: NDArray[np.int64] = kmeans.fit_predict(points_NP).astype(np.int64)
        return labels_N
    import faiss

    clustering = faiss.Clustering(points_NP.shape[1], settings.n_clusters)
    clustering.niter, clustering.seed = settings.kmeans_iterations, settings.seed
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = 10_000_000, 1
    index = faiss.IndexFlatL2(points_NP.shape[1])
    clustering.train(points_NP, index)
    _, nearest_N1 = index.search(points_NP, 1)
    return np.asarray(nearest_N1, np.int64)[:, 0]


def _sample(labels_N: NDArray[np.int64]) -> list[int]:
    """Step 4: draw N images uniformly over the clusters."""
    draw, clusters = np.random.default_rng(0), [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
    each = len(labels_N) // len(clusters) + 1
    drawn = np.concatenate([draw.choice(members, each, replace=len(members) <= each) for members in clusters])
    order: list[int] = draw.permutation(drawn)[: len(labels_N)].tolist()
    return order


def _training(trunk: Trunk, data: Path, labels_N: NDArray[np.int64], settings: Settings, *, amp: bool) -> None:
    """Step 5: a new last layer, and SGD over the sample."""
    device = next(trunk.parameters()).device
    last = nn.Linear(trunk.dim, settings.n_clusters)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    head = nn.Sequential(nn.ReLU(), last).to(device)
    weights = [weight for weight in trunk.parameters() if weight.requires_grad]
    optimizers = sgd(weights, settings, settings.momentum), sgd(head.parameters(), settings, 0.0)
    steps, order, first = Steps(optimizers, device, amp=amp), _sample(labels_N), 0
    images = ImageFolder(str(data), published_transform("training view", settings.image_size))
    trunk.train()
    for images_BCHW, _ in loaded(images, settings, settings.batch_size, sampler=order):
        labels_B = torch.from_numpy(labels_N[order[first : first + len(images_BCHW)]]).to(device, non_blocking=True)
        first += len(images_BCHW)
        with steps.autocast():
            loss = cross_entropy(head(trunk(images_BCHW.to(device, non_blocking=True))), labels_B)
        steps.descend(loss)


# DeepCluster-v2


class PillowBlur:
    """Gaussian blur of 0.1 to 2 pixels for a share of the images."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.share:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Crops:
    """Transform of a Pillow image to its crops, normalised tensors with the settings' sizes, scales and colours."""

    def __init__(self, settings: Settings) -> None:
        strength = settings.jitter
        jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        colours = [
            transforms.RandomHorizontalFlip(0.5 if settings.flip else 0),
            transforms.RandomApply([jitter], settings.jitter_share),
            transforms.RandomGrayscale(settings.grey),
            *([PillowBlur(settings.blur)] if settings.blur else []),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        self.views = []
        for group, (number, side) in enumerate(settings.crop_groups):
            scale = settings.small_crop_scale if group else settings.crop_scale
            self.views += [transforms.Compose([transforms.RandomResizedCrop(side, scale=scale), *colours])] * number

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class Indexed(ImageFolder):
    """Images with their indices instead of labels."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return super().__getitem__(index)[0], index


class PlainV2(nn.Module):
    """Trunk and projection; crops of the same size go through the trunk together."""

    def __init__(self, trunk: Trunk, settings: Settings) -> None:
        super().__init__()
        hidden, width = settings.projection
        self.trunk, self.groups = trunk, [number for number, _ in settings.crop_groups]
        self.projection = nn.Sequential(
            nn.Linear(trunk.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)
        )

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Return unit rows (V, B, P)."""
        rows, first = [], 0
        for number in self.groups:
            rows.append(self.trunk(torch.cat(list(crops[first : first + number]))))
            first += number
        return normalize(self.projection(torch.cat(rows)).float()).view(first, len(crops[0]), -1)


def epoch_v2(trunk: Trunk, data: Path, settings: Settings, count: Count, *, amp: bool) -> None:
    """Run an epoch after the first: k-means on the bank (here random rows, at the same cost), then the training steps."""
    device = next(trunk.parameters()).device
    images = Indexed(str(data), Crops(settings))
    large, width = settings.crop_groups[0][0], settings.projection[1]
    bank_VNP = normalize(torch.randn(large, len(images), width, device=device), dim=2)
    network = PlainV2(trunk, settings).to(device)
    steps = Steps([sgd(network.parameters(), settings, settings.momentum)], device, amp=amp)
    found = [
        _spherical(bank_VNP[head % large], clusters, settings.kmeans_iterations)
        for head, clusters in enumerate(settings.heads)
    ]
    count("clustering")
    network.train()
    for crops, indices_B in loaded(images, settings, settings.batch_size, shuffle=True):
        if len(indices_B) < 2:
            continue
        indices_B = indices_B.to(device)
        with steps.autocast():
            points_VBP = network([crop.to(device, non_blocking=True) for crop in crops])
            loss = torch.zeros((), device=device)
            for labels_N, centroids_KP in found:
                scores_NK = points_VBP.flatten(0, 1) @ centroids_KP.T / settings.temperature
                loss = loss + cross_entropy(scores_NK, labels_N[indices_B].repeat(len(points_VBP))) / len(found)
        steps.descend(loss)
        bank_VNP[:, indices_B] = points_VBP.detach()[:large].float()
    count("training")


def _spherical(points_NP: Tensor, n_clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return labels and centroids; empty clusters keep their centroid."""
    centroids_KP = points_NP[torch.randperm(len(points_NP), device=points_NP.device)[:n_clusters]]
    for _ in range(iterations + 1):
        labels_N = (points_NP @ centroids_KP.T).argmax(dim=1)
        sums_KP = torch.zeros_like(centroids_KP).index_add_(0, labels_N, points_NP)
        there_K1 = torch.bincount(labels_N, minlength=n_clusters)[:, None] > 0
        centroids_KP = normalize(torch.where(there_K1, sums_KP, centroids_KP))
    return labels_N, centroids_KP
