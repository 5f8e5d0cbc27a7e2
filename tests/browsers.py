"""A real browser for tests of the page; they are skipped, and say why, where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A sandbox and a GPU are not to be had in a container; nothing is asked of the network.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


def find_chromium(own: str = "") -> str | None:
    """Path of a Chromium: $CHROMIUM, one on the PATH, or `own` (Playwright's) where it is installed."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (own if own and Path(own).is_file() else None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A `playwright.sync_api.Browser`; one at a time."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright to drive a browser: pip install playwright")
    with api.sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium is installed: set CHROMIUM=PATH, or run: playwright install chromium")
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        except api.Error as fault:
            pytest.skip(f"{path} does not start: {fault}")
        yield browser
        browser.close()


class Visit:
    """A page in a window of its own, and what went wrong in it: console messages, exceptions, failed or outside requests.

    Attributes:
        page: `playwright.sync_api.Page`.
        complaints: what was said, in order.
    """

    def __init__(self, browser: Any, address: str, *, width: int = 1440, height: int = 900, **context: Any) -> None:
        self.complaints: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda fault: self.complaints.append(f"exception: {fault}"))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url[:200]}"))
        self.page.on("request", self._note_outside)
        self.page.goto(address)

    def _note_outside(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked for {request.url[:200]}")

    def close(self) -> None:
        self.page.context.close()
