"""Protocol Buffers' binary format: messages of `messages.MESSAGES` from bytes and to bytes.

Numbers of floats are views of the file's bytes. What a file claims reserves no memory: all lengths are checked against the
bytes that are there, and a message may have only so many fields.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from deepcluster.interop.caffe.messages import (
    BOOL,
    DOUBLES,
    ENUMS,
    FLOAT,
    FLOATS,
    INTS,
    MESSAGES,
    STRING,
    Malformed,
    Message,
    Value,
    Word,
)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MOST_FIELDS = 20_000
LONGEST_STRING = 1 << 16
_FLOAT_TYPES: dict[str, np.dtype[Any]] = {FLOATS: np.dtype("<f4"), DOUBLES: np.dtype("<f8")}
# Parts of a binary message in their order: large arrays are written as they are.
Chunks: TypeAlias = list[bytes | memoryview]


def read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise Malformed("it ends in the middle of a number")
        byte = view[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, position
    raise Malformed("a number is longer than 10 bytes")


def read_fields(view: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield number, wire type and value of each field: a number for `VARINT`, otherwise bytes."""
    position = 0
    while position < len(view):
        key, position = read_varint(view, position)
        number, wire_type = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"there is no field of number {number}")
        if wire_type == VARINT:
            value, position = read_varint(view, position)
            yield number, wire_type, value
            continue
        if wire_type == BYTES:
            length, position = read_varint(view, position)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise Malformed(f"field {number} has the unknown wire type {wire_type}")
        if length > len(view) - position:
            raise Malformed(f"field {number} should have {length} bytes, {len(view) - position} are left")
        yield number, wire_type, view[position : position + length]
        position += length


def decode(view: memoryview, kind: str) -> Message:
    """Return the message of type `kind` that the bytes hold.

    Raises:
        Malformed: they hold no such message, or only the beginning of one.
    """
    names = {number: (name, type_) for name, (number, type_) in MESSAGES[kind].items()}
    message: Message = {}
    floats: dict[str, memoryview | bytearray] = {}
    n_fields = 0
    for number, wire_type, value in read_fields(view):
        name, type_ = names.get(number, ("", ""))
        if type_ in _FLOAT_TYPES:
            if not isinstance(value, memoryview):
                raise Malformed(f"{kind}.{name} has the wire type {wire_type}")
            # A writer may split the values over several fields, or write each in its own.
            floats[name] = value if name not in floats else _joined(floats[name], value)
            continue
        n_fields += 1
        if n_fields > MOST_FIELDS:
            raise Malformed(f"a {kind} has more than {MOST_FIELDS} fields")
        if name:
            message.setdefault(name, []).extend(_values(type_, wire_type, value, f"{kind}.{name}"))
    for name, content in floats.items():
        float_type = _FLOAT_TYPES[MESSAGES[kind][name][1]]
        if len(content) % float_type.itemsize:
            raise Malformed(f"{kind}.{name} has {len(content)} bytes, which are no whole number of floats")
        message[name] = [np.frombuffer(content, float_type)]
    return message


def _joined(content: memoryview | bytearray, more: memoryview) -> bytearray:
    content = content if isinstance(content, bytearray) else bytearray(content)
    content += more
    return content


def _values(type_: str, wire_type: int, value: int | memoryview, name: str) -> list[Value]:
    """Return the values of one field: several where numbers are packed."""
    if type_ in MESSAGES or type_ == STRING:
        if wire_type != BYTES or not isinstance(value, memoryview):
            raise Malformed(f"{name} has the wire type {wire_type}")
        if type_ in MESSAGES:
            return [decode(value, type_)]
        if len(value) > LONGEST_STRING:
            raise Malformed(f"{name} is a string of {len(value)} bytes")
        return [bytes(value).decode("utf-8", "replace")]
    if type_ == FLOAT:
        if wire_type not in (FIXED32, BYTES) or not isinstance(value, memoryview) or len(value) % 4:
            raise Malformed(f"{name} has the wire type {wire_type}")
        return [number for (number,) in struct.iter_unpack("<f", value[: 4 * MOST_FIELDS])]
    numbers = []
    if isinstance(value, int):
        numbers.append(value)
    elif wire_type == BYTES:
        position = 0
        while position < len(value):
            if len(numbers) == MOST_FIELDS:
                raise Malformed(f"{name} has more than {MOST_FIELDS} values")
            number, position = read_varint(value, position)
            numbers.append(number)
    else:
        raise Malformed(f"{name} has the wire type {wire_type}")
    if type_ == BOOL:
        return [bool(number) for number in numbers]
    if type_ in ENUMS:
        known = dict(enumerate(ENUMS[type_]))
        return [Word(known.get(number, f"number {number}")) for number in numbers]
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def varint(number: int) -> bytes:
    """Return the bytes of a number; a negative one has ten."""
    number &= 0xFFFF_FFFF_FFFF_FFFF
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    content.append(number)
    return bytes(content)


def encode(message: Message, kind: str) -> Chunks:
    """Return the bytes of a message of type `kind`, in parts; fields in the order of their numbers."""
    chunks: Chunks = []
    for name, (number, type_) in sorted(MESSAGES[kind].items(), key=lambda item: item[1][0]):
        values = message.get(name, [])
        if not values:
            continue
        if type_ == INTS:
            chunks += _sized(number, [b"".join(varint(_whole(value)) for value in values)])
        elif type_ in _FLOAT_TYPES:
            for value in values:
                array = np.asarray(value, _FLOAT_TYPES[type_])
                chunks += _sized(number, [array.ravel().view(np.uint8).data])
        else:
            for value in values:
                chunks += _field(number, type_, value)
    return chunks


def _field(number: int, type_: str, value: Value) -> Chunks:
    if isinstance(value, dict):
        return _sized(number, encode(value, type_))
    if type_ == STRING:
        return _sized(number, [str(value).encode()])
    if type_ == FLOAT and isinstance(value, int | float):
        return [varint(number << 3 | FIXED32), struct.pack("<f", value)]
    whole = ENUMS[type_].index(str(value)) if type_ in ENUMS else _whole(value)
    return [varint(number << 3 | VARINT), varint(whole)]


def _whole(value: Value) -> int:
    if not isinstance(value, int):
        raise Malformed(f"{value!r} is not a whole number")
    return value


def _sized(number: int, chunks: Sequence[bytes | memoryview]) -> Chunks:
    return [varint(number << 3 | BYTES), varint(sum(map(len, chunks))), *chunks]
