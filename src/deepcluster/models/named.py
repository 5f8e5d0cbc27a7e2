"""What trunks of other libraries have in common: their names, their sizes, the fixed Sobel layer in front.

B batch, C channels, H and W pixels, D features.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, Trunk

# What networks raise on images that they can't take: their own checks, or torch's where a map has become empty.
MISFITS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError, NotImplementedError)
# Set from other settings, or would fetch weights: not for the name of an architecture.
NOT_OPTIONS = (
    *("pretrained", "weights", "weights_backbone", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
    *("num_classes", "in_chans", "img_size", "image_size", "input_size", "features_only", "aux_logits", "init_weights"),
)
_SIZES_TO_TRY = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 299, 384)


def name_and_options(arch: str) -> tuple[str, dict[str, int | float | bool]]:
    """`timm:vit_tiny_patch16_224,patch_size=4` → the library's name, and numbers for what builds the network.

    Raises:
        InputError: an option without a number, or one that is set otherwise.
    """
    name, *pairs = arch.partition(":")[2].split(",")
    options: dict[str, int | float | bool] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key in NOT_OPTIONS:
            raise InputError(f"{arch}: {key} can't be set in the name of an architecture")
        try:
            options[key] = {"true": True, "false": False}[text] if text in ("true", "false") else _number(text)
        except ValueError:
            raise InputError(
                f"{arch}: {pair!r} is not an option; write {arch.split(',')[0]},KEY=NUMBER, as in patch_size=4"
            ) from None
    return name, options


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


class NamedTrunk(Trunk):
    """A classifier of another library without its classifier; "features" are what came into that, in the library's pooling.

    The stages are the network's own blocks, under the library's names for them, and have the library's activations. Tokens
    become maps (the class token is left out).

    Args:
        arch: the whole name, with the library's.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front; the first convolution then has 2 input channels.

    Raises:
        InputError: the network can't take images of this size, or gives no row of features an image.
    """

    def __init__(self, arch: str, backbone: nn.Module, *, image_size: int, sobel: bool) -> None:
        super().__init__()
        self.arch, self.image_size = arch, image_size
        self.sobel = sobel_layer() if sobel else None
        self.backbone = backbone
        self.embed_stage = FEATURES

    @abstractmethod
    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Maps of the stages `names` in the network's order, in one pass that ends at the last of them."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.backbone(self._edges(x_BCHW))  # type: ignore[no-any-return]
        with self._explained(x_BCHW):
            return self.backbone(self._edges(x_BCHW))  # type: ignore[no-any-return]

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from self.maps(x_BCHW, self.stages).items()

    def maps(self, x_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        for name in names:
            self.check_stage(name)
        with self._explained(x_BCHW):
            found = dict(self._found(self._edges(x_BCHW), names))
        if FEATURES in found:
            found[FEATURES] = found[FEATURES][:, :, None, None]
        return found

    def convolutions(self) -> nn.Module:
        return self.backbone

    def _edges(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW if self.sobel is None else self.sobel(x_BCHW)

    @contextmanager
    def _explained(self, x_BCHW: Tensor) -> Iterator[None]:
        """Say which size the trunk was made for, where it fails on images of another."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except MISFITS as fault:
            size = tuple(x_BCHW.shape[2:])
            if size == (self.image_size, self.image_size):
                raise
            raise InputError(
                f"{self.arch}, made for images of {self.image_size} px, can't take {' x '.join(map(str, size))} px: "
                f"{first_line(fault)}"
            ) from fault

    @torch.no_grad()
    def _try_out(self) -> Tensor:
        """Features of a blank image.

        Raises:
            InputError: they are not one row.
        """
        device = next(self.backbone.parameters()).device
        self.eval()
        features = self.backbone(self._edges(torch.zeros(1, 3, self.image_size, self.image_size, device=device)))
        self.train()
        if not isinstance(features, Tensor) or features.dim() != 2:
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.arch} can't be a trunk: it gives {shape} for an image instead of one row of features")
        return features


def first_line(fault: BaseException) -> str:
    """What an exception says, in one line."""
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def misfit(arch: str, image_size: int, fault: BaseException, make: Callable[[int], object], *, sobel: bool) -> InputError:
    """The error to raise where a network can't take images of this size; tells sizes near it that `make` can make.

    `make` is tried on the meta device: nothing but shapes is worked out.
    """

    def works(size: int) -> bool:
        try:
            with torch.device("meta"):
                make(size)
        except (*MISFITS, InputError):
            return False
        return True

    smaller = next((size for size in reversed(_SIZES_TO_TRY) if size < image_size and works(size)), None)
    larger = next((size for size in _SIZES_TO_TRY if size > image_size and works(size)), None)
    sizes = [str(size) for size in (smaller, larger) if size is not None]
    without = "leave Sobel out (--no-sobel), or " if sobel else ""
    advice = f"use {' or '.join(sizes)}" if sizes else f"no usual size works; {without}choose another architecture"
    return InputError(f"image_size={image_size} does not fit {arch} ({first_line(fault)}); {advice}")


def check_options(arch: str, options: Mapping[str, Any], fault: TypeError) -> None:
    """Raise `InputError` where a library does not know an option of the name."""
    unknown = next((key for key in options if f"'{key}'" in str(fault)), None)
    if unknown is not None:
        raise InputError(f"{arch}: this network has no option {unknown!r}") from fault
