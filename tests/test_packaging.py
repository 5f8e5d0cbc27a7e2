"""The wheel and the sdist: what is in them, what they say, and that they install and run."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import deepcluster

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CODE = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "deepcluster").rglob("*") if path.is_file()}
CODE = {name for name in CODE if "__pycache__" not in name}


def run(*words: object, folder: Path, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    result = subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False, env={**clean, **variables}
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist: `$DIST`, or made here, the wheel from the sdist."""
    if "DIST" in os.environ:
        return ROOT / os.environ["DIST"]
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert f"\nversion: {deepcluster.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {deepcluster.__version__} " in changes


def test_extras_are_in_all_or_said_to_be_left_out() -> None:
    """`all` has what needs no account of a service; `docs` and `dev` are for work on the project."""
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = everything.removeprefix("deepcluster[").removesuffix("]").split(",")
    assert named == sorted(named)
    assert {*named, "all", "docs", "dev", "s3", "gcs", "hf"} == extras.keys()


def test_the_command_ends_without_a_traceback_while_it_is_imported() -> None:
    """Its entry point answers Ctrl-C as the system does until `main` takes over."""
    assert PROJECT["scripts"]["deepcluster"] == "deepcluster.__main__:main"
    code = "import deepcluster.__main__, signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout == "True\n"


@pytest.mark.slow
def test_the_wheel_holds_the_code_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        names = set(wheel.namelist())
        text = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == CODE
    about = Parser().parsestr(text)
    assert about["Version"] == deepcluster.__version__
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert set(about.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    assert about.get_all("Classifier") == PROJECT["classifiers"]
    assert "make demo" in about.get_payload()


@pytest.mark.slow
def test_the_sdist_holds_what_tests_and_docs_need(dist: Path) -> None:
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"src/{name}" for name in CODE} <= names
    needed = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "tests/test_packaging.py",
        "docs/method.md",
    }
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.slow
def test_the_wheel_installs_and_runs_the_demo_in_a_fresh_environment(dist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "fresh", folder=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    wheel = only(dist, "*.whl")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[report]", folder=tmp_path)
    where = run(python, "-c", "import deepcluster; print(deepcluster.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "fresh")
    run(tmp_path / "fresh" / "bin" / "deepcluster", "demo", folder=tmp_path)
    for name in ("report.html", "config.json", "checkpoints/last.pt"):
        assert (tmp_path / "runs" / "demo" / "run" / name).is_file()
