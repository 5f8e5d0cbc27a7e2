"""The run at a glance: what, when, with which settings, and what came of it, in numbers and curves. K clusters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of, duration
from deepcluster.visualization.report.curves import clusterings, curves_of, guess_of
from deepcluster.visualization.report.gallery.rows import shown
from deepcluster.visualization.report.page import Section, render

NAME: Final = "run"
# Measures that are plain numbers; all others are shares, shown in percent.
PLAIN_MEASURES: Final = ("nmi", "adjusted_rand", "clusters")
# So many names of classes are shown.
MOST_CLASSES: Final = 20


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run, or of a table that is no run (then most of it is empty).

    Attributes:
        title: name of the run.
        config: content of `config.json`: settings, changed_by_recipe, data, versions, command.
        metrics: lines of `metrics.jsonl`, an epoch each.
        evaluations: contents of `evaluation/*.json`.
        folder: the run folder, as a person would type it.
        finished: whether the last epoch is done.
        made_at: when this page was made.
        started, ended: of the training, where known.
        n_images, n_unreadable: images in all, and how many of these could not be read.
        sizes_K: images of each cluster, now.
        complaint: what looks like a collapse, in a sentence with what to change.
    """

    title: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    folder: str
    finished: bool
    made_at: datetime
    started: datetime | None = None
    ended: datetime | None = None
    n_images: int | None = None
    n_unreadable: int = 0
    sizes_K: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    complaint: str | None = None

    def setting(self, name: str) -> Any:
        """A setting; None where it is not known."""
        return (self.config.get("settings") or {}).get(name)

    @property
    def heads(self) -> tuple[int, ...]:
        """Clusters of each grouping that is learned, as the settings have them; empty where they are not known."""
        clusters = self.setting("clusters")
        many = clusters if isinstance(clusters, list | tuple) else [clusters]
        return tuple(count for count in many if isinstance(count, int))

    @property
    def is_second(self) -> bool:
        """Whether the run is one of DeepCluster-v2."""
        return bool(self.setting("method") == "deepcluster-v2")

    def last(self, name: str) -> Any:
        """The last value of a metric that is known; None where there is none."""
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)


@dataclass(frozen=True)
class Tile:
    """A number that is seen first: value, what it is called, what it means and what not."""

    value: str
    name: str
    words: str


def glance_section(about: RunFacts) -> Section:
    """The first section of the page."""
    curves = curves_of(about.metrics, about.sizes_K, about.heads)
    html = render(
        "glance.html.jinja",
        about=about,
        when=_when(about),
        tiles=_tiles(about),
        results=_results(about.evaluations),
        curves=curves,
        settings=_settings(about.config),
        facts=_facts(about),
    )
    return Section(
        NAME, "The run" if about.config else "The table", html, figures={curve.name: curve.figure for curve in curves}
    )


def _when(about: RunFacts) -> str:
    if not about.metrics and not about.config:
        return f"This page was made on {_moment(about.made_at)}."
    parts = [f"Begun {_moment(about.started)}" if about.started else ""]
    if about.finished:
        parts.append(f"finished {_moment(about.ended)}" if about.ended else "finished")
    elif about.metrics:
        parts.append(
            f"not finished: the last epoch here is {about.metrics[-1]['epoch']} of {about.setting('epochs') or '?'}"
        )
    else:
        parts.append("no epoch is done yet")
    sentence = "; ".join(part for part in parts if part)
    return f"{sentence[0].upper()}{sentence[1:]}. This page was made on {_moment(about.made_at)}."


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _tiles(about: RunFacts) -> list[Tile]:
    tiles = [_images(about), _clusters(about), _epochs(about), _network(about), _time(about), _loss(about)]
    previous, labels, knn = _last_previous(about), about.last("nmi_labels"), about.last("knn")
    if previous is not None:
        words = "How much the last grouping agrees with the one before: 1 is the same. Stability, not quality."
        tiles.append(Tile(f"{previous:.3f}", "NMI to the clusters before", words))
    if labels is not None:
        words = "How much the clusters tell of your labels, 0 to 1. Training never saw them. Compare it at equal K alone."
        tiles.append(Tile(f"{labels:.3f}", "NMI to labels", words))
    if knn is not None:
        words = "Images that the labels of their nearest neighbours name rightly. A measure of quality, by your labels."
        tiles.append(Tile(f"{knn:.1%}", "k-NN accuracy", words))
    return [tile for tile in tiles if tile is not None]


def _last_previous(about: RunFacts) -> float | None:
    values = [line["nmi_previous"] for line in clusterings(about.metrics) if line.get("nmi_previous") is not None]
    return values[-1] if values else None


def _images(about: RunFacts) -> Tile | None:
    count = about.n_images if about.n_images is not None else (about.config.get("data") or {}).get("images")
    if count is None:
        return None
    words = (
        "All could be read." if about.n_unreadable == 0 else f"{about.n_unreadable:,} can't be read, and are in no cluster."
    )
    return Tile(f"{count:,}", "images", words)


def _clusters(about: RunFacts) -> Tile | None:
    count = len(about.sizes_K) or about.last("clusters") or next(iter(about.heads), None)
    if not isinstance(count, int):
        return None
    words = "Groups of images whose features are alike. More of them than kinds of things is usual."
    if len(about.sizes_K):
        n_empty = int((about.sizes_K == 0).sum())
        words += f" {n_empty:,} are empty." if n_empty else f" The middle one holds {np.median(about.sizes_K):,.0f} images."
    if len(about.heads) > 1:
        words += f" It learned {len(about.heads)} groupings side by side ({_plainly(about.heads)} clusters)."
    if about.setting("super_clusters"):
        words += f" They lie in {about.setting('super_clusters'):,} super-clusters."
    return Tile(f"{count:,}", "clusters", words)


def _epochs(about: RunFacts) -> Tile | None:
    if not about.metrics:
        return None
    done, planned = about.metrics[-1]["epoch"], about.setting("epochs")
    every = about.setting("reassign_every")
    value = f"{done:,}" if about.finished or not planned else f"{done:,} of {planned:,}"
    words = "Rounds of learning the pseudo-labels."
    if isinstance(every, int):
        last = f", up to epoch {about.setting('stop_reassigning'):,}" if about.setting("stop_reassigning") else ""
        words += f" The images are grouped anew {'in each' if every == 1 else f'every {every:,} epochs'}{last}."
    return Tile(value, "epoch" if value == "1" else "epochs", words)


def _network(about: RunFacts) -> Tile | None:
    arch, side, stage = (about.setting(name) for name in ("arch", "image_size", "cluster_stage"))
    if not arch:
        return None
    words = f"It sees images of {side} pixels." if side else ""
    projection = about.setting("projection")
    if about.is_second and projection:
        return Tile(shown(str(arch)), "network", f"{words} What is grouped is its projection, of {projection[-1]} numbers.")
    return Tile(shown(str(arch)), "network", f"{words} Its stage “{stage}” is what is grouped." if stage else words)


def _time(about: RunFacts) -> Tile | None:
    seconds = sum(sum(line["seconds"].values()) for line in about.metrics if line.get("seconds"))
    if not seconds:
        return None
    shares = [line["data_wait_share"] for line in about.metrics if line.get("data_wait_share") is not None]
    words = "Sum of the epochs."
    return Tile(
        duration(seconds), "time", f"{words} {np.mean(shares):.1%} of it was waiting for images." if shares else words
    )


def _loss(about: RunFacts) -> Tile | None:
    loss, count = about.last("loss"), about.last("clusters_nonempty")
    if loss is None:
        return None
    words = "Not a measure of quality: the labels change with each grouping."
    value, formula = guess_of(count or 2, about.heads)
    formula = "ln K" if formula.startswith("ln") else formula
    return Tile(f"{loss:.2f}", "loss", words + (f" Guessing would cost {formula} = {value:.2f}." if count else ""))


def _results(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of the table of results: what was measured, on what, and its headline."""
    rows = []
    for content in evaluations:
        value: Any = content.get("results")
        for name in content.get("headline") or ():
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, int | float | None):
            continue
        headline = [str(name) for name in content.get("headline") or ()]
        rows.append(
            {
                "protocol": shown(str(content.get("protocol", "?"))),
                "measure": shown(", ".join(headline)),
                "value": _measured(headline[0] if headline else "", value),
                "data": shown(str(content.get("data_folder", ""))),
                "notes": shown("; ".join(str(note) for note in content.get("notes") or ())),
            }
        )
    return rows


def _measured(measure: str, value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if measure.startswith(PLAIN_MEASURES) else f"{value:.1%}"


def _settings(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every setting, with the reason where the recipe chose it."""
    changed = config.get("changed_by_recipe") or {}
    return [
        {
            "name": name,
            "value": _plainly(value, range_of=name.endswith("_scale")),
            "reason": shown(str((changed.get(name) or {}).get("reason", ""))),
        }
        for name, value in (config.get("settings") or {}).items()
    ]


def _facts(about: RunFacts) -> list[tuple[str, str]]:
    """Data, versions and command, as pairs of a name and a text."""
    data, config = about.config.get("data") or {}, about.config
    classes = [str(name) for name in data.get("classes") or ()]
    more = f" and {len(classes) - MOST_CLASSES:,} more" if len(classes) > MOST_CLASSES else ""
    versions = ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items())
    pairs = [
        ("data", str(data.get("description", ""))),
        (count_of(len(classes), "class"), ", ".join(classes[:MOST_CLASSES]) + more if classes else ""),
        ("fingerprint of the data", str(data.get("fingerprint", ""))),
        ("command", str(config.get("command", ""))),
        ("folder", about.folder),
        ("versions", versions),
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
