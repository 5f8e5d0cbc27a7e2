"""The benchmarks of a GPU, which few machines have, run on a CPU as well."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu import LIMITS, PARTS, line_of
from gpu_checks import outcomes
from gpu_checks import run as run_command
from gpu_parts import Job, epoch_settings, make_images
from recipes import HELD_OUT, split

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


def rows_of(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"what"')]


def test_the_cheap_parts_have_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process; the slow tests run all parts as the script does."""
    job = Job("cpu", True, str(tmp_path))
    make_images(tmp_path / "small", 60, 32)
    for part, least in (("clustering", 12), ("minutes", 2)):
        PARTS[part](job)
        rows = rows_of(capsys.readouterr().out)
        assert len(rows) >= least
        assert all(line_of(part, row).startswith(part) for row in rows)
    assert all(row["evaluation_s"] > 0 and 0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 for row in rows)
    # A slow machine passes several moments in its first epoch; the last one is always reached.
    assert float(rows[-1]["what"].split()[1]) >= 2
    assert rows[-1]["epochs"] > 0


def test_every_part_has_a_time_limit_and_together_they_have_more_than_there_is() -> None:
    assert list(LIMITS) == list(PARTS)
    assert sum(LIMITS.values()) > 6 * 60


def test_a_tenth_of_each_class_is_held_out(tmp_path: Path) -> None:
    make_images(tmp_path / "all", 100, 8)
    known, held = split(tmp_path / "all", 100, tmp_path)
    names = [{path.relative_to(folder) for path in folder.glob("*/*")} for folder in (known, held)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 100
    for number in range(4):
        count = len(list((held / f"class{number}").iterdir()))
        assert count == -(-25 // HELD_OUT)


def test_tests_are_counted_and_every_failure_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_bad(n): assert not n\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    results = tmp_path / "results.xml"
    words = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}", str(tmp_path / "test_some.py")]
    state, seconds, last = run_command(words, Job("cpu", True, str(tmp_path)), time.monotonic() + 60)
    assert state == "failed, status 1" and seconds > 0 and "2 failed, 1 passed, 1 skipped, 1 error" in last
    assert [(kind, name.rpartition("::")[2]) for kind, name in outcomes(results)] == [
        ("passed", "test_good"),
        ("failed", "test_bad[1]"),
        ("failed", "test_bad[2]"),
        ("failed", "test_error"),
        ("skipped", "test_skipped"),
    ]
    assert list(outcomes(tmp_path / "missing.xml")) == []


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
    smoke = {row["what"]: row["state"] for row in rows if row["part"] == "smoke" and "state" in row}
    assert len(smoke) == 11 and set(smoke.values()) == {"ok"}


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
