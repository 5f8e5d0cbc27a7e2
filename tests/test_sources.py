"""Sources: what is found, in which order, under which names, and what a person is told when DATA isn't right."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from spoiled_images import write_good_images

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.decode import decode
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.data.sources.lists import parse_pairs
from deepcluster.data.storage import LocalFile

DIGITS = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def paths(source: ImageSource) -> list[Path | None]:
    return [source.path(index) for index in range(len(source))]


def labels(source: ImageSource) -> list[str | None] | None:
    if source.labels_N is None:
        return None
    assert source.labels_N.dtype == np.int64
    return [source.class_names[label] if label >= 0 else None for label in source.labels_N]


def complaint(data: str | Path | Sequence[str | Path], limit: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_source(data, limit)
    return str(caught.value)


# Folders


def test_a_folder_gives_every_image_sorted_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/b/c.webp", "a.b/x.Jpeg", "a-b/x.tif", "c.avif", "d.JFIF", "B.jpg")
    source = open_source(tmp_path)
    assert names(source) == [
        "B.jpg", "a-b/x.tif", "a.b/x.Jpeg", "a/b/c.webp", "a/z.PNG", "b.jpg", "c.avif", "d.JFIF",
    ]  # fmt: skip
    assert [source.read(index) for index in range(len(source))] == [name.encode() for name in names(source)]
    assert names(open_source(str(tmp_path) + "/")) == names(source)
    assert source.labels_N is None
    assert source.class_names == []


def test_hidden_files_and_other_files_are_skipped_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.JPG", ".b.jpg", ".cache/c.jpg", "__MACOSX/d.jpg", "x/Thumbs.db", "x/readme", "jpg")
    source = open_source(tmp_path)
    assert names(source) == ["a.jpg", "b.JPG"]
    want = "2 images in 1 folder (.JPG 1, .jpg 1), 3 other files skipped (no ending 2, .db 1), "
    left_out = "2 hidden or system folders left out (.cache, __MACOSX), 1 hidden file left out"
    assert source.describe() == want + left_out


def test_folders_with_the_images_of_one_class_each_give_labels(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/more/2.jpg", "ant/3.jpg", "dog/4.jpg", "empty/notes.txt")
    source = open_source(tmp_path)
    assert source.class_names == ["ant", "cat", "dog"]
    assert labels(source) == ["ant", "cat", "cat", "dog"]
    assert source.describe() == (
        "4 images in 4 folders (.jpg 4), labels from 3 class folders (used for diagnostics only), "
        "1 other file skipped (.txt 1)"
    )


@pytest.mark.parametrize("files", [["cat/1.jpg", "dog/2.jpg", "3.jpg"], ["cat/1.jpg", "cat/x/2.jpg"]])
def test_an_image_at_the_root_or_a_single_folder_gives_no_labels(tmp_path: Path, files: list[str]) -> None:
    assert open_source(touch(tmp_path, *files)).labels_N is None


def test_split_folders_are_no_classes(tmp_path: Path) -> None:
    inner = touch(tmp_path / "a", "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "Test/eel/4.jpg")
    assert labels(open_source(inner)) == ["eel", "cat", "dog", "cat"]
    flat = touch(tmp_path / "b", "train/1.jpg", "val/2.jpg")
    assert labels(open_source(flat)) is None
    half = touch(tmp_path / "c", "train/cat/1.jpg", "val/2.jpg")
    assert labels(open_source(half)) is None
    other = touch(tmp_path / "d", "train/cat/1.jpg", "boats/cat/2.jpg")
    assert labels(open_source(other)) == ["boats", "train"]


def test_class_folders_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "10/a.jpg", "9/b.jpg", "0/c.jpg"))
    assert source.class_names == ["0", "9", "10"]
    assert source.labels_N is not None
    assert source.labels_N.tolist() == [0, 2, 1]  # in the order of the paths: 0/, 10/, 9/


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "x.jpg", "more/y.jpg")
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "one.jpg").symlink_to(elsewhere / "x.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "a/up").symlink_to(root)
    (root / "a/to-b").symlink_to(root / "b")
    (root / "b/to-a").symlink_to(root / "a")
    source = open_source(root)
    assert names(source) == [
        "a/1.jpg", "a/to-b/2.jpg", "b/2.jpg", "b/to-a/1.jpg",
        "gone.jpg", "linked/more/y.jpg", "linked/x.jpg", "one.jpg",
    ]  # fmt: skip
    assert source.read(7) == b"x.jpg"


def test_a_file_that_has_gone_is_unreadable(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "a.jpg", "b.jpg"))
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(1)
    (tmp_path / "b.jpg").mkdir()
    with pytest.raises(UnreadableImage, match="directory"):
        source.read(1)


def test_a_folder_that_may_not_be_opened_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_source(tmp_path).describe() == "1 image in 1 folder (.jpg 1), 1 folder could not be opened"
    assert complaint(tmp_path / "closed").endswith("; 1 folder could not be opened")


def test_names_that_are_not_utf8_can_be_printed_and_the_file_still_read(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"latin")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    touch(tmp_path, "é.jpg")
    source = open_source(tmp_path)
    assert names(source) == ["caf\\xe9.jpg", "é.jpg"]
    assert source.read(0) == b"latin"
    assert fingerprint(source)


def test_a_scan_asks_for_folders_and_not_for_files(tmp_path: Path) -> None:
    """Links to one file, since they are cheap to make. Opening or looking up each would take several times as long."""
    count = 20_000
    touch(tmp_path, "0.jpg")
    for number in range(1, count):
        os.link(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
    start = time.perf_counter()
    source = open_source(tmp_path)
    assert len(source) == count
    assert time.perf_counter() - start < 2  # 0.03 s where this was written; the rest is for a busy machine.
    whole = "\0".join([str(count), *names(source)])
    assert fingerprint(source) == hashlib.sha256(whole.encode()).hexdigest()[:16]


# Lists and tables


def test_a_list_keeps_its_order_and_is_relative_to_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "in/b.jpg", "in/a.jpg", "in/deep/c c.png")
    file = tmp_path / "in/list.txt"
    file.write_text("\ufeffb.jpg\r\n# a comment\n\n  ./a.jpg  \ndeep/../deep/c c.png\na.jpg\n", encoding="utf-8")
    source = open_source(file)
    assert names(source) == ["b.jpg", "a.jpg", "deep/c c.png"]
    assert source.read(2) == b"in/deep/c c.png"
    assert source.describe() == ("3 images in 2 folders (.jpg 2, .png 1), listed in list.txt, 1 repeated line skipped")


def test_paths_outside_the_folder_of_the_list_are_named_from_the_folder_that_holds_all(tmp_path: Path) -> None:
    touch(tmp_path, "photos/x/a.jpg", "photos/y/b.jpg", "lists/c.jpg")
    file = tmp_path / "lists/all.lst"
    file.write_text(f"{tmp_path}/photos/x/a.jpg\n../photos/y/b.jpg\n")
    source = open_source(file)
    assert names(source) == ["x/a.jpg", "y/b.jpg"]
    assert source.read(1) == b"photos/y/b.jpg"
    file.write_text(f"{tmp_path}/photos/x/a.jpg\nc.jpg\n")
    assert names(open_source(file)) == ["photos/x/a.jpg", "lists/c.jpg"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("t.csv", "path,label\nb.jpg,dog\na.jpg,cat\nc.jpg,\n"),
        ("t.csv", '\ufeffid;Image_Path;Target\r\n1;"b.jpg";dog\r\n2;a.jpg;cat\r\n\r\n3;c.jpg\r\n'),
        ("t.tsv", "class\tfile_name\ndog\tb.jpg\ncat\ta.jpg\n-1\tc.jpg\ncat\tb.jpg\n"),
    ],
)
def test_a_table_gives_paths_and_labels(tmp_path: Path, file: str, text: str) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    source = open_source(tmp_path / file)
    assert names(source) == ["b.jpg", "a.jpg", "c.jpg"]
    assert source.class_names == ["cat", "dog"]
    assert labels(source) == ["dog", "cat", None]
    assert "listed in t." in source.describe()
    assert "2 classes from column" in source.describe()


def test_a_table_without_labels_gives_none(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text("filename,label\na.jpg,\n")
    assert open_source(tmp_path / "t.csv").labels_N is None


def test_a_few_missing_files_of_a_list_are_reported_as_they_are_read(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.jpg" for number in range(19)))
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg\n" for number in range(20)))
    source = open_source(tmp_path / "list.txt")
    assert len(source) == 20
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(19)


def test_a_list_of_missing_files_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg", "1.jpg")
    file = tmp_path / "list.txt"
    file.write_text("".join(f"{number}.jpg\n" for number in range(6)))
    message = complaint(file)
    assert "4 of the 6 paths checked" in message
    assert "2.jpg, 3.jpg, 4.jpg, ..." in message
    assert str(tmp_path) in message
    assert "columns path,label" not in message
    file.write_text("a 3\nb 5\n")
    assert "columns path,label" in complaint(file)
    file.write_text("".join(f"gone/{number}.jpg\n" for number in range(10_001)))
    assert "1,000 of the 1,000 paths checked" in complaint(file)


def test_empty_and_unreadable_lists_are_refused(tmp_path: Path) -> None:
    for name, text, words in [
        ("a.txt", "", "names no images"),
        ("b.txt", "# nothing\n\n", "names no images"),
        ("c.csv", "path,label\n", "names no images"),
        ("d.csv", "", "it is empty"),
    ]:
        (tmp_path / name).write_text(text)
        assert words in complaint(tmp_path / name)
    (tmp_path / "f.txt").write_text("a book " * 100 + "\n\0\n")
    assert "2 of the 2 paths checked" in complaint(tmp_path / "f.txt")
    (tmp_path / "e.txt").write_bytes(b"caf\xe9.jpg\n")
    assert "UTF-8" in complaint(tmp_path / "e.txt")


def test_a_table_without_a_column_of_paths_is_refused_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("pathh,lbl\na,1\n")
    message = complaint(tmp_path / "t.csv")
    assert "its first line names pathh, lbl (did you mean path?)" in message
    assert "name one of the columns path" in message


def test_a_row_longer_than_the_header_has_no_label_to_give(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("path\na.jpg,dog\nb.jpg\n")
    source = open_source(tmp_path / "t.csv")
    assert names(source) == ["a.jpg", "b.jpg"]
    assert source.labels_N is None


def test_the_first_label_of_a_repeated_row_counts(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("path,label\na.jpg,dog\nb.jpg,\n./a.jpg,cat\nb.jpg,cat\n")
    source = open_source(tmp_path / "t.csv")
    assert names(source) == ["a.jpg", "b.jpg"]
    assert labels(source) == ["dog", None]
    assert "2 repeated lines skipped" in source.describe()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("m.txt", "a.jpg\nhttps://example.org/b.jpg\n# s3://no\ns3://bucket/c.jpg\nd:/e.jpg\nodd://\n"),
        ("m.csv", "label,path\n1,a.jpg\n2,https://example.org/b.jpg\n3,s3://bucket/c.jpg\n4,d:/e.jpg\n5,odd://\n"),
    ],
)
def test_a_list_of_both_addresses_and_paths_is_refused(tmp_path: Path, file: str, text: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / file).write_text(text)
    message = complaint(tmp_path / file)
    assert "must be in one place, but" in message
    for words in ("this machine 2 (such as a.jpg)", "https://example.org 1 (such as", "s3://bucket 1 (such as"):
        assert words in message
    assert "make a list for each; they can be given together" in message


def test_lists_and_tables_are_read_from_text_alone() -> None:
    assert parse_pairs("a b.jpg\r\n\n#c\n s3://d/e.png \n", "l.txt") == ([("a b.jpg", ""), ("s3://d/e.png", "")], [])
    rows = parse_pairs("n\tlabel\tname\n1\tdog\ta,b.jpg\n2\t-1\t s3://c \n3\n", "t.tsv")
    assert rows == ([("a,b.jpg", "dog"), ("s3://c", "")], ["1 class from column label", "1 without a label"])
    with pytest.raises(InputError, match=r"https://x/t\.csv has no column of image paths: its first line names a, b"):
        parse_pairs("a;b\n1;2\n", "https://x/t.csv")


def test_a_list_is_what_it_was_when_it_was_opened(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    source = open_source(tmp_path / "list.txt")
    (tmp_path / "b.jpg").unlink()
    assert source.changed() is None
    assert source.stamp(0).startswith("5-")
    assert source.stamp(1) == ""
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n\0.jpg\n" + "a.jpg\n" * 20)
    assert open_source(tmp_path / "list.txt").stamp(2) == ""


def test_lines_may_end_as_on_any_system(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "l.txt").write_bytes(end.join(["# x", "b.jpg", "", "a.jpg"]).encode())
        (tmp_path / "t.csv").write_bytes(end.join(["path;label", "b.jpg;1", "a.jpg;2"]).encode())
        assert names(open_source(tmp_path / "l.txt")) == names(open_source(tmp_path / "t.csv")) == ["b.jpg", "a.jpg"]


def test_a_pickled_list_reads_the_same_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "é.jpg")
    (tmp_path / "list.csv").write_text("path,label\né.jpg,x\na.jpg,y\n", encoding="utf-8")
    source = open_source(tmp_path / "list.csv")
    copy = pickle.loads(pickle.dumps(source))
    assert (names(copy), labels(copy), paths(copy)) == (names(source), labels(source), paths(source))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(source.read, range(2)) == [b"\xc3\xa9.jpg", b"a.jpg"]
            assert pool.map(source.stamp, range(2)) == [source.stamp(0), source.stamp(1)]


# Arrays


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (DIGITS, DIGITS),
        (DIGITS[..., None], DIGITS[..., None]),
        (np.stack([DIGITS] * 3, axis=-1), np.stack([DIGITS] * 3, axis=-1)),
        (np.stack([DIGITS] * 3, axis=1), np.stack([DIGITS] * 3, axis=-1)),  # N x 3 x H x W
        (DIGITS[:, None], DIGITS[..., None]),
        (np.zeros((2, 3, 5, 3), np.uint8), np.zeros((2, 3, 5, 3), np.uint8)),  # could be either: H x W x 3 it is
    ],
)
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_arrays_give_their_images(tmp_path: Path, ending: str, array: NDArray[np.uint8], want: NDArray[np.uint8]) -> None:
    file = tmp_path / f"digits{ending}"
    np.save(file, array) if ending == ".npy" else np.savez(file, images=array)
    source = open_source(file)
    assert len(source) == len(want)
    assert names(source)[:2] == [f"digits{ending}::000000", f"digits{ending}::000001"]
    for index in range(len(source)):
        image = source.read(index)
        assert isinstance(image, np.ndarray)
        np.testing.assert_array_equal(image, want[index])
        assert decode(image).shape == (*want.shape[1:3], 3)
    assert labels(source) is None


def test_an_npz_gives_labels_under_any_of_the_usual_keys(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    np.savez(file, x_train=DIGITS, y_train=np.array([[3], [10], [3], [-1], [7], [10]]))
    source = open_source(file)
    assert source.class_names == ["3", "7", "10"]
    assert labels(source) == ["3", "10", "3", None, "7", "10"]
    assert source.describe() == "6 images of 5 x 4 pixels in d.npz, 3 classes, 1 without a label"
    np.savez(file, X=DIGITS, labels=np.array(["b", "a", "", "b", "a", "b"]))
    assert labels(open_source(file)) == ["b", "a", None, "b", "a", "b"]


def test_an_open_array_goes_to_worker_processes_as_a_path(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.zeros((1000, 32, 32), np.uint8))
    sent = pickle.dumps(open_source(tmp_path / "big.npy"))
    assert len(sent) < 1000
    assert len(pickle.loads(sent)) == 1000


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": DIGITS.astype(np.float32)}, "float32"),
        ({"images": DIGITS[0]}, "4 x 5"),
        ({"images": np.zeros((2, 9, 9, 2), np.uint8)}, "2 x 9 x 9 x 2"),
        ({"images": DIGITS[:0]}, "0 x 4 x 5"),
        ({"images": DIGITS, "labels": np.zeros(5, int)}, "6 images, but labels of shape 5"),
        ({"images": DIGITS, "y": np.zeros((6, 2))}, "6 images, but labels of shape 6 x 2"),
        ({"pixels": DIGITS, "mean": np.zeros(1)}, "it holds pixels, mean"),
        ({"images": np.array([DIGITS, None], object)}, "Python objects"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_what_they_are(
    tmp_path: Path, arrays: dict[str, NDArray[np.generic]], words: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert words in complaint(tmp_path / "a.npz")


def test_a_damaged_or_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([1, "a"], object), allow_pickle=True)
    assert "Python objects" in complaint(tmp_path / "o.npy")
    (tmp_path / "p.npy").write_bytes(pickle.dumps([1]))
    assert "Python objects" in complaint(tmp_path / "p.npy")
    np.savez(tmp_path / "z.npz", images=DIGITS)
    whole = (tmp_path / "z.npz").read_bytes()
    (tmp_path / "z.npz").write_bytes(whole[: len(whole) // 2])
    assert str(tmp_path / "z.npz") in complaint(tmp_path / "z.npz")
    (tmp_path / "e.npz").write_bytes(b"")
    assert "can't be read" in complaint(tmp_path / "e.npz")


# Several sources, limits, fingerprints


def test_several_sources_follow_one_another_under_names_of_their_own(tmp_path: Path) -> None:
    first = touch(tmp_path / "x/photos", "cat/1.jpg", "dog/2.jpg")
    second = touch(tmp_path / "y/photos", "bee/1.jpg", "cat/1.jpg")
    plain = touch(tmp_path / "plain", "1.jpg")
    np.savez(tmp_path / "d.npz", images=DIGITS[:2], y=np.array(["eel", "cat"]))
    source = open_source([first, second, plain, tmp_path / "d.npz"])
    assert names(source) == [
        "photos/cat/1.jpg", "photos/dog/2.jpg", "photos-2/bee/1.jpg", "photos-2/cat/1.jpg", "plain/1.jpg",
        "d.npz::000000", "d.npz::000001",
    ]  # fmt: skip
    assert source.class_names == ["bee", "cat", "dog", "eel"]
    assert labels(source) == ["cat", "dog", "bee", "cat", None, "eel", "cat"]
    assert source.read(2) == b"bee/1.jpg"
    np.testing.assert_array_equal(source.read(6), DIGITS[1])
    assert source.describe().startswith("7 images from 4 sources: photos: 2 images in 2 folders")
    with pytest.raises(IndexError):
        source.name(7)
    assert names(open_source([plain])) == ["1.jpg"]
    assert len(set(names(open_source([tmp_path / "d.npz"] * 3)))) == 6


def test_the_path_of_an_image_is_absolute_and_none_inside_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/deep/a.jpg", "in/b c.png", "lists/c.jpg")
    (tmp_path / "lists/list.txt").write_text("c.jpg\n../in/deep/a.jpg\n")
    np.save(tmp_path / "d.npy", DIGITS[:2])
    monkeypatch.chdir(tmp_path)
    folder, listed, array = open_source("in"), open_source("lists/list.txt"), open_source("d.npy")
    joined = open_source(["in", "d.npy", "lists/list.txt"])
    limited = open_source(["in", "d.npy", "lists/list.txt"], limit=3)
    monkeypatch.chdir("/")
    in_folder = [tmp_path / "in/b c.png", tmp_path / "in/deep/a.jpg"]
    in_list = [tmp_path / "lists/c.jpg", tmp_path / "in/deep/a.jpg"]
    assert paths(folder) == in_folder
    assert paths(listed) == in_list
    assert paths(array) == [None, None]
    assert paths(joined) == [*in_folder, None, None, *in_list]
    assert paths(limited) == [in_folder[0], None, in_list[0]]
    assert folder.read(0) == in_folder[0].read_bytes()


def test_the_path_of_a_link_is_the_link(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/x.jpg", "root/a.jpg")
    (tmp_path / "root/b.jpg").symlink_to(tmp_path / "elsewhere/x.jpg")
    assert paths(open_source(tmp_path / "root")) == [tmp_path / "root/a.jpg", tmp_path / "root/b.jpg"]


def test_names_stay_apart_where_a_folder_is_already_called_so(tmp_path: Path) -> None:
    folders = [touch(tmp_path / where, "1.jpg") for where in ("a/p", "b/p", "c/p-2", "d/p")]
    assert names(open_source(folders)) == ["p/1.jpg", "p-3/1.jpg", "p-2/1.jpg", "p-4/1.jpg"]


@pytest.mark.parametrize("limit", [1, 3, 7, 99, 100, 1000])
def test_a_limit_takes_images_evenly(tmp_path: Path, limit: int) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((100, 1, 1), np.uint8), y=np.arange(100) // 10)
    whole, some = open_source(tmp_path / "a.npz"), open_source(tmp_path / "a.npz", limit)
    kept = [index * 100 // min(limit, 100) for index in range(min(limit, 100))]
    assert names(some) == [whole.name(index) for index in kept]
    assert labels(some) == [str(index // 10) for index in kept]
    assert some.class_names == whole.class_names
    if limit < 100:
        start = f"{limit} of 100 images (--limit) of 1 x 1 pixels"
        assert some.describe().startswith(start)


def test_joined_and_limited_sources_go_to_worker_processes(tmp_path: Path) -> None:
    for folder, pixel in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", np.full((3, 2, 2), pixel, np.uint8))
    source = open_source([tmp_path / "a/x.npy", tmp_path / "b/x.npy"], limit=4)
    again = pickle.loads(pickle.dumps(source))
    assert [again.name(index) for index in range(4)] == [source.name(index) for index in range(4)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(source.read, range(4)))
    for index in range(4):
        np.testing.assert_array_equal(again.read(index), source.read(index))
        np.testing.assert_array_equal(found[index], source.read(index))


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    for limit in (0, -5):
        assert f"limit={limit}" in complaint(tmp_path, limit)


def test_the_fingerprint_follows_the_names_and_their_order(tmp_path: Path) -> None:
    touch(tmp_path / "a", "1.jpg", "2.jpg")
    touch(tmp_path / "b", "1.jpg", "2.jpg")
    touch(tmp_path / "c", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "a/back.txt").write_text("2.jpg\n1.jpg\n")
    prints = [fingerprint(open_source(tmp_path / name)) for name in ("a", "b", "c", "a/back.txt")]
    assert prints[0] == prints[1] == hashlib.sha256(b"2\x001.jpg\x002.jpg").hexdigest()[:16]
    assert len(set(prints)) == 3
    assert fingerprint(open_source(tmp_path / "c", limit=2)) == prints[0]


# What can't be opened


def test_a_missing_path_is_named_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    message = complaint(tmp_path / "photo")
    assert f"{tmp_path / 'photo'} does not exist (did you mean photos?)" in message
    assert "does not exist" in complaint(tmp_path / "no/such/folder")


def test_folders_without_images_say_what_was_looked_for_and_found(tmp_path: Path) -> None:
    assert "it is empty" in complaint(tmp_path)
    touch(tmp_path, "a.txt", "b/c.txt", "b/d.pdf")
    message = complaint(tmp_path)
    assert str(tmp_path) in message
    assert ".jpeg" in message
    assert ".webp" in message
    assert "found only .txt 2, .pdf 1" in message
    touch(tmp_path / "shards", "0.tar", "1.tar")
    assert "0.tar is no tar file" in complaint(tmp_path / "shards")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Path("no-such-scheme://bucket/a.tar"), "no-such-scheme"),
        ("shards/train-{000..099}.tar", "shards/train-000.tar does not exist"),
        ("shards/*.tar", "nothing matches shards/*.tar"),
        ("a.tar.gz", "a.tar.gz does not exist"),
        ("https://example.org/digits.npz", "arrays are read from this machine only"),
    ],
)
def test_files_of_many_images_that_are_not_there_are_named(data: str | Path, words: str) -> None:
    assert words in complaint(data)


def test_unknown_endings_and_no_data_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.docx", "bare")
    assert "files ending in .docx are not known" in complaint(tmp_path / "a.docx")
    assert "files ending in nothing are not known" in complaint(tmp_path / "bare")
    assert "no data given" in complaint([])
    assert "can't be opened: file name too long" in complaint("x" * 300)


def test_a_real_folder_is_opened_and_decoded(tmp_path: Path) -> None:
    written = write_good_images(tmp_path / "photos", 13)
    source = open_source(tmp_path / "photos")
    assert names(source) == sorted(written)
    assert {decode(source.read(index)).shape for index in range(len(source))} == {(40, 48, 3)}


# Named pipes, sockets and devices, which are never opened: to open a pipe waits for a writer


def odd_file(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))  # An address holds 107 bytes.
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path.with_name(".pipe"))
        path.symlink_to(path.with_name(".pipe"))
    return path


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def too_late(*_: object) -> None:
        raise TimeoutError("something waits for a file that is not a regular one")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ODD_KINDS = ("pipe", "socket", "device", "link to a pipe")


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ODD_KINDS)
def test_an_image_that_is_not_a_regular_file_is_unreadable(kind: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number:02d}.jpg" for number in range(20)))
    odd_file(tmp_path / "camera.jpg", kind)
    (tmp_path / "list.csv").write_text("path\ncamera.jpg\n" + "".join(f"{number:02d}.jpg\n" for number in range(20)))
    source = open_source(tmp_path / "list.csv")
    assert len(source) == 21
    with pytest.raises(UnreadableImage, match=rf"^a {kind.split()[-1]}, not a regular file$"):
        source.read(0)
    assert source.stamp(0) == ""
    assert source.read(4) == b"03.jpg"


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ODD_KINDS)
def test_what_is_not_a_regular_file_is_left_out_of_a_folder(kind: str, tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "elsewhere.bin")
    (tmp_path / "b/link.jpg").symlink_to(tmp_path / "a/1.jpg")
    odd_file(tmp_path / "b/camera.jpg", kind)
    source = open_source(tmp_path)
    kept = ["a/1.jpg", "b/2.jpg", "b/link.jpg"]
    if kind in ("device", "link to a pipe"):  # Links, perhaps to a disk that is not mounted, are kept.
        kept.insert(2, "b/camera.jpg")
        with pytest.raises(UnreadableImage, match=f"^a {kind.split()[-1]}, not a regular file$"):
            source.read(2)
    else:
        assert "1 special file skipped (pipes, sockets or devices)" in source.details()
    assert names(source) == kept
    assert source.changed() is None


@pytest.mark.usefixtures("in_time")
def test_a_folder_of_pipes_says_so(tmp_path: Path) -> None:
    odd_file(tmp_path / "camera.jpg", "pipe")
    with pytest.raises(InputError, match=r"holds no images: .*; 1 special file skipped \(pipes, sockets or devices\)"):
        open_source(tmp_path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_data(path: str) -> None:
    with pytest.raises(InputError, match=f"^{path} is a device, not a regular file; "):
        open_source(path)


@pytest.mark.usefixtures("in_time")
def test_a_list_that_the_shell_gives_through_a_pipe_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, f"{tmp_path}/a.jpg\n".encode())
        with pytest.raises(InputError, match=rf"^/dev/fd/{reader} is a pipe, .* write what it gives into a file$"):
            open_source(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize(
    "name", ["list.txt", "table.csv", "digits.npy", "digits.npz", "shard.tar", "shard.tgz", "rows.parquet"]
)
def test_data_that_is_not_a_regular_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}.*not a regular file"):
        open_source(odd_file(tmp_path / name, kind))


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "shard.tar", "rows.parquet"])
def test_a_pipe_among_other_files_of_a_folder_is_not_opened(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    odd_file(tmp_path / name, "pipe")
    assert names(open_source(tmp_path)) == ["a.jpg"]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match="holds no images"):
        open_source(tmp_path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", ["shard.tar", "rows.parquet"])
def test_a_shard_that_becomes_a_pipe_is_not_opened(name: str, tmp_path: Path) -> None:
    path = touch(tmp_path, name) / name
    file = LocalFile(path)
    path.unlink()
    os.mkfifo(path)
    assert file.now() == ""
    with pytest.raises(InputError, match="can't be read: a pipe, not a regular file"):
        file.read(0, 1)
