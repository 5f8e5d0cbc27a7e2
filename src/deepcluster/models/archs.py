"""Names of architectures, without heavy imports: the project's own, and those that torchvision and timm know."""

from deepcluster.core.errors import InputError, did_you_mean

# The project's own; the last two are for images of 32 to 96 px.
ARCHITECTURES = ("alexnet", "vgg16", "resnet18", "resnet50", "alexnet-small", "resnet18-small")
TORCHVISION = "torchvision:"
TIMM = "timm:"
LIBRARIES = (TORCHVISION, TIMM)


def check_arch(name: str) -> None:
    """Raise `InputError` unless `name` can be an architecture: one of `ARCHITECTURES`, or a library's prefix and a name.

    Whether the library knows that name is checked where the trunk is made, since importing a library takes seconds.
    """
    if name in ARCHITECTURES or any(name.startswith(prefix) and name != prefix for prefix in LIBRARIES):
        return
    raise InputError(
        f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}: use one of {', '.join(ARCHITECTURES)}, "
        "or torchvision:NAME or timm:NAME for a network of these libraries"
    )
