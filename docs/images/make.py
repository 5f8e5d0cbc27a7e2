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
# What is shown, by file: the element, and how much of its height.
PICTURES = {"gallery": ("#gallery", 620), "map": ("#map-plot", 620)}


def main() -> None:
    """Write gallery.webp and map.webp beside this file."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1000}, color_scheme="light")
        page.goto(REPORT.as_uri())
        for name, (selector, most) in PICTURES.items():
            element = page.locator(selector)
            element.scroll_into_view_if_needed()
            page.wait_for_timeout(3_000)  # Thumbnails and dots come when they are seen.
            shot = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
            shot.crop((0, 0, shot.width, min(shot.height, most))).save(HERE / f"{name}.webp", quality=80, method=6)
        browser.close()


if __name__ == "__main__":
    main()
