"""`deepcluster download` from a mirror: data sets that other commands take, licences, and what is printed."""

import hashlib
import io
import json
import os
import pickle
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from http_server import NaughtyServer
from models_helper import write_classes
from numpy.typing import NDArray
from small_runs import flags
from spoiled_images import write_good_images
from vocs import write_voc

import deepcluster
from deepcluster.cli import main
from deepcluster.core import retry
from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.buildings import open_sets
from deepcluster.evaluation.datasets.labelled import open_train_val
from deepcluster.evaluation.datasets.voc import open_voc
from deepcluster.interop.download.catalogue import ENTRIES

CLASSES = ("airplane", "automobile", "bird")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("http_proxy", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def server() -> Iterator[NaughtyServer]:
    with NaughtyServer({}) as one:
        yield one


def serve(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, name: str, *archives: bytes) -> list[str]:
    """Put archives in place of an entry's files on a mirror, with their own sums; return the arguments of the command."""
    entry = ENTRIES[name]
    files = []
    for file, content in zip(entry.files, archives, strict=True):
        parts = urlsplit(file.url)
        server.files[f"{parts.hostname}{parts.path}"] = content
        digest = file.digest and f"md5:{hashlib.md5(content).hexdigest()}"
        files.append(replace(file, digest=digest, bytes=len(content)))
    monkeypatch.setitem(ENTRIES, name, replace(entry, files=tuple(files)))
    return ["download", name, "--mirror", server.at()]


def packed(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def folder_content(folder: Path, top: str = "") -> dict[str, bytes]:
    return {top + str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_addresses_and_sums_are_those_of_torchvision() -> None:
    sets = torchvision.datasets
    known = {
        "cifar10": (sets.CIFAR10.url, sets.CIFAR10.tgz_md5),
        "cifar100": (sets.CIFAR100.url, sets.CIFAR100.tgz_md5),
        "stl10": (sets.STL10.url, sets.STL10.tgz_md5),
        **{
            f"imagenette{ending}": sets.Imagenette._ARCHIVES[size]
            for ending, size in (("", "full"), ("-320", "320px"), ("-160", "160px"))
        },
    }
    for name, (url, md5) in known.items():
        (file,) = ENTRIES[name].files
        assert (file.url, file.digest) == (url, f"md5:{md5}")
    years = torchvision.datasets.voc.DATASET_YEAR_DICT
    for name, parts in (("voc2007", ("2007", "2007-test")), ("voc2012", ("2012",))):
        for file, year in zip(ENTRIES[name].files, parts, strict=True):
            assert (file.digest, file.name) == (f"md5:{years[year]['md5']}", years[year]["filename"])


def test_every_entry_is_listed_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ENTRIES) + 1 and max(map(len, lines)) <= 120
    for line, (name, entry) in zip(lines[1:], ENTRIES.items(), strict=True):
        assert line.startswith(f"{name} ") and entry.about in line and line.endswith(entry.licence.name)
        for file in entry.files:
            assert file.url.startswith("https://") or (file.digest or "").startswith("md5:"), (
                "no file of unknown sum over http"
            )
        for use in entry.uses:
            words = shlex.split(use.format(path="P"))
            assert words[0] == "deepcluster"


def cifar_batch(
    seed: int, count: int, *, fine: bool = False, as_bytes: bool = True
) -> tuple[dict[Any, Any], NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [number % len(CLASSES) for number in range(count)]
    found = {"data": rows, "fine_labels" if fine else "labels": labels, "batch_label": "a batch"}
    found["filenames"] = [f"image_{seed}_{number}.png" for number in range(count)]
    if as_bytes:
        found = {key.encode(): value for key, value in found.items()}  # type: ignore[misc]
        found[b"filenames"] = [name.encode() for name in found[b"filenames"]]  # type: ignore[index]
    return found, rows


def cifar10(protocol: int = 2, *, as_bytes: bool = True, **more: bytes) -> dict[str, bytes]:
    names = [name.encode() if as_bytes else name for name in CLASSES]
    files = {"batches.meta": pickle.dumps({b"label_names" if as_bytes else "label_names": names}, protocol)}
    for number in range(1, 6):
        files[f"data_batch_{number}"] = pickle.dumps(cifar_batch(number, 12, as_bytes=as_bytes)[0], protocol)
    files["test_batch"] = pickle.dumps(cifar_batch(9, 9, as_bytes=as_bytes)[0], protocol)
    return {f"cifar-10-batches-py/{name}": content for name, content in (files | more).items()}


def of_python2(batch: dict[str, Any]) -> bytes:
    """Return a batch as Python 2 and its NumPy pickled it, with protocol 2: as in the published archive."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def listed(values: list[Any]) -> bytes:
        return b"](" + b"".join(b"K" + bytes([one]) if isinstance(one, int) else text(one) for one in values) + b"e"

    rows = batch["data"]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"K" + bytes([len(rows)]) + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    array += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89T" + struct.pack("<i", rows.nbytes) + rows.tobytes() + b"tb"
    parts = [text("data"), array, text("labels"), listed(batch["labels"]), text("filenames"), listed(batch["filenames"])]
    return b"\x80\x02}(" + b"".join(parts) + b"u."


def test_cifar10_as_python_2_wrote_it(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, rows = cifar_batch(3, 7, as_bytes=False)
    theirs = pickle.loads(written := of_python2(batch), encoding="latin1")
    assert (theirs["data"] == rows).all() and theirs["labels"] == batch["labels"]
    assert main(serve(server, monkeypatch, "cifar10", packed(cifar10(test_batch=written)))) == 0
    ours = rows_of(Path("cifar10/test.parquet"))
    assert [label for _, label, _ in ours] == [CLASSES[label] for label in batch["labels"]]
    images_NHWC = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert all((image == wanted).all() for (image, _, _), wanted in zip(ours, images_NHWC, strict=True))
    assert ours[2][2] == "bird/image_3_2.png"


def rows_of(table: Path) -> list[tuple[NDArray[np.uint8], str | None, str]]:
    from PIL import Image

    rows = pq.read_table(table).to_pylist()
    return [(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), row["label"], row["image"]["path"]) for row in rows]


class TinyCifar(torchvision.datasets.CIFAR10):
    """Torchvision's reader of the small files, whose sums it does not know."""

    def _check_integrity(self) -> bool:
        return True

    def _load_meta(self) -> None:
        self.classes = list(CLASSES)


@pytest.mark.parametrize(("protocol", "as_bytes"), [(2, True), (2, False), (4, True)])
def test_cifar10_as_torchvision_reads_it(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: int, as_bytes: bool
) -> None:
    files = cifar10(protocol, as_bytes=as_bytes)
    assert main(serve(server, monkeypatch, "cifar10", packed(files))) == 0
    out = Path("cifar10")
    assert {path.name for path in out.iterdir()} == {"train.parquet", "test.parquet", ".download.json"}
    for name, content in files.items():
        path = tmp_path / "theirs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if protocol == 2 and not as_bytes:  # Torchvision wants text as keys.
        for table, train in (("train", True), ("test", False)):
            theirs = TinyCifar(tmp_path / "theirs", train=train)
            ours = rows_of(out / f"{table}.parquet")
            assert [CLASSES[label] for label in theirs.targets] == [label for _, label, _ in ours]
            assert all((one == other).all() for one, (other, _, _) in zip(theirs.data, ours, strict=True))
    (image, label, name) = rows_of(out / "test.parquet")[4]
    assert (image == cifar_batch(9, 9)[1][4].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert (label, name) == ("automobile", "automobile/image_9_4.png")


def test_what_follows_a_download_works_as_it_is_printed(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(serve(server, monkeypatch, "cifar10", packed(cifar10()))) == 0
    printed = capsys.readouterr().out
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  deepcluster ")]
    train, knn = commands
    assert main([*train, "--out", "run", *flags(epochs=1)]) == 0
    assert "60 images" in (said := capsys.readouterr().out) and "labels" in said
    assert (
        main([*[word.replace("MODEL", "untrained:alexnet-small") for word in knn], "--device", "cpu", "--workers", "0"]) == 0
    )
    parts = open_train_val(Path("cifar10"))
    assert (len(parts.train.source), len(parts.val.source), parts.val.class_names) == (60, 9, list(CLASSES))
    assert main(["info", "cifar10/train.parquet"]) == 0
    server.forget()
    assert main(["download", "cifar10", "--mirror", server.at()]) == 0
    assert not server.requests, "it is there"


def test_cifar100_has_fine_labels(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "meta": pickle.dumps({b"fine_label_names": [name.encode() for name in CLASSES], b"coarse_label_names": [b"x"]}, 2)
    }
    files |= {name: pickle.dumps(cifar_batch(seed, 6, fine=True)[0], 2) for seed, name in enumerate(("train", "test"))}
    archive = packed({f"cifar-100-python/{name}": content for name, content in files.items()})
    assert main([*serve(server, monkeypatch, "cifar100", archive), "--out", "c"]) == 0
    assert [label for _, label, _ in rows_of(Path("c/test.parquet"))] == list(CLASSES) * 2


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (pickle.dumps(_Evil()), "posix.mkdir, which is more than plain values"),
        (b"nonsense", "can't be read"),
        (pickle.dumps([1]), "not a dict"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1]}), "as many `labels`"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.float32), "labels": [0]}), "3072 bytes"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}), "not numbers from 0 to 2"),
    ],
)
def test_batches_that_are_none(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, spoiled: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = serve(server, monkeypatch, "cifar10", packed(cifar10(data_batch_3=spoiled)))
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("evil").exists() and {path.name for path in Path("cifar10").iterdir()} == {".download"}


class TinyStl(torchvision.datasets.STL10):
    """Torchvision's reader of the small files, whose sums it does not know."""

    def _check_integrity(self) -> bool:
        return True


def test_stl10_as_torchvision_reads_it(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {"class_names.txt": "\n".join(CLASSES).encode()}
    for part, count in (("train", 6), ("test", 9), ("unlabeled", 4)):
        files[f"{part}_X.bin"] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()
        if part != "unlabeled":
            files[f"{part}_y.bin"] = bytes(number % 3 + 1 for number in range(count))
    archive = packed({f"stl10_binary/{name}": content for name, content in files.items()})
    assert main(serve(server, monkeypatch, "stl10", archive)) == 0
    for name, content in files.items():
        path = tmp_path / "theirs" / "stl10_binary" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for part in ("train", "test", "unlabeled"):
        theirs = TinyStl(tmp_path / "theirs", split=part)
        ours = rows_of(Path(f"stl10/{part}.parquet"))
        assert all((one.transpose(1, 2, 0) == other).all() for one, (other, _, _) in zip(theirs.data, ours, strict=True))
        wanted = [None if label < 0 else CLASSES[label] for label in theirs.labels]
        assert wanted == [label for _, label, _ in ours]
    parts = open_train_val(Path("stl10"))
    assert (len(parts.train.source), len(parts.val.source)) == (6, 9), "not those without labels"
    assert main(["info", "stl10/unlabeled.parquet"]) == 0


def test_the_archives_of_voc_make_one_devkit(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainval = {"train": {"000001": ["cat"]}, "val": {"000002": ["dog"]}, "trainval": {}}
    archives = []
    for name, splits in (("a", trainval), ("b", {"test": {"000003": ["bird"], "000004": ["cat", "dog"]}})):
        write_voc(tmp_path / name / "VOC2007", splits)
        archives.append(packed(folder_content(tmp_path / name, "VOCdevkit/"), "w:"))
    arguments = serve(server, monkeypatch, "voc2007", *archives)
    assert main([*arguments, "--out", "data/voc", "--keep-archives"]) == 0
    devkit = open_voc(Path("data/voc"))
    assert devkit.name == "VOC2007" and devkit.lists() == ["train", "val", "trainval", "test"]
    assert len(devkit.split("trainval").source) == 2 and len(devkit.split("test").source) == 2
    assert len(list(Path("data/voc/.download").glob("*.tar"))) == 2


def test_buildings_are_laid_out_for_retrieval(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody has published their sums: they are printed, and kept in the cache."""
    for city, names in (("oxford", ("all_souls_000013", "x_000001")), ("paris", ("defense_000605", "y_000001"))):
        write_good_images(tmp_path / city, 2, size=(40, 40))
        images = [path.read_bytes() for path in sorted((tmp_path / city).iterdir())][:2]
        prefix = "" if city == "oxford" else "paris_"
        jpgs = [{f"{prefix and 'paris/a/'}{prefix}{name}.jpg": image} for name, image in zip(names, images, strict=True)]
        query = names[0].rpartition("_")[0]
        lists = {f"{query}_1_query.txt": f"{'oxc1_' if city == 'oxford' else prefix}{names[0]} 1 1 30 30\n"}
        lists |= {f"{query}_1_good.txt": f"{prefix}{names[1]}\n", f"{query}_1_ok.txt": "", f"{query}_1_junk.txt": ""}
        truth = packed({name: content.encode() for name, content in lists.items()})
        parts = [packed(jpgs[0] | jpgs[1])] if city == "oxford" else [packed(one) for one in jpgs]
        name = "oxford5k" if city == "oxford" else "paris6k"
        assert main(serve(server, monkeypatch, name, *parts, truth)) == 0
        (opened,) = open_sets(Path(name))
        assert len(opened.source) == 2 and opened.city == city and len(opened.truths[0].queries) == 1
        assert not list(Path(name).glob("*.sha256"))
    notes = list((tmp_path / "cache" / "downloads").glob("*.sha256"))
    assert {path.name for path in notes} == {
        f"{file.name}.sha256" for name in ("oxford5k", "paris6k") for file in ENTRIES[name].files
    }
    small = ["--pca", "1", "--size", "64", "--levels", "1", "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", "retrieval", "untrained:alexnet-small", "--data", "oxford5k", *small]) == 0


def test_tiny_imagenet_is_left_as_it_is(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {f"train/n0{n}/images/n0{n}_{i}.JPEG": bytes([n, i]) for n in range(2) for i in range(2)}
    files |= {
        "val/val_annotations.txt": b"val_0.JPEG\tn00\t0\t0\t1\t1\n",
        "val/images/val_0.JPEG": b"x",
        "words.txt": b"n00\tdog\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(f"tiny-imagenet-200/{name}", content)
    assert main(serve(server, monkeypatch, "tiny-imagenet", buffer.getvalue())) == 0
    found = folder_content(Path("tiny-imagenet"))
    assert json.loads(found.pop(".download.json"))["name"] == "tiny-imagenet"
    assert found == files


def test_imagenette_is_class_folders(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / "imagenette2-160" / part, 3)
    archive = packed(folder_content(tmp_path / "imagenette2-160", "imagenette2-160/"))
    assert main(serve(server, monkeypatch, "imagenette-160", archive)) == 0
    assert len(open_train_val(Path("imagenette-160")).val.source) == 9


WEIGHTS = "dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"


def test_weights_need_their_licence_to_be_accepted(
    server: NaughtyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[WEIGHTS] = content = os.urandom(5000)
    arguments = ["download", "swav-800ep", "--mirror", server.at()]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "CC BY-NC 4.0" in said.out and "repeat the command with --accept-licence" in said.err
    assert not server.requests and not (tmp_path / "cache").exists(), "nothing before the licence"
    with pytest.raises(InputError, match="accept_licence=True"):
        deepcluster.download("swav-800ep", mirror=server.at())
    assert main([*arguments, "--accept-licence"]) == 0
    said = capsys.readouterr()
    path = tmp_path / "cache" / "models" / "swav-800ep" / "swav_800ep_pretrain.pth.tar"
    assert path.read_bytes() == content and f"deepcluster info {path}" in said.out
    assert said.out.index("CC BY-NC") < said.out.index("downloading") and hashlib.sha256(content).hexdigest() in said.out
    assert deepcluster.download("swav-800ep", "here", mirror=server.at(), accept_licence=True) == Path("here") / path.name


def test_downloaded_weights_are_a_model(server: NaughtyServer, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.resnet50().state_dict()
    buffer = io.BytesIO()
    torch.save({f"module.{name}": value for name, value in state.items() if not name.startswith("fc.")}, buffer)
    server.files[WEIGHTS] = buffer.getvalue()
    assert main(["download", "swav-800ep", "--mirror", server.at(), "--accept-licence"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  deepcluster info ")]
    assert main(shlex.split(lines[0])[1:]) == 0
    assert "resnet50" in capsys.readouterr().out


def test_published_clusters_become_a_table(server: NaughtyServer, capsys: pytest.CaptureFixture[str]) -> None:
    listed = [("n01440764/n01440764_1.JPEG", 7), ("n01443537/n01443537_2.JPEG", 0), ("n01443537/n01443537_3.JPEG", 7)]
    path = "dl.fbaipublicfiles.com/deepcluster/vgg16/vgg16_cluster_assignment.pickle"
    server.files[path] = pickle.dumps(listed, 2)
    assert main(["download", "deepcluster-vgg16-clusters", "--mirror", server.at(), "--accept-licence"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  deepcluster import "))
    assert main(shlex.split(line)[1:]) == 0
    rows = pq.read_table("clusters.parquet").to_pylist()
    assert [(row["name"], row["cluster"]) for row in rows] == listed


def test_models_of_several_files_and_names_with_their_sum(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "dl.fbaipublicfiles.com/deepcluster/alexnet/model."
    server.files |= {f"{base}prototxt": b'name: "pytorch"\ninput: "data"\n', f"{base}caffemodel": b"\x0a\x07pytorch" * 100}
    monkeypatch.setenv("DEEPCLUSTER_MIRROR", server.at())
    found = deepcluster.download("deepcluster-alexnet-caffe", "caffe", accept_licence=True)
    assert found == Path("caffe/model.caffemodel") and found.with_suffix(".prototxt").is_file()
    (file,) = ENTRIES["mmselfsup-deepcluster"].files
    assert file.digest == "sha256:bb8681e2"
    server.files["download.openmmlab.com/mmselfsup/" + file.url.partition("/mmselfsup/")[2]] = b"\x80 other weights"
    assert main(["download", "mmselfsup-deepcluster", "--out", "mm"]) == 2
    said = capsys.readouterr().err
    assert "not one that begins with bb8681e2; it is not kept" in said and not Path("mm").exists()


def test_a_terminal_is_asked(server: NaughtyServer, tmp_path: Path) -> None:
    server.files[WEIGHTS] = b"\x80" * 5000
    for answer, status in (("n", 2), ("y", 0)):
        primary, secondary = os.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "deepcluster", "download", "swav-800ep", "--mirror", server.at(), "--out", "model"],
            stdin=secondary, stdout=secondary, stderr=secondary,
        )  # fmt: skip
        os.close(secondary)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(primary, 1000)
        os.write(primary, f"{answer}\n".encode())
        while True:
            try:
                said += os.read(primary, 1000)
            except OSError:  # It has ended.
                break
        assert process.wait() == status, said
        os.close(primary)
    assert (Path("model") / "swav_800ep_pretrain.pth.tar").is_file()


def test_faults_are_said_in_words(
    server: NaughtyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, status: int = 2) -> str:
        assert main(["download", *arguments]) == status
        return capsys.readouterr().err

    assert "did you mean tiny-imagenet?" in said("tiny-imagnet")
    assert "ImageNet needs an account" in said("ImageNet")
    assert "`deepcluster download --list` shows them" in said()
    mirror = ("--mirror", server.at())
    text = said("cifar10", *mirror)
    assert (
        "does not exist (the server answered 404" in text and "save it as cifar10/.download/cifar-10-python.tar.gz" in text
    )
    assert not Path("cifar10").exists()
    arguments = serve(server, monkeypatch, "cifar10", packed(cifar10()))[1:]
    Path("mine").mkdir()
    Path("mine/file").touch()
    assert "--out mine is not an empty folder" in said(*arguments, "--out", "mine")
    assert "is a file or can't be written to" in said(*arguments, "--out", "mine/file")
    server.files = dict.fromkeys(server.files, b"<!DOCTYPE html><html>moved</html>")
    assert "does not give the file: it is HTML" in said(*arguments)
    server.files = dict.fromkeys(server.files, packed({"x": b"other"}))
    assert "another file than was published: its MD5 is" in said(*arguments)
    assert [path.name for path in Path().iterdir()] == ["mine"]


def test_an_archive_that_is_there_is_used(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(cifar10())
    arguments = serve(server, monkeypatch, "cifar10", archive)
    place = Path("cifar10/.download/cifar-10-python.tar.gz")
    place.parent.mkdir(parents=True)
    place.write_bytes(archive)
    assert main(arguments) == 0
    assert not server.requests and not place.exists()


def test_stopped_anywhere_the_same_command_completes(server: NaughtyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = serve(server, monkeypatch, "cifar10", packed(cifar10()))
    work = Path("cifar10/.download")
    (work / "unpacked").mkdir(parents=True)
    (work / "unpacked" / "data_batch_1").write_bytes(b"half")  # Stopped while it was unpacked,
    (work / "converted").mkdir()
    (work / "converted" / "train.parquet").write_bytes(b"half")  # or converted.
    assert main(arguments) == 0
    done = folder_content(Path("cifar10"))
    made = work / "made"  # Stopped while the files were moved up.
    made.mkdir(parents=True)
    for name in ("test.parquet", ".download.json"):
        (Path("cifar10") / name).rename(made / name)
    assert main(arguments) == 0
    assert folder_content(Path("cifar10")) == done


def test_ctrl_c_in_a_real_process_then_the_same_command(server: NaughtyServer) -> None:
    server.files["dl.fbaipublicfiles.com/deepcluster/selav2_400ep_pretrain.pth.tar"] = content = os.urandom(300_000)
    server.bytes_per_second = 100_000
    command = [sys.executable, "-m", "deepcluster", "download", "selav2-400ep", "--accept-licence", "--out", "m"]
    process = subprocess.Popen(
        [*command, "--mirror", server.at()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    part = Path("m/selav2_400ep_pretrain.pth.tar.part")
    while not part.is_file() or part.stat().st_size < 20_000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"deepcluster: stopped; \d+ kB of 300 kB are kept in m/.*\.part: the same command continues\n", error
    )
    server.bytes_per_second = None
    again = subprocess.run([*command, "--mirror", server.at()], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "continuing selav2_400ep_pretrain.pth.tar at" in again.stdout
    assert Path("m/selav2_400ep_pretrain.pth.tar").read_bytes() == content
    assert "Range" in server.headers and "torch" not in again.stderr
