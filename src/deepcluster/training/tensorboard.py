"""What `train --tensorboard` writes into RUN/tensorboard: numbers, sizes and pictures of clusters, and a projector.

N images, M images of the projector, P components, K clusters, S side of a small picture in pixels.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import DeepClusterError, InputError, UnreadableImage
from deepcluster.core.progress import Reporter
from deepcluster.core.text import printable
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import image_threads, usual_workers
from deepcluster.data.views import ClusterView

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
# Where the numbers of metrics.jsonl are shown; those not named here are shown under their own names.
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
# The gallery: rows of clusters, in each the images nearest to its centre, then others of it. 64 images in all.
GALLERY_CLUSTERS, NEAREST, OTHERS = 8, 4, 4
GALLERY_SIDE, GAP = 64, 2
# The projector draws no more points well in a browser. Its sprite is one square texture of WebGL (tensorboard#670), which
# its users keep to 8,192 pixels a side.
MOST_POINTS = 5_000
SPRITE_SIDE, LARGEST_TILE = 8_192, 32
MISSING = 128
# They would make columns and lines more.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def needs_tensorboard_extra() -> None:
    """Raise `InputError` unless the package that writes events is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as fault:
        raise InputError(
            f"--tensorboard needs the package tensorboard ({fault}); install it with: pip install 'deepcluster[tensorboard]'"
        ) from None


class TensorBoard:
    """Writes a run's events while it goes on (a `training.follower.Follower`). A fault is told once, and ends no run.

    Raises:
        InputError: the extra is not installed.
    """

    def __init__(self, reporter: Reporter) -> None:
        needs_tensorboard_extra()
        self.reporter = reporter
        self.writer: SummaryWriter | None = None
        self.shown: Assignment | None = None

    def begin(self, folder: Path, epoch: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the events of the run, less those of `epoch` and later; where there are none, begin with `history`."""
        from torch.utils.tensorboard import SummaryWriter

        place = folder / FOLDER
        there = any(place.glob("events.out.tfevents.*"))
        try:
            self.writer = SummaryWriter(str(place), purge_step=epoch if there else None)
        except OSError as fault:
            self.reporter.warn(f"{place} can't be written to ({fault}): the run goes on without TensorBoard")
            return
        with self._forgiven() as writer:
            for metrics in () if there else history:
                write_scalars(writer, metrics)
            writer.flush()
        self.reporter.say(f"to watch the run: tensorboard --logdir {folder}")

    def after_epoch(self, metrics: Mapping[str, Any], assignment: Assignment, images: DecodedImages) -> None:
        """Numbers of the epoch; of a new clustering its sizes and a gallery."""
        if self.writer is None:
            return
        with self._forgiven() as writer:
            write_scalars(writer, metrics)
            if assignment is not self.shown:
                write_clusters(writer, metrics["epoch"], assignment, images)
                self.shown = assignment
            writer.flush()

    def finish(
        self,
        epoch: int,
        assignment: Assignment,
        images: DecodedImages,
        points: Callable[[int], tuple[Tensor, Tensor]],
    ) -> None:
        """Sizes and gallery of the finished trunk's clusters, and the projector."""
        if self.writer is None:
            return
        with self._forgiven() as writer:
            write_clusters(writer, epoch, assignment, images)
            writer.flush()
            sample_M, points_MP = points(MOST_POINTS)
            write_projector(Path(writer.log_dir), sample_M, points_MP, assignment, images)

    def close(self) -> None:
        """Write what waits, and end the thread that writes."""
        if self.writer is not None:
            with self._forgiven() as writer:
                writer.close()

    @contextmanager
    def _forgiven(self) -> "Iterator[SummaryWriter]":
        """The writer; after a fault of what is done with it there is none any more."""
        if self.writer is None:
            raise RuntimeError("nothing is written any more")
        try:
            yield self.writer
        except DeepClusterError:
            raise
        # Writing raises what files, protocol buffers and pictures raise; hours of training must not end by it.
        except Exception as fault:
            self.writer = None
            self.reporter.warn(f"TensorBoard's events could not be written ({fault!r}): the run goes on without them")


def write_scalars(writer: "SummaryWriter", metrics: Mapping[str, Any]) -> None:
    """Every number of an epoch's line of metrics.jsonl, at that epoch."""
    for tag, value in scalars(metrics):
        writer.add_scalar(tag, value, metrics["epoch"])


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of every number in a line of metrics.jsonl but the epoch itself."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{part}", float(number)) for part, number in value.items())
        elif name != "epoch" and isinstance(value, int | float):
            yield TAGS.get(name, name), float(value)


def write_clusters(writer: "SummaryWriter", epoch: int, assignment: Assignment, images: DecodedImages) -> None:
    """A histogram of the sizes of the clusters, and pictures of the largest ones."""
    sizes_K = assignment.sizes_K()
    writer.add_histogram("clusters/sizes", sizes_K, epoch)
    largest = torch.argsort(sizes_K, descending=True, stable=True)[:GALLERY_CLUSTERS]
    largest = largest[sizes_K[largest] > 0]
    rows = [_members(assignment, cluster, epoch) for cluster in largest.tolist()]
    writer.add_image("clusters/gallery", gallery(images, rows), epoch, dataformats="HWC")
    lines = ["| row | cluster | images | mean distance |", "|---|---|---|---|"]
    for number, cluster in enumerate(largest.tolist(), 1):
        mean = float(assignment.distances_N[assignment.labels_N == cluster].mean())
        lines.append(f"| {number} | {cluster} | {int(sizes_K[cluster]):,} | {mean:.3f} |")
    about = (
        f"Rows of the gallery: {NEAREST} images nearest to the centre of the cluster, then {OTHERS} drawn from the others."
    )
    writer.add_text("clusters/gallery_rows", "\n".join([about, "", *lines]), epoch)


def _members(assignment: Assignment, cluster: int, seed: int) -> list[int]:
    """The images nearest to the centre of a cluster, and some of the others, nearest first."""
    members = (assignment.labels_N == cluster).nonzero().flatten()
    members = members[torch.argsort(assignment.distances_N[members], stable=True)]
    n_others = min(OTHERS, max(0, len(members) - NEAREST))
    others = np.sort(np.random.default_rng((seed, cluster)).permutation(max(0, len(members) - NEAREST))[:n_others])
    return [*members[:NEAREST].tolist(), *members[NEAREST:][torch.from_numpy(others)].tolist()]


def gallery(images: DecodedImages, rows: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """One picture (H, W, 3) of rows of images; white where a row is short."""
    step = GALLERY_SIDE + GAP
    sheet = np.full((max(1, len(rows)) * step, (NEAREST + OTHERS) * step, 3), 255, np.uint8)
    tiles = iter(small_pictures(images, [index for row in rows for index in row], GALLERY_SIDE))
    for row, members in enumerate(rows):
        for column, _ in enumerate(members):
            top, left = row * step, column * step
            sheet[top : top + GALLERY_SIDE, left : left + GALLERY_SIDE] = next(tiles)
    return sheet


def small_pictures(images: DecodedImages, indices: Sequence[int], side: int) -> NDArray[np.uint8]:
    """The centre views (M, S, S, 3) of images as the clustering sees them, but of another size; grey where unreadable.

    They are read past the loader, whose list of unreadable images training depends on.
    """
    view = ClusterView(side)

    def picture(index: int) -> NDArray[np.uint8]:
        try:
            return view([images.get(index)])[0].permute(1, 2, 0).numpy()
        except UnreadableImage:
            return np.full((side, side, 3), MISSING, np.uint8)

    with image_threads(usual_workers()) as threads:
        made = list(threads.map(picture, indices))
    return np.stack(made) if made else np.zeros((0, side, side, 3), np.uint8)


def write_projector(
    folder: Path, sample_M: Tensor, points_MP: Tensor, assignment: Assignment, images: DecodedImages
) -> None:
    """The files that TensorBoard's projector reads: points, names with clusters and labels, small pictures, and their list.

    `SummaryWriter.add_embedding` would take 0.5 GB for the sprite of 5,000 pictures of 32 pixels: it makes it of float64.
    """
    from google.protobuf.text_format import MessageToString
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    if not len(sample_M):
        return
    place = folder / "projector"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    side = tile_side(len(sample_M))
    np.savetxt(place / "points.tsv", points_MP.numpy(), fmt="%.6g", delimiter="\t")
    (place / "names.tsv").write_text(_names_table(sample_M, assignment, images), encoding="utf-8")
    _write_sprite(place / "sprite.png", small_pictures(images, sample_M.tolist(), side))
    config = ProjectorConfig()
    embedding = config.embeddings.add(
        tensor_name="points that were clustered",
        tensor_path="projector/points.tsv",
        metadata_path="projector/names.tsv",
    )
    embedding.sprite.image_path = "projector/sprite.png"
    embedding.sprite.single_image_dim.extend([side, side])
    (folder / "projector_config.pbtxt").write_text(MessageToString(config), encoding="utf-8")


def tile_side(count: int) -> int:
    """Side of a tile in pixels, such that the sprite of `count` tiles is within its limit."""
    return min(LARGEST_TILE, SPRITE_SIDE // ceil(sqrt(count)))


def _names_table(sample_M: Tensor, assignment: Assignment, images: DecodedImages) -> str:
    """Lines of name, cluster and, where labels are known, label; of tabs and ends of lines spaces."""
    source, labels_N = images.source, images.source.labels_N
    lines = ["\t".join(["name", "cluster", *(["label"] if labels_N is not None else [])])]
    for index in sample_M.tolist():
        cells = [source.name(index), str(int(assignment.labels_N[index]))]
        if labels_N is not None:
            cells.append(source.class_names[labels_N[index]] if labels_N[index] >= 0 else "unknown")
        lines.append("\t".join(_CONTROLS.sub(" ", printable(cell)) for cell in cells))
    return "\n".join(lines) + "\n"


def _write_sprite(path: Path, tiles_MSS3: NDArray[np.uint8]) -> None:
    """One square picture of the tiles, row by row, as the projector cuts it."""
    from PIL import Image

    count, side = tiles_MSS3.shape[:2]
    across = ceil(sqrt(count))
    sheet = np.zeros((across * side, across * side, 3), np.uint8)
    for number, tile in enumerate(tiles_MSS3):
        top, left = number // across * side, number % across * side
        sheet[top : top + side, left : left + side] = tile
    Image.fromarray(sheet).save(path)
