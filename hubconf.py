"""Entry points for torch.hub: trunks of models that `deepcluster.load` opens, in eval mode.

    trunk = torch.hub.load("FOLDER-OF-THIS-FILE", "trunk_from", "MODEL", source="local")

MODEL is a run folder, a checkpoint file, or `untrained:ARCH` (random weights). A trunk takes normalised images (B, 3, S, S)
and returns features (B, D); `trunk.stages` names its stages, `trunk.stage(images, name)` returns the map of one.
"""

from __future__ import annotations

import pathlib
import sys

# torch.hub adds only the folder of this file to the path. It lists every public callable here as an entry point.
_SOURCE = pathlib.Path(__file__).resolve().parent / "src"
if _SOURCE.is_dir() and str(_SOURCE) not in sys.path:
    sys.path.insert(0, str(_SOURCE))

dependencies = [
    *("torch", "torchvision", "numpy", "scipy", "sklearn", "pyarrow"),
    *("PIL", "simplejpeg", "fsspec", "click", "rich"),
]


def trunk_from(path_or_model):
    """Return the trunk of any model that `deepcluster.load` opens."""
    import deepcluster

    is_loaded = isinstance(path_or_model, deepcluster.Model)
    return (path_or_model if is_loaded else deepcluster.load(path_or_model)).trunk.eval()


def alexnet_from(path_or_model):
    """Return the trunk of a model of an AlexNet."""
    return _trunk_of("alexnet", path_or_model)


def vgg16_from(path_or_model):
    """Return the trunk of a model of a VGG-16."""
    return _trunk_of("vgg16", path_or_model)


def resnet50_from(path_or_model):
    """Return the trunk of a model of a ResNet-50."""
    return _trunk_of("resnet50", path_or_model)


def _trunk_of(family, path_or_model):
    """Return the trunk of a model, or raise `deepcluster.InputError` if its network is another."""
    from deepcluster import InputError

    trunk = trunk_from(path_or_model)
    if trunk.arch.partition(":")[2].partition(",")[0] != family and trunk.arch.partition("-")[0] != family:
        raise InputError(
            f"{path_or_model} is a model of {trunk.arch}, not {family}: use trunk_from, which takes any network"
        )
    return trunk
