"""The bare network: a run's network with its head and optimizers on random tensors, the limit of the run's speed.

No image is read, cropped, coloured or clustered. B batch, V crops of an image, D features, P components, H heads.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.core.device import Machine
from deepcluster.models.heads import ClusterHead, CropPoints, HeadLoss, Projection, prototype_losses
from deepcluster.run.features import FEATURE_BATCH, make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.lars import parameter_groups
from deepcluster.training.optim import Optimizers, make_optimizer


def has_feature_pass(settings: Settings) -> bool:
    """Return True if a run extracts the features of all images before each clustering."""
    return settings.method == "deepcluster" or settings.look_again


class BareNetwork:
    """The network of some settings, on random tensors that are already on the device."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self.settings, self.machine = settings, machine
        trunk = make_run_trunk(settings).to(device=machine.device, dtype=machine.dtype, memory_format=torch.channels_last)
        self.trunk, self.is_v2 = trunk, settings.method == "deepcluster-v2"
        self.feature_batch = settings.batch_size if self.is_v2 else FEATURE_BATCH
        self.images_BCHW = self._random(max(self.feature_batch, settings.batch_size), settings.image_size)
        shape = (len(settings.heads), settings.batch_size)
        self.labels_HB = torch.stack([torch.randint(count, shape[1:], device=machine.device) for count in settings.heads])
        network = self._make_v2() if self.is_v2 else self._make_head()
        self.network = torch.compile(network) if settings.compile else network

    def _make_head(self) -> torch.nn.Module:
        settings, machine = self.settings, self.machine
        head = ClusterHead(self.trunk.dim, settings.n_clusters, seed=0).to(machine.device, machine.dtype)
        weights = [weight for weight in self.trunk.parameters() if weight.requires_grad]
        trunk_optimizer = make_optimizer(weights, settings, machine, momentum=settings.momentum)
        head_optimizer = make_optimizer(list(head.parameters()), settings, machine, momentum=settings.head_momentum)
        self.optimizers = Optimizers([trunk_optimizer, head_optimizer], settings.clip_gradient)
        self.head_losses = HeadLoss(head)
        return self.trunk

    def _make_v2(self) -> torch.nn.Module:
        settings, machine = self.settings, self.machine
        projection = Projection(self.trunk.dim, *settings.projection, seed=0).to(machine.device, machine.dtype)
        self.points = points = CropPoints(self.trunk, projection)
        weights = parameter_groups(points, settings.weight_decay)
        optimizer = make_optimizer(weights, settings, machine, momentum=settings.momentum)
        self.optimizers = Optimizers([optimizer], settings.clip_gradient)
        width = settings.projection[1]
        self.prototypes = [normalize(torch.randn(count, width, device=machine.device)) for count in settings.heads]
        self.crops = [self._random(count * settings.batch_size, side) for count, side in settings.crop_groups]
        return points

    def _random(self, count: int, side: int) -> Tensor:
        images_BCHW = torch.randn(count, 3, side, side, device=self.machine.device, dtype=self.machine.dtype)
        return images_BCHW.contiguous(memory_format=torch.channels_last)

    def extract(self, count: int) -> None:
        """Extract the features of `count` images, at most `feature_batch`.

        In eval mode; for DeepCluster-v2 in train mode, with its projection.
        """
        self.network.train(self.is_v2)
        with torch.no_grad(), self.machine.autocast():
            if self.is_v2:
                self.points([self.images_BCHW[:count]])
            else:
                self.trunk(self.images_BCHW[:count])

    def train_step(self, count: int) -> None:
        """Make a training step on all crops of `count` images, at most a batch."""
        self.network.train()
        losses_B = self._crop_losses(count) if self.is_v2 else self._head_losses(count)
        self.optimizers.start([self.settings.lr] * len(self.optimizers.optimizers))
        losses_B.mean().backward()
        self.optimizers.step()

    def _head_losses(self, count: int) -> Tensor:
        with self.machine.autocast():
            losses_B: Tensor = self.head_losses(self.network(self.images_BCHW[:count]), self.labels_HB[0, :count])
        return losses_B

    def _crop_losses(self, count: int) -> Tensor:
        settings = self.settings
        crops = [images[: n * count] for images, (n, _) in zip(self.crops, settings.crop_groups, strict=True)]
        with self.machine.autocast():
            points_NP = self.network(crops)
        points_VBP, labels_HB = points_NP.view(-1, count, points_NP.shape[1]), self.labels_HB[:, :count]
        return prototype_losses(points_VBP, self.prototypes, labels_HB, temperature=settings.temperature)

    def finish(self) -> None:
        """Wait until the device has finished."""
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize(self.machine.device)
