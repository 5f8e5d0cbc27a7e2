"""What a trunk takes from the images without gradients, before training and where it is used: `resnet-patches` does."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.work import Work
from deepcluster.data.loader import Loader
from deepcluster.data.survey import even_sample
from deepcluster.models.patches import COMPONENTS, PatchResNet
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.features import FEATURE_BATCH, centre_view
from deepcluster.run.settings import Settings

BEGIN_IMAGES, WHITENING_IMAGES = 2_048, 8_192
# Fewer images per component would whiten noise.
IMAGES_PER_COMPONENT = 8
# Components are divided by this power of their deviation: with less than 1, they keep their order, which clustering needs.
POWER = 0.8


class _Sample:
    """Centre views of a sample of the images, normalised; may be read several times."""

    def __init__(self, loader: Loader, machine: Machine, settings: Settings, count: int, work: Work, what: str) -> None:
        readable = [index for index in range(len(loader.images)) if index not in loader.unreadable]
        self.indices_N = torch.tensor(even_sample(readable, count))
        self.loader, self.machine, self.view, self.work, self.what = loader, machine, centre_view(settings), work, what

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches (B, 3, S, S) on the device, in the machine's precision while the caller computes with them."""
        with self.work.track(self.what, len(self.indices_N), together=True) as advance:
            for batch in self.loader.cluster_views(self.view, self.indices_N, FEATURE_BATCH):
                if len(batch.indices_B):
                    with self.machine.autocast():
                        yield normalise(self.machine.put(batch.images_BCHW)).to(self.machine.dtype)
                advance(len(batch.indices_B))


def learns_from_images(trunk: Trunk) -> bool:
    """Return True if the first weights of a trunk are not a function of the seed alone."""
    return isinstance(trunk, PatchResNet)


def begin_trunk(trunk: Trunk, loader: Loader, machine: Machine, settings: Settings, work: Work) -> None:
    """Set the first weights of a trunk that takes them from images; others keep their random ones."""
    if isinstance(trunk, PatchResNet):
        trunk.to(machine.device, machine.dtype)
        trunk.begin(_Sample(loader, machine, settings, BEGIN_IMAGES, work, "taking patches"), seed=settings.seed)
        fit_whitening(trunk, loader, machine, settings, work)


def fit_whitening(trunk: Trunk, loader: Loader, machine: Machine, settings: Settings, work: Work) -> None:
    """Fit the whitening of a trunk that has one to its present weights, with images of a sample."""
    if not isinstance(trunk, PatchResNet):
        return
    trunk.eval()
    sample = _Sample(loader, machine, settings, WHITENING_IMAGES, work, "features for whitening")
    averages_ND = torch.cat([trunk.averages(x_BCHW).cpu() for x_BCHW in sample])
    count = max(1, min(COMPONENTS, len(averages_ND) // IMAGES_PER_COMPONENT))
    whitening = Whitening(count).fit(averages_ND)
    components_DP = whitening.components_DP * whitening.variance_P ** ((1 - POWER) / 2)
    trunk.mean_D.copy_(whitening.mean_D)
    trunk.components_DP.zero_()[:, :count] = components_DP / components_DP.norm(dim=0).max().clamp(min=1e-30)
