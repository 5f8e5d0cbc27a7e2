"""Exports to ONNX, run by onnxruntime and by OpenCV, against the model itself."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports_helper import model_of, printed
from numpy.typing import NDArray
from small_runs import train_small
from torch import Tensor

import deepcluster
from deepcluster.cli import main
from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import InputError
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model
from deepcluster.run.space import PredictionSpace

# What each kind of network is checked with: maps and features, convolutions and attention, our own and the libraries'.
NETWORKS = [
    ("alexnet-small", 32, True, "features"),
    ("alexnet-small", 32, True, "conv3"),
    ("resnet18", 64, False, "features"),
    ("resnet18-small", 32, False, "stem"),
    ("timm:resnet10t", 64, False, "layer2"),
    ("timm:test_vit,patch_size=4", 32, False, "features"),
    ("torchvision:squeezenet1_1", 64, False, "features.4"),
]


def pixels(size: int, count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def run(path: Path, images_BCHW: Tensor) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {"images": images_BCHW.contiguous().numpy()})
    return outputs


def close(one: NDArray[Any], other: Tensor) -> bool:
    """At most 1e-5 apart, as a share of the largest value where that is above 1."""
    return bool(np.abs(one - other.numpy()).max() <= 1e-5 * max(1.0, float(other.abs().max())))


@torch.no_grad()
def stage_of(model: Model, name: str, x_BCHW: Tensor) -> Tensor:
    return model.trunk(x_BCHW) if name == "features" else model.trunk.stage(x_BCHW, name)


@pytest.mark.parametrize("arch, size, sobel, stage", NETWORKS)
def test_onnxruntime_returns_what_the_network_returns(
    arch: str, size: int, sobel: bool, stage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = model_of(tmp_path, arch, size, sobel=sobel), tmp_path / "net.onnx"
    model.export(format="onnx", out=out, output=stage)
    assert capfd.readouterr() == ("", "")
    onnx.checker.check_model(str(out), full_check=True)
    assert [one.name for one in tmp_path.iterdir()] == ["net.onnx"]
    for count in (1, 7):
        x_BCHW = normalise(pixels(size, count))
        (found,) = run(out, x_BCHW)
        assert close(found, stage_of(model, stage, x_BCHW))


@pytest.mark.parametrize("arch, sobel", [("alexnet-small", True), ("resnet18-small", False)])
def test_opencv_reads_it_too(arch: str, sobel: bool, tmp_path: Path) -> None:
    model, out = model_of(tmp_path, arch, 32, sobel=sobel), tmp_path / "net.onnx"
    model.export(format="onnx", out=out)
    net = cv2.dnn.readNetFromONNX(str(out))
    for count in (1, 7):
        x_BCHW = normalise(pixels(32, count))
        net.setInput(x_BCHW.contiguous().numpy())
        assert np.abs(net.forward() - stage_of(model, "features", x_BCHW).numpy()).max() <= 1e-4


@pytest.fixture(scope="module", params=["whitened", "hierarchical", "projected"])
def clustered(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("onnx") / "run"
    own: dict[str, dict[str, Any]] = {
        "whitened": {"cluster_stage": "conv3"},
        "hierarchical": {"clustering": "hierarchical", "super_clusters": 2, "clusters": 6},
        "projected": {
            "method": "deepcluster-v2",
            "recipe": "v2-small-set",
            "cluster_stage": "features",
            "projection": (16, 8),
            "pca": 8,
        },
    }
    return deepcluster.load(train_small(images, out, **{"image_size": 32, "epochs": 1, **own[request.param]}))


def test_clusters_are_those_that_assign_writes(clustered: Model, images: Path, tmp_path: Path) -> None:
    text = printed(clustered, format="onnx", out=tmp_path / "net.onnx", output="cluster", input="uint8")
    assert "left out" not in text
    assert "input: images (batch, 3, 32, 32), RGB, uint8, pixels 0 to 255; output: cluster, distance" in text
    rows, unreadable = clustered.in_memory(clustered.nearest_clusters(), open_source(images))
    with clustered.loader(open_source(images), keep=False) as loader:
        (batch,) = loader.cluster_views(ClusterView(32), torch.arange(len(open_source(images))), 256)
    cluster_B, distance_B = run(tmp_path / "net.onnx", batch.images_BCHW)
    assert not unreadable and len(set(cluster_B.tolist())) > 1
    assert cluster_B.dtype == np.int64 and (cluster_B == rows["cluster"][batch.indices_B]).all()
    assert np.abs(distance_B - rows["distance"][batch.indices_B]).max() <= 1e-5


def test_points_are_those_in_which_the_model_clusters(clustered: Model, tmp_path: Path) -> None:
    x_BCHW = normalise(pixels(32, 7))
    clustered.export(format="onnx", out=tmp_path / "net.onnx", output="projection")
    (found,) = run(tmp_path / "net.onnx", x_BCHW)
    rows_BD = clustered.trunk.vectors(x_BCHW, clustered.settings.cluster_stage).detach()
    assert close(found, clustered.points(rows_BD))


def test_the_cluster_that_a_last_layer_predicts(tmp_path: Path) -> None:
    """Clusters of a file of 2018: the largest score of a linear layer on the rectified features."""
    generator = torch.Generator().manual_seed(6)
    weight_KD, bias_K = torch.randn(9, 256, generator=generator), torch.randn(9, generator=generator)
    bare = model_of(tmp_path, "alexnet-small", 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    clusters = Assignment(torch.empty(0, dtype=torch.int64), torch.empty(0), PredictionSpace.centroids(weight_KD, bias_K))
    model = replace(bare, space=PredictionSpace(256), assignment=clusters)
    model.export(format="onnx", out=tmp_path / "net.onnx", output="cluster", input="uint8")
    images_BCHW = pixels(32, 64)
    scores_BK = torch.relu(stage_of(model, "features", normalise(images_BCHW))) @ weight_KD.T + bias_K
    cluster_B, _ = run(tmp_path / "net.onnx", images_BCHW)
    assert (cluster_B == scores_BK.argmax(dim=1).numpy()).all()


def test_embeddings_are_those_that_embed_writes(tmp_path: Path) -> None:
    model, images_BCHW = model_of(tmp_path, "vgg16", 32), pixels(32, 7)
    model.export(format="onnx", out=tmp_path / "net.onnx", output="embedding", input="uint8")
    (found,) = run(tmp_path / "net.onnx", images_BCHW)
    assert found.shape == (7, 512)  # The average of conv13.
    assert close(found, model.embedding().compute(images_BCHW)["embedding"])


def test_a_folded_network_equals_the_two_layers_inside(tmp_path: Path) -> None:
    model = model_of(tmp_path, "alexnet-small", 32, sobel=True)
    model.export(format="onnx", out=tmp_path / "net.onnx", output="conv1", fold_sobel=True)
    x_BCHW = normalise(pixels(32, 7))
    (found,) = run(tmp_path / "net.onnx", x_BCHW)
    own = stage_of(model, "conv1", x_BCHW)
    assert close(found[:, :, 1:-1, 1:-1], own[:, :, 1:-1, 1:-1]) and not close(found, own)
    kernels = [tuple(one.dims)[2:] for one in onnx.load(tmp_path / "net.onnx").graph.initializer if len(one.dims) == 4]
    assert kernels == [(7, 7)]


def test_the_file_says_what_it_takes(tmp_path: Path) -> None:
    model_of(tmp_path, "alexnet-small", 32).export(format="onnx", out=tmp_path / "net.onnx", input="uint8")
    written = onnx.load(tmp_path / "net.onnx")
    facts = {one.key: one.value for one in written.metadata_props}
    assert facts.items() >= {"arch": "alexnet-small", "image_size": "32", "input": "uint8", "output": "features"}.items()
    assert written.producer_name == "deepcluster"
    batch, *sides = written.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [side.dim_value for side in sides] == [3, 32, 32]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"output": "conv9"},
            r"--output conv9: alexnet-small has features, embedding, projection, cluster, conv1.*did you mean",
        ),
        ({"output": "cluster"}, "has no clusters yet"),
        ({"output": "projection"}, "has no clusters yet"),
        ({"input": "uint16"}, r"--input uint16: use one of normalised, uint8 \(did you mean uint8\?\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        model_of(tmp_path, "alexnet-small", 32).export(format="onnx", out=tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_over_two_gigabytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path, "alexnet-small", 32)
    monkeypatch.setattr("deepcluster.interop.onnx_files.MOST_BYTES", 10**6)
    with pytest.raises(
        InputError, match="an ONNX file holds at most 2 GB, and this network has 13 MB: use --format safetensors"
    ):
        model.export(format="onnx", out=tmp_path / "net.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx_the_message_names_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    words = ["untrained:alexnet-small", "--format", "onnx", "--out", str(tmp_path / "net.onnx")]
    assert main(["export", *words]) == 2
    assert "--format onnx needs onnx and onnxscript: pip install onnx onnxscript" in capsys.readouterr().err
