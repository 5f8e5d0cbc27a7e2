"""Which network the tensors of a file belong to, by their names and shapes."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.interop.weight_files import WeightFile
from deepcluster.models.archs import ARCHITECTURES, TIMM, TORCHVISION, make_trunk
from deepcluster.models.weights import Match, Undrawn, without_wrappers

# The image size that a network with fully connected layers was trained with shows in the shape of the first of them.
_SIZES = (224, 32, 48, 64, 96, 112, 128, 160, 192, 256, 288, 320)
# A tensor of networks of torchvision by which their family is known.
_FAMILIES = {
    "layer1.0.conv1.weight": "resnet|resnext|wide",
    "features.conv0.weight": "densenet",
    "conv_proj.weight": "vit",
    "features.0.weight": "vgg|alexnet|squeezenet",
    "features.1.conv.0.0.weight": "mobilenet_v2",
    "features.1.block.0.0.weight": "mobilenet_v3",
    "features.1.0.block.0.weight": "convnext",
    "features.1.0.block.0.0.weight": "efficientnet",
    "features.1.0.norm1.weight": "swin",
    "stem.0.weight": "regnet",
    "stem.0.0.weight": "maxvit",
    "layers.0.weight": "mnasnet",
    "conv1.0.weight": "shufflenet",
    "conv1.conv.weight": "googlenet",
    "Conv2d_1a_3x3.conv.weight": "inception",
}
# As many tensors may be those of last layers.
_HEAD_TENSORS = 12
# Tensors that a message names.
_EXAMPLES = 4
# What DeeperCluster's code puts before the names of its networks, which see a border of zeros (`vgg16-deepercluster`).
_DEEPERCLUSTER = "body.features."


@dataclass(frozen=True)
class Network:
    """A network that a file was trained with, as arguments of `make_trunk`."""

    arch: str
    sobel: bool
    image_size: int


def recognise(file: WeightFile, tensors: Mapping[str, Tensor], arch: str | None = None) -> Network:
    """Return the network of a file: the one with most of its tensors, whose names may be among those of a larger network.

    Args:
        tensors: those of the file, under usual names.
        arch: the network that the user named.

    Raises:
        InputError: none fits; the message names what was found.
    """
    best: tuple[bool, int, Network] | None = None
    edges = {value.shape[1] for key, value in tensors.items() if value.dim() == 4 and "sobel" not in key.split(".")}
    for names in [[arch]] if arch else _candidates(file, tensors):
        for name in names:
            for size in _sizes(name):
                network = Network(name, sobel=2 in edges and 3 not in edges, image_size=size)
                match = _match(network, tensors)
                if match is not None and match.fits:
                    score = (_is_whole(match), len(match.matching))
                    if best is None or score > best[:2]:
                        best = (*score, network)
                if match is not None and not match.differing:
                    break  # Other sizes have the same names.
        if best is not None and best[0]:
            break
    if best is None or not (best[0] or arch):
        if arch:
            _check_made(arch)
        raise InputError(_complaint(file, tensors, arch))
    return best[2]


def _candidates(file: WeightFile, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield names of networks: this project's, those that the file names, then those of torchvision's family."""
    names = [without_wrappers(key) for key in tensors]
    unlike = "vgg16" if any(name.startswith(_DEEPERCLUSTER) for name in names) else "vgg16-deepercluster"
    yield [name for name in ARCHITECTURES if name != unlike]
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    words = {word for name in file.names() for word in (name, name.partition(".")[0], name.partition("-")[0])}
    yield [TORCHVISION + one for one in known if one in words]
    try:
        import timm

        yield [TIMM + word for word in sorted(words) if timm.is_model(word)]
    except ImportError:
        pass
    for first, family in _FAMILIES.items():
        prefix = next((name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")), None)
        if prefix is not None:
            own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            # The last layer may be missing, or another one.
            likely = [one for one in known if re.match(family, one) and len(own ^ _names_of(one)) <= _HEAD_TENSORS]
            yield [TORCHVISION + one for one in likely]


@cache
def _names_of(name: str) -> frozenset[str]:
    """Return the names of the tensors of a network of torchvision."""
    import torchvision

    with Undrawn(), warnings.catch_warnings(action="ignore"):
        network = torchvision.models.get_model(name, weights=None)
    return frozenset(network.state_dict())


def _is_whole(match: Match) -> bool:
    """Return whether no layers are left over beside the last one, as there would be of a larger network."""
    parts = {name.partition(".")[0] for name in match.wanted} - {"classifier", "heads", "head"}
    left = [name.removeprefix(match.prefix) for name in match.left if name.startswith(match.prefix)]
    return not any(name.partition(".")[0] in parts for name in left)


def _sizes(arch: str) -> tuple[int, ...]:
    """Return the image sizes to try, where the network's shapes depend on them; the usual one first."""
    if arch.startswith(("alexnet", "vgg16")) and arch != "alexnet-small":
        return _SIZES
    return (32,) if arch.endswith("-small") else (224, 299, 256, 192, 384)


def _match(network: Network, tensors: Mapping[str, Tensor]) -> Match | None:
    """Return how the tensors match a network; None if it can't be made for this size."""
    try:
        with Undrawn(), warnings.catch_warnings(action="ignore"):
            return Match.of(make_trunk(network.arch, image_size=network.image_size, sobel=network.sobel), tensors)
    except InputError:
        return None


def _check_made(arch: str) -> None:
    """Raise `InputError` if the network that the user named can be made for no size, such as one that its library lacks."""
    if all(_match(Network(arch, sobel=False, image_size=size), {}) is None for size in _sizes(arch)):
        with Undrawn():
            make_trunk(arch, image_size=_sizes(arch)[0], sobel=False)


def _complaint(file: WeightFile, tensors: Mapping[str, Tensor], arch: str | None) -> str:
    """Say which network was found instead, as far as names and shapes show it."""
    shapes = [f"{key} {'×'.join(map(str, value.shape))}" for key, value in tensors.items() if value.dim() > 1]
    found = f"{len(tensors)} tensors, such as {', '.join((shapes or list(tensors))[:_EXAMPLES])}"
    if arch is not None:
        return f"{file.path} does not hold the weights of {arch}: it has {found}"
    named = [name for name in dict.fromkeys(file.names()) if name not in ("", ".")]
    return (
        f"{file.path}: the network of this file is not known: it has {found}. Name a network of torchvision or timm before "
        f"the file, as in timm:NAME@{file.path.name}" + (f" (looked up there: {', '.join(named[:3])})" if named else "")
    )
