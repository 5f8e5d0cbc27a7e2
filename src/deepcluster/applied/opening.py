"""What all commands that apply a model share: the model on a device, the images, the file to write, and what is reported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path, spare_inputs, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work, joined_work
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.interop.loading import load, new_interruption
from deepcluster.run.model import Model

# Also arrays, tensors and images of Pillow, which have no type of their own here (`data.sources.given`).
Data = str | Path | Sequence[Any] | Any
# Advice of a stop.
PARTS_KEPT = "the finished parts are kept: the same command continues from there"


@contextmanager
def opened(
    model: str | Path | Model,
    data: Data,
    limit: int | None,
    reporter: Reporter | None,
    *,
    shared: bool,
    device: str,
    workers: int | None,
) -> Iterator[tuple[Model, ImageSource]]:
    """Yield a model on a device, and the images; `shared`: the processes that `torchrun` started work on them together."""
    with joined_work(reporter, new_interruption(PARTS_KEPT)) if shared else nullcontext(Work(reporter)) as work:
        model = model if isinstance(model, Model) else load(model)
        source = open_source(data, limit)
        if model.remark:
            work.reporter.say(f"{model.name}: {model.remark}")
        yield model.on(device, workers=workers, work=work), source


def names_of(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def reasons_by_name(unreadable: Mapping[int, str], source: ImageSource, model: Model) -> dict[str, str]:
    """Return the reasons by name, and warn of them."""
    by_name = {source.name(index): why for index, why in unreadable.items()}
    warn_of_unreadable(by_name, model.work.reporter)
    return by_name


def warn_of_unreadable(by_name: Mapping[str, str], reporter: Reporter) -> None:
    """Warn of images, or rows, that can't be read, by name."""
    warn = reporter.warn
    for name, why in islice(by_name.items(), 3):
        warn(f"{name} can't be read: {why}")
    if len(by_name) > 3:
        warn(f"… and {len(by_name) - 3:,} more; their rows are empty")


def output_target(out: str | Path, endings: tuple[str, ...], *, parts: bool, inputs: Sequence[object]) -> Path:
    """Return the file, or the folder of parts, to write, which is none of the inputs; nothing is made yet."""
    spare_inputs(user_path(out), "--out", *inputs)
    if not parts:
        if user_path(out).is_dir():
            raise InputError(f"--out {out} is a folder: write numbered files into it with --parts, or name a file in it")
        return output_path(out, "--out", endings=endings)
    path = user_path(out)
    if path.is_file():
        raise InputError(f"--out {path} is a file; with --parts name a folder")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"--out {path}: the folder {folder} does not exist or can't be written to")
    return output_path(path, "--out", is_folder=True)
