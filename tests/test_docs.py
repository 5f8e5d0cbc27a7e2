"""The pages: every command and every line of Python on them is run, or at least checked, or says why not."""

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torchvision
from click.testing import CliRunner
from models_helper import write_classes
from snippets import PAGES, ROOT, Block, blocks, check_command, check_python, command_lines
from spoiled_images import write_good_images
from torch.distributed.run import get_args_parser

from deepcluster.cli import cli

LANGUAGES = {"bash", "python", "text", "bibtex"}
# Pages whose blocks are run in their order, and what makes their commands quick.
RUN = [ROOT / "docs" / "index.md", ROOT / "docs" / "python.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
QUICK_TRAINING = "--epochs 1 --clusters 5 --batch-size 16 --pca 8 --limit 60 --image-size 32"
ONE_PROCESS = "--device cpu --workers 0"
SMALL_NETWORK = "--arch alexnet-small"
# Pages whose Python other tests run.
PYTHON_ELSEWHERE = {
    "README.md": "test_readme.py",
    "browsing.md": "test_browsing.py",
    "clustering.md": "test_readme.py",
    "migrating.md": "test_release2018_main.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_python_of_a_page_exist(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language not in LANGUAGES:
            wrong.append(f"{block}: a block in {block.language or 'no language'}; one of {', '.join(sorted(LANGUAGES))}")
        elif block.language == "python":
            wrong += [f"{block}: {fault}" for fault in [check_python(block.text)] if fault]
        elif block.language == "bash":
            for words in command_lines(block.text):
                wrong += [f"{block}: {fault}: {' '.join(words)}" for fault in [check_command(words)] if fault]
        elif any(line.startswith("deepcluster ") for line in block.text.splitlines()):
            wrong.append(f"{block}: a command in a block of text")
    assert not wrong, "\n".join(wrong)


def options_of(group: click.Group) -> Iterator[str]:
    for command in group.commands.values():
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        if isinstance(command, click.Group):
            yield from options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_names_exist(page: Path) -> None:
    """Options in the text, between backticks: ours, or those of the programs that a page is about."""
    if page.name in ("migrating.md", "benchmarks.md"):
        pytest.skip("it names the options of many programs")
    others = {"--help", "--version", "--force-directories", "--signal"}
    launcher = {option for action in get_args_parser()._actions for option in action.option_strings}
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= {*options_of(cli), *launcher, *others}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_mean_the_same_on_the_site(page: Path) -> None:
    """The site's Markdown nests by four spaces, GitHub's by two; a list or table needs an empty line before it."""
    lines, in_code = page.read_text(encoding="utf-8").splitlines(), False
    for number, (before, line) in enumerate(pairwise(lines), 2):
        where = f"{page.name}:{number}: {line}"
        in_code ^= line.lstrip().startswith("```")
        if in_code and not line.lstrip().startswith("```"):
            continue
        assert not re.match(r" {1,3}(```|[-*] |\d+\. |\|)", line), where
        assert not re.match(r" {1,3}\S", line) or before.strip(), where
        if re.match(r"([-*] |\|)", line) and before.strip():
            # A further paragraph of an item ends by an empty line.
            paragraph = "\n".join(lines[: number - 1]).rpartition("\n\n")[2]
            assert re.match(r"([-*] |\d+\. |\|| )", before) and not paragraph.startswith(" "), where


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and weights of which the tutorials speak, small."""
    folder = tmp_path_factory.mktemp("tutorials")
    write_good_images(folder / "photos", 40, size=(36, 32))
    shutil.copy(sorted((folder / "photos").glob("*.png"))[0], folder / "photos" / "0003.png")
    write_good_images(folder / "new-photos", 3, size=(36, 32))
    write_classes(folder / "labelled" / "train", 4)
    write_classes(folder / "labelled" / "val", 2, seed=1)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    return folder


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_tutorial_run(page: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, in their order. Commands that install or use several machines are only checked, by the test above."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language == "python":
            run_python(block, names)
        for words in command_lines(block.text) if block.language == "bash" else []:
            if command := quick(words):
                result = CliRunner().invoke(cli, command)
                assert result.exit_code == 0, f"{block}: {' '.join(words)}\n{result.output}\n{result.exception}"


def run_python(block: Block, names: dict[str, Any]) -> None:
    small = ["epochs=1", "clusters=5", "batch_size=16", "arch='alexnet-small'", "image_size=32", "pca=8"]
    given = re.findall(r"\b(?!epochs)(\w+)=", "".join(re.findall(r"deepcluster\.train\(([^)]*)", block.text)))
    quick = ", ".join(one for one in small if one.split("=")[0] not in given)
    code = re.sub(r"epochs=\d+", quick, block.text.replace("range(10)", "range(1)").replace("count=100", "count=10"))
    if "epochs=" not in code:
        code = code.replace('deepcluster.train("photos",', f'deepcluster.train("photos", overwrite=True, {quick},')
    exec(compile(code, str(block), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On finished runs, `run` and in `runs`, of the images `photos`."""
    code = [block for block in blocks(page) if block.language == "python" and block.not_run is None]
    if page.name in PYTHON_ELSEWHERE:
        test = Path(__file__).with_name(PYTHON_ELSEWHERE[page.name])
        assert code and page.name in test.read_text(encoding="utf-8")
        return
    if code:
        for name in ("photos", "new-photos"):
            shutil.copytree(images, tmp_path / name)
        shutil.copy(next(images.glob("*.jpg")), tmp_path / "new.jpg")
        for name in ("run", "runs/photos", "runs/one", "runs/two"):
            shutil.copytree(trained, tmp_path / name)
        monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code:
        run_python(block, names)


def quick(words: list[str]) -> list[str] | None:
    """Return a command as it is run here: small and in one process; None if it is not run."""
    if words[0] not in ("deepcluster", "torchrun") or "--nnodes" in words or words[1:] == ["doctor"]:
        return None  # tests/test_api.py runs `doctor`, which takes ten seconds.
    arguments = words[1:] if words[0] == "deepcluster" else words[words.index("deepcluster") + 1 :]
    arguments = [word for word in arguments if word != "--open"]
    if arguments[0] == "train":
        return [
            *arguments,
            *QUICK_TRAINING.split(),
            *([] if "--arch" in arguments else SMALL_NETWORK.split()),
            *ONE_PROCESS.split(),
        ]
    of_one = arguments[0] in ("assign", "embed", "cluster", "similar", "report", "evaluate") and arguments[1] != "compare"
    return [*arguments, *ONE_PROCESS.split()] if of_one else arguments
