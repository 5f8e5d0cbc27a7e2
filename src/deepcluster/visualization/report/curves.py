"""Curves of a run over its epochs, small multiples as in the paper's figure 2; made from the lines of `metrics.jsonl`.

Colours of background and text are the page's. K clusters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metrics = Mapping[str, Any]

# Up to so many sizes are bars; more are a line.
MOST_BARS = 200
# The steps of an epoch in their order, as `metrics.jsonl` names them; others follow.
STEPS = ("features", "whitening", "clustering", "training")


@dataclass(frozen=True)
class Curve:
    """A figure, and what is said of it.

    Attributes:
        name: id of its element.
        title: above it.
        words: what it shows, and what it does not, in a sentence or two.
        summary: its first and last values, for who does not see it.
        figure: the Plotly figure as JSON.
    """

    name: str
    title: str
    words: str
    summary: str
    figure: str


def curves_of(metrics: Sequence[Metrics], sizes_K: NDArray[np.int64] | None, heads: Sequence[int] = ()) -> list[Curve]:
    """The figures that the values at hand allow; a value that is missing or null leaves a gap.

    Args:
        heads: clusters of each grouping, where several are learned side by side.
    """
    makers = (partial(_loss, heads=heads), _nmi, _probes, _largest, _nonempty, _seconds)
    found = [maker(metrics) for maker in makers] if metrics else []
    if sizes_K is not None and len(sizes_K):
        found.insert(max(0, len(found) - 1), _sizes(sizes_K))
    return [curve for curve in found if curve is not None]


def clusterings(metrics: Sequence[Metrics]) -> list[Metrics]:
    """The epochs that grouped the images; the others repeat the values of the last grouping (`--reassign-every`).

    An epoch that spent no time on clustering did not group. Where no times are known, all count.
    """
    return [line for line in metrics if (line.get("seconds") or {}).get("clustering", 1) > 0]


def _values(metrics: Sequence[Metrics], name: str) -> tuple[list[int], list[float]]:
    """Epochs that have a value, and the values."""
    pairs = [(line["epoch"], line[name]) for line in metrics if line.get(name) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _line(x: Sequence[float], y: Sequence[float], name: str, form: str = "%{y:.3f}", **marks: Any) -> dict[str, Any]:
    """A trace. A single epoch is a dot; many are a line alone."""
    mode = "lines+markers" if len(x) <= 60 else "lines"
    return {"type": "scatter", "x": x, "y": y, "name": name, "mode": mode, "hovertemplate": form, **marks}


def _steady(first: float, last: float, value: float, name: str) -> dict[str, Any]:
    """A dashed line at a value that helps to read the others."""
    ends = [first - 0.5, last + 0.5] if first == last else [first, last]
    return _line(ends, [value, value], name, mode="lines", line={"dash": "dot", "width": 1.5}, opacity=0.7)


def _figure(traces: Sequence[Mapping[str, Any]], y: str, x: str = "epoch", **layout: Any) -> str:
    from plotly.graph_objects import Figure

    figure = Figure(data=[dict(trace) for trace in traces])
    figure.update_layout(
        template=None,
        margin={"l": 56, "r": 12, "t": 8, "b": 48},
        height=260,
        hovermode="x unified",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal", "font": {"size": 12}},
        xaxis={"title": {"text": x, "font": {"size": 12}}},
        yaxis={"title": {"text": y, "font": {"size": 12}}, "rangemode": "tozero"},
    )
    figure.update_layout(**layout)
    return str(figure.to_json())


def _course(what: str, x: Sequence[float], y: Sequence[float], form: str) -> str:
    if len(x) == 1:
        return f"{what}: {y[0]:{form}} in epoch {x[0]}."
    return f"{what}: {y[0]:{form}} in epoch {x[0]}, {y[-1]:{form}} in epoch {x[-1]}."


def guess_of(clusters: int, heads: Sequence[int] = ()) -> tuple[float, str]:
    """What naming one of K clusters blindly costs, in nats, and its formula; of several groupings the mean."""
    if len(set(heads)) > 1:
        return sum(log(max(2, count)) for count in heads) / len(heads), "mean of ln K"
    return log(max(2, clusters)), f"ln {clusters:,}"


def _loss(metrics: Sequence[Metrics], heads: Sequence[int] = ()) -> Curve | None:
    x, y = _values(metrics, "loss")
    if not x:
        return None
    traces = [_line(x, y, "loss")]
    counts = [line[name] for line in metrics[-1:] for name in ("clusters_nonempty", "clusters") if line.get(name)]
    if counts:
        value, formula = guess_of(counts[0], heads)
        traces.append(_steady(x[0], x[-1], value, f"{formula} (guessing)"))
    words = (
        "How hard the pseudo-labels are to learn. They change with each grouping, and the loss jumps there: it is not a "
        "measure of quality. A loss that stays at ln K, the price of guessing, would mean that nothing is learned."
    )
    if len(heads) > 1:
        words = f"The mean over {len(heads)} groupings, and over all crops. {words}"
    return Curve("run-loss", "Loss", words, _course("Loss", x, y, ".3f"), _figure(traces, "cross-entropy"))


def _nmi(metrics: Sequence[Metrics]) -> Curve | None:
    real = clusterings(metrics)
    curves = [("to the clusters before", "nmi_previous"), ("to your labels", "nmi_labels")]
    known = [(name, *_values(real, key)) for name, key in curves]
    known = [(name, x, y) for name, x, y in known if x]
    if not known:
        return None
    words = (
        "Normalised mutual information, 0 (unrelated) to 1 (the same), at each grouping. To the clusters before: rises as "
        "the groups settle; it tells of stability, not of quality. To your labels: depends on K too, so compare it at equal "
        "K alone."
    )
    summary = " ".join(_course(f"NMI {name}", x, y, ".3f") for name, x, y in known)
    figure = _figure([_line(x, y, name) for name, x, y in known], "NMI", showlegend=True, yaxis_range=[0, 1])
    return Curve("run-nmi", "NMI", words, summary, figure)


def _probes(metrics: Sequence[Metrics]) -> Curve | None:
    known = [(name, *_values(metrics, key)) for name, key in (("k-NN", "knn"), ("linear probe", "linear"))]
    known = [(name, x, y) for name, x, y in known if x]
    if not known:
        return None
    words = (
        "Share of images whose label is found from the features: by their nearest neighbours (k-NN), or by a linear layer "
        "trained on them. This measures quality, as far as your labels are what you look for."
    )
    summary = " ".join(_course(name, x, y, ".1%") for name, x, y in known)
    figure = _figure(
        [_line(x, y, name, "%{y:.1%}") for name, x, y in known], "accuracy", showlegend=True, yaxis_tickformat=".0%"
    )
    return Curve("run-probes", "Accuracy", words, summary, figure)


def _largest(metrics: Sequence[Metrics]) -> Curve | None:
    x, y = _values(metrics, "largest_cluster_share")
    if not x:
        return None
    traces = [_line(x, y, "largest", "%{y:.2%}")]
    if metrics[-1].get("clusters"):
        even = 1 / metrics[-1]["clusters"]
        traces.append(_steady(x[0], x[-1], even, "if all were of one size") | {"hovertemplate": "%{y:.2%}"})
    words = "Share of the images that the largest cluster holds. Near the dotted line is even; above one half is a collapse."
    figure = _figure(traces, "share of images", yaxis_tickformat=".1%" if max(y) < 0.1 else ".0%")
    return Curve("run-largest", "Largest cluster", words, _course("Largest share", x, y, ".1%"), figure)


def _nonempty(metrics: Sequence[Metrics]) -> Curve | None:
    x, y = _values(metrics, "clusters_nonempty")
    if not x:
        return None
    traces = [_line(x, y, "with images", "%{y:,}")]
    repaired = _values(clusterings(metrics), "clusters_repaired")
    if any(repaired[1]):
        traces.append(_line(*repaired, "repaired", "%{y:,}"))
    words = (
        "Clusters that hold any image. One that runs empty takes half of a large one (repaired), so that no cluster "
        "swallows the others."
    )
    return Curve("run-nonempty", "Clusters in use", words, _course("In use", x, y, ",.0f"), _figure(traces, "clusters"))


def _sizes(sizes_K: NDArray[np.int64]) -> Curve:
    sizes = np.sort(sizes_K)[::-1].tolist()
    ranks = list(range(1, len(sizes) + 1))
    form = "%{y:,} images"
    if len(sizes) <= MOST_BARS:
        trace: dict[str, Any] = {"type": "bar", "x": ranks, "y": sizes, "name": "images", "hovertemplate": form}
    else:
        trace = _line(ranks, sizes, "images", form, mode="lines", fill="tozeroy")
    median = float(np.median(sizes_K))
    words = "The clusters as they are now, largest first: images of each."
    summary = f"Sizes: {sizes[0]:,} images in the largest, {median:,.0f} in the middle, {sizes[-1]:,} in the smallest."
    return Curve("run-sizes", "Sizes", words, summary, _figure([trace], "images", "cluster, by size"))


def _seconds(metrics: Sequence[Metrics]) -> Curve | None:
    timed = [line for line in metrics if line.get("seconds")]
    if not timed:
        return None
    named = dict.fromkeys([*STEPS, *(step for line in timed for step in line["seconds"])])
    x = [line["epoch"] for line in timed]
    totals = {step: [line["seconds"].get(step) or 0 for line in timed] for step in named}
    totals = {step: values for step, values in totals.items() if any(values)}
    bars = [
        {"type": "bar", "x": x, "y": values, "name": step, "hovertemplate": "%{y:.1f} s"} for step, values in totals.items()
    ]
    if not bars:
        return None
    words = "Seconds of each epoch by step. Where the images are not grouped anew, there is training alone."
    summary = ", ".join(f"{step} {sum(values):,.0f} s" for step, values in totals.items())
    return Curve("run-seconds", "Time", words, f"In all: {summary}.", _figure(bars, "seconds", barmode="stack"))
