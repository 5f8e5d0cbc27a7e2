"""Files that are whole at every moment: written beside, flushed, renamed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside, flush it, and rename it: it is whole at every moment."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
