"""The random views that a run trains on, of one image, what its network predicts for them, and how the section shows it.

C channels, H and W pixels, D features, K clusters, V views, G clusterings that are trained on side by side, R random numbers
of a view.
"""

from dataclasses import dataclass, replace
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.data.multi_crop import crop_draws
from deepcluster.data.views import rotate_quarters
from deepcluster.models.heads import HierarchicalHead
from deepcluster.visualization.report.collection import Floats
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.figures import picture, view_pixels
from deepcluster.visualization.report.method.steps import Figures, box, spoken
from deepcluster.visualization.report.method.trace import Trace

# Random views of an image that are shown of a run of the first version; views that are shown at most; colours of frames.
VIEWS, MOST_VIEWS, FRAMES = 6, 12, 8
LIKELIEST = 5


@dataclass(frozen=True)
class View:
    """A random view of an image that training drew.

    Attributes:
        cut_CHW: uint8, before colours change.
        coloured_CHW: as the network gets it, before it is normalised: uint8, or in [0, 1]; on the CPU.
        box_4: top, left, height and width in its image, pixels.
        is_large: whether it is one of DeepCluster-v2's large crops, or a view of the first version.
    """

    cut_CHW: Tensor
    coloured_CHW: Tensor
    box_4: tuple[int, ...]
    is_large: bool
    is_flipped: bool
    is_grey: bool
    is_blurred: bool


@dataclass(frozen=True)
class TrainingViews:
    """What the last trained epoch showed of one image, and what the network predicts for it now.

    Attributes:
        times: how often the epoch drew the image.
        n_drawn: number of `views`, from the first on, that the epoch drew; the others are what other draws would have made.
        views: random views.
        labels: cluster of the image in each of the G clusterings, -1 = none.
        sizes: number of images with the same label, in each clustering.
        rows_VD: what the predictions are made from: features, or points on the sphere of DeepCluster-v2.
        predictions: log-probability (V, K), float64, of each cluster for each view, in each clustering.
        centre_K: log-probability, float64, of each cluster of the first clustering for the centre view.
        guess: cost of blind guessing, in nats, the mean over clusterings.
    """

    times: int
    n_drawn: int
    views: list[View]
    labels: list[int]
    sizes: list[int]
    rows_VD: Tensor
    predictions: list[Tensor]
    centre_K: Tensor
    guess: float

    @property
    def losses_VG(self) -> Floats:
        """Cross-entropy of each view in each clustering; 0 where there is no label."""
        pairs = zip(self.predictions, self.labels, strict=True)
        columns = [-log_VK[:, one] if one >= 0 else log_VK.new_zeros(len(log_VK)) for log_VK, one in pairs]
        return torch.stack(columns, dim=1).numpy()


def training_views(run: Explained, image_HWC: Tensor, index: int) -> TrainingViews | None:
    """Return what the last trained epoch showed of an image; None where there is no head, or v2 did not draw the image."""
    drawn, quarters = run.positions(index), 0
    if not len(run.labels_GN) or (run.version == 2 and not len(drawn)):
        return None
    shown, n_drawn = drawn[:1], run.view.n_views
    if run.version == 1:
        n_drawn, quarters = min(len(drawn), VIEWS), run.quarters(index)
        others = np.setdiff1d(np.arange(2 * VIEWS), drawn[:VIEWS])[: VIEWS - n_drawn]
        shown = np.concatenate([drawn[:VIEWS], others])
    views = [view for position in shown.tolist() for view in random_views(run, image_HWC, position, quarters)]
    rows_VD = torch.cat([run.rows(view.coloured_CHW[None]) for view in views])
    centre_1CHW = rotate_quarters(run.cluster_view([image_HWC]), torch.tensor([quarters]))
    labels = run.labels_GN[:, index].tolist()
    return TrainingViews(
        times=len(drawn),
        n_drawn=n_drawn,
        views=views,
        labels=labels,
        sizes=[int((labels_N == label).sum()) for labels_N, label in zip(run.labels_GN, labels, strict=True)],
        rows_VD=rows_VD.double().cpu(),
        predictions=run.predictions(rows_VD),
        centre_K=run.predictions(run.rows(centre_1CHW))[0][0],
        guess=run.guess(labels[0]),
    )


def random_views(run: Explained, image_HWC: Tensor, position: int, quarters: int = 0) -> list[View]:
    """Return the random views of an image at a position of the last trained epoch, as the run drew them.

    Args:
        quarters: number of quarter turns by which they are rotated.
    """
    draws_VR = crop_draws(run.settings.seed, run.trained_epoch, position, 1, run.view.n_views)[0]
    cuts = [cut_CHW for cut_VCHW in run.view([image_HWC], draws_VR[None]) for cut_CHW in cut_VCHW]
    kinds = [kind for kind, (count, _) in zip(run.view.views, run.view.crops, strict=True) for _ in range(count)]
    sides_12 = np.array([image_HWC.shape[:2]], np.int64)
    views = []
    for number, (cut_CHW, kind) in enumerate(zip(cuts, kinds, strict=True)):
        given_1CHW, draws_1R = run.model.machine.put(cut_CHW[None]), draws_VR[number : number + 1]
        coloured_1CHW = run.colours(given_1CHW, draws_1R)
        sharp_1CHW = replace(run.colours, blur=0.0)(given_1CHW, draws_1R)
        vivid_1CHW = replace(run.colours, grey=0.0)(given_1CHW, draws_1R)
        windows = kind.windows(sides_12, draws_1R)
        view = View(
            cut_CHW=cut_CHW,
            coloured_CHW=rotate_quarters(coloured_1CHW, torch.tensor([quarters]))[0].cpu(),
            box_4=tuple(windows.boxes_B4[0].tolist()),
            is_large=kind is run.view.views[0],
            is_flipped=bool(windows.flips_B[0]),
            is_grey=not torch.equal(coloured_1CHW, vivid_1CHW),
            is_blurred=not torch.equal(coloured_1CHW, sharp_1CHW),
        )
        views.append(view)
    return views


def learned_labels(views: TrainingViews | None) -> list[dict[str, int]]:
    """Return the image's label in each clustering of the last trained epoch."""
    if views is None:
        return []
    counts = [log_VK.shape[1] for log_VK in views.predictions]
    columns = zip(range(1, len(counts) + 1), views.labels, counts, views.sizes, strict=True)
    return [dict(zip(("number", "label", "count", "size"), values, strict=True)) for values in columns]


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
    parts = ("its label", "other clusters")
    figures["method-prediction"] = charts.ranked_bars(likeliest, probabilities, label, axis="probability", parts=parts)
    verdicts = [_verdict(one_K, label) for one_K in log_VK]
    losses_V = views.losses_VG.mean(axis=1)
    area = trace.image_HWC.shape[0] * trace.image_HWC.shape[1]
    cosines_VV = normalize(views.rows_VD) @ normalize(views.rows_VD).T
    n_pairs = max(1, len(cosines_VV) * (len(cosines_VV) - 1))
    rows = []
    for number, (view, said) in enumerate(zip(views.views[:MOST_VIEWS], verdicts, strict=False)):
        about = {"mean_loss": float(losses_V[number]), "frame": number % FRAMES + 1, "drawn": number < views.n_drawn}
        rows.append({**_view(view, area), **said, **about})
    return {
        "label": label,
        "times": views.times,
        "n_drawn": views.n_drawn,
        "views": rows,
        "n_views": len(views.views),
        "bars": _verdict(log_K, label),
        "cosine": float((cosines_VV.sum() - cosines_VV.trace()) / n_pairs),
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


def _verdict(log_K: Tensor, label: int) -> dict[str, Any]:
    """Return what is predicted for one view, and the cross-entropy against the label (None where there is none)."""
    best, of_label = int(log_K.argmax()), float(log_K[label]) if 0 <= label < len(log_K) else None
    return {
        "best": best,
        "best_probability": exp(float(log_K[best])),
        "label_probability": None if of_label is None else exp(of_label),
        "loss": None if of_label is None else -of_label,
        "right": best == label,
    }


def _view(view: View, area: int) -> dict[str, Any]:
    changes = {"flipped": view.is_flipped, "grey": view.is_grey, "blurred": view.is_blurred}
    return {
        "picture": picture(view_pixels(view.coloured_CHW), 160),
        "side": view.cut_CHW.shape[-1],
        "box": box(view.box_4),
        "share": view.box_4[2] * view.box_4[3] / area,
        "is_large": view.is_large,
        "is_flipped": view.is_flipped,
        "changes": ", ".join(word for word, holds in changes.items() if holds),
    }
