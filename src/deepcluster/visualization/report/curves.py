"""Curves of a run over its epochs, small multiples as in the paper's figure 2; made from the lines of `metrics.jsonl`.

K clusters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of
from deepcluster.visualization.report.page import LEGEND_ABOVE, figure_json

Metrics = Mapping[str, Any]
Line = tuple[str, list[int], list[float]]

MOST_BARS = 200  # More sizes are a line.
# The steps of an epoch in their order, as `metrics.jsonl` names them; others follow.
STEPS = ("features", "whitening", "clustering", "training")
TO_LABELS = "to your labels"


@dataclass(frozen=True)
class Curve:
    """A figure with its text.

    Attributes:
        name: id of its element.
        title: text above it.
        words: what it shows, and what it does not, in a sentence or two.
        summary: its first and last values, for those who do not see it.
        figure: the Plotly figure as JSON.
    """

    name: str
    title: str
    words: str
    summary: str
    figure: str


def curves_of(metrics: Sequence[Metrics], sizes_K: NDArray[np.int64] | None, heads: Sequence[int] = ()) -> list[Curve]:
    """Return the figures that the known values allow; a value that is missing or null leaves a gap.

    Args:
        heads: number of clusters of each clustering, where several are trained on.
    """
    return [*_of_learning(metrics, heads), *_of_clusters(metrics, sizes_K), *_of_time(metrics)]


def clusterings(metrics: Sequence[Metrics]) -> list[Metrics]:
    """Return the epochs that clustered; the others repeat the values of the last clustering (`--reassign-every`).

    An epoch that spent no time on clustering did not cluster. Where no times are known, all count.
    """
    return [line for line in metrics if (line.get("seconds") or {}).get("clustering", 1) > 0]


def guess_of(clusters: int, heads: Sequence[int] = ()) -> tuple[float, str]:
    """Return the cost of guessing one of K clusters, in nats, and its formula; the mean where there are several heads."""
    if len(set(heads)) > 1:
        return sum(log(max(2, count)) for count in heads) / len(heads), "mean of ln K"
    return log(max(2, clusters)), f"ln {clusters:,}"


def _values(metrics: Sequence[Metrics], name: str) -> tuple[list[int], list[float]]:
    """Return the epochs that have a value, and the values."""
    known = [line for line in metrics if line.get(name) is not None]
    return [line["epoch"] for line in known], [line[name] for line in known]


def _known(metrics: Sequence[Metrics], names: Mapping[str, str]) -> list[Line]:
    """Return title, epochs and values of those metrics that have any."""
    lines = [(title, *_values(metrics, name)) for title, name in names.items()]
    return [line for line in lines if line[1]]


def _line(x: Sequence[float], y: Sequence[float], name: str, form: str = "%{y:.3f}", **marks: Any) -> dict[str, Any]:
    """Return a trace: few values have dots, many only a line."""
    mode = "lines+markers" if len(x) <= 60 else "lines"
    return {"type": "scatter", "x": x, "y": y, "name": name, "mode": mode, "hovertemplate": form, **marks}


def _steady(x: Sequence[float], value: float, name: str, form: str = "%{y:.3f}") -> dict[str, Any]:
    """Return a dashed line at a value that helps to read the others."""
    ends = [x[0] - 0.5, x[-1] + 0.5] if x[0] == x[-1] else [x[0], x[-1]]
    return _line(ends, [value, value], name, form, mode="lines", line={"dash": "dot", "width": 1.5}, opacity=0.7)


def _are_few(traces: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if there is room for the number of each epoch or cluster; else the library chooses, such as 3.5."""
    numbers = [number for trace in traces for number in trace["x"]]
    return bool(max(numbers) - min(numbers) <= 12)


def _figure(traces: Sequence[Mapping[str, Any]], y: str, x: str = "epoch", **layout: Any) -> str:
    usual: dict[str, Any] = {
        "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
        "height": 260,
        "hovermode": "x unified",
        "showlegend": len(traces) > 1,
        "legend": {**LEGEND_ABOVE, "traceorder": "normal", "font": {"size": 12}},
        "xaxis_title": {"text": x, "font": {"size": 12}},
        "xaxis_dtick": 1 if _are_few(traces) else None,
        "yaxis_title": {"text": y, "font": {"size": 12}},
        "yaxis_rangemode": "tozero",
    }
    return figure_json(traces, **{**usual, **layout})


def _course(lines: Sequence[Line], form: str) -> str:
    """Return the first and the last value of each line in words."""
    ends = [f", {y[-1]:{form}} in epoch {x[-1]}" if len(x) > 1 else "" for _, x, y in lines]
    return " ".join(f"{what}: {y[0]:{form}} in epoch {x[0]}{last}." for (what, x, y), last in zip(lines, ends, strict=True))


def _of_learning(metrics: Sequence[Metrics], heads: Sequence[int]) -> Iterator[Curve]:
    """Yield loss, NMI and accuracy."""
    x, y = _values(metrics, "loss")
    if x:
        traces = [_line(x, y, "loss")]
        counts = [line[name] for line in metrics[-1:] for name in ("clusters_nonempty", "clusters") if line.get(name)]
        if counts:
            value, formula = guess_of(counts[0], heads)
            traces.append(_steady(x, value, f"{formula} (guessing)"))
        words = (
            "How hard the pseudo-labels are to learn. They change with each clustering, and the loss jumps there: it is not "
            "a measure of quality. A loss that stays at ln K, the cost of guessing, would mean that nothing is learned."
        )
        if len(heads) > 1:
            words = f"The mean over {len(heads)} clusterings, and over all crops. {words}"
        yield Curve("run-loss", "Loss", words, _course([("Loss", x, y)], ".3f"), _figure(traces, "cross-entropy"))
    lines = _known(clusterings(metrics), {"to the clusters before": "nmi_previous", TO_LABELS: "nmi_labels"})
    if lines:
        words = (
            "Normalised mutual information, 0 (unrelated) to 1 (the same), at each clustering. To the clusters before: "
            "rises as the clusters settle; it measures stability, not quality."
        )
        if any(title == TO_LABELS for title, _, _ in lines):
            words += f" {TO_LABELS.capitalize()}: depends on K too, so compare it only at equal K."
        summary = _course([(f"NMI {name}", x, y) for name, x, y in lines], ".3f")
        traces = [_line(x, y, name) for name, x, y in lines]
        yield Curve("run-nmi", "NMI", words, summary, _figure(traces, "NMI", showlegend=True, yaxis_range=[0, 1]))
    lines = _known(metrics, {"k-NN": "knn", "linear probe": "linear"})
    if lines:
        words = (
            "Share of images whose label is found from the features: by their nearest neighbours (k-NN), or by a linear "
            "layer trained on them. This measures quality, as far as your labels are what you look for."
        )
        traces = [_line(x, y, name, "%{y:.1%}") for name, x, y in lines]
        figure = _figure(traces, "accuracy", showlegend=True, yaxis_tickformat=".0%")
        yield Curve("run-probes", "Accuracy", words, _course(lines, ".1%"), figure)


def _of_clusters(metrics: Sequence[Metrics], sizes_K: NDArray[np.int64] | None) -> Iterator[Curve]:
    """Yield the share of the largest cluster, the clusters in use, and the sizes of all."""
    x, y = _values(metrics, "largest_cluster_share")
    if x:
        traces = [_line(x, y, "largest", "%{y:.2%}")]
        if metrics[-1].get("clusters"):
            traces.append(_steady(x, 1 / metrics[-1]["clusters"], "if all were of equal size", "%{y:.2%}"))
        words = (
            "Share of the images that the largest cluster holds. Near the dotted line is even; above one half is a collapse."
        )
        figure = _figure(traces, "share of images", yaxis_tickformat=".1%" if max(y) < 0.1 else ".0%")
        yield Curve("run-largest", "Largest cluster", words, _course([("Largest share", x, y)], ".1%"), figure)
    x, y = _values(metrics, "clusters_nonempty")
    if x:
        traces = [_line(x, y, "with images", "%{y:,}")]
        repaired = _values(clusterings(metrics), "clusters_repaired")
        if any(repaired[1]):
            traces.append(_line(*repaired, "repaired", "%{y:,}"))
        words = (
            "Clusters that hold any image. One that becomes empty takes half of a large one (repaired), so that no cluster "
            "swallows the others."
        )
        summary = _course([("In use", x, y)], ",.0f")
        yield Curve("run-nonempty", "Clusters in use", words, summary, _figure(traces, "clusters"))
    if sizes_K is not None and len(sizes_K):
        clusters = np.argsort(-sizes_K, kind="stable")
        sizes = sizes_K[clusters].tolist()
        ranks, form = list(range(1, len(sizes) + 1)), "%{y:,} images"
        trace: dict[str, Any] = {"type": "bar", "x": ranks, "y": sizes, "name": "images"}
        trace |= {"hovertemplate": f"cluster %{{customdata}}: {form}<extra></extra>", "customdata": clusters.tolist()}
        if len(sizes) > MOST_BARS:
            trace = _line(ranks, sizes, "images", form, mode="lines", fill="tozeroy")
        words, median = "Number of images of each cluster as they are now, largest first.", float(np.median(sizes_K))
        summary = f"Sizes: {count_of(sizes[0], 'image')} in the largest, {median:,.0f} in the median one, {sizes[-1]:,} in "
        summary += "the smallest."
        yield Curve("run-sizes", "Sizes", words, summary, _figure([trace], "images", "rank by size, 1 is the largest"))


def _of_time(metrics: Sequence[Metrics]) -> Iterator[Curve]:
    timed = [line for line in metrics if line.get("seconds")]
    steps = dict.fromkeys([*STEPS, *(step for line in timed for step in line["seconds"])])
    seconds = {step: [line["seconds"].get(step) or 0 for line in timed] for step in steps}
    seconds = {step: values for step, values in seconds.items() if any(values)}
    if not seconds:
        return
    x = [line["epoch"] for line in timed]
    bars = [{"type": "bar", "x": x, "y": y, "name": step, "hovertemplate": "%{y:.1f} s"} for step, y in seconds.items()]
    words = "Seconds of each epoch by step. Epochs without a clustering have only training."
    summary = ", ".join(f"{step} {sum(values):,.0f} s" for step, values in seconds.items())
    yield Curve("run-seconds", "Time", words, f"In all: {summary}.", _figure(bars, "seconds", barmode="stack"))
