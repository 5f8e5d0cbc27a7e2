"""Pages of pictures in groups, with tables and curves: what `similar`, `duplicates`, `sample` and `compare` found."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deepcluster.core.text import count_of, size
from deepcluster.core.work import Work
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.gallery.thumbnails import MEDIA_TYPE, METHOD, QUALITY, most_thumbnails, thumbnail
from deepcluster.visualization.report.page import LEGEND_ABOVE, Section, asset, figure_json, render, shown, write_page

# Sides of pictures in pixels: the largest at which all fit the page.
SIDES: Final = (192, 128, 96)
# Pictures that a page shows at most; further groups are left out, and the page says so.
MOST_PICTURES: Final = most_thumbnails(SIDES[-1])
Group = Mapping[str, Any]


def write_picture_page(
    path: Path, title: str, parts: Sequence[Mapping[str, Any]], images: ImageSource | None, *, workers: int, work: Work
) -> None:
    """Write a page, and print its size.

    Args:
        title: heading of the page.
        parts: sections with `name`, `title`, and, as far as there are any, `words`, `tables` (`header`, `rows`), `curves`
            (`title`, `y`, `lines`: names with epochs and values), `groups` of pictures, and `more`, printed at the end.
            Groups have `title`, `words` and `pictures`: `index` among the images, `name`, `caption`, and whether `marked`.
        images: where the pictures are; None where they are not at hand.
        workers: threads that read pictures.
    """
    groups_of = [_first_groups(part.get("groups", ())) for part in parts]
    pictures = _pictures(images, [group for groups in groups_of for group in groups], workers, work)
    sections = [_section(part, groups, pictures) for part, groups in zip(parts, groups_of, strict=True)]
    work.reporter.say(f"{path}: {size(write_page(path, shown(title), sections))}")


def _first_groups(groups: Sequence[Group]) -> list[Group]:
    """Return as many of the first groups as a page shows."""
    count, first = 0, list[Group]()
    for group in groups:
        count += len(group["pictures"])
        if first and count > MOST_PICTURES:
            break
        first.append({**group, "pictures": group["pictures"][:MOST_PICTURES]})
    return first


def _pictures(images: ImageSource | None, groups: Sequence[Group], workers: int, work: Work) -> dict[int, str]:
    """Return the pictures of the groups as data addresses, by index; those that can't be read have none."""
    from PIL import Image

    wanted = list(dict.fromkeys(one["index"] for group in groups for one in group["pictures"]))
    if images is None or not wanted:
        return {}
    side = next((side for side in SIDES if len(wanted) <= most_thumbnails(side)), SIDES[-1])

    def address(index: int) -> str:
        tile = thumbnail(images, index, side=side)
        if isinstance(tile, str):
            return ""
        file = io.BytesIO()
        Image.fromarray(tile).save(file, "WEBP", quality=QUALITY, method=METHOD)
        return f"data:{MEDIA_TYPE};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

    found = {}
    with image_threads(max(1, workers)) as pool, work.track("pictures", len(wanted)) as advance:
        for index, picture in zip(wanted, pool.map(address, wanted), strict=True):
            found[index] = picture
            advance(1)
    return found


def _section(part: Mapping[str, Any], groups: Sequence[Group], pictures: Mapping[int, str]) -> Section:
    left_out = len(part.get("groups", ())) - len(groups)
    more = f"{count_of(left_out, 'more group')} not shown. " if left_out else ""
    curves = [{**curve, "id": f"{part['name']}-{number}"} for number, curve in enumerate(part.get("curves", ()))]
    html = render(
        "picture_page.html.jinja",
        words=shown(part.get("words", "")),
        tables=[
            {"header": list(map(shown, table["header"])), "rows": [list(map(shown, row)) for row in table["rows"]]}
            for table in part.get("tables", ())
        ],
        curves=curves,
        groups=[_shown(group, pictures) for group in groups],
        more=shown(more + part.get("more", "")),
    )
    figures = {curve["id"]: _figure(curve) for curve in curves}
    return Section(part["name"], part["title"], html, figures=figures, styles=(asset("picture_page.css"),))


def _shown(group: Group, pictures: Mapping[int, str]) -> dict[str, Any]:
    return {
        "title": shown(group["title"]),
        "words": shown(group["words"]),
        "pictures": [
            {**one, "name": shown(one["name"]), "picture": pictures.get(one["index"], "")} for one in group["pictures"]
        ],
    }


def _figure(curve: Mapping[str, Any]) -> str:
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": shown(name), "x": list(x), "y": list(y)}
        for name, (x, y) in curve["lines"].items()
    ]
    return figure_json(
        traces,
        height=280,
        margin={"l": 56, "r": 12, "t": 8, "b": 48},
        hovermode="x unified",
        showlegend=True,
        legend={**LEGEND_ABOVE, "font": {"size": 12}},
        xaxis_title={"text": "epoch", "font": {"size": 12}},
        yaxis_title={"text": curve["y"], "font": {"size": 12}},
    )
