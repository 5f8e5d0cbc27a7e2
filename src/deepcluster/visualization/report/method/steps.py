"""What each step of the section on the method shows of one image: the values of its template, and its charts.

N images, C channels, H and W pixels, D features, P components, K clusters, V views.
"""

from collections.abc import Sequence
from math import isnan, log
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.models.heads import HierarchicalHead
from deepcluster.models.trunk import FEATURES
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import shown
from deepcluster.visualization.report.gallery.thumbnails import thumbnail
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.data_uri import Picture, picture, ranged_grey, signed_grey, view_pixels
from deepcluster.visualization.report.method.follow import Companionship, Followed, Lesson, nearest_of, neighbourhood
from deepcluster.visualization.report.method.head_pipeline import HeadPipeline
from deepcluster.visualization.report.method.pipeline import Pipeline, view_frame

RIVALS, SHOWN_OF_A_CLUSTER, SAME_LABEL, SCATTERED, LIKELIEST, LIVELIEST = 8, 3, 6, 4, 5, 8
THUMBNAIL = 64
# Correlation of two maps from which on one is enough.
ALIKE = 0.85


def look(pipeline: Pipeline, followed: Followed) -> dict[str, Any]:
    """Step 1: the photo and its centre view, its channels, maps of the network, and the feature vector."""
    height, width, _ = followed.image_HWC.shape
    top, left, frame_height, frame_width = view_frame(pipeline.cluster_view, height, width)
    channels_3HW, grey_HW, edges_2HW = pipeline.edges(followed.view_CHW)
    stages = pipeline.maps(followed.view_CHW, pipeline.shown_stages())
    features_D = followed.features_D.float()
    return {
        "photo": picture(followed.image_HWC, 400),
        "frame": {"top": top, "left": left, "height": frame_height, "width": frame_width},
        "resized": pipeline.cluster_view.resized_sides(height, width),
        "resized_shorter": pipeline.cluster_view.resized,
        "view": picture(view_pixels(followed.view_CHW), 224),
        "small": picture(view_pixels(followed.view_CHW), 96),
        "channels": [
            {
                "name": name,
                "picture": picture(ranged_grey(plane), 160),
                "low": float(plane.min()),
                "high": float(plane.max()),
            }
            for name, plane in zip(("red", "green", "blue"), channels_3HW, strict=True)
        ],
        "grey": picture(ranged_grey(grey_HW), 160),
        "edges": [
            {"name": name, "picture": picture(signed_grey(plane), 160)}
            for name, plane in zip(("from left to right", "from top to bottom"), edges_2HW, strict=True)
        ],
        "stages": [_stage(name, map_CHW) for name, map_CHW in stages.items()],
        "what": _what_features_are(pipeline),
        "quarters": 0 if pipeline.clustered_quarters_N is None else int(pipeline.clustered_quarters_N[followed.index]),
        "dim": len(features_D),
        "low": float(features_D.min()),
        "high": float(features_D.max()),
        "above_zero": int((features_D > 0).sum()),
    }


def _what_features_are(pipeline: Pipeline) -> str:
    if pipeline.cluster_stage != FEATURES:
        return f"the average of each map of {pipeline.cluster_stage}"
    if getattr(pipeline.trunk, "classifier", None) is not None:
        return "what the last fully connected layer gives, before its ReLU"
    return "the average of each of the last maps"


def _stage(name: str, map_CHW: Tensor) -> dict[str, Any]:
    """Maps of a stage that vary over the image, each from its least to its largest value."""
    pictures = [{"channel": number, "picture": picture(ranged_grey(map_CHW[number]), 64)} for number in liveliest(map_CHW)]
    channels, height, width = map_CHW.shape
    return {"name": name, "channels": channels, "height": height, "width": width, "pictures": pictures}


def liveliest(map_CHW: Tensor, count: int = LIVELIEST) -> list[int]:
    """Channels whose maps vary most over the image; those that look like one chosen before come last."""
    rows_CN = map_CHW.flatten(1).double()
    rows_CN = rows_CN - rows_CN.mean(dim=1, keepdim=True)
    lengths_C = rows_CN.norm(dim=1)
    rows_CN = rows_CN / lengths_C.clamp(min=1e-12)[:, None]
    order: list[int] = lengths_C.argsort(descending=True, stable=True).tolist()
    chosen: list[int] = []
    for channel in order:
        if not chosen or float((rows_CN[chosen] @ rows_CN[channel]).abs().max()) < ALIKE:
            chosen.append(channel)
        if len(chosen) == count:
            return chosen
    return [*chosen, *(channel for channel in order if channel not in chosen)][:count]


def whiten(pipeline: HeadPipeline, followed: Followed, n_measured: int) -> dict[str, Any]:
    """Step 2: what PCA keeps, and the image's point."""
    variance_P = pipeline.whitening.variance_P.cpu().double().numpy()
    positive = variance_P[variance_P > 0]
    return {
        "explained": pipeline.whitening.explained,
        "ratio": float(positive.max() / positive.min()) if len(positive) else 1.0,
        "n_measured": n_measured,
        "length": float(followed.unscaled_P.double().norm()),
        "largest": int(followed.point_P.abs().argmax()) + 1,
        "largest_value": float(followed.point_P[followed.point_P.abs().argmax()]),
    }


def group(
    collection: Collection, pipeline: Pipeline, followed: Followed, own: int, figures: dict[str, str]
) -> dict[str, Any]:
    """Step 3: the nearest centroids, images of their clusters, and a map of the neighbourhood."""
    order = np.argsort(followed.distances_K, kind="stable")
    rank = int((order == own).argmax())
    rivals: list[int] = order[:RIVALS].tolist()
    if own not in rivals:
        rivals.append(own)
    distances = [float(followed.distances_K[cluster]) for cluster in rivals]
    names = [f"cluster {cluster}" for cluster in rivals]
    figures["method-distances"] = charts.ranked_bars(
        names, distances, rivals.index(own), axis="distance to the centroid", parts=("its cluster", "the others")
    )
    flat = neighbourhood(collection, pipeline, followed, [own, *[one for one in rivals if one != own][:SCATTERED]])
    if flat is not None:
        figures["method-neighbourhood"] = charts.scatter(flat[0], flat[1], own, flat[2])
    sizes_K = collection.sizes_K()
    return {
        "rivals": [
            {
                "cluster": cluster,
                "distance": distance,
                "size": int(sizes_K[cluster]),
                "pictures": _thumbnails(collection, nearest_of(collection, cluster, SHOWN_OF_A_CLUSTER, but=followed.index)),
            }
            for cluster, distance in zip(rivals, distances, strict=True)
        ],
        "spoken": spoken(names, distances),
        "nearest": followed.nearest,
        "distance": float(followed.distances_K[own]),
        "second": float(np.delete(followed.distances_K, own).min()) if len(order) > 1 else None,
        "rank": rank + 1,
        "flat_share": flat[3] if flat is not None else None,
    }


def spoken(names: Sequence[str], values: Sequence[float]) -> str:
    """Bars in words."""
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True)) + "."


def _thumbnails(collection: Collection, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Pictures of images, with their names; those that can't be read are left out."""
    if collection.images is None:
        return []
    tiles = ((index, thumbnail(collection.images, index, side=THUMBNAIL)) for index in indices)
    return [
        {"picture": _small(tile), "name": shown(collection.names[index])}
        for index, tile in tiles
        if not isinstance(tile, str)
    ]


def _small(tile_HWC: NDArray[np.uint8]) -> Picture:
    return picture(tile_HWC, THUMBNAIL, lossless=0)


def label(collection: Collection, pipeline: Pipeline, followed: Followed, own: int) -> dict[str, Any]:
    """Step 4: the number, who shares it, and how often an image of it is drawn."""
    sizes_K = collection.sizes_K()
    filled = int((sizes_K > 0).sum())
    n_assigned = int(sizes_K.sum())
    size = int(sizes_K[own])
    return {
        "size": size,
        "companions": _thumbnails(collection, nearest_of(collection, own, SAME_LABEL, but=followed.index)),
        "mean": n_assigned / filled,
        "n_filled": filled,
        "n_assigned": n_assigned,
        "draws": n_assigned / filled / size,
        "smallest": int(sizes_K[sizes_K > 0].min()),
        "largest": int(sizes_K.max()),
    }


def learn(
    pipeline: HeadPipeline, followed: Followed, lesson: Lesson | None, figures: dict[str, str]
) -> dict[str, Any] | None:
    """Step 5: the random views, what the head says of them, and what that costs."""
    if lesson is None:
        return None
    n_clusters = lesson.probabilities_VK.shape[1]
    centre_K = lesson.probabilities_VK[0]
    likeliest: list[int] = np.argsort(-centre_K, kind="stable")[:LIKELIEST].tolist()
    if lesson.label >= 0 and lesson.label not in likeliest:
        likeliest.append(lesson.label)
    names, values = [f"cluster {cluster}" for cluster in likeliest], [float(centre_K[cluster]) for cluster in likeliest]
    figures["method-prediction"] = charts.ranked_bars(
        names,
        values,
        likeliest.index(lesson.label) if lesson.label >= 0 else -1,
        axis="probability",
        parts=("its label", "other clusters"),
    )
    verdicts = [verdict(row_K, lesson.label) for row_K in lesson.probabilities_VK]
    boxes = lesson.views.boxes_V4.tolist()
    area = followed.image_HWC.shape[0] * followed.image_HWC.shape[1]
    views = [
        {
            **verdict,
            "picture": picture(view_pixels(view_CHW), 160),
            "box": {"top": top, "left": left, "height": height, "width": width},
            "share": height * width / area,
            "flipped": bool(flipped),
            "seen": number < lesson.n_seen,
        }
        for number, (verdict, view_CHW, (top, left, height, width), flipped) in enumerate(
            zip(verdicts[1:], lesson.views.coloured_VCHW, boxes, lesson.views.flips_V, strict=True)
        )
    ]
    losses = [verdict["loss"] for verdict in verdicts[1:] if verdict["loss"] is not None]
    return {
        "label": lesson.label,
        "times": len(pipeline.drawn_positions(followed.index)),
        "n_seen": lesson.n_seen,
        "views": views,
        "centre": verdicts[0],
        "likeliest": likeliest,
        "spoken": spoken(names, values),
        "n_clusters": n_clusters,
        "guess": pipeline.guess(lesson.label),
        "n_supers": len(pipeline.head.sizes) if isinstance(pipeline.head, HierarchicalHead) else 0,
        "quarters": pipeline.quarters_of(followed.index),
        "mean_loss": float(np.mean(losses)) if losses else None,
        "n_right": sum(verdict["right"] for verdict in verdicts[1:]),
    }


def verdict(probabilities_K: NDArray[np.float64], label: int) -> dict[str, Any]:
    """What the head says of one view, and the cross-entropy against the label (None where there is none)."""
    best = int(probabilities_K.argmax())
    of_label = float(probabilities_K[label]) if 0 <= label < len(probabilities_K) else None
    return {
        "best": best,
        "best_probability": float(probabilities_K[best]),
        "label_probability": of_label,
        "loss": -log(max(of_label, 1e-300)) if of_label is not None else None,
        "right": best == label,
    }


def again(collection: Collection, story: Sequence[Companionship], own: int, figures: dict[str, str]) -> dict[str, Any]:
    """Step 6: where the image was in earlier epochs, and who was with it."""
    told = [one for one in story if not isnan(one.share)]
    if len(told) > 1:
        figures["method-companions"] = charts.companions_line(
            [one.epoch for one in told], [one.share for one in told], [one.cluster for one in told]
        )
    stays: list[dict[str, int]] = []
    for one in story:
        if stays and stays[-1]["cluster"] == one.cluster:
            stays[-1]["last"] = one.epoch
        else:
            stays.append({"first": one.epoch, "last": one.epoch, "cluster": one.cluster})
    return {
        "stays": stays,
        "last": told[-1] if told else None,
        "first": told[0] if len(told) > 1 else None,
        "n_companions": int((collection.cluster_N == own).sum()) - 1,
        "has_figure": len(told) > 1,
    }
