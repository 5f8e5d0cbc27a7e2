"""`resnet-patches`: filters from patches, whitened features, what a run keeps of them; and epochs that fit into minutes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import write_classes
from PIL import Image
from small_runs import checkpoint, metrics, train_small

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.data.sources import open_source
from deepcluster.info import info
from deepcluster.interop.loading import load
from deepcluster.models.archs import make_trunk
from deepcluster.models.patches import FILTERS, PATCH, SHRINKAGE, WHITENED, PatchResNet
from deepcluster.training.fitting import IMAGES_PER_COMPONENT, POWER

V2: dict[str, Any] = {"recipe": "auto", "method": "deepcluster-v2", "arch": "resnet-patches", "clusters": (5,), "pca": 8}
OWN: dict[str, Any] = {**V2, "cluster_stage": "features", "image_size": 16, "projection": (16, 8)}


def natural(count: int, side: int = 16) -> torch.Tensor:
    """Images (N, 3, side, side) whose neighbouring pixels are alike."""
    coarse = torch.randn(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    fine = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear") + 0.1 * fine


def patch_trunk(side: int = 16) -> PatchResNet:
    trunk = make_trunk("resnet-patches", image_size=side, sobel=False)
    assert isinstance(trunk, PatchResNet)
    return trunk


def test_filters_are_whitened_patches_of_the_images() -> None:
    """Oracle: the covariance of all patches in float64."""
    images = natural(400)
    trunk = patch_trunk()
    trunk.begin([images], seed=0)
    filters_KD = trunk.body[0].weight.detach().flatten(1).double().numpy()
    patches_ND = (
        images.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1).double().numpy()
    )
    covariance_DD = np.cov(patches_ND.T)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    shrunk_D = values_D + SHRINKAGE * values_D.mean()
    # The filters are W z with W = (C + s)^-1/2, |z| = 1: (C + s) on both sides gives 1.
    lengths_K = np.einsum("kd,de,ke->k", filters_KD, (vectors_DD * shrunk_D) @ vectors_DD.T, filters_KD)
    assert filters_KD.shape == (FILTERS, 3 * PATCH * PATCH)
    np.testing.assert_allclose(lengths_K, 1, rtol=0.05)
    assert len(np.unique(filters_KD.round(4), axis=0)) == FILTERS


def test_beginning_sets_the_statistics_of_all_norms() -> None:
    images, trunk = natural(256), patch_trunk()
    trunk.begin([images[:128], images[128:]], seed=0)
    trunk.eval()
    first_BCHW = trunk.body[0](images)
    norm = trunk.body[1]
    torch.testing.assert_close(norm.running_mean, first_BCHW.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert {layer.momentum for layer in trunk.body.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.1}


def test_first_weights_are_a_function_of_images_and_seed() -> None:
    images, trunks = natural(64), [patch_trunk() for _ in range(3)]
    for trunk, seed in zip(trunks, (0, 0, 1), strict=True):
        trunk.begin([images], seed=seed)
    weights = [trunk.body[0].weight for trunk in trunks]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_whitened_is_a_stage_that_no_protocol_takes_for_a_map() -> None:
    trunk, images = patch_trunk().eval(), natural(4)
    assert WHITENED not in trunk.stages and trunk.embed_stage == WHITENED
    assert trunk.last_map == "block3"
    assert trunk.vectors(images, WHITENED).shape == (4, 512)
    assert torch.equal(trunk.vectors(images, "features"), trunk(images))
    with pytest.raises(InputError, match="no stage 'whitend'"):
        trunk.stage(images, "whitend")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("patches")
    data = write_classes(folder / "data", 40)
    return train_small(data, folder / "run", **OWN), data


def test_the_whitening_of_a_run_is_that_of_its_images(run: tuple[Path, Path]) -> None:
    """Oracle: NumPy's eigenvectors of the averages' covariance in float64."""
    path, data = run
    model = load(path).on("cpu", precision="fp32")
    features_ND, unreadable = model.features(open_source(data), stage=WHITENED)
    assert not unreadable
    features_ND = features_ND.double().numpy()
    kept = len(features_ND) // IMAGES_PER_COMPONENT
    assert (features_ND[:, kept:] == 0).all() and np.abs(features_ND[:, :kept]).max() > 0
    covariance_PP = np.cov(features_ND[:, :kept].T)
    variances_P = np.diag(covariance_PP)
    off = covariance_PP - np.diag(variances_P)
    assert np.abs(off).max() < 1e-3 * variances_P.max()
    assert POWER < 1 and (np.diff(variances_P) <= 1e-6).all(), "the order of the components is kept"


def test_info_describes_what_embed_gives(run: tuple[Path, Path]) -> None:
    assert "embed gives whitened by default, 512 numbers per image" in info(str(run[0] / "checkpoints" / "last.pt"))


def test_the_trunk_before_training_is_kept(run: tuple[Path, Path]) -> None:
    path, _ = run
    untrained, state = load(f"untrained:{path}"), checkpoint(path)
    assert not untrained.trained and untrained.assignment is None
    kept = torch.load(path / "checkpoints" / "epoch-0000.pt", weights_only=True)
    for name, tensor in untrained.trunk.state_dict().items():
        assert torch.equal(tensor, kept["trunk"][name]), name
    assert not torch.equal(kept["trunk"]["body.0.weight"], state["trunk"]["body.0.weight"])


def test_minutes_become_epochs_and_the_run_is_the_one_of_so_many_epochs(images: Path, tmp_path: Path) -> None:
    options = {**OWN, "batch_size": 16, "workers": 0, "device": "cpu", "precision": "fp32"}
    timed = deepcluster.train(images, out=tmp_path / "timed", minutes=0.02, **options)
    config = json.loads((timed / "config.json").read_text())
    epochs = config["settings"]["epochs"]
    assert len(metrics(timed)) == epochs >= 1
    assert "--minutes 0.02, and an epoch takes about" in config["changed_by_recipe"]["epochs"]["reason"]
    plain = deepcluster.train(images, out=tmp_path / "plain", epochs=epochs, **options)
    first, second = checkpoint(timed)["trunk"], checkpoint(plain)["trunk"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    deepcluster.train(images, out=timed, resume=True, minutes=1)
    config = json.loads((timed / "config.json").read_text())
    assert (config["settings"]["epochs"], config["settings"]["minutes"]) == (epochs, 0)
    with pytest.raises(InputError, match="leave out --epochs or --minutes"):
        deepcluster.train(images, out=tmp_path / "both", minutes=1, epochs=3)


def test_blank_images_train_without_an_error(tmp_path: Path) -> None:
    """No patch differs from the mean, and no component has a variance."""
    (tmp_path / "blank").mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (90, 90, 90)).save(tmp_path / "blank" / f"{number}.png")
    path = train_small(tmp_path / "blank", tmp_path / "run", **{**OWN, "clusters": (2,), "batch_size": 6, "epochs": 1})
    embedding_ND = deepcluster.embed(path, tmp_path / "blank").embedding_ND
    assert np.isfinite(embedding_ND).all()
