"""Labels as the tables of any program hold them: the class name of each image, "" where it is unknown."""

import math
import re
from collections.abc import Iterable
from decimal import Decimal

import numpy as np

from deepcluster.core.text import count_of

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?", re.ASCII)
# What programs write where there is no value. The second kind may be the name of a class, unless all others are numbers.
_MISSING = frozenset({"", "nan", "<na>", "nat", "null", "#n/a"})
_MISSING_AMONG_NUMBERS = frozenset({"none", "na", "n/a", "-", "?"})


class NoLabels(ValueError):
    """Values that are no labels; the message says what they are."""


def class_names(values: Iterable[object]) -> list[str]:
    """Return the class name of each label, "" where it is unknown: null, NaN, an empty text or a number below 0.

    Whole numbers have one form, `3`, also where pandas made them floating, in text (`3.0`) or not. A list of one label is
    that label.

    Raises:
        NoLabels: some value is a list of several labels, or a structure.
    """
    plain = [value if type(value) is str else _plain(value) for value in values]
    distinct = dict.fromkeys(plain)
    words = {value: value.strip() for value in distinct if isinstance(value, str)}
    numbers = {value for value, text in words.items() if _NUMBER.fullmatch(text)}
    others = {text.lower() for value, text in words.items() if value not in numbers} - _MISSING
    are_numbers = others <= _MISSING_AMONG_NUMBERS and (numbers or len(words) < len(distinct))
    missing = _MISSING | _MISSING_AMONG_NUMBERS if are_numbers else _MISSING
    # Text such as 007 stays what it is, where no label has a decimal point.
    were_floating = are_numbers and any("." in words[value] for value in numbers)

    def name(value: object) -> str:
        if isinstance(value, str):
            text = words[value]
            if value in numbers and (were_floating or text[0] == "-"):
                return _of_number(Decimal(text))
            return "" if text.lower() in missing else text
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            return _of_number(value)
        return "" if value is None or str(value).lower() in _MISSING else str(value)

    names = {value: name(value) for value in distinct}
    return [names[value] for value in plain]


def in_order(names: Iterable[str]) -> list[str]:
    """Return class names sorted: as numbers where all are numbers, else as text."""
    names = sorted(names)
    return sorted(names, key=float) if all(map(_NUMBER.fullmatch, names)) else names


def notes_on(names: Iterable[str], origin: str) -> list[str]:
    """Return what is said of class names: how many, where they come from, and how many images have none."""
    names = list(names)
    classes, unknown = len(set(names) - {""}), names.count("")
    if not classes:
        return [f"no labels {origin}"] * bool(names)
    return [f"{count_of(classes, 'class')} {origin}".rstrip()] + [f"{unknown:,} without a label"] * bool(unknown)


def _plain(value: object) -> object:
    """Return a label as a plain value that can be a key; raises NoLabels."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise NoLabels(f"lists of several labels, such as {str(value)[:40]}")
        return _plain(value[0]) if value else None
    if isinstance(value, dict):
        raise NoLabels(f"structures, such as {str(value)[:40]}")
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _of_number(value: float | Decimal) -> str:
    if math.isnan(value) or value < 0:
        return ""
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
