"""Sums of files: those that were published, and those of the first download where none was."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from deepcluster.core.addresses import shown
from deepcluster.core.errors import InputError
from deepcluster.core.files import write_whole
from deepcluster.core.progress import Reporter

_WHOLE = {"md5": 32, "sha256": 64}
_PIECE_BYTES = 8 << 20


class WrongSum(InputError):
    """A file is not the one that was published, or not the one of the first download."""


@dataclass(frozen=True)
class Sum:
    """A published sum of a file: `md5` or `sha256`, and its hex digits, perhaps only the first of them."""

    kind: str
    digits: str

    @classmethod
    def of(cls, digest: str) -> "Sum":
        """Parse `md5:90528d7c...` or `sha256:3db70837`; raises ValueError."""
        kind, _, digits = digest.lower().partition(":")
        if kind not in _WHOLE or re.fullmatch(rf"[0-9a-f]{{8,{_WHOLE[kind]}}}", digits) is None:
            raise ValueError(f"{digest!r} is not a sum such as md5:HEX or sha256:HEX")
        return cls(kind, digits)

    @property
    def is_whole(self) -> bool:
        """Whether all digits are known."""
        return len(self.digits) == _WHOLE[self.kind]


def check_sum(path: Path, url: str, wanted: Sum | None, note: Path, reporter: Reporter) -> None:
    """Compare a whole file with its published sum, or else with that of the first download, which is kept in `note`.

    Raises:
        WrongSum: it differs.
    """
    kinds = {wanted.kind} if wanted is not None and wanted.is_whole else {"sha256", *([wanted.kind] if wanted else [])}
    found = _sums_of(path, kinds, reporter)
    is_there, name = path.suffix != ".part", path.name.removesuffix(".part")
    what = f"{path} is" if is_there else f"{shown(url)} gives"
    advice = "delete it to download it again" if is_there else "it is not kept"
    if wanted is not None and not found[wanted.kind].startswith(wanted.digits):
        begins = "" if wanted.is_whole else "one that begins with "
        raise WrongSum(
            f"{what} another file than was published: its {wanted.kind.upper()} is {found[wanted.kind]}, not "
            f"{begins}{wanted.digits}; {advice}"
        )
    if wanted is not None and wanted.is_whole:
        reporter.detail(f"{name}: {wanted.kind.upper()} {wanted.digits}, as published")
        return
    before = note.read_text(encoding="utf-8", errors="replace").split()[:1] if note.is_file() else []
    if before and before[0] != found["sha256"]:
        raise WrongSum(
            f"{what} another file than at the first download: its SHA-256 is {found['sha256']}, not {before[0]} as in "
            f"{note}; {advice}. If a new version was published, delete {note}"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, f"{found['sha256']}  {name}\n")
    known = "as at the first download" if before else f"kept in {note}"
    begin = f", begins with {wanted.digits} as published" if wanted is not None else ""
    reporter.say(f"{name}: SHA-256 {found['sha256']}{begin} ({known})")


def _sums_of(path: Path, kinds: set[str], reporter: Reporter) -> dict[str, str]:
    """Return the sums of a file that are of these kinds."""
    sums = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with (
        path.open("rb") as file,
        reporter.track(f"check {path.name.removesuffix('.part')}", path.stat().st_size // 1000, "kB") as meter,
    ):
        while piece := file.read(_PIECE_BYTES):
            for one in sums.values():
                one.update(piece)
            meter(len(piece) // 1000)
    return {kind: one.hexdigest() for kind, one in sums.items()}
