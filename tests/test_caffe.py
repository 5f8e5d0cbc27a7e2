"""Caffe's two formats, text and binary: as protobuf's own library reads and writes them; what is damaged is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caffe_helper import TINY, net_parameter
from google.protobuf import text_format
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deepcluster.core.errors import InputError
from deepcluster.interop.caffe.messages import Malformed, Message, Word
from deepcluster.interop.caffe.network import network_of
from deepcluster.interop.caffe.prototxt import parse, write
from deepcluster.interop.caffe.read import read_caffe
from deepcluster.interop.caffe.steps import steps_of
from deepcluster.interop.caffe.wire import LONGEST_STRING, decode, encode

Net = net_parameter()
SHAPES = {
    "grey": [(1, 3, 1, 1), (1,)],
    "edges": [(2, 1, 3, 3), (2,)],
    "norm": [(2,), (2,), (1,)],
    "scale": [(2,), (2,)],
    "fc": [(4, 32), (4,)],
}


def tiny() -> Any:
    """The small network with weights, as a message of protobuf's library."""
    net = text_format.Parse(TINY, Net())
    rng = np.random.default_rng(0)
    for layer in net.layer:
        for shape in SHAPES.get(layer.name, []):
            blob = layer.blobs.add()
            blob.data.extend(rng.uniform(0.5, 1, shape).ravel())
            blob.shape.dim.extend(shape)
    return net


TINY_BYTES = tiny().SerializeToString()


def plain(message: Message) -> Any:
    """A message with lists in the place of arrays, to be compared."""
    return {
        name: [plain(v) if isinstance(v, dict) else v.tolist() if isinstance(v, np.ndarray) else v for v in values]
        for name, values in message.items()
    }


def binary_of(message: Message) -> bytes:
    return b"".join(encode(message, "NetParameter"))


def test_binary_is_read_as_protobuf_writes_it() -> None:
    found = decode(memoryview(TINY_BYTES), "NetParameter")
    assert [layer["name"] for layer in found["layer"]] == [[layer.name] for layer in tiny().layer]
    for layer, wanted in zip(found["layer"], tiny().layer, strict=True):
        for blob, other in zip(layer.get("blobs", []), wanted.blobs, strict=True):
            assert blob["data"][0].tolist() == list(other.data)
            assert blob["shape"] == [{"dim": list(other.shape.dim)}]
    assert found["layer"][0]["convolution_param"] == [{"num_output": [1], "kernel_size": [1], "engine": [Word("CAFFE")]}]
    assert found["layer"][1]["include"] == [{"phase": [Word("TEST")]}]
    assert found["layer"][6]["inner_product_param"] == [{"num_output": [4], "axis": [-3]}]
    assert found["layer"][2]["batch_norm_param"][0]["eps"] == [pytest.approx(1e-3)]


def test_binary_is_written_as_protobuf_writes_it() -> None:
    assert binary_of(decode(memoryview(TINY_BYTES), "NetParameter")) == TINY_BYTES


def test_text_means_what_it_means_to_protobuf() -> None:
    assert binary_of(parse(TINY)) == text_format.Parse(TINY, Net()).SerializeToString()


def test_protobuf_reads_the_written_text() -> None:
    written = write(parse(TINY))
    assert text_format.Parse(written, Net()) == text_format.Parse(TINY, Net())
    assert parse(written) == parse(TINY)


def test_old_form_of_layers() -> None:
    """`layers` have types of an enumeration, and other numbers of the same fields."""
    text = """layers { bottom: "data" top: "a" name: "a" type: CONVOLUTION blobs { num: 2 data: [1, 2] }
                       convolution_param { num_output: 2 pad: 1 kernel_size: 3 } include: { phase: TEST } }
              layers { bottom: "a" top: "b" name: "b" type: POOLING
                       pooling_param { pool: AVE } transform_param { scale: 2 } }"""
    net = text_format.Parse(text, Net())
    assert binary_of(decode(memoryview(net.SerializeToString()), "NetParameter")) == net.SerializeToString()
    del net.layers[0].blobs[:]
    assert binary_of(parse(text.replace("blobs { num: 2 data: [1, 2] }", ""))) == net.SerializeToString()


@given(st.text(), st.integers(-(2**63), 2**63 - 1), st.floats(width=32, allow_nan=False), st.booleans())
def test_values_of_all_kinds(name: str, number: int, real: float, switch: bool) -> None:
    """Both formats, both ways."""
    net = Net(name=name, input_dim=[number, 0])
    layer = net.layer.add(type=name)
    layer.convolution_param.bias_term = switch
    layer.power_param.scale = real
    layer.blobs.add(data=[real, 1], num=1, double_data=[real])
    found = decode(memoryview(net.SerializeToString()), "NetParameter")
    assert binary_of(found) == net.SerializeToString()
    del net.layer[0].blobs[:]
    parsed = parse(text_format.MessageToString(net, as_utf8=True))
    assert binary_of(parsed) == net.SerializeToString()
    assert binary_of(parse(text_format.MessageToString(net, as_one_line=True))) == net.SerializeToString()
    assert text_format.Parse(write(parsed), Net()) == net


def test_floats_one_by_one_and_in_parts() -> None:
    """A parser must take packed values, single values, and several packed parts."""
    one, two = (np.float32([value]).tobytes() for value in (1.5, -2))
    blob = b"\x2d" + one + b"\x2d" + two + b"\x2a\x08" + one + two
    assert decode(memoryview(blob), "BlobProto")["data"][0].tolist() == [1.5, -2, 1.5, -2]
    unpacked = b"\x08\x03\x08\xac\x02"
    assert (
        decode(memoryview(unpacked), "BlobShape")
        == {"dim": [3, 300]}
        == decode(memoryview(b"\x0a\x03\x03\xac\x02"), "BlobShape")
    )


def test_unknown_fields_are_skipped() -> None:
    unknown = b"\xf8\x3f\x07" + b"\xfa\x3f\x02ab" + b"\xf9\x3f" + bytes(8) + b"\xfd\x3f" + bytes(4)
    assert (
        decode(memoryview(unknown + TINY_BYTES), "NetParameter").keys()
        == decode(memoryview(TINY_BYTES), "NetParameter").keys()
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x0a", "in the middle of a number"),
        (b"\x0a\x05tiny", "should have 5 bytes, 4 are left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "are left"),
        (b"\xff" * 11, "longer than 10 bytes"),
        (b"\x00\x00", "field of number 0"),
        (b"\x0b\x0c", "unknown wire type 3"),
        (b"\x08\x01", "NetParameter.name has the wire type 0"),
        (b"\x0a" + b"\x81\x80\x04" + b"a" * (LONGEST_STRING + 1), "a string of 65537 bytes"),
        (b"\xa2\x06\x00" * 20_001, "more than 20000 fields"),
        (b"\x42\x81\x9d\x01\x0a\xfd\x9c\x01" + b"\x01" * 20_093, "more than 20000 values"),
        (b"\x1f\x8b garbage", "unknown wire type 7"),
    ],
)
def test_damaged_binaries(content: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        decode(memoryview(content), "NetParameter")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("layer {\n  name: 'a'\n", "line 3: expected the name of a field, found the end of the file; '}' is missing"),
        ("name:\n", "line 2: expected a value of name, found the end of the file"),
        ("name 'a'", "line 1: expected ':' or '{' after name, found \"'a'\""),
        ("a: [1 2]", "expected ',' or ']' in the list of a, found '2'"),
        ("a: [1, 2", "']' is missing"),
        ("a: -b", "expected a value of a, found the end"),
        ("a: 1e", "line 1: unexpected '1e'"),
        ("a: 'open\nb: 1", "unexpected \"'open"),
        ("}", "found '}'"),
        ("a { b: 1 >", "found '>'"),
        ("a{" * 30, "more than 20 levels"),
        ("a: 1 " * 1_000_000, "too many"),
        (f"a: 0x{'f' * 5000}", "line 1: 0xffff.* is more than a number of 64 bits"),
        ("[a.b]: 1", "found '\\['"),
    ],
)
def test_damaged_texts(text: str, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        parse(text)


@given(st.text(alphabet="ab{}<>[]:,;#'\"\\\n -.019exf"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except Malformed:
        return


@given(st.binary() | st.integers(0, len(TINY_BYTES)).map(lambda end: TINY_BYTES[:end]))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        decode(memoryview(content), "NetParameter")
    except Malformed:
        return


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bits turned over, some bytes cut out, or its end missing."""
    spoiled = bytearray(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])
    for place in draw(st.lists(st.integers(0, max(0, 8 * len(spoiled) - 1)), max_size=4)) if spoiled else []:
        spoiled[place // 8] ^= 1 << place % 8
    start = draw(st.integers(0, len(spoiled)))
    del spoiled[start : start + draw(st.integers(0, 3))]
    return bytes(spoiled)


@hypothesis_settings(max_examples=150)
@given(damaged(TINY_BYTES), damaged(TINY.encode()))
def test_damaged_networks_are_read_or_refused(binary: bytes, text: bytes) -> None:
    """Each file with the other whole, and the binary by itself."""
    pairs = [(text, TINY_BYTES), (TINY.encode(), binary), (b"", binary)]
    for description, weights in pairs:
        try:
            net = decode(memoryview(weights), "NetParameter")
            steps_of(network_of(parse(description.decode("utf-8", "replace")) if description else net, net).layers)
        except Malformed:
            continue


@hypothesis_settings(max_examples=60)
@given(damaged(TINY_BYTES), damaged(TINY.encode()), st.booleans())
def test_damaged_files_are_refused(
    tmp_path_factory: pytest.TempPathFactory, binary: bytes, text: bytes, by_text: bool
) -> None:
    """Even whole this network is not one of ours."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "m.caffemodel").write_bytes(binary)
    (folder / "m.prototxt").write_bytes(text)
    with pytest.raises(InputError, match=r"m\.(caffemodel|prototxt)"):
        read_caffe(folder / ("m.prototxt" if by_text else "m.caffemodel"))


def read_with(folder: Path, binary: bytes | None, text: str | None, *, name: str = "m.caffemodel") -> str:
    """The message of the refusal."""
    if binary is not None:
        (folder / "m.caffemodel").write_bytes(binary)
    if text is not None:
        (folder / "m.prototxt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as fault:
        read_caffe(folder / name)
    message = str(fault.value)
    assert str(folder) in message
    return message


def test_another_network(tmp_path: Path) -> None:
    net = tiny()
    net.layer[0].blobs[0].data[:] = [1 / 3] * 3
    net.layer[0].blobs[1].data[:] = [0]
    net.layer[1].blobs[0].data[:] = [1, 0, -1, 2, 0, -2, 1, 0, -1, 1, 2, 1, 0, 0, 0, -1, -2, -1]
    net.layer[1].blobs[1].data[:] = [0, 0]
    message = read_with(tmp_path, net.SerializeToString(), TINY)
    assert "neither alexnet nor vgg16" in message
    assert (
        "0 convolutions (alexnet 5 and vgg16 13): batch norm; scale; ReLU; max pooling 2×2, stride 2, padding 0; fully"
        in message
    )


def test_preprocessing_that_does_not_fit_is_shown(tmp_path: Path) -> None:
    net = tiny()
    net.layer[0].blobs[0].data[:] = [0.5, -0.25, 1]
    net.layer[0].blobs[1].data[:] = [0.125]
    net.layer[1].blobs[0].data[:] = [1, 0, -1, 2, 0, -2, 1, 0, -1, 1, 2, 1, 0, 0, 0, -1, -2, -1]
    net.layer[1].blobs[1].data[:] = [0, 0]
    assert "channel 1 = +0.5 B -0.25 G +1 R +0.125" in read_with(tmp_path, net.SerializeToString(), TINY)
    assert "edges is not the Sobel layer" in read_with(tmp_path, TINY_BYTES, TINY)


@pytest.mark.parametrize(
    ("binary", "text", "name", "reason"),
    [
        (None, TINY, "m.prototxt", "put the .caffemodel file beside it"),
        (binary_of({"layer": [{"name": ["a"], "blobs": []}]}), None, "m.caffemodel", "put its .prototxt file beside it"),
        (b"<!DOCTYPE html><html>404", TINY, "m.caffemodel", "HTML"),
        (TINY_BYTES, "<html><body>moved", "m.caffemodel", "HTML"),
        (TINY_BYTES[: len(TINY_BYTES) // 2], TINY, "m.caffemodel", "truncated, damaged or of another kind"),
        (TINY_BYTES, TINY[: len(TINY) // 2], "m.caffemodel", r"line \d+: "),
        (b"PK\x03\x04", TINY, "m.caffemodel", "a ZIP archive"),
        (b"", TINY, "m.caffemodel", "empty"),
        (TINY_BYTES, "", "m.caffemodel", "no layers"),
        (TINY_BYTES, TINY.replace('"grey"', '"gray"'), "m.caffemodel", "layer gray .* has no weights in the binary"),
        (
            TINY_BYTES,
            TINY.replace("num_output: 2", "num_output: 3"),
            "m.caffemodel",
            "shape 2×1×3×3.*described as|3 numbers fit",
        ),
        (TINY_BYTES, TINY.replace('"ReLU"', '"LRN"'), "m.caffemodel", "layer relu is of the type LRN"),
        (TINY_BYTES, TINY.replace('bottom: "pool"', 'bottom: "grey"'), "m.caffemodel", "its layers branch: fc"),
        (TINY_BYTES, TINY.replace("input_dim: 8", "input_dim: 9", 1), "m.caffemodel", "1×3×9×8"),
        (TINY_BYTES, TINY.replace("stride: 0x2", "stride: 'two'"), "m.caffemodel", "stride is 'two', not a number"),
    ],
)
def test_refusals(tmp_path: Path, binary: bytes | None, text: str | None, name: str, reason: str) -> None:
    assert re.search(reason, read_with(tmp_path, binary, text, name=name))


def test_memory_is_not_reserved_for_what_a_file_claims() -> None:
    """A blob that claims 2^62 numbers has its few bytes."""
    net = tiny()
    net.layer[0].blobs[0].shape.dim[:] = [2**31, 2**31]
    with pytest.raises(Malformed, match="2147483648×2147483648 have 3 values"):
        network_of(decode(memoryview(net.SerializeToString()), "NetParameter"))
