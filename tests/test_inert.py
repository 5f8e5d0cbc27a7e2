"""Files of torch that were made to do harm: written by hand, opcode by opcode, and read in a process of their own."""

import inspect
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors
from deepcluster.core.inert import Inert, _calls
from deepcluster.core.pickles import CALLS, read_plain_pickle
from deepcluster.interop.weight_files import file_of

DEEP = b")" + b"\x85" * 1_000_000  # A tuple in a tuple in a tuple: its hash ends the process.
SIZE = b"(K\x02K\x02t"


def whole(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def tensor(size: bytes = SIZE, stride: bytes = b"(K\x02K\x01t", offset: bytes = b"K\x00", **storage: bytes) -> bytes:
    """As torch writes a tensor of a storage of four numbers."""
    kind, key = storage.get("kind", b"ctorch\nFloatStorage\n"), storage.get("key", b"U\x010")
    reference = b"(U\x07storage" + kind + key + storage.get("device", b"U\x03cpu") + storage.get("count", b"K\x04") + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + offset + size + stride + b"\x89}tR"


def written(path: Path, content: bytes, more: bytes = b"", compression: int = 0, record: bytes = bytes(16)) -> Path:
    """A file {"w": content, "more": more}."""
    pickled = b"\x80\x02}(U\x01w" + content + (b"U\x04more" + more if more else b"") + b"u."
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, part in (("data.pkl", pickled), ("version", b"3\n"), ("data/0", record)):
            file.writestr(f"archive/{name}", part)
    return path


def test_the_file_by_hand_is_one_of_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", tensor())
    assert torch.equal(load_tensors(path)["w"], torch.zeros(2, 2))
    assert torch.equal(torch.load(path)["w"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    "content",
    [
        tensor(key=DEEP),
        tensor(device=DEEP),
        tensor(count=whole(1 << 40)),
        tensor(count=whole(-4)),
        tensor(kind=b"U\x01a"),
        tensor(size=b"(K\x03K\x02t"),
        tensor(offset=b"K\x01"),
        tensor(offset=whole(-1)),
        tensor(stride=b"(" + whole(-1) + b"K\x01t"),
        tensor(stride=b"(" + whole(1 << 61) + b"K\x01t"),
        tensor(size=b"(" + whole(1 << 40) + b"K\x02t", stride=b"(K\x00K\x01t"),
        tensor(size=b"(" + b"K\x01" * 100 + b"t", stride=b"(" + b"K\x00" * 100 + b"t"),
        b"U\x01aQ",
        b"(U\x06moduletQ",
        b"]" + b"q\x01" + b"(h\x01h\x01e" * 3 + b"a" * 40,
        b"\xff",
    ],
)
def test_damage_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: truncated, damaged"):
        load_tensors(written(tmp_path / "a.pth", content))


ODD = (
    b"}" + DEEP + b"Ns",
    b"ccollections\nOrderedDict\n(](" + DEEP + b"N\x86etR",
    DEEP,
    b"]q\x01h\x01a",  # A list that holds itself.
    b"}q\x01U\x05modelh\x01s",
    b"cfoo\nbar\n)\x81q\x01}U\x01ah\x01sb",
    b"cfoo\nbar\n)\x81" * 100_000 + b"b" * 99_999,
    b"cfoo\nbar\n)}\x92",
    b"(cfoo\nbar\nK\x01o",
    b"(K\x01ifoo\nbar\n",
    b"K\x0120",
)


def test_odd_values_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    """They are read, walked through and freed: in another process, as some would end it."""
    paths = [written(tmp_path / f"{number}.pth", tensor(), more) for number, more in enumerate(ODD)]
    code = (
        "import sys; from pathlib import Path; from deepcluster.interop.weight_files import read_file\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    file = read_file(path); assert len(list(file.names())) > 0; print(*sorted(file.tensors)); del file"
    )
    found = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "w\n" * len(ODD)), found.stderr[-500:]


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"_codecs\nencode", b"foo\nbar", b"torch\nSize"])
@pytest.mark.parametrize("state", [b"}U\x0c__defaults__NsN", b"}U\x08__code__Ns", b"N}U\x0c__defaults__)s\x86"])
def test_our_own_functions_can_not_be_changed(name: bytes, state: bytes, tmp_path: Path) -> None:
    def parts() -> list[object]:
        return [
            (key, call.__defaults__, call.__code__, vars(call)) for key, call in calls.items() if inspect.isfunction(call)
        ]

    calls = {**CALLS, **_calls()}
    before = repr(parts())
    path = written(tmp_path / "a.pth", tensor(), b"c" + name + b"\n" + state.removesuffix(b"N") + b"b")
    assert "w" in load_tensors(path)
    assert repr(parts()) == before
    assert {**CALLS, **_calls()} == calls


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "__builtin__.exec"]
)
@pytest.mark.parametrize(
    "call", ["({0}U\x01at{1}R", "(U\x01ai{0}", "({1}U\x01ao", "{1}U\x01a\x85\x81", "{1}U\x01a\x85}}\x92"]
)
def test_names_of_code_are_refused(name: str, call: str, tmp_path: Path) -> None:
    module, _, own = name.rpartition(".")
    line = f"{module}\n{own}\n"
    content = f"c{line}(U\x01atR" if call.startswith("({0}U") else call.format(line, f"c{line}")
    with pytest.raises(InputError, match=r"holds code \(.*\); it is refused, and nothing in it was run"):
        load_tensors(written(tmp_path / "a.pth", tensor(), content.encode("latin1")))


def test_small_files_do_not_fill_the_memory(tmp_path: Path) -> None:
    bomb = written(tmp_path / "a.pth", tensor(), compression=zipfile.ZIP_DEFLATED, record=bytes(1 << 24))
    with pytest.raises(InputError, match="unpacked it would be over 16 times as large"):
        load_tensors(bomb)
    text = b"T" + struct.pack("<i", 1 << 20) + b"a" * (1 << 20)
    copies = b"\x80\x02c_codecs\nencode\nq\x01](" + text + b"q\x02" + b"h\x01h\x02U\x06latin1\x86R" * 1000 + b"e."
    with pytest.raises(InputError, match="it makes more of its content than it holds"):
        read_plain_pickle(copies)
    shape = (
        b"cnumpy.core.numeric\n_frombuffer\n(U\x00cnumpy\ndtype\nU\x02i1\x85R](K\x01e" + whole(1 << 40) + b"\x86U\x01CtR."
    )
    with pytest.raises(InputError, match="a NumPy array of no shape"):
        read_plain_pickle(b"\x80\x02" + shape)


def test_an_archive_of_torch_0_1_is_not_unpacked(tmp_path: Path) -> None:
    """torch.load would unpack it, with links to files elsewhere, whose rights tar sets."""
    target = tmp_path / "target"
    target.touch(mode=0o600)
    with tarfile.open(tmp_path / "a.pth", "w") as file:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(target), 0o777
        file.addfile(link)
    with pytest.raises(InputError, match=r"archive of torch 0\.1"):
        load_tensors(tmp_path / "a.pth")
    assert target.stat().st_mode & 0o777 == 0o600


def test_modules_of_old_files_with_their_source(tmp_path: Path) -> None:
    """Files without zip keep the source of a module's class beside it; torch would write a patch where it differs."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> object:
            if value is nn.Linear and (seen := self.__dict__.setdefault("seen", [])) == []:
                seen.append(value)
                return "module", value, "linear.py", "class Linear: pass"
            if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
                return "storage", torch.FloatStorage, "1", "cpu", 4, None
            return None

    path = tmp_path / "a.pth"
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        layer = nn.Linear(2, 2, bias=False)
        Pickler(file, protocol=2).dump({"model": layer})
        pickle.dump(["1"], file, protocol=2)
        file.write(struct.pack("<q4f", 4, 1, 2, 3, 4))
    found = load_tensors(path)
    assert isinstance(found["model"], Inert)
    assert file_of(found, path).tensors["weight"].tolist() == [[1, 2], [3, 4]]
    assert list(tmp_path.iterdir()) == [path]


def test_a_module_in_many_places_is_read_once(tmp_path: Path) -> None:
    module = Inert("torch.nn.Module")
    module.state = {"_parameters": {"w": torch.ones(1)}}
    facts: dict[str, object] = {"name": "x"}
    for _ in range(60):
        outer = Inert("torch.nn.Module")
        outer.state, module = {"_modules": {"a": module, "b": module}}, outer
        facts = {str(number): facts for number in range(100)}
    file = file_of({"model": module, "facts": facts}, tmp_path / "a.pth")
    assert len(file.tensors) == 1
    assert len(list(file.names())) == 2


def test_a_machine_that_forces_torchs_own_reader_reads_plain_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(3), "lr": 0.1}, tmp_path / "a.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    found = load_tensors(tmp_path / "a.pt")
    assert (found["w"].tolist(), found["lr"]) == ([0, 1, 2], 0.1)
