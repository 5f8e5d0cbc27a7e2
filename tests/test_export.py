"""Exports, read by torchvision, timm, safetensors and the Hugging Face hub's own code."""

import json
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from exports_helper import model_of, printed
from huggingface_hub import ModelCard
from models_helper import make_model, write_classes
from pyarrow.parquet import read_table
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import train_small
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.datasets import ImageFolder

import deepcluster
from deepcluster.cli import cli, main
from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.data.views import ClusterView
from deepcluster.info import info
from deepcluster.interop.cluster_files import read_clusters
from deepcluster.interop.exports import FORMATS, export
from deepcluster.interop.huggingface import crop_share
from deepcluster.interop.importing import import_file
from deepcluster.interop.sobel_folding import fold_sobel
from deepcluster.interop.weight_files import read_weights
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import normalise
from deepcluster.models.weights import take_weights
from deepcluster.run.settings import Settings
from deepcluster.run.space import PredictionSpace, space_state

TORCHVISION = [
    ("resnet18", 64, {"fc.weight", "fc.bias"}),
    ("torchvision:shufflenet_v2_x0_5", 64, {"fc.weight", "fc.bias"}),
    ("torchvision:squeezenet1_1", 64, {"classifier.1.weight", "classifier.1.bias"}),
    ("torchvision:mobilenet_v3_small", 64, {"classifier.3.weight", "classifier.3.bias"}),
]
TIMM = [("resnet18", 64), ("timm:resnet10t", 64), ("timm:test_vit,patch_size=4", 32), ("timm:test_convnext", 64)]
# Every architecture here that takes the fixed Sobel layer in front, with what fits no library.
ANY = [("alexnet-small", 32, True), ("alexnet-small", 32, False), ("resnet18-small", 32, True), ("timm:resnet10t", 64, True)]


def noise(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], size: int) -> float:
    images_BCHW = noise(size)
    features_BD = one(images_BCHW)
    assert features_BD.abs().max() > 0
    return float((features_BD - other(images_BCHW)).abs().max())


def read_as_printed(text: str) -> nn.Module:
    """Run the line of Python that an export prints."""
    names: dict[str, Any] = {}
    exec(text.partition("read it with: ")[2], names)
    net: nn.Module = names["net"]
    return net.eval()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("arch, size, missing", TORCHVISION)
def test_torchvision_misses_only_its_classifier(
    arch: str, size: int, missing: set[str], ending: str, tmp_path: Path
) -> None:
    model, out = model_of(tmp_path, arch, size), tmp_path / f"net{ending}"
    text = printed(model, format="torchvision", out=out)
    state = load_file(out) if ending == ".safetensors" else torch.load(out, weights_only=True)
    found = torchvision.models.get_model(arch.partition(":")[2] or arch).load_state_dict(state, strict=False)
    assert set(found.missing_keys) == missing and not found.unexpected_keys
    assert difference(model.trunk, read_as_printed(text), size) == 0


@pytest.mark.slow
def test_torchvision_reads_vgg16_of_224_pixels(tmp_path: Path) -> None:
    model = model_of(tmp_path, "vgg16", 224)
    text = printed(model, format="torchvision", out=tmp_path / "net.pt")
    assert "left out: the classifier (classifier.6.weight, classifier.6.bias)" in text
    assert difference(model.trunk, read_as_printed(text), 224) == 0


@pytest.mark.parametrize("arch, size", TIMM)
def test_timm_misses_nothing(arch: str, size: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, arch, size)
    text = printed(model, format="timm", out=tmp_path / "net.pt")
    assert "left out" not in text and "strict" not in text
    assert difference(model.trunk, read_as_printed(text), size) == 0


@pytest.mark.parametrize("arch, size", TIMM)
def test_timm_opens_the_folder_of_the_hub(arch: str, size: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, arch, size)
    text = printed(model, format="huggingface", out=tmp_path / "hub", licence="apache-2.0")
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0).eval()
    assert difference(model.trunk, net, size) == 0
    assert difference(model.trunk, read_as_printed(text), size) == 0
    wanted = {"input_size": [3, size, size], "interpolation": "bilinear", "crop_mode": "center"}
    found = resolve_data_config({}, model=net)
    assert found.items() >= {**wanted, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}.items()
    # A classifier of ten classes on grey images: everything between the first and the last layer is ours.
    other = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=10, in_chans=1)
    last = [key for key in net.state_dict() if key.endswith(".bias")][-1]
    assert torch.equal(net.state_dict()[last], other.state_dict()[last])
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "timm")
    assert "trained by DeepCluster" in card.text


def test_a_card_claims_no_training_of_other_weights(tmp_path: Path) -> None:
    """Of another program's file, its import, its export opened again, and of random weights."""
    file, run, hub = tmp_path / "resnet10t.pth", tmp_path / "run", tmp_path / "hub"
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    import_file(file, out=run)
    for number, model in enumerate((file, run, hub, "untrained:alexnet-small")):
        out = hub if number == 0 else tmp_path / f"hub{number}"
        export(model, format="huggingface", out=out)
        card = ModelCard.load(out / "README.md")
        assert "The weights were not trained with deepcluster" in card.text and f"from `{Path(model).name}`" in card.text
        assert "trained by" not in card.text and "epochs" not in card.text and "deepcluster" not in card.data.tags


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 160, 224, 227, 299, 384])
def test_timm_resizes_to_the_size_of_the_view_that_is_clustered(size: int) -> None:
    transform = create_transform((3, size, size), crop_pct=crop_share(ClusterView(size)), interpolation="bilinear")
    assert transform.transforms[0].size == round(size * 256 / 224)
    assert transform.transforms[1].size in (size, [size, size], (size, size))


@pytest.mark.parametrize("format, name", [("safetensors", "net.safetensors"), ("huggingface", "hub")])
@pytest.mark.parametrize("arch, size, sobel", ANY)
def test_init_reads_what_is_exported(arch: str, size: int, sobel: bool, format: str, name: str, tmp_path: Path) -> None:
    model, out = model_of(tmp_path, arch, size, sobel=sobel), tmp_path / name
    assert model.export(format=format, out=out) == out
    trunk = make_trunk(arch, image_size=size, sobel=sobel, seed=9).eval()
    assert "left out" not in take_weights(trunk, read_weights(out), name=name)
    assert difference(model.trunk, trunk, size) == 0
    with safe_open(out if out.is_file() else out / "model.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt" and facts["arch"] == arch and facts["image_size"] == str(size)
    assert facts["sobel"] == str(sobel).lower() and json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert Settings.from_saved(json.loads(facts["deepcluster_settings"])) == model.settings


@pytest.mark.parametrize("format, name", [("safetensors", "net.safetensors"), ("huggingface", "hub")])
def test_load_opens_what_is_exported(format: str, name: str, trained: Path, images: Path, tmp_path: Path) -> None:
    model, out = deepcluster.load(trained), tmp_path / name
    model.export(format=format, out=out)
    found = deepcluster.load(out)
    assert difference(model.trunk, found.trunk, 16) == 0
    assert found.settings.as_dict() == {**model.settings.as_dict(), "init": None, "cache": "auto"}
    if format == "huggingface":
        one, other = deepcluster.assign(model, images, workers=0), deepcluster.assign(found, images, workers=0)
        assert (one.cluster_N == other.cluster_N).all() and (one.distance_N == other.distance_N).all()
    assert ("5 clusters in a space of 16" in info(str(out))) == (format == "huggingface")


def test_files_hold_networks_of_images_with_their_own_statistics(tmp_path: Path) -> None:
    """Inside of deepcluster all images have ImageNet's statistics; a library's network takes its own."""
    mean, std = (0.5, 0.4, 0.3), (0.228, 0.224, 0.2)
    model = model_of(tmp_path, "resnet18", 32, mean=mean, std=std)
    text = printed(model, format="torchvision", out=tmp_path / "net.pt")
    assert "images: in [0, 1], less mean [0.5, 0.4, 0.3], divided by std [0.228, 0.224, 0.2]" in text
    images_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        own = read_as_printed(text)(torchvision.transforms.functional.normalize(images_BCHW, list(mean), list(std)))
        assert torch.allclose(own, model.trunk(normalise(images_BCHW)), atol=1e-4)
    export(model, format="huggingface", out=tmp_path / "hub")
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0)
    found = resolve_data_config({}, model=net)
    assert (found["mean"], found["std"]) == (list(mean), list(std))
    assert difference(deepcluster.load(tmp_path / "hub").trunk, model.trunk, 32) == 0


@pytest.mark.slow
def test_the_code_of_2018_continues_an_exported_run(tmp_path: Path) -> None:
    """All the way round: a run, its files of 2018, the script of 2018 that resumes them, and its log as a table."""
    data = write_classes(tmp_path / "data", 8)
    options: dict[str, Any] = {"arch": "alexnet", "image_size": 224, "clusters": 4, "pca": 8, "cluster_stage": "features"}
    run = train_small(data, tmp_path / "run", **options, batch_size=12, epochs=1)
    assert "left out" not in printed(deepcluster.load(run), format="release2018", out=tmp_path / "files")
    checkpoint, log = tmp_path / "files" / "checkpoint.pth.tar", tmp_path / "files" / "clusters"
    state = torch.load(checkpoint, weights_only=True)
    assert (state["epoch"], state["arch"], len(state["state_dict"]["top_layer.bias"])) == (1, "alexnet", 4)
    assert difference(deepcluster.load(checkpoint).trunk, deepcluster.load(run).trunk, 224) == 0
    (epoch,) = pickle.loads(log.read_bytes())
    table = read_table(run / "assignments" / "epoch-0001.parquet").to_pydict()
    cluster_of = dict(zip(table["name"], table["cluster"], strict=True))
    paths = [str(Path(path).relative_to(data)) for path, _ in ImageFolder(data).imgs]
    assert {paths[image]: cluster for cluster, images in enumerate(epoch) for image in images} == cluster_of
    words = [data, "--arch", "alexnet", "--sobel", "--nmb_cluster", "4", "--epochs", "2", "--batch", "12", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-m", "deepcluster.interop.release2018", "main", *words, "--workers", "0"]
        + ["--resume", checkpoint, "--exp", tmp_path / "exp"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"=> loaded checkpoint '{checkpoint}' (epoch 1)" in done.stdout and "###### Epoch [1] ######" in done.stdout


@pytest.mark.slow
def test_opencv_reads_a_caffe_model_of_a_file_of_2018(tmp_path: Path) -> None:
    """With the clusters of the file: its last layer scores them."""
    generator = torch.Generator().manual_seed(6)
    weight_KD, bias_K = torch.randn(9, 4096, generator=generator), torch.randn(9, generator=generator)
    bare = model_of(tmp_path, "alexnet", 224, sobel=True)
    clusters = Assignment(torch.empty(0, dtype=torch.int64), torch.empty(0), PredictionSpace.centroids(weight_KD, bias_K))
    model = replace(bare, space=PredictionSpace(4096), assignment=clusters)
    text = printed(model, format="caffe", out=tmp_path / "net.caffemodel")
    assert text.startswith(f"{tmp_path}/net.caffemodel, {tmp_path}/net.prototxt: a Caffe model, 233 MB\n")
    assert "left out" not in text
    names: dict[str, Any] = {}
    exec(text.partition("read it with: ")[2], names)
    images_BCHW = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=generator)
    names["net"].setInput(images_BCHW.flip(1).float().numpy())
    (scores_1K,) = names["net"].forward(["AddmmBackward29"])
    with torch.no_grad():
        features_1D = model.trunk(normalise(images_BCHW))
    expected = torch.relu(features_1D) @ weight_KD.T + bias_K
    # Scores are in proportion: centroids have unit length.
    ratio = scores_1K / expected.numpy()
    assert ratio.min() > 0 and np.abs(ratio / ratio.mean() - 1).max() < 1e-3
    assert scores_1K.argmax() == expected.argmax()


def test_the_files_of_2018_of_a_model_without_clusters(tmp_path: Path) -> None:
    text = printed(make_model(tmp_path, arch="alexnet", image_size=224), format="release2018", out=tmp_path / "files")
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["checkpoint.pth.tar"]
    assert "left out: top_layer, which the model does not have and the scripts of 2018 need; clusters, which only" in text


def test_the_folder_of_a_network_of_ours_names_it_and_holds_its_settings(tmp_path: Path) -> None:
    model = model_of(tmp_path, "alexnet-small", 32, sobel=True, init="of/this/machine.pt")
    export(model, format="huggingface", out=tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("alexnet-small", 0, 256)
    assert config["deepcluster_settings"]["sobel"] and config["deepcluster_settings"]["init"] is None
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert (card.data.license, card.data.library_name) == ("unknown", "deepcluster")


def test_the_folder_holds_the_clusters(trained: Path, tmp_path: Path) -> None:
    model = deepcluster.load(trained)
    text = printed(model, format="huggingface", out=tmp_path / "hub")
    assert "left out" not in text
    path = tmp_path / "hub" / "clusters.safetensors"
    space, assignment = read_clusters(path, model.settings, dim=model.trunk.dim, machine=model.machine)
    own_space, own = model.clusters()
    for one, other in (
        (space_state(space)["whitening"], space_state(own_space)["whitening"]),
        (vars(assignment), vars(own)),
    ):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


def test_weights_that_are_tied_or_not_contiguous_are_written(tmp_path: Path) -> None:
    model = model_of(tmp_path, "alexnet-small", 16)
    features: Any = model.trunk.get_submodule("features")
    model.trunk.register_parameter("tied", nn.Parameter(features[0].weight.detach().mT))
    model.trunk.register_parameter("twice", model.trunk.tied)
    export(model, format="safetensors", out=tmp_path / "net.safetensors")
    state = load_file(tmp_path / "net.safetensors")
    assert torch.equal(state["tied"], state["twice"]) and torch.equal(state["tied"], features[0].weight.mT)
    assert (tmp_path / "net.safetensors").stat().st_mode & stat.S_IROTH


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_runs_in_any_precision_are_written_in_float32_and_stay_as_they_are(precision: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, "alexnet-small", 16, precision=precision).on("cpu")
    before = {key: value.clone() for key, value in model.trunk.state_dict().items()}
    assert deepcluster.export(model, format="safetensors", out=tmp_path / "net.safetensors").is_file()
    state = load_file(tmp_path / "net.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}  # int64 counts batches.
    for key, value in model.trunk.state_dict().items():
        assert value.dtype == before[key].dtype and value.stride() == model.trunk.state_dict()[key].stride()
        assert torch.equal(value.float(), state[key].float()), key
    assert model.trunk.features[0].weight.dtype == Machine.choose("cpu", precision).dtype


# Sides of the first map; of its windows the first and the last are outside of the image: worked out by hand. DeeperCluster's
# network sees a border of zeros, beyond which the Sobel map is zero in both.
FOLDED = [
    ("alexnet-small", 32, "features.0", 7, (14 / 16) ** 2),
    ("resnet18", 64, "conv1", 9, (29 / 32) ** 2),
    ("resnet18-small", 32, "conv1", 5, (30 / 32) ** 2),
    ("timm:test_vit,patch_size=4", 32, "patch_embed.proj", 6, 1.0),
    ("vgg16-deepercluster", 32, "features.0", 5, 1.0),
    pytest.param("alexnet", 224, "features.0", 13, (53 / 55) ** 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("arch, size, layer, side, share", FOLDED)
def test_sobel_is_folded_exactly_inside_the_image(arch: str, size: int, layer: str, side: int, share: float) -> None:
    trunk = make_trunk(arch, image_size=size, sobel=True).eval()
    folded = fold_sobel(trunk, size)
    assert folded.layer == layer and folded.convolution.kernel_size == (side, side)
    assert folded.share == pytest.approx(share)
    assert folded.difference < (1e-4 if share == 1 else 0.5)
    names = dict(trunk.named_modules())
    first: Any = names.get(layer) or names[f"backbone.{layer}"]
    # Oracle: the composed convolution of a large image, without any padding.
    weight, bias = folded.convolution.weight, folded.convolution.bias
    images_BCHW = noise(5 * side).double()
    assert trunk.sobel is not None
    with torch.no_grad():
        edges_BCHW = conv2d(images_BCHW.mean(dim=1, keepdim=True), trunk.sobel.state_dict()["1.weight"].double())
        two = conv2d(edges_BCHW, first.weight.double(), None if first.bias is None else first.bias.double())
        one = conv2d(images_BCHW, weight.double(), None if bias is None else bias.double())
    assert torch.allclose(one, two, atol=1e-5 * float(two.abs().max()))


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_a_folded_network_is_read_with_the_printed_line(format: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, "resnet18", 64, sobel=True)
    text = printed(model, format=format, out=tmp_path / "net.pt", fold_sobel=True)
    assert "Sobel is folded into conv1, now 9 × 9 on RGB: equal at 82.1 % of its positions, not at the border" in text
    net = read_as_printed(text)
    folded = fold_sobel(model.trunk, 64)
    assert difference(folded.trunk, net, 64) == 0
    assert model.trunk.sobel is not None


def test_a_folded_network_in_safetensors_does_not_claim_the_settings_of_its_run(tmp_path: Path) -> None:
    model = model_of(tmp_path, "alexnet-small", 32, sobel=True)
    export(model, format="safetensors", out=tmp_path / "net.safetensors", fold_sobel=True)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["sobel"] == "folded into features.0" and "deepcluster_settings" not in file.metadata()
        assert file.get_tensor("features.0.weight").shape == (96, 3, 7, 7)
        assert not [key for key in file.keys() if key.startswith("sobel")]  # noqa: SIM118


TAKE_ANY = "--format safetensors, huggingface and onnx take any network"
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("format", {}, {"format": "torchvison", "out": "a.pt"}, r"unknown format 'torchvison' \(did you mean torchvision\?\)"),
    ("ending", {}, {"format": "safetensors", "out": "a.pt"}, "--out .*a.pt: the file should end in .safetensors"),
    ("no folder", {}, {"format": "onnx", "out": "none/a.onnx"}, "the folder .*none does not exist"),
    ("a folder", {}, {"format": "onnx", "out": "there"}, "the file should end in .onnx"),
    ("folder in use", {}, {"format": "huggingface", "out": "there"}, "there is not an empty folder"),
    ("a file", {}, {"format": "huggingface", "out": "file"}, "is a file, and --format huggingface writes a folder"),
    ("option", {}, {"format": "timm", "out": "a.pt", "output": "conv1"}, "--output goes with --format onnx, not timm"),
    ("no option", {}, {"format": "timm", "out": "a.pt", "opset": 9}, "--opset is not an option of export"),
    ("torchvision", {}, {"format": "torchvision", "out": "a.pt"}, f"no network like alexnet-small: {TAKE_ANY}"),
    ("timm", {"arch": "resnet18-small"}, {"format": "timm", "out": "a.pt"}, f"no network like resnet18-small: {TAKE_ANY}"),
    (
        "other library",
        {"arch": "torchvision:shufflenet_v2_x0_5", "image_size": 64},
        {"format": "timm", "out": "a.pt"},
        "timm has no network like torchvision:shufflenet_v2_x0_5: use --format torchvision; ",
    ),
    (
        "size",
        {"arch": "vgg16", "image_size": 32},
        {"format": "torchvision", "out": "a.pt"},
        r"vgg16_bn is made for other images than those of 32 px: its classifier.0.weight is 4096 × 25088, here 4096 × 512",
    ),
    (
        "Sobel",
        {"arch": "resnet18", "image_size": 64, "sobel": True},
        {"format": "torchvision", "out": "a.pt"},
        "takes the 2 channels of the Sobel layer, and torchvision has no such layer: .*--fold-sobel, or keep it",
    ),
    ("licence", {}, {"format": "huggingface", "out": "new", "licence": "a: b"}, "--licence 'a: b': give the identifier"),
    (
        "2018",
        {},
        {"format": "release2018", "out": "new"},
        "the 2018 release has no alexnet-small: its files hold",
    ),
    (
        "Caffe",
        {},
        {"format": "caffe", "out": "a.caffemodel"},
        "Caffe models are written of alexnet and vgg16",
    ),
    ("no Sobel", {}, {"format": "safetensors", "out": "a.safetensors", "fold_sobel": True}, "has no Sobel layer; leave"),
    (
        "no plain convolution",
        {"arch": "timm:tf_efficientnet_b0", "image_size": 64, "sobel": True},
        {"format": "timm", "out": "a.pt", "fold_sobel": True},
        "--fold-sobel: the first layer of timm:tf_efficientnet_b0 is not a plain convolution",
    ),
]


@pytest.mark.parametrize("settings, options, message", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_can_not_be_exported_is_refused(
    settings: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "file").touch()
    before = set(tmp_path.rglob("*"))
    model = make_model(tmp_path / "cache", **settings)
    with pytest.raises(InputError, match=message):
        export(model, **{**options, "out": tmp_path / options["out"]})
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format, out", [("safetensors", "a.safetensors"), ("huggingface", "hub")])
def test_without_safetensors_the_message_names_it(
    format: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        export(make_model(tmp_path / "cache"), format=format, out=tmp_path / out)
    assert not list(tmp_path.glob("*"))


def test_the_command_prints_what_it_wrote(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    words = ["export", str(trained), "--format", "safetensors", "--out", str(out)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    first, left, reading = result.output.splitlines()
    assert first == f"{out}: the weights of the trunk, {out.stat().st_size // 10**6} MB"
    assert left == "left out: the clusters (--format huggingface keeps them)"
    assert reading == f"read it with: import deepcluster; model = deepcluster.load({str(out)!r})"
    assert CliRunner().invoke(cli, [*words, "--quiet"]).output == ""


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["untrained:alexnet-small", "--format", "torchvision", "--out", str(tmp_path / "a.pt")]
    assert main(["export", *words]) == 2
    assert capsys.readouterr().err == f"deepcluster: torchvision has no network like alexnet-small: {TAKE_ANY}\n"


def test_the_help_names_every_format() -> None:
    (named,) = [one.help for one in cli.commands["export"].params if one.name == "format"]  # type: ignore[attr-defined]
    assert all(name in named for name in FORMATS)
