"""The documentation site builds without a warning, and has every command, option and public name. Nothing is requested."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

import deepcluster
from deepcluster.cli import cli

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the site needs the packages of the extra docs",
)


class Anchors(HTMLParser):
    """The anchors, addresses that a page loads, and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids, self.loaded, self.text = set[str](), list[str](), ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(given.get("href", ""))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, where a network request would fail."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")


def test_every_command_and_option_is_there_with_its_help(site: Path) -> None:
    listed = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    pages: dict[str, Anchors] = {}
    for path, command in commands(cli):
        name = path.split()[0]
        page = pages.setdefault(name, Anchors(site / "reference" / "commands" / f"{name}.html"))
        assert f'href="{name}.html"' in listed
        context = click.Context(command, info_name=path)
        for option in command.params:
            record = option.get_help_record(context)
            if record is None or not isinstance(option, click.Option):
                continue
            spelled = next(one for one in option.opts if one.startswith("--"))
            assert f"{path.replace(' ', '-')}{spelled}" in page.ids, f"{path} {spelled}"
            words = " ".join(page.text.replace("`", "").split())
            for part in record:
                assert " ".join(re.sub(r"docs/([\w-]+)\.md", r"\1", part).replace("`", "").split()) in words, (
                    f"{path} {part}"
                )


def test_every_public_name_is_there_with_its_docstring(site: Path) -> None:
    page = Anchors(site / "reference" / "python.html")
    text = " ".join(page.text.split())
    for name in deepcluster.__all__:
        assert f"deepcluster.{name}" in page.ids, name
        first = (getattr(deepcluster, name).__doc__ or "").strip().split("\n\n")[0]
        plain = " ".join(re.sub(r"`", "", first).split())
        assert plain and plain in text, name
    for setting in deepcluster.Settings.__dataclass_fields__:
        assert setting in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in Anchors(page).loaded:
            assert ("//" not in address and (page.parent / address).resolve().is_file()) or page.name == "404.html", (
                f"{page}: {address}"
            )
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_search_knows_the_pages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= found and "reference/python.html" in found
    assert not any(location.startswith("source/") for location in found)
