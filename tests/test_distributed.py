"""The end of a group of processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from deepcluster.core.distributed import Ranks, group

THREADS = Path("/proc/self/task")


def exchange_threads() -> int:
    return sum(path.read_text().startswith("pt_gloo") for path in THREADS.glob("*/comm"))


def learn(ranks: Ranks) -> None:
    network = ranks.data_parallel(nn.Linear(2, 2))
    network(torch.ones(1, 2)).sum().backward()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), 2), rank, 2) as ranks:
        learn(ranks)
        during = exchange_threads()
    (folder / f"{rank}").write_text(f"{during} {exchange_threads()}")


@pytest.mark.skipif(not THREADS.is_dir(), reason="threads are listed in /proc")
def test_no_thread_of_an_exchange_outlives_the_group(tmp_path: Path) -> None:
    """Such a thread lets go of a tensor while Python ends, which aborts the process: about one run of hundreds."""
    spawn(work, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        during, after = map(int, (tmp_path / str(rank)).read_text().split())
        assert during > 0 == after
