"""Names of architectures, without what is heavy: the project's own, and those that torchvision and timm know."""

from deepcluster.core.errors import InputError, did_you_mean

# Of this project; the last two are for images of 32 to 96 px.
ARCHITECTURES = ("alexnet", "vgg16", "resnet18", "resnet50", "alexnet-small", "resnet18-small")
TORCHVISION = "torchvision:"
TIMM = "timm:"
LIBRARIES = (TORCHVISION, TIMM)


def check_arch(name: str) -> None:
    """Raise `InputError` unless `name` can be an architecture.

    It is one of `ARCHITECTURES`, or a library's prefix with a name behind it. Whether the library knows that name is found
    out where the trunk is made, for to ask it takes seconds.
    """
    if name in ARCHITECTURES or any(name.startswith(prefix) and name != prefix for prefix in LIBRARIES):
        return
    raise InputError(
        f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}: use one of {', '.join(ARCHITECTURES)}, "
        "or torchvision:NAME or timm:NAME for a network of these libraries"
    )
