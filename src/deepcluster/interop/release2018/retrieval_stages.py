"""The stages of `eval_retrieval.py`, and the files in which they leave their results.

N images, R regions, C channels, P numbers of a descriptor.
"""

import pickle
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.files import written_beside
from deepcluster.core.pickles import read_plain_pickle
from deepcluster.core.progress import Reporter
from deepcluster.evaluation.datasets import buildings
from deepcluster.evaluation.datasets.labelled import contents_of
from deepcluster.evaluation.regions import Part, RegionReader, View, aggregate
from deepcluster.evaluation.retrieval import average_precision, rank
from deepcluster.interop.release2018.common import say
from deepcluster.interop.release2018_files import PROTOCOL
from deepcluster.run.model import Model

OTHER = {"Oxford": "Paris", "Paris": "Oxford"}


@dataclass(frozen=True)
class Files:
    """The files of a data set in `--temp_dir`."""

    folder: Path
    name: str
    size: int
    levels: int

    def of(self, kind: str, index: int) -> Path:
        """Return the file of an image: its `regions`, or its descriptor as a query (`q`) or in the database (`db`)."""
        return self.folder / f"{self.name}_S{self.size}_L{self.levels}_{kind}" / f"{index}.npy"

    def pca(self, name: str) -> Path:
        """Return the file of the PCA learned on a data set."""
        return self.folder / f"{name}_S{self.size}_PCA.pickle"


@dataclass(frozen=True)
class Dataset:
    """Images and queries, each in the order of their names."""

    folder: Path
    images: buildings.Buildings
    queries: tuple[buildings.Query, ...]

    @property
    def names(self) -> list[str]:
        """The names of the images, without those known to be damaged."""
        return [*self.images.index_of]


def open_dataset(folder: Path) -> Dataset:
    """Return a data set whose folder holds `jpg/` and `lab/`.

    Raises:
        InputError: it does not, or the lists do not parse, or name images that are not there.
    """
    if not all((folder / part).is_dir() for part in ("jpg", "lab")):
        raise InputError(f"--dataset {folder}: {contents_of(folder)}; a data set has the folders jpg/ and lab/")
    found = buildings.open_sets(folder)[0]
    truth = next((one for one in found.truths if one.images is None), None)
    if truth is None:
        raise InputError(f"{folder / 'lab'} holds no *{buildings.QUERY_ENDING}: there is nothing to search for")
    return Dataset(folder, found, truth.queries)


def extract_train(model: Model, dataset: Dataset, files: Files) -> None:
    """Write the regions of each image (1, R, C)."""
    say("extract regions for training")
    views = [View(index) for index in dataset.images.index_of.values()]
    for first, part in _parts(model, dataset, views, files):
        for number, rows_RC in enumerate(part.rows_RC.split(part.counts_N.tolist()), first):
            _save(files.of("regions", number), rows_RC[None])
    say("")


def train_pca(files: Files, n_components: int) -> None:
    """Learn PCA-whitening on the regions that `extract_train` wrote, and write it as plain arrays.

    Raises:
        InputError: there are none.
    """
    whitening, count, n_rows = Whitening(n_components), 0, 0
    while (path := files.of("regions", count)).is_file():
        rows_RC = torch.from_numpy(_load(path, 3)[0])
        if rows_RC.shape[1] < n_components:
            if not count:
                reason = f"the regions have only {rows_RC.shape[1]} channels"
                Reporter().warn(f"--n_pca {n_components}: {reason}, as many numbers are kept")
            whitening.n_components = rows_RC.shape[1]
        whitening.update(rows_RC)
        count, n_rows = count + 1, n_rows + len(rows_RC)
    if not count:
        raise InputError(f"{path} is not there: --stage extract_train with the same --S, --L and --temp_dir comes first")
    say(f"loaded {count} train vectors")
    whitening.finish()
    dim = len(whitening.mean_D)
    say(f"   size ({n_rows}, {dim})")
    say(f"keeping {100 * whitening.explained:.2f} % of the energy")
    path = files.pca(files.name)
    say(f"writing {path}")
    arrays = {"mean": whitening.mean_D.reshape(1, dim).numpy(), "DVt": whitening.components_DP.T.numpy()}
    content = {"n_components": whitening.n_components_, **arrays}
    with written_beside(path) as beside:
        beside.write_bytes(pickle.dumps(content, PROTOCOL))


def describe(model: Model, dataset: Dataset, files: Files, stage: str) -> None:
    """Write the descriptor (1, P) of each image (`db_features`), or of the region of each query (`q_features`).

    Raises:
        InputError: the PCA of the other data set is missing, or was learned on another network.
    """
    path = files.pca(OTHER[files.name])
    say(f"loading PCA from {path}")
    whitening = _read_pca(path)
    width, stage_of_net = len(whitening.mean_D), model.trunk.last_map
    say("Compute features")
    index_of = dataset.images.index_of
    views, kind = [View(index) for index in index_of.values()], "db"
    if stage == "q_features":
        views, kind = [View(index_of[query.image], query.box) for query in dataset.queries], "q"
    for first, part in _parts(model, dataset, views, files):
        if part.rows_RC.shape[1] != width:
            channels = f"{stage_of_net} of {model.trunk.arch} has {part.rows_RC.shape[1]} channels"
            raise InputError(f"{path} was learned on {width} channels, and {channels}: run the first two stages again")
        for number, row_P in enumerate(aggregate(part.rows_RC, part.counts_N, whitening), first):
            _save(files.of(kind, number), row_P[None])
    say("")


def score(dataset: Dataset, files: Files, eval_binary: str) -> None:
    """Rank the database for each query, write the rankings, and print average precisions.

    They are computed by the program `eval_binary` if it can be run, else here, by the same rule.

    Raises:
        InputError: features are missing, or the program fails.
    """
    names = dataset.names
    say("load query features")
    queries_QP = _stacked(files, "q", len(dataset.queries))
    say(f"  size {tuple(queries_QP.shape)}")
    say("load database features")
    rows_NP = _stacked(files, "db", len(names))
    say(f"  size {tuple(rows_NP.shape)}")
    if queries_QP.shape[1] != rows_NP.shape[1]:
        raise InputError("queries and images have descriptors of different length: run q_features and db_features again")
    program = shutil.which(eval_binary)
    if program is None:
        say(f"--eval_binary {eval_binary} can't be run: average precision is computed here, by the same rule")
    found = []
    for query, best_N in zip(dataset.queries, rank(queries_QP, rows_NP).tolist(), strict=True):
        ranking, path = [names[index] for index in best_N], files.folder / f"{query.name}.rnk"
        path.write_text("".join(f"{name}\n" for name in ranking), encoding="utf-8")
        if program is None:
            judged = query.judged[buildings.WHOLE]
            found.append(average_precision(ranking, judged.positives, judged.junk) if judged.positives else float("nan"))
        else:
            found.append(_by_program(program, dataset.folder / "lab" / query.name, path))
    for query, value in zip(dataset.queries, found, strict=True):
        say(f"{query.name}: {100 * value:.2f}")
    say(20 * "-")
    say(f"Mean: {100 * np.nanmean(found):.2f}")


def _parts(model: Model, dataset: Dataset, views: Sequence[View], files: Files) -> Iterator[tuple[int, Part]]:
    """Yield the regions of views, a part at a time, and the number of its first view; print the numbers of the views."""
    reader, first = RegionReader(model, model.trunk.last_map, files.levels), 0
    if files.size < reader.smallest:
        raise InputError(f"--S {files.size} is too small for {model.trunk.arch}; use {reader.smallest} or more")
    for part in reader.parts(dataset.images.source, views, files.size, "regions"):
        for place, reason in part.faults.items():
            name = dataset.images.source.name(views[first + place].index)
            raise InputError(f"{dataset.folder / 'jpg' / name} can't be read: {reason}")
        yield first, part
        say("".join(f"{number} " for number in range(first, first + len(part.counts_N))), end="")
        first += len(part.counts_N)


def _save(path: Path, rows: Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as file:
        np.save(file, rows.cpu().float().numpy())


def _load(path: Path, axes: int) -> NDArray[np.float32]:
    """Return an array of so many axes, of which the first is 1."""
    try:
        array: NDArray[Any] = np.load(path)
        if array.ndim != axes or len(array) != 1 or array.dtype.kind != "f":
            raise ValueError("it holds another array")
    except (OSError, ValueError, EOFError) as fault:
        raise InputError(f"{path} can't be read: {fault}") from None
    result: NDArray[np.float32] = array.astype(np.float32)
    return result


def _stacked(files: Files, kind: str, count: int) -> Tensor:
    missing = next((path for n in range(count) if not (path := files.of(kind, n)).is_file()), None)
    if missing is not None:
        stage = f"--stage {kind}_features"
        raise InputError(f"{missing} is not there: {stage} with the same --S, --L and --temp_dir comes first")
    rows = [_load(files.of(kind, number), 2) for number in range(count)]
    if len({row.shape for row in rows}) != 1:
        raise InputError(
            f"{files.of(kind, 0).parent} holds descriptors of different length: run --stage {kind}_features again"
        )
    return torch.from_numpy(np.concatenate(rows))


def _read_pca(path: Path) -> Whitening:
    if not path.is_file():
        stages = "--stage extract_train and train_pca on the other data set, with the same --temp_dir, come first"
        raise InputError(f"{path} is not there: {stages}")
    content: Any = read_plain_pickle(path)
    try:
        mean_D, components_PD = (torch.from_numpy(np.asarray(content[name], np.float32)) for name in ("mean", "DVt"))
        mean_D, (count, dim) = mean_D.flatten(), components_PD.shape
        if len(mean_D) != dim:
            raise ValueError("mean and DVt do not fit together")
    except (TypeError, KeyError, ValueError) as fault:
        raise InputError(f"{path} holds no PCA of --stage train_pca: {fault}") from None
    state = {"mean": mean_D, "components": components_PD.T, "variance": torch.ones(count), "explained": torch.tensor(1.0)}
    return Whitening.from_state_dict(state)


def _by_program(program: str, query: Path, ranking: Path) -> float:
    """Return what the program `compute_ap` prints for a query."""
    try:
        done = subprocess.run([program, str(query), str(ranking)], capture_output=True, text=True, check=False)
        return float(done.stdout.split()[0])
    except (OSError, ValueError, IndexError):
        raise InputError(f"--eval_binary {program} printed no number for {query} and {ranking}") from None
