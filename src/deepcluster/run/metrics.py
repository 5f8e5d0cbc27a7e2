"""Lines of metrics.jsonl as text: the line per epoch, and a warning where training looks like a collapse."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from deepcluster.run.settings import Settings

EVALUATED = (("nmi(prev)", "nmi_previous"), ("nmi(labels)", "nmi_labels"), ("k-NN", "knn"), ("linear", "linear"))

# One of at least 5 clusters with more than this share of the images is a giant.
GIANT_SHARE = 0.5
# At a loss this near ln K after this many epochs, the head has learned nothing.
STUCK_SHARE, STUCK_EPOCHS = 0.995, 3


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


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch as one line."""
    seconds = metrics["seconds"]
    parts = [f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {metrics['loss']:.3f}"]
    parts += [f"{title} {metrics[name]:.3f}" for title, name in EVALUATED if metrics.get(name) is not None]
    parts += [
        f"clusters {metrics['clusters_nonempty']:,}/{metrics['clusters']:,}",
        f"largest {metrics['largest_cluster_share']:.1%}",
        f"features {seconds['features']:.0f}s",
        f"cluster {seconds['whitening'] + seconds['clustering']:.0f}s",
        f"train {seconds['training']:.0f}s",
        f"data-wait {metrics['data_wait_share']:.0%}",
    ]
    return "  ".join(parts)


def health(history: Sequence[Mapping[str, Any]], heads: Sequence[int] | None = None) -> str | None:
    """Return a sentence if the last epoch looks like a collapse, with what to change; else None.

    Args:
        heads: number of clusters of each head, if there are several.
    """
    last = history[-1]
    share, clusters = last["largest_cluster_share"], last["clusters_nonempty"]
    if share > GIANT_SHARE and last["clusters"] >= 5:
        return (
            f"one cluster holds {share:.0%} of the images: this looks like a collapse. "
            "Try a lower --lr, fewer --clusters, or another --cluster-stage"
        )
    recent = history[-STUCK_EPOCHS:]
    guess = log(max(2, clusters)) if heads is None else sum(log(max(2, count)) for count in heads) / len(heads)
    if len(recent) == STUCK_EPOCHS and all(line["loss"] > STUCK_SHARE * guess for line in recent):
        return (
            f"the loss has not come below ln K = {guess:.2f} for {STUCK_EPOCHS} epochs: the network learns "
            "nothing of its labels. Try a higher --lr, a smaller --batch-size (more steps), or fewer --clusters"
        )
    return None
