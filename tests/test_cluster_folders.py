"""A folder per cluster: links, hard links and copies; ranks and names; more images later; what is never touched."""

import hashlib
import ntpath
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ranks_helper import At
from spoiled_images import picture, write_good_images, write_spoiled_images

import deepcluster
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import MARK
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.sources import open_source
from deepcluster.run.cluster_names import write_names
from deepcluster.run.folder_entries import Entries
from deepcluster.run.folder_record import RECORD
from deepcluster.run.portable_names import entry_name, folder_name, looks

QUIET: dict[str, Any] = {"device": "cpu", "workers": 0, "reporter": Reporter(quiet=True)}
HIDDEN = {MARK, RECORD}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in nested folders, and two that can't be read."""
    folder = tmp_path_factory.mktemp("for folders") / "my photos"
    write_good_images(folder / "a b" / "ü", 14, size=(36, 32))
    write_good_images(folder / "c", 10, size=(32, 36))
    write_spoiled_images(folder, 2)
    return folder


@pytest.fixture(scope="module")
def clusters(trained: Path, photos: Path) -> deepcluster.Clusters:
    return deepcluster.assign(trained, photos, **QUIET)


@pytest.fixture
def named(trained: Path, tmp_path: Path) -> Path:
    """The run, with names for some of its clusters."""
    run = tmp_path / "run"
    run.mkdir()
    for entry in trained.iterdir():
        (run / entry.name).symlink_to(entry)
    write_names(run, {0: "dogs: big/small?", 2: "x" * 400, 3: "..."})
    return run


def listing(folder: Path) -> dict[str, Path]:
    """The visible files below a folder, by their path in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def visible(folder: Path) -> dict[str, Path]:
    return {name: path for name, path in listing(folder).items() if name not in HIDDEN}


def expected(clusters: deepcluster.Clusters) -> Counter[str]:
    return Counter(f"cluster-{cluster}" for cluster in clusters.cluster_N.tolist() if cluster >= 0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_holds(folder: Path, photos: Path, clusters: deepcluster.Clusters) -> None:
    """Each image is in the folder of its cluster, with its content, and nothing else is there."""
    found = {(path.parent.name.split()[0], digest(path)) for path in visible(folder).values()}
    wanted = {
        (f"cluster-{cluster}", digest(photos / name))
        for name, cluster in zip(clusters.names, clusters.cluster_N.tolist(), strict=True)
        if cluster >= 0
    }
    assert found == wanted
    assert len(visible(folder)) == sum(clusters.cluster_N >= 0)


@pytest.mark.parametrize("kind", ["", "absolute", "hardlink", "copy"])
def test_every_kind_holds_the_images(
    kind: str, trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    deepcluster.assign(trained, photos, folders=tmp_path / "by", **({kind: True} if kind else {}), **QUIET)
    assert_holds(tmp_path / "by", photos, clusters)
    assert {path.name for path in (tmp_path / "by").iterdir()} == set(expected(clusters)) | HIDDEN
    assert not (tmp_path / "by.part").exists()
    for path in visible(tmp_path / "by").values():
        assert path.is_symlink() == (kind in ("", "absolute"))
        if path.is_symlink():
            assert path.readlink().is_absolute() == (kind == "absolute")
        elif kind == "hardlink":
            assert path.stat().st_nlink >= 2
        else:
            assert path.stat().st_nlink == 1
            original = photos / next(n for n in clusters.names if entry_name(n) == path.name)
            assert path.stat().st_mtime_ns == original.stat().st_mtime_ns


def test_relative_links_stay_when_both_are_moved_and_with_links_on_the_way(
    trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    project = tmp_path / "deep" / "project"
    shutil.copytree(photos, project / "photos")
    (tmp_path / "link").symlink_to(project)  # So that `..` of the path and of the folder differ.
    deepcluster.assign(trained, tmp_path / "link/photos", folders=tmp_path / "link/by", **QUIET)
    assert_holds(project / "by", photos, clusters)
    project.rename(tmp_path / "moved")
    assert_holds(tmp_path / "moved/by", photos, clusters)
    # And none is there twice, although all paths have changed.
    before = listing(tmp_path / "moved/by").keys()
    deepcluster.assign(trained, tmp_path / "moved/photos", folders=tmp_path / "moved/by", add=True, **QUIET)
    assert listing(tmp_path / "moved/by").keys() == before


def test_images_on_another_drive_have_absolute_paths(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where no relative path leads from one drive to another."""
    monkeypatch.setattr(os.path, "relpath", lambda path, start: ntpath.relpath(f"C:{path}", f"D:{start}"))
    source = open_source(photos)
    entries = Entries("absolute", source, Work(), final=tmp_path / "by")
    assert entries.where(0) == str(source.path(0))


def test_ranks_are_those_of_the_distances(
    trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    deepcluster.assign(trained, photos, folders=tmp_path / "by", ranked=True, **QUIET)
    for folder in (path for path in (tmp_path / "by").iterdir() if path.is_dir()):
        number = int(folder.name.removeprefix("cluster-"))
        rows = [row for row in range(len(clusters.names)) if clusters.cluster_N[row] == number]
        rows.sort(key=lambda row: float(clusters.distance_N[row]))
        wanted = [f"{rank:03d}_{entry_name(clusters.names[row])}" for rank, row in enumerate(rows, start=1)]
        assert sorted(path.name for path in folder.iterdir()) == wanted


def test_names_of_clusters_are_in_names_of_folders(named: Path, photos: Path, tmp_path: Path) -> None:
    found = deepcluster.assign(named, photos, folders=tmp_path / "by", out=tmp_path / "t.parquet", **QUIET)
    folders = {path.name for path in (tmp_path / "by").iterdir()} - HIDDEN
    usual = {0: "cluster-0 dogs_ big_small_", 2: f"cluster-2 {'x' * 120}"}
    assert folders == {usual.get(k, f"cluster-{k}") for k in set(found.cluster_N.tolist()) - {-1}}
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    names = {0: "dogs: big/small?", 2: "x" * 400, 3: "..."}
    assert table["cluster_name"] == [names.get(cluster) for cluster in table["cluster"]]
    assert found.cluster_names == names


# More images


def test_new_images_are_put_beside_the_others_and_none_twice(trained: Path, photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for number, path in enumerate(sorted(path for path in photos.rglob("*") if path.is_file())):
        target = (first if number % 3 else second) / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    same_name = next(path for path in first.rglob("*.png"))
    (second / same_name.relative_to(first)).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(99)).save(second / same_name.relative_to(first))  # Another image of this name.
    by = tmp_path / "by"
    for ranked, kind in ((True, "copy"), (False, "absolute")):
        options = {kind: True, "ranked": ranked, **QUIET}
        deepcluster.assign(trained, first, folders=by, **options)
        before = {name: digest(path) for name, path in visible(by).items()}
        for _ in range(2):
            deepcluster.assign(trained, second, folders=by, add=True, **QUIET)  # Ranks and kind are those that are there.
            deepcluster.assign(trained, first, folders=by, add=True, **options)
            after = {name: digest(path) for name, path in visible(by).items()}
            assert before.items() <= after.items()
            readable = sum(int((deepcluster.assign(trained, one, **QUIET).cluster_N >= 0).sum()) for one in (first, second))
            assert len(after) == readable
        assert sum(name.endswith("-2.png") for name in after) <= 1
        assert all(path.is_symlink() == (kind == "absolute") for path in visible(by).values())
        record = pq.read_table(by / RECORD).to_pydict()
        assert sorted(record["file"]) == sorted(after)
        if ranked:
            for cluster in set(record["cluster"]):
                mine = [row for row in range(len(record["file"])) if record["cluster"][row] == cluster]
                old = [record["distance"][row] for row in mine if record["file"][row] in before]
                for row in mine:
                    rank = int(record["file"][row].split("/")[1].split("_")[0])
                    assert rank == 1 + sum(distance < record["distance"][row] for distance in old)
        shutil.rmtree(by)


def test_what_a_user_has_renamed_and_deleted_stays_so(trained: Path, photos: Path, tmp_path: Path) -> None:
    by = tmp_path / "by"
    deepcluster.assign(trained, photos, folders=by, limit=20, **QUIET)
    (folder, *_) = sorted(path for path in by.iterdir() if path.is_dir())
    folder.rename(folder.with_name(f"{folder.name} of mine"))
    gone = next(iter(visible(by).values()))
    gone.unlink()
    before = set(visible(by))
    deepcluster.assign(trained, photos, folders=by, add=True, **QUIET)
    assert before < set(visible(by))
    assert not folder.exists() and not gone.exists()
    links = [path.resolve() for path in visible(by).values()]
    assert len(links) == len(set(links)) == 23


def test_overwrite_replaces_what_is_ours_and_nothing_else(
    trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    by = tmp_path / "by"
    deepcluster.assign(trained, photos, folders=by, copy=True, limit=5, **QUIET)
    deepcluster.assign(trained, photos, folders=by, overwrite=True, **QUIET)
    assert_holds(by, photos, clusters)
    deepcluster.assign(trained, photos, folders=by, copy=True, overwrite=True, **QUIET)
    assert_holds(by, photos, clusters)
    edited = next(iter(visible(by).values()))
    (by / "notes.txt").write_text("mine")
    for path in (by / "notes.txt", edited):
        os.utime(edited, ns=(0, 0))
        before = {name: digest(one) for name, one in listing(by).items()}
        with pytest.raises(InputError, match=r"deepcluster did not put there, or that changed since \(.*"):
            deepcluster.assign(trained, photos, folders=by, overwrite=True, **QUIET)
        assert {name: digest(one) for name, one in listing(by).items()} == before
        path.unlink()


def refused(words: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError) as fault:
        deepcluster.assign(*arguments, **{**QUIET, **options})
    assert words in str(fault.value) and "\n" not in str(fault.value), fault.value


def test_what_does_not_go_together_is_refused(trained: Path, photos: Path, tmp_path: Path) -> None:
    by = tmp_path / "by"
    refused("--copy and --ranked are for --folders DIR", trained, photos, copy=True, ranked=True)
    refused("--add is for --folders DIR", trained, photos, add=True)
    refused("choose --copy or --hardlink", trained, photos, folders=by, copy=True, hardlink=True)
    refused("use one of them", trained, photos, folders=by, add=True, overwrite=True)
    assert not list(tmp_path.iterdir())
    deepcluster.assign(trained, photos, folders=by, limit=3, **QUIET)
    refused("--add puts new images beside them, --overwrite replaces them", trained, photos, folders=by)
    refused("was made without --ranked", trained, photos, folders=by, add=True, ranked=True)
    other = trained / "checkpoints" / "epoch-0001.pt"
    refused("has clusters of another model", other, photos, folders=by, add=True)
    refused("holds images of the data itself", trained, by, folders=by, overwrite=True)
    (by / RECORD).unlink()
    refused("has lost its record", trained, photos, folders=by, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").touch()
    refused("is not an empty folder", trained, photos, folders=tmp_path / "mine", overwrite=True)
    (tmp_path / "new.part").mkdir()
    refused("is in the way, and deepcluster did not write it", trained, photos, folders=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by", "mine", "new.part"]


# What is lost with a folder


def tar_of(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return target


def refused_and_kept(words: str, by: Path, *arguments: Any, **options: Any) -> None:
    before = {name: digest(path) for name, path in listing(by).items()}
    refused(words, *arguments, folders=by, **options)
    assert {name: digest(path) for name, path in listing(by).items()} == before


@pytest.mark.parametrize("kind", ["tar", "parquet", "npz"])
def test_copies_out_of_archives_are_replaced_unless_they_changed(
    kind: str, trained: Path, photos: Path, tmp_path: Path
) -> None:
    data, by, copy = tmp_path / f"data.{kind}", tmp_path / "by", {"copy": True, "overwrite": True}
    if kind == "tar":
        tar_of(photos / "c", data)
    elif kind == "parquet":
        pq.write_table(pa.table({"image": [path.read_bytes() for path in sorted((photos / "c").iterdir())]}), data)
    else:
        np.savez(data, images=np.stack([picture(seed, (20, 20)) for seed in range(6)]))
    deepcluster.assign(trained, data, folders=by, copy=True, **QUIET)
    before = {name: digest(path) for name, path in visible(by).items()}
    deepcluster.assign(trained, photos / "c", folders=by, **copy, **QUIET)  # The archive is still there.
    deepcluster.assign(trained, data, folders=by, **copy, **QUIET)
    deepcluster.assign(trained, data, folders=by, limit=3, **copy, **QUIET)
    deepcluster.assign(trained, data, folders=by, **copy, **QUIET)
    assert {name: digest(path) for name, path in visible(by).items()} == before
    edited = next(iter(visible(by).values()))
    content = edited.read_bytes()
    for new in (content + b"mine", content[::-1]):  # Another size, and the same.
        edited.write_bytes(new)
        refused_and_kept("or that changed since", by, trained, data, **copy)
    edited.unlink()
    data.rename(tmp_path / "moved")
    refused_and_kept("holds the only known copies of", by, trained, photos, **copy)


@pytest.mark.parametrize("kind", ["copy", "hardlink"])
def test_the_only_copy_of_an_image_is_never_deleted(kind: str, trained: Path, photos: Path, tmp_path: Path) -> None:
    data, by, again = tmp_path / "data", tmp_path / "by", {"overwrite": True, kind: True}
    shutil.copytree(photos / "c", data)
    os.link(min(data.iterdir()), data / "zz.png")  # One file of two names: both are in the folder, too.
    deepcluster.assign(trained, data, folders=by, **{kind: True}, **QUIET)
    deepcluster.assign(trained, photos / "c", folders=by, **again, **QUIET)
    deepcluster.assign(trained, data, folders=by, **again, **QUIET)
    data.rename(tmp_path / "renamed")
    deepcluster.assign(trained, tmp_path / "renamed", folders=by, **again, **QUIET)  # The images given are elsewhere.
    for path in (tmp_path / "renamed").iterdir():  # Others of the same names, sizes and times.
        times = path.stat().st_mtime_ns
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[::-1])
        os.utime(path, ns=(times, times))
    (tmp_path / "renamed").rename(data)
    refused_and_kept("holds the only known copies of 11 images, whose files are gone or changed", by, trained, data, **again)
    shutil.rmtree(data)
    data.symlink_to(by)  # What is found behind a link is the same file.
    refused_and_kept("holds the only known copies of 11 images", by, trained, photos, **again)


class Adding(At):
    """Writes a file when copies begin."""

    def __init__(self, file: Path) -> None:
        super().__init__("links and copies", 1)
        self.file = file

    def act(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text("mine")


@pytest.mark.parametrize("is_new", [True, False])
def test_what_is_put_there_meanwhile_stays(is_new: bool, trained: Path, photos: Path, tmp_path: Path) -> None:
    by = tmp_path / "by"
    if not is_new:
        deepcluster.assign(trained, photos, folders=by, limit=4, **QUIET)
    options = {**QUIET, "folders": by, "overwrite": not is_new}
    with pytest.raises(InputError, match=r"deepcluster did not put there, or that changed since \(notes.txt\)"):
        deepcluster.assign(trained, photos, **{**options, "reporter": Adding(by / "notes.txt")})
    assert (by / "notes.txt").read_text() == "mine"
    (by / "notes.txt").unlink()
    deepcluster.assign(trained, photos, **options)
    assert len(visible(by)) == 24


def test_what_is_put_into_an_unfinished_folder_stays(trained: Path, photos: Path, tmp_path: Path) -> None:
    by, part = tmp_path / "by", tmp_path / "by.part"
    with pytest.raises(Interrupted):
        deepcluster.assign(trained, photos, folders=by, copy=True, **{**QUIET, "reporter": At("links and copies", 1)})
    (part / "notes.txt").write_text("mine")
    refused("which a stopped command has left, holds 1 file", trained, photos, folders=by, ranked=True)
    assert (part / "notes.txt").read_text() == "mine"
    deepcluster.assign(trained, photos, folders=by, copy=True, **QUIET)
    assert (by / "notes.txt").read_text() == "mine" and not part.exists()


def test_of_two_commands_at_once_one_fills_a_folder(trained: Path, photos: Path, tmp_path: Path) -> None:
    by = tmp_path / "by"
    out = {"out": tmp_path / "table.csv"}  # The table has a lock of its own.

    class Another(At):
        def act(self) -> None:
            refused(f"--folders {by} is being filled by process {os.getpid()} on ", trained, photos, folders=by, **out)

    deepcluster.assign(trained, photos, folders=by, **{**QUIET, "reporter": Another("links and copies", 1)})
    assert len(visible(by)) == 24
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("table")) == ["by"]


def test_images_that_differ_only_in_content_are_added(trained: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("camA", "camB")):
        (tmp_path / folder).mkdir()
        for seed in range(3):
            Image.fromarray(picture(10 * number + seed, (20, 20))).save(path := tmp_path / folder / f"{seed:04d}.bmp")
            os.utime(path, (10**9, 10**9))
        (tmp_path / f"{folder}.d").mkdir()
        os.utime(tar_of(tmp_path / folder, tmp_path / f"{folder}.d" / "x.tar"), (10**9, 10**9))
    for end, moved in (("", tmp_path / "moved"), (".d/x.tar", tmp_path / "moved.d")):
        by = tmp_path / f"by{end[:2]}"
        data = [tmp_path / f"{folder}{end}" for folder in ("camA", "camB")]
        deepcluster.assign(trained, data[0], folders=by, copy=True, **QUIET)
        for _ in range(2):
            deepcluster.assign(trained, data[1], folders=by, add=True, **QUIET)
            assert len({digest(path) for path in visible(by).values()}) == len(visible(by)) == 6
        (data[0].parent if end else data[0]).rename(moved)
        deepcluster.assign(trained, moved / "x.tar" if end else moved, folders=by, add=True, **QUIET)
        assert len(visible(by)) == 6, "images that were moved are known"


def test_clusters_are_the_same_on_every_device(trained: Path) -> None:
    model = deepcluster.load(trained).on("cpu")
    other = replace(model, machine=replace(model.machine, device=torch.device("cuda")))
    assert model.network == other.network and model.weights != other.weights
    random = model.new_trunk(1)
    assert replace(model, trunk=random).network != model.network


# Disks


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_hard_links_to_another_disk(trained: Path, photos: Path, tmp_path: Path) -> None:
    place = Path("/dev/shm") / tmp_path.name
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk")
    try:
        refused(
            "can't be made there (invalid cross-device link); --copy makes copies",
            trained,
            photos,
            folders=place,
            hardlink=True,
        )
        assert not place.exists()
        deepcluster.assign(trained, photos, folders=place, limit=3, **QUIET)
        assert all(path.readlink().is_absolute() for path in visible(place).values()), "links between disks are absolute"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_disk_without_links(trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT and Windows refuse them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    refused("can't be made there (operation not permitted); --copy makes copies", trained, photos, folders=tmp_path / "by")
    assert not list(tmp_path.iterdir())
    deepcluster.assign(trained, photos, folders=tmp_path / "by", copy=True, **QUIET)


def test_a_full_disk_leaves_no_half_copies(
    trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    """A limit on the size of files stops the copy of the largest image; afterwards the same command continues."""
    code = (
        "import resource, signal, sys; from deepcluster.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from deepcluster.run import cluster_folders as module\n"
        "before = module.make_folders\n"
        "def limited(*a, **k):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))\n"
        "    return before(*a, **k)\n"
        "from deepcluster.applied import assigning; assigning.make_folders = limited\n"
        "sys.exit(main(sys.argv[1:-1]))"
    )
    sizes = sorted(path.stat().st_size for path in photos.rglob("*") if path.is_file())
    command = ["assign", str(trained), str(photos), "--folders", str(tmp_path / "by"), "--copy", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, str(sizes[-3])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "could not write" in done.stderr and "the same command continues" in done.stderr
    wanted = {digest(path) for path in photos.rglob("*") if path.is_file()}
    left = [path for name, path in listing(tmp_path / "by.part").items() if name.startswith("cluster-")]
    assert {digest(path) for path in left} <= wanted
    assert len(left) < sum(clusters.cluster_N >= 0)
    deepcluster.assign(trained, photos, folders=tmp_path / "by", copy=True, **QUIET)
    assert_holds(tmp_path / "by", photos, clusters)


def test_more_than_a_disk_holds_is_refused_before_the_work(trained: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    shutil.copytree(photos / "c", tmp_path / "huge/c")
    with (tmp_path / "huge/c/large.png").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free * 2)  # Without taking space.
    refused("--copy needs", trained, tmp_path / "huge", folders=tmp_path / "by", copy=True)
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]
    deepcluster.assign(trained, photos / "c", folders=tmp_path / "by", copy=True, **QUIET)
    refused("--copy needs", trained, tmp_path / "huge", folders=tmp_path / "by", add=True)
    assert len(visible(tmp_path / "by")) == 10


@pytest.mark.parametrize("add", [False, True])
def test_a_stopped_copy_goes_on(
    add: bool, trained: Path, photos: Path, clusters: deepcluster.Clusters, tmp_path: Path
) -> None:
    by, options = tmp_path / "by", {"copy": True, "batch_size": 4, **QUIET}
    if add:
        deepcluster.assign(trained, photos, folders=by, limit=2, **options)
    with pytest.raises(Interrupted, match="the same command continues"):
        deepcluster.assign(trained, photos, folders=by, add=add, **{**options, "reporter": At("links and copies", 2)})
    place = by if add else tmp_path / "by.part"
    left = {path.stat().st_ino for name, path in listing(place).items() if name.startswith("cluster-")}
    assert 2 < len(left) < 24
    deepcluster.assign(trained, photos, folders=by, add=add, **options)
    assert_holds(by, photos, clusters)
    assert left <= {path.stat().st_ino for path in visible(by).values()}, "nothing was copied twice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by"]


# Data without files of its own, and data with folders of ours in it


def test_copies_of_images_in_tables_and_arrays(trained: Path, photos: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted((photos / "c").iterdir())]
    pq.write_table(pa.table({"image": files}), tmp_path / "t.parquet")
    deepcluster.assign(trained, tmp_path / "t.parquet", folders=tmp_path / "by", copy=True, **QUIET)
    assert {digest(path) for path in visible(tmp_path / "by").values()} == {hashlib.sha256(one).hexdigest() for one in files}
    assert all(re.fullmatch(r"t\.parquet__\d{6}\.\w{3,4}", path.name) for path in visible(tmp_path / "by").values())
    array = np.stack([picture(seed, (20, 20)) for seed in range(6)])
    np.save(tmp_path / "a.npy", array)
    for _ in range(2):
        deepcluster.assign(trained, tmp_path / "a.npy", folders=tmp_path / "by", copy=True, add=True, **QUIET)
        made = [path for path in visible(tmp_path / "by").values() if path.name.startswith("a.npy")]
        assert {Image.open(path).tobytes() for path in made} == {one.tobytes() for one in array}
        assert len(made) == 6 and all(path.suffix == ".png" for path in made)
    refused("these images are none: --copy writes files", trained, tmp_path / "t.parquet", folders=tmp_path / "l")
    mixed = deepcluster.assign(trained, [tmp_path / "t.parquet", photos / "c"], folders=tmp_path / "m", **QUIET)
    assert len(visible(tmp_path / "m")) == 10 and len(mixed.names) == 20


def test_folders_of_copies_in_the_data_are_no_data(trained: Path, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    names = [open_source(data).name(index) for index in range(len(open_source(data)))]
    for options in ({"copy": True}, {"copy": True, "overwrite": True}, {"add": True}):
        deepcluster.assign(trained, data, folders=data / "by", **options, **QUIET)
        with pytest.raises(Interrupted):
            reporter = At("links and copies", 1)
            deepcluster.assign(trained, data, folders=data / "more", copy=True, **{**QUIET, "reporter": reporter})
        source = open_source(data)
        assert [source.name(index) for index in range(len(source))] == names
        assert "folders that deepcluster wrote left out (by, more.part)" in source.describe()
    deepcluster.assign(trained, data, out=data / "t.csv", **QUIET)
    assert len(open_source(data)) == len(names)


# Names


NAMES = st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=300).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=100)
@given(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["", "001_"]), st.sampled_from(["", "-12"]))
def test_names_are_such_as_every_system_takes(parts: list[str], prefix: str, suffix: str) -> None:
    name = entry_name("/".join(parts), prefix=prefix, suffix=suffix)
    assert name.startswith(prefix) and 0 < len(os.fsencode(name)) <= 255
    assert not set(name) & set('<>:"/\\|?*') and not any(ord(letter) < 32 for letter in name)
    assert not name.endswith((".", " "))
    assert not re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE)
    assert looks(name) == looks(looks(name))
    folder = folder_name("/".join(parts))
    assert len(os.fsencode(folder)) <= 120 and not folder.endswith((".", " "))


def test_names_of_entries() -> None:
    assert entry_name("a/b.jpg") == "a__b.jpg"
    assert entry_name("a.b/c", suffix="-7") == "a-7.b__c"
    assert entry_name("t.tar::x/y.jpg", prefix="012_") == "012_t.tar__x__y.jpg"
    assert entry_name("12:30?.jpg") == "12_30_.jpg" and entry_name("con.jpg") == "_con.jpg"
    for name in ("x/" * 200 + "y.jpg", "é" * 200 + ".JPEG", "😀" * 90):
        short = entry_name(name, suffix="-12")
        assert 250 < len(os.fsencode(short)) <= 255
        assert short.endswith(("-12.jpg", "-12.JPEG", "-12"))


def test_long_and_odd_names_become_entries(trained: Path, photos: Path, tmp_path: Path) -> None:
    content = next(path for path in sorted((photos / "c").iterdir()) if path.suffix == ".png").read_bytes()
    long = "/".join(["f" * 200] * 3 + ["g" * 240 + ".png"])
    odd = [long, "a:b.png", "a?b.png", "a_b.png", "A_B.png", "nul.png", "d./x.png", "d./X.png"]
    for name in odd:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    for options in ({}, {"copy": True, "ranked": True, "overwrite": True}):
        deepcluster.assign(trained, tmp_path / "data", folders=tmp_path / "by", **options, **QUIET)
        found = [path.name for path in visible(tmp_path / "by").values()]
        assert len(found) == len(odd) == len({looks(name) for name in found})


def test_an_image_that_is_deleted_meanwhile_is_left_out(trained: Path, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    reporter = Deleting(next(iter(sorted((data / "c").iterdir()))))
    deepcluster.assign(trained, data, folders=tmp_path / "by", copy=True, **{**QUIET, "reporter": reporter})
    assert len(visible(tmp_path / "by")) == 23


class Deleting(At):
    """Deletes an image when copies begin."""

    def __init__(self, image: Path) -> None:
        super().__init__("links and copies", 1)
        self.image = image

    def act(self) -> None:
        self.image.unlink()
