"""The pictures of README and documentation, of the report of the demo run: `make demo`, then `python docs/images/make.py`.

Needs Chromium (or its path in $CHROMIUM), and what the tests need. Another report may be named as the argument.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "runs" / "demo" / "run" / "report.html"
# What is shown, by file, and at most how much of it; the pixels of the page's header.
PICTURES = {"gallery": ("#gallery", 600), "map": ("#map-plot", 600), "how-it-works": ("#method-step-1", 1100)}
HEADER = 120


def main(report: Path) -> None:
    """Write a .webp file per picture beside this file."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1300}, color_scheme="light")
        page.goto(report.absolute().as_uri())
        for name, (selector, height) in PICTURES.items():
            top = f"element => scrollTo(0, element.getBoundingClientRect().top + scrollY - {HEADER})"
            page.locator(selector).evaluate(top)
            page.wait_for_timeout(3_000)  # Thumbnails and dots come when they are seen.
            page.locator(selector).evaluate(top)
            page.wait_for_timeout(1_000)
            box = page.locator(selector).bounding_box()
            shot = page.screenshot(clip={**box, "height": min(box["height"], height)})
            Image.open(io.BytesIO(shot)).convert("RGB").save(HERE / f"{name}.webp", quality=80, method=6)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPORT)
