"""Networks of the user's own: registered names, and modules in memory, against the modules themselves."""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models_helper import write_classes
from PIL import Image
from torch import Tensor, nn
from trunk_contract import TrunkContract, images, trunk_of

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.models import archs
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import FEATURES

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class Maps(nn.Module):
    """Returns a map, uses one activation twice, keeps blocks in a list, and works in place; sees two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, :2])
        for part in self.parts:
            x = self.act(part(x).add_(0.1))
        return x


class Rows(nn.Module):
    """Returns rows; all its layers are in an only part."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(2, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 3, 1, 1), nn.GELU(), nn.Conv2d(8, 12, 3, 2, 1)]
        after = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)]
        self.net = nn.Sequential(*layers, *after)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :2])  # type: ignore[no-any-return]


class Small(nn.Module):
    """Colour in, a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


MAPS, ROWS = deepcluster.register("maps", Maps), deepcluster.register("custom:rows", Rows)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers are forgotten, as they are by the next process."""
    monkeypatch.setattr(archs, "_CONSTRUCTORS", dict(archs._CONSTRUCTORS))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32 px in classes, which a network for 32 px sees as they are."""
    return write_classes(tmp_path_factory.mktemp("own") / "photos", 12, side=32)


@pytest.mark.parametrize("arch", [MAPS, ROWS])
class TestCustomTrunk(TrunkContract):
    pass


def test_stages_are_blocks_that_return_maps_once() -> None:
    assert (MAPS, trunk_of(MAPS).stages) == ("custom:maps", ("stem", "parts.0", "parts.1", "output", FEATURES))
    assert trunk_of(ROWS).stages == ("net.1", "net.3", FEATURES)
    trunk, x = trunk_of(MAPS, False), images(32)
    with torch.no_grad():
        output = trunk.backbone(x)
        assert torch.equal(trunk.stage(x, "output"), output)
        assert torch.equal(trunk(x), output.mean(dim=(2, 3)))
        assert trunk.stage(x, "parts.0").min() < 0  # As the block returned it, before what was done to it in place.


def test_features_of_a_module_in_memory_are_its_own(photos: Path) -> None:
    module = Small()
    module.body[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    before = deepcopy(module.state_dict())
    model = deepcluster.load(module, image_size=32, mean=MEAN, std=STD, interpolation="bicubic", crop_pct=1.0)
    assert (model.name, model.settings.mean, model.trained) == ("custom:Small", MEAN, False)
    found = deepcluster.embed(model, photos, device="cpu", workers=0)
    pixels = np.stack([np.asarray(Image.open(photos / name), np.float32) for name in found.names]) / 255
    normalised = torch.from_numpy((pixels - np.array(MEAN)) / np.array(STD)).float().permute(0, 3, 1, 2)
    assert module.training, "the user's module is left as it is"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        expected = module.eval()(normalised).mean(dim=(2, 3))
    torch.testing.assert_close(torch.from_numpy(found.embedding_ND), expected, atol=1e-5, rtol=1e-4)


def test_every_function_takes_a_module_in_memory(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"device": "cpu", "workers": 0}
    torch.manual_seed(1)
    model = deepcluster.load(Small(), name="mine", image_size=32, mean=MEAN, std=STD)
    with pytest.raises(InputError, match=r"custom:mine has no clusters.*deepcluster\.cluster"):
        deepcluster.assign(model, photos, **options)
    near = deepcluster.similar(model, photos, query=photos / "class0" / "000.png", count=5, **options)
    assert len(near.names) == 5
    (tmp_path / "set").mkdir()
    for part in ("train", "val"):
        (tmp_path / "set" / part).symlink_to(photos)
    assert deepcluster.evaluate("knn", model, tmp_path / "set", **options).results.best() == 1.0
    run = deepcluster.cluster(model, photos, clusters=3, out=tmp_path / "run", **options)
    # The clusters open in another process once the name is known there, and until then with one sentence.
    assert main(["assign", str(run), str(photos), "--out", str(tmp_path / "a.parquet")]) == 2
    said = capsys.readouterr().err
    assert "custom:mine is a network of your own that this process does not know" in said
    assert "deepcluster.register('mine', CONSTRUCTOR)" in said
    assert len(said.splitlines()) == 1
    assert main(["info", str(run)]) == 0
    assert "custom:mine at 32 px" in capsys.readouterr().out
    deepcluster.register("mine", Small)
    again = deepcluster.assign(run, photos, **options)
    assert np.array_equal(again.cluster_N, deepcluster.Run(run).clusters.cluster_N)
    assert deepcluster.load(run).settings.mean == MEAN


def test_an_own_network_is_trained_saved_and_read(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = deepcluster.register("mine", Small)
    few: dict[str, Any] = {"clusters": 3, "image_size": 32, "batch_size": 12, "pca": 4, "device": "cpu", "workers": 0}
    run = deepcluster.train(photos, out=tmp_path / "run", arch=arch, epochs=1, **few)
    state = deepcluster.load(run).trunk.state_dict()
    start = deepcluster.load(f"untrained:{run}").trunk.state_dict()
    assert not torch.equal(state["backbone.body.0.weight"], start["backbone.body.0.weight"])
    assert torch.equal(
        start["backbone.body.0.weight"], make_trunk(arch, sobel=False, seed=31).state_dict()["backbone.body.0.weight"]
    )
    file = deepcluster.export(run, format="safetensors", out=tmp_path / "own.safetensors")
    other = deepcluster.train(photos, out=tmp_path / "other", arch=arch, init=str(file), epochs=1, lr=0.0, **few)
    assert torch.equal(deepcluster.load(other).trunk.state_dict()["backbone.body.0.weight"], state["backbone.body.0.weight"])
    monkeypatch.setattr(archs, "_CONSTRUCTORS", {"custom:mime": Small})
    with pytest.raises(InputError, match=r"does not know \(did you mean custom:mime\?\)"):
        deepcluster.train(photos, out=run, resume=True, epochs=2)


class Changed(Small):
    """The same weights, other features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_code_that_changes_is_no_hit_of_the_cache() -> None:
    torch.manual_seed(0)
    one, same, changed = Small(), Small(), Changed()
    same.load_state_dict(one.state_dict())
    changed.load_state_dict(one.state_dict())
    form: dict[str, Any] = {"name": "mine", "image_size": 32, "mean": MEAN, "std": STD}
    first, second, third = (deepcluster.load(module, **form).weights for module in (one, same, changed))
    assert first == second != third


class Aside(nn.Module):
    """A block with a stage that its output does not depend on."""

    def __init__(self, factor: float, power: int) -> None:
        super().__init__()
        self.conv, self.aux, self.factor = nn.Conv2d(3, 8, 3), Power(power), factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.aux(y)
        return y * self.factor  # type: ignore[no-any-return]


class Power(nn.Module):
    def __init__(self, power: int) -> None:
        super().__init__()
        self.inner, self.power = nn.Identity(), power

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) ** self.power  # type: ignore[no-any-return]


def test_every_stage_and_every_bit_are_part_of_the_key_of_the_cache() -> None:
    weights = []
    for factor, power, threads in ((1.0, 1, 1), (1.0, 1, 2), (1.0, 3, 1), (1.0001, 1, 1)):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        model = deepcluster.load(Aside(factor, power), name="mine", image_size=32, mean=MEAN, std=STD)
        weights.append(model.weights)
        assert "aux" in model.trunk.stages and torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert weights[0] == weights[1] and len(set(weights)) == 3


def test_what_is_assumed_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"custom:Small: image_size, mean, std not given .* 24 features; images of 224 px"
    ) as said:
        assert deepcluster.load(Small()).image_size == 224
    assert said[0].filename == __file__
    net = timm.create_model("test_vit", num_classes=0)
    with warnings.catch_warnings(action="error"):
        model = deepcluster.load(net)
        assert deepcluster.load(net, image_size=160, crop_pct=1.0).settings.crop_pct == 1
    assert (model.image_size, model.settings.mean, model.settings.interpolation) == (160, (0.5, 0.5, 0.5), "bicubic")


def answer(output: Any) -> nn.Module:
    """A network that returns the same for any image."""

    class Answer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    return Answer()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: {}, "must be a torch.nn.Module that returns rows of features .N, D., or maps .N, C, H, W.*not dict"),
        (lambda: answer({"out": 1}), "returns a dict for 1 images; it must return rows"),
        (lambda: answer(torch.zeros(1, 3, 4)), r"returns a tensor of \[1, 3, 4\]"),
        (lambda: answer(torch.zeros(5, 3)), r"returns a tensor of \[5, 3\] for 1 images"),
        (nn.Module, "make it take normalised images"),
        (lambda: nn.Conv2d(1, 8, 3), "expected input.* to have 1 channels.*make it take normalised images"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 8, 1), nn.Flatten(), nn.Linear(576, 8)),
            "image_size=64 does not fit .*; use 96",
        ),
    ],
)
def test_what_is_no_trunk_is_said(make: Callable[[], Any], complaint: str) -> None:
    arch = deepcluster.register("odd", make)
    with pytest.raises(InputError, match=complaint):
        make_trunk(arch, image_size=64, sobel=False)
    if isinstance(module := make(), nn.Module):
        with pytest.raises(InputError, match=complaint):
            deepcluster.load(module, image_size=64, mean=MEAN, std=STD)


def test_a_fault_in_the_users_constructor_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="missing 1 required"):
        make_trunk(deepcluster.register("odd", lambda: nn.Linear(3)))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: deepcluster.register("my net", Small), "can't name a network"),
        (lambda: deepcluster.register("", Small), "can't name a network"),
        (lambda: deepcluster.register("mine", Small()), "deepcluster.load takes the module itself"),  # type: ignore[arg-type]
        (lambda: deepcluster.register("mine", 3), "can't be called"),  # type: ignore[arg-type]
        (lambda: deepcluster.Settings(arch="maps"), "has the name custom:maps"),
        (lambda: deepcluster.load(Small), "is no module yet"),  # type: ignore[arg-type]
        (lambda: deepcluster.load("untrained:resnet18", image_size=64), "image_size: for a torch.nn.Module only"),
        (lambda: deepcluster.load("custom:maps@pretrained"), "has no published weights"),
        (lambda: deepcluster.load(Small(), image_size=4), "image_size=4"),
    ],
)
def test_wrong_names_and_arguments_are_said(call: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call()
