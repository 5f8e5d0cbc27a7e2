"""Where each image of a tar file lies, and of which class it is: found by one pass over its headers, and kept on the disk.

N images. Layouts: WebDataset (`000.jpg` beside `000.cls` or `000.json`) and plain folders; labels from folders are made
of the names later, since they may only show in all shards together.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, distinct, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.tar_members import TarMembers, has_content
from deepcluster.data.storage import StoredFile, write_whole

_VERSION: Final = 1
_CHECK_BYTES: Final = 4
_LARGEST_CLS: Final = 1 << 10
_LARGEST_JSON: Final = 1 << 16
_LABEL_KEYS: Final = ("label", "class", "target")
_TELL_MEMBERS: Final = 1_000


@dataclass
class TarIndex:
    """The N images of one tar file, in its order.

    Attributes:
        images: a row each: `name` (printable, without "./" and the like; unique), `start` and `length` in bytes, `label`
            (an index into `classes`, -1 = unknown).
        classes: what .cls and .json members say; "" is never one.
        endings: of the images.
        others: endings of the other files.
        links: number of hard and symbolic links and sparse files, which are skipped.
        repeated: number of images that got a number, since another one before has their name.
        problem: what is wrong with the file, to follow its name; "" = nothing.
        packed: whether the file is gzip'd; then the positions are those in what it holds.
    """

    images: pa.Table
    classes: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    links: int = 0
    repeated: int = 0
    problem: str = ""
    packed: bool = False

    def keep(self, path: Path, file: StoredFile) -> None:
        """Write it into the cache, or go on without where that can't be written to."""
        facts = {**vars(self), "images": None, **_identity(file)}
        table = self.images.replace_schema_metadata({"facts": json.dumps(facts)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        write_whole(path, content + zlib.crc32(content).to_bytes(_CHECK_BYTES, "big"))

    @classmethod
    def kept(cls, path: Path, file: StoredFile) -> TarIndex | None:
        """Read the index of `file` from the cache; None where there is none that can be used."""
        try:
            whole = memoryview(path.read_bytes())
        except OSError:
            return None
        content = whole[:-_CHECK_BYTES]
        # Arrow trusts its files; the checksum says that this one is as it was written.
        if len(whole) < _CHECK_BYTES or zlib.crc32(content) != int.from_bytes(whole[-_CHECK_BYTES:], "big"):
            return None
        try:
            table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
            facts = json.loads(table.schema.metadata[b"facts"])
            identity = {key: facts.pop(key) for key in _identity(file)}
            facts |= {"images": table.replace_schema_metadata(None)}
            facts |= {key: Counter(facts[key]) for key in ("endings", "others")}
            return cls(**facts) if identity == _identity(file) else None
        except (pa.ArrowException, KeyError, TypeError, ValueError):  # As another version wrote it.
            return None


def _identity(file: StoredFile) -> dict[str, object]:
    return {"version": _VERSION, "where": printable(file.where()), "stamp": file.stamp}


def index_tar(file: StoredFile, piece: int, tell: Callable[[int], None]) -> TarIndex:
    """Find the images of a tar file; those before a place where it is cut short or damaged, and `problem` says so.

    `piece` is the number of bytes that are worth reading at once, as `TarMembers` takes it. `tell` gets the number of images
    now and then; it may raise to stop.
    Raises InputError where the file is no tar at all, or where a problem comes before the end of the first image.
    """
    members = TarMembers(file, piece)
    found = _Found()
    for number, member in enumerate(members, 1):
        found.add(member, members)
        if number % _TELL_MEMBERS == 0:
            tell(len(found.starts))
    index = found.index()
    if members.problem and not len(index.images):
        raise InputError(f"{file.where()} {members.problem} before the end of its first image; download or make it again")
    if members.problem:
        index.problem = f"{members.problem} after {count_of(len(index.images), 'image')}"
    return index


class _Found:
    """The images found so far, and the labels of those that have one."""

    def __init__(self) -> None:
        self.names = bytearray()
        self.name_ends = array("q", [0])
        self.starts, self.lengths, self.labels = array("q"), array("q"), array("i")
        self.numbers: dict[str, int] = {}
        self.endings: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.links = 0
        # Members of one key follow each other in most tars: then nothing has to be remembered but the last key.
        self.key = ""
        self.first = 0
        self.known: dict[str, str] = {}
        self.loose: dict[str, dict[str, str]] = {"cls": {}, "json": {}}

    def add(self, member: tarfile.TarInfo, members: TarMembers) -> None:
        """Take a member, whatever it is."""
        # A name is shown and never opened; still, none leads out of a folder.
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        if member.isdir() or not parts or any(part[0] == "." or part == "__MACOSX" for part in parts):
            return
        if not has_content(member):
            self.links += 1
            return
        name = printable("/".join(parts))
        base = parts[-1]
        stem, _, rest = base.partition(".")
        self._follow(name[: len(name) - len(printable(base))] + printable(stem))
        ending = base.rpartition(".")[2] if rest else ""
        if ending.lower() in IMAGE_ENDINGS:
            self.names += name.encode()
            self.name_ends.append(len(self.names))
            self.starts.append(member.offset_data)
            self.lengths.append(member.size)
            self.labels.append(-1)
            self.endings[ending] += 1
            return
        kind = rest.lower()
        label = _label_in(kind, member, members) if kind in self.loose else ""
        if label:
            self.known[kind] = label
        else:
            self.others[ending] += 1

    def _follow(self, key: str) -> None:
        """Give the labels of the key before to its images, where another one begins."""
        if key == self.key:
            return
        if self.known and self.first < len(self.labels):
            number = self.numbers.setdefault(self.known.get("cls") or self.known["json"], len(self.numbers))
            self.labels[self.first :] = array("i", [number]) * (len(self.labels) - self.first)
        elif self.known:
            for kind, label in self.known.items():
                self.loose[kind][self.key] = label
        self.key, self.first, self.known = key, len(self.labels), {}

    def index(self) -> TarIndex:
        self._follow("/")  # No key of a member.
        ends, text = pa.py_buffer(self.name_ends), pa.py_buffer(self.names)
        names = pa.LargeStringArray.from_buffers(len(self.starts), ends, text)
        if self.loose["cls"] or self.loose["json"]:
            # The labels of images whose label does not lie next to them.
            for place, name in enumerate(names):
                if self.labels[place] < 0:
                    folder, slash, base = name.as_py().rpartition("/")
                    key = folder + slash + base.partition(".")[0]
                    label = self.loose["cls"].get(key) or self.loose["json"].get(key)
                    self.labels[place] = self.numbers.setdefault(label, len(self.numbers)) if label else -1
        repeated = len(names) - len(names.unique())
        if repeated:
            names = pa.array(distinct(names.to_pylist()), pa.large_string())
        columns = {
            "name": names,
            "start": pa.array(self.starts, pa.int64()),
            "length": pa.array(self.lengths, pa.int64()),
            "label": pa.array(self.labels, pa.int32()),
        }
        return TarIndex(pa.table(columns), list(self.numbers), self.endings, self.others, self.links, repeated)


def _label_in(kind: str, member: tarfile.TarInfo, members: TarMembers) -> str:
    """Return the class that a .cls or .json member names; "" = none, as does -1."""
    if member.size > (_LARGEST_CLS if kind == "cls" else _LARGEST_JSON):
        return ""
    content = members.content(member)
    try:
        label = printable(content.decode().strip() if kind == "cls" else _json_label(content))
    except (ValueError, RecursionError):
        return ""
    return "" if label == "-1" else label


def _json_label(content: bytes) -> str:
    if not any(f'"{key}"'.encode() in content for key in _LABEL_KEYS):  # A tenth of the time of reading it.
        return ""
    values = json.loads(content)
    for label in (values.get(key) for key in _LABEL_KEYS) if isinstance(values, dict) else ():
        if isinstance(label, str | int) and not isinstance(label, bool):
            return str(label).strip()
    return ""
