"""The run at a glance: what, when, with which settings, and what came of it, in numbers and curves. K clusters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from deepcluster.core.text import count_of, duration
from deepcluster.visualization.report.collection import RunFacts
from deepcluster.visualization.report.curves import clusterings, curves_of, guess_of
from deepcluster.visualization.report.page import Section, render, shown

# Measures that are plain numbers; all others are shares, shown in percent.
PLAIN_MEASURES: Final = ("nmi", "adjusted_rand", "clusters")
# Names of classes that are shown.
MOST_CLASSES: Final = 20
MOMENT: Final = "%Y-%m-%d %H:%M"
# A number that is seen first: value, what it is called, what it means and what not.
Tile = tuple[str, str, str]


def glance_section(run: RunFacts) -> Section:
    """Return the section of a run, or of a table that is no run."""
    curves = curves_of(run.metrics, run.sizes_K, run.heads)
    # Every setting, with the reason where the recipe chose it.
    settings, changed = [], run.config.get("changed_by_recipe") or {}
    for name, value in (run.config.get("settings") or {}).items():
        reason = shown(str((changed.get(name) or {}).get("reason", "")))
        settings.append({"name": name, "value": _plainly(value, range_of=name.endswith("_scale")), "reason": reason})
    html = render(
        "glance.html.jinja",
        run=run,
        when=_when(run),
        tiles=list(_tiles(run)),
        results=_results(run.evaluations),
        comparison=_comparison(run.comparison),
        curves=curves,
        settings=settings,
        facts=_facts(run),
    )
    figures = {curve.name: curve.figure for curve in curves}
    return Section("run", "The run" if run.config else "The table", html, figures=figures)


def _when(run: RunFacts) -> str:
    made = f"This page was made on {run.made_at:{MOMENT}}."
    if run.clustered:
        moment = f" on {run.started:{MOMENT}}" if run.started else ""
        what = "The features of a model" if run.clustered.get("stage") else "A table of embeddings"
        return f"{what} were clustered{moment}; nothing was trained. {made}".replace("embeddings were", "embeddings was")
    if not run.metrics and not run.config:
        return made
    if run.config.get("clustered"):
        return f"Clustered{f' on {run.started:{MOMENT}}' if run.started else ''}; nothing was trained. {made}"
    parts = [f"Started {run.started:{MOMENT}}"] if run.started else []
    if run.finished:
        parts.append(f"finished {run.ended:{MOMENT}}" if run.ended else "finished")
    elif run.metrics:
        parts.append(f"not finished: the last epoch here is {run.metrics[-1]['epoch']} of {run.setting('epochs') or '?'}")
    else:
        parts.append("no epoch is done yet")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}. {made}"


def _tiles(run: RunFacts) -> Iterator[Tile]:
    """Yield the tiles whose numbers are known: of the data, the clusters, the training, and what was measured."""
    count = run.n_images if run.n_images is not None else (run.config.get("data") or {}).get("images")
    if count is not None:
        words = (
            f"{run.n_unreadable:,} more can't be read, and {'is' if run.n_unreadable == 1 else 'are'} in no cluster."
            if run.n_unreadable
            else "All could be read."
        )
        yield f"{count - run.n_unreadable:,}", "images", words
    count = len(run.sizes_K) or run.last("clusters") or next(iter(run.heads), None)
    if isinstance(count, int):
        words = "Sets of images with similar features. More clusters than kinds of things is usual."
        if len(run.sizes_K):
            n_empty, median = int((run.sizes_K == 0).sum()), np.median(run.sizes_K)
            words += f" {n_empty:,} are empty." if n_empty else f" Their median size is {count_of(round(median), 'image')}."
        if len(run.heads) > 1:
            words += f" The run learned {len(run.heads)} clusterings side by side ({_plainly(run.heads)} clusters)."
        if run.setting("super_clusters"):
            words += f" They lie in {run.setting('super_clusters'):,} super-clusters."
        yield f"{count:,}", "clusters", words
    if run.clustered:
        name = str(run.clustered.get("model", "")).rstrip("/").rpartition("/")[2]
        words = "Its features were clustered" if run.clustered.get("stage") else "Its embeddings were clustered"
        words += ", whitened." if run.clustered.get("whitened") else ", not whitened."
        yield shown(name), "model" if run.clustered.get("stage") else "table", words
    yield from _training(run)
    previous = [line["nmi_previous"] for line in clusterings(run.metrics) if line.get("nmi_previous") is not None]
    if previous:
        words = "How much the last clustering agrees with the one before: 1 is the same. Stability, not quality."
        yield f"{previous[-1]:.3f}", "NMI to the clusters before", words
    if (nmi := run.last("nmi_labels")) is not None:
        words = "How well the clusters predict your labels, 0 to 1. Training never saw them. Compare it only at equal K."
        yield f"{nmi:.3f}", "NMI to labels", words
    if (accuracy := run.last("knn")) is not None:
        words = "Share of images whose nearest neighbours have the same label. A measure of quality, by your labels."
        yield f"{accuracy:.1%}", "k-NN accuracy", words


def _training(run: RunFacts) -> Iterator[Tile]:
    """Yield epochs, network, time and loss."""
    if run.metrics:
        done, planned, every = run.metrics[-1]["epoch"], run.setting("epochs"), run.setting("reassign_every")
        value = f"{done:,}" if run.finished or not planned else f"{done:,} of {planned:,}"
        words = "Rounds of learning the pseudo-labels."
        if isinstance(every, int):
            last = f", up to epoch {run.setting('stop_reassigning'):,}" if run.setting("stop_reassigning") else ""
            words += f" The images are clustered {'in each of them' if every == 1 else f'every {every:,} epochs'}{last}."
        yield value, "epoch" if value == "1" else "epochs", words
    arch, side, stage = (run.setting(name) for name in ("arch", "image_size", "cluster_stage"))
    if arch:
        words = f"It sees images of {side} pixels." if side else ""
        projection = run.setting("projection") if run.setting("method") == "deepcluster-v2" else None
        if projection:
            words += f" Its projection, of {projection[-1]} numbers, is clustered."
        elif stage:
            words += f" Its stage “{stage}” is clustered."
        yield shown(str(arch)), "network", words
    seconds = sum(sum(line["seconds"].values()) for line in run.metrics if line.get("seconds"))
    if seconds:
        shares = [line["data_wait_share"] for line in run.metrics if line.get("data_wait_share") is not None]
        waiting = f" {np.mean(shares):.1%} of it was waiting for images." if shares else ""
        yield duration(seconds), "time", f"Sum of the epochs.{waiting}"
    loss, count = run.last("loss"), run.last("clusters_nonempty")
    if loss is not None:
        words = "Not a measure of quality: the labels change with each clustering."
        if count:
            guess, formula = guess_of(count, run.heads)
            words += f" Guessing would cost {'ln K' if formula.startswith('ln') else formula} = {guess:.2f}."
        yield f"{loss:.2f}", "loss", words


def _results(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of the table of results: what was measured, on what, and its headline."""
    rows = []
    for content in evaluations:
        value: Any = content.get("results")
        headline = [str(name) for name in content.get("headline") or ()]
        for name in headline:
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, int | float | None):
            continue
        number = "–"
        if value is not None and value == value:
            number = f"{value:.3f}" if headline and headline[0].startswith(PLAIN_MEASURES) else f"{value:.1%}"
        row = {
            "protocol": str(content.get("protocol", "?")),
            "measure": ", ".join(headline),
            "value": number,
            "data": str(content.get("data_folder", "")),
            "notes": "; ".join(map(str, content.get("notes") or ())),
        }
        rows.append({name: shown(text) for name, text in row.items()})
    return rows


def _comparison(measures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table of numbers of clusters that were compared."""
    rows = []
    for line in measures:
        if isinstance(line.get("clusters"), int):
            number = {name: line.get(name) for name in ("stability", "silhouette", "largest")}
            texts = {name: f"{value:.3f}" if isinstance(value, int | float) else "–" for name, value in number.items()}
            if isinstance(number["largest"], int | float):
                texts["largest"] = f"{number['largest']:.1%}"
            rows.append({"clusters": f"{line['clusters']:,}", "used": bool(line.get("used")), **texts})
    return rows


def _facts(run: RunFacts) -> list[tuple[str, str]]:
    """Return data, versions and command, as pairs of a name and a text."""
    data, config = run.config.get("data") or {}, run.config
    classes = [str(name) for name in data.get("classes") or ()]
    more = f" and {len(classes) - MOST_CLASSES:,} more" if len(classes) > MOST_CLASSES else ""
    pairs = [
        ("data", str(data.get("description", ""))),
        (count_of(len(classes), "class"), ", ".join(classes[:MOST_CLASSES]) + more if classes else ""),
        ("fingerprint of the data", str(data.get("fingerprint", ""))),
        *[("command", str(command)) for command in config.get("earlier_commands") or ()],
        ("last command" if config.get("earlier_commands") else "command", str(config.get("command", ""))),
        ("folder", run.folder),
        ("versions", ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items())),
    ]
    return [(name, shown(text)) for name, text in pairs if text]


def _plainly(value: Any, *, range_of: bool = False) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return (" – " if range_of else ", ").join(_plainly(one) for one in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else shown(str(value))
