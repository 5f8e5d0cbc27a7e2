"""The dense protocols on small sets: a trained trunk beside the same one with random weights, seconds a step and memory.

    python benchmarks/dense.py RUN --voc voc-from-coco --boxes voc2012-mini --coco coco-mini [--seeds 3] [--only NAMES]

RUN is a run folder. Runs `deepcluster evaluate PROTOCOL RUN` and `... untrained:RUN` for each protocol and data set, with
`--quick` and each seed, one after the other, and prints a Markdown table: the headline of both (mean and deviation over the
seeds), seconds a step, the whole command's wall and CPU seconds, and the largest memory of a process (of its own and of its
workers). Options after `--` are given to every command, such as `-- --device cpu`.

The sets are so small that the table shows that everything runs, and whether a trained trunk is worse; nothing else.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FROZEN = ("segmentation-linear", "segmentation-knn", "segmentation-clusters")
ON_MASKS = (*FROZEN, "voc12-segmentation")
ON_BOXES = ("voc07-detection", "voc0712-detection")


@dataclass
class Measured:
    """What one command did: its headline, and its costs."""

    headline: str
    value: float
    step_seconds: float
    wall: float
    cpu: float
    megabytes: float


def measure(protocol: str, model: str, data: Path, seed: int, more: list[str]) -> Measured:
    """Run one command and return what it printed and used."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        words = [protocol, model, "--data", str(data), "--quick", "--out", str(out), "--seed", str(seed), *more]
        environment = {**os.environ, "DEEPCLUSTER_CACHE": folder}
        started, moments = time.perf_counter(), list[tuple[float, int]]()
        process = subprocess.Popen(
            [sys.executable, "-m", "deepcluster", "evaluate", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if found := re.match(r"step ([\d,]+)/", line):
                moments.append((time.perf_counter(), int(found[1].replace(",", ""))))
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit("".join(lines[-20:]))
        content = json.loads(out.read_text())
        value: object = content["results"]
        for name in content["headline"]:
            value = value[name]  # type: ignore[index]
        step = float("nan")
        if len(moments) > 1:
            step = (moments[-1][0] - moments[0][0]) / (moments[-1][1] - moments[0][1])
        seconds, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        return Measured(" ".join(content["headline"]), float(value), step, seconds, cpu, usage.ru_maxrss / 1e3)  # type: ignore[arg-type]


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Yield each protocol with each data set that it can use."""
    by_protocol = {
        **{protocol: [arguments.voc, arguments.coco] for protocol in FROZEN},
        "voc12-segmentation": [arguments.voc],
        "cityscapes-segmentation": [arguments.cityscapes],
        **{protocol: [arguments.voc, arguments.boxes] for protocol in ON_BOXES},
        "coco-detection": [arguments.coco],
    }
    only = arguments.only.split(",") if arguments.only else by_protocol
    for protocol in only:
        yield from ((protocol, data) for data in by_protocol[protocol] if data is not None)


def spread(values: list[float]) -> str:
    """Return mean and deviation, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name in ("voc", "boxes", "coco", "cityscapes"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="protocols, separated by commas")
    words = sys.argv[1:]
    ours = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:ours])
    more = words[ours + 1 :]
    print("| protocol | data | measure | trained | untrained | s/step | wall s | CPU s | MB |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for protocol, data in jobs(arguments):
        models = (str(arguments.run), f"untrained:{arguments.run}")
        seeds = range(31, 31 + arguments.seeds)
        trained, untrained = ([measure(protocol, one, data, seed, more) for seed in seeds] for one in models)
        every = trained + untrained
        costs = (
            f"{statistics.median(one.step_seconds for one in every):.2f}",
            *(f"{statistics.median(getattr(one, name) for one in every):,.0f}" for name in ("wall", "cpu", "megabytes")),
        )
        values = (spread([one.value for one in some]) for some in (trained, untrained))
        print(f"| {' | '.join([protocol, data.resolve().name, trained[0].headline, *values, *costs])} |", flush=True)


if __name__ == "__main__":
    main()
