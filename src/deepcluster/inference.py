"""A trunk over the images of a source: what training, `embed`, `assign` and evaluation share.

N images, B batch, D features.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepcluster.clustering.features import extract_features
from deepcluster.data.loader import Loader
from deepcluster.data.views import ClusterView
from deepcluster.device import Machine
from deepcluster.models.trunk import Trunk, normalise


def describe(trunk: Trunk, machine: Machine, images_BCHW: Tensor, stage: str) -> Tensor:
    """Rows (B, D) of `stage` for uint8 images, in the machine's precision."""
    with machine.autocast():
        return trunk.vectors(normalise(machine.put(images_BCHW)), stage)


def stage_width(trunk: Trunk, machine: Machine, stage: str, image_size: int) -> int:
    """D, the width of the rows that `describe` gives of `stage`."""
    trunk.check_stage(stage)
    trunk.eval()
    with torch.no_grad():
        blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        return describe(trunk.to(machine.device), machine, blank, stage).shape[1]


def image_features(
    trunk: Trunk,
    loader: Loader,
    machine: Machine,
    *,
    stage: str,
    image_size: int,
    batch_size: int = 256,
    indices: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Rows (N, D) of `stage` for the centre view of each image, in eval mode, at the image's index; on the CPU.

    Args:
        stage: one of `trunk.stages`.
        image_size: side of the view in pixels.
        indices: look at these images alone; all by default.
        on_batch: called with the number of images after each batch; may raise to stop.

    Returns:
        features_ND, float16 where the machine computes in bf16; NaN where an image can't be read or was not asked for.
    """
    trunk.eval()
    indices = torch.arange(len(loader.images)) if indices is None else indices

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader.cluster_views(ClusterView(image_size), indices, batch_size):
            if len(batch.indices_B):
                yield batch.images_BCHW, batch.indices_B
            if on_batch is not None:
                on_batch(len(batch.indices_B))

    return extract_features(
        lambda images_BCHW: describe(trunk, machine, images_BCHW, stage),
        batches(),
        n_images=len(loader.images),
        dim=stage_width(trunk, machine, stage, image_size),
        dtype=machine.feature_dtype,
    )
