"""What each step of the section on DeepCluster-v2 shows of one image: the values of its template, and its charts.

P components, K clusters, V crops, S images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepcluster.core.text import size
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.crop_pipeline import Crop, CropLesson, CropPipeline
from deepcluster.visualization.report.method.data_uri import picture, view_pixels
from deepcluster.visualization.report.method.follow import Followed
from deepcluster.visualization.report.method.pipeline import Floats
from deepcluster.visualization.report.method.steps import LIKELIEST, spoken, verdict

# Crops that are shown; colours of their frames.
MOST_CROPS, FRAMES = 12, 8
MOST_OF_VARIANCE = 0.9


def remember(pipeline: CropPipeline, n_images: int) -> dict[str, Any]:
    """Step 1: what the memory holds."""
    n_large, side = pipeline.view.crops[0]
    return {
        "n_large": n_large,
        "side": side,
        "memory": size(2 * n_images * n_large * pipeline.n_projected),
        "crops": " and ".join(f"{count} of {side} pixels" for count, side in pipeline.view.crops),
    }


def project(pipeline: CropPipeline, followed: Followed, points_SP: Floats, figures: dict[str, str]) -> dict[str, Any]:
    """Step 2: the image's point, and how many directions of the sphere the points of a sample use."""
    figures["method-point"] = charts.signed_bars(followed.point_P.double().numpy())
    values: dict[str, Any] = {
        "length": float(followed.unscaled_P.double().norm()),
        "largest": int(followed.point_P.abs().argmax()) + 1,
        "largest_value": float(followed.point_P[followed.point_P.abs().argmax()]),
        "n_measured": len(points_SP),
        "n_most": None,
    }
    shares_P = shares_of_variance(points_SP)
    if shares_P is not None:
        figures["method-directions"] = charts.directions(shares_P)
        values["n_most"] = int(np.searchsorted(np.cumsum(shares_P), MOST_OF_VARIANCE)) + 1
        values["first_share"] = float(shares_P[0])
    return values


def shares_of_variance(points_SP: Floats) -> Floats | None:
    """Share of the variance along each principal direction, descending; None of fewer than two points, or equal ones."""
    points_SP = points_SP[np.isfinite(points_SP).all(axis=1)]
    if len(points_SP) < 2:
        return None
    centred_SP = points_SP - points_SP.mean(axis=0)
    variances_P: Floats = np.linalg.eigvalsh(centred_SP.T @ centred_SP)[::-1].clip(min=0)
    return variances_P / variances_P.sum() if variances_P.sum() > 0 else None


def groupings(lesson: CropLesson | None) -> list[dict[str, int]]:
    """Step 4: the image's label in each grouping of the last trained epoch."""
    if lesson is None:
        return []
    return [
        {"number": number, "label": label, "count": count, "size": images}
        for number, (label, count, images) in enumerate(zip(lesson.labels, lesson.counts, lesson.sizes, strict=True), 1)
    ]


def learn(followed: Followed, lesson: CropLesson | None, figures: dict[str, str]) -> dict[str, Any] | None:
    """Step 5: the crops, what the prototypes say of them, and what that costs."""
    if lesson is None:
        return None
    label, n_crops = lesson.labels[0], len(lesson.crops)
    first_K = lesson.probabilities_VK[0]
    likeliest: list[int] = np.argsort(-first_K, kind="stable")[:LIKELIEST].tolist()
    if label >= 0 and label not in likeliest:
        likeliest.append(label)
    names, values = [f"cluster {cluster}" for cluster in likeliest], [float(first_K[cluster]) for cluster in likeliest]
    figures["method-prediction"] = charts.ranked_bars(
        names,
        values,
        likeliest.index(label) if label >= 0 else -1,
        axis="probability",
        parts=("its label", "other clusters"),
    )
    verdicts = [verdict(row_K, label) for row_K in lesson.probabilities_VK]
    area = followed.image_HWC.shape[0] * followed.image_HWC.shape[1]
    losses_V = lesson.losses_VG.mean(axis=1)
    shown = [
        {**_crop(crop, area), **said, "mean_loss": float(loss), "frame": number % FRAMES + 1}
        for number, (crop, said, loss) in enumerate(zip(lesson.crops[:MOST_CROPS], verdicts, losses_V, strict=False))
    ]
    return {
        "label": label,
        "views": shown,
        "n_crops": n_crops,
        "first": verdicts[0],
        "cosine": _cosine_among(lesson),
        "likeliest": likeliest,
        "spoken": spoken(names, values),
        "n_clusters": len(first_K),
        "counts": lesson.counts,
        "guess": lesson.guess,
        "loss": float(losses_V.mean()) if label >= 0 else None,
        "n_right": sum(said["right"] for said in verdicts),
    }


def _crop(crop: Crop, area: int) -> dict[str, Any]:
    top, left, height, width = crop.box_4
    changes = (("turned", crop.is_flipped), ("grey", crop.is_grey), ("blurred", crop.is_blurred))
    return {
        "picture": picture(view_pixels(crop.coloured_CHW), 160),
        "side": crop.cut_CHW.shape[-1],
        "box": {"top": top, "left": left, "height": height, "width": width},
        "share": height * width / area,
        "is_large": crop.is_large,
        "changes": _listed([word for word, holds in changes if holds]),
    }


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _cosine_among(lesson: CropLesson) -> float:
    """Mean cosine of the points of two different crops."""
    n_crops = len(lesson.points_VP)
    products = lesson.points_VP @ lesson.points_VP.T
    return float((products.sum() - products.trace()) / (n_crops * (n_crops - 1)))
