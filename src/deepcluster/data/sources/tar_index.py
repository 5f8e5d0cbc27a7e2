"""Where each image of a tar file lies, and its class: found in one pass over the headers, and kept in the cache.

N images. Classes are those of WebDataset (`000.jpg` beside `000.cls` or `000.json`); class folders show only in all shards.
"""

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.core.files import write_cached
from deepcluster.core.kinds import BEGIN_BYTES, kind_of
from deepcluster.core.text import count_of, distinct, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.labels import NoLabels, class_names
from deepcluster.data.storage import StoredFile

_VERSION = 3
_LARGEST_LABEL = {"cls": 1 << 10, "json": 1 << 16}
_LABEL_KEYS = ("label", "class", "target")
_LARGEST_HEADER = 1 << 24  # Names and PAX records; a damaged length must not fill the memory.
_REPORT_MEMBERS = 1_000

# What to do with what is no tar file, by how `kind_of` describes it.
_ADVICE = {
    "compressed with bzip2": ", which is not supported; unpack it with bunzip2, or use gzip",
    "compressed with xz": ", which is not supported; unpack it with unxz, or use gzip",
    "compressed with zstd": ", which is not supported; unpack it with unzstd, or use gzip",
    "a ZIP archive": "; unpack it and give the folder",
    "a Parquet file": "; give it the ending .parquet",
}


@dataclass
class TarIndex:
    """The N images of one tar file, in its order."""

    images: pa.Table  # One row per image: `name` (printable, unique), `start`, `length` (bytes), `crc` (CRC-32), `label`.
    endings: Counter[str]  # Of the images.
    others: Counter[str]  # Endings of the other files.
    links: int  # Number of links, devices and sparse files, which are skipped.
    repeated: int  # Number of images whose name was numbered, since an earlier image has the same.
    problem: str  # What is wrong with the file, to follow its name; "" = nothing.
    unpacked_bytes: int | None  # Size of what a gzip'd file holds, in which `start` counts; None = it is not gzip'd.

    def save(self, path: Path, file: StoredFile) -> None:
        """Write it into the cache; do nothing where that can't be written to."""
        facts = json.dumps({**vars(self), "images": None, "of": [_VERSION, printable(file.where()), file.stamp]})
        table = self.images.replace_schema_metadata({"facts": facts})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        write_cached(path, content + zlib.crc32(content).to_bytes(4, "big"))

    @classmethod
    def load(cls, path: Path, file: StoredFile) -> "TarIndex | None":
        """Return the index of `file` from the cache; None where it is missing, damaged, or that of another file."""
        with suppress(OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            content, crc = (whole := path.read_bytes())[:-4], whole[-4:]
            if zlib.crc32(content).to_bytes(4, "big") == crc:
                table = pa.ipc.open_stream(content).read_all()
                facts = json.loads(table.schema.metadata[b"facts"])
                if facts.pop("of") == [_VERSION, printable(file.where()), file.stamp]:
                    counts = {key: Counter(facts[key]) for key in ("endings", "others")}
                    return cls(**facts | counts | {"images": table.replace_schema_metadata(None)})
        return None


def index_tar(file: StoredFile, piece: int, report: Callable[[int], None], *, is_unpacked: bool = False) -> TarIndex:
    """Find the images of a tar file; where it is cut short or damaged, those before that place.

    `piece` is the number of bytes that are worth reading at once. `report` gets the number of images now and then; it may
    raise to stop. The images of a file that `is_unpacked` get checksums.
    Raises InputError where the file is no tar, or has a problem before the end of the first image.
    """
    window = Window(file, piece)
    rows: list[tuple[str, int, int, int, int]] = []  # Name, start, length, CRC-32, group.
    endings, others, links = Counter[str](), Counter[str](), 0
    # Members in a row with the same key are a group. Labels by group and by key: a key may come again in a tar.
    labels: dict[str, dict[str | int, str]] = {"cls": {}, "json": {}}
    group, key = 0, ""
    tar, n_members = _open(file, window), 0
    while isinstance(member := _next_member(tar, window), tarfile.TarInfo):
        if n_members and n_members % _REPORT_MEMBERS == 0:
            report(len(rows))
        n_members += 1
        # A name is shown and never opened; still, none leads out of a folder.
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        if member.isdir() or not parts or any(part[0] == "." or part == "__MACOSX" for part in parts):
            continue
        if not _has_content(member):
            links += 1
            continue
        name = printable("/".join(parts))
        last, key = key, _key(name)
        group += key != last
        kind, ending = name[len(key) + 1 :].lower(), name[len(key) :].rpartition(".")[2]
        is_image = ending.lower() in IMAGE_ENDINGS
        is_read = is_unpacked if is_image else member.size <= _LARGEST_LABEL.get(kind, -1)
        content = window.content(member.offset_data, member.size) if is_read else b""
        if is_image:
            rows.append((name, member.offset_data, member.size, zlib.crc32(content), group))
            endings[ending] += 1
        elif label := _label(kind, content):
            labels[kind][group] = labels[kind][key] = label
        else:
            others[ending] += 1
    if member and not rows:
        raise InputError(f"{file.where()} {member} before the end of its first image; download or make it again")
    problem = member and f"{member} after {count_of(len(rows), 'image')}"
    names, starts, lengths, crcs, groups = zip(*rows, strict=True) if rows else [()] * 5
    cls, js = labels.values()
    places = zip(groups, map(_key, names), strict=True)
    found = [cls.get(group) or js.get(group) or cls.get(key) or js.get(key) for group, key in places]
    repeated = len(names) - len(set(names))
    columns = [
        pa.array(distinct(names) if repeated else names, pa.large_string()),
        *(pa.array(column, kind) for column, kind in ((starts, pa.int64()), (lengths, pa.int64()), (crcs, pa.uint32()))),
        pa.array(found, pa.large_string()).dictionary_encode(),  # Null = unknown.
    ]
    images = pa.table(columns, ["name", "start", "length", "crc", "label"])
    return TarIndex(images, endings, others, links, repeated, problem, file.size if is_unpacked else None)


def _open(file: StoredFile, window: "Window") -> tarfile.TarFile:
    if not file.size:
        raise InputError(f"{file.where()} is empty (0 bytes); download it again")
    try:
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], window), encoding="utf-8", errors="surrogateescape")
    except (DeepClusterError, MemoryError):  # Nothing is wrong with the tar.
        raise
    except Exception as error:  # Not a list of types: on spoiled headers `tarfile` was seen to raise several.
        kind = kind_of(file.read(0, BEGIN_BYTES))
        what = f"is not a tar file: it is {kind}{_ADVICE.get(kind, '')}"
        if kind == "text" or kind.startswith("of an unknown format"):
            what = f"is no tar file, or damaged where it begins ({error}); download or make it again"
        if kind.endswith(" image"):
            what += "; give its folder, or a list of images"
        raise InputError(f"{file.where()} {what}") from error
    tar.offset = 0
    return tar


def _next_member(tar: tarfile.TarFile, window: "Window") -> tarfile.TarInfo | str:
    """Return the next member, or what is wrong with the file there, to follow its name; "" at its end."""
    window.seek(tar.offset)
    # Two blocks of zeros are the end, unless tars were put one behind the other.
    while (block := window.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        pass
    here = window.tell() - len(block)
    if not block:
        return "" if tar.offset < here else "has no end mark, so it may be cut short"
    window.seek(here)
    try:
        # Not `tar.next()`: it keeps all members, and takes a damaged header for the end.
        member = tarfile.TarInfo.fromtarfile(tar)
    except (DeepClusterError, MemoryError):
        raise
    except Exception:  # As above.
        return "is cut short" if window.met_the_end else "is damaged"
    if tar.offset <= here or member.size < 0:  # Sizes may be negative in this format, and lead round in circles.
        return "is damaged"
    return "is cut short" if _has_content(member) and member.offset_data + member.size > window.file.size else member


def _has_content(member: tarfile.TarInfo) -> bool:
    """Return whether the content of a member follows its header as it is: not that of links, devices and sparse files."""
    return member.isreg() and not member.issparse()


class Window:
    """A position in a stored file over a piece of it in memory, as `tarfile` and `gzip` want one.

    Small members come in large pieces; large members are hopped over.
    """

    def __init__(self, file: StoredFile, piece: int) -> None:
        self.file, self._piece = file, piece
        self._position = self._start = 0
        self._held = b""
        self.met_the_end = False

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _LARGEST_HEADER:
            raise tarfile.HeaderError(f"{length} bytes")
        found = self.content(self._position, length)
        self.met_the_end |= len(found) < length
        self._position += len(found)
        return found

    def content(self, start: int, length: int) -> bytes:
        offset = start - self._start
        if not 0 <= offset <= len(self._held) - length:
            # Behind a large member there may be another one.
            hopped = offset - len(self._held) > self._piece // 2
            wanted = min(max(length, self._piece // 32 if hopped else self._piece), self.file.size - start)
            self._start, offset = start, 0
            self._held = self.file.read(start, wanted) if wanted > 0 else b""
        return self._held[offset : offset + length]


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(kind: str, content: bytes) -> str:
    """Return the class that a .cls or .json member gives; "" = none, as does -1."""
    label = ""
    with suppress(ValueError, RecursionError):
        if kind == "cls":
            (label,) = class_names([content.decode()])
        # To search takes a tenth of the time of parsing.
        elif any(f'"{key}"'.encode() in content for key in _LABEL_KEYS) and isinstance(values := json.loads(content), dict):
            for key in _LABEL_KEYS:
                with suppress(NoLabels):  # A list of several labels.
                    (label,) = [label] if label else class_names([values.get(key)])
        return printable(label)
    return ""
