"""Weights to start from: every kind of file, names under other programs' prefixes, and what does not fit."""

import argparse
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.interop.weight_files import read_weights
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import Trunk
from deepcluster.models.weights import take_weights

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """torchvision's own network, as users have it on disk."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def saved(resnet: nn.Module) -> Weights:
    return {key: value.clone() for key, value in resnet.state_dict().items()}


@pytest.fixture
def trunk() -> Trunk:
    return make_trunk("resnet18", image_size=32, sobel=False, seed=1).eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def features_of(oracle: nn.Module) -> Tensor:
    """What torchvision's ResNet gives before its classifier."""
    with torch.no_grad():
        net: Any = oracle
        x = net.maxpool(net.relu(net.bn1(net.conv1(images()))))
        return net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x))))).flatten(1)


@pytest.mark.parametrize("arch", ["resnet18", "torchvision:resnet18", "timm:resnet18"])
def test_weights_of_torchvision_give_its_features(arch: str, resnet: nn.Module, saved: Weights) -> None:
    """In our ResNet, torchvision's and timm's: 60 weights, and 40 averages of 20 BatchNorms; counters are left out."""
    trunk = make_trunk(arch, image_size=32, sobel=False).eval()
    message = take_weights(trunk, saved, name="r18.pth")
    assert message == f"initialised 100 of 100 tensors of {arch} from r18.pth; left out fc.weight, fc.bias"
    with torch.no_grad():
        torch.testing.assert_close(trunk(images()), features_of(resnet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "backbone.", "encoder.", "model.", "trunk.", "_orig_mod.", "module.encoder_q.", "x.y.z.", "module.x."],
)
def test_prefixes_are_found(prefix: str, saved: Weights, trunk: Trunk) -> None:
    weights = {prefix + key: value for key, value in saved.items() if not key.startswith("fc")}
    weights["projection.0.weight"] = torch.zeros(3, 3)
    message = take_weights(trunk, weights, name="file")
    assert message == "initialised 100 of 100 tensors of resnet18 from file; left out projection.0.weight"
    assert all(torch.equal(value, saved[key.removeprefix("backbone.")]) for key, value in trunk.state_dict().items())


def test_of_two_copies_the_first_is_taken(saved: Weights, trunk: Trunk) -> None:
    """A query encoder stands before its slow copy."""
    slow = {f"encoder_k.{key}": torch.zeros_like(value) for key, value in saved.items()}
    message = take_weights(trunk, {f"encoder_q.{key}": value for key, value in saved.items()} | slow, name="file")
    assert torch.equal(trunk.backbone.conv1.weight, saved["conv1.weight"])
    assert "left out 124 tensors (encoder_q.fc.weight, encoder_q.fc.bias, encoder_k.conv1.weight" in message


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18-small", "torchvision:mobilenet_v3_small", "timm:test_vit"])
def test_a_trunk_takes_its_own_state(arch: str) -> None:
    for sobel in (True, False):
        one, other = (make_trunk(arch, image_size=32, sobel=sobel, seed=seed).eval() for seed in (0, 1))
        message = take_weights(other, one.state_dict(), name="run")
        total = sum(not key.startswith("sobel.") and "num_batches" not in key for key in one.state_dict())
        assert message == f"initialised {total} of {total} tensors of {arch} from run"
        with torch.no_grad():
            assert torch.equal(one(images()), other(images()))


def test_weights_of_timm_give_its_features() -> None:
    torch.manual_seed(0)
    for name in ("test_vit", "test_convnext", "test_efficientnet"):
        oracle = timm.create_model(name, **({"img_size": 32} if name == "test_vit" else {})).eval()
        trunk = make_trunk(f"timm:{name}", image_size=32, sobel=False, seed=4).eval()
        message = take_weights(trunk, oracle.state_dict(), name="file")
        assert "kept at random" not in message
        assert "left out" in message
        with torch.no_grad():
            expected = oracle.forward_head(oracle.forward_features(images()), pre_logits=True)
            torch.testing.assert_close(trunk(images()), expected)


def test_names_of_the_2018_release_and_of_torchvision_fit_the_papers_networks() -> None:
    """The release had its convolutions in DataParallel, `features.module.N`; and its classifier over pseudo-labels."""
    one, other = (make_trunk("alexnet", image_size=64, seed=seed) for seed in (0, 1))
    released = {key.replace("features.", "features.module."): value for key, value in one.state_dict().items()}
    released |= {"top_layer.weight": torch.zeros(5, 4096), "top_layer.bias": torch.zeros(5)}
    message = take_weights(other, released, name="checkpoint.pth.tar")
    assert message.endswith("34 of 34 tensors of alexnet from checkpoint.pth.tar; left out top_layer.weight, top_layer.bias")
    assert torch.equal(one.features[0].weight, other.features[0].weight)


def test_half_precision_is_widened(saved: Weights, trunk: Trunk) -> None:
    take_weights(trunk, {key: value.half() for key, value in saved.items()}, name="file")
    weights = trunk.backbone.conv1.weight
    assert weights.dtype == torch.float32
    assert torch.equal(weights, saved["conv1.weight"].half().float())


def test_a_few_tensors_may_be_missing(saved: Weights, trunk: Trunk) -> None:
    before = trunk.backbone.layer4[1].bn2.weight.clone()
    some = {key: value for key, value in saved.items() if key != "layer4.1.bn2.weight" and not key.startswith("fc")}
    message = take_weights(trunk, some, name="file")
    assert message == "initialised 99 of 100 tensors of resnet18 from file; kept at random layer4.1.bn2.weight"
    assert torch.equal(trunk.backbone.layer4[1].bn2.weight, before)


def refusal(trunk: Trunk, weights: Weights) -> str:
    """The message; the trunk is as it was."""
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    with pytest.raises(InputError) as raised:
        take_weights(trunk, weights, name="FILE")
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())
    return str(raised.value)


def test_what_does_not_fit_is_reported(saved: Weights, trunk: Trunk) -> None:
    text = refusal(trunk, torchvision.models.squeezenet1_1().state_dict())
    assert (
        "FILE does not hold the weights of resnet18: 0 of 100 names match; the network has 100 tensors (conv1.weight" in text
    )
    assert "the file 52 tensors (features.0.weight" in text
    assert "0 of 100 names match" in refusal(trunk, {"a": torch.zeros(2)})
    text = refusal(make_trunk("resnet18-small", image_size=32, sobel=False), saved)
    assert "FILE does not fit resnet18-small: 1 tensors have another shape (conv1.weight 64×3×7×7 for 64×3×3×3)" in text
    small, large = (make_trunk("timm:test_vit", image_size=size, sobel=False) for size in (32, 64))
    assert "pos_embed 1×17×64 for 1×5×64); use the --arch and the --image-size" in refusal(small, large.state_dict())


def test_colour_and_sobel_do_not_mix(saved: Weights, trunk: Trunk) -> None:
    with_sobel = make_trunk("resnet18", image_size=32, sobel=True)
    assert refusal(with_sobel, saved) == (
        "FILE was trained on colour images (3 channels), this resnet18 takes the 2 channels of the Sobel layer "
        "(conv1.weight); use --no-sobel"
    )
    assert refusal(trunk, with_sobel.state_dict()).endswith("takes colour images (3 channels) (conv1.weight); use --sobel")


def test_weights_that_are_not_finite_are_refused(saved: Weights, trunk: Trunk) -> None:
    broken = saved | {"bn1.weight": torch.full((64,), torch.nan)}
    assert "FILE has weights that are not finite: bn1.weight" in refusal(trunk, broken)


# Files


SOME = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


def same(found: Weights) -> bool:
    return found.keys() == SOME.keys() and all(torch.equal(found[key], SOME[key]) for key in SOME)


@pytest.mark.parametrize("ending", ["pt", "pth", "pth.tar", "bin", "ckpt"])
def test_files_of_torch_are_read(ending: str, tmp_path: Path) -> None:
    torch.save(SOME, tmp_path / f"weights.{ending}")
    assert same(read_weights(tmp_path / f"weights.{ending}"))


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(SOME, tmp_path / "model.safetensors")
    assert same(read_weights(str(tmp_path / "model.safetensors")))
    assert same(read_weights(tmp_path))


@pytest.mark.parametrize(
    "state",
    [
        {"trunk": SOME, "trunk_optimizer": {"state": {}}, "epoch": 3},
        {"arch": "resnet50", "state_dict": SOME, "epoch": 3},
        {"model": {"state_dict": SOME}},
        {"student": {"other": torch.zeros(1)}, "teacher": SOME},
        {"model": SOME, "args": argparse.Namespace(lr=0.1, out="here")},
        {"model_state": 1, **SOME},
    ],
    ids=["run", "moco", "twice", "dino", "namespace", "flat"],
)
def test_weights_are_found_among_other_things(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pth")
    assert same(read_weights(tmp_path / "a.pth"))


def test_a_run_folder_is_read_at_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"trunk": SOME}, tmp_path / "checkpoints" / "last.pt")
    assert same(read_weights(tmp_path))


class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_files_that_hold_no_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 3, "lr": 0.1}, "none.pt")
    torch.save([torch.zeros(2)], "list.pt")
    torch.save({"model": SOME, "code": Code()}, "code.pth")
    Path("pickled.pth").write_bytes(pickle.dumps({"code": Code()}))
    safetensors.torch.save_file({}, "empty.safetensors")
    safetensors.torch.save_file(SOME, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-8])
    torch.save(SOME, "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-100])
    Path("notes.txt").write_text("x", encoding="utf-8")
    Path("folder").mkdir()
    for name, message in {
        "none.pt": "holds no weights of a network: it has epoch, lr; looked for trunk,",
        "list.pt": "holds no weights of a network: it has nothing",
        "code.pth": r"holds code \(.*getattr\); it is refused",
        "pickled.pth": r"holds code \(pathlib.Path.touch\); it is refused, and nothing in it was run",
        "empty.safetensors": "holds no weights",
        "cut.safetensors": "can't be read: truncated, damaged or not safetensors",
        "cut.pt": "can't be read: truncated, damaged",
        "notes.txt": r"is not a file of weights: use one that ends in \.pt, .*\.safetensors",
        "folder": "folder without weights: it has none of checkpoints/last.pt",
        "gone.pt": "gone.pt does not exist",
    }.items():
        with pytest.raises(InputError, match=message):
            read_weights(name)
    assert not Path("ran").exists()


def test_without_safetensors_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file(SOME, tmp_path / "a.safetensors")
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install safetensors"):
        read_weights(tmp_path / "a.safetensors")
