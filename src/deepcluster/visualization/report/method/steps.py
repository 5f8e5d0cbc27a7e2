"""What each step of the section on the method shows of one image: the values of its template, and its charts.

C channels, H and W pixels, D features, P components, K clusters, V views, S images, G clusterings.
"""

from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.data.views import ClusterView
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, normalise
from deepcluster.visualization.report.collection import Collection, Floats
from deepcluster.visualization.report.gallery.thumbnails import thumbnail
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.figures import ClusterHistory, picture, ranged_grey, signed_grey, view_pixels
from deepcluster.visualization.report.method.trace import Trace, neighbourhood
from deepcluster.visualization.report.page import shown

RIVALS, SHOWN_OF_A_CLUSTER, SAME_LABEL, SCATTERED, LIVELIEST = 8, 3, 6, 4, 8
THUMBNAIL = 64
# Correlation of two maps from which on one is enough.
ALIKE = 0.85
MOST_OF_VARIANCE = 0.9

Figures = dict[str, str]


def extract(run: Explained, trace: Trace, figures: Figures) -> dict[str, Any]:
    """Return step 1: the photo and its centre view, its channels, maps of the network, and the feature vector."""
    channels_3HW, grey_HW, edges_2HW = edges(trace.view_CHW)
    features_D, pixels_HW3 = trace.features_D.float(), view_pixels(trace.view_CHW)
    figures["method-features"] = charts.strip(trace.features_D.double().numpy())
    what = "the average of each of the last maps"
    if run.settings.cluster_stage != FEATURES:
        what = f"the average of each map of {run.settings.cluster_stage}"
    elif getattr(run.model.trunk, "classifier", None) is not None:
        what = "the output of the last fully connected layer, before its ReLU"
    return {
        "photo": picture(trace.image_HWC, 400),
        "frame": box(view_frame(run.cluster_view, *trace.image_HWC.shape[:2])),
        "resized_shorter": run.cluster_view.resized,
        "view": picture(pixels_HW3, 224),
        "small": picture(pixels_HW3, 96),
        "channels": [
            {"name": name, "picture": picture(ranged_grey(plane), 160), **_range(plane)}
            for name, plane in zip(("red", "green", "blue"), channels_3HW, strict=True)
        ],
        "grey": picture(ranged_grey(grey_HW), 160),
        "edges": [
            {"name": name, "picture": picture(signed_grey(plane), 160)}
            for name, plane in zip(("from left to right", "from top to bottom"), edges_2HW, strict=True)
        ],
        "stages": _stages(run, trace.view_CHW),
        "what": what,
        "quarters": 0 if run.clustered_quarters_N is None else run.quarters(trace.index),
        "dim": len(features_D),
        **_range(features_D),
        "above_zero": int((features_D > 0).sum()),
    }


def _range(values: Tensor) -> dict[str, float]:
    return {"low": float(values.min()), "high": float(values.max())}


def box(box_4: Sequence[float]) -> dict[str, float]:
    """Return top, left, height and width by name."""
    return dict(zip(("top", "left", "height", "width"), box_4, strict=True))


def view_frame(view: ClusterView, height: int, width: int) -> tuple[float, float, float, float]:
    """Return top, left, height and width, in pixels of an image of this size, of what its cluster view shows."""
    cut = view.windows(np.array([[height, width]]))
    scales = cut.boxes_B4[0, 2:] / cut.grids_B2[0]
    top, left = (cut.boxes_B4[0, :2] + cut.places_B2[0] * scales).tolist()
    return top, left, view.size * float(scales[0]), view.size * float(scales[1])


def edges(view_CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised channels (3, H, W), grey (H, W) and the edges (2, H, W) of the Sobel filters of a uint8 view.

    They are made whether the trunk uses them or not.
    """
    channels_1CHW = normalise(view_CHW[None].cpu())
    grey, filters = sobel_layer()
    with torch.no_grad():
        grey_1CHW = grey(channels_1CHW)
        return channels_1CHW[0], grey_1CHW[0, 0], filters(grey_1CHW)[0]


@torch.no_grad()
def _stages(run: Explained, view_CHW: Tensor) -> list[dict[str, Any]]:
    """Return the liveliest maps of the first, the middle and the last stage that has maps, each over its own range."""
    model = run.model
    stages = [name for name in model.trunk.stages if name != FEATURES]
    if not stages:
        return []
    chosen = tuple(dict.fromkeys((stages[0], stages[len(stages) // 2], stages[-1])))
    with model.machine.autocast():
        maps = model.trunk.maps(normalise(model.machine.put(view_CHW[None])).to(model.machine.dtype), chosen)
    shown_stages = []
    for name, map_1CHW in maps.items():
        map_CHW = map_1CHW[0].float().cpu()
        pictures = [{"channel": one, "picture": picture(ranged_grey(map_CHW[one]), 64)} for one in liveliest(map_CHW)]
        sides = dict(zip(("channels", "height", "width"), map_CHW.shape, strict=True))
        shown_stages.append({"name": name, **sides, "pictures": pictures})
    return shown_stages


def liveliest(map_CHW: Tensor, count: int = LIVELIEST) -> list[int]:
    """Return channels whose maps vary most over the image; those that look like one chosen before come last."""
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


def whiten(run: Explained, trace: Trace, features_SD: Tensor, figures: Figures) -> dict[str, Any]:
    """Return step 2 of the first version: what PCA keeps, and the image's point.

    Args:
        features_SD: features of some images, whose spread after whitening is measured.
    """
    if run.whitening is None:
        raise ValueError("the run does not whiten")
    before_P: Floats = run.whitening.variance_P.cpu().double().numpy()
    after = (run.unscaled(features_SD), run.model.points(features_SD))
    finite = [rows_SP[torch.isfinite(rows_SP).all(dim=1)].double() for rows_SP in after]
    variances = [rows_SP.var(dim=0, correction=1 if len(rows_SP) > 1 else 0).numpy() for rows_SP in finite]
    figures["method-spectrum"] = charts.spectrum(before_P, *variances)
    positive = before_P[before_P > 0]
    return {
        "explained": run.whitening.explained,
        "ratio": float(positive.max() / positive.min()) if len(positive) else 1.0,
        "n_measured": len(features_SD),
        **_point(trace, figures),
    }


def _point(trace: Trace, figures: Figures) -> dict[str, Any]:
    """Return the image's point."""
    figures["method-point"] = charts.signed_bars(trace.point_P.double().numpy())
    largest, length = int(trace.point_P.abs().argmax()), float(trace.unscaled_P.double().norm())
    return {"length": length, "largest": largest + 1, "largest_value": float(trace.point_P[largest])}


def project(run: Explained, trace: Trace, features_SD: Tensor, figures: Figures) -> dict[str, Any]:
    """Return step 2 of DeepCluster-v2: the image's point, and how many directions the points of a sample use."""
    points_SP = run.model.points(features_SD).double().numpy()
    values = {"n_measured": len(points_SP), "n_most": None, **_point(trace, figures)}
    shares_P = shares_of_variance(points_SP)
    if shares_P is not None:
        figures["method-directions"] = charts.directions(shares_P)
        values["n_most"] = int(np.searchsorted(np.cumsum(shares_P), MOST_OF_VARIANCE)) + 1
    return values


def shares_of_variance(points_SP: Floats) -> Floats | None:
    """Return the share of the variance along each principal direction, descending; None of one point, or equal ones."""
    points_SP = points_SP[np.isfinite(points_SP).all(axis=1)]
    if len(points_SP) < 2:
        return None
    centred_SP = points_SP - points_SP.mean(axis=0)
    variances_P: Floats = np.linalg.eigvalsh(centred_SP.T @ centred_SP)[::-1].clip(min=0)
    return variances_P / variances_P.sum() if variances_P.sum() > 0 else None


def nearest(collection: Collection, run: Explained, trace: Trace, figures: Figures) -> dict[str, Any]:
    """Return step 3: the nearest centroids, images of their clusters, and a map of the neighbourhood."""
    own, distances_K = int(collection.cluster_N[trace.index]), trace.distances_K
    order: list[int] = np.argsort(distances_K, kind="stable").tolist()
    rivals = order[:RIVALS] if own in order[:RIVALS] else [*order[:RIVALS], own]
    distances = [float(distances_K[cluster]) for cluster in rivals]
    parts, axis = ("its cluster", "the others"), "distance to the centroid"
    figures["method-distances"] = charts.ranked_bars(rivals, distances, own, axis=axis, parts=parts)
    near = neighbourhood(collection, run, trace, [own, *[one for one in rivals if one != own][:SCATTERED]])
    if near is not None:
        figures["method-neighbourhood"] = near[0]
    sizes_K = collection.sizes_K()
    return {
        "rivals": [
            {
                "cluster": cluster,
                "distance": distance,
                "size": int(sizes_K[cluster]),
                "pictures": _thumbnails(collection, cluster, SHOWN_OF_A_CLUSTER, without=trace.index),
            }
            for cluster, distance in zip(rivals, distances, strict=True)
        ],
        "spoken": spoken(rivals, distances),
        "cluster": trace.nearest,
        "distance": float(distances_K[own]),
        "second": float(np.delete(distances_K, own).min()) if len(order) > 1 else None,
        "rank": order.index(own) + 1,
        "kept": near[1] if near is not None else None,
    }


def spoken(clusters: Sequence[int], values: Sequence[float]) -> str:
    """Return bars in words."""
    return ", ".join(f"cluster {cluster} {value:.3f}" for cluster, value in zip(clusters, values, strict=True)) + "."


def _thumbnails(collection: Collection, cluster: int, count: int, *, without: int) -> list[dict[str, Any]]:
    """Return pictures and names of the images nearest to a centre; those that can't be read are left out."""
    if collection.images is None:
        return []
    tiles = []
    for index in collection.nearest_to_centre(cluster, count, without=without):
        tile = thumbnail(collection.images, index, side=THUMBNAIL)
        if not isinstance(tile, str):
            tiles.append({"picture": picture(tile, THUMBNAIL, lossless=0), "name": shown(collection.names[index])})
    return tiles


def label(collection: Collection, run: Explained, trace: Trace) -> dict[str, Any]:
    """Return step 4: which images share the label, and how often an image with it is drawn."""
    own, sizes_K = int(collection.cluster_N[trace.index]), collection.sizes_K()
    filled_K = sizes_K[sizes_K > 0]
    n_draws = run.settings.images_per_epoch(int(filled_K.sum()))
    draws_per_cluster = n_draws / max(1, len(filled_K))
    return {
        "size": int(sizes_K[own]),
        "companions": _thumbnails(collection, own, SAME_LABEL, without=trace.index),
        "mean_size": float(filled_K.mean()),
        "n_filled": len(filled_K),
        "n_draws": n_draws,
        "draws_per_cluster": draws_per_cluster,
        "draws": float(draws_per_cluster / sizes_K[own]),
        "smallest": int(filled_K.min()),
        "largest": int(filled_K.max()),
    }


def again(collection: Collection, own: int, history: Sequence[ClusterHistory], figures: Figures) -> dict[str, Any]:
    """Return step 6: the image's clusters in earlier epochs, and which images were with it."""
    known = [one for one in history if not isnan(one.share)]
    if len(known) > 1:
        figures["method-companions"] = charts.history_line(known)
    stays: list[dict[str, int]] = []
    for one in history:
        if stays and stays[-1]["cluster"] == one.cluster:
            stays[-1]["last"] = one.epoch
        else:
            stays.append({"first": one.epoch, "last": one.epoch, "cluster": one.cluster})
    return {
        "stays": stays,
        "last": known[-1] if known else None,
        "first": known[0] if len(known) > 1 else None,
        "n_companions": int((collection.cluster_N == own).sum()) - 1,
    }
