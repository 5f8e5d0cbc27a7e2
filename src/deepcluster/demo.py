"""The main job on images that are already here: the 1,797 digits of scikit-learn, as PNG files in one flat folder.

N images, D features.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.api import train
from deepcluster.applied.embedding import embed
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import output_path
from deepcluster.core.progress import Reporter
from deepcluster.evaluation.knn import leave_one_out_accuracy
from deepcluster.visualization.report.command import report
from deepcluster.visualization.report.page import needs_report_extra

CLASSES = 10
SEEDS = 5
# The digits' 64 pixels and the trunk's features are clustered in the same way, by steps 2 and 3 of the method.
COMPONENTS = 16


def demo(out: Path, reporter: Reporter) -> str:
    """Write the digits, train on them, and compare what was learned with three baselines; return a table.

    Raises:
        InputError: `out` holds something else.
        Interrupted: the training was stopped; the demo has no resumption of its own.
    """
    from sklearn.datasets import load_digits

    needs_report_extra()
    out = output_path(out, "--out", is_folder=True)
    images, run = out / "digits", out / "run"
    labels_N = write_digits(images)
    reporter.say(f"wrote {len(labels_N):,} digits of 8 × 8 pixels into {images}; training does not see their labels")
    try:
        train(images, out=run, overwrite=run.exists(), reporter=reporter)
    except Interrupted as stop:
        raise Interrupted("the demo was stopped; the same command starts it from the beginning", stop.by) from stop
    rows = {
        "k-means on pixels": torch.from_numpy(load_digits().data).float(),
        "untrained trunk": _embedding_ND(f"untrained:{run}", images),
        "after the first epoch": _embedding_ND(run / "checkpoints" / "epoch-0001.pt", images),
        "after training": _embedding_ND(run, images),
    }
    lines = [f"{'1,797 digits':<24}{'NMI of 10 clusters':>20}{'the same, whitened':>20}{'k-NN accuracy':>16}"]
    for name, features_ND in rows.items():
        whitened_NP = Whitening(COMPONENTS).fit_transform(features_ND)
        numbers = (clusters_nmi(features_ND, labels_N), clusters_nmi(whitened_NP, labels_N))
        knn = leave_one_out_accuracy(features_ND, torch.from_numpy(labels_N))
        lines.append(f"{name:<24}{numbers[0]:>20.3f}{numbers[1]:>20.3f}{knn:>16.3f}")
    lines.append(
        f"NMI to the digits' labels of k-means with k = 10, mean of {SEEDS} seeds: on the rows as they are, and after step "
        f"2 of the method (PCA to {COMPONENTS}, whitened, unit rows). k-NN: 20 neighbours, leave one out."
    )
    lines.append(f"Clusters of each image: {max((run / 'assignments').iterdir())}")
    lines.append(f"See them: {report(run, reporter=Reporter(quiet=True))}")
    return "\n".join(lines)


def write_digits(folder: Path) -> NDArray[np.int64]:
    """Write the digits as PNG files with numbers as names; return their labels, in the order of the names."""
    from PIL import Image
    from sklearn.datasets import load_digits

    if folder.exists() and any(not entry.name.endswith(".png") for entry in folder.iterdir()):
        raise InputError(f"{folder} holds other files; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for number, pixels in enumerate(digits.images):
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return digits.target.astype(np.int64)  # type: ignore[no-any-return]


def clusters_nmi(features_ND: Tensor, labels_N: NDArray[np.int64]) -> float:
    """Return the NMI to the labels of k-means with k = 10 on the features, mean over seeds."""
    kmeans = KMeans(CLASSES, max_iter=100)
    return float(np.mean([kmeans.cluster(features_ND, seed=seed).nmi(labels_N) for seed in range(SEEDS)]))


def _embedding_ND(model: str | Path, images: Path) -> Tensor:
    return torch.from_numpy(embed(model, images).embedding_ND)
