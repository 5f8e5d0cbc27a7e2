"""What the options of `visualize` choose: the folder of the pictures, and the channels of a stage."""

from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model

PICTURES = "visualization"  # Folder of the pictures, in the run folder.


def pictures_folder(model: Model, kind: str, out: str | Path | None) -> Path:
    """Return the folder to write pictures of a kind into: `out`, or RUN/visualization/KIND; it is not created.

    Raises:
        InputError: the model is no run folder, and `out` is None; or the folder can't be written to.
    """
    if out is not None:
        return output_path(out, "--out", is_folder=True)
    run = Path(model.name)
    if not RunFolder(run).is_run():
        raise InputError(f"{run} is not a run folder to write the pictures into: name a folder with --out")
    return output_path(run / PICTURES / kind, "--out", is_folder=True)


def parse_channels(text: str, n_channels: int, *, stage: str, clip: bool = False) -> tuple[int, ...]:
    """Return the channels that `all`, `0-63`, `5` or `1,5,8-11` names, in that order, without repetitions.

    Args:
        n_channels: number of channels of the stage; they are numbered from 0.
        stage: name of the stage, for the message.
        clip: ignore channels beyond the last one, as those of 0-63 in a stage of 32.

    Raises:
        InputError: no such channels.
    """
    available = f"{stage} has {n_channels:,} channels, 0 to {n_channels - 1}"
    if text.strip() == "all":
        return tuple(range(n_channels))
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first.strip(), last.strip() if dash else first.strip())
        # isdecimal also accepts digits of other scripts; int() would accept signs and underscores.
        if not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers):
            raise InputError(f"channels={text} should be all, or numbers such as 0-63 or 1,5,9; {available}")
        low, high = map(int, numbers)
        if high < low:
            raise InputError(f"channels={text}: {part.strip()} runs backwards; {available}")
        if high >= n_channels and not clip:
            raise InputError(f"channels={text}: there is no channel {max(low, n_channels)}; {available}")
        chosen.update(dict.fromkeys(range(low, min(high + 1, n_channels))))
    if not chosen:
        raise InputError(f"channels={text} names none; {available}")
    return tuple(chosen)
