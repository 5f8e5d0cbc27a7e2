"""A protocol that fine-tunes a network for segmentation, on data: what its training and its test share.

C classes, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from deepcluster.core.errors import InputError
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.datasets.masks import LAYOUTS, MaskParts, open_masks
from deepcluster.evaluation.dense.samples import Augment, ReadMask, Samples
from deepcluster.evaluation.dense.segmentation.options import FCN32, SegmentationOptions
from deepcluster.evaluation.dense.segmentation.views import Scale, TrainingCrop, WholeImage

# So many masks tell whether the annotations are the same ones.
MASKS_IN_KEY = 64


@dataclass(frozen=True)
class Task:
    """A protocol on data: how it trains and tests.

    Attributes:
        options: completed.
        recipe: "fcn32" or "fcn-d8".
        scale: of the images, before random scaling and at the test.
        slides: test by sliding windows of the size of a crop.
        align_corners: of the interpolation of scores, as `interpolate` takes it.
    """

    protocol: str
    parts: MaskParts
    options: SegmentationOptions
    recipe: str
    scale: Scale
    slides: bool = False
    align_corners: bool = False

    @property
    def crop(self) -> int | None:
        """Side of the crops; None where whole images are trained on."""
        return None if self.recipe == FCN32 else self.options.crop or self.scale.short

    def training_view(self) -> Augment:
        """Return the view of an image to train on."""
        return WholeImage(self.scale, mask_too=True) if self.crop is None else TrainingCrop(self.scale, self.crop)

    @property
    def classes(self) -> int:
        """C, number of classes."""
        return len(self.parts.train.class_names)

    def key(self) -> list[object]:
        """Return what training and test depend on beside the model, the options and the images to train on."""
        return [self.recipe, masks_key(self.parts.train)]


def open_layout(data: Path, layouts: Sequence[str], lists: str = "auto") -> MaskParts:
    """Return the images with masks in a folder of one of the layouts; `lists` as in `open_masks`.

    Raises:
        InputError: it has another layout, or what `open_masks` raises.
    """
    parts = open_masks(data, lists)
    if parts.layout not in layouts:
        wanted = " or ".join(LAYOUTS[one].wanted for one in layouts)
        raise InputError(f"{data} has masks of another data set ({parts.train.name}); looked for {wanted}")
    return parts


def masks_key(data: MaskSet, at_most: int = MASKS_IN_KEY) -> str:
    """Return digits that change with the masks, judging by so many of them, and with the classes.

    Raises:
        InputError: one of these masks can't be used.
    """
    digest = sha256(repr(data.class_names).encode())
    for index in even_sample(range(len(data)), at_most):
        digest.update(data.read_mask(index).tobytes())
    return digest.hexdigest()


def samples_of(data: MaskSet, view: Augment) -> Samples:
    """Return images with their masks."""
    return Samples(data, ReadMask(data), view)


def resized(map_BCHW: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Return scores at a size, interpolated."""
    if tuple(map_BCHW.shape[-2:]) == tuple(size):
        return map_BCHW
    return interpolate(map_BCHW, size=tuple(size), mode="bilinear", align_corners=align_corners)
