"""Near-duplicates: planted copies are found and the right one is kept; tables, lists and pages; wrong input."""

import csv
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from spoiled_images import picture
from torch.nn.functional import normalize

import deepcluster
from deepcluster import Embeddings, InputError
from deepcluster.applied import vectors
from deepcluster.applied.duplicates import Duplicates
from deepcluster.cli import main

CPU = {"device": "cpu", "workers": 0}
QUIET = ["--device", "cpu", "--workers", "0"]


def command(*words: object) -> int:
    """Exit status of the command line."""
    return main([*map(str, words)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures; of three of them copies: the same bytes, half the size, saved again."""
    folder = tmp_path_factory.mktemp("planted") / "photos"
    (folder / "copies").mkdir(parents=True)
    for number in range(30):
        Image.fromarray(picture(number, size=(320, 240))).save(folder / f"{number:02}.jpg", quality=95)
    shutil.copy(folder / "03.jpg", folder / "copies" / "same.jpg")
    Image.open(folder / "11.jpg").resize((160, 120), Image.Resampling.LANCZOS).save(
        folder / "copies" / "half.jpg", quality=95
    )
    Image.open(folder / "20.jpg").save(folder / "copies" / "again.jpg", quality=90)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


PLANTED = {("03.jpg", "copies/same.jpg"), ("11.jpg", "copies/half.jpg"), ("20.jpg", "copies/again.jpg")}


def groups_of(found: Duplicates) -> list[tuple[str, ...]]:
    """Names of each group, the kept one first."""
    names = np.array(found.names)
    return [tuple(names[found.group_R == group].tolist()) for group in range(1, 1 + int(found.keep_R.sum()))]


def test_planted_copies_are_found_and_the_largest_are_kept(photos: Path) -> None:
    found = deepcluster.duplicates("untrained:alexnet-small", photos, **CPU)
    assert set(groups_of(found)) == PLANTED
    assert [found.names[row] for row in np.flatnonzero(found.keep_R)] == [group[0] for group in groups_of(found)]
    why = dict(zip(found.names, found.reasons, strict=True))
    assert why["03.jpg"] == "kept: 320 x 240"
    assert why["copies/same.jpg"] == "the same file"
    assert why["copies/half.jpg"] == "smaller: 160 x 120"
    assert why["copies/again.jpg"].startswith("smaller file: ")
    assert found.names[:2] == ["03.jpg", "copies/same.jpg"]  # The nearest group first.
    assert found.distance_R[:2].tolist() == [0, 0]
    assert set(found.extra) == {str(photos / name) for _, name in PLANTED}
    assert found.n_bytes == sum((photos / name).stat().st_size for _, name in PLANTED)
    assert "broken.jpg" not in found.names


def test_distances_are_those_to_the_kept_image(photos: Path) -> None:
    embeddings = deepcluster.embed("untrained:alexnet-small", photos, **CPU)
    found = deepcluster.duplicates(embeddings, photos, threshold=0.3)
    rows = normalize(torch.from_numpy(embeddings.embedding_ND).double())
    index = {name: number for number, name in enumerate(embeddings.names)}
    for group in groups_of(found):
        for name in group:
            far = (rows[index[name]] - rows[index[group[0]]]).norm().item()
            assert found.distance_R[found.names.index(name)] == pytest.approx(far, abs=1e-6)


def chain(*steps: float) -> Embeddings:
    """Rows of unit length on an arc; the chord between neighbours is as long as each step."""
    angle_N = np.cumsum([0.0, *(2 * np.arcsin(np.array(steps) / 2))])
    rows_ND = np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1).astype(np.float32)
    return Embeddings([f"{number}.png" for number in range(len(rows_ND))], rows_ND, {})


def test_groups_are_closed_under_steps() -> None:
    """0 to 1 and 1 to 2 are near, 0 to 2 is not; all three are one group, and the distance to the kept one shows it."""
    found = deepcluster.duplicates(chain(0.09, 0.09, 0.5, 0.02), threshold=0.1)
    assert groups_of(found) == [("3.png", "4.png"), ("0.png", "1.png", "2.png")]
    assert found.distance_R.tolist() == pytest.approx([0, 0.02, 0, 0.09, 0.1799], abs=1e-3)
    assert found.reasons == ["kept: by its name", "as large, later by name"] + [
        "kept: by its name",
        *["as large, later by name"] * 2,
    ]
    assert found.extra == ["4.png", "1.png", "2.png"]


def test_more_pixels_win_over_a_larger_file_and_this_over_the_name(tmp_path: Path) -> None:
    pixels = picture(1, size=(64, 64))
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a-compressed.png", compress_level=9)
    image.save(tmp_path / "b.bmp")  # As many pixels, the largest file.
    image.resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "z-large.jpg", quality=50)
    shutil.copy(tmp_path / "b.bmp", tmp_path / "c.bmp")
    Image.fromarray(picture(2)).save(tmp_path / "other.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    near = Embeddings(names, np.array([[1, 0]] * 4 + [[0, 1]], np.float32)[np.argsort([names.index(n) for n in names])], {})
    near.embedding_ND[:] = [[0, 1] if name == "other.png" else [1, 0] for name in names]
    found = deepcluster.duplicates(near, tmp_path, threshold=0.1)
    assert found.names[0] == "z-large.jpg"
    (tmp_path / "z-large.jpg").unlink()
    found = deepcluster.duplicates(near, tmp_path, threshold=0.1)
    assert found.names[0] == "b.bmp"
    assert dict(zip(found.names, found.reasons, strict=True))["c.bmp"] == "the same file"
    assert "z-large.jpg" in found.names  # Its row is there, its file is gone: it is never the one to keep.
    assert dict(zip(found.names, found.reasons, strict=True))["z-large.jpg"] == "smaller: unknown size"


@pytest.mark.parametrize(
    ("kept", "copy"),
    [
        ("Été 2019/plage/fête 0008.jpeg", "plain/copy of it's #1.jpg"),
        ("z.jpg", "a - Kopie.jpg"),
        ("z.jpg", "Copie de a.jpg"),
        ("z.jpg", "a_copy2.jpg"),
        ("z.jpg", "a (1).jpg"),
    ],
)
def test_of_equal_images_the_copy_is_not_kept(kept: str, copy: str) -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = deepcluster.duplicates(Embeddings([copy, kept, "other.jpg"], rows, {}), threshold=0.1)
    assert found.names == [kept, copy]
    assert found.reasons == ["kept: by its name", "as large, marked as a copy"]


def test_names_are_sorted_without_case_and_accents() -> None:
    """Photocopy is no copy, and (1) inside a name no mark of one."""
    names = ["photocopy.jpg", "Zoo.jpg", "été.jpg", "a (1) b.jpg"]
    found = deepcluster.duplicates(Embeddings(names, np.eye(4, 2, dtype=np.float32)[[0] * 4], {}), threshold=0.1)
    assert found.names[0] == "a (1) b.jpg"
    for kept, names in (("été.jpg", ["photocopy.jpg", "été.jpg"]), ("photocopy.jpg", ["photocopy.jpg", "Zoo.jpg"])):
        found = deepcluster.duplicates(Embeddings(names, np.eye(2, dtype=np.float32)[[0, 0]], {}), threshold=0.1)
        assert found.names[0] == kept


def test_a_threshold_that_joins_different_images_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0))).numpy()
    table = tmp_path / "features.npy"
    np.save(table, rows)
    assert command("duplicates", table, "--threshold", 1.9, "--list", tmp_path / "w.txt") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "one group holds 60 of 60 images, so these are hardly near-duplicates: the usual threshold is 0.0" in said
    assert len((tmp_path / "w.txt").read_text().splitlines()) == 59
    rows[1] = rows[0]
    np.save(table, rows)
    assert command("duplicates", table, "--threshold", 0.5) == 0
    assert "of the typical distance, so different images may be in one group" in " ".join(capsys.readouterr().err.split())
    assert command("duplicates", table, "--threshold", 0.4) == 0
    assert "hardly" not in (said := capsys.readouterr().err) and "may be" not in said


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["duplicates", "untrained:alexnet-small", photos, *QUIET]
    assert command(*words, "--out", tmp_path / "d.csv", "--list", tmp_path / "d.txt", "--page", tmp_path / "d.html") == 0
    shown = capsys.readouterr().out
    assert "3 groups of near-duplicates among 33 images at a distance of " in shown
    assert "3 files could be removed, which frees " in shown
    with (tmp_path / "d.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["group", "name", "distance", "keep", "reason", "path"]
    assert [row["group"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert {row["path"] for row in rows if row["keep"] == "false"} == set((tmp_path / "d.txt").read_text().splitlines())
    assert (tmp_path / "d.html").read_text(encoding="utf-8").count('<li class="marked">') == 3
    assert command(*words, "--out", tmp_path / "d.parquet", "--quiet") == 0
    assert pq.read_table(tmp_path / "d.parquet").to_pydict()["name"] == [row["name"] for row in rows]
    assert len(list(photos.rglob("*.jpg"))) == 34  # Nothing is deleted.
    assert command(*words, "--threshold", 0) == 0
    assert (
        "1 group of near-duplicates among 33 images at a distance of 0 or less: 1 file could be removed"
        in capsys.readouterr().out
    )


def test_no_duplicates_give_an_empty_table(tmp_path: Path) -> None:
    found = deepcluster.duplicates(chain(0.5, 0.5), threshold=0.1, out=tmp_path / "d.csv", page=tmp_path / "d.html")
    assert len(found) == 0
    assert found.summary() == "no near-duplicates among 3 images at a distance of 0.1 or less"
    assert (tmp_path / "d.csv").read_text(encoding="utf-8-sig").strip().count("\n") == 0
    assert "No near-duplicates" in (tmp_path / "d.html").read_text(encoding="utf-8")


def test_lists_are_of_files(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of images in an archive, or some in one, no list is made, and no work is done."""
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for path in sorted(photos.glob("*.jpg")):
            tar.add(path, path.name)
    pixels = tmp_path / "pixels.npz"
    np.savez(pixels, images=np.stack([picture(number, size=(32, 32)) for number in range(6)]))
    before = {path.name for path in tmp_path.iterdir()}
    for data in ([tmp_path / "p.tar"], [pixels], [photos, tmp_path / "p.tar"]):
        for words in (["duplicates", "--list", tmp_path / "l.txt"], ["sample", "--count", 3, "--out", tmp_path / "l.txt"]):
            assert command(words[0], "untrained:alexnet-small", *data, *words[1:], *QUIET) == 2
            shown = capsys.readouterr()
            assert "l.txt would be a list of files, and " in shown.err and len(shown.err.splitlines()) == 1
            assert "features" not in shown.out
    assert {path.name for path in tmp_path.iterdir()} == before
    found = deepcluster.duplicates("untrained:alexnet-small", tmp_path / "p.tar", threshold=2.0, **CPU)
    assert all("jpg" in name and not Path(name).exists() for name in found.extra) and len(found.extra) > 20
    # Of a table whose images are files, but for one that is gone.
    rows = Embeddings(["gone.jpg", "00.jpg", "01.jpg"], np.ones((3, 2), np.float32), {})
    deepcluster.duplicates(rows, photos, threshold=0.1, list=tmp_path / "l.txt")
    assert str(photos / "00.jpg") in (tmp_path / "l.txt").read_text()


PEAK = """
import sys
import torch
from deepcluster.applied.vectors import vectors_of
from deepcluster.clustering.near import typical_distance
from deepcluster.clustering.spread import farthest_first
from deepcluster.run.embedding_tables import open_table

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins again.
    before = kilobytes("VmRSS")
    result = work()
    return result, (kilobytes("VmHWM") - before) * 1024

small_MP = torch.nn.functional.normalize(torch.randn(64, 128))
typical_distance(small_MP.numpy()), farthest_first(small_MP, 2)  # The first call also loads libraries.
names, size = open_table(sys.argv[1]).names(), float(sys.argv[2])
opened = vectors_of(sys.argv[1], None, space=None)
vectors, first = peak(opened.__enter__)
_, second = peak(lambda: typical_distance(vectors.known_MP.numpy()))
_, third = peak(lambda: farthest_first(vectors.known_MP, 2))
opened.__exit__(None, None, None)
print(len(vectors.known_M), first / size, second / size, third / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_are_in_memory_once(tmp_path: Path) -> None:
    """And the pages of the file, which the system may drop; one row has no numbers."""
    rows_ND = np.random.default_rng(0).normal(size=(100_000, 128)).astype(np.float32)
    rows_ND[5] = np.nan
    np.save(tmp_path / "e.npy", rows_ND)
    words = [sys.executable, "-c", PEAK, str(tmp_path / "e.npy"), str(rows_ND.nbytes)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    count, table, typical, farthest = map(float, done.stdout.split())
    assert count == 99_999
    assert table < 3.5 and typical < 0.5 and farthest < 0.5, done.stdout  # 5.3, 2.0 and 2.0 with copies of all rows.


def test_more_rows_than_memory_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "free_memory_bytes", lambda: 300)
    message = r"comparing 5 images by 2 numbers takes 620 B, and 300 B of memory are free: use --limit"
    with pytest.raises(InputError, match=message):
        deepcluster.duplicates(chain(0.1, 0.1, 0.5, 0.1), threshold=0.1)


def test_wrong_input(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "untrained:alexnet-small"
    wrong = {
        "--threshold -1.0 is no distance: use a number of 0 or more": [model, photos, "--threshold", -1],
        "--threshold nan is no distance": [model, photos, "--threshold", "nan"],
        "--list": [model, photos, "--list", tmp_path / "d.csv"],
        "does not exist or can't be written to": [model, photos, "--out", tmp_path / "none" / "d.csv"],
        "has no clusters yet": [model, photos, "--space", "clusters"],
        "1 readable image is too few": [model, photos / "03.jpg"],
        "is no run folder": [model],
    }
    for message, words in wrong.items():
        assert command("duplicates", *words, *QUIET) == 2, message
        shown = capsys.readouterr().err
        assert message in " ".join(shown.split())
        assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"threshold=2.5 is more than 2, the largest distance of embeddings"):
        deepcluster.duplicates(chain(0.5), threshold=2.5)


def test_images_that_are_known_decide_what_is_kept(tmp_path: Path) -> None:
    """What `embed` returned, its table, and a run of the table know the images: the largest is kept."""
    folder = tmp_path / "photos"
    folder.mkdir()
    large = Image.fromarray(picture(1, size=(80, 80)))
    large.resize((40, 40)).save(folder / "a-small.png")
    large.save(folder / "z-large.png")
    for number in range(2, 8):
        Image.fromarray(picture(number, size=(64, 64))).save(folder / f"{number}.png")
    table, bare = tmp_path / "t.parquet", tmp_path / "bare.parquet"
    embedded = deepcluster.embed("untrained:alexnet-small", folder, out=table, **CPU)
    pq.write_table(pq.read_table(table).drop(["path"]), bare)
    known = [embedded, table, deepcluster.cluster(table, clusters=2, out=tmp_path / "run", seed=1)]
    known.append(deepcluster.cluster(bare, folder, clusters=2, out=tmp_path / "bare", seed=1))
    for model in known:
        found = deepcluster.duplicates(model, threshold=0.3)
        group = found.group_R[found.names.index("z-large.png")]
        assert group == found.group_R[found.names.index("a-small.png")]
        assert found.names[np.flatnonzero(found.group_R == group)[0]] == "z-large.png", model
        assert str(folder / "a-small.png") in found.extra
    similar = deepcluster.similar(known[-1], query=folder / "a-small.png", count=1)
    assert similar.names == ["z-large.png"] and similar.pictures is not None


def test_an_empty_table_has_types(tmp_path: Path) -> None:
    for name, rows in {"none": chain(0.5, 0.5), "some": chain(0.02, 0.5)}.items():
        deepcluster.duplicates(rows, threshold=0.1, out=tmp_path / f"{name}.parquet")
    none, some = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("none", "some"))
    assert len(none) == 0 and len(some) == 2
    assert none.schema.equals(some.schema)


def test_no_output_replaces_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = chain(0.02, 0.5, 0.4)
    pq.write_table(pa.table({"name": rows.names, "embedding": rows.embedding_ND.tolist()}), tmp_path / "t.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "t.parquet")
    run = deepcluster.cluster(tmp_path / "t.parquet", clusters=2, out=tmp_path / "run")
    (tmp_path / "photos.txt").write_text("a.png\n")
    before, table = (tmp_path / "t.parquet").read_bytes(), tmp_path / "t.parquet"
    for words in (
        ["duplicates", table, "--out", table],
        ["duplicates", tmp_path / "link.parquet", "--out", table],
        ["duplicates", table, tmp_path / "photos.txt", "--list", tmp_path / "photos.txt"],
        ["sample", table, tmp_path / "photos.txt", "--count", 2, "--out", tmp_path / "photos.txt"],
        ["similar", table, "--query", "1.png", "--out", tmp_path / "link.parquet"],
        ["assign", run, table, "--out", table],
        ["compare", table, table, "--out", table],
        ["embed", "untrained:alexnet-small", table, "--out", table],
    ):
        assert command(*words) == 2, words
        assert "which would be replaced" in capsys.readouterr().err
    assert table.read_bytes() == before
