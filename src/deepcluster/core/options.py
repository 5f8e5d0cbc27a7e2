"""Options: fields of a frozen dataclass with help, choices and bounds. The command line is derived from them.

The options of a training run are in `run.settings`, those of the evaluation protocols in `evaluation.options`.
"""

import functools
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, Self

from deepcluster.core.errors import InputError, did_you_mean


def option(
    default: Any,
    text: str,
    *,
    section: str = "",
    choices: Collection[str] = (),
    aliases: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    method: str = "",
) -> Any:
    """Return a dataclass field with what the command line and `Checked` need.

    Args:
        text: help; the default is added to it.
        section: section of the help.
        aliases: old names, accepted but not shown.
        at_least, below: bounds of a number, and of each number of a tuple.
        resumable: a resume may change it.
        method: the training method that it belongs to; both by default.
    """
    shown = {"help": text, "section": section, "choices": choices, "aliases": aliases}
    rules = {"at_least": at_least, "below": below, "resumable": resumable, "method": method}
    return field(default=default, metadata={**shown, **rules})


@dataclass(frozen=True)
class Checked:
    """Options whose values are checked when they are made, and kept as plain Python values.

    Raises:
        InputError: a value is of another type or out of range, naming the option, the value and what may be used.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value = coerce(type(self), one.name, getattr(self, one.name))
            _validate(one.name, value, one.metadata)
            object.__setattr__(self, one.name, value)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values by option name, as JSON keeps them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the options of plain values.

        Raises:
            InputError: an unknown name (the nearest one is named), or a value of the wrong type.
        """
        return cls(**{name: coerce(cls, name, value) for name, value in values.items()})


@functools.cache
def types_of(owner: type) -> dict[str, Any]:
    """Return the type of each option by name."""
    return typing.get_type_hints(owner)


def flag(name: str) -> str:
    """Return the spelling of an option on the command line."""
    return "--" + name.replace("_", "-")


def plain_type(owner: type, name: str) -> tuple[type, bool]:
    """Return the Python type of an option, and whether it may be None."""
    hint = types_of(owner)[name]
    if isinstance(hint, types.UnionType):
        parts = typing.get_args(hint)
        return next(part for part in parts if part is not type(None)), type(None) in parts
    return typing.get_origin(hint) or hint, False


def parts_of(owner: type, name: str) -> tuple[type, int | None]:
    """Return the type of the parts of a tuple option, and their number; None: any number."""
    parts = typing.get_args(types_of(owner)[name])
    return parts[0], None if parts[-1] is Ellipsis else len(parts)


def takes_several(owner: type, name: str) -> bool:
    """Return True if an option is one number or several, such as `int | tuple[int, ...]`."""
    hint = types_of(owner)[name]
    return isinstance(hint, types.UnionType) and any(typing.get_origin(part) is tuple for part in typing.get_args(hint))


def plain(value: Any) -> Any:
    """Return a value as plain Python types, which checkpoints and JSON can hold.

    Scalars and arrays of NumPy and tensors become numbers, text and lists; paths become text. Subclasses, such as those of
    `enum`, become the type that they extend. Lists and tuples are converted part by part.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else tuple(map(plain, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    return str(value) if isinstance(value, PurePath) else value


def whole_number(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Return an argument that is a whole number.

    Raises:
        InputError: it is something else, or too small.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}={value!r} should be a whole number, such as 10")
    if at_least is not None and value < at_least:
        raise InputError(f"{name}={value} is too small: use {at_least} or more")
    return value


def coerce(owner: type, name: str, value: Any) -> Any:
    """Return the value of an option in its own type.

    Raises:
        InputError: an unknown name, or a value of another type.
    """
    value = plain(value)
    known = types_of(owner)
    if name not in known:
        removed: Mapping[str, str] = getattr(owner, "removed", {})
        if name in removed:
            raise InputError(f"option {name!r} is gone: {removed[name]}")
        raise InputError(f"unknown option {name!r}{did_you_mean(name, known)}")
    wanted, optional = plain_type(owner, name)
    if value is None and optional:
        return None
    if isinstance(value, list | tuple) and value and takes_several(owner, name):
        several = tuple(coerce(owner, name, one) for one in value)
        return several if len(several) > 1 else several[0]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, list | tuple):
        part, count = parts_of(owner, name)
        if count in (None, len(value)) and all(isinstance(one, part | int) for one in value):
            return tuple(part(one) for one in value)
    if wanted is tuple or not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise InputError(f"{name}={value!r} should be of type {wanted.__name__}")
    return value


def parse(owner: type, name: str, text: str) -> Any:
    """Return the value of an option written as text: `0.5`, `yes`, `1,5,10`.

    Raises:
        InputError: an unknown name, or text that is no such value.
    """
    wanted = plain_type(owner, name)[0] if name in types_of(owner) else None
    kind = parts_of(owner, name)[0] if wanted is tuple else wanted
    try:
        if kind is bool:
            return coerce(owner, name, {"yes": True, "true": True, "no": False, "false": False}[text.lower()])
        if kind in (int, float):
            numbers = [kind(part) for part in text.split(",")]
            return coerce(owner, name, numbers if wanted is tuple or len(numbers) > 1 else numbers[0])
    except (KeyError, ValueError):
        raise InputError(f"{name}={text} should be {'yes or no' if kind is bool else 'a number'}") from None
    return coerce(owner, name, text)


def _validate(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices, at_least, below = metadata["choices"], metadata["at_least"], metadata["below"]
    if choices and value not in choices:
        raise InputError(f"unknown {name} {value!r}{did_you_mean(str(value), choices)}: use one of {', '.join(choices)}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) and not isfinite(one):
            raise InputError(f"{name}={one} must be finite")
        if one is not None and at_least is not None and one < at_least:
            raise InputError(f"{name}={one} is too small; use {at_least:g} or more")
        if one is not None and below is not None and one >= below:
            raise InputError(f"{name}={one} is too large; use less than {below:g}")
