"""The folder of a run's pictures."""

from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model

# Folder of the pictures, in the run folder.
PICTURES = "visualization"


def pictures_folder(model: Model, kind: str, out: str | Path | None) -> Path:
    """Return the folder to write pictures of a kind into: `out`, or RUN/visualization/KIND; it is not created.

    Raises:
        InputError: the model is no run folder, and `out` is None.
    """
    if out is not None:
        return Path(out)
    run = Path(model.name)
    if not RunFolder(run).is_run():
        raise InputError(f"{run} is not a run folder to write the pictures into: name a folder with --out")
    return run / PICTURES / kind
