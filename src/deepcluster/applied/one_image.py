"""What is printed of one image beside its cluster: images of the run that are like it, and the command that finds more."""

import shlex
from pathlib import Path

import numpy as np

from deepcluster.applied.similar import similar
from deepcluster.applied.vectors import Space
from deepcluster.core.errors import InputError
from deepcluster.core.files import read_table, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import visible
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.run.features import Pooled
from deepcluster.run.folder import RunFolder
from deepcluster.run.kept_features import are_kept
from deepcluster.run.model import Model

# Images that are named.
SHOWN = 5
# Images whose features are looked for: their files are looked at, one by one.
MOST_SEARCHED = 100_000


def like_one(model: Model, image: Path, cluster: int, *, device: str) -> list[str]:
    """Return lines on the images of a run that are like an image; none of a model that is no run folder.

    Args:
        image: the file of the image.
        cluster: its cluster.
        device: where the model runs.
    """
    folder = RunFolder(user_path(model.name))
    if not folder.is_run():
        return []
    lines = []
    if typical := _typical(folder, cluster):
        lines += [f"images of {model.name} nearest to the centre of cluster {cluster}:", *typical]
    about = folder.read_config()["data"]
    address = [str(one) for one in about.get("address") or []]
    if not address or not all(user_path(one).exists() for one in address):  # Moved, or on a server.
        return lines
    if about.get("images", 0) <= MOST_SEARCHED:
        lines += _nearest(model, image, address, device)
    words = ["deepcluster", "similar", model.name, *address, "--query", str(image)]
    return [*lines, f"more that are like it: {shlex.join(words)}"]


def _typical(folder: RunFolder, cluster: int) -> list[str]:
    """Return lines with the distances and names of the images of the run that are nearest to a centroid."""
    newest = folder.newest_clusters()
    if newest is None:
        return []
    table = read_table(newest, ["name", "cluster", "distance"])
    mine = np.flatnonzero(table["cluster"].to_numpy() == cluster)
    distance_N = table["distance"].to_numpy()
    nearest = mine[np.argsort(distance_N[mine], kind="stable")[:SHOWN]]
    return [f"  {distance_N[index]:.3f}  {visible(table['name'][index].as_py())}" for index in nearest.tolist()]


def _nearest(model: Model, image: Path, address: list[str], device: str) -> list[str]:
    """Return lines on the images of the run that are most similar, where an earlier command has kept their features."""
    try:
        images: ImageSource = open_source(address, model.settings.limit)
    except InputError:  # They have changed.
        return []
    on_machine, silent = model.on(device), Reporter(silent=True)
    stages: dict[Space, str] = {"embedding": model.trunk.embed_stage, "clusters": model.settings.cluster_stage}
    for space, stage in stages.items():
        if are_kept(on_machine, images, Pooled(stage)):
            found = similar(model, images, query=image, count=SHOWN, space=space, device=device, reporter=silent)
            near = zip(found.names, found.value_R.tolist(), strict=True)
            return [f"most similar to it ({found.measure}):", *(f"  {value:.3f}  {visible(name)}" for name, value in near)]
    return []
