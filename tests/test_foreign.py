"""Files of other programs as models: made here with the names of tensors that these programs give them."""

import argparse
import collections
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, relu

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors
from deepcluster.core.inert import Inert
from deepcluster.interop.loading import load
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.model import Model

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pixels(size: int = 224, count: int = 1) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stirred(network: nn.Module) -> nn.Module:
    """In eval mode, with averages of BatchNorm and biases that are not those of a new network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("running_mean", "bias")) and "sobel" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.eval()


def release_names(trunk: Trunk, n_clusters: int | None = None) -> Tensors:
    """As the 2018 code saves a network: DataParallel around its convolutions, no counters of BatchNorm."""
    state = {key: value for key, value in trunk.state_dict().items() if not key.endswith("num_batches_tracked")}
    named = {key.replace("features.", "features.module."): value for key, value in state.items()}
    if n_clusters:
        generator = torch.Generator().manual_seed(2)
        named["top_layer.weight"] = torch.randn(n_clusters, trunk.dim, generator=generator) * 0.01
        named["top_layer.bias"] = torch.randn(n_clusters, generator=generator)
    return named


@torch.no_grad()
def features(model: Model, images: Tensor) -> Tensor:
    return model.trunk(normalise(images))


@torch.no_grad()
def assert_same_features(model: Model, trunk: nn.Module, size: int = 224) -> None:
    images = pixels(size)
    assert torch.equal(model.trunk(normalise(images)), trunk(normalise(images)))


@pytest.mark.parametrize("sobel", [True, False])
def test_a_released_alexnet_has_the_clusters_that_it_predicts(sobel: bool, tmp_path: Path) -> None:
    trunk = stirred(make_trunk("alexnet", sobel=sobel, seed=1))
    tensors = release_names(trunk, 50)
    file = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 201, "arch": "alexnet", "state_dict": tensors}, file)
    model = load(file)
    assert (model.settings.arch, model.settings.sobel, model.image_size) == ("alexnet", sobel, 224)
    assert_same_features(model, trunk)
    own = len([key for key in tensors if key.startswith(("features", "classifier"))])
    assert (
        model.remark
        == f"{own} of {own} tensors of alexnet, and 2 more that give 50 clusters (the file holds {len(tensors)})"
    )
    # The cluster of an image is that of the largest score, of features of all lengths.
    features_ND = torch.randn(300, 4096, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 300)[:, None]
    scores_NK = relu(features_ND).double() @ tensors["top_layer.weight"].double().T + tensors["top_layer.bias"].double()
    space, clusters = model.clusters()
    assert torch.equal(clusters.nearest(space.transform(features_ND))[0], scores_NK.argmax(dim=1))
    assert len(scores_NK.argmax(dim=1).unique()) > 5


def test_a_released_vgg16_and_that_of_tiny_imagenet(tmp_path: Path) -> None:
    """The re-implementation has no DataParallel: names without `module`."""
    trunk = stirred(make_trunk("vgg16", image_size=64, sobel=True, seed=1))
    torch.save({"state_dict": release_names(trunk)}, tmp_path / "a.pth.tar")
    torch.save({"state_dict": trunk.state_dict(), "epoch": 3}, tmp_path / "b.pth.tar")
    for name in ("a.pth.tar", "b.pth.tar"):
        model = load(tmp_path / name)
        assert (model.settings.arch, model.settings.sobel, model.image_size) == ("vgg16", True, 64)
        assert_same_features(model, trunk, 64)
    with pytest.raises(InputError, match="has no clusters"):
        model.clusters()


@pytest.mark.parametrize("sobel", [True, False])
def test_deepercluster_pads_the_image(sobel: bool, tmp_path: Path) -> None:
    """Zeros around the image (2 pixels, or 1 without Sobel), an unpadded Sobel, and the network's own padding."""
    plain = stirred(make_trunk("vgg16", image_size=64, sobel=sobel, seed=1))
    names = {
        f"module.{key}" if key.startswith("sobel") else f"module.body.{key}": value
        for key, value in plain.state_dict().items()
    }
    torch.save({"epoch": 1, "state_dict": names, "args": argparse.Namespace(arch="vgg16")}, tmp_path / "ours.pth")
    model = load(tmp_path / "ours.pth")
    assert (model.settings.arch, model.settings.sobel) == ("vgg16-deepercluster", sobel)
    with torch.no_grad():
        x = normalise(pixels(64))
        if sobel:
            grey, edges = plain.sobel
            x = nn.functional.conv2d(grey(pad(x, (2, 2, 2, 2))), edges.weight, edges.bias)
        else:
            x = pad(x, (1, 1, 1, 1))
        expected = plain.classifier(plain.features(x).flatten(1))
        assert plain.features[0](x).shape[2] == 66
    torch.testing.assert_close(features(model, pixels(64)), expected, rtol=1e-5, atol=1e-6)


def prototypes_of(dim: int, heads: tuple[int, ...]) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    projection = stirred(nn.Sequential(nn.Linear(dim, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)))
    return projection, [torch.randn(count, 16) * torch.rand(count, 1) for count in heads]


@pytest.mark.parametrize("origin", ["deepclusterv2", "swav", "solo", "lightly", "vissl"])
def test_prototypes_are_clusters(origin: str, tmp_path: Path) -> None:
    network = stirred(torchvision.models.resnet18())
    projection, prototypes = prototypes_of(512, (30,) if origin in ("swav", "vissl") else (30, 20, 10))
    own = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    head = projection.state_dict()
    if origin == "lightly":
        projection[0].bias.data.zero_()
        head = {key: value for key, value in projection.state_dict().items() if key != "0.bias"}
    trunk_prefix, projection_prefix, name, container = {
        "deepclusterv2": ("module.", "module.projection_head.", "module.prototypes.prototypes{}.weight", None),
        "swav": ("module.", "module.projection_head.", "module.prototypes.weight", None),
        "solo": ("backbone.", "projector.", "prototypes.{}.weight", "state_dict"),
        "lightly": ("backbone.", "projection_head.layers.", "prototypes.heads.{}.weight", "state_dict"),
        "vissl": ("trunk._feature_blocks.", "heads.0.projection_head.", "heads.0.prototypes{}.weight", "model"),
    }[origin]
    tensors = {
        **{trunk_prefix + key: value for key, value in own.items()},
        **{projection_prefix + key: value for key, value in head.items()},
        **{name.format(number): value for number, value in enumerate(prototypes)},
    }
    torch.save(tensors if container is None else {container: tensors, "epoch": 5}, tmp_path / "file.pth.tar")
    model = load(tmp_path / "file.pth.tar")
    assert model.settings.arch == "resnet18"
    assert model.settings.heads == tuple(map(len, prototypes))
    assert model.settings.std == ((0.228 if origin in ("deepclusterv2", "swav") else 0.229), 0.224, 0.225)
    images = pixels(64, 8)
    with torch.no_grad():
        network.fc = nn.Identity()
        deviation = torch.tensor(model.settings.std)[:, None, None]
        features_BD = network((images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / deviation)
        torch.testing.assert_close(features(model, images), features_BD, rtol=1e-4, atol=1e-5)
        points_BP = normalize(projection(features_BD))
    space, clusters = model.clusters()
    torch.testing.assert_close(space.transform(features_BD), points_BP)
    expected = (points_BP @ normalize(prototypes[0]).T).argmax(dim=1)
    assert torch.equal(clusters.nearest(space.transform(features_BD))[0], expected)


def as_released(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "used"),
    [
        (lambda state: state, "left out fc.weight, fc.bias"),
        (lambda state: {"state_dict": as_released(state, "module.encoder_q."), "arch": "resnet18"}, ""),
        (lambda state: {"meta": {}, "state_dict": as_released(state, "backbone.")}, ""),
        (
            lambda state: {
                "classy_state_dict": {"base_model": {"model": {"trunk": as_released(state, "_feature_blocks.")}}}
            },
            "",
        ),
        (lambda state: {"state_dict": sequence(state), "hyper_parameters": {"lr": 0.1}}, ""),
        (lambda state: sequence(state, "backbone."), ""),
        (lambda state: {"model": torchvision_module(state)}, ""),
    ],
    ids=["torchvision", "moco", "mmselfsup", "vissl", "lightly", "lightly-flat", "whole-module"],
)
def test_a_resnet_is_found_by_its_names(wrap: Callable[[Tensors], Any], used: str, tmp_path: Path) -> None:
    network = stirred(torchvision.models.resnet18())
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth")
    model = load(tmp_path / "weights.pth")
    assert (model.settings.arch, model.settings.sobel) == ("resnet18", False)
    network.fc = nn.Identity()
    assert_same_features(model, network)
    assert "100 of 100 tensors of resnet18" in model.remark


def test_of_two_copies_it_is_said_which_one_is_used(tmp_path: Path) -> None:
    network, other = (torchvision.models.resnet18().eval() for _ in range(2))
    own, copy = ({key: value for key, value in one.state_dict().items() if "fc." not in key} for one in (network, other))
    network.fc = other.fc = nn.Identity()
    for first, second in (
        ("backbone.", "momentum_backbone."),
        ("backbone.", "backbone_momentum."),
        ("module.encoder_q.", "module.encoder_k."),
        ("student.backbone.", "teacher.backbone."),
    ):
        torch.save({"state_dict": as_released(own, first) | as_released(copy, second)}, tmp_path / "a.pth")
        model = load(tmp_path / "a.pth")
        assert_same_features(model, network, 64)
        first, second = (one.removeprefix("module.") for one in (first, second))
        assert f"of several copies that under {first} was used, not {second}" in model.remark
    torch.save({"student": as_released(copy, "module."), "teacher": own, "epoch": 3}, tmp_path / "b.pth")
    model = load(tmp_path / "b.pth")
    assert_same_features(model, network, 64)
    assert "of teacher and student in the file, teacher was used" in model.remark


def in_vissl(trunk: Tensors) -> dict[str, Any]:
    return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk}}}}


def sequence(state: Tensors, prefix: str = "backbone.") -> Tensors:
    """As lightly's tutorials name a ResNet: the sequence of its children without the last."""
    children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    return {
        f"{prefix}{children.index(key.split('.')[0])}.{key.split('.', 1)[1]}": value
        for key, value in state.items()
        if not key.startswith("fc.")
    }


def torchvision_module(state: Tensors) -> nn.Module:
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    return network


def test_mmselfsup_with_sobel_and_its_clusters(tmp_path: Path) -> None:
    trunk = stirred(make_trunk("resnet18", image_size=64, sobel=True, seed=1))
    state = trunk.state_dict()
    tensors = {key: value for key, value in state.items() if key.startswith("backbone.")}
    tensors |= {f"backbone.sobel_layer.{key}": value for key, value in state.items() if key.startswith("sobel.")}
    tensors |= {
        "head.fc_cls.weight": torch.randn(40, 512),
        "head.fc_cls.bias": torch.randn(40),
        "loss_weight": torch.ones(40),
    }
    torch.save({"meta": {"epoch": 200}, "state_dict": tensors}, tmp_path / "deepcluster-sobel.pth")
    model = load(tmp_path / "deepcluster-sobel.pth")
    assert (model.settings.arch, model.settings.sobel, model.settings.n_clusters) == ("resnet18", True, 40)
    assert_same_features(model, trunk, 64)
    features_ND = torch.randn(50, 512)
    space, clusters = model.clusters()
    scores = relu(features_ND) @ tensors["head.fc_cls.weight"].T + tensors["head.fc_cls.bias"]
    assert torch.equal(clusters.nearest(space.transform(features_ND))[0], scores.argmax(dim=1))
    assert "left out: loss_weight" in model.remark


@pytest.mark.parametrize("arch", ["torchvision:resnet34", "torchvision:densenet121", "torchvision:mobilenet_v3_small"])
def test_other_networks_of_torchvision(arch: str, tmp_path: Path) -> None:
    trunk = stirred(make_trunk(arch, image_size=64, sobel=False, seed=1))
    network = torchvision.models.get_model(arch.partition(":")[2])
    network.load_state_dict(trunk.backbone.state_dict(), strict=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = load(tmp_path / "weights.pth")
    assert model.settings.arch == arch
    assert_same_features(model, trunk, 64)


def test_networks_of_timm_by_name_or_as_a_folder_of_a_hub(tmp_path: Path) -> None:
    network = stirred(timm.create_model("resnet10t", num_classes=7))
    torch.save(network.state_dict(), tmp_path / "unnamed.pth")
    with pytest.raises(InputError, match=r"is not known: it has .*timm:NAME@unnamed.pth"):
        load(tmp_path / "unnamed.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    safetensors.torch.save_file(network.state_dict(), hub / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (hub / "config.json").write_text(json.dumps(config))
    network.reset_classifier(0)
    x = pixels(64)
    for given, mean, std in (
        (f"timm:resnet10t@{tmp_path / 'unnamed.pth'}", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (str(hub), (0.5,) * 3, (0.25,) * 3),
    ):
        model = load(given)
        assert (model.settings.arch, model.settings.mean, model.settings.std) == ("timm:resnet10t", mean, std)
        own = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.no_grad():
            torch.testing.assert_close(features(model, x), network(own), rtol=1e-4, atol=1e-5)


def test_a_file_that_shows_no_known_network(tmp_path: Path) -> None:
    torch.save({"arch": "mystery", "state_dict": {"stem.weight": torch.ones(3, 4), "b": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match=r"the network of this file is not known: it has 2 tensors, such as stem.weight 3×4"
    ):
        load(tmp_path / "a.pth")
    with pytest.raises(InputError, match="does not hold the weights of resnet18: it has 2 tensors"):
        load(f"resnet18@{tmp_path / 'a.pth'}")
    with pytest.raises(InputError, match=r"timm has no classifier 'resnte18' \(did you mean resnet18"):
        load(f"timm:resnte18@{tmp_path / 'a.pth'}")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="holds no weights of a network: it has epoch"):
        load(tmp_path / "b.pth")
    torch.save(release_names(make_trunk("alexnet-small", image_size=32, sobel=False)), tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="can't be read: truncated, damaged"):
        load(tmp_path / "c.pth")
    for content, kind in ((b"", r"empty \(0 bytes\)"), (b"hello\n", "text")):
        (tmp_path / "d.pth").write_bytes(content)
        with pytest.raises(InputError, match=f"d.pth is not a checkpoint: it is {kind}"):
            load(tmp_path / "d.pth")


class Ran:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


class Opened:
    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.Popen, (["touch", "ran"],)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('ran', 'w')",)


class Buffer:
    """A class of another library, with state, as mmengine's HistoryBuffer."""

    def __init__(self) -> None:
        self.values = np.arange(3)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        touched = pathlib.Path("made")
        return Buffer, (), {"values": self.values, "path": touched}

    def __setstate__(self, state: Any) -> None:
        Path("ran").touch()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_stands_beside_the_tensors_is_inert(
    protocol: int, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    state = {
        "model": {"w": weight, "half": torch.ones(2, dtype=torch.bfloat16), "view": torch.arange(10)[2:5]},
        "best": np.float64(0.5),
        "rows": np.arange(4).reshape(2, 2),
        "objects": np.array([None, "a"], dtype=object),
        "path": pathlib.PurePosixPath("a/b"),
        "buffer": Buffer(),
        "default": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2]),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "args": argparse.Namespace(arch="resnet50", lr=0.1),
        "dtype": torch.float16,
        "counter": collections.Counter("aab"),
        "slice": slice(1, 2),
        "bytes": b"abc",
        "complex": 1j,
    }
    torch.save(state, "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = load_tensors(Path("a.pth"))
    for key, value in state["model"].items():
        assert torch.equal(found["model"][key], value.detach())
        assert found["model"][key].dtype == value.dtype
    assert (found["best"], found["bytes"]) == (0.5, b"abc")
    assert type(found["best"]) is float
    assert found["rows"].tolist() == [[0, 1], [2, 3]]
    assert found["default"] == {"a": [1]}
    assert isinstance(found["buffer"], Inert)
    assert found["args"].state == {"arch": "resnet50", "lr": 0.1}
    assert not Path("ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("code", [Ran, Opened, Evaluated])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused(code: type, protocol: int, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"model": {"w": torch.ones(2)}, "other": code()}
    torch.save(state, "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"holds code \(.*(system|Popen|eval)\); it is refused, and nothing in it was run"):
        load("a.pth")
    assert not Path("ran").exists()


def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(InputError, match=r"a.pt is a program \(TorchScript\): save the state_dict"):
        load(tmp_path / "a.pt")


def test_statistics_other_than_imagenets(tmp_path: Path) -> None:
    """The trunk goes from normalised images to its own: the result is that of the formula, in training and evaluation."""
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    one, other = (make_trunk("resnet18-small", image_size=32, sobel=False, seed=3, **more) for more in (own, {}))
    x = pixels(32, 4)
    mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in own.values())
    for mode in (True, False):
        torch.testing.assert_close(
            one.train(mode)(normalise(x)), other.train(mode)((x / 255 - mean_311) / std_311), rtol=1e-4, atol=1e-4
        )
    assert one.state_dict().keys() == other.state_dict().keys()
    with pytest.raises(InputError, match="std=0,1,1 must be more than 0"):
        deepcluster.Settings(std=(0.0, 1.0, 1.0))
