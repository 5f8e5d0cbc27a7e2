"""The bare network: a run's network with its head and optimizers on random tensors, the limit of the run's speed.

No image is read, cropped, coloured or clustered. B batch, V crops of an image, D features, P components, H heads.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.core.device import Machine
from deepcluster.models.heads import ClusterHead
from deepcluster.models.projection import CropPoints, Projection, prototype_losses
from deepcluster.run.features import FEATURE_BATCH, make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.lars import parameter_groups
from deepcluster.training.optim import (
    Learner,
    TrunkRows,
    descend,
    head_optimizer,
    make_optimizer,
    prepared,
    trunk_optimizer,
)


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
        if self.is_v2:
            self._make_v2()
        else:
            head = ClusterHead(trunk.dim, settings.n_clusters, seed=0).to(machine.device, machine.dtype)
            optimizers = trunk_optimizer(trunk, settings, machine), head_optimizer(head, settings, machine)
            self.network = prepared(TrunkRows(trunk, settings.cluster_stage), machine, compiled=settings.compile)
            self.learner = Learner(self.network, head, optimizers, machine, settings.clip_gradient)

    def _make_v2(self) -> None:
        settings, machine = self.settings, self.machine
        projection = Projection(self.trunk.dim, *settings.projection, seed=0).to(machine.device, machine.dtype)
        self.points = points = CropPoints(self.trunk, projection)
        self.network = prepared(points, machine, compiled=settings.compile)
        groups = parameter_groups(points, settings.weight_decay)
        self.optimizer = make_optimizer(groups, settings, machine, momentum=settings.momentum)
        width = settings.projection[1]
        self.prototypes = [normalize(torch.randn(count, width, device=machine.device)) for count in settings.heads]
        self.crops = [self._random(count * settings.batch_size, side) for count, side in settings.crop_groups]

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
        settings, rate = self.settings, self.settings.lr
        self.network.train()
        if not self.is_v2:
            images_BCHW = self.images_BCHW[:count]
            self.learner.step(images_BCHW, self.labels_HB[0, :count], rates=(rate, rate), seed=0)
            return
        crops = [images[: n * count] for images, (n, _) in zip(self.crops, settings.crop_groups, strict=True)]
        with self.machine.autocast():
            points_NP = self.network(crops)
        points_VBP, labels_HB = points_NP.view(-1, count, points_NP.shape[1]), self.labels_HB[:, :count]
        losses_B = prototype_losses(points_VBP, self.prototypes, labels_HB, temperature=settings.temperature)
        descend(losses_B.mean(), [self.optimizer], [rate], longest_gradient=settings.clip_gradient)

    def finish(self) -> None:
        """Wait until the device has finished."""
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize(self.machine.device)
