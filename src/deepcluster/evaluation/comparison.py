"""Results of several runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.labelled import seen_in
from deepcluster.evaluation.options import PROTOCOLS
from deepcluster.evaluation.results import Table, shown


def compare(runs: Sequence[str | Path], *, everything: bool = False) -> tuple[Table, list[str]]:
    """The results of several runs side by side, and remarks where they were not measured alike.

    Args:
        runs: run folders, or folders of result files.
        everything: all measures, not the one of the headline in all its cases alone.

    Raises:
        InputError: a folder has no results, or a damaged one.
    """
    contents = [_read_results(Path(run)) for run in runs]
    names = sorted({name for content in contents for name in content}, key=_order)
    rows, remarks = [], []
    for name in names:
        found = [content.get(name) for content in contents]
        there = [one for one in found if one is not None]
        for part in ("data", "settings"):
            differing = sorted({key for one in there for key in one[part] if one[part][key] != there[0][part].get(key)})
            if differing:
                remarks.append(f"{name}: not the same {part} ({', '.join(differing)})")
        for measure, case in _cases(there, everything=everything):
            values = [shown(measure, _value(one, measure, case)) for one in found]
            rows.append([" ".join(filter(None, (name, measure.replace("_", " "), case))), *values])
    return Table(["", *(str(run) for run in runs)], rows), remarks


def _read_results(run: Path) -> dict[str, dict[str, Any]]:
    folder = run / "evaluation" if (run / "evaluation").is_dir() else run
    contents = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            is_result = isinstance(content, dict) and {"protocol", "results", "settings", "data"} <= content.keys()
        except (OSError, ValueError) as fault:
            raise InputError(f"{path} can't be read: {fault}") from None
        if is_result:
            contents[path.stem] = content
    if not contents:
        raise InputError(f"{run} has no results of `deepcluster evaluate`: {seen_in(folder)}")
    return contents


def _order(name: str) -> tuple[int, str]:
    known = list(PROTOCOLS)
    return next((number for number, protocol in enumerate(known) if name.startswith(protocol)), len(known)), name


def _cases(there: Sequence[Mapping[str, Any]], *, everything: bool) -> list[tuple[str, str]]:
    """Measures with the stages (or other cases) of each, in the order of the files."""
    cases: dict[tuple[str, str], None] = {}
    for one in there:
        wanted = one["results"] if everything else one.get("headline", ())[:1]
        for measure in wanted:
            value = one["results"].get(measure)
            cases |= dict.fromkeys((measure, case) for case in (value if isinstance(value, Mapping) else ("",)))
    return list(cases)


def _value(one: Mapping[str, Any] | None, measure: str, case: str) -> float | None:
    value = None if one is None else one["results"].get(measure)
    return value.get(case) if isinstance(value, Mapping) else None if case else value
