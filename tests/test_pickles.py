"""Pickles are read as data: what pickle itself would give for plain values, and nothing at all of theirs is run."""

import collections
import datetime
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcluster.core.errors import InputError
from deepcluster.core.pickles import read_plain_pickle

PROTOCOLS = range(6)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.tuples(st.text(), st.integers())
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner), max_leaves=30
)


class Payload:
    """Asks for a call of what it is given."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@settings(max_examples=200, deadline=None)
@given(value=VALUES, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["?", "i1", "<i2", ">i4", "i8", "u1", "u8", "f2", "<f4", ">f8", "c8", "c16", "S5", "U3"])
def test_arrays_are_those_of_pickle(kind: str, protocol: int) -> None:
    rows = np.arange(12).reshape(3, 4)
    for array in (
        rows.astype(kind),
        rows.astype(kind).T,
        rows.astype(kind)[:, ::2],
        np.empty((0, 3), kind),
        np.array(7, kind),
    ):
        found = read_plain_pickle(pickle.dumps({"rows": [array, array]}, protocol))["rows"]
        assert found[0].dtype == array.dtype
        assert found[0].shape == array.shape
        np.testing.assert_array_equal(found[0], array)
        assert found[0].flags.writeable
        assert found[1] is found[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_array_of_three_axes_in_another_order(protocol: int) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0)
    np.testing.assert_array_equal(read_plain_pickle(pickle.dumps(array, protocol)), array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_of_numpy(protocol: int) -> None:
    values = [np.int64(-3), np.float32(0.1), np.bool_(True), np.str_("ab"), np.float64(2.5)]
    found = read_plain_pickle(pickle.dumps((values, {np.int32(4): 1}), protocol))
    assert found == (values, {4: 1})
    assert [type(one) for one in found[0]] == [type(one) for one in values]


def test_a_pickle_of_python_2() -> None:
    """As Python 2.7 with NumPy 1 writes {'easy': array([1, 258]), 'name': 'x'}, protocol 2: bytes as text."""
    content = (
        b"\x80\x02}q\x00(U\x04easyq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01b"
        b"\x87q\x05Rq\x06(K\x01K\x02\x85q\x07cnumpy\ndtype\nq\x08U\x02i2K\x00K\x01\x87q\tRq\n(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\x02\x01tbU\x04nameU\x01xu."
    )
    found = read_plain_pickle(content)
    assert found["easy"].tolist() == [1, 258] and found["name"] == "x"


def test_new_and_old_names_of_numpy() -> None:
    content = pickle.dumps(np.arange(3), 2)
    assert b"numpy._core" in content
    assert read_plain_pickle(content.replace(b"numpy._core", b"numpy.core")).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": Payload(os.system, f"touch {mark}")}, protocol))
    with pytest.raises(InputError, match=r"gnd\.pkl asks for (posix|nt|os)\.system.*refused"):
        read_plain_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Payload(eval, "1"), "eval"),
        (Payload(getattr, "a", "upper"), "getattr"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        ({1, 2}, "set"),
        (frozenset([1]), "set"),
        (2j, "complex"),
        (np.array([None, "a"]), "type 'O8'"),
        (np.array(["2020-01-01"], "datetime64[D]"), "type 'M8'"),
        (np.zeros(2, [("a", "i4")]), "type 'V4'"),
        (np.ndarray, "value"),
        (bytearray(b"x"), "bytearray"),
    ],
)
def test_what_is_not_plain_is_named(value: Any, named: str) -> None:
    for protocol in (2, 4):
        with pytest.raises(InputError, match=named):
            read_plain_pickle(pickle.dumps([value], protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\ndtype\n}(U\x01_U\x01_ub.",  # attributes of what stands for a function
        b"\x80\x02cnumpy\ndtype\n)\x81.",  # an object of a class
        b"\x80\x02(U\x02i8cnumpy\ndtype\no.",
        b"(U\x02i8inumpy\ndtype\n.",
        b"\x80\x02\x82\x01.",  # a registered extension
        b"Pwho\n.",
        b"\x80\x02U\x01a)R.",  # a call of text
        b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x05\x97.",
    ],
)
def test_tricks_are_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="asks for"):
        read_plain_pickle(content)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_told(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.pkl"
    content = pickle.dumps({"names": ["a", "b" * 300], "rows": np.arange(4)}, protocol)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.pkl"):
            read_plain_pickle(path)


def test_damaged_bytes_give_a_value_or_a_plain_error() -> None:
    rng = np.random.default_rng(0)
    content = pickle.dumps({"names": ["a", ("b", 2.5)], "rows": np.arange(4)}, 4)
    for _ in range(2000):
        spoiled = bytearray(content)
        for place in rng.integers(len(content), size=3):
            spoiled[place] = rng.integers(256)
        try:
            read_plain_pickle(bytes(spoiled))
        except InputError:
            continue


def test_missing_file_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_plain_pickle(tmp_path / "none.pkl")
    for content in (b"", b"<html>", b"{}"):
        with pytest.raises(InputError, match="not a pickle"):
            read_plain_pickle(content)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested lists
        b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x01s.",  # the hash of it ends Python
        b"\x80\x02]q\x00h\x00a.",  # holds itself
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a terabyte
        b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".",
        b"\x80\x03cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",  # two gigabytes of zeros
        pickle.dumps(np.empty((1 << 40, 0)), 4),  # a list of 2⁴⁰ empty lists
        b"\x80\x02"
        + b"".join(b"]q%c" % place for place in range(200))
        + b"".join(b"h%ch%ca0" % (i, i + 1) for i in range(199)),
    ],
)
def test_bombs_are_refused(content: bytes) -> None:
    with pytest.raises(InputError):
        read_plain_pickle(content)


def test_a_large_place_in_the_memo_takes_no_memory() -> None:
    assert read_plain_pickle(b"\x80\x02]r\xff\xff\xff\x7f.") == []


def test_shared_parts_are_not_multiplied() -> None:
    """40 levels of two references to the same: 10¹² values if each were looked at."""
    value: Any = [1]
    for _ in range(40):
        value = (value, value)
    found = read_plain_pickle(pickle.dumps(value))
    assert found[0] is found[1]


def test_lists_of_lists_as_the_2018_release_logs_its_clusters(tmp_path: Path) -> None:
    value = [[list(range(start, 60, 6)) for start in range(6)] for _ in range(3)]
    path = tmp_path / "clusters"
    path.write_bytes(pickle.dumps(value, -1))
    assert read_plain_pickle(path) == value
