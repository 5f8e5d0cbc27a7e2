"""What the scripts of 2018 share: the form of their help, the lines of their loader, and their meters."""

import sys
import time
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path
from deepcluster.core.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from deepcluster.run.model import Model

Value = TypeVar("Value")


class Arguments(Protocol):
    """What takes arguments: a parser, or a group of one."""

    def add_argument(self, *names: str, **about: Any) -> Any:
        """Add an argument."""


def parser_of(script: str, description: str | None = None) -> tuple[ArgumentParser, Arguments]:
    """Return the parser of a script, and what its optional arguments are added to; its help has the form of 2018."""
    parser = ArgumentParser(script, description=description, add_help=False)
    arguments = parser.add_argument_group("optional arguments")
    arguments.add_argument("-h", "--help", action="help", default=SUPPRESS, help="show this help message and exit")
    return parser, arguments


def needed(value: Value | None, flag: str, what: str) -> Value:
    """Return the value of an argument that a script can't do without, though its parser does not ask for it.

    Raises:
        InputError: it is missing.
    """
    if value is None or value == "":
        raise InputError(f"{flag} is missing: {what}")
    return value


def say(line: str, end: str = "\n") -> None:
    """Print a line at once, also into a pipe."""
    print(line, end=end, flush=True)


def weight_decay_of(exponent: float) -> float:
    """Return the weight decay of `--wd`, a power of ten; warn of an exponent that seems to be the number itself.

    Raises:
        InputError: no number holds it.
    """
    try:
        decay: float = 10.0**exponent
    except OverflowError:
        raise InputError(f"--wd {exponent:g} is a power of ten that no number holds; -5 is usual") from None
    if exponent >= 0:
        print(
            f"warning: --wd is a power of ten, so --wd {exponent:g} is a weight decay of {decay:g}; --wd -5 is one of 1e-05",
            file=sys.stderr,
        )
    return decay


def folder_of(exp: str) -> Path:
    """Return the folder `--exp`, which is made; the current one for an empty name, as in 2018.

    Raises:
        InputError: it can't be written to.
    """
    folder = output_path(exp or ".", "--exp", is_folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def open_model(path: str | None, *, workers: int | None = None, advice: str) -> Iterator["Model"]:
    """Yield the model that `--model` names, and print the loader's lines; requests to stop are heard inside.

    Args:
        advice: what a stop leaves, and how to continue.

    Raises:
        InputError: it is not a model.
    """
    from deepcluster.interop.loading import UNTRAINED, load, loaded, new_interruption

    name = needed(path, "--model", "name a checkpoint.pth.tar, or a run folder of deepcluster")
    interruption = new_interruption(advice)
    with interruption.listening():
        file = name.partition("@")[2] or name  # ARCH@FILE
        if not any(Path(one).expanduser().exists() for one in (name, file)) and not name.startswith(UNTRAINED):
            say(f"=> no checkpoint found at '{name}'")
        else:
            say(f"=> loading checkpoint '{name}'")
        model = load(name)
        say("Loaded")
        if model.remark:
            print(f"{name}: {model.remark}", file=sys.stderr, flush=True)
        yield loaded(model, workers=workers, reporter=Reporter(quiet=True), interruption=interruption)


def check_arch(model: "Model", script: str, known: tuple[str, ...], instead: str) -> None:
    """Raise `InputError` unless the trunk is of an architecture that a script of 2018 is made for."""
    if model.trunk.arch not in known:
        names = " and ".join({"alexnet": "AlexNet", "vgg16": "VGG-16"}[arch] for arch in known)
        raise InputError(f"{model.name} holds {model.trunk.arch}, and {script} is made for {names}: use {instead}")


def check_layer(model: "Model", conv: int) -> None:
    """Raise `InputError` unless the trunk has the convolutional layer of this number, counted from 1."""
    known = [stage for stage in model.trunk.stages if stage.startswith("conv")]
    if not known:
        raise InputError(
            f"{model.name} holds {model.trunk.arch}, which has no stages conv1, conv2, …: use `deepcluster visualize`"
        )
    if f"conv{conv}" not in known:
        raise InputError(f"--conv {conv}: {model.trunk.arch} has the convolutional layers 1 to {len(known)}")


def state_dict_of(model: "Model") -> dict[str, "Tensor"]:
    """Return the weights of a model by the names and in the order of 2018, with the last layer where its file has one."""
    from deepcluster.core.files import user_path
    from deepcluster.interop.cluster_heads import top_layer
    from deepcluster.interop.weight_files import read_file

    own = {name: value for name, value in model.trunk.state_dict().items() if not name.endswith("num_batches_tracked")}
    edges = {name: value for name, value in own.items() if name.startswith("sobel.")}
    weights = {name: value for name, value in own.items() if name not in edges}
    with suppress(InputError):  # A model that is no file.
        if (last := top_layer(read_file(user_path(model.name)).tensors, model.trunk.dim)) is not None:
            weights |= {"top_layer.weight": last.weight_KD, "top_layer.bias": last.bias_K}
    return weights | edges


class Meter:
    """The last value of a measure, and its mean; tensors are read only when they are shown."""

    def __init__(self) -> None:
        self._last: float | Tensor = 0.0
        self._total: float | Tensor = 0.0
        self._count = 0

    def add(self, value: "float | Tensor", count: int = 1) -> None:
        """Count a value `count` times."""
        self._last, self._total, self._count = value, self._total + value * count, self._count + count

    @property
    def mean(self) -> float:
        """The mean so far; 0 of nothing."""
        return float(self._total) / max(self._count, 1)

    def text(self, digits: int) -> str:
        """Return the last value, and the mean in brackets."""
        return f"{float(self._last):.{digits}f} ({self.mean:.{digits}f})"


class Meters:
    """Time per batch, time until its data was there, and named values, as the lines of 2018 show them."""

    def __init__(self) -> None:
        self.values: dict[str, Meter] = {}
        self.restart()

    def restart(self) -> None:
        """Reset the times, as at the start of an epoch."""
        self.time, self.data, self._end = Meter(), Meter(), time.perf_counter()

    def add(self, values: Mapping[str, "float | Tensor"], count: int, *, started: float | None = None) -> None:
        """Add the values of a batch of `count` images; `started`: when its data was there."""
        now = time.perf_counter()
        if started is not None:
            self.data.add(started - self._end)
        self.time.add(now - self._end)
        self._end = now
        for name, value in values.items():
            self.values.setdefault(name, Meter()).add(value, count)

    def line(self, *, data: bool) -> str:
        """Return the times (that of the data on request) and the values: four digits of a loss, three of all others."""
        times = [f"Time {self.time.text(3)}", *([f"Data {self.data.text(3)}"] if data else [])]
        return "\t".join([*times, *(f"{name} {one.text(4 if name == 'Loss' else 3)}" for name, one in self.values.items())])
