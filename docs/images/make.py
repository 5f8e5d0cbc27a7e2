"""The README's pictures, of the report of the demo run: `make demo`, then `python docs/images/make.py`.

Needs Chromium (or its path in $CHROMIUM), and what the tests need.
"""

import io
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "runs" / "demo" / "run" / "report.html"
# What is shown, by file; the pixels of the page's header, and of a picture.
PICTURES = {"gallery": "#gallery", "map": "#map-plot"}
HEADER, HEIGHT = 120, 600


def main() -> None:
    """Write gallery.webp and map.webp beside this file."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1000}, color_scheme="light")
        page.goto(REPORT.as_uri())
        for name, selector in PICTURES.items():
            top = f"element => scrollTo(0, element.getBoundingClientRect().top + scrollY - {HEADER})"
            page.locator(selector).evaluate(top)
            page.wait_for_timeout(3_000)  # Thumbnails and dots come when they are seen.
            box = page.locator(selector).bounding_box()
            shot = page.screenshot(clip={**box, "height": min(box["height"], HEIGHT)})
            Image.open(io.BytesIO(shot)).convert("RGB").save(HERE / f"{name}.webp", quality=80, method=6)
        browser.close()


if __name__ == "__main__":
    main()
