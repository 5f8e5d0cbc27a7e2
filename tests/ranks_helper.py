"""Runs in several processes: of this machine's ranks by `spawn`, many runs in one start; and by `torchrun` as people do.

`python ranks_helper.py MOMENT train DATA …` is `deepcluster train DATA …`, to which something happens at a moment: see HARM.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_runs import train_small
from spoiled_images import half
from torch.multiprocessing import spawn

from deepcluster.core.distributed import group
from deepcluster.core.errors import Interrupted
from deepcluster.core.progress import Meter, Reporter

# Sides of crops, heads and widths that take a second.
V2: dict[str, Any] = {
    "method": "deepcluster-v2",
    "recipe": "v2-small-set",
    "look_again": False,
    "whiten": False,
    "cluster_stage": "features",
    "crops": "2x16,2x12",
    "clusters": (5, 4),
    "projection": (32, 8),
    "lr_schedule": "cosine",
    "momentum": 0.9,
    "clip_gradient": 1.0,
    "jitter": 0.4,
}


class At(Reporter):
    """Does something in its process at the n-th sign of progress of a kind of work, or at a line that begins so."""

    def __init__(self, what: str, call: int, **options: Any) -> None:
        super().__init__(**{"quiet": True, **options})
        self.what, self.left = what, call

    def act(self) -> None:
        """What is done; a stop by Ctrl-C."""
        os.kill(os.getpid(), signal.SIGINT)

    def met(self, what: str) -> None:
        if what.startswith(self.what):
            self.left -= 1
            if self.left == 0:
                self.act()

    def say(self, line: str) -> None:
        self.met(f"say {line}")
        super().say(line)

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        reporter = self

        class Watched(Meter):
            def __call__(self, done: int) -> None:
                reporter.met(what)

        yield Watched()


class Spoiler(At):
    """Cuts image files in half."""

    def __init__(self, what: str, call: int, paths: Sequence[Path]) -> None:
        super().__init__(what, call)
        self.paths = paths

    def act(self) -> None:
        for path in self.paths:
            path.write_bytes(half(path.read_bytes()))


Job = Mapping[str, Any]


def run_job(job: Job) -> None:
    """A run of `train_small`: its data, out, options; and `stop`, the moment at which it is stopped, or `spoil`."""
    reporter = At(*job["stop"]) if "stop" in job else Spoiler(*job["spoil"]) if "spoil" in job else None
    with suppress(Interrupted):
        train_small(job["data"], job["out"], reporter=reporter, resume=job.get("resume", False), **job["options"])


def _run_jobs(jobs: Sequence[Job]) -> None:
    for job in jobs:
        run_job(job)


def _in_group(rank: int, world: int, folder: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), world), rank, world):
        function(*args)


def in_ranks(world: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """A call in each of `world` processes of one group, which meet in a new folder."""
    folder.mkdir()
    spawn(_in_group, args=(world, folder, function, args), nprocs=world)


def run_jobs(world: int, folder: Path, jobs: Sequence[Job]) -> None:
    """Runs, one after the other, each in `world` processes."""
    in_ranks(world, folder, _run_jobs, jobs)


def torchrun(world: int, *words: str, restarts: int = 0, moment: str = "") -> "subprocess.CompletedProcess[str]":
    """`torchrun … -m deepcluster WORDS`, ended, with what it printed; something happens at the moment, if one is named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["--max-restarts", str(restarts), *([__file__, moment] if moment else ["-m", "deepcluster"]), *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)


def complaints(stderr: str) -> list[str]:
    """Our lines of an error stream, without those of torchrun and of Python's warnings."""
    return [line for line in stderr.splitlines() if re.match(r"deepcluster: |warning: ", line)]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop_all() -> None:
    os.kill(os.getppid(), signal.SIGINT)


def _fill_disk() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def _break() -> None:
    from deepcluster.core.errors import InputError

    raise InputError("the shared folder is not here")


# What happens, to which rank: in the middle of the second epoch, or in a pass; of the first attempt alone.
HARM = {
    "kill": (_kill, 1),
    "kill the first": (_kill, 0),
    "ctrl-c": (_stop_all, 0),
    "full disk": (_fill_disk, 0),
    "fault": (_break, 1),
}


def _harmed(moment: str, words: list[str]) -> None:
    from deepcluster import cli
    from deepcluster.core import work

    harm, rank = HARM[moment]
    if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":

        class Harmed(At):
            def __init__(self, **options: Any) -> None:
                super().__init__("epoch 2" if words[0] == "train" else "features", 3, **options)

            def act(self) -> None:
                harm()

        cli.Reporter = work.Reporter = Harmed  # type: ignore[misc, attr-defined]
    sys.exit(cli.main(words))


if __name__ == "__main__":
    _harmed(sys.argv[1], sys.argv[2:])
