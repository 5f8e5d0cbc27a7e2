"""Numbers and sizes of the crops of multi-crop, as people write them: `2x224,6x96`. Needs no torch: settings use it."""

import re

from deepcluster.core.errors import InputError

# For each group of crops of one size: how many of them, and their side in pixels. The first group is the large one.
Crops = tuple[tuple[int, int], ...]

LEAST_SIDE = 8
_EXAMPLES = "write it as 2x224,6x96 (two crops of 224 pixels and six of 96), or 2x32 (two of 32 pixels)"


def scaled_crops(text: str, factor: float) -> str:
    """Return crops of other sides, at least 8 pixels."""
    return ",".join(f"{count}x{max(LEAST_SIDE, int(factor * side))}" for count, side in parse_crops(text))


def parse_crops(text: str) -> Crops:
    """Groups of crops, as (number, side in pixels) each, of a text such as `2x224,6x96` (SwAV's multi-crop, section 3.3).

    Raises InputError where the text is none such; a number is below 1, a side below 8, there are fewer than two crops in
    all, or a later group has larger crops than the first.
    """
    groups = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*[xX×]\s*([0-9]{1,5})\s*", part)
        if match is None:
            raise InputError(f"crops={text!r}: {part.strip()!r} is not a number and a side; {_EXAMPLES}")
        groups.append((int(match[1]), int(match[2])))
    for count, side in groups:
        if count < 1:
            raise InputError(f"crops={text!r} has a group of {count} crops: leave it out, or use 1 or more; {_EXAMPLES}")
        if side < LEAST_SIDE:
            raise InputError(f"crops={text!r} has crops of {side} pixels; use {LEAST_SIDE} or more")
    if sum(count for count, _ in groups) < 2:
        raise InputError(f"crops={text!r} is one crop, and there is no other one to learn from; {_EXAMPLES}")
    large, largest = groups[0][1], max(side for _, side in groups)
    if largest > large:
        raise InputError(
            f"crops={text!r}: the first group, of {large} pixels, must be the large one, whose projections are clustered, "
            f"and another has {largest}; put that one first"
        )
    return tuple(groups)
