"""Runs from a source checkout: the package is importable, but not installed."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import deepcluster

# Both commands in one process, which proves first that no metadata of the package can be found.
COMMANDS = """
from importlib.metadata import PackageNotFoundError, version
try:
    raise SystemExit(f"deepcluster {version('deepcluster')} is installed here")
except PackageNotFoundError:
    import sys
    from deepcluster.cli import main
    sys.exit(main(["doctor"]) or main(sys.argv[1:]))
"""


def test_doctor_and_train_run_without_being_installed(images: Path, tmp_path: Path) -> None:
    """`-S` leaves out site-packages; this folder has all of it but this package."""
    site = tmp_path / "site"
    site.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "deepcluster" not in installed.name:
            (site / installed.name).symlink_to(installed)
    (site / "deepcluster").symlink_to(Path(deepcluster.__file__).parent)
    words = ["train", images, "--out", tmp_path / "run", "--epochs", "1", "--clusters", "4", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", COMMANDS, *map(str, words), "--arch", "alexnet-small", "--image-size", "16"],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"deepcluster {deepcluster.__version__}, torch" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["versions"]["deepcluster"] == deepcluster.__version__


def test_the_installed_version_is_that_of_the_package() -> None:
    assert version("deepcluster") == deepcluster.__version__
