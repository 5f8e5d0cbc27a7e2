"""The benchmarks of a GPU, which few machines have, run on a CPU as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu import PARTS
from gpu_checks import outcomes
from gpu_parts import Job, epoch_settings

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    # As on a machine where the package is not installed: the script finds it beside itself.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_settings_of_whole_epochs_are_valid() -> None:
    for quick in (False, True):
        for name in ("alexnet", "cifar", "resnet50"):
            settings, n_images = epoch_settings(name, Job("cpu", quick, ""))
            assert max(settings.heads) < n_images
            assert (settings.method == "deepcluster") == (name == "alexnet")


@pytest.mark.slow
def test_every_part_has_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--minutes", "60", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    for part in PARTS:
        # The last row gives the seconds of the whole part.
        assert len([row for row in rows if row["part"] == part]) >= 2, part
        assert any(line.startswith(part) for line in done.stdout.splitlines()), part
    assert (tmp_path / "gpu.txt").read_text() == done.stdout


@pytest.mark.slow
def test_a_part_that_fails_or_is_too_slow_leaves_the_others(tmp_path: Path) -> None:
    done = run("--only", "environment,views", "--data", str(tmp_path / "missing"), "--minutes", "60", "--out", str(tmp_path))
    assert done.returncode == 2  # data, and views, which needs it
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows if row["what"] == "FAILED"} == {"data", "views"}
    assert any(row["part"] == "environment" and row["what"] == "cores" for row in rows)
    done = run("--only", "environment", "--minutes", "0.02", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.count("stopped after its") == 2
