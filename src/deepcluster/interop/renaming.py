"""Other programs' names of the tensors of a ResNet, as torchvision's."""

from collections.abc import Mapping

from torch import Tensor

# lightly's tutorials keep a ResNet as the sequence of its children; 2 and 3 are the ReLU and the pooling.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def usual_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with torchvision's names where they are those of a sequence of a ResNet's children."""
    prefix = _sequence_prefix(tensors)
    if prefix is None:
        return dict(tensors)
    renamed = {}
    for key, value in tensors.items():
        child, _, rest = key.removeprefix(prefix).partition(".")
        is_child = key.startswith(prefix) and child in _CHILDREN and rest
        renamed[f"{prefix}{_CHILDREN[child]}.{rest}" if is_child else key] = value
    return renamed


def _sequence_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what stands before `4.0.conv1.weight`, the first block of such a sequence; None if there is none."""
    first = "4.0.conv1.weight"
    prefixes = [key.removesuffix(first) for key in tensors if key == first or key.endswith(f".{first}")]
    return next((prefix for prefix in prefixes if f"{prefix}0.weight" in tensors), None)
