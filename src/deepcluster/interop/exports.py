"""Models for other programs: a table from a format to its writer, and the checks that all formats share.

A writer is a function `write(model, out, **options)` in a file of its own, which `FORMATS` names and which is imported where
it is used. It gets a copy of the model in float32 on the CPU, and a path in a folder whose files are moved at the end.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import check_new_folder, output_path, user_path
from deepcluster.core.options import flag
from deepcluster.core.progress import Reporter
from deepcluster.core.text import size
from deepcluster.interop.loading import load
from deepcluster.run.model import Model
from deepcluster.run.space import ProjectedSpace


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Attributes:
        writer: `module:function` below `deepcluster.interop`.
        what: what is written, for lists.
        endings: endings of the file's name; none: a folder is written.
        options: names of the options that the writer takes.
    """

    writer: str
    what: str
    endings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a writer reports.

    Attributes:
        left_out: parts of the model that the file does not hold, in words; empty if it holds all.
        read_with: a line of Python that reads the file; `{out!r}` stands for its path, `{out.ending!r}` for that with
            another ending.
        notes: more that the user should know.
    """

    left_out: str = ""
    read_with: str = ""
    notes: tuple[str, ...] = ()


_STATE_FILES = (".pt", ".pth", ".safetensors")
FORMATS = {
    "torchvision": Format("state_dicts:write_torchvision", "a state dict for torchvision", _STATE_FILES, ("fold_sobel",)),
    "timm": Format("state_dicts:write_timm", "a state dict for timm", _STATE_FILES, ("fold_sobel",)),
    "huggingface": Format("huggingface:write_folder", "a folder in the layout of the Hugging Face hub", (), ("licence",)),
    "safetensors": Format(
        "safetensors_files:write_safetensors", "the weights of the trunk", (".safetensors",), ("fold_sobel",)
    ),
    "onnx": Format("onnx_files:write_onnx", "a network for ONNX runtimes", (".onnx",), ("output", "input", "fold_sobel")),
    "caffe": Format("caffe.export:write_files", "a Caffe model", (".caffemodel", ".prototxt")),
    "release2018": Format("release2018_export:write_release", "files of the code of 2018"),
}
# For messages where a network does not fit a format.
TAKE_ANY = "--format safetensors, huggingface and onnx take any network"


def export(
    model: str | Path | Model,
    *,
    format: str,
    out: str | Path,
    reporter: Reporter | None = None,
    **options: Any,
) -> Path:
    """Write a model for another program, as `deepcluster export` does (docs/export.md).

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, or what `load` returned, which is not changed.
        format: a name in `FORMATS`.
        out: the file, or for some formats the folder, to write.
        reporter: prints what was written; that of the model by default.
        options: `fold_sobel` (torchvision, timm, safetensors, onnx): compose the Sobel layer with the first convolution;
            `output` and `input` (onnx): what the network returns and takes; `licence` (huggingface): for the model card.

    Returns:
        `out`.

    Raises:
        InputError: the model, the format, an option or `out` can't be used, or the network does not fit the format; nothing
            was written.
    """
    chosen = FORMATS.get(format)
    if chosen is None:
        raise InputError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}: use one of {', '.join(FORMATS)}")
    options = {name: value for name, value in options.items() if value not in (None, False)}
    for name in options.keys() - set(chosen.options):
        formats = [other for other, one in FORMATS.items() if name in one.options]
        known = f"goes with --format {' or '.join(formats)}, not {format}" if formats else "is not an option of export"
        raise InputError(f"{flag(name)} {known}; leave it out")
    path = _checked(chosen, out, format)
    model = model if isinstance(model, Model) else load(model)
    reporter = reporter or model.work.reporter
    module, _, function = chosen.writer.partition(":")
    write = getattr(import_module(f"deepcluster.interop.{module}"), function)
    is_folder = not chosen.endings
    with _scratch(path) as scratch:
        written = write(_portable(model), scratch if is_folder else scratch / path.name, **options) or Written()
        files = _move(scratch, path, is_folder=is_folder)
    names = str(path) if is_folder else ", ".join(map(str, files))
    reporter.say(f"{names}: {chosen.what}, {size(sum(file.stat().st_size for file in files))}")
    _say_more(written, path, reporter)
    return path


def _say_more(written: Written, path: Path, reporter: Reporter) -> None:
    """Print what a file lacks, what else is to know, and how it is read."""
    if written.left_out:
        reporter.say(f"left out: {written.left_out}")
    for note in written.notes:
        reporter.say(note)
    if written.read_with:
        reporter.say(f"read it with: {_with_names(written.read_with, path)}")


def _with_names(line: str, path: Path) -> str:
    return re.sub(r"\{out(\.\w+)?!r\}", lambda match: repr(str(path.with_suffix(match[1]) if match[1] else path)), line)


def _checked(chosen: Format, out: str | Path, name: str) -> Path:
    """Return the path to write; nothing is made yet."""
    path = user_path(out)
    if chosen.endings:
        return output_path(path, "--out", endings=chosen.endings)
    if path.is_file():
        raise InputError(f"--out {path} is a file, and --format {name} writes a folder: name one that does not exist yet")
    check_new_folder(path, "--out")
    return path


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside a path, which is deleted at the end."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    outer = Path(mkdtemp(prefix=f".{path.name[:100]}-", suffix=".part", dir=path.absolute().parent))
    try:
        folder = outer / "files"  # The outer one is readable by the user alone.
        folder.mkdir()
        yield folder
    finally:
        rmtree(outer, ignore_errors=True)


def _move(files: Path, path: Path, *, is_folder: bool) -> list[Path]:
    """Give the files in a folder, or the folder itself, the user's names; return the files."""
    written = [file for file in sorted(files.rglob("*")) if file.is_file()]
    for file in written:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    if not is_folder:
        return [file.replace(path.with_name(file.name)) for file in written]
    if path.is_dir():
        path.rmdir()  # An empty one, which Windows would not replace.
    files.replace(path)
    return [path / file.relative_to(files) for file in written]


def _portable(model: Model) -> Model:
    """Return a copy of a model in float32 on the CPU, whose trunk takes images that are normalised as its settings say."""
    trunk = deepcopy(model.trunk).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    trunk.scale_C11 = trunk.shift_C11 = None
    machine, space = Machine.choose("cpu", "fp32"), model.space
    if isinstance(space, ProjectedSpace):
        projection = deepcopy(space.projection).to("cpu", torch.float32).eval()
        space = replace(space, projection=projection, machine=machine)
    return replace(model, trunk=trunk.requires_grad_(False), space=space, machine=machine)
