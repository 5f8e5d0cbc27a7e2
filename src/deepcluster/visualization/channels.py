"""Which stages, and which channels of a stage, a person asks for."""

from deepcluster.core.errors import InputError
from deepcluster.run.model import Model

ALL = "all"


def chosen_stages(model: Model, text: str | None) -> tuple[str, ...]:
    """The stages that are named; by default the last one that has maps, such as conv5 or layer4.

    Raises:
        InputError: the trunk has no such stage.
    """
    return model.stages(text, usual=model.trunk.stages[-2])


def parse_channels(text: str, n_channels: int, *, stage: str, clip: bool = False) -> tuple[int, ...]:
    """The channels that `all`, `0-63`, `5` or `1,5,8-11` names, in that order; one that comes again is left out.

    Args:
        n_channels: of the stage; they are numbered from 0.
        stage: for the message.
        clip: leave out what lies beyond the last channel, as of 0-63 where there are 32.

    Raises:
        InputError: no such channels, telling which there are.
    """
    there_are = f"{stage} has {n_channels:,} channels, 0 to {n_channels - 1}"
    if text.strip() == ALL:
        return tuple(range(n_channels))
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, last = _ends(part, text, there_are)
        if last >= n_channels and not clip:
            raise InputError(f"channels={text}: there is no channel {max(first, n_channels)}; {there_are}")
        chosen.update(dict.fromkeys(range(first, min(last + 1, n_channels))))
    if not chosen:
        raise InputError(f"channels={text} names none; {there_are}")
    return tuple(chosen)


def _ends(part: str, text: str, there_are: str) -> tuple[int, int]:
    first, dash, last = part.strip().partition("-")
    numbers = (first.strip(), last.strip() if dash else first.strip())
    # isdecimal alone takes other scripts' digits, and int() would take signs and underscores.
    if not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers):
        raise InputError(f"channels={text} should be all, or numbers such as 0-63 or 1,5,9; {there_are}")
    low, high = int(numbers[0]), int(numbers[1])
    if high < low:
        raise InputError(f"channels={text}: {part.strip()} runs backwards; {there_are}")
    return low, high
