"""What the section on the method shows of the training: the random views of one image, and the predictions for them.

D features, K clusters, V views, G clusterings.
"""

from math import exp
from typing import Any

import torch
from torch import Tensor

from deepcluster.models.heads import HierarchicalHead
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.data_uri import picture, view_pixels
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.steps import Figures, spoken
from deepcluster.visualization.report.method.trace import Trace
from deepcluster.visualization.report.method.training_views import TrainingViews, View

LIKELIEST = 5
# Views that are shown, and colours of their frames.
MOST_VIEWS, FRAMES = 12, 8


def learned_labels(views: TrainingViews | None) -> list[dict[str, int]]:
    """Return the image's label in each clustering of the last trained epoch."""
    if views is None:
        return []
    counts = [log_VK.shape[1] for log_VK in views.predictions]
    return [
        {"number": number, "label": label, "count": count, "size": images}
        for number, (label, count, images) in enumerate(zip(views.labels, counts, views.sizes, strict=True), 1)
    ]


def learn(run: Explained, trace: Trace, views: TrainingViews | None, figures: Figures) -> dict[str, Any] | None:
    """Return step 5: the random views, what is predicted for them, and what that costs."""
    if views is None:
        return None
    label, log_VK = views.labels[0], views.predictions[0]
    # The bars are those of the centre view, or of the first crop of DeepCluster-v2.
    log_K = views.centre_K if run.version == 1 else log_VK[0]
    likeliest: list[int] = log_K.argsort(descending=True, stable=True)[:LIKELIEST].tolist()
    if label >= 0 and label not in likeliest:
        likeliest.append(label)
    probabilities = [exp(float(log_K[cluster])) for cluster in likeliest]
    figures["method-prediction"] = charts.ranked_bars(
        likeliest, probabilities, label, axis="probability", parts=("its label", "other clusters")
    )
    verdicts = [verdict(one_K, label) for one_K in log_VK]
    losses_V = views.losses_VG.mean(axis=1)
    area = trace.image_HWC.shape[0] * trace.image_HWC.shape[1]
    rows = [
        {
            **_view(view, area),
            **said,
            "mean_loss": float(loss),
            "frame": number % FRAMES + 1,
            "drawn": number < views.n_drawn,
        }
        for number, (view, said, loss) in enumerate(zip(views.views[:MOST_VIEWS], verdicts, losses_V, strict=False))
    ]
    return {
        "label": label,
        "times": views.times,
        "n_drawn": views.n_drawn,
        "views": rows,
        "n_views": len(views.views),
        "bars": verdict(log_K, label),
        "cosine": _mean_cosine(views.rows_VD),
        "likeliest": likeliest,
        "spoken": spoken(likeliest, probabilities),
        "n_clusters": len(log_K),
        "counts": [one_VK.shape[1] for one_VK in views.predictions],
        "guess": views.guess,
        "n_supers": len(run.head.sizes) if isinstance(run.head, HierarchicalHead) else 0,
        "quarters": run.quarters(trace.index),
        "loss": float(losses_V.mean()) if label >= 0 else None,
        "n_right": sum(said["right"] for said in verdicts),
    }


def verdict(log_K: Tensor, label: int) -> dict[str, Any]:
    """Return what is predicted for one view, and the cross-entropy against the label (None where there is none)."""
    best = int(log_K.argmax())
    known = 0 <= label < len(log_K)
    return {
        "best": best,
        "best_probability": exp(float(log_K[best])),
        "label_probability": exp(float(log_K[label])) if known else None,
        "loss": -float(log_K[label]) if known else None,
        "right": best == label,
    }


def _view(view: View, area: int) -> dict[str, Any]:
    top, left, height, width = view.box_4
    changes = {"flipped": view.is_flipped, "grey": view.is_grey, "blurred": view.is_blurred}
    return {
        "picture": picture(view_pixels(view.coloured_CHW), 160),
        "side": view.cut_CHW.shape[-1],
        "box": {"top": top, "left": left, "height": height, "width": width},
        "share": height * width / area,
        "is_large": view.is_large,
        "is_flipped": view.is_flipped,
        "changes": ", ".join(word for word, holds in changes.items() if holds),
    }


def _mean_cosine(rows_VD: Tensor) -> float:
    """Return the mean cosine of two different rows."""
    rows_VD = torch.nn.functional.normalize(rows_VD)
    products, count = rows_VD @ rows_VD.T, len(rows_VD)
    return float((products.sum() - products.trace()) / max(1, count * (count - 1)))
