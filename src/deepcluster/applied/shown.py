"""Results as notebooks show them: sizes, a few pictures per cluster, and the first rows. N images, K clusters."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import UnreadableImage
from deepcluster.core.html import FAINT, TABLE, bar, block, folded, line, picture, safe, table
from deepcluster.core.text import count_of
from deepcluster.data.decode import decode
from deepcluster.data.sources import ImageSource

SHOWN_CLUSTERS, SHOWN_IMAGES, SHOWN_ROWS, SHOWN_NUMBERS = 12, 8, 8, 6
# Rows of pictures of other results, and rows of those that have none.
SHOWN_GROUPS, SHOWN_FOUND = 6, 20
# Height of a picture in pixels; what all pictures may take, and how long they may be read for.
HEIGHT, MOST_BYTES, MOST_SECONDS = 56, 150_000, 5.0


def clusters_html(
    title: str, columns: Mapping[str, Any], unreadable: Mapping[str, str], source: Callable[[], ImageSource | None]
) -> str:
    """Return the largest clusters with the pictures nearest to their centroids, and the first rows, in under 300 kB."""
    cluster_N, distance_N, names = columns["cluster"], columns["distance"], columns["name"]
    found_K, sizes_K = np.unique(cluster_N[cluster_N != UNASSIGNED], return_counts=True)
    order_K, pictures = np.argsort(-sizes_K, kind="stable"), _Pictures(source, names)
    lines = []
    for row in order_K[:SHOWN_CLUSTERS].tolist():
        members = np.flatnonzero(cluster_N == found_K[row])
        nearest = members[np.argsort(distance_N[members], kind="stable")][:SHOWN_IMAGES].tolist()
        images = "".join(pictures.of(index) for index in nearest)
        if not images:
            images = f'<span style="{FAINT}">{", ".join(safe(names[index][-40:]) for index in nearest[:3])} …</span>'
        size = f"{bar(sizes_K[row] / sizes_K.max(), width='60px')} {sizes_K[row]:,}"
        cells = (f"{found_K[row]}", size, f'<div style="white-space:nowrap;overflow:hidden">{images}</div>')
        inner = "".join(f'<td style="text-align:left;padding:2px 12px 2px 0">{cell}</td>' for cell in cells)
        lines.append(f"<tr>{inner}</tr>")
    head = "".join(
        f'<th style="text-align:left;padding:2px 12px 2px 0;{FAINT};font-weight:500">{name}</th>'
        for name in ("cluster", "images", "nearest to the centroid")
    )
    more = len(found_K) - SHOWN_CLUSTERS
    shown = f'<table style="{TABLE}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    rest = [line(f"and {count_of(more, 'smaller cluster')}", faint=True)] if more > 0 else []
    rows = [{name: _text(column[index]) for name, column in columns.items()} for index in range(min(SHOWN_ROWS, len(names)))]
    listed = table(rows) if len(rows) == len(names) else folded("first rows", table(rows))
    return block(line(title, bold=True), shown, *rest, listed, _unreadable(unreadable))


def embeddings_html(
    title: str, names: Sequence[str], embedding_ND: NDArray[np.float32], unreadable: Mapping[str, str]
) -> str:
    """Return the first rows, and the first numbers of each."""
    width = embedding_ND.shape[-1]
    rows = []
    for name, row_D in islice(zip(names, embedding_ND, strict=True), SHOWN_ROWS):
        numbers = {str(number): f"{value:.4g}" for number, value in enumerate(row_D[:SHOWN_NUMBERS].tolist())}
        rows.append({"name": name[-60:], **numbers, **({"…": "…"} if width > SHOWN_NUMBERS else {})})
    return block(line(title, bold=True), table(rows), _unreadable(unreadable))


@dataclass(frozen=True)
class PictureRows:
    """Rows of pictures.

    Attributes:
        images: where they are.
        rows: of each row the index, name and caption of each image; the first one is what the row is about.
    """

    images: ImageSource
    rows: Sequence[Sequence[tuple[int, str, str]]]


def found_html(title: str, columns: Mapping[str, Any], pictures: PictureRows | None) -> str:
    """Return the first rows of pictures, and of the table; without pictures, more of the table."""
    count, parts = len(next(iter(columns.values()))), []
    if pictures is not None:
        makes = _Pictures(lambda: pictures.images, [])
        for row in pictures.rows[:SHOWN_GROUPS]:
            some = "".join(
                _captioned(makes.at(index, name), name, caption) for index, name, caption in row[: 2 + SHOWN_IMAGES]
            )
            parts.append(f'<div style="white-space:nowrap;overflow-x:auto">{some}</div>')
        if len(pictures.rows) > SHOWN_GROUPS:
            parts.append(line(f"and {len(pictures.rows) - SHOWN_GROUPS:,} more", faint=True))
    shown = min(count, SHOWN_FOUND if pictures is None else SHOWN_ROWS)
    rows = table({name: _text(column[index]) for name, column in columns.items()} for index in range(shown))
    more = line(f"and {count_of(count - shown, 'more row')}", faint=True) if count > shown else ""
    return block(line(title, bold=True), *parts, folded("first rows", rows, more) if parts else rows + more)


def _captioned(image: str, name: str, caption: str) -> str:
    image = image or f'<span style="{FAINT}">{safe(name[-24:])}</span>'
    style = "display:inline-block;text-align:center;margin:0 6px 4px 0;vertical-align:bottom"
    return f'<div style="{style}"><div>{image}</div><div style="{FAINT};font-size:11px">{safe(caption)}</div></div>'


def _unreadable(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    rows = [{"name": name[-80:], "reason": why[:200]} for name, why in islice(reasons.items(), SHOWN_ROWS)]
    return folded(f"{count_of(len(reasons), 'unreadable image')}", table(rows))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)[-80:]


class _Pictures:
    """Makes small pictures until they have taken enough bytes or time; none where the images are not on this machine."""

    def __init__(self, source: Callable[[], ImageSource | None], names: Sequence[str]) -> None:
        self.until, self.n_bytes = time.monotonic() + MOST_SECONDS, 0
        self.source, self.names = source(), names
        self.index: dict[str, int] = {}
        if self.source is not None and len(names):
            there = [self.source.name(index) for index in range(len(self.source))]
            if there != list(names):  # Some of its rows, or another order: find them by name.
                self.index = {name: index for index, name in enumerate(there)}

    def of(self, row: int) -> str:
        """Return the picture of an image; "" if it has none."""
        name = self.names[row]
        index = self.index.get(name, -1) if self.index else row
        return self.at(index, name) if index >= 0 else ""

    def at(self, index: int, name: str) -> str:
        """Return the picture of the image at an index of the source."""
        if self.source is None or self.n_bytes > MOST_BYTES or time.monotonic() > self.until:
            return ""
        with suppress(UnreadableImage, OSError):
            path = self.source.path(index)
            if path is None and not isinstance(encoded := self.source.read(index), np.ndarray):
                return ""  # In a shard, which may lie on a server.
            encoded = self.source.read(index) if path is not None else encoded
            content, is_small = _small(encoded)
            self.n_bytes += len(content)
            return picture(content, "image/webp", title=name[-100:], height=HEIGHT, pixelated=is_small)
        return ""


def _small(encoded: Any) -> tuple[bytes, bool]:
    """Return a WebP file of an image, cut to twice its shorter side, and whether it has few pixels."""
    from PIL import Image

    pixels_HWC = decode(encoded, shorter_side=HEIGHT)
    height, width = pixels_HWC.shape[:2]
    side = 2 * min(height, width)
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    file, is_small = io.BytesIO(), min(height, width) < HEIGHT
    Image.fromarray(pixels_HWC[top : top + side, left : left + side]).save(file, "WEBP", quality=70, lossless=is_small)
    return file.getvalue(), is_small
