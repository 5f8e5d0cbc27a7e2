"""Initial weights: read from a file, and matched with a trunk by their names and shapes.

A file may come from this project, from torchvision or timm, or from another program that trained such a network: its
prefix of the trunk's own names (`module.backbone.`, `encoder_q.`) is found by matching, not from a list.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of, check_file, load_tensors
from deepcluster.core.kinds import stand_in
from deepcluster.models.trunk import Trunk

TORCH_FILES = (".pt", ".pth", ".tar", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
# Where programs keep a network's weights among other values; those of a trunk or of a teacher first.
NESTED = (
    *("trunk", "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model"),
    *("student", "backbone", "encoder", "net", "network", "module", "weights"),
)
# What a folder may hold: a run, or a model in the layout of hubs.
IN_FOLDERS = ("checkpoints/last.pt", "model.safetensors", "pytorch_model.bin")
# Wrappers put these anywhere into names (DataParallel around a part in the 2018 release, torch.compile).
_WRAPPERS = ("module", "_orig_mod")
# With a smaller share of the trunk's tensors the file is of another network.
LEAST_SHARE = 0.8
_EXAMPLES = 4


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the names and tensors of a file or a run folder; code in it is never run.

    Args:
        path: .pt, .pth, .pth.tar, .bin or .ckpt as torch saves them, .safetensors, or a folder with a run or one of these.

    Raises:
        InputError: no such file, of another kind, damaged, with code in it, or without tensors.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / inner for inner in IN_FOLDERS if (path / inner).is_file()), None)
        if file is None:
            raise InputError(f"{path} is a folder without weights: it has none of {', '.join(IN_FOLDERS)}")
        path = file
    check_file(path)
    if path.suffix == SAFETENSORS:
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise InputError(f"{path} needs safetensors: pip install safetensors") from None
        try:
            found: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as fault:
            if found_instead := stand_in(begin_of(path)):
                raise InputError(f"{path} is not a safetensors file: it is {found_instead}") from None
            raise InputError(f"{path} can't be read: truncated, damaged or not safetensors ({fault})") from None
        if not found:
            raise InputError(f"{path} holds no weights of a network")
        return found
    if path.suffix not in TORCH_FILES:
        raise InputError(f"{path} is not a file of weights: use one that ends in {', '.join((*TORCH_FILES, SAFETENSORS))}")
    # Many programs keep their options beside the weights, in a plain Namespace.
    with torch.serialization.safe_globals([Namespace]):
        state = load_tensors(path)
    found = _tensors(state)
    if not found:
        names = ", ".join(map(str, list(state)[:_EXAMPLES])) or "nothing"
        raise InputError(f"{path} holds no weights of a network: it has {names}; looked for {', '.join(NESTED)}")
    return found


def take_weights(trunk: Trunk, weights: Mapping[str, Tensor], *, name: str) -> str:
    """Copy weights into the trunk where their names match: all or nothing, except that the file may lack a few tensors.

    Args:
        name: name of the file, for messages.

    Returns:
        A sentence for the log: how many tensors were copied, which stay random, which were left out.

    Raises:
        InputError: too few names match, shapes differ, or weights are not finite; the trunk is unchanged.
    """
    # The network's own names, without the fixed Sobel layer.
    state = {key: value for key, value in trunk.state_dict().items() if not key.startswith("sobel.")}
    wanted = {key.removeprefix("backbone."): value for key, value in state.items()}
    given = {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in weights.items()}
    # The most frequent prefix of the file's names that end like the trunk's; the first one of two copies.
    prefixes: Counter[str] = Counter()
    for key, value in given.items():
        parts = key.split(".")
        for ending in (".".join(parts[first:]) for first in range(len(parts))):
            if ending in wanted and wanted[ending].ndim == value.ndim:
                prefixes[key.removesuffix(ending)] += 1
    prefix = max(prefixes, key=lambda one: prefixes[one], default="")
    matching = {key: given[prefix + key] for key in wanted if prefix + key in given}
    # BatchNorm's counters of batches are not counted: older files lack them, and nothing here reads them.
    counted = [key for key in wanted if not key.endswith("num_batches_tracked")]
    missing = [key for key in counted if key not in matching]
    share = f"{len(counted) - len(missing)} of {len(counted)}"
    if len(missing) > (1 - LEAST_SHARE) * len(counted):
        raise InputError(
            f"{name} does not hold the weights of {trunk.arch}: {share} names match; "
            f"the network has {_some(missing)}, the file {_some(list(given))}; use the --arch that the file was trained with"
        )
    _check_values(trunk.arch, wanted, matching, name)
    with torch.no_grad():
        for key, value in matching.items():
            wanted[key].copy_(value)
    copied = {prefix + key for key in matching}
    left = [key for key in given if key not in copied and not key.startswith("sobel.")]
    kept = f"; kept at random {_some(missing)}" if missing else ""
    return f"initialised {share} tensors of {trunk.arch} from {name}{kept}" + (f"; left out {_some(left)}" if left else "")


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of the first dictionary nested in the state under the name of a network, or of the state itself."""
    if not isinstance(state, Mapping):
        return {}
    for name in NESTED:
        inner = _tensors(state.get(name))
        if inner:
            return inner
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _check_values(arch: str, wanted: Mapping[str, Tensor], matching: Mapping[str, Tensor], name: str) -> None:
    """Raise `InputError` where shapes differ or a weight is not finite."""
    differing = [key for key, value in matching.items() if value.shape != wanted[key].shape]
    if differing:
        first = differing[0]
        ours, theirs = wanted[first], matching[first]
        if ours.ndim == 4 and ours.shape[2:] == theirs.shape[2:] and {ours.shape[1], theirs.shape[1]} == {2, 3}:
            colour, edges = "colour images (3 channels)", "the 2 channels of the Sobel layer"
            used, made = (colour, edges) if theirs.shape[1] == 3 else (edges, colour)
            raise InputError(
                f"{name} was trained on {used}, this {arch} takes {made} ({first}); "
                f"use {'--no-sobel' if used == colour else '--sobel'}"
            )
        pairs = [(key, *("×".join(map(str, each[key].shape)) for each in (matching, wanted))) for key in differing]
        shapes = ", ".join(f"{key} {theirs} for {ours}" for key, theirs, ours in pairs[:_EXAMPLES])
        raise InputError(
            f"{name} does not fit {arch}: {len(differing)} tensors have another shape ({shapes}); "
            "use the --arch and the --image-size that the file was trained with"
        )
    broken = [key for key, value in matching.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{name} has weights that are not finite: {_some(broken)}; use an earlier checkpoint")


def _some(names: Sequence[str]) -> str:
    """Write all of a few names, or how many there are and the first of them."""
    shown = ", ".join(names[:_EXAMPLES])
    return shown if len(names) <= _EXAMPLES else f"{len(names)} tensors ({shown}, …)"
