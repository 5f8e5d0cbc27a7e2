"""`evaluate`: one protocol on a model, with its file; all that a folder of data sets allows."""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import write_whole
from deepcluster.core.options import Checked
from deepcluster.core.progress import Reporter
from deepcluster.evaluation.datasets.buildings import is_buildings
from deepcluster.evaluation.datasets.labelled import has_train_val, seen_in
from deepcluster.evaluation.datasets.voc import open_voc
from deepcluster.evaluation.options import PROTOCOLS, QUICK
from deepcluster.evaluation.results import Results, Table, shown
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model, loaded, new_interruption
from deepcluster.run.resumable import digest_of


# Which folder a protocol can be run on.
def _opens(opener: Callable[[Path], object]) -> Callable[[Path], bool]:
    def fits(folder: Path) -> bool:
        try:
            opener(folder)
        except InputError:
            return False
        return True

    return fits


LAYOUTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "classes": ("class folders in train/ and val/", has_train_val),
    "voc": ("a Pascal VOC devkit", _opens(open_voc)),
    "buildings": ("Oxford or Paris buildings with their ground truth", is_buildings),
}
LAYOUT_OF = {
    "linear": "classes",
    "knn": "classes",
    "clusters": "classes",
    "voc07-classification": "voc",
    "voc07-svm": "voc",
    "semi-supervised": "classes",
    "retrieval": "buildings",
}


@dataclass(frozen=True)
class Evaluation:
    """What a protocol gave, and where it was written.

    Attributes:
        model, data: as the person named them.
        seconds: that it took.
        path: of the JSON file; None where there is no folder for it.
    """

    results: Results
    model: str
    data: str
    seconds: float
    path: Path | None


def evaluate(
    protocol: str,
    model: str | Path | Model,
    data: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Evaluation:
    """Judge a model by a protocol, as `deepcluster evaluate PROTOCOL` does.

    Args:
        protocol: a name in `deepcluster.evaluation.options.PROTOCOLS`.
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or what `load` gave.
        data: the folder of the data set (docs/evaluation.md).
        out: file (`.json`) or folder for the results; by default the folder `evaluation` of the run, where there is a run.
        device, workers: how the work is done.
        reporter: told how far the work is.
        options: of the protocol (`deepcluster.evaluation.options`).

    Raises:
        InputError: protocol, model, data, options or file can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on where this one stopped.
    """
    checked = _options(protocol, options)
    path = _target(model, protocol, out)
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"--data {data}: {seen_in(folder)}; give the folder of the data set")
    interruption = new_interruption()
    with interruption.listening():
        applied = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        return _judge(protocol, applied, folder, checked, path)


def _options(protocol: str, options: Mapping[str, Any]) -> Any:
    if protocol not in PROTOCOLS:
        near = did_you_mean(protocol, PROTOCOLS)
        raise InputError(f"unknown protocol {protocol!r}{near}: use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol].from_dict(options)


def _judge(protocol: str, model: Model, data: Path, options: Any, path: Path | None) -> Evaluation:
    module = importlib.import_module(f"deepcluster.evaluation.{protocol.replace('-', '_')}")
    started = time.monotonic()
    found: Results = module.evaluate(model, data, options)
    results = replace(found, settings={"arch": model.trunk.arch, **found.settings, **_precision(model)})
    evaluation = Evaluation(results, model.name, str(data), time.monotonic() - started, path)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(_content(evaluation, _key(model, data, options)), indent=2) + "\n")
    return evaluation


def _precision(model: Model) -> dict[str, str]:
    return {"device": model.machine.device.type, "precision": model.machine.precision}


def _key(model: Model, data: Path, options: Checked) -> str:
    """What changes with the model, the place of the data and the options."""
    return digest_of(model.weights, str(data.resolve()), options.as_dict())


def _content(evaluation: Evaluation, key: str) -> dict[str, Any]:
    """The file of the contract."""
    about = {"model": evaluation.model, "data_folder": evaluation.data, "seconds": round(evaluation.seconds, 3), "key": key}
    return {**evaluation.results.as_dict(), **about}


def _kept(path: Path | None, key: str) -> Evaluation | None:
    """What was found before of the same model, data and options."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if content.get("key") != key:
            return None
        return Evaluation(Results.from_dict(content), content["model"], content["data_folder"], content["seconds"], path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _target(model: str | Path | Model, protocol: str, out: str | Path | None) -> Path | None:
    """The file that is written; nothing is made yet."""
    if out is None:
        run = Path(model.name if isinstance(model, Model) else model)
        return run / "evaluation" / f"{protocol}.json" if RunFolder(run).is_run() else None
    path = Path(out) if Path(out).suffix == ".json" else Path(out) / f"{protocol}.json"
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        what = f"{parent} is no folder that can be written to"
        raise InputError(f"--out {out}: {what}; name a folder, or a file ending in .json")
    return path


def evaluate_all(
    model: str | Path | Model,
    data_root: str | Path,
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    again: bool = False,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    on_result: Callable[[Evaluation], None] = lambda evaluation: None,
) -> list[Evaluation]:
    """Judge a model by every protocol that finds its data in a folder, or in the folders in it.

    A protocol that can't use what it found is left out with a warning that says why.

    Args:
        only: these protocols alone.
        options: of the protocols, by protocol.
        again: judge anew what has a file of the same model, data and options.
        quick: shorter settings (`deepcluster.evaluation.options.QUICK`), for a first look.
        out: folder for the results; by default as for `evaluate`.
        on_result: told each result as it comes.

    Raises:
        InputError: nothing can be evaluated on what is there.
    """
    reporter = reporter or Reporter(quiet=True)
    chosen = {
        protocol: _options(
            protocol,
            {**ALL_OPTIONS.get(protocol, {}), **(QUICK.get(protocol, {}) if quick else {}), **options.get(protocol, {})},
        )
        for protocol in PROTOCOLS
    }
    found = list(_find_data(Path(data_root), only))
    if not found:
        wanted, there = "; ".join(text for text, _ in LAYOUTS.values()), seen_in(Path(data_root))
        raise InputError(f"{data_root}: no protocol finds its data there ({there}). Looked for: {wanted}")
    done = []
    interruption = new_interruption()
    with interruption.listening():
        applied = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        for protocol, folder, name in found:
            path = _target(model, name, Path(out) / f"{name}.json" if out is not None else None)
            reporter.say(f"{protocol} on {folder}")
            try:
                options_of = chosen[protocol]
                kept = None if again else _kept(path, _key(applied, folder, options_of))
                done.append(kept or _judge(protocol, applied, folder, options_of, path))
            except InputError as fault:
                reporter.warn(f"{protocol} is left out: {fault}")
                continue
            on_result(done[-1])
    return done


# What `all` asks for beyond the defaults.
ALL_OPTIONS: dict[str, dict[str, Any]] = {"voc07-svm": {"low_shot": True}, "knn": {"stages": "all", "k": (20,)}}


def _find_data(root: Path, only: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Protocol, folder of its data, and the name of its file: with that of the data where there are several."""
    for protocol in only:
        _options(protocol, {})
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    by_layout = {name: [folder for folder in folders if fits(folder)] for name, (_, fits) in LAYOUTS.items()}
    for protocol in only or PROTOCOLS:
        fitting = by_layout[LAYOUT_OF[protocol]]
        for folder in fitting:
            yield protocol, folder, protocol if len(fitting) == 1 else f"{protocol}-{folder.resolve().name}"


def summary(evaluations: Sequence[Evaluation]) -> Table:
    """One line a protocol: its headline."""
    rows = []
    for evaluation in evaluations:
        results = evaluation.results
        measure, *case = results.headline
        value = shown(measure, results.best())
        rows.append([results.protocol, Path(evaluation.data).resolve().name, " ".join([measure, *case]), value])
    return Table(["protocol", "data", "measure", "value"], rows)
