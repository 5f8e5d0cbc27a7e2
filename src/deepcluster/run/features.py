"""A trunk applied to the images of a source: features of the centre view of each image, in eval mode.

N images, B batch, D features, C channels, G side of a pooled map.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from deepcluster.core.device import Machine
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.loader import Loader
from deepcluster.data.views import ClusterView, rotate_quarters
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.settings import Settings

# Images per batch where no gradient is needed. Results depend on it in their last digits.
FEATURE_BATCH = 256

# Section 4.2 of the paper and its published script: how many numbers of a stage a linear classifier is given.
MOST_NUMBERS = 9_600
# Kernel, stride and padding by channels and side of AlexNet's maps at 224 px: 9,600, 9,216, 9,600 and 9,216 numbers.
PUBLISHED = {(96, 55): (6, 6, 3), (256, 27): (4, 4, 0), (384, 13): (3, 3, 1), (256, 13): (2, 2, 0)}
KINDS = ("average", "pooled")


@dataclass(frozen=True)
class Pooled:
    """A stage, and how its map becomes a row: `average` over its pixels, or `pooled` to at most 9,600 numbers."""

    stage: str
    kind: str = "average"

    def rows(self, map_BCHW: Tensor) -> Tensor:
        """Return rows (B, D) of maps."""
        return pool(map_BCHW) if self.kind == "pooled" else map_BCHW.mean(dim=(2, 3))


def pool(map_BCHW: Tensor) -> Tensor:
    """Return rows (B, C·G·G) of at most 9,600 numbers, with the largest such G; above 9,600 channels G is 1.

    AlexNet's maps at 224 px are pooled as by the published script, which counts the zeros of the padding.
    """
    _, channels, height, width = map_BCHW.shape
    if height == width and (channels, height) in PUBLISHED:
        kernel, stride, padding = PUBLISHED[channels, height]
        return avg_pool2d(map_BCHW, kernel, stride, padding).flatten(1)
    side = max(1, int((MOST_NUMBERS / channels) ** 0.5))
    return adaptive_avg_pool2d(map_BCHW, (min(side, height), min(side, width))).flatten(1)


def make_run_trunk(settings: Settings) -> Trunk:
    """Return the trunk of a run with the random weights that it starts from."""
    own = {name: getattr(settings, name) for name in ("image_size", "sobel", "dropout", "mean", "std", "seed")}
    return make_trunk(settings.arch, **own)


def centre_view(settings: Settings) -> ClusterView:
    """Return the view of an image of which a run's features are made."""
    return ClusterView(settings.image_size, settings.crop_pct, settings.interpolation)


@torch.no_grad()
def extract(trunk: Trunk, machine: Machine, images_BCHW: Tensor, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
    """Return rows (B, D), on the device, of uint8 images for each of `wanted`, in one pass and the machine's precision."""
    with machine.autocast():
        images_BCHW = normalise(machine.put(images_BCHW)).to(machine.dtype)
        maps = trunk.maps(images_BCHW, tuple(dict.fromkeys(one.stage for one in wanted)))
        return {one: one.rows(maps[one.stage]) for one in wanted}


@torch.no_grad()
def extract_stage(trunk: Trunk, machine: Machine, images_BCHW: Tensor, stage: str) -> Tensor:
    """Return rows (B, D), on the device, of uint8 images: the stage averaged over its map."""
    with machine.autocast():
        return trunk.vectors(normalise(machine.put(images_BCHW)).to(machine.dtype), stage)


def stage_width(trunk: Trunk, machine: Machine, stage: str, image_size: int) -> int:
    """Return D, the width of the rows of `stage`. Moves the trunk to the machine.

    Raises:
        InputError: the trunk has no such stage.
    """
    trunk.check_stage(stage)
    trunk.eval()
    blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    return extract_stage(trunk.to(machine.device, machine.dtype), machine, blank, stage).shape[1]


def feature_batches(
    trunk: Trunk,
    loader: Loader,
    machine: Machine,
    stage: str,
    view: ClusterView,
    *,
    batch_size: int = FEATURE_BATCH,
    indices: Tensor | None = None,
    quarters_N: Tensor | None = None,
    advance: Advance = no_advance,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield rows_BD of `stage`, on the device, and indices_B of the images of each batch.

    Unreadable images are left out of their batch, and so are batches without any readable image.

    Args:
        view: what the trunk sees of an image.
        indices: only these images; all by default.
        quarters_N: number of quarter turns by which each image of the source is rotated; None: images stay upright.
        advance: called with the number of images after each batch.
    """
    trunk.eval()
    indices = torch.arange(len(loader.images)) if indices is None else indices
    for batch in loader.cluster_views(view, indices, batch_size):
        if len(batch.indices_B):
            images_BCHW = batch.images_BCHW
            if quarters_N is not None:
                images_BCHW = rotate_quarters(images_BCHW, quarters_N[batch.indices_B])
            yield extract_stage(trunk, machine, images_BCHW, stage), batch.indices_B
        advance(len(batch.indices_B))


def image_features(
    trunk: Trunk,
    loader: Loader,
    machine: Machine,
    stage: str,
    view: ClusterView,
    *,
    batch_size: int = FEATURE_BATCH,
    indices: Tensor | None = None,
    advance: Advance = no_advance,
) -> Tensor:
    """Return rows (N, D) of `stage` at the index of each image, on the CPU. Arguments as in `feature_batches`.

    Returns:
        features_ND, bfloat16 where the machine computes in bf16; NaN for unreadable images and those not in `indices`.
    """
    dim = stage_width(trunk, machine, stage, view.size)
    features_ND = torch.full((len(loader.images), dim), torch.nan, dtype=machine.feature_dtype)
    for rows_BD, indices_B in feature_batches(
        trunk, loader, machine, stage, view, batch_size=batch_size, indices=indices, advance=advance
    ):
        features_ND[indices_B] = rows_BD.to("cpu", machine.feature_dtype)
    return features_ND
