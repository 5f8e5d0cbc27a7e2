"""The run folder that `cluster` writes: it is used as that of a training, but for resuming. N images, K clusters."""

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.clustering_subject import Subject
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.files import save_tensors, write_whole
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.run.folder import CHECKPOINT_FORMAT, RunFolder, save_assignment
from deepcluster.run.settings import Settings
from deepcluster.run.space import space_state

EXAMPLES = 3


def write_run(
    folder: RunFolder,
    subject: Subject,
    settings: Settings,
    whitening: Whitening,
    assignment: Assignment,
    *,
    comparison: Sequence[Mapping[str, Any]],
    overwrite: bool,
    work: Work,
) -> None:
    """Write a run that was clustered without training, and print what it has.

    Args:
        whitening, assignment: the clusters, of all N rows.
        comparison: measures of the numbers of clusters that were compared.
    """
    names, kept = subject.names(), subject.kept_settings(settings)
    missing: list[int] = (assignment.labels_N < 0).nonzero().flatten().tolist()
    reasons = {names[index]: why for index, why in subject.reasons(missing).items()}
    folder.create(overwrite=overwrite)
    folder.write_config(kept, {}, subject.data_facts(), clustered={**subject.made_of, "whitened": settings.whiten})
    save_assignment(folder.assignment(1), names, assignment)
    folder.write_unreadable(reasons)
    if comparison:
        _write_comparison(folder, comparison)
    final = {"assignment": assignment.state_dict(), **space_state(whitening)}
    state = {"settings": kept, "epoch": 1, "labelled": False, **subject.state(), "final": final}
    save_tensors(folder.last, {"format": CHECKPOINT_FORMAT, **state})
    folder.write_clusters(names, assignment)
    _say(folder, subject, assignment, reasons, work)


def _write_comparison(folder: RunFolder, comparison: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(comparison[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison)
    write_whole(folder.path / "comparison.csv", text.getvalue())
    write_whole(folder.path / "comparison.json", json.dumps(list(comparison), indent=2) + "\n")


def _say(folder: RunFolder, subject: Subject, assignment: Assignment, reasons: Mapping[str, str], work: Work) -> None:
    run, say, sizes_K = folder.path, work.reporter.say, assignment.sizes_K().numpy()
    for name, why in list(reasons.items())[:EXAMPLES]:
        work.reporter.warn(f"{name} can't be read: {why}")
    if len(reasons) > EXAMPLES:
        work.reporter.warn(f"… and {len(reasons) - EXAMPLES:,} more, which are in no cluster: see {folder.unreadable}")
    say(f"done: {run}: {count_of(int(sizes_K.sum()), 'image')} in {describe_sizes(sizes_K)}")
    say(f"the cluster of each image: {folder.clusters}")
    address = subject.data_facts()["address"]
    folders = shlex.join(["deepcluster", "assign", str(run), *address, "--folders", "by-cluster"])
    links = f"; as folders of links: {folders}" if subject.made_of["stage"] else ""
    say(f"see them: {shlex.join(['deepcluster', 'report', str(run)])}{links}")


def describe_sizes(sizes_K: NDArray[np.int64]) -> str:
    """Return number and sizes of clusters in words."""
    used = np.sort(sizes_K[sizes_K > 0])
    empty = len(sizes_K) - len(used)
    text = f"{count_of(len(used), 'cluster')} of {used[0]:,} to {used[-1]:,}, median {used[len(used) // 2]:,}"
    return text + (f"; {empty:,} are empty" if empty else "")
