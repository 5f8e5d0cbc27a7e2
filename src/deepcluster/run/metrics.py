"""Lines of metrics.jsonl as text, as numbers for loggers, and a warning where training looks like a collapse."""

from collections.abc import Iterator, Mapping, Sequence
from math import log
from typing import Any

from deepcluster.core.progress import as_row
from deepcluster.run.settings import Settings

EVALUATED = (("nmi(prev)", "nmi_previous"), ("nmi(labels)", "nmi_labels"), ("k-NN", "knn"), ("linear", "linear"))

# One of at least 5 clusters with more than this share of the images is a giant.
GIANT_SHARE = 0.5
# A loss of this many times ln K diverges. One of ln K, but for chance, or more in this many epochs, after this share of the
# run, that does not fall by this share of ln K, is stuck.
DIVERGED, CHANCE, STUCK_EPOCHS, STUCK_AFTER, STUCK_FALL = 1.5, 0.998, 3, 0.25, 0.005


# Tags of the numbers in metrics.jsonl; others are shown under their own names.
TAGS = {
    "nmi_previous": "nmi/previous",
    "nmi_labels": "nmi/labels",
    "inertia": "clusters/inertia",
    "clusters": "clusters/number",
    "clusters_nonempty": "clusters/nonempty",
    "clusters_repaired": "clusters/repaired",
    "largest_cluster_share": "clusters/largest_share",
    "knn": "accuracy/knn",
    "linear": "accuracy/linear",
    "images_per_second": "speed/images_per_second",
    "data_wait_share": "speed/data_wait_share",
    "peak_memory_bytes": "speed/peak_memory_bytes",
}


def legend(settings: Settings, *, has_labels: bool) -> str:
    """Return what the lines of the epochs hold, as one line."""
    every = f", every {settings.reassign_every} epochs" if settings.reassign_every > 1 else ""
    jumps = "" if settings.method == "deepcluster-v2" else f" (higher after each clustering{every}: the head is new)"
    labels = "; nmi(labels): with your labels" if has_labels else ""
    return (
        f"lines below: loss{jumps}; nmi(prev): agreement with the clusters before, 0 to 1{labels}; largest: share of the "
        "images in the largest cluster; features, cluster, train: seconds of the steps; data-wait: share of the time spent "
        "waiting for images"
    )


def epoch_cells(metrics: Mapping[str, Any], epochs: int) -> dict[str, str]:
    """Return what is shown of an epoch, by title."""
    seconds = metrics["seconds"]
    cells = {"epoch": f"{metrics['epoch']:>{len(str(epochs))}}/{epochs}", "loss": f"{metrics['loss']:.3f}"}
    cells |= {title: f"{metrics[name]:.3f}" for title, name in EVALUATED if metrics.get(name) is not None}
    return cells | {
        "clusters": f"{metrics['clusters_nonempty']:,}/{metrics['clusters']:,}",
        "largest": f"{metrics['largest_cluster_share']:.1%}",
        "features": f"{seconds['features']:.0f}s",
        "cluster": f"{seconds['whitening'] + seconds['clustering']:.0f}s",
        "train": f"{seconds['training']:.0f}s",
        "data-wait": f"{metrics['data_wait_share']:.0%}",
    }


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch as one line."""
    return as_row(epoch_cells(metrics, epochs))


def health(history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str | None:
    """Return a sentence if training seems to have failed, with what to change; else None.

    Args:
        history: lines of metrics.jsonl.
        settings: settings of the run, of which method, clusters and epochs count.
    """
    last, is_v2 = history[-1], settings["method"] == "deepcluster-v2"
    share, clusters, loss = last["largest_cluster_share"], last["clusters_nonempty"], last["loss"]
    rates = "--lr" if is_v2 else "--head-lr or --lr"
    # The clusters of the first epoch are those of the untrained network.
    if share > GIANT_SHARE and last["clusters"] >= 5 and last["epoch"] > 1:
        return (
            f"one cluster holds {share:.0%} of the images: this looks like a collapse. "
            f"Try a lower {rates}, fewer --clusters, or another --cluster-stage"
        )
    heads = settings["clusters"] if isinstance(settings["clusters"], list | tuple) else [clusters]
    guess = sum(log(max(2, count)) for count in heads) / len(heads)
    if loss > DIVERGED * guess and not is_v2:  # Cosines over a low temperature begin far above.
        return (
            f"the loss, {loss:.2f}, is far above ln K = {guess:.2f}, the loss of a guess: the steps are too large. "
            f"Try a third of {rates}"
        )
    recent = [line["loss"] for line in history[-STUCK_EPOCHS:]]
    is_late = last["epoch"] > STUCK_AFTER * settings["epochs"] and len(recent) == STUCK_EPOCHS
    if is_late and min(recent) > CHANCE * guess and recent[0] - loss < STUCK_FALL * guess:
        cure = f"a lower {rates}" if loss > 1.02 * guess else "a higher --lr, a smaller --batch-size (more steps)"
        return (
            f"the loss is that of a guess, ln K = {guess:.2f}, or higher for {STUCK_EPOCHS} epochs: the network does not "
            f"learn its labels. Try {cure}, or fewer --clusters"
        )
    return None


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield tag and value of every number in a line of metrics.jsonl except the epoch."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{part}", float(number)) for part, number in value.items())
        elif name != "epoch" and isinstance(value, int | float):
            yield TAGS.get(name, name), float(value)
