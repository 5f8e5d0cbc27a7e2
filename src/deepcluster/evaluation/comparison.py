"""Results of several runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.labelled import contents_of
from deepcluster.evaluation.options import PROTOCOLS
from deepcluster.evaluation.results import Table, by_case, shown


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
    for name in sorted({name for content in contents for name in content}, key=_order):
        found = [content.get(name) for content in contents]
        there = [one for one in found if one is not None]
        for part in ("data", "settings"):
            differing = sorted({key for one in there for key in one[part] if one[part][key] != there[0][part].get(key)})
            if differing:
                remarks.append(f"{name}: not the same {part} ({', '.join(differing)})")
        for measure, case in _cases(there, everything=everything):
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


def _order(name: str) -> tuple[int, str]:
    known = list(PROTOCOLS)
    return next((number for number, protocol in enumerate(known) if name.startswith(protocol)), len(known)), name


def _cases(there: Sequence[Mapping[str, Any]], *, everything: bool) -> list[tuple[str, str]]:
    """Return measures with the stages (or other cases) of each, in the order of the files."""
    found = (
        (measure, case)
        for one in there
        for measure in (one["results"] if everything else one.get("headline", ())[:1])
        for case in by_case(one["results"].get(measure))
    )
    return list(dict.fromkeys(found))
