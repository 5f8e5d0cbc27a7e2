"""Files of weights of any program: what torch, safetensors or Caffe have written, or a folder with such a file.

Only tensors and plain values are read; code in a file is never run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of, check_file, load_tensors, user_path
from deepcluster.core.inert import Inert
from deepcluster.core.kinds import stand_in
from deepcluster.interop.renaming import usual_names

TORCH_FILES = (".pt", ".pth", ".tar", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
CAFFE_FILES = (".caffemodel", ".prototxt")
# Where programs keep a network's weights among other values; those of a trunk or of a teacher first.
NESTED = (
    *("trunk", "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "classy_state_dict"),
    *("base_model", "model", "student", "backbone", "encoder", "net", "network", "module", "weights"),
)
# What a folder may hold: a run, or a model in the layout of hubs.
IN_FOLDERS = ("checkpoints/last.pt", "model.safetensors", "pytorch_model.bin")
# Under these names programs keep the name of a network among their options.
NAMED = ("arch", "architecture", "backbone", "encoder", "model", "model_name", "name")
_DEEPEST = 4
_DEEPEST_MODULE = 100
_EXAMPLES = 4


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        path: the file itself.
        tensors: those of the network by name.
        facts: plain values beside them, such as `arch` and `epoch`; the content of a hub's `config.json`.
        remarks: what a reader should know of them.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def names(self) -> Iterator[str]:
        """Yield what may be the name of the network: from the values beside the tensors, then from the file's name."""
        yield from _names_in(self.facts, 0, set())
        yield self.path.name.partition(".")[0]
        yield self.path.parent.name


def has_hub_files(folder: Path) -> bool:
    """Return whether a folder holds a model in the layout of hubs, and no run."""
    is_run = (folder / IN_FOLDERS[0]).is_file() or (folder / "metrics.jsonl").is_file()
    return not is_run and any((folder / name).is_file() for name in IN_FOLDERS[1:])


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file under usual names, as `read_file` does."""
    return usual_names(read_file(path).tensors)


def read_file(path: str | Path) -> WeightFile:
    """Read a file of weights, or a folder with one.

    Args:
        path: .pt, .pth, .pth.tar, .bin or .ckpt as torch saves them, .safetensors, .caffemodel or .prototxt (either of a
            pair), or a folder with a run or one of these.

    Raises:
        InputError: no such file, of another kind, damaged, with code in it, or without tensors.
    """
    path, facts = user_path(path), dict[str, Any]()
    if path.is_dir():
        file = next((path / inner for inner in IN_FOLDERS if (path / inner).is_file()), None)
        if file is None:
            raise InputError(f"{path} is a folder without weights: it has none of {', '.join(IN_FOLDERS)}")
        with suppress(OSError, ValueError):
            content = json.loads((path / "config.json").read_text(encoding="utf-8"))
            facts = content if isinstance(content, dict) else {}
        path = file
    check_file(path)
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path, facts)
    if path.suffix in CAFFE_FILES:
        return _read_caffe(path)
    if path.suffix not in TORCH_FILES:
        endings = (*TORCH_FILES, SAFETENSORS, *CAFFE_FILES)
        raise InputError(f"{path} is not a file of weights: use one that ends in {', '.join(endings)}")
    return file_of(load_tensors(path), path, facts)


def file_of(state: Mapping[str, Any], path: Path, facts: Mapping[str, Any] | None = None) -> WeightFile:
    """Return the weights among the content of a file.

    Raises:
        InputError: there are none.
    """
    found = _tensors(state)
    if not found and "table" in state:
        raise InputError(f"{path} has clusters of a table of embeddings ({state['table']}), and no network to start from")
    if not found:
        names = ", ".join(map(str, list(state)[:_EXAMPLES])) or "nothing"
        raise InputError(f"{path} holds no weights of a network: it has {names}; looked for {', '.join(NESTED)}")
    # Such as those of a student and of its teacher.
    copies = [name for name in NESTED if name in state and _tensors(state[name], 1)]
    remarks = (f"of {' and '.join(copies)} in the file, {copies[0]} was used",) if len(copies) > 1 else ()
    beside = {str(key): value for key, value in state.items() if not isinstance(value, Tensor)}
    return WeightFile(path, found, {**beside, **(facts or {})}, remarks)


def _read_safetensors(path: Path, facts: Mapping[str, Any]) -> WeightFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"{path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as fault:
        if found_instead := stand_in(begin_of(path)):
            raise InputError(f"{path} is not a safetensors file: it is {found_instead}") from None
        raise InputError(f"{path} can't be read: truncated, damaged or not safetensors ({fault})") from None
    if not found:
        raise InputError(f"{path} holds no weights of a network")
    return WeightFile(path, found, {**metadata, **facts})


def _read_caffe(path: Path) -> WeightFile:
    from deepcluster.interop.caffe.read import read_caffe

    found = read_caffe(path)
    tensors = dict(found.tensors)
    if found.top_layer is not None:
        tensors["top_layer.weight"], tensors["top_layer.bias"] = found.top_layer
    facts = {"arch": found.arch, "pretrained_cfg": {"mean": found.mean, "std": found.std}}
    return WeightFile(path, tensors, facts, tuple(found.remarks))


def _tensors(state: Any, depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors of the first dictionary nested in the state under the name of a network, or of the state itself.

    A module that was pickled as a whole is an inert object; the tensors in its state have the names of its `state_dict`.
    """
    if isinstance(state, Inert):
        return dict(_module_tensors(state, "", set()))
    if not isinstance(state, Mapping) or depth > _DEEPEST:
        return {}
    for name in NESTED:
        inner = _tensors(state.get(name), depth + 1)
        if inner:
            return inner
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _module_tensors(module: Inert, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module and of those in it, each module once."""
    seen.add(id(module))
    state: Mapping[str, Any] = module.state if isinstance(module.state, Mapping) else {}
    for kind in ("_parameters", "_buffers"):
        values = state.get(kind)
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
    inner = state.get("_modules")
    for name, value in inner.items() if isinstance(inner, Mapping) and prefix.count(".") < _DEEPEST_MODULE else ():
        if isinstance(value, Inert) and id(value) not in seen:
            yield from _module_tensors(value, f"{prefix}{name}.", seen)


def _names_in(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    """Yield the texts under the keys `NAMED`, also of options that another program kept as an object."""
    value = value.state if isinstance(value, Inert) else value
    if isinstance(value, Mapping) and depth < _DEEPEST and id(value) not in seen:
        seen.add(id(value))
        for key in NAMED:
            if isinstance(value.get(key), str):
                yield value[key]
        for inner in value.values():
            yield from _names_in(inner, depth + 1, seen)
