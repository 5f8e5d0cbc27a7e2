"""Paths that are more than paths: results of functions that used to be paths, and still are."""

import sys
from pathlib import Path
from typing import Any, Self

from deepcluster.core.files import user_path

if sys.platform == "win32":
    from pathlib import WindowsPath as _Path
else:
    from pathlib import PosixPath as _Path


class ResultPath(_Path):
    """A path that can be extended; paths that are derived from it are plain ones."""

    def __new__(cls, path: str | Path) -> Self:
        """Expand `~`."""
        return super().__new__(cls, user_path(path))

    def __init__(self, path: str | Path) -> None:
        """Take a path."""
        if sys.version_info >= (3, 12):
            super().__init__(user_path(path))

    if sys.version_info < (3, 12):
        _from_parsed_parts = getattr(_Path, "_from_parsed_parts")  # noqa: B009 (private, of Python 3.11)

    def with_segments(self, *segments: Any) -> Path:
        """Return another path."""
        return Path(*segments)

    def __reduce__(self) -> Any:
        """Pickle the path."""
        return type(self), (str(self),)
