"""`evaluate`: one protocol on a model; `evaluate_all`: every protocol that finds its data; `compare`: results of runs."""

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import output_path, user_path, write_whole
from deepcluster.core.html import block, line
from deepcluster.core.options import Checked
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work, joined_work
from deepcluster.evaluation.datasets.labelled import contents_of
from deepcluster.evaluation.layouts import LAYOUTS, find_data
from deepcluster.evaluation.options import PROTOCOLS, ClustersOptions
from deepcluster.evaluation.results import Results, Table, by_case, shown
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model
from deepcluster.run.resumable import digest_of


@dataclass(frozen=True)
class Evaluation:
    """The results of a protocol on a model and data, as the user named them; `path` is the JSON file, if one was written."""

    results: Results
    model: str
    data: str
    seconds: float
    path: Path | None

    def __repr__(self) -> str:
        headline = f"{' '.join(self.results.headline)} {self.results.best():.3g}"
        return f"Evaluation({self.results.protocol} of {self.model} on {self.data}: {headline}; .results, .path)"

    def _repr_html_(self) -> str:
        return block(line(f"{self.model} on {self.data}", faint=True)) + self.results._repr_html_()


def evaluate(
    protocol: str,
    model: str | Path | Model,
    data: str | Path,
    *,
    quick: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a model by a protocol, as `deepcluster evaluate PROTOCOL` does.

    Args:
        protocol: a name in `deepcluster.evaluation.options.PROTOCOLS`.
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or the result of `load`.
        data: the folder of the data set (docs/evaluation.md).
        quick: shorter settings (`Protocol.quick`), for a first look.
        out: file (`.json`) or folder for the results; by default the folder `evaluation` of the run, where there is a run.
        device, workers: as in `embed`.
        reporter: prints lines and progress.
        options: of the protocol (`deepcluster.evaluation.options`).

    Raises:
        InputError: protocol, model, data, options or file can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; the same call continues where this one stopped.
    """
    checked, path, folder = _checked(protocol, model, data, out, _options(protocol, options, quick=quick))
    interruption = new_interruption()
    with interruption.listening():
        if (
            isinstance(checked, ClustersOptions)
            and isinstance(model, str | Path)
            and RunFolder(user_path(model)).is_of_table()
        ):
            return _evaluate_table_run(user_path(model), folder, checked, path, Work(reporter, interruption))
        applied = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        return _evaluate(protocol, applied, folder, checked, path)


def _checked(
    protocol: str, model: str | Path | Model, data: str | Path, out: str | Path | None, checked: Checked
) -> tuple[Checked, Path | None, Path]:
    """Return the options, the file to write, and the folder of the data."""
    path, folder = _target(model, protocol, out), user_path(data)
    if not folder.is_dir():
        raise InputError(f"--data {data}: {contents_of(folder)}; give the folder of the data set")
    return checked, path, folder


def prepare(
    protocol: str,
    model: str | Path | Model,
    data: str | Path,
    *,
    quick: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> bool:
    """Do the long work of `evaluate` in all processes that `torchrun` started; its results go into the cache folder.

    That is the extraction of features, and of the dense protocols training and prediction.

    Returns:
        True on the first process, which should then call `evaluate` with the same arguments; the others are done.

    Raises:
        InputError: as `evaluate`, or the processes do not share the cache folder.
        Interrupted: Ctrl-C or SIGTERM; the same call continues where this one stopped.
    """
    checked, _, folder = _checked(protocol, model, data, out, _options(protocol, options, quick=quick))
    with joined_work(reporter, new_interruption()) as work:
        applied = loaded(model, device=device, workers=workers, work=work)
        if (module := _preparing(protocol)) is not None:
            module.prepare(applied, folder, checked)
        return work.ranks.is_main


def _preparing(protocol: str) -> Any:
    """Return the module of a protocol whose long work several processes can share; None for any other."""
    module = importlib.import_module(PROTOCOLS[protocol].module)
    return module if hasattr(module, "prepare") else None


def _options(protocol: str, options: Mapping[str, Any], *, quick: bool = False) -> Checked:
    if protocol not in PROTOCOLS:
        near = did_you_mean(protocol, PROTOCOLS)
        raise InputError(f"unknown protocol {protocol!r}{near}: use one of {', '.join(PROTOCOLS)}")
    known = PROTOCOLS[protocol]
    return known.options.from_dict({**(known.quick if quick else {}), **options})


def _evaluate(protocol: str, model: Model, data: Path, options: Checked, path: Path | None) -> Evaluation:
    module = importlib.import_module(PROTOCOLS[protocol].module)
    started = time.monotonic()
    if path is not None:
        try:
            output_path(path.parent, "the results in", is_folder=True)
        except InputError as fault:  # Long work should not end with this news.
            model.work.reporter.warn(f"{fault} by --out; they will be printed only")
    found: Results = module.evaluate(model, data, options)
    machine = {"device": model.machine.device.type, "precision": model.machine.precision}
    results = replace(found, settings={"arch": model.trunk.arch, **found.settings, **machine})
    evaluation = Evaluation(results, model.name, str(data), time.monotonic() - started, path)
    return _written(evaluation, _key(model, data, options), model.work)


def _evaluate_table_run(run: Path, data: Path, options: ClustersOptions, path: Path | None, work: Work) -> Evaluation:
    """Evaluate the clusters of a run without a network."""
    from deepcluster.evaluation.clusters import evaluate_table_run

    started = time.monotonic()
    results = evaluate_table_run(run, data, options, work)
    evaluation = Evaluation(results, str(run), str(data), time.monotonic() - started, path)
    return _written(evaluation, digest_of(str(run.resolve()), str(data.resolve())), work)


def _written(evaluation: Evaluation, key: str, work: Work) -> Evaluation:
    """Write the file of an evaluation, and its pictures; return it, without the path if that failed."""
    results, path = evaluation.results, evaluation.path
    if path is None:
        return evaluation
    about = {"model": evaluation.model, "data_folder": evaluation.data, "seconds": round(evaluation.seconds, 3)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**results.as_dict(), **about, "key": key}, indent=2) + "\n")
        for name, picture in results.pictures.items():
            file = path.with_suffix("") / f"{name}.png"
            file.parent.mkdir(exist_ok=True)
            picture.save(file)
    except OSError as fault:  # The numbers are printed all the same.
        why = (fault.strerror or str(fault)).lower()
        work.reporter.warn(f"the results can't be written to {path} ({why}); --out names another place")
        return replace(evaluation, path=None)
    return evaluation


def _key(model: Model, data: Path, options: Checked) -> str:
    """Return digits that change with the model, the place of the data and the options."""
    return digest_of(model.weights, str(data.resolve()), options.as_dict())


def _kept(path: Path | None, key: str) -> Evaluation | None:
    """Return the evaluation in a file, if it is of the same model, data and options."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if content.get("key") != key:
            return None
        return Evaluation(Results.from_dict(content), content["model"], content["data_folder"], content["seconds"], path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _target(model: str | Path | Model, protocol: str, out: str | Path | None) -> Path | None:
    """Return the file to write; nothing is created yet."""
    if out is None:
        run = user_path(model.name if isinstance(model, Model) else model)
        return run / "evaluation" / f"{protocol}.json" if RunFolder(run).is_run() else None
    out = user_path(out)
    if out.is_dir() or out.suffix != ".json":
        return output_path(out, "--out", is_folder=True) / f"{protocol}.json"
    output_path(out.absolute().parent, "--out", is_folder=True)
    return out


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
    """Evaluate a model by every protocol that finds its data in a folder, or in the folders in it.

    A protocol that can't use what it found is left out with a warning that says why.

    Args:
        only: only these protocols.
        options: of the protocols, by protocol.
        again: repeat evaluations whose results exist for the same model, data and options.
        quick: shorter settings (`Protocol.quick`), for a first look.
        out: folder for the results; by default as for `evaluate`.
        on_result: called with each result as it comes.

    Raises:
        InputError: nothing can be evaluated on what is there.
    """
    reporter = reporter or Reporter(quiet=True)
    chosen, found = _all(data_root, only, quick=quick, options=options)
    done = []
    interruption = new_interruption()
    with interruption.listening():
        applied = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        for protocol, folder, name in found:
            path = _target_of_all(model, name, out)
            reporter.say(f"{protocol} on {folder}")
            try:
                kept = None if again else _kept(path, _key(applied, folder, chosen[protocol]))
                done.append(kept or _evaluate(protocol, applied, folder, chosen[protocol], path))
            except InputError as fault:
                reporter.warn(f"{protocol} is left out: {fault}")
                continue
            on_result(done[-1])
    return done


def prepare_all(
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
) -> bool:
    """Do the long work of `evaluate_all`, as `prepare` does for `evaluate`."""
    chosen, found = _all(data_root, only, quick=quick, options=options)
    with joined_work(reporter, new_interruption()) as work:
        applied, ranks = loaded(model, device=device, workers=workers, work=work), work.ranks
        for protocol, folder, name in found:
            path, key = _target_of_all(model, name, out), _key(applied, folder, chosen[protocol])
            module, refusal = _preparing(protocol), ""
            kept = None if again else ranks.from_main(partial(_kept, path, key))
            if module is None or kept is not None:
                continue
            work.reporter.say(f"{protocol} on {folder}")
            try:
                module.prepare(applied, folder, chosen[protocol])
            except InputError as fault:  # `evaluate_all` warns of it.
                refusal = str(fault)
            ranks.check_same(f"the data of {protocol}", refusal)
        return ranks.is_main


def _all(
    data_root: str | Path, only: Sequence[str], *, quick: bool, options: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Checked], list[tuple[str, Path, str]]]:
    """Return the options of each protocol, and what `find_data` finds."""
    for protocol in only:
        _options(protocol, {})
    chosen = {
        name: _options(name, {**known.in_all, **(known.quick if quick else {}), **options.get(name, {})})
        for name, known in PROTOCOLS.items()
    }
    found = list(find_data(user_path(data_root), only))
    if not found:
        layouts = dict.fromkeys(PROTOCOLS[protocol].layout for protocol in only or PROTOCOLS)
        wanted, there = "; ".join(LAYOUTS[name][0] for name in layouts), contents_of(Path(data_root))
        raise InputError(f"{data_root}: no protocol finds its data there ({there}). Looked for: {wanted}")
    return chosen, found


def _target_of_all(model: str | Path | Model, name: str, out: str | Path | None) -> Path | None:
    return _target(model, name, Path(out) / f"{name}.json" if out is not None else None)


def summary(evaluations: Sequence[Evaluation]) -> Table:
    """Return a table of one row per evaluation: its headline."""
    found = [(one.results, Path(one.data).resolve().name) for one in evaluations]
    rows = [[r.protocol, data, " ".join(r.headline), shown(r.headline[0], r.best())] for r, data in found]
    return Table(["protocol", "data", "measure", "value"], rows)


def compare(runs: Sequence[str | Path], *, everything: bool = False) -> tuple[Table, list[str]]:
    """Return the results of several runs side by side, and remarks where they were not measured in the same way.

    Args:
        runs: run folders, or folders of result files.
        everything: all measures instead of only that of the headline.

    Raises:
        InputError: a folder has no results, or a damaged one.
    """
    contents = [_read_results(Path(run)) for run in runs]
    rows, remarks = [], []
    known = list(PROTOCOLS)

    def order(name: str) -> tuple[int, str]:
        return next((number for number, one in enumerate(known) if name.startswith(one)), len(known)), name

    for name in sorted({name for content in contents for name in content}, key=order):
        found = [content.get(name) for content in contents]
        there = [one for one in found if one is not None]
        for part in ("data", "settings"):
            keys = sorted({key for one in there for key in one[part]})
            values = {key: list(dict.fromkeys(str(one[part].get(key, "–")) for one in found if one)) for key in keys}
            differing = [f"{key}: {' / '.join(some)}" for key, some in values.items() if len(some) > 1]
            if differing:
                remarks.append(f"{name}: not the same {part} ({'; '.join(differing)})")
        # Measures with the stages (or other cases) of each, in the order of the files.
        cases = {
            (measure, case): None
            for one in there
            for measure in (one["results"] if everything else one.get("headline", ())[:1])
            for case in by_case(one["results"].get(measure))
        }
        for measure, case in cases:
            cells = [shown(measure, by_case(one["results"].get(measure)).get(case) if one else None) for one in found]
            rows.append([" ".join(filter(None, (name, measure.replace("_", " "), case))), *cells])
    return Table(["", *(str(run) for run in runs)], rows), remarks


def _read_results(run: Path) -> dict[str, dict[str, Any]]:
    folder = run / "evaluation" if (run / "evaluation").is_dir() else run
    contents = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise InputError(f"{path} can't be read: {fault}") from None
        if isinstance(content, dict) and {"protocol", "results", "settings", "data"} <= content.keys():
            contents[path.stem] = content
    if not contents:
        raise InputError(f"{run} has no results of `deepcluster evaluate`: {contents_of(folder)}")
    return contents
