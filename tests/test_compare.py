"""Runs compared: agreement against scikit-learn, what moved, curves and settings, tables of any kind, wrong input."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics
from small_runs import train_small

import deepcluster
from deepcluster import InputError
from deepcluster.cli import main
from deepcluster.clustering.matching import match_clusters


@pytest.fixture(scope="module")
def other(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same images with another seed, fewer clusters and one more epoch."""
    return train_small(images, tmp_path_factory.mktemp("runs") / "other", seed=5, clusters=4, epochs=3)


def clusters_of(run: Path) -> dict[str, int]:
    columns = pq.read_table(run / "clusters.parquet").to_pydict()
    return dict(zip(columns["name"], columns["cluster"], strict=True))


def table(path: Path, names: list[str], clusters: list[int]) -> Path:
    pq.write_table(pa.table({"name": names, "cluster": pa.array(clusters, pa.int64())}), path)
    return path


def test_agreement_is_that_of_scikit_learn(trained: Path, other: Path) -> None:
    found = deepcluster.compare([trained, other])
    [agreement] = found.agreements
    one, two = clusters_of(trained), clusters_of(other)
    ours, theirs = np.array([[one[name], two[name]] for name in one]).T
    assert agreement.n_images == len(one) == 60
    assert agreement.nmi == pytest.approx(metrics.normalized_mutual_info_score(ours, theirs, average_method="geometric"))
    assert agreement.ari == pytest.approx(metrics.adjusted_rand_score(ours, theirs))
    assert agreement.ami == pytest.approx(metrics.adjusted_mutual_info_score(ours, theirs))
    assert np.array_equal(found.cluster_RN, [ours, theirs])
    matched = match_clusters(theirs, ours)[theirs]
    assert np.array_equal(found.matched_RN, [ours, matched])
    assert agreement.n_moved == found.moved_RN[1].sum() == (matched != ours).sum()
    assert not found.moved_RN[0].any()


def test_renumbered_clusters_agree_wholly(trained: Path, tmp_path: Path) -> None:
    one = clusters_of(trained)
    number = np.random.default_rng(0).permutation(5)
    renumbered = table(tmp_path / "renumbered.parquet", list(one), number[list(one.values())].tolist())
    [agreement] = deepcluster.compare([trained, renumbered]).agreements
    assert (agreement.nmi, agreement.ari, agreement.ami) == pytest.approx((1, 1, 1))
    assert agreement.n_moved == 0


def test_clusters_without_a_match_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two clusters of one run are one of the other: it keeps the larger, and the images of the smaller have no match."""
    names = [f"{number}.png" for number in range(12)]
    one = table(tmp_path / "one.parquet", names, [0] * 4 + [1] * 3 + [2] * 5)
    two = table(tmp_path / "two.parquet", names, [0] * 7 + [1] * 4 + [0])
    for pair in ([one, two], [two, one]):
        [agreement] = deepcluster.compare(pair).agreements
        assert (agreement.n_moved, agreement.n_unmatched) == (4, 3)
    assert main(["compare", str(one), str(two)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has 3 clusters," in said
    assert "has 2; clusters are matched one to one: 3 images are in a cluster without a match, and counted as moved" in said
    assert re.search(r"4 \(33%\) 3", said)


def test_unassigned_and_missing_images_are_left_out(tmp_path: Path) -> None:
    one = table(tmp_path / "one.parquet", ["a", "b", "c", "d", "e"], [0, 0, 1, 1, -1])
    two = table(tmp_path / "two.parquet", ["e", "d", "c", "b", "x"], [0, 1, 1, -1, 0])
    found = deepcluster.compare([one, two])
    assert [one.n_images for one in found.agreements] == [2]  # c and d.
    assert found.names == ["b", "c", "d", "e"]
    assert found.cluster_RN.tolist() == [[0, 1, 1, -1], [-1, 1, 1, 0]]
    assert found.matched_RN.tolist() == [[0, 1, 1, -1], [-1, 1, 1, -1]]
    assert not found.moved_RN.any()


def test_three_are_compared_in_pairs(trained: Path, other: Path, tmp_path: Path) -> None:
    last = sorted((trained / "assignments").glob("*.parquet"))[0]
    found = deepcluster.compare([trained, other, last], out=tmp_path / "c.csv")
    pairs = [(one.run, one.other) for one in found.agreements]
    assert pairs == [(str(trained), str(other)), (str(trained), str(last)), (str(other), str(last))]
    with (tmp_path / "c.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = ["name", "cluster_1", "cluster_2", "matched_2", "moved_2", "cluster_3", "matched_3", "moved_3"]
    assert list(rows[0]) == expected == list(found.to_pandas().columns)
    assert len(rows) == 60


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_that_assign_wrote(trained: Path, images: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"assigned.{ending}"
    assigned = deepcluster.assign(trained, images, out=path, device="cpu", workers=0)
    found = deepcluster.compare([path, trained])
    assert found.agreements[0].n_moved == 0
    assert found.names == assigned.names


def test_the_command_prints_settings_epochs_and_agreement(
    trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(trained), str(other), "--page", str(tmp_path / "c.html")]) == 0
    shown = capsys.readouterr().out
    for title in ("Runs", "Settings that differ", "Epochs", "Agreement of the clusters"):
        assert f"\n{title}\n" in f"\n{shown}"
    assert re.search(r"--clusters\s+5\s+4", shown)
    assert re.search(r"--epochs\s+2\s+3", shown)
    assert "--arch" not in shown
    losses = [[line["loss"] for line in deepcluster.Run(run).metrics] for run in (trained, other)]
    assert re.search(rf"(?m)^1 .*{losses[0][0]:.3f}\s+{losses[1][0]:.3f}", shown)
    assert re.search(rf"(?m)^3 .*–\s+{losses[1][2]:.3f}", shown)
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    moved = deepcluster.compare([trained, other]).moved_RN[1].sum()
    assert moved
    assert html.count('<img src="data:image/') == moved  # All of so few are shown.
    assert "Images that moved" in html
    assert "nmi(prev)" in html


def test_images_that_are_gone_leave_a_page_without_pictures(
    images: Path, trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "config.json"
    config.write_text(config.read_text().replace(str(images), str(tmp_path / "gone")))
    assert main(["compare", str(run), str(other), "--page", str(tmp_path / "c.html"), "--quiet"]) == 0
    assert "If the images have moved, name them with --data" in " ".join(capsys.readouterr().err.split())
    assert "<img src" not in (tmp_path / "c.html").read_text(encoding="utf-8")
    page = str(tmp_path / "c.html")
    assert main(["compare", str(run), str(other), "--page", page, "--quiet", "--data", str(images)]) == 0
    assert "<img src" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_runs_of_other_images_have_curves_only(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = table(tmp_path / "stranger.parquet", ["x.png"], [0])
    assert main(["compare", str(trained), str(stranger)]) == 0
    shown = capsys.readouterr()
    assert "Agreement" not in shown.out
    assert "no image has a cluster in both" in shown.err
    assert main(["compare", str(trained), str(stranger), "--out", str(tmp_path / "c.csv")]) == 2
    assert not (tmp_path / "c.csv").exists()


WRONG: dict[str, Callable[[Path, Path], list[Any]]] = {
    "can't be compared alone": lambda run, folder: [run],
    "is no run folder": lambda run, folder: [run, folder / "nothing.txt"],
    "can't be read as a table of clusters": lambda run, folder: [run, folder / "broken.parquet"],
    r"can't be read as a table of clusters: .*cluster": lambda run, folder: [run, folder / "names.csv"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input(trained: Path, tmp_path: Path, message: str) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no table")
    (tmp_path / "names.csv").write_text("name\na\n")
    with pytest.raises(InputError, match=message):
        deepcluster.compare(WRONG[message](trained, tmp_path))
