"""What gpu.py checks rather than measures: commands as a user types them, and the tests that have a meaning on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from gpu_parts import Job, report

ROOT = Path(__file__).resolve().parents[1]
# Tests of what runs on the GPU by its own code, or by the choice of `--device auto`; those that are not there are left out.
GPU_TESTS = (
    "nearest",
    "nearest_triton",
    "neighbours",
    "kmeans",
    "eigen",
    "whitening",
    "pic",
    "balanced",
    "resample",
    "views",
    "multi_crop",
    "synchronised",
    "lars",
    "optim",
    "bank",
    "deepcluster_v2",
    "recipes",
    "api",
    "gpu_path",
    "true_float32",
    "step_waits",
    "cli",
)
QUICK_TESTS = ("bank", "optim")
NEEDED = ("pytest", "hypothesis", "plotly", "duckdb", "pyarrow")


def run(command: Sequence[str], job: Job, ends: float, **environ: str) -> tuple[str, float, str]:
    """Run a command; return how it ended, its seconds, and the last line of its standard error, or else of its output."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environ},
            cwd=job.folder if command[1] == "deepcluster" else ROOT,
            capture_output=True,
            text=True,
            timeout=max(1.0, ends - started),
            check=False,
        )
        state, said = "ok" if done.returncode == 0 else f"failed, status {done.returncode}", (done.stderr, done.stdout)
    except subprocess.TimeoutExpired as late:
        state, said = "stopped by the time limit", tuple((part or b"").decode() for part in (late.stderr, late.stdout))
    if state != "ok":
        print(f"\n$ {' '.join(command)}\n{said[1][-20_000:]}\n{said[0][-20_000:]}", file=sys.stderr, flush=True)
    lines = [line.strip() for text in said for line in text.splitlines()[-1:] if line.strip()]
    return state, time.monotonic() - started, lines[0] if lines else ""


def at_once(job: Job) -> int:
    """Return how many programs run side by side."""
    return 2 if job.device == "cpu" else max(2, min(8, (os.cpu_count() or 2) // 2))


def smoke(job: Job) -> None:
    """Run each command as a user does: a row with its seconds, beside the others, and how it ended."""
    from recipes import split

    ends = time.monotonic() + job.seconds - 5
    split(job.images("small", 1000, 48), 1000, Path(job.folder, "photos"), names=("train", "val"))
    common = ["--device", job.device, "--workers", "0" if job.quick else "2"]
    few = ["--clusters", "5", "--pca", "8"] if job.quick else []
    several = ["--clusters", "5,5,5", "--pca", "8", "--arch", "alexnet-small", "--batch-size", "16"] if job.quick else []
    small = ["--epochs", "2", *common]
    trains = {
        "v1": ["train", "photos/train", "--recipe", "small-images", "--out", "v1", *few, *small],
        "v2": ["train", "photos/train", "--method", "deepcluster-v2", "--out", "v2", *several, *small],
    }
    uses = {
        "embed v1": ["embed", "v1", "photos/val", "--out", "v1.parquet", *common],
        "embed v2": ["embed", "v2", "photos/val", "--out", "v2.npy", *common],
        "assign v1": ["assign", "v1", "photos/val", "--out", "v1-clusters.parquet", *common],
        "assign v2": ["assign", "v2", "photos/val", "--out", "v2-clusters.parquet", *common],
        "evaluate knn": ["evaluate", "knn", "v2", "--data", "photos", *common],
        "evaluate linear": ["evaluate", "linear", "v1", "--data", "photos", "--fast", *common],
        "report": ["report", "v1", *common],
        "visualize filters": ["visualize", "filters", "v1", "--channels", "0-3", "--steps", "20", *common],
        "visualize top-images": ["visualize", "top-images", "v1", "--data", "photos/val", "--channels", "0-3", *common],
    }
    with ThreadPoolExecutor(at_once(job)) as pool:
        for steps in (trains, uses):
            found = pool.map(lambda words: run(["-m", "deepcluster", *words], job, ends), steps.values())
            for name, (state, seconds, last) in zip(steps, found, strict=True):
                report(name if steps is uses else f"train {name}", state=state, seconds=seconds, last_line=last[:150])
    for name in trains:
        metrics = Path(job.folder, name, "metrics.jsonl")
        for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ()):
            report(f"train {name}, epoch {line['epoch']}", **line["seconds"], peak_GiB=line["peak_memory_bytes"] / 2**30)


def gpu_tests(job: Job) -> None:
    """Run the tests that have a meaning on the device, file by file: a row of counts, and the failures' names."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    report("not installed", packages=", ".join(missing) or "none: all that the tests need is there")
    if "pytest" in missing:
        return
    ends = time.monotonic() + job.seconds - 5
    names = QUICK_TESTS if job.quick else GPU_TESTS
    files = [path for name in names if (path := ROOT / "tests" / f"test_{name}.py").exists()]
    # Without hypothesis, tests/conftest.py can't be read: its fixtures are missing, and the files that need it fail.
    bare = ["--noconftest"] if "hypothesis" in missing else []
    threads = str(max(1, (os.cpu_count() or 1) // at_once(job)))

    def test(path: Path) -> tuple[str, float, Path]:
        results = Path(job.folder, f"{path.stem}.xml")
        words = ["-m", "pytest", "-vv", *bare, "-p", "no:cacheprovider", f"--junitxml={results}", str(path)]
        state, seconds, _ = run(words, job, ends, OMP_NUM_THREADS=threads)
        return state, seconds, results

    total, n_failed = dict.fromkeys(("passed", "failed", "skipped"), 0), 0
    with ThreadPoolExecutor(at_once(job)) as pool:
        for path, (state, seconds, results) in zip(files, pool.map(test, files), strict=True):
            counts, failures = dict.fromkeys(total, 0), []
            for kind, name in outcomes(results):
                counts[kind] += 1
                failures += [name] if kind == "failed" else []
            n_failed += state != "ok"
            print("".join(f"FAILED {name}\n" for name in failures), end="", file=sys.stderr)
            total = {kind: total[kind] + count for kind, count in counts.items()}
            more = ({} if state == "ok" else {"state": state}) | ({"failures": "; ".join(failures)} if failures else {})
            report(path.name, **counts, seconds=seconds, **more)
    report("all files", **total, files_failed=n_failed)


def outcomes(results: Path) -> Iterator[tuple[str, str]]:
    """Yield passed, failed or skipped, and the name, of each test in a file of JUnit's format, if there is one."""
    if not results.exists():
        return
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        yield kind, f"{case.get('classname', '')}::{case.get('name', '')}"
