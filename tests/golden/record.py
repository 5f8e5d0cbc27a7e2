"""Golden runs: record what the program does with small real images, or compare it with what was recorded.

`python tests/golden/record.py [NAME...]` rewrites the records. With `--check` it writes nothing, prints every difference and
exits with 1 if there are any. A refactoring keeps the records: where it renames an option, edit the tables below.
"""

import argparse
import difflib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
from click.testing import CliRunner
from golden.describe import NOT_RECORDED, describe_file, describe_table, differences, digest, without_changing
from PIL import Image
from ranks_helper import V2, run_job, run_jobs
from sklearn.datasets import load_digits, load_sample_images
from small_runs import checkpoint, metrics
from test_retrieval import write_others, write_oxford
from threadpoolctl import threadpool_limits
from vocs import write_voc

import deepcluster
from deepcluster.cli import cli

RECORDS = Path(__file__).parent / "records"

# Training runs: the data set, and the settings on top of `small_runs.SMALL`.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "kmeans": ("digits/train", {"recipe": "auto", "clusters": 10}),
    "balanced": ("digits/train", {"clustering": "balanced", "clusters": 10, "lr": 0.05}),
    "pic": ("photos", {"clustering": "pic", "image_size": 32, "sobel": False}),
    "super-clusters": (
        "photos",
        {"clustering": "hierarchical", "super_clusters": 2, "rotations": True, "clusters": 8, "image_size": 32},
    ),
    "v2": ("photos", {**V2, "image_size": 24, "crops": "2x24,2x16"}),
    "v2-feature-pass": ("photos", {**V2, "look_again": True, "whiten": True, "pca": 6}),
}
# When a run is stopped: the kind of work whose n-th progress report stops it, or the beginning of the log line that does.
STOPS = {"in an epoch": ("epoch 2", 3), "between epochs": ("say epoch 1/", 1)}
# In the log of every resumed run.
RESUMED = "resuming with epoch 2"

# Commands, each on a copy of a run; recorded is what they write into {out} or, where they write nothing, what they print.
COMMANDS: dict[str, tuple[str, str]] = {
    "linear": ("v2", "evaluate linear {run} --data {digits} --out {out} --epochs 2"),
    "linear-fast": ("kmeans", "evaluate linear {run} --data {digits} --out {out} --fast"),
    "knn": ("kmeans", "evaluate knn {run} --data {digits} --out {out} --stages all"),
    "clusters": ("kmeans", "evaluate clusters {run} --data {digits} --out {out}"),
    "voc07-classification": ("v2", "evaluate voc07-classification {run} --data {voc} --out {out} --iterations 6"),
    "voc07-svm": ("v2", "evaluate voc07-svm {run} --data {voc} --out {out} --stages conv3,conv5 --low-shot"),
    "semi-supervised": (
        "kmeans",
        "evaluate semi-supervised {run} --data {digits} --out {out} --labels 0.2,0.5 --epochs 2 --min-steps 4"
        " --trunk-lr 0.01 --head-lr-factor 1,10",
    ),
    "retrieval": (
        "v2",
        "evaluate retrieval {run} --data {buildings} --out {out} --whiten-on {others} --size 64 --pca 8 --query-expansion 1",
    ),
    "embed": ("v2", "embed {run} {photos} --out {out}/embeddings.parquet"),
    "embed-stage": ("v2", "embed {run} {photos} --out {out}/conv3.npy --stage conv3 --limit 30"),
    "assign": ("kmeans", "assign {run} {digits} --out {out}/clusters.parquet --folders {out}/folders --limit 40"),
    "assign-v2": ("v2", "assign {run} {photos} --out {out}/clusters.parquet"),
    "info": ("kmeans", "info {run}"),
    "info-v2": ("v2", "info {run}"),
    "info-checkpoint": ("v2", "info {run}/checkpoints/last.pt"),
    "info-data": ("v2", "info {photos}"),
    "report": ("kmeans", "report {run} --out {out}/page.html"),
    "report-v2": ("v2", "report {run} --out {out}/page.html"),
    "filters": ("v2", "visualize filters {run} --out {out} --stage conv2,conv5 --channels 0-3 --steps 6"),
    "top-images": ("v2", "visualize top-images {run} --data {photos} --out {out} --stage conv3 --channels 0-3 --count 3"),
}
# Run before the command on the same copy of the run.
FIRST = {"report": "evaluate knn {run} --data {digits}"}
# Given to every command but info.
MACHINE = "--device cpu --workers 1"
HELP_WIDTH = 100

# Data


def write_data(work: Path) -> None:
    """Write digits in 10 classes, tiles of two photos in 2, a VOC devkit and buildings with their queries."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:240], digits.target[:240], strict=True)):
        split = "train" if number < 180 else "val"
        save_image(work / "digits" / split / str(label) / f"{number:04d}.png", (pixels * (255 / 16)).astype(np.uint8))
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(60):
            top, left = 40 * (number // 10), 60 * (number % 10)
            save_image(work / "photos" / name / f"{number:02d}.jpg", photo[top : top + 40, left : left + 60])
    shown = (["cat"], ["dog"], ["bird"], ["cat", "dog"], ["dog", "!bird"], [])
    splits = {split: {f"{split}{n:02}": shown[n % 6] for n in range(18)} for split in ("trainval", "test")}
    write_voc(work / "voc", splits)
    write_oxford(work / "buildings")
    write_others(work / "others")


def save_image(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))


# Runs


def run_of(name: str, work: Path) -> Path:
    """Return the uninterrupted run of one process; train it at the first call."""
    run = work / "runs" / name
    if not run.exists():
        run_job(job(name, work, run))
    return run


def job(name: str, work: Path, out: Path, **more: Any) -> dict[str, Any]:
    data, options = RUNS[name]
    return {"data": work / data, "out": out, "options": options, **more}


def record_run(name: str, work: Path) -> dict[str, Any]:
    """Record a run of one process and one of two, and how each differs from the same run stopped and resumed: in nothing."""
    run, folder = run_of(name, work), work / "stopped" / name
    whole, resumed = describe_run(run), {}
    for place, stop in STOPS.items():
        run_job(job(name, work, folder / place, stop=stop))
        run_job(job(name, work, folder / place, resume=True))
        resumed[place] = differences(whole, describe_resumed(folder / place))
    one, two = folder / "two processes", folder / "two processes, stopped"
    first = [job(name, work, one), job(name, work, two, stop=STOPS["in an epoch"])]
    run_jobs(2, folder / "store", [*first, job(name, work, two, resume=True)])
    parallel = describe_run(one)
    resumed["two processes"] = differences(parallel, describe_resumed(two))
    return {
        "settings": json.loads((run / "config.json").read_text())["settings"],
        "one process": whole,
        "two processes": parallel,
        "differences when resumed": resumed,
    }


def describe_resumed(run: Path) -> dict[str, Any]:
    if RESUMED not in (run / "train.log").read_text():
        raise RuntimeError(f"{run} was not stopped and resumed: see STOPS and RESUMED")
    return describe_run(run)


def describe_run(run: Path) -> dict[str, Any]:
    """Return digests of weights, checkpoint and assignments, and the metrics themselves."""
    state = checkpoint(run)
    files = sorted((run / "checkpoints").glob("rows-*")) if "files" in state["rows"] else []
    of_ranks = [torch.load(path, weights_only=True) for path in files] or [state]
    return {
        "trunk": digest(deepcluster.load(run).trunk.state_dict()),
        "checkpoint": {name: digest(value) for name, value in state.items() if name not in NOT_RECORDED},
        "rows": {name: digest(together([each["rows"][name] for each in of_ranks])) for name in of_ranks[0]["rows"]},
        "assignments": {path.stem: describe_table(path) for path in sorted((run / "assignments").iterdir())},
        "metrics": without_changing(metrics(run), run),
    }


def together(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return rows of all ranks in the order of images, whichever rank has kept them."""
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = np.lexsort([rows[key].numpy() for key in ("positions", "indices") if key in rows])
    return {key: values[torch.from_numpy(order)] for key, values in rows.items()}


# Commands


def record_command(name: str, work: Path) -> dict[str, Any]:
    """Record what a command writes or, where it writes nothing, what it prints."""
    base, line = COMMANDS[name]
    here = work / "commands" / name
    run, out = Path(shutil.copytree(run_of(base, work), here / "run")), here / "out"
    out.mkdir()
    places = {"run": run, "out": out, **{data: work / data for data in ("digits", "photos", "voc", "buildings", "others")}}
    for one in filter(None, (FIRST.get(name), line)):
        machine = "" if one.startswith("info") else MACHINE
        printed = invoke(*(word.format(**places) for word in f"{one} {machine}".split()))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    if not files:
        return {"printed": without_changing(printed, work)}
    found = {str(path.relative_to(out)): without_changing(describe_file(path), work) for path in files}
    digests = {name: value for name, value in found.items() if Path(name).suffix not in (".json", ".html")}
    whole = {name: value for name, value in found.items() if name not in digests}
    return {**whole, **({"files": digests} if digests else {})}


def invoke(*words: str) -> str:
    """Run a command in this process and return what it prints."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False, terminal_width=HELP_WIDTH)
    if result.exit_code:
        raise RuntimeError(f"{' '.join(words)} ended with {result.exit_code}: {result.output}")
    return result.stdout


def record_help(name: str, work: Path) -> dict[str, str]:
    """Record the help of every command."""

    def walk(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, one in command.commands.items() if isinstance(command, click.Group) else ():
            yield from walk(one, (*words, name))

    return {"-".join(("deepcluster", *words)): invoke(*words, "--help") for words in walk(cli, ())}


# Records

Recorder = Callable[[str, Path], dict[str, Any]]
GOLDEN: dict[str, Recorder] = {
    **dict.fromkeys(RUNS, record_run),
    "help": record_help,
    **dict.fromkeys(COMMANDS, record_command),
}


def make_record(name: str, work: Path) -> dict[str, str]:
    """Make the record of a golden run, on one thread: the text of each of its files, by name."""
    torch.set_num_threads(1)
    if not (work / "digits").exists():
        write_data(work)
    with threadpool_limits(1):
        content = GOLDEN[name](name, work)
    content = {"run": content} if name in RUNS else content
    return {
        f"{Path(file).with_suffix('')}.{'txt' if isinstance(value, str) else 'json'}".replace("/", "-"): (
            value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
        )
        for file, value in content.items()
    }


def environment() -> dict[str, str]:
    """Return what the numbers depend on besides the program."""
    packages = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "simplejpeg", "click")
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "python": platform.python_version(), **{name: version(name) for name in packages}}


def other_environment() -> list[str]:
    """Describe how this environment differs from the one that the records were made in."""
    recorded = json.loads((RECORDS / "environment.json").read_text())
    return [
        f"{name}: recorded with {recorded[name]}, here {now}" for name, now in environment().items() if now != recorded[name]
    ]


def write_record(name: str, made: Mapping[str, str]) -> None:
    shutil.rmtree(RECORDS / name, ignore_errors=True)
    (RECORDS / name).mkdir(parents=True)
    for file, text in made.items():
        (RECORDS / name / file).write_text(text, encoding="utf-8")
    (RECORDS / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def compare_record(name: str, made: Mapping[str, str]) -> list[str]:
    """Return every difference between the record of a golden run and what was made now."""
    recorded = {path.name: path.read_text(encoding="utf-8") for path in (RECORDS / name).glob("*")}
    found = [f"{name}/{file}: no longer there" for file in recorded.keys() - made.keys()]
    found += [f"{name}/{file}: not recorded" for file in made.keys() - recorded.keys()]
    for file in sorted(recorded.keys() & made.keys()):
        old, new = recorded[file], made[file]
        if file.endswith(".json"):
            lines = differences(json.loads(old), json.loads(new))
        else:
            lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
        found += [f"{name}/{file}: {line}" for line in lines]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"golden runs (default: all): {', '.join(GOLDEN)}")
    parser.add_argument("--check", action="store_true", help="compare with the records; write nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - GOLDEN.keys()
    if unknown:
        parser.error(f"no golden runs: {', '.join(sorted(unknown))}")
    if arguments.check and other_environment():
        sys.exit("the records can't be compared here: " + "; ".join(other_environment()))
    found = 0
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        os.environ["DEEPCLUSTER_CACHE"] = str(Path(folder) / "cache")
        for name in arguments.names or GOLDEN:
            made = make_record(name, Path(folder))
            lines = compare_record(name, made) if arguments.check else write_record(name, made) or []
            print("\n".join(lines or [f"{name}: {'as recorded' if arguments.check else 'recorded'}"]), flush=True)
            found += len(lines)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
