"""Data from Python: whatever holds paths is taken, other things are answered in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from deepcluster.core.errors import InputError
from deepcluster.data.sources.given import given_data

TAKEN: dict[str, tuple[Any, Any]] = {
    "text": ("a/b", "a/b"),
    "a path": (Path("a/b"), Path("a/b")),
    "bytes": (b"caf\xe9", "caf\udce9"),
    "text of NumPy": (np.array(["a"])[0], "a"),
    "a list": (["a", Path("b")], ["a", Path("b")]),
    "a tuple": (("a",), ["a"]),
    "a set": ({"b", "a", "c"}, ["a", "b", "c"]),
    "a generator": ((f"{n}.tar" for n in range(3)), ["0.tar", "1.tar", "2.tar"]),
    "keys": ({"a": 1, "b": 2}.keys(), ["a", "b"]),
    "an array of text": (np.array(["a", "b"]), ["a", "b"]),
    "an array of paths": (np.array([Path("a"), Path("b")]), [Path("a"), Path("b")]),
    "an array without axes": (np.array("a"), "a"),
    "a column": (pd.Series(["a", "b"]), ["a", "b"]),
    "nothing": (None, []),
    "empty": ((), []),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty array": (lambda: np.zeros(0), "an array of 0 numbers"),
    "images and paths": (lambda: [Image.new("RGB", (8, 8)), "a.png"], "at place 1 a value of type str"),
    "a list of lists": (lambda: [["a"]], "type list"),
    "a data set": (lambda: torch.utils.data.TensorDataset(torch.zeros(2, 1)), "type torch TensorDataset"),
    "a table": (lambda: pd.DataFrame({"path": ["a"]}), "a table"),
    "a number": (lambda: 3, "type int"),
    "classes": (lambda: {"cat": "a"}, "type dict"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_paths_are_taken(name: str) -> None:
    data, expected = TAKEN[name]
    given = given_data(data)
    assert given == expected
    assert {type(one) for one in (given if isinstance(given, list) else [given])} <= {str, type(Path())}


@pytest.mark.parametrize("name", REFUSED)
def test_other_things_are_named(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        given_data(make())
