"""A million names in two pieces of memory instead of a million objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import overload


class PackedNames(Sequence[str]):
    """Strings as UTF-8 in one piece of memory: 8 bytes a name and its length, where Python takes about 57 and its length.

    Every string comes back as it was, also one with halves of surrogate pairs, as which Python shows bytes of a file name
    that are not UTF-8. It grows by `extend` while it is made.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])  # The end of each name, after the start of the first.
        self.extend(names)

    def extend(self, names: Iterable[str]) -> None:
        """Add names at the end."""
        names = iter(names)
        while some := [name.encode("utf-8", "surrogatepass") for name in islice(names, 10_000)]:
            self._text += b"".join(some)
            self._ends.extend(accumulate(map(len, some), initial=self._ends.pop()))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self._ends) - 1:
            if not -len(self) <= index < 0:
                raise IndexError(f"name {index} of {len(self)}")
            index += len(self)
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in islice(self._ends, 1, None):
            yield self._text[start:end].decode("utf-8", "surrogatepass")
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedNames):
            return NotImplemented
        return self._text == other._text and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment] # It may grow.
