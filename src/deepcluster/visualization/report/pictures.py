"""The section of filters and top images, where `deepcluster visualize` made them, small enough for the page."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepcluster.visualization.report.page import Section, render, shown

MOST_BYTES: Final = 2_000_000  # Of all pictures together, as they are in the page.
# What the folder holds, by the names of its folders: the JSON file of each stage, a title, the pictures to show, a caption.
KINDS: Final = {
    "filters": (
        "filters.json",
        "Filters of",
        "grid",
        "Each picture was found by gradient ascent: it excites one filter, whose number is below it.",
    ),
    "top-images": (
        "top-images.json",
        "Images that excite",
        "pairs",
        "For each filter the images of the data set that excite it most, and the place that does.",
    ),
}
# Width in pixels and quality, tried in this order until a picture fits.
SIZES: Final = ((1_200, 82), (1_200, 70), (1_000, 70), (1_000, 55), (800, 55), (600, 50), (400, 45))
# What a caption says of the JSON files, where they have it.
NAMED: Final = {
    "objective": "Made with --objective {}.",
    "data": "Searched: {}.",
    "count": "Images per filter: {}.",
}
MOST_PIXELS: Final = 400_000_000  # A larger picture was not made by this program.


@dataclass(frozen=True)
class Picture:
    """A grid of pictures that was found (PNG): what it shows, and how it was made."""

    path: Path
    title: str
    caption: str


def pictures_section(folder: Path, *, max_bytes: int = MOST_BYTES, run: str = "RUN") -> Section:
    """Return the section; where nothing was made, the commands that make it.

    Args:
        folder: with `filters/STAGE/grid.png` and `top-images/STAGE/pairs-1.png` and so on, or not there.
        max_bytes: most bytes of all pictures together, as they are in the page. What does not fit is named.
        run: the run folder, as the user would type it.
    """
    found, left = find_pictures(folder), max_bytes
    rows = []
    for number, picture in enumerate(found):
        place = f"{folder.name}/{picture.path.relative_to(folder).as_posix()}"  # In the run folder, wherever the page is.
        packed = _pack(picture.path, left // (len(found) - number))
        if packed is not None:
            left -= len(packed["uri"])
        rows.append({"title": picture.title, "caption": picture.caption, "path": shown(place), "image": packed})
    html = render("pictures.html.jinja", pictures=rows, run=shown(run))
    return Section("filters", "Filters and top images", html)


def find_pictures(folder: Path) -> list[Picture]:
    """Return the first page of each kind: filters first, stages in their order (conv2 before conv10)."""
    found = []
    for kind, (file, title, name, words) in KINDS.items():
        for place in sorted((folder / kind).glob("*/"), key=lambda path: _in_order(path.name)):
            about = read_json(place / file)
            pages = sorted(place.glob(f"{name}*.png"), key=lambda path: _in_order(path.stem))
            if pages:
                part = f" (page 1 of {len(pages)})" if len(pages) > 1 else ""
                known = {fact: value for fact in NAMED if isinstance(value := about.get(fact), str | int | float)}
                if "data" in known:  # Its name: its place on this machine is of no use to others.
                    known["data"] = str(known["data"]).rstrip("/").rpartition("/")[2]
                caption = " ".join([words, *(NAMED[fact].format(value) for fact, value in known.items())])
                found.append(Picture(pages[0], shown(f"{title} {about.get('stage') or place.name}{part}"), shown(caption)))
    return found


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file says; nothing where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_list(path: Path) -> list[dict[str, Any]]:
    """Return the objects that a file lists; none where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _pack(path: Path, max_bytes: int) -> dict[str, Any] | None:
    """Return the picture as WebP in a data address of at most `max_bytes`, as large as fits; None where none does."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None
            original = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    for width, quality in SIZES:
        # No longer than what WebP can hold (16,383 pixels).
        scale = min(1.0, width / original.width, 16_000 / original.height)
        size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
        smaller = original if scale == 1.0 else original.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        file = io.BytesIO()
        smaller.save(file, "WEBP", quality=quality, method=4)
        uri = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        if len(uri) <= max_bytes:
            return {"uri": uri, "width": smaller.width, "height": smaller.height}
    return None
