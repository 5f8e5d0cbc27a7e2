"""The fixed Sobel layer composed with the first convolution into one larger convolution of RGB, for readers of one layer.

Grey, Sobel and a convolution of k × k are linear: together they are a convolution of (k+2) × (k+2), padded by one more
pixel. It equals them wherever its window lies inside the image. At the border it differs, since there the network pads the
Sobel map with zeros, not the image. Without padding in the first convolution, or where the Sobel layer pads the image by
more (DeeperCluster), it is equal everywhere.

B batch, C channels, H and W pixels, O filters, k side of the kernel.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from deepcluster.core.errors import InputError
from deepcluster.models.trunk import Trunk

# A share of the largest value up to which values are the same in float32.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Folded:
    """A trunk without its Sobel layer.

    Attributes:
        trunk: a copy whose first convolution takes RGB.
        layer: name of that convolution in the library's network.
        share: share of its positions where it equals the two layers.
        difference: mean distance of the features of images of noise, as a share of their mean length.
    """

    trunk: Trunk
    layer: str
    share: float
    difference: float

    @property
    def convolution(self) -> nn.Conv2d:
        """The composed convolution."""
        names = dict(self.trunk.named_modules())
        found: nn.Conv2d = names.get(self.layer) or names[f"backbone.{self.layer}"]
        return found

    def describe(self) -> str:
        """Return what was done and how exact it is, for a printed line."""
        side = self.convolution.kernel_size[0]
        where = "everywhere" if self.share == 1 else f"at {100 * self.share:.1f} % of its positions, not at the border"
        return (
            f"Sobel is folded into {self.layer}, now {side} × {side} on RGB: equal {where}; features of images of noise "
            f"differ by {100 * self.difference:.2g} % of their length"
        )

    def layer_in_python(self) -> str:
        """Return the constructor of the composed convolution."""
        one = self.convolution
        bias = "" if one.bias is not None else ", bias=False"
        return f"torch.nn.Conv2d(3, {one.out_channels}, {one.kernel_size}, {one.stride}, {one.padding}{bias})"


@torch.no_grad()
def fold_sobel(trunk: Trunk, image_size: int) -> Folded:
    """Return a copy of a trunk with the Sobel layer in its first convolution.

    Raises:
        InputError: there is no Sobel layer, or no plain convolution that follows it.
    """
    if trunk.sobel is None:
        raise InputError("--fold-sobel: this network has no Sobel layer; leave the option out")
    name, convolution = _first_convolution(trunk, image_size)
    composed = _compose(trunk, convolution)
    folded = deepcopy(trunk)
    folded.sobel = None
    folded.set_submodule(name, composed)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, 3, image_size, image_size, generator=generator)
    try:
        features_BD = folded(images_BCHW)
    except RuntimeError:
        raise InputError(f"--fold-sobel: {trunk.arch} uses its input in more than {name}; leave the option out") from None
    own_BD, edges_BCHW = trunk(images_BCHW), trunk.edges(images_BCHW)
    own_BOHW, other_BOHW = convolution(edges_BCHW), composed(images_BCHW)
    equal_HW = ((own_BOHW - other_BOHW).abs() <= _ROUNDING * own_BOHW.abs().max()).all(dim=1).all(dim=0)
    difference = float((features_BD - own_BD).norm(dim=1).mean() / own_BD.norm(dim=1).mean())
    return Folded(folded, name.removeprefix("backbone."), float(equal_HW.double().mean()), difference)


def _first_convolution(trunk: Trunk, image_size: int) -> tuple[str, nn.Conv2d]:
    """Return the convolution, and its name, that takes what the Sobel layer returns."""
    found: list[str] = []
    edges: list[Tensor] = []

    def note_edges(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        edges.append(output)

    hooks = [trunk.get_submodule("sobel").register_forward_hook(note_edges)]
    for name, layer in trunk.named_modules():
        if isinstance(layer, nn.Conv2d) and not name.startswith("sobel."):

            def note(layer: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                if given[0] is edges[-1]:
                    found.append(name)

            hooks.append(layer.register_forward_pre_hook(note))
    try:
        trunk(torch.zeros(1, 3, image_size, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    layer = trunk.get_submodule(found[0]) if len(found) == 1 else None
    # Subclasses change their padding or their weights.
    plain = type(layer) is nn.Conv2d and isinstance(layer.padding, tuple)
    if not plain or (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), "zeros"):  # type: ignore[union-attr]
        raise InputError(
            f"--fold-sobel: the first layer of {trunk.arch} is not a plain convolution; leave the option out, which keeps "
            "both layers (--format safetensors, huggingface or onnx)"
        )
    return found[0], layer  # type: ignore[return-value]


def _compose(trunk: Trunk, convolution: nn.Conv2d) -> nn.Conv2d:
    """Return grey, Sobel and a convolution as one convolution."""
    grey, filters = (layer for layer in trunk.get_submodule("sobel").children() if isinstance(layer, nn.Conv2d))
    high, wide = convolution.kernel_size
    down, right = convolution.stride
    top, left = (int(side) + int(filters.padding[0]) for side in convolution.padding)
    composed = nn.Conv2d(
        3,
        convolution.out_channels,
        (high + 2, wide + 2),
        (down, right),
        (top, left),
        bias=convolution.bias is not None,
    )
    kernels_O1kk = conv_transpose2d(convolution.weight.double(), filters.weight.double())
    composed.weight.copy_(kernels_O1kk * grey.weight.double())
    if convolution.bias is not None and composed.bias is not None:
        composed.bias.copy_(convolution.bias)
    return composed.requires_grad_(False).eval()
