"""Names and numbers as users read them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

# Control characters (of terminals, too), line separators, marks that turn the direction of text, lone surrogates.
_HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HARMFUL_IN_TEXT = re.compile(_HARMFUL.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))


def printable(name: str) -> str:
    r"""Return a name that can be printed and saved: bytes that are not UTF-8, as old archives hold, become `\xe9`."""
    try:
        return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # Half of a pair of UTF-16, as Windows and JSON may hold.
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return text that is safe on terminals and in logs: a control character in a name becomes `\x1b`, a line break `\x0a`.

    Args:
        lines: the text has line breaks and tabs of its own, which stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return (_HARMFUL_IN_TEXT if lines else _HARMFUL).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # A byte that is not UTF-8.
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def as_line(name: str) -> str:
    """Return a name as one line of a list; one that a list can't hold as it is becomes a JSON string."""
    if name.isprintable() and name == name.strip() and name[:1] not in ("", '"', "'", "#"):
        return name
    import json  # Not at the start of the program.

    return json.dumps(name)


def of_line(line: str) -> str:
    """Return the name that `as_line` has written."""
    if line.startswith('"'):
        import json

        with suppress(ValueError):
            return str(json.loads(line))
    return line


def distinct(names: Sequence[str], *, before_ending: bool = True) -> list[str]:
    """Return the names, repeated ones with -2, -3, ... before their endings or at the end; a name is never taken twice."""
    taken, seen, last = set(names), set[str](), Counter[str]()
    result = []
    for name in names:
        head, slash, base = name.rpartition("/")
        stem, dot, ending = base.rpartition(".")
        stem, ending = (stem, dot + ending) if stem and before_ending else (base, "")  # `.png` is a name without an ending.
        new = name
        while name in seen and new in taken:
            last[name] += 1
            new = f"{head}{slash}{stem}-{last[name] + 1}{ending}"
        taken.add(new)
        seen.add(name)
        result.append(new)
    return result


def count_of(number: int, noun: str) -> str:
    """Write `1 image` or `1,234 images`."""
    plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def are(number: int, noun: str) -> str:
    """Write `1 image is` or `1,234 images are`."""
    return f"{count_of(number, noun)} {'is' if number == 1 else 'are'}"


def endings_of(endings: Counter[str] | Iterable[str]) -> str:
    """Write `.jpg 12, .png 3`, the most frequent first, or the bare endings in order where they are not counted."""
    if not isinstance(endings, Counter):
        return " ".join(f".{ending}" for ending in sorted(endings))
    ranked = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    some = [f"{f'.{ending}' if ending else 'no ending'} {count:,}" for ending, count in ranked[:8]]
    return ", ".join(some) + (f", and {count_of(len(ranked) - 8, 'other ending')}" if len(ranked) > 8 else "")


def duration(seconds: float) -> str:
    """Write a time: 8s, 3 min 20s, 2 h 05 min, 3.1 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{seconds / 86400:.1f} days"


def size(n_bytes: float) -> str:
    """Write an amount of memory: 12 kB, 3 MB, 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if round(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def as_row(cells: Mapping[str, str]) -> str:
    """Return the cells of a row of a table as one line."""
    return "  ".join(f"{title} {text}" for title, text in cells.items())


def rate_of(rate: float, unit: str) -> str:
    """Write a rate: 27 images/s, 1.4 steps/s, or the seconds of one where it is slower than one a second."""
    if rate >= 10 or not rate:
        return f"{rate:,.0f} {unit}/s"
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:,.0f} s/{unit.removesuffix('s')}"
