"""`train --log-to tensorboard`: scalars, sizes and pictures of clusters, and a projector, in RUN/tensorboard.

N images, M of them sampled, P components, K clusters, S side of a small picture in pixels.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import UnreadableImage
from deepcluster.core.progress import Reporter
from deepcluster.core.text import printable
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import image_threads, usual_workers
from deepcluster.data.views import ClusterView
from deepcluster.run.metrics import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
# The gallery: a row per cluster with the images nearest to its centroid, then others of the cluster. 64 images in all.
GALLERY_CLUSTERS, NEAREST, OTHERS, GALLERY_SIDE, GAP = 8, 4, 4, 64, 2
# A browser does not draw more points well. The sprite of the projector is one square WebGL texture (tensorboard#670), of at
# most 8,192 pixels a side.
MOST_POINTS = 5_000
SPRITE_SIDE, LARGEST_TILE = 8_192, 32
PROJECTOR_CONFIG = """embeddings {{
  tensor_name: "points that were clustered"
  tensor_path: "projector/points.tsv"
  metadata_path: "projector/names.tsv"
  sprite {{ image_path: "projector/sprite.png" single_image_dim: {side} single_image_dim: {side} }}
}}
"""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


@dataclass
class Session:
    """What a logger may show of a run besides its settings and numbers.

    Attributes:
        epoch: the first epoch that will be logged.
        images: the images of the run.
        assignment: returns the clusters that the network is trained on, and at the end those of the finished trunk.
        points: returns indices_M of at most so many images and their points_MP in the space that was clustered last; None
            until the run has finished.
    """

    reporter: Reporter
    epoch: int
    images: DecodedImages
    assignment: Callable[[], Assignment]
    points: Callable[[int], tuple[Tensor, Tensor]] | None = None


class TensorBoard:
    """Writes the events of a run while it trains: numbers, sizes and a gallery of the clusters, and a projector."""

    def __init__(self, session: Session) -> None:
        self.session, self.folder = session, Path(FOLDER)
        self.writer: SummaryWriter | None = None
        self.shown: Assignment | None = None
        self.last = 0

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Continue the events of the run, without those of later epochs; start with `history` if there are none."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run / FOLDER
        exists = any(self.folder.glob("events.out.tfevents.*"))
        self.last = settings["epochs"]
        self.writer = SummaryWriter(str(self.folder), purge_step=self.session.epoch if exists else None)
        for metrics in () if exists else history:
            self._add(metrics)
        self.writer.flush()
        self.session.reporter.say(f"to watch the run: tensorboard --logdir {run}")

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of an epoch and, after a new clustering, the sizes and a gallery of its clusters."""
        self._add(metrics)
        if (assignment := self.session.assignment()) is not self.shown:
            write_clusters(self.writer, metrics["epoch"], assignment, self.session.images)
            self.shown = assignment
        self.writer.flush()  # type: ignore[union-attr]

    def end(self, status: str) -> None:
        """Write sizes and gallery of the clusters of the finished trunk, and the projector; end the writing thread."""
        try:
            if status == "finished" and self.session.points is not None:
                assignment = self.session.assignment()
                write_clusters(self.writer, self.last + 1, assignment, self.session.images)
                indices_M, points_MP = self.session.points(MOST_POINTS)
                write_projector(self.folder, indices_M, points_MP, assignment, self.session.images)
        finally:
            self.writer.close()  # type: ignore[union-attr]

    def _add(self, metrics: Mapping[str, Any]) -> None:
        for tag, value in scalars(metrics):
            self.writer.add_scalar(tag, value, metrics["epoch"])  # type: ignore[union-attr]


def write_clusters(writer: Any, epoch: int, assignment: Assignment, images: DecodedImages) -> None:
    """Write a histogram of the sizes of the clusters, and a gallery of the largest ones."""
    sizes_K = assignment.sizes_K()
    writer.add_histogram("clusters/sizes", sizes_K, epoch)
    largest = torch.argsort(sizes_K, descending=True, stable=True)[:GALLERY_CLUSTERS]
    largest = largest[sizes_K[largest] > 0]
    lines = [f"Rows of the gallery: {NEAREST} images nearest to the centroid of a cluster, then {OTHERS} random others.", ""]
    lines += ["| row | cluster | images | mean distance |", "|---|---|---|---|"]
    rows = []
    for number, cluster in enumerate(largest.tolist(), 1):
        members = (assignment.labels_N == cluster).nonzero().flatten()
        distances = assignment.distances_N[members]
        lines.append(f"| {number} | {cluster} | {len(members):,} | {float(distances.mean()):.3f} |")
        members = members[torch.argsort(distances, stable=True)]
        nearest, others = members[:NEAREST], members[NEAREST:]
        drawn = np.sort(np.random.default_rng((epoch, cluster)).permutation(len(others))[:OTHERS])
        rows.append([*nearest.tolist(), *others[torch.from_numpy(drawn)].tolist()])
    writer.add_image("clusters/gallery", gallery(images, rows), epoch, dataformats="HWC")
    writer.add_text("clusters/gallery_rows", "\n".join(lines), epoch)


def gallery(images: DecodedImages, rows: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3) of rows of images; white where a row is short."""
    sheet = np.full((max(1, len(rows)), NEAREST + OTHERS, GALLERY_SIDE + GAP, GALLERY_SIDE + GAP, 3), 255, np.uint8)
    for row, members in enumerate(rows):
        sheet[row, : len(members), :GALLERY_SIDE, :GALLERY_SIDE] = small_pictures(images, members, GALLERY_SIDE)
    return _joined(sheet)


def _joined(tiles_RCSS3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return one picture (R × S, C × S, 3) of R rows of C tiles."""
    rows, columns, side = tiles_RCSS3.shape[:3]
    return tiles_RCSS3.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def small_pictures(images: DecodedImages, indices: Sequence[int], side: int) -> NDArray[np.uint8]:
    """Return the centre views (M, S, S, 3) of images, as for clustering but of another size; grey where unreadable.

    Images do not pass through the loader, because training depends on its list of unreadable images.
    """
    view = ClusterView(side)

    def picture(index: int) -> NDArray[np.uint8]:
        try:
            return view([images.get(index)])[0].permute(1, 2, 0).numpy()
        except UnreadableImage:
            return np.full((side, side, 3), 128, np.uint8)

    with image_threads(usual_workers()) as threads:
        return np.stack(list(threads.map(picture, indices)))


def write_projector(
    folder: Path, indices_M: Tensor, points_MP: Tensor, assignment: Assignment, images: DecodedImages
) -> None:
    """Write the files of TensorBoard's projector: points, names with clusters and labels, small pictures, a list of them.

    `SummaryWriter.add_embedding` would need 0.5 GB for a sprite of 5,000 pictures of 32 pixels, as it computes in float64.
    """
    from PIL import Image

    if not len(indices_M):
        return
    place = folder / "projector"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    side, across = tile_side(len(indices_M)), ceil(sqrt(len(indices_M)))
    np.savetxt(place / "points.tsv", points_MP.numpy(), fmt="%.6g", delimiter="\t")
    source, labels_N = images.source, images.source.labels_N
    rows = [["name", "cluster", *(["label"] if labels_N is not None else [])]]
    for index in indices_M.tolist():
        rows.append([source.name(index), str(int(assignment.labels_N[index]))])
        if labels_N is not None:
            rows[-1].append(source.class_names[labels_N[index]] if labels_N[index] >= 0 else "unknown")
    # Control characters would add columns and lines.
    lines = ("\t".join(_CONTROLS.sub(" ", printable(cell)) for cell in row) + "\n" for row in rows)
    (place / "names.tsv").write_text("".join(lines), encoding="utf-8")
    # The projector expects a square of tiles, row by row.
    tiles = np.zeros((across * across, side, side, 3), np.uint8)
    tiles[: len(indices_M)] = small_pictures(images, indices_M.tolist(), side)
    Image.fromarray(_joined(tiles.reshape(across, across, side, side, 3))).save(place / "sprite.png")
    (folder / "projector_config.pbtxt").write_text(PROJECTOR_CONFIG.format(side=side), encoding="utf-8")


def tile_side(count: int) -> int:
    """Return the side of a tile in pixels such that the sprite of `count` tiles is within its limit."""
    return min(LARGEST_TILE, SPRITE_SIDE // ceil(sqrt(count)))
