"""Models and data sets from the net, into a layout that the commands take: `deepcluster download`."""

import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import locked, output_path, usual_cache_folder, write_whole
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import Refused, tell_troubles_to
from deepcluster.core.text import size
from deepcluster.interop.download.catalogue import ENTRIES, Entry, File, entry_of
from deepcluster.interop.download.disk import disk_fault
from deepcluster.interop.download.fetch import TIMEOUT_SECONDS
from deepcluster.interop.download.fetch import fetch as fetch_file
from deepcluster.interop.download.unpack import Limits, unpack_archive

# Environment variable: base address of a mirror.
MIRROR = "DEEPCLUSTER_MIRROR"
# In the folder of a data set: what is there while it is incomplete, and once it is complete.
WORK, MARK = ".download", ".download.json"
_AGAIN = "the same command continues"


def download(
    name: str,
    out: str | Path | None = None,
    *,
    accept_licence: bool = False,
    mirror: str | None = None,
    keep_archives: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    reporter: Reporter | None = None,
) -> Path:
    """Download a model or a data set, unless it is there; after any interruption, the same call continues.

    Args:
        name: a name of `deepcluster download --list`.
        out: the folder; by default `models/NAME` in the cache folder for a model, `NAME` for a data set.
        accept_licence: the user accepts the licence of weights that ask for it.
        mirror: base address of a mirror that has the files under MIRROR/HOST/PATH; by default `$DEEPCLUSTER_MIRROR`.
        keep_archives: keep the archives of a data set, in the folder OUT/.download.
        timeout: seconds to connect, and of silence, before a connection is tried again.
        reporter: shows the progress; by default lines are printed.

    Returns:
        the file of a model (of several the last one), or the folder of a data set.

    Raises:
        InputError: there is no such name or file, the licence was not accepted, a file has another sum, or an archive is
            not safe.
        DeepClusterError: the disk is full, the server is gone, or Ctrl-C; what came so far is kept.
    """
    reporter = reporter or Reporter()
    entry = entry_of(name)
    reporter.say(f"{entry.name}: {entry.about}. {entry.licence.text}.")
    if entry.licence.must_be_accepted and not accept_licence:
        raise InputError(
            f"the licence of {entry.name} is {entry.licence.name}: if you accept it, repeat the command with "
            "--accept-licence (in Python accept_licence=True)"
        )
    tell_troubles_to(reporter.warn)
    job = _Job(entry, mirror or os.environ.get(MIRROR), timeout, reporter)
    path = job.model(out) if entry.limits is None else job.data_set(out, keep_archives=keep_archives)
    reporter.say(f"{path} is ready; for example:")
    for use in entry.uses:
        reporter.say("  " + use.format(path=shlex.quote(str(path))))
    return path


def table() -> str:
    """Return the list of all downloads as a table."""
    rows = [("NAME", "WHAT", "SIZE", "LICENCE")]
    rows += [
        (one.name, one.about, f"~{size(one.bytes)}" if one.bytes else "?", one.licence.name) for one in ENTRIES.values()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


class _Job:
    """The download of one entry."""

    def __init__(self, entry: Entry, mirror: str | None, timeout: float, reporter: Reporter) -> None:
        self.entry, self.mirror, self.timeout, self.reporter = entry, mirror, timeout, reporter

    def fetch(self, file: File, path: Path, *, room: int = 0, sums: Path | None = None) -> Path:
        """Download a file; where it can't be had, add how else it can get there."""
        address = file.address(self.mirror)
        if not path.is_file():
            self.reporter.say(f"downloading {address} to {path}")
        try:
            return fetch_file(
                address, path, digest=file.digest, reporter=self.reporter, room=room, timeout=self.timeout, sums=sums
            )
        except InputError as fault:
            with suppress(OSError):  # If nothing has come.
                path.parent.rmdir()
            if not isinstance(fault, Refused) and "can't be reached" not in str(fault):
                raise
            raise type(fault)(
                f"{fault}. Or get the file in another way, save it as {path}, and repeat the command"
            ) from fault

    def model(self, out: str | Path | None) -> Path:
        """Download the files of a model."""
        usual = usual_cache_folder() / "models" / self.entry.name
        folder = usual if out is None else output_path(out, "--out", is_folder=True)
        return [self.fetch(file, folder / file.name) for file in self.entry.files][-1]

    def data_set(self, out: str | Path | None, *, keep_archives: bool) -> Path:
        """Download and unpack the archives of a data set into a hidden folder, and move them up once all are there."""
        folder = output_path(self.entry.name if out is None else out, "--out", is_folder=True)
        work = folder / WORK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(work):
                if self._is_complete(folder):
                    return folder
                made = work / "made"
                if not made.is_dir():
                    if any(path.name.partition(".0-0")[0] != WORK for path in folder.iterdir()):
                        raise InputError(f"--out {folder} is not an empty folder; name one that does not exist yet")
                    self._make(work, made)
                for path in sorted(made.iterdir(), key=lambda path: path.name == MARK):  # The mark is the last one.
                    path.rename(folder / path.name)
                made.rmdir()
                if not keep_archives:
                    shutil.rmtree(work, ignore_errors=True)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; what came so far is kept in {work}: {_AGAIN}") from None
        except OSError as fault:
            raise disk_fault(fault, f"{fault.filename or work} can't be written", f"make room, then {_AGAIN}") from fault
        finally:
            with suppress(OSError):  # If nothing has come.
                folder.rmdir()
        return folder

    def _is_complete(self, folder: Path) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / MARK).read_text(encoding="utf-8")).get("name")
            return bool(found == self.entry.name)
        return False

    def _make(self, work: Path, made: Path) -> None:
        """Make what belongs into the folder of the data set."""
        files, limits = self.entry.files, self.entry.limits or Limits(0, 0)
        sums = usual_cache_folder() / "downloads"
        for number, file in enumerate(files):
            later = sum(one.bytes or 0 for one in files[number + 1 :] if not (work / one.name).exists())
            self.fetch(file, work / file.name, room=later + self.entry.room, sums=sums)
        unpacked, converted = work / "unpacked", work / "converted"
        for old in (unpacked, converted):  # Of a call that was stopped.
            if old.exists():
                shutil.rmtree(old)
        for file in files:
            self.reporter.say(f"unpacking {file.name}")
            unpack_archive(work / file.name, unpacked, limits, place=file.place, reporter=self.reporter)
        whole = unpacked
        if self.entry.convert:
            from deepcluster.interop.download.convert import convert

            convert(self.entry.convert, unpacked, converted, self.reporter)
            shutil.rmtree(unpacked)
            whole = converted
        about = {"name": self.entry.name, "licence": self.entry.licence.name, "files": [file.url for file in files]}
        write_whole(whole / MARK, json.dumps(about, indent=1))
        whole.rename(made)
