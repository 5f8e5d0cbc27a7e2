"""Describe what the program writes, by digests and by values without times and paths; and compare two descriptions."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from small_runs import MEASURED

# Entries of checkpoints, metrics and results that depend on the clock or on paths, or are recorded apart.
NOT_RECORDED = MEASURED | {"key", "wait_seconds", "settings", "rows", "parts"}
CHANGING = (
    (r"\d{4}-\d\d-\d\d( \d\d:\d\d(:\d\d)?)?", "DATE"),
    (r"\b(\d+ min )?[\d.]+ ?s\b", "TIME"),
    (r"\b[\d.,]+ (B|kB|MB|GB)\b", "SIZE"),
    (r"data-wait \d+%", "data-wait SHARE"),
    (r"[\d.]+% of it was waiting", "SHARE of it was waiting"),
)


def describe_table(path: Path) -> dict[str, str]:
    """Return a digest for each column."""
    return {name: digest(column) for name, column in pq.read_table(path).to_pydict().items()}


def digest(value: Any) -> str:
    """Hash nested values: types, names, shapes and bytes, in whatever order the keys are."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            found.update(f"map {len(value)}".encode())
            for key in sorted(value, key=repr):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"list {len(value)}".encode())
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor | np.ndarray):
            array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
            found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            found.update(f"{type(value).__name__} {value!r};".encode())

    add(value)
    return found.hexdigest()[:16]


def describe_file(path: Path) -> Any:
    """Return the content of a JSON file, the visible text of a page, or digests."""
    match path.suffix:
        case ".json":
            return json.loads(path.read_text())
        case ".html":
            return VisibleText(path.read_text()).text
        case ".parquet":
            return describe_table(path)
        case ".npy":
            return digest(np.load(path))
        case ".png" | ".jpg":
            return digest(np.asarray(Image.open(path)))
    return digest(path.read_bytes())


class VisibleText(HTMLParser):
    """The text of a page, a line for each piece, without scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.hidden, self.pieces = 0, list[str]()
        self.feed(page)
        self.text = "".join(f"{' '.join(piece.split())}\n" for piece in self.pieces if piece.strip())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.pieces += [] if self.hidden else [data]


def without_changing(value: Any, work: Path) -> Any:
    """Return the value without times, sizes, speeds and the path of `work`."""
    if isinstance(value, Mapping):
        return {key: without_changing(part, work) for key, part in value.items() if key not in MEASURED | {"key"}}
    if isinstance(value, list):
        return [without_changing(part, work) for part in value]
    if isinstance(value, str):
        value = value.replace(str(work), "WORK")
        # As a word of its own: in a process of pytest-xdist it is "-c".
        value = re.sub(rf"(?<!\S){re.escape(' '.join(sys.argv))}(?!\S)", "COMMAND", value)
        for pattern, word in CHANGING:
            value = re.sub(pattern, word, value)
    return value


def differences(old: Any, new: Any) -> list[str]:
    """Describe each leaf of nested values that differs, by its path."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{path}: {before.get(path, 'nothing')} -> {after.get(path, 'nothing')}"
        for path in [*before, *(path for path in after if path not in before)]
        if before.get(path) != after.get(path)
    ]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, repr(value)
