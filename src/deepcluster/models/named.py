"""What trunks of other libraries share: names with options, sizes, and the fixed Sobel layer in front.

B batch, C channels, H and W pixels, D features.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, Trunk

# What networks raise for images that they can't take: by their own checks, or by torch's where a map has become empty.
MISFITS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError, NotImplementedError)
# Options that are set elsewhere, or that would fetch weights: not allowed in the name of an architecture.
NOT_OPTIONS = (
    *("pretrained", "weights", "weights_backbone", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
    *("num_classes", "in_chans", "img_size", "image_size", "input_size", "features_only", "aux_logits", "init_weights"),
)
# BatchNorm's own default: a running statistic is the average over some ten steps.
USUAL_MOMENTUM = 0.1
_USUAL_SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 299, 384)


class NamedTrunk(Trunk):
    """A classifier of another library without its last layer; "features" are that layer's input, in the library's pooling.

    The stages are the network's own blocks, under the library's names and with its activations. Tokens become maps,
    without the class token.

    Args:
        arch: the full name, with the library's prefix.
        options: arguments of the library's constructor that made the backbone.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front; the first convolution then has 2 input channels.

    Raises:
        InputError: the network can't take images of this size, or does not return a row of features per image.
    """

    def __init__(self, arch: str, backbone: nn.Module, options: Mapping[str, Any], *, image_size: int, sobel: bool) -> None:
        super().__init__()
        self.arch, self.image_size, self.options = arch, image_size, dict(options)
        self.sobel = sobel_layer() if sobel else None
        self.backbone = backbone
        for layer in backbone.modules():
            # Some networks average over thousands of steps, more than a small set has: their statistics would stay random.
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
                layer.momentum = max(layer.momentum, USUAL_MOMENTUM)
        self.embed_stage = FEATURES

    @classmethod
    def fitting(cls, arch: str, *, image_size: int, sobel: bool, **options: Any) -> Self:
        """Make the trunk; where it can't take images of this size, the `InputError` names sizes that fit."""
        make: Any = partial(cls, arch, sobel=sobel, **options)
        try:
            return make(image_size=image_size)  # type: ignore[no-any-return]
        except MISFITS as fault:
            raise misfit(arch, image_size, fault, lambda size: make(image_size=size), sobel=sobel) from fault

    @abstractmethod
    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the maps of the stages `names` in the network's order, from one pass that ends at the last of them."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.embed(self.edges(x_BCHW))
        with self._explained(x_BCHW):
            return self.embed(self.edges(x_BCHW))

    def embed(self, edges_BCHW: Tensor) -> Tensor:
        """Return the features (B, D) of what the network itself takes."""
        return self.backbone(edges_BCHW)  # type: ignore[no-any-return]

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from self.maps(x_BCHW, self.stages).items()

    def maps(self, x_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        for name in names:
            self.check_stage(name)
        with self._explained(x_BCHW):
            found = self._found(self.edges(x_BCHW), names)
        if FEATURES in found:
            found[FEATURES] = found[FEATURES][:, :, None, None]
        return found

    def convolutions(self) -> nn.Module:
        return self.backbone

    @contextmanager
    def _explained(self, x_BCHW: Tensor) -> Iterator[None]:
        """Turn a failure on images of another size into an error that names the size the trunk was made for."""
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
                f"{_first_line(fault)}"
            ) from fault

    @torch.no_grad()
    def _blank_features(self) -> Tensor:
        """Return the features (1, D) of a blank image, or raise `InputError` where they are not one row."""
        device = next((weights.device for weights in self.backbone.parameters()), None)
        self.eval()
        features = self.embed(self.edges(torch.zeros(1, 3, self.image_size, self.image_size, device=device)))
        self.train()
        if not isinstance(features, Tensor) or features.dim() != 2:
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.arch} can't be a trunk: it returns {shape} for an image instead of one row of features")
        return features


def name_and_options(arch: str) -> tuple[str, dict[str, int | float | bool]]:
    """Split `timm:vit_tiny_patch16_224,patch_size=4` into the library's name and the options of the network.

    Raises:
        InputError: an option without a number, or one that is set elsewhere.
    """
    name, *pairs = arch.partition(":")[2].split(",")
    options: dict[str, int | float | bool] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key in NOT_OPTIONS:
            raise InputError(f"{arch}: {key} can't be set in the name of an architecture")
        try:
            options[key] = (
                text == "true" if text in ("true", "false") else int(text) if text.lstrip("-").isdigit() else float(text)
            )
        except ValueError:
            raise InputError(
                f"{arch}: {pair!r} is not an option; write {arch.split(',')[0]},KEY=NUMBER, as in patch_size=4"
            ) from None
    return name, options


def check_options(arch: str, options: Mapping[str, Any], fault: TypeError) -> None:
    """Raise `InputError` where the library reports that it does not know one of the options."""
    unknown = next((key for key in options if f"'{key}'" in str(fault)), None)
    if unknown is not None:
        raise InputError(f"{arch}: this network has no option {unknown!r}") from fault


def misfit(
    arch: str,
    image_size: int,
    fault: BaseException,
    make: Callable[[int], object],
    *,
    sobel: bool,
    otherwise: str = "choose another architecture",
) -> InputError:
    """Return the error for a network that can't take images of this size; it names the nearest sizes that fit.

    `make` is called on the meta device, where only shapes are computed. `otherwise` is the advice where no size fits.
    """

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                make(size)
        except (*MISFITS, InputError):
            return False
        return True

    smaller = next((size for size in reversed(_USUAL_SIZES) if size < image_size and fits(size)), None)
    larger = next((size for size in _USUAL_SIZES if size > image_size and fits(size)), None)
    sizes = [str(size) for size in (smaller, larger) if size is not None]
    without = "leave Sobel out (--no-sobel), or " if sobel else ""
    advice = f"use {' or '.join(sizes)}" if sizes else f"no usual size works; {without}{otherwise}"
    return InputError(f"image_size={image_size} does not fit {arch} ({_first_line(fault)}); {advice}")


def _first_line(fault: BaseException) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)
