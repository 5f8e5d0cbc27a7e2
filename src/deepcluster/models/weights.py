"""Weights to start from: read from a file, and fitted to a trunk by their names and shapes.

A file may be of this project, of torchvision or timm, or of another program that trained such a network: what its names
have in front of the trunk's own (`module.backbone.`, `encoder_q.`) is found by matching them, not by a list.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors
from deepcluster.models.trunk import Trunk

TORCH_FILES = (".pt", ".pth", ".tar", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
# Where programs keep a network's weights among other things, those of a trunk or of a teacher first.
NESTED = (
    *("trunk", "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model"),
    *("student", "backbone", "encoder", "net", "network", "module", "weights"),
)
# What a folder may hold: a run, or a model as hubs keep it.
IN_FOLDERS = ("checkpoints/last.pt", "model.safetensors", "pytorch_model.bin")
# Wrappers put these anywhere into names (DataParallel around a part in the release of 2018, torch.compile).
_WRAPPERS = ("module", "_orig_mod")
# Under this share of the trunk's tensors the file is not of this network.
LEAST_SHARE = 0.8
_EXAMPLES = 4


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a file, or of a run folder; no code in it is ever run.

    Args:
        path: .pt, .pth, .pth.tar, .bin or .ckpt as torch saves them, .safetensors, or a folder with a run or one of these.

    Raises:
        InputError: no such file, of another kind, damaged, with code in it, or without tensors.
    """
    path = _file_of(Path(path))
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix not in TORCH_FILES:
        raise InputError(f"{path} is no file of weights: use one that ends in {', '.join((*TORCH_FILES, SAFETENSORS))}")
    # Many programs keep their options beside the weights: a plain holder of values.
    with torch.serialization.safe_globals([Namespace]):
        state = load_tensors(path)
    found = _tensors(state)
    if not found:
        names = ", ".join(map(str, list(state)[:_EXAMPLES])) or "nothing"
        raise InputError(f"{path} holds no weights of a network: it has {names}; looked for {', '.join(NESTED)}")
    return found


def take_weights(trunk: Trunk, weights: Mapping[str, Tensor], *, name: str) -> str:
    """Put weights into the trunk where their names fit; all or nothing, but for a few tensors that the file may lack.

    Args:
        name: of the file, for messages.

    Returns:
        A sentence for the log: how many tensors were taken, which the trunk keeps as they were, which were left out.

    Raises:
        InputError: too few names fit, shapes differ, or weights are not finite; the trunk is as it was.
    """
    wanted = _wanted(trunk)
    given = {_unwrapped(key): value for key, value in weights.items()}
    prefix = _prefix(wanted, given)
    fitting = {key: given[prefix + key] for key in wanted if prefix + key in given}
    _check_names(trunk, wanted, fitting, given, name)
    _check_values(trunk, wanted, fitting, name)
    with torch.no_grad():
        for key, value in fitting.items():
            wanted[key].copy_(value)
    counted = _counted(wanted)
    missing = [key for key in counted if key not in fitting]
    taken = {prefix + key for key in fitting}
    left = [key for key in given if key not in taken and not key.startswith("sobel.")]
    text = f"initialised {len(counted) - len(missing)} of {len(counted)} tensors of {trunk.arch} from {name}"
    kept = f"; kept at random {_some(missing)}" if missing else ""
    return text + kept + (f"; left out {_some(left)}" if left else "")


def _file_of(path: Path) -> Path:
    if path.is_dir():
        file = next((path / inner for inner in IN_FOLDERS if (path / inner).is_file()), None)
        if file is None:
            raise InputError(f"{path} is a folder without weights: it has none of {', '.join(IN_FOLDERS)}")
        return file
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs safetensors: pip install 'deepcluster[safetensors]'") from None
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as fault:
        raise InputError(f"{path} can't be read: truncated, damaged or not safetensors ({fault})") from None
    if not found:
        raise InputError(f"{path} holds no weights of a network")
    return found


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of a dictionary, or of the first one nested in it that has the name of a network."""
    if not isinstance(state, Mapping):
        return {}
    for name in NESTED:
        inner = _tensors(state.get(name))
        if inner:
            return inner
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _wanted(trunk: Trunk) -> dict[str, Tensor]:
    """The trunk's tensors under the network's own names, without the fixed Sobel layer."""
    state = {key: value for key, value in trunk.state_dict().items() if not key.startswith("sobel.")}
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def _counted(wanted: Mapping[str, Tensor]) -> list[str]:
    """All but BatchNorm's counters of batches, which older files lack and nothing here reads."""
    return [key for key in wanted if not key.endswith("num_batches_tracked")]


def _endings(key: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = key.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))


def _prefix(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What most names of the file that end like one of the trunk's have in front of that; of two copies, the first."""
    fronts = Counter(
        key.removesuffix(ending)
        for key, value in given.items()
        for ending in _endings(key)
        if ending in wanted and wanted[ending].ndim == value.ndim
    )
    return fronts.most_common(1)[0][0] if fronts else ""


def _check_names(
    trunk: Trunk, wanted: Mapping[str, Tensor], fitting: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str
) -> None:
    counted = _counted(wanted)
    missing = [key for key in counted if key not in fitting]
    if len(missing) > (1 - LEAST_SHARE) * len(counted):
        raise InputError(
            f"{name} does not hold the weights of {trunk.arch}: {len(counted) - len(missing)} of {len(counted)} names fit; "
            f"the network has {_some(missing)}, the file {_some(list(given))}; use the --arch that the file was trained with"
        )


def _check_values(trunk: Trunk, wanted: Mapping[str, Tensor], fitting: Mapping[str, Tensor], name: str) -> None:
    differing = [key for key, value in fitting.items() if value.shape != wanted[key].shape]
    if differing:
        first = differing[0]
        ours, theirs = wanted[first], fitting[first]
        if ours.ndim == 4 and ours.shape[2:] == theirs.shape[2:] and {ours.shape[1], theirs.shape[1]} == {2, 3}:
            raise InputError(
                f"{name} was trained on {_images_of(theirs)}, this {trunk.arch} looks at {_images_of(ours)} ({first}); "
                f"use {'--no-sobel' if theirs.shape[1] == 3 else '--sobel'}"
            )
        shapes = ", ".join(f"{key} {_shape(fitting[key])} for {_shape(wanted[key])}" for key in differing[:_EXAMPLES])
        raise InputError(
            f"{name} does not fit {trunk.arch}: {len(differing)} tensors have another shape ({shapes}); "
            "use the --arch and the --image-size that the file was trained with"
        )
    broken = [key for key, value in fitting.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{name} has weights that are not finite: {_some(broken)}; use an earlier checkpoint")


def _images_of(filters: Tensor) -> str:
    return "colour images (3 channels)" if filters.shape[1] == 3 else "the 2 channels of the Sobel layer"


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _some(names: Sequence[str]) -> str:
    """All of a few names, or how many and the first."""
    shown = ", ".join(names[:_EXAMPLES])
    return shown if len(names) <= _EXAMPLES else f"{len(names)} tensors ({shown}, …)"
