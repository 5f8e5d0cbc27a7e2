"""A trunk over the images of a source: what training, `embed`, `assign` and evaluation share.

N images, B batch, D features.
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from deepcluster.clustering.features import extract_features
from deepcluster.data.loader import Loader
from deepcluster.data.views import ClusterView, rotate_quarters
from deepcluster.device import Machine
from deepcluster.models.trunk import Trunk, normalise

# Images that the network looks at together where no gradient is wanted.
LOOK_BATCH = 256


def describe(trunk: Trunk, machine: Machine, images_BCHW: Tensor, stage: str) -> Tensor:
    """Rows (B, D) of `stage` for uint8 images, in the machine's precision."""
    with machine.autocast():
        return trunk.vectors(normalise(machine.put(images_BCHW)).to(machine.dtype), stage)


def stage_width(trunk: Trunk, machine: Machine, stage: str, image_size: int) -> int:
    """D, the width of the rows that `describe` gives of `stage`."""
    trunk.check_stage(stage)
    trunk.eval()
    with torch.no_grad():
        blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        return describe(trunk.to(machine.device, machine.dtype), machine, blank, stage).shape[1]


def look(
    trunk: Trunk,
    loader: Loader,
    machine: Machine,
    *,
    stage: str,
    image_size: int,
    batch_size: int = LOOK_BATCH,
    indices: Tensor | None = None,
    quarters_N: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Rows_BD of `stage` for the centre view of each image, in eval mode, and indices_B; batch by batch, on the device.

    Images that can't be read are left out of their batch, and a batch without any is left out. Arguments as in
    `image_features`, and `quarters_N`: by how many quarters each image of the source is turned.
    """
    trunk.eval()
    indices = torch.arange(len(loader.images)) if indices is None else indices
    for batch in loader.cluster_views(ClusterView(image_size), indices, batch_size):
        if len(batch.indices_B):
            images_BCHW = batch.images_BCHW
            if quarters_N is not None:
                images_BCHW = rotate_quarters(images_BCHW, quarters_N[batch.indices_B])
            with torch.no_grad():
                rows_BD = describe(trunk, machine, images_BCHW, stage)
            yield rows_BD, batch.indices_B
        if on_batch is not None:
            on_batch(len(batch.indices_B))


def image_features(
    trunk: Trunk,
    loader: Loader,
    machine: Machine,
    *,
    stage: str,
    image_size: int,
    batch_size: int = LOOK_BATCH,
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
    dim = stage_width(trunk, machine, stage, image_size)
    return extract_features(
        look(
            trunk,
            loader,
            machine,
            stage=stage,
            image_size=image_size,
            batch_size=batch_size,
            indices=indices,
            on_batch=on_batch,
        ),
        n_images=len(loader.images),
        dim=dim,
        dtype=machine.feature_dtype,
    )
