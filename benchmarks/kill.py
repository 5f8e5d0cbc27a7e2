"""Does a run that is killed at random moments end like an uninterrupted one? `python benchmarks/kill.py --kills 20`

Trains on digits twice: once uninterrupted, and once in processes that are killed with SIGKILL at random moments and resumed
with --resume. Prints a table of the kills and whether weights, optimizers, clusters, tables and metrics are equal
bit for bit; exits with 1 if they are not. About 5 minutes on 2 cores.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepcluster.demo import write_digits

SETTINGS = {
    "--recipe": "paper-alexnet",
    "--arch": "alexnet-small",
    "--image-size": 16,
    "--clusters": 10,
    "--pca": 16,
    "--cluster-stage": "conv5",
    "--batch-size": 32,
    "--lr": 0.02,
    "--device": "cpu",
    "--precision": "fp32",
    "--checkpoint-every": 3,
    "--checkpoint-minutes": 0.01,
}
MEASURED = {"seconds", "images_per_second", "data_wait_share", "peak_memory_bytes"}


def main() -> int:
    """Run both, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, help="for images and runs; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(options.folder or Path(temporary), options.kills, options.epochs, random.Random(options.seed))


def compare(folder: Path, kills: int, epochs: int, draw: random.Random) -> int:
    """Kill runs `kills` times in all; compare each run that finishes with the uninterrupted one."""
    write_digits(folder / "digits")
    start_seconds, whole_seconds = uninterrupted(folder, epochs)
    print(f"uninterrupted: {whole_seconds:.0f} s, of which {start_seconds:.1f} s before the first batch of images")
    longest = start_seconds + 2 * (whole_seconds - start_seconds) / max(1, kills)
    print(f"{'kill':>4} {'run':>3} {'alive for':>10}   {'the last checkpoint then':<30}")
    done, run, faults = 0, 1, 0
    while done < kills:
        out = folder / f"killed-{run}"
        alive = draw.uniform(0.5, longest)
        if ends_within(alive, start(folder, out, epochs)):
            faults += report(folder / "whole", out)
            run += 1
            continue
        done += 1
        print(f"{done:>4} {run:>3} {alive:>8.1f} s   {state_of(out):<30}", flush=True)
    out = folder / f"killed-{run}"
    if start(folder, out, epochs).wait() != 0:
        print("the last resume failed")
        return 1
    faults += report(folder / "whole", out)
    print(f"{kills} kills, {run} runs, {faults} differences")
    return int(faults > 0)


def start(folder: Path, out: Path, epochs: int) -> "subprocess.Popen[bytes]":
    """Start the run in `out`, or resume it."""
    words = [str(word) for pair in {**SETTINGS, "--out": out, "--epochs": epochs}.items() for word in pair]
    train = [sys.executable, "-m", "deepcluster", "train", str(folder / "digits")]
    return subprocess.Popen([*train, "--resume", "--quiet", *words])


def uninterrupted(folder: Path, epochs: int) -> tuple[float, float]:
    """Train into `whole`; return the seconds until the run folder exists, and in total."""
    begun = time.monotonic()
    process = start(folder, folder / "whole", epochs)
    while not (folder / "whole" / "config.json").exists() and process.poll() is None:
        time.sleep(0.05)
    started = time.monotonic() - begun
    if process.wait() != 0:
        sys.exit("the uninterrupted run failed")
    return started, time.monotonic() - begun


def ends_within(seconds: float, process: "subprocess.Popen[bytes]") -> bool:
    """Return True if the process ends in that time; kill it otherwise."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if status != 0:
        sys.exit(f"a resumed run ended with {status}")
    return True


def checkpoint(run: Path) -> dict[str, Any]:
    """Return the last checkpoint: a kill must never leave an unreadable one."""
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return state


def state_of(run: Path) -> str:
    """Return the progress of a run in words."""
    if not (run / "config.json").exists():
        return "not started"
    if not (run / "checkpoints" / "last.pt").exists():
        return "none yet"
    state = checkpoint(run)
    beside = len(list(run.rglob("*.part")))
    return f"epoch {state['epoch']}, batch {state['batch']}" + (f" ({beside} half-written file)" if beside else "")


def report(whole: Path, other: Path) -> int:
    """Print which parts of two finished runs are equal; return the number of differences."""
    states = [checkpoint(run) for run in (whole, other)]
    parts = {
        name: same(states[0][name], states[1][name])
        for name in ("trunk", "trunk_optimizer", "head", "head_optimizer", "assignment", "whitening", "final")
    }
    tables = [sorted(path.name for path in (run / "assignments").iterdir()) for run in (whole, other)]
    alike = [
        (whole / "assignments" / name).read_bytes() == (other / "assignments" / name).read_bytes() for name in tables[0]
    ]
    parts[f"{len(alike)} tables of assignments"] = tables[0] == tables[1] and all(alike)
    parts["metrics"] = metrics(whole) == metrics(other)
    print(
        f"{other.name} against the uninterrupted run: "
        + ", ".join(f"{k} {'equal' if v else 'DIFFERS'}" for k, v in parts.items())
    )
    return sum(not equal for equal in parts.values())


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def same(one: Any, other: Any) -> bool:
    """Return True if nested values and tensors are equal bit for bit; NaN equals NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)


if __name__ == "__main__":
    sys.exit(main())
