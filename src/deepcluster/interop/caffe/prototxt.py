"""Protocol Buffers' text format, in which Caffe's networks are described: `key: value`, `key { ... }` and `#` comments."""

import re
from collections.abc import Iterator

from deepcluster.interop.caffe.messages import Malformed, Message, Value, Word

LARGEST_TEXT = 4 << 20
DEEPEST = 20
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n\f\v]+|\#[^\n]*)
      |(?P<string>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
      |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
      |(?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)(?![A-Za-z0-9_.]))
      |(?P<mark>[{}<>\[\]:,;-])""",
    re.VERBOSE,
)
_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v"}
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))|([^\\]+)", re.DOTALL)
_CLOSING = {"{": "}", "<": ">"}
_TRUE, _FALSE = ("true", "True", "t"), ("false", "False", "f")


class _Tokens:
    """The tokens of a text with their kinds and lines, one of them in view."""

    def __init__(self, text: str) -> None:
        self.line = 1
        self._rest = self._split(text)
        self.kind, self.text = "", ""
        self.take()

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.fault(f"unexpected {text[position : position + 12]!r}")
            kind, token = match.lastgroup or "", match.group()
            if kind != "space":
                yield kind, token
            self.line += token.count("\n")
            position = match.end()

    def take(self) -> str:
        """Return the token in view and go to the next one; at the end of the text that is ("", "")."""
        taken = self.text
        self.kind, self.text = next(self._rest, ("", ""))
        return taken

    def passed(self, *texts: str) -> bool:
        """Go past the token in view if it is one of these marks."""
        found = self.kind == "mark" and self.text in texts
        if found:
            self.take()
        return found

    def fault(self, what: str) -> Malformed:
        return Malformed(f"line {self.line}: {what}")


def parse(text: str) -> Message:
    """Return the message that a text describes.

    Quoted values become `str`; bare ones `bool`, `int`, `float`, or `Word` for names of enumerations.

    Raises:
        Malformed: the text is something else, or cut off; the message names the line.
    """
    if len(text) > LARGEST_TEXT:
        raise Malformed(f"{len(text)} characters are too many for a description of a network")
    return _message(_Tokens(text.removeprefix("\ufeff")), closing="", depth=0)


def _message(tokens: _Tokens, *, closing: str, depth: int) -> Message:
    """Read fields up to the mark that closes the message, or to the end of the text."""
    if depth > DEEPEST:
        raise tokens.fault(f"more than {DEEPEST} levels of braces")
    message: Message = {}
    while not (tokens.passed(closing) if closing else not tokens.text):
        if tokens.kind != "name":
            raise tokens.fault(f"expected the name of a field, found {_shown(tokens, closing)}")
        name = tokens.take()
        values = message.setdefault(name, [])
        colon = tokens.passed(":")
        if tokens.kind == "mark" and tokens.text in _CLOSING:
            values.append(_message(tokens, closing=_CLOSING[tokens.take()], depth=depth + 1))
        elif not colon:
            raise tokens.fault(f"expected ':' or '{{' after {name}, found {_shown(tokens, closing)}")
        elif tokens.passed("["):
            while not tokens.passed("]"):
                if tokens.kind == "mark" and tokens.text in _CLOSING:
                    values.append(_message(tokens, closing=_CLOSING[tokens.take()], depth=depth + 1))
                else:
                    values.append(_scalar(tokens, name))
                if not tokens.passed(",") and tokens.text != "]":
                    raise tokens.fault(f"expected ',' or ']' in the list of {name}, found {_shown(tokens, ']')}")
        else:
            values.append(_scalar(tokens, name))
        tokens.passed(",", ";")
    return message


def _scalar(tokens: _Tokens, name: str) -> Value:
    if tokens.kind == "string":
        content = b""
        while tokens.kind == "string":  # Neighbours are one string.
            content += _unescaped(tokens.take())
        return content.decode("utf-8", "replace")
    sign = -1 if tokens.passed("-") else 1
    if tokens.kind == "number":
        text = tokens.take()
        number = _number(text)
        if isinstance(number, int) and number >> 64:
            raise tokens.fault(f"{text[:40]} is more than a number of 64 bits")
        return sign * number
    if tokens.kind == "name":
        word = tokens.take()
        if word.lower() in ("inf", "infinity", "nan"):
            return sign * float(word)
        if sign == 1:
            return word in _TRUE if word in (*_TRUE, *_FALSE) else Word(word)
    raise tokens.fault(f"expected a value of {name}, found {_shown(tokens, '')}")


def _number(text: str) -> int | float:
    if re.fullmatch(r"0[xX].+", text):
        return int(text, 16)
    if re.fullmatch(r"0[0-7]+", text):
        return int(text, 8)
    # Python refuses thousands of digits.
    return int(text) if text.isdigit() and len(text) <= 20 else float(text.rstrip("fF"))


def _unescaped(token: str) -> bytes:
    parts = []
    for octal, hexadecimal, escape, plain in _ESCAPE.findall(token[1:-1]):
        if plain:
            parts.append(plain.encode("utf-8", "surrogatepass"))
        elif octal or hexadecimal:
            parts.append(bytes([int(octal, 8) & 0xFF if octal else int(hexadecimal, 16)]))
        else:
            parts.append(_ESCAPES.get(escape, escape.encode("utf-8", "surrogatepass")))
    return b"".join(parts)


def _shown(tokens: _Tokens, closing: str) -> str:
    if tokens.text:
        return repr(tokens.text[:40])
    return f"the end of the file; {closing!r} is missing" if closing else "the end of the file"


def write(message: Message, *, indent: str = "") -> str:
    """Return the text of a message without arrays, in the order of its fields."""
    lines = []
    for name, values in message.items():
        for value in values:
            if isinstance(value, dict):
                lines.append(f"{indent}{name} {{\n{write(value, indent=indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_written(value)}\n")
    return "".join(lines)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Word):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        return f'"{escaped}"'
    return str(value)
