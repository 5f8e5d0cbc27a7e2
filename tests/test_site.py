"""The documentation site builds without a warning, and has every command, option and public name.

All links and pictures of its pages are there; it opens from disk, and requests nothing.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from browsers import Visit, chromium

import deepcluster
from deepcluster.cli import cli

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the site needs the packages of the extra docs",
)


class Anchors(HTMLParser):
    """The anchors, links, addresses that a page loads, and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loaded, self.text = set[str](), set[str](), list[str](), ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
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


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Anchors]:
    """Every page of the site. The page for a wrong address has links that depend on the server."""
    return {page: Anchors(page) for page in site.rglob("*.html") if page.name != "404.html"}


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")


def test_every_command_and_option_is_there_with_its_help(site: Path, pages: dict[Path, Anchors]) -> None:
    folder = site / "reference" / "commands"
    words = {path: " ".join(page.text.replace("`", "").split()) for path, page in pages.items() if path.parent == folder}
    assert {path.stem for path in words} == {*cli.commands, "index"}
    assert {f"{name}.html" for name in cli.commands} <= pages[folder / "index.html"].links
    for path, command in commands(cli):
        page = folder / f"{path.split()[0]}.html"
        for option in command.params:
            record = option.get_help_record(click.Context(command, info_name=path))
            if record is None or not isinstance(option, click.Option):
                continue
            spelled = next(one for one in option.opts if one.startswith("--"))
            assert f"{path.replace(' ', '-')}{spelled}" in pages[page].ids, f"{path} {spelled}"
            for part in record:
                assert plain(part) in words[page], f"{path} {part}"


def plain(text: str) -> str:
    return " ".join(re.sub(r"docs/([\w-]+)\.md", r"\1", text).replace("`", "").split())


def test_every_public_name_is_there_with_its_docstring(site: Path, pages: dict[Path, Anchors]) -> None:
    page = pages[site / "reference" / "python.html"]
    text = " ".join(page.text.split())
    for name in deepcluster.__all__:
        assert f"deepcluster.{name}" in page.ids, name
        first = plain((getattr(deepcluster, name).__doc__ or "").strip().split("\n\n")[0])
        assert first and first in text, name
    for setting in fields(deepcluster.Settings):
        assert setting.name in text, setting.name


def test_links_and_anchors_lead_somewhere(pages: dict[Path, Anchors]) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme in ("http", "https", "mailto"):
                continue
            there = (path.parent / unquote(address.path)).resolve() if address.path else path
            anchors = pages[there].ids if there in pages else set()
            if not there.is_file() or (address.fragment and unquote(address.fragment) not in anchors):
                dead.append(f"{path}: {link}")
    assert not dead, "\n".join(dead)


def test_pages_load_only_files_of_the_site(site: Path, pages: dict[Path, Anchors]) -> None:
    for path, page in pages.items():
        for address in page.loaded:
            assert "//" not in address and (path.parent / address).resolve().is_file(), f"{path}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_search_knows_the_pages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    sources = {page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sources <= found and "reference/python.html" in found
    assert not any(location.startswith("source/") for location in found)


WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"


@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.slow)])
def test_pages_open_from_disk_and_fit_a_phone(share: float, site: Path, pages: dict[Path, Anchors]) -> None:
    """No page scrolls sideways, lacks a picture, prints an error or requests anything but files."""
    mine = sorted(path for path in pages if not path.is_relative_to(site / "source"))
    with chromium() as browser:
        visit = Visit(browser, (site / "index.html").as_uri(), width=390)
        for path in mine[:: round(1 / share)]:
            visit.page.goto(path.as_uri())
            assert visit.page.evaluate(WIDE) <= 0, path
            assert visit.page.evaluate(BROKEN) == [], path
        # A request that the next page ended; the test above looks for the file.
        assert [one for one in visit.complaints if not one.startswith("failed: file:")] == []


def test_search_works_from_disk(site: Path) -> None:
    with chromium() as browser:
        visit = Visit(browser, (site / "index.html").as_uri())
        visit.page.click(".md-search__input")
        visit.page.keyboard.type("whitening")
        visit.page.wait_for_selector(".md-search-result__link")
        assert visit.complaints == []
