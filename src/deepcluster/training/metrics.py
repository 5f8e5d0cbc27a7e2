"""What an epoch tells: its line in metrics.jsonl, its line on the screen, and plain words when it looks like collapse."""

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepcluster.training.loop import Loop


def epoch_metrics(run: "Loop[Any, Any]") -> dict[str, Any]:
    """The epoch's line of metrics.jsonl."""
    total, count = run.losses.over_ranks()
    assignment, seconds = run.current, run.seconds
    sizes_K = assignment.sizes_K()
    busy = seconds["features"] + seconds["training"]
    return {
        "epoch": run.epoch,
        "loss": total / max(1, count),
        "inertia": assignment.inertia,
        "nmi_previous": run.nmi_previous,
        "nmi_labels": assignment.nmi(run.known_labels_N) if run.known_labels_N is not None else None,
        "clusters": assignment.n_clusters,
        "clusters_nonempty": int((sizes_K > 0).sum()),
        "clusters_repaired": assignment.n_repaired,
        "largest_cluster_share": float(sizes_K.max() / sizes_K.sum()),
        "images_per_second": count / max(1e-9, sum(seconds.values())),
        "data_wait_share": run.loader.wait_seconds / max(1e-9, busy),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Most memory that this process has held, on the GPU where one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
