"""Links to images and copies of them, each complete as soon as it has its name."""

import errno
import os
import shutil
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from uuid import uuid4

from PIL import Image

from deepcluster.core.errors import InputError
from deepcluster.core.files import file_stamp
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.data.sources.text_tables import is_image

# Faults of a place that takes no copies either.
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOSPC, errno.EDQUOT)
# Images whose files are looked for, to try what the disk can do.
_TRIED = 100


class Entries:
    """Makes links or copies of the images of a source.

    Args:
        kind: `link` is relative where image and folder are on one disk, which may be mounted elsewhere later, or moved.
        temporary: name of a copy that is not complete.
        final: the folder that will hold them, which need not have its name yet.
    """

    def __init__(
        self, kind: str, source: ImageSource, work: Work, *, temporary: Path = Path(), final: Path = Path()
    ) -> None:
        self.kind, self.source, self.work, self.temporary, self.final = kind, source, work, temporary, final
        self._real_folders: dict[str, tuple[str, int]] = {}
        self._device = _device(str(final)) if final != Path() else 0

    def check(self, folder: Path, what: str) -> None:
        """Raise `InputError` unless the disk of a folder takes such entries of the first images; nothing stays there."""
        if self.kind == "copy":
            return
        paths = (self.source.path(index) for index in range(len(self.source)))
        files = list(islice((path for path in paths if path is not None), _TRIED))
        if not files:
            raise InputError(f"{what} makes links to image files, and these images are none: --copy writes files")
        image = next((path for path in files if path.is_file()), None)
        if image is None:
            return
        probe = folder / f".{uuid4().hex}"
        try:
            if self.kind == "hardlink":
                os.link(os.path.realpath(image), probe)
            else:
                probe.symlink_to(image)
        except OSError as fault:
            name = "hard link" if self.kind == "hardlink" else "link"
            reason = (fault.strerror or str(fault)).lower()
            if fault.errno in _NOT_WRITABLE:
                raise InputError(f"{what} can't be written to: {reason}") from None
            raise InputError(f"{what}: a {name} to {image} can't be made there ({reason}); --copy makes copies") from None
        finally:
            with suppress(OSError):
                probe.unlink()

    def has_file(self, index: int) -> bool:
        """Return whether an image can be put anywhere."""
        return self.kind == "copy" or self.source.path(index) is not None

    def file_name(self, index: int, name: str) -> str:
        """Return the name of an image with an ending that says what its copy is."""
        if self.kind != "copy" or is_image(name):
            return name
        with suppress(OSError, ValueError), Image.open(BytesIO(self._content(index))) as image:
            return f"{name}.{(image.format or '').lower()}".replace(".jpeg", ".jpg")
        return name

    def where(self, index: int) -> str:
        """Return the path of an image relative to the folder, which stays if both are moved together.

        Of an image within a file it is that of the file, `::` and the name in it; "" of one in memory. On Windows there is
        none to another drive: the path is absolute.
        """
        holder, name = self.source.holder(index), self.source.name(index)
        if Path(holder).is_absolute():
            holder = self._real(Path(holder))[0]
            with suppress(ValueError):
                holder = os.path.relpath(holder, self.final)
        is_file = not holder or self.source.path(index) is not None
        return holder if is_file else f"{holder}::{name.rpartition('::')[2]}"

    def _real(self, path: Path) -> tuple[str, int]:
        """Return a path without links among its folders, and the disk of its folder."""
        parent = str(path.parent)
        if parent not in self._real_folders:
            self._real_folders[parent] = os.path.realpath(parent), _device(parent)
        real, device = self._real_folders[parent]
        return os.path.join(real, path.name), device  # noqa: PTH118 (for a million images)

    def put(self, index: int, entry: Path) -> bool:
        """Make an entry, unless a stop has left the very same; return whether it is there now: its name may be taken."""
        path = self.source.path(index)
        if path is None:
            return self.kind == "copy" and self._write(self._content(index), entry)
        if self.kind in ("link", "absolute"):
            real, device = self._real(path)
            final_parent = self.final / entry.parent.name
            is_relative = self.kind == "link" and device == self._device
            target = os.path.relpath(real, final_parent) if is_relative else str(path)
            if os.path.lexists(entry):
                return entry.is_symlink() and str(entry.readlink()) == target
            entry.symlink_to(target)
        elif self.kind == "hardlink":
            real = os.path.realpath(path)
            if os.path.lexists(entry):
                return entry.samefile(real)
            os.link(real, entry)
        else:
            if os.path.lexists(entry):
                return not entry.is_symlink() and file_stamp(entry) == file_stamp(path)
            try:
                shutil.copyfile(path, self.temporary)
                with suppress(OSError):
                    status = path.stat()
                    os.utime(self.temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
                self.temporary.replace(entry)
            finally:
                self.temporary.unlink(missing_ok=True)
        return True

    def _content(self, index: int) -> bytes:
        """Return the file of an image in an archive or a table; a PNG of an array."""
        content = self.source.read(index)
        if isinstance(content, bytes):
            return content
        file = BytesIO()
        Image.fromarray(content.squeeze(2) if content.shape[2:] == (1,) else content).save(file, "PNG")
        return file.getvalue()

    def _write(self, content: bytes, entry: Path) -> bool:
        if os.path.lexists(entry):
            return entry.is_file() and entry.read_bytes() == content
        try:
            self.temporary.write_bytes(content)
            self.temporary.replace(entry)
        finally:
            self.temporary.unlink(missing_ok=True)
        return True


def _device(folder: str) -> int:
    """Return the disk of a folder, or of the one above it that exists; -1 if there is none."""
    path = Path(folder)
    for one in (path, *path.absolute().parents):
        with suppress(OSError):
            return os.stat(one).st_dev  # noqa: PTH116
    return -1
