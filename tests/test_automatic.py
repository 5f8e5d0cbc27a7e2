"""Automatic settings never harm: with any network a short run learns its labels, and no cluster swallows the others.

Scikit-learn's digits, as images of 32 px.
"""

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small_runs import metrics

import deepcluster
from deepcluster.core.progress import Reporter
from deepcluster.evaluation.knn import leave_one_out_accuracy

QUICK = ("torchvision:mobilenet_v3_small",)
OTHERS = (
    *("alexnet-small", "resnet18-small", "resnet18", "resnet50", "alexnet", "vgg16"),
    *("torchvision:resnet50", "torchvision:efficientnet_b0", "torchvision:shufflenet_v2_x1_0", "torchvision:convnext_tiny"),
    *("timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_100"),
)
# AlexNet's strides leave nothing of smaller images; a vision transformer needs whole patches.
SIZES = {"alexnet": 96, "timm:vit_tiny_patch16_224": 64}
# As long as the statistics of their BatchNorm are untrained, the activations of these are so small that they are almost a
# linear map of the pixels. That is a good one for digits (0.91), and no measure of what a short training has learned.
LINEAR_AT_FIRST = ("torchvision:mobilenet_v3_small", "torchvision:efficientnet_b0", "timm:mobilenetv3_small_100")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, file = load_digits(), tmp_path_factory.mktemp("digits") / "digits.npz"
    images_NHW = np.rint(data.images[:900] * 255 / 16).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    np.savez(file, images=images_NHW, labels=data.target[:900])
    return file


@pytest.mark.parametrize("arch", [*QUICK, *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)])
def test_auto_does_not_harm_any_network(arch: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = deepcluster.train(
        digits,
        out=tmp_path / "run",
        arch=arch,
        image_size=SIZES.get(arch, 32),
        epochs=3,
        workers=0,
        reporter=Reporter(quiet=True),
    )
    history = metrics(run)
    guess = log(history[-1]["clusters"])
    assert history[-1]["loss"] < guess
    assert all(line["loss"] < 1.5 * guess for line in history)
    assert all(line["largest_cluster_share"] < 0.1 + 1 / line["clusters"] for line in history)
    assert "warning" not in capsys.readouterr().err
    before, after = (accuracy(model, digits) for model in (f"untrained:{run}", run))
    assert after > before - 0.02 or arch in LINEAR_AT_FIRST


def accuracy(model: str | Path, digits: Path) -> float:
    rows_ND = deepcluster.embed(model, digits, workers=0, reporter=Reporter(quiet=True)).embedding_ND
    return leave_one_out_accuracy(*map(torch.from_numpy, (rows_ND, np.load(digits)["labels"])), k=10)
