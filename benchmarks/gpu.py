"""Every GPU measurement of the project in one command of at most 6 minutes, from a source checkout that is not installed.

    python benchmarks/gpu.py [--data PHOTOS] [--small cifar10-train.tar.gz] [--out FOLDER] [--only smoke,tests] [--minutes 6]
    python benchmarks/gpu.py --only minutes --small cifar10-train.tar.gz
    python benchmarks/gpu.py --device cpu --quick

Prints a table with the rows of these parts, the most important first:

- environment: the machine, and its rates of bf16 products and of copies;
- data: files of `--data` (photos of some 224 px) and `--small` (32 px) that the others read; without these, random JPEGs;
- smoke: `deepcluster train` (both methods), embed, assign, evaluate, report, visualize, as typed by a user, several at a
  time: seconds, ok or failed, and the last line of each;
- tests: the tests that have a meaning on a GPU, by file: passed, failed, skipped. All names of failures are in the row and
  in the log;
- clustering: k-means of 1.28 million rows in 10,000 clusters beside a plain loop, flash-kmeans and flashlib (if installed)
  and the bare products (kmeans.py); DeepCluster-v2's three clusterings of 20,000 rows; whitening; neighbours;
- cifar, alexnet, resnet50: the bare network's seconds as a share of a whole epoch's (epoch.py), with images on the GPU
  and by workers. AlexNet at 224 px; DeepCluster-v2 with ResNet-18 on 2x32 px, batches of 512, and with ResNet-50 on
  2x224 + 6x96 px. The sets are small, so clustering and whitening take more of an epoch than in a long run;
- minutes: DeepCluster-v2 on the images of `--small`, by the recipe for this device: k-NN and linear top-1 on a held-out
  tenth at three moments (recipes.py): 1, 2 and 4 minutes with `--only minutes`, else a share of these;
- steps: a training step on images that are on the GPU beside the bare network's, by batch (gpu_steps.py); whether it waits
  for the GPU; with torch.compile, if a minute is left (`--only steps`);
- views: images per second of crops, colours and blur on the device; whether they make the CPU wait for the GPU; the largest
  difference of their pixels from the CPU's, of 255;
- input: images per second by the number of worker processes (input.py), decoded and from the pack, at 32 and 224 px;
- triton: the fused kernel of the nearest centroids beside plain products, by type;
- dense: seconds a step and memory of detection and segmentation at their published sizes and batches, on drawn annotations
  (gpu_dense.py); best alone: `--only dense`.

Each part runs in a process of its own with a time limit, and keeps the rows that it has printed when it fails. `--out`
gets the table (gpu.txt), its rows as lines of JSON (gpu.jsonl) and what the parts wrote to stderr (gpu.log). Needs the
packages of pyproject.toml, and for the tests those of its extra `dev`. What each row should be on an H200 is in
docs/benchmarks.md. `--quick` only checks that all parts run, with tiny sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_checks import gpu_tests, smoke
from gpu_parts import Job, clustering, data, environment, input_rates, minutes, triton, views, whole_epochs


def dense(job: Job) -> None:
    """Measure the dense protocols (gpu_dense.py, which imports torch)."""
    from gpu_dense import dense

    dense(job)


def steps(job: Job) -> None:
    """Measure training steps (gpu_steps.py, which imports torch)."""
    from gpu_steps import steps

    steps(job)


PARTS: dict[str, Callable[[Job], None]] = {
    "environment": environment,
    "data": data,
    "smoke": smoke,
    "tests": gpu_tests,
    "clustering": clustering,
    "cifar": partial(whole_epochs, "cifar"),
    "minutes": minutes,
    "steps": steps,
    "alexnet": partial(whole_epochs, "alexnet"),
    "resnet50": partial(whole_epochs, "resnet50"),
    "views": views,
    "input": input_rates,
    "triton": triton,
    "dense": dense,
}
# Most seconds of each part, where all have 6 minutes together; those that matter less come last, and get what is left.
LIMITS = {
    "environment": 25,
    "data": 40,
    "smoke": 70,
    "tests": 75,
    "clustering": 50,
    "cifar": 45,
    "minutes": 90,
    "steps": 45,
    "alexnet": 45,
    "resnet50": 50,
    "views": 30,
    "input": 60,
    "triton": 40,
    "dense": 150,
}


def run_apart(part: str, job: Job, log: Path) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own; yield its rows, and one that says how it failed, if it did."""
    env = {**os.environ, "DEEPCLUSTER_CACHE": str(Path(job.folder, "cache"))}
    env |= {"TRITON_INTERPRET": "1"} if part == "triton" and job.device == "cpu" else {}
    command = [sys.executable, __file__, "--part", part, json.dumps(asdict(job))]
    rows = Path(job.folder, f"{part}.jsonl")
    before = log.stat().st_size
    with log.open("a", encoding="utf-8") as errors, rows.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=env, start_new_session=True)
        try:
            code = process.wait(job.seconds)
            fault = f"ended with status {code}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"stopped after its {job.seconds:.0f} seconds"
        finally:  # Its own processes end with it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    yield from (json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.startswith('{"what"'))
    if fault:
        said = log.read_bytes()[before:].decode("utf-8", "replace").strip().splitlines()
        yield {"what": "FAILED", "why": fault, "last_line": said[-1][:200] if said else ""}


def line_of(part: str, row: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = []
    for name, value in row.items():
        if name != "what":
            is_large = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 1000
            text = f"{value:,.0f}" if is_large else f"{value:.3g}" if isinstance(value, float) else str(value)
            cells.append(f"{name.replace('_', ' ')} {text}")
    return f"{part:<12}{row['what']:<50} {'; '.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of photos of some 224 px, or a tar of them")
    parser.add_argument("--small", type=Path, help="a folder of images of 32 px, or a tar of them")
    parser.add_argument("--out", type=Path, help="folder for gpu.txt, gpu.jsonl and gpu.log")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="only these parts, and data")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts; limits of single parts are shares of it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only check that all parts run")
    options = parser.parse_args(arguments)
    started, n_failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary, "out")
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.log").write_text("", encoding="utf-8")
        given = [str(path.resolve()) if path else "" for path in (options.data, options.small)]
        job = Job(options.device, options.quick, temporary, *given)
        with (
            (out / "gpu.txt").open("w", encoding="utf-8") as table,
            (out / "gpu.jsonl").open("w", encoding="utf-8") as lines,
        ):
            parts = [name for name in PARTS if name in options.only or name == "data"]
            for part in parts:
                begun = time.monotonic()
                left = max(1.0, 60 * options.minutes - (begun - started))
                limit = left if part == parts[-1] else min(LIMITS[part] * options.minutes / 6, left)
                rows = list(run_apart(part, replace(job, seconds=limit), out / "gpu.log"))
                n_failed += any(row["what"] == "FAILED" for row in rows)
                rows.append({"what": "(whole part)", "seconds": round(time.monotonic() - begun, 1)})
                for row in rows:
                    for file, line in ((lines, json.dumps({"part": part, **row})), (table, line_of(part, row))):
                        print(line, file=file, flush=True)
                    print(line_of(part, row), flush=True)
    return n_failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))
        PARTS[sys.argv[2]](Job(**json.loads(sys.argv[3])))
    else:
        sys.exit(main())
