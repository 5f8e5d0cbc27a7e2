"""`load`, `embed`, `assign`, `info` and `doctor` on what a run leaves, and on random weights."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import SMALL, assert_equal, assert_same_run, checkpoint, train_small
from spoiled_images import write_good_images, write_spoiled_images

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.info import doctor, info
from deepcluster.run.features import make_run_trunk


def test_a_run_and_its_last_checkpoint_are_the_same_model(trained: Path) -> None:
    of_run, of_file = deepcluster.load(trained), deepcluster.load(trained / "checkpoints" / "last.pt")
    assert of_run.settings == of_file.settings
    assert_equal(dict(of_run.trunk.state_dict()), dict(of_file.trunk.state_dict()))
    assert_equal(dict(of_run.trunk.state_dict()), dict(checkpoint(trained)["trunk"]))
    assert not of_run.trunk.training
    assert of_run.centroids_KP is not None and of_run.centroids_KP.shape == (5, 16)


def test_a_run_with_options_from_numpy_can_be_used_and_resumed(images: Path, tmp_path: Path) -> None:
    """As of a sweep over np.logspace: what is saved is the same as with plain numbers."""
    options = {
        "arch": np.array(["alexnet-small"])[0],
        "lr": np.float64(0.01),
        "dropout": np.float32(0.5),
        "clusters": np.int64(5),
        "image_size": np.int32(16),
        "flip": np.bool_(True),
        "crop_scale": np.array([0.25, 1.0]),
        "limit": np.int64(40),
    }
    run = train_small(images, tmp_path / "run", epochs=np.int64(1), **options)
    plain = {"lr": 0.01, "dropout": 0.5, "clusters": 5, "flip": True, "crop_scale": (0.25, 1.0), "limit": 40}
    other = train_small(images, tmp_path / "other", epochs=1, **plain)
    assert deepcluster.load(run).settings == deepcluster.load(other).settings
    assert len(deepcluster.assign(run, images, limit=np.int64(10), batch_size=np.int64(4)).names) == 10
    for folder, epochs, same in ((run, np.int64(2), options), (other, 2, plain)):
        train_small(images, folder, resume=True, epochs=epochs, **same)
    assert_same_run(run, other)


def test_an_earlier_checkpoint_is_another_model(trained: Path) -> None:
    early, last = deepcluster.load(trained / "checkpoints" / "epoch-0001.pt"), deepcluster.load(trained)
    assert early.centroids_KP is not None and last.centroids_KP is not None
    assert not torch.equal(early.centroids_KP, last.centroids_KP)


def test_the_untrained_trunk_of_a_run_is_the_one_it_began_with(images: Path, trained: Path, tmp_path: Path) -> None:
    model = deepcluster.load(f"untrained:{trained}")
    assert_equal(dict(model.trunk.state_dict()), dict(make_run_trunk(model.settings).state_dict()))
    assert model.centroids_KP is None
    # With a rate of zero the weights are still those at the end; what BatchNorm counts is not.
    run = train_small(images, tmp_path / "run", lr=0.0, epochs=1)
    weights = dict(deepcluster.load(run).trunk.named_parameters())
    for name, value in deepcluster.load(f"untrained:{run}").trunk.named_parameters():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18-small"])
def test_untrained_architectures(arch: str, images: Path) -> None:
    result = deepcluster.embed(f"untrained:{arch}", images, limit=4, device="cpu")
    assert np.isfinite(result.embedding_ND).all()
    again = deepcluster.embed(f"untrained:{arch}", images, limit=4, device="cpu")
    assert np.array_equal(result.embedding_ND, again.embedding_ND)


def test_embed_writes_what_it_returns(images: Path, trained: Path, tmp_path: Path) -> None:
    result = deepcluster.embed(trained, images, out=tmp_path / "e.parquet")
    assert result.names == sorted(path.name for path in images.iterdir())
    assert result.embedding_ND.dtype == np.float32 and len(result.embedding_ND) == 60
    assert not result.unreadable
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["name", "embedding", "path"]
    assert table["name"].to_pylist() == result.names
    assert np.array_equal(np.stack(table["embedding"].to_pylist()).astype(np.float32), result.embedding_ND)

    deepcluster.embed(trained, images, out=tmp_path / "e.npy")
    assert np.array_equal(np.load(tmp_path / "e.npy"), result.embedding_ND)
    assert (tmp_path / "e.names.txt").read_text().splitlines() == result.names
    assert not list(tmp_path.glob("*.part"))


def test_embed_gives_the_stage_of_the_trunk_that_measured_best(images: Path, trained: Path) -> None:
    model = deepcluster.load(trained)
    usual = deepcluster.embed(model, images, limit=8)
    best = deepcluster.embed(model, images, limit=8, stage=model.trunk.embed_stage)
    assert np.array_equal(usual.embedding_ND, best.embedding_ND)
    for stage in model.trunk.stages:
        rows = deepcluster.embed(model, images, limit=8, stage=stage).embedding_ND
        assert len(rows) == 8 and np.isfinite(rows).all()
    features = deepcluster.embed(model, images, limit=8, stage="features").embedding_ND
    assert features.shape == (8, model.trunk.dim)


def test_batches_and_workers_change_nothing(images: Path, trained: Path) -> None:
    one = deepcluster.embed(trained, images).embedding_ND
    other = deepcluster.embed(trained, images, batch_size=7, workers=0).embedding_ND
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_limit_takes_images_evenly(images: Path, trained: Path) -> None:
    every, some = deepcluster.embed(trained, images), deepcluster.embed(trained, images, limit=20)
    assert some.names == every.names[::3]
    np.testing.assert_allclose(some.embedding_ND, every.embedding_ND[::3], atol=1e-5)


def test_assign_gives_the_run_s_last_table_again(images: Path, trained: Path, tmp_path: Path) -> None:
    result = deepcluster.assign(trained, images, out=tmp_path / "c.parquet")
    final = pq.read_table(trained / "assignments" / "epoch-0003.parquet").to_pydict()
    assert result.names == final["name"]
    assert result.cluster_N.tolist() == final["cluster"]
    np.testing.assert_allclose(result.distance_N, final["distance"], atol=1e-4)
    table = pq.read_table(tmp_path / "c.parquet").to_pydict()
    assert list(table) == ["name", "cluster", "distance", "second", "second_distance", "confidence", "path"]
    assert table["cluster"] == final["cluster"]


def test_assign_of_an_earlier_checkpoint_uses_its_own_clusters(images: Path, trained: Path) -> None:
    early = deepcluster.assign(trained / "checkpoints" / "epoch-0001.pt", images)
    assert set(early.cluster_N.tolist()) <= set(range(5))


def test_rows_of_unreadable_images_are_empty(trained: Path, tmp_path: Path) -> None:
    write_good_images(tmp_path / "mixed", 5)
    spoiled = write_spoiled_images(tmp_path / "mixed", 3)
    found = deepcluster.embed(trained, tmp_path / "mixed")
    assert found.unreadable.keys() == set(spoiled)
    empty_N = np.array([name in spoiled for name in found.names])
    assert np.array_equal(np.isnan(found.embedding_ND).all(axis=1), empty_N)
    groups = deepcluster.assign(trained, tmp_path / "mixed", folders=tmp_path / "groups")
    assert np.array_equal(groups.cluster_N == -1, empty_N)
    assert np.array_equal(np.isnan(groups.distance_N), empty_N)
    assert len([path for path in (tmp_path / "groups").rglob("*") if path.is_symlink()]) == 5


def test_folders_of_links(images: Path, trained: Path, tmp_path: Path) -> None:
    result = deepcluster.assign(trained, images, folders=tmp_path / "groups")
    links = sorted(path for path in (tmp_path / "groups").rglob("*") if path.is_symlink())
    assert len(links) == 60
    found = {link.resolve(strict=True).name: link.parent.name for link in links}
    assert found == {
        name: f"cluster-{cluster}" for name, cluster in zip(result.names, result.cluster_N.tolist(), strict=True)
    }


def test_links_of_names_that_look_alike(trained: Path, tmp_path: Path) -> None:
    (name,) = write_good_images(tmp_path / "photos" / "a" / "b", 1)
    (tmp_path / "photos" / "a__b").mkdir()
    os.link(tmp_path / "photos/a/b" / name, tmp_path / "photos/a__b" / name)
    deepcluster.assign(trained, tmp_path / "photos", folders=tmp_path / "groups")
    links = [path for path in (tmp_path / "groups").rglob("*") if path.is_symlink()]
    assert {link.resolve() for link in links} == {
        (tmp_path / "photos/a/b" / name).resolve(), (tmp_path / "photos/a__b" / name).resolve(),
    }  # fmt: skip


def test_wrong_input_is_told_before_any_work(images: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="should end in"):
        deepcluster.embed(trained, images, out=tmp_path / "e.txt")
    with pytest.raises(InputError, match="no clusters yet"):
        deepcluster.assign("untrained:alexnet-small", images)
    with pytest.raises(InputError, match="did you mean conv5"):
        deepcluster.embed(trained, images, stage="conv_5")
    with pytest.raises(InputError, match="unknown option 'cluster'"):
        deepcluster.train(images, out=tmp_path / "run", cluster=5)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


def test_the_usual_run_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepcluster.api import default_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.npz").touch()
    assert default_run(images) == Path("runs/photos")
    assert default_run("photos/") == Path("runs/photos")
    assert default_run(["digits.npz", "photos"]) == Path("runs/digits")


# info and doctor


def test_info_of_a_run(trained: Path) -> None:
    text = info(str(trained))
    assert text.splitlines()[0].startswith(f"run {trained}: 60 images")
    assert "alexnet-small at 16 px, 5 clusters, 2 of 2 epochs" in text
    assert "clusters=5" in text and f"lr={SMALL['lr']}" in text
    assert "epoch 2/2  loss" in text
    assert text.splitlines()[-1].endswith("clusters.parquet")


def test_info_of_a_checkpoint_and_of_random_weights(trained: Path) -> None:
    text = info(str(trained / "checkpoints" / "last.pt"))
    assert "alexnet-small with Sobel" in text
    assert "5 clusters in a space of 16 whitened features" in text
    text = info("untrained:alexnet-small")
    trunk = deepcluster.load("untrained:alexnet-small").trunk
    assert all(f"{stage} (" in text for stage in trunk.stages)
    assert f"embed gives {trunk.embed_stage} by default" in text
    assert "clusters" not in text


def test_info_of_images(images: Path, tmp_path: Path) -> None:
    lines = info(str(images)).splitlines()
    assert lines[0].startswith("60 images in 1 folder")
    assert lines[1].split() == ["36", "×", "32", "█" * 30, "60"]
    assert lines[2:] == ["no copies of other images, byte for byte", "none that can't be read"]
    for number in range(6):
        write_good_images(tmp_path / "mixed" / str(number), 5, size=(20 * (number + 1), 500))
    (tmp_path / "mixed" / "copy.png").write_bytes(next((tmp_path / "mixed" / "3").glob("*.png")).read_bytes())
    spoiled = write_spoiled_images(tmp_path / "mixed", 3)
    text = info(str(tmp_path / "mixed"))
    assert [line.split()[2:] for line in text.splitlines()[1:4]] == [
        ["16–31", "█" * 9, "5"],
        ["32–63", "█" * 19, "10"],
        ["64–127", "█" * 30, "16"],
    ]
    assert "1 copy of other images, byte for byte, e.g. 3/" in text
    assert "3 images can't be read:" in text
    assert any(f"e.g. {name}" in text for name in spoiled)


def test_info_looks_at_a_sample_unless_all_are_wanted(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepcluster.info.MOST", 7)
    assert "read 7 of them, spread evenly" in info(str(images))
    assert info(str(images), everything=True).splitlines()[1].endswith(" 60")


def test_doctor_says_what_there_is() -> None:
    text = doctor()
    for fact in (
        "would run on:",
        "processor:",
        "memory free:",
        "disk free here:",
        "versions:",
        torch.__version__.split("+")[0],
    ):
        assert fact in text
