"""The files that the code of 2018 leaves: `checkpoint.pth.tar`, and the log `clusters` of a run.

N images, K clusters, D features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepcluster.core.files import load_tensors, read_table, save_tensors, user_path
from deepcluster.interop.exports import Written
from deepcluster.interop.release2018_files import (
    add_to_clusters,
    image_folder,
    image_folder_positions,
    images_lists,
    release_checkpoint,
)
from deepcluster.models.heads import ClusterHead, Head, make_head
from deepcluster.run.folder import RunFolder, is_checkpoint
from deepcluster.run.model import Model
from deepcluster.run.space import PredictionSpace

CHECKPOINT, CLUSTERS = "checkpoint.pth.tar", "clusters"


def write_release(model: Model, out: Path) -> Written:
    """Write `checkpoint.pth.tar`, and `clusters` where the model is a run whose images are still there.

    Raises:
        InputError: the release has no such network.
    """
    saved = saved_state(model)
    head = head_of(model, saved)
    optimizer = saved.get("trunk_optimizer") if _is_sgd(saved) else None
    done = max(0, int(saved.get("epoch", 1)) - 1)
    state = release_checkpoint(model.trunk, head, epoch=done, optimizer=optimizer)
    save_tensors(out / CHECKPOINT, state)
    left = [] if head is not None else ["top_layer, which the model does not have and the scripts of 2018 need"]
    left += [] if optimizer is not None or head is None else ["the optimizer, which main.py of 2018 needs to resume"]
    missing = _write_clusters(model, done, out / CLUSTERS)
    left += [missing] if missing else []
    return Written(left_out="; ".join(left), read_with=f"import torch; state = torch.load({{out!r}} + '/{CHECKPOINT}')")


def saved_state(model: Model) -> dict[str, Any]:
    """Return the checkpoint that a model was loaded from, without reading its tensors into memory; empty for others."""
    path = user_path(model.name)
    path = RunFolder(path).last if path.is_dir() else path
    if not path.is_file() or path.suffix != ".pt":
        return {}
    state = load_tensors(path, mapped=True)
    return state if is_checkpoint(state) else {}


def head_of(model: Model, saved: dict[str, Any]) -> Head | None:
    """Return the layer that scores clusters from a model's features: that of its training, or of its file."""
    space, assignment = model.space, model.assignment
    if isinstance(space, PredictionSpace) and assignment is not None:
        # Scores are in proportion to those of the layer in the file.
        head = ClusterHead(model.trunk.dim, assignment.n_clusters, seed=0)
        weights_KE = assignment.centroids_KP
        head.load_state_dict({"linear.weight": weights_KE[:, : space.dim], "linear.bias": weights_KE[:, space.dim]})
        return head.eval()
    state = saved.get("head")
    if not state or "linear.weight" not in state:
        return None
    head_or_two = make_head(model.trunk.dim, len(state["linear.weight"]), None, norm=model.settings.head_norm, seed=0)
    head_or_two.load_state_dict(state)
    return head_or_two.eval()


def _is_sgd(saved: dict[str, Any]) -> bool:
    optimizer = saved.get("trunk_optimizer", {})
    return bool(optimizer.get("state")) and all("momentum_buffer" in one for one in optimizer["state"].values())


def _write_clusters(model: Model, epochs: int, out: Path) -> str:
    """Write the clusters that a run was trained on, by numbers of images in ImageFolder's order; return why not, or ""."""
    path = user_path(model.name)
    found = [RunFolder(path).assignment(epoch) for epoch in range(1, epochs + 1)] if path.is_dir() else []
    tables = [table for table in found if table.is_file()]
    if not tables:
        return "clusters, which only a run folder has"
    address = RunFolder(path).read_config()["data"].get("address") or []
    root = Path(address[0]) if len(address) == 1 else None
    if (beside := path.absolute().parent / CLUSTERS).is_file():
        return f"clusters, which main.py has written: {beside}"
    if root is None or not root.is_dir() or not (count := len(image_folder(root)[0])):
        return "clusters, whose numbers stand for images in class folders: the run's are no such folder, or not there"
    positions_N, names = np.empty(0, np.int64), None
    for number, table in enumerate(tables):
        columns = read_table(table, ["name", "cluster"])
        if names is None or not columns["name"].equals(names):
            names = columns["name"]
            positions_N = image_folder_positions(names.to_pylist(), root)
        clusters_N = columns["cluster"].to_numpy()
        labels_M = torch.full((count,), -1)
        known_N = positions_N >= 0
        labels_M[torch.from_numpy(positions_N[known_N])] = torch.from_numpy(clusters_N[known_N])
        n_clusters = max(int(clusters_N.max()) + 1, model.settings.n_clusters if model.settings.clustering != "pic" else 0)
        add_to_clusters(out, images_lists(labels_M, n_clusters), new=number == 0)
    lost = int((positions_N < 0).sum())
    return f"{lost:,} images of the run that are in no class folder" if lost else ""
