"""Trunks of torchvision and timm: the contract, and each against the library's own network with the same weights."""

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from trunk_contract import TrunkContract, images, trunk_of

from deepcluster.core.errors import InputError
from deepcluster.models.archs import ARCHITECTURES, check_arch, make_trunk
from deepcluster.models.named import NamedTrunk, misfit
from deepcluster.models.receptive_field import stage_shapes
from deepcluster.models.trunk import FEATURES

# One of each kind that is small enough: convolutions, pre-activation, tokens, channels last.
NAMED = (
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:mobilenet_v3_small",
    "timm:resnet10t",
    "timm:test_convnext",
    "timm:test_vit,patch_size=4",
    "timm:swin_tiny_patch4_window7_224,embed_dim=24",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arch", NAMED)
class TestNamedTrunk(TrunkContract):
    def test_the_first_layer_sees_what_sobel_gives(self, arch: str) -> None:
        for sobel, channels in ((True, 2), (False, 3)):
            first = next(layer for layer in trunk_of(arch, sobel).backbone.modules() if isinstance(layer, nn.Conv2d))
            assert first.in_channels == first.weight.shape[1] == channels


class _Reached(Exception):
    """The classifier was about to be called."""


def input_of_classifier(oracle: nn.Module, name: str, x: Tensor) -> Tensor:
    """What torchvision's own network hands to its last layer."""
    seen: list[Tensor] = []

    def note(layer: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0])
        raise _Reached

    oracle.get_submodule(name).register_forward_pre_hook(note)
    with pytest.raises(_Reached), torch.no_grad():
        oracle.eval()(x)
    return seen[0]


# Family, the name of its last layer in torchvision's sources, the number of maps (of AlexNet: 5 ReLUs; DenseNet: the stem,
# 4 dense blocks; googlenet: 9 inception blocks; MNASNet: 3 ReLUs and 6 stacks), and a size.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "vit_b_16": {"image_size": 32},
}
FAMILIES = [
    ("alexnet", "classifier.6", 5, 64),
    ("convnext_tiny", "classifier.2", 4, 32),
    ("densenet121", "classifier", 5, 32),
    ("efficientnet_b0", "classifier.1", 9, 32),
    ("googlenet", "fc", 9, 32),
    ("inception_v3", "fc", 11, 96),
    ("mnasnet0_5", "classifier.1", 9, 32),
    ("mobilenet_v2", "classifier.1", 19, 32),
    ("mobilenet_v3_small", "classifier.3", 13, 32),
    ("regnet_y_400mf", "fc", 5, 32),
    ("resnet18", "fc", 5, 32),
    ("shufflenet_v2_x0_5", "fc", 5, 32),
    ("swin_t", "head", 4, 32),
    ("vit_b_16", "heads.head", 12, 32),
]


def library_network(name: str) -> nn.Module:
    """torchvision's own, without values. (The widths of a RegNet are worked out with tensors.)"""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network: nn.Module = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    return network


@pytest.mark.parametrize(("name", "last", "n_maps", "size"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_torchvision_gives_what_comes_into_its_classifier(name: str, last: str, n_maps: int, size: int) -> None:
    arch = f"torchvision:{name}"
    trunk = trunk_of(arch, False) if size == 32 else make_trunk(arch, image_size=size, sobel=False).eval()
    oracle = library_network(name)
    missing = oracle.load_state_dict(trunk.backbone.state_dict(), strict=False, assign=True)
    assert missing.missing_keys == [f"{last}.weight", f"{last}.bias"]
    assert not missing.unexpected_keys
    expected = input_of_classifier(oracle, last, images(size))
    with torch.no_grad():
        assert torch.equal(trunk(images(size)), expected)
        found = trunk.maps(images(size), trunk.stages)
    assert len(found) - 1 == n_maps
    assert all(map_BCHW.shape[2] == map_BCHW.shape[3] for map_BCHW in found.values())
    # A stage alone has the same map as beside the others.
    some = trunk.stages[len(trunk.stages) // 2]
    with torch.no_grad():
        assert torch.equal(trunk.stage(images(size), some), found[some])


def test_squeezenet_loses_its_last_convolution() -> None:
    trunk = make_trunk("torchvision:squeezenet1_1", image_size=32, sobel=False).eval()
    with torch.no_grad():
        map_BCHW = trunk.backbone.features(images(32))
        torch.testing.assert_close(trunk(images(32)), map_BCHW.mean(dim=(2, 3)))


def test_tokens_and_channels_last_become_maps() -> None:
    """A token's place on the grid is row by row, after the class token; swin's maps have their channels last."""
    vit, swin = (trunk_of(f"torchvision:{name}", False) for name in ("vit_b_16", "swin_t"))
    seen: dict[str, Tensor] = {}
    name = "encoder.layers.encoder_layer_3"
    hooks = [
        trunk.backbone.get_submodule(block).register_forward_hook(
            lambda layer, given, result, block=block: seen.update({block: result})
        )
        for trunk, block in ((vit, name), (swin, "features.3"))
    ]
    with torch.no_grad():
        grid_BCHW, map_BCHW = vit.stage(images(32), name), swin.stage(images(32), "features.3")
    for hook in hooks:
        hook.remove()
    assert grid_BCHW.shape == (2, 768, 2, 2)
    assert map_BCHW.shape == (2, 192, 4, 4)
    for row in range(2):
        for column in range(2):
            assert torch.equal(grid_BCHW[:, :, row, column], seen[name][:, 1 + row * 2 + column])
            assert torch.equal(map_BCHW[:, :, row, column], seen["features.3"][:, row, column])


@pytest.mark.parametrize(("name", "separator"), [("resnet10t", "."), ("test_convnext", "_"), ("mobilenetv3_small_050", ".")])
def test_timm_gives_its_own_features_and_maps(name: str, separator: str) -> None:
    """The features as without a classifier, the maps as timm's networks that give maps only."""
    trunk = make_trunk(f"timm:{name}", image_size=64, sobel=False).eval()
    weights = trunk.backbone.state_dict()
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(weights)
    pyramid = timm.create_model(name, features_only=True).eval()
    renamed = {key.replace("stages.", "stages_") if separator == "_" else key: value for key, value in weights.items()}
    renamed |= {key.replace("stem.", "stem_"): value for key, value in weights.items() if key.startswith("stem.")}
    assert not pyramid.load_state_dict(renamed, strict=False).missing_keys
    with torch.no_grad():
        assert torch.equal(trunk(images(64)), plain(images(64)))
        maps = [trunk.stage(images(64), stage) for stage in trunk.stages[:-1]]
        expected = pyramid(images(64))
    assert len(maps) == len(expected)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)  # Rounding differs with some versions of timm.


def test_timm_leaves_out_the_tokens_of_classes() -> None:
    """The grid of block 2 is timm's tokens after it, but for those in front."""
    trunk = trunk_of("timm:deit_tiny_distilled_patch16_224", False)
    seen: list[Tensor] = []
    trunk.backbone.blocks[2].register_forward_hook(lambda layer, given, result: seen.append(result))
    with torch.no_grad():
        grid_BCHW = trunk.stage(images(32), "blocks.2")
    assert seen[0].shape == (2, 2 + 4, 192)
    assert torch.equal(grid_BCHW.flatten(2).transpose(1, 2), seen[0][:, 2:])


def test_transformers_of_timm_see_small_crops_too() -> None:
    """Positions are fitted to the smaller grid, so that one network takes large and small crops."""
    trunk = trunk_of("timm:vit_tiny_patch16_224,patch_size=4,depth=3", False)
    with torch.no_grad():
        assert trunk(images(16)).shape == (2, trunk.dim)
        assert trunk.stage(images(16), "blocks.1").shape[2:] == (4, 4)


def test_other_libraries_weights_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for arch in ("timm:test_vit.r160_in1k", "torchvision:squeezenet1_1"):
        assert make_trunk(arch, image_size=32).arch == arch
    for name in ("hf-hub:timm/resnet18.a1_in1k", "local-dir:somewhere"):
        with pytest.raises(InputError, match="timm has no classifier"):
            make_trunk(f"timm:{name}")
    for arch in ("timm:resnet18,pretrained=1", "torchvision:resnet18,weights=1"):
        with pytest.raises(InputError, match=r"can't be set in the name"):
            make_trunk(arch)


def test_dropout_between_fully_connected_layers_is_what_is_asked_for() -> None:
    with torch.device("meta"):
        trunk = make_trunk("torchvision:vgg11", dropout=0.3)
    assert [layer.p for layer in trunk.modules() if isinstance(layer, nn.Dropout)] == [0.3]
    assert trunk.backbone.classifier[3].in_features == trunk.dim == 4096


@pytest.mark.parametrize("name", ["efficientnet_b0", "googlenet", "mobilenet_v3_small", "squeezenet1_1"])
def test_dropout_before_the_classifier_goes_with_it(name: str) -> None:
    """Features in training and in eval mode are of the same layers."""
    assert any(isinstance(layer, nn.Dropout) for layer in library_network(name).modules())
    trunk = make_trunk(f"torchvision:{name}", image_size=32, dropout=0.5)
    assert not any(isinstance(layer, nn.Dropout) for layer in trunk.modules())


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("timm:convnext_tinyy", 64, r"timm has no classifier 'convnext_tinyy' \(did you mean convnext_tiny\?\)"),
        ("torchvision:resnet19", 64, r"torchvision has no classifier 'resnet19' \(did you mean resnet1\d.*list_models"),
        ("torchvision:fcn_resnet50", 64, "torchvision has no classifier 'fcn_resnet50'"),
        ("timm:resnet18,depth=3", 64, "timm:resnet18,depth=3: this network has no option 'depth'"),
        ("torchvision:resnet18,depth=3", 64, "torchvision:resnet18,depth=3: this network has no option 'depth'"),
        ("timm:test_vit,patch_size", 64, r"'patch_size' is not an option; write timm:test_vit,KEY=NUMBER"),
        ("timm:test_vit,patch_size=four", 64, r"'patch_size=four' is not an option"),
        ("torchvision:vit_b_16", 30, r"image_size=30 does not fit torchvision:vit_b_16 .*; use 32"),
        ("torchvision:inception_v3", 32, r"image_size=32 does not fit torchvision:inception_v3 .*; use 96"),
    ],
)
def test_what_cannot_be_made_is_reported(arch: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trunk(arch, image_size=size)


def test_sizes_that_work_are_named() -> None:
    """The nearest below and above of those that the network can be made for."""

    def make(size: int) -> None:
        if size % 64:
            raise AssertionError("not a multiple of 64")

    fault = AssertionError("75 is no multiple\nof 64")
    message = str(misfit("timm:net", 75, fault, make, sobel=True))
    assert message == "image_size=75 does not fit timm:net (75 is no multiple); use 64 or 128"

    def never(size: int) -> None:
        raise RuntimeError

    message = str(misfit("timm:net", 75, fault, never, sobel=True))
    assert message.endswith(
        "(75 is no multiple); no usual size works; leave Sobel out (--no-sobel), or choose another architecture"
    )
    assert str(misfit("timm:net", 75, fault, never, sobel=False)).endswith("works; choose another architecture")


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:resnet18 needs timm: pip install timm"):
        make_trunk("timm:resnet18")


def test_images_of_another_size_are_reported() -> None:
    trunk = trunk_of("torchvision:vit_b_16", False)
    for ask in (trunk, lambda x: trunk.stage(x, trunk.stages[0])):
        with pytest.raises(
            InputError, match=r"torchvision:vit_b_16, made for images of 32 px, can't take 48 x 48 px: Wrong"
        ):
            ask(images(48))
    with pytest.raises(RuntimeError, match="channels"):  # a fault of the program, not of the size
        trunk(torch.zeros(1, 5, 32, 32))


def test_a_network_without_rows_of_features_is_refused() -> None:
    class Maps(NamedTrunk):
        def _found(self, edges_BCHW: Tensor, names: Any) -> dict[str, Tensor]:
            return {FEATURES: edges_BCHW}

    trunk = Maps("timm:maps", nn.Conv2d(3, 4, 1), {}, image_size=8, sobel=False)
    with pytest.raises(InputError, match=r"timm:maps can't be a trunk: it returns \[1, 4, 8, 8\] for an image"):
        trunk._blank_features()


def test_names_of_architectures() -> None:
    for name in (*ARCHITECTURES, "torchvision:resnet34", "timm:anything"):
        check_arch(name)
    for name in ("", "timm:", "torchvision:", "keras:resnet50"):
        with pytest.raises(InputError, match=f"unknown architecture '{name}'.*alexnet-small.*torchvision:NAME or timm:NAME"):
            check_arch(name)
    with pytest.raises(InputError, match=r"did you mean resnet18\?"):
        check_arch("resnet-18")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_receptive_fields_are_those_of_the_own_network(name: str) -> None:
    """The same layers under other names: stem, layer1 to layer4."""
    own, other = trunk_of("resnet18"), trunk_of(name)
    ours, theirs = (stage_shapes(trunk, trunk.stages, 32) for trunk in (own, other))
    assert list(ours.values()) == list(theirs.values())
    assert ours["stem"].field.size == 9  # 3 of Sobel, 7 of the stem


def test_a_unit_of_a_transformer_sees_the_whole_image() -> None:
    trunk = trunk_of("timm:test_vit,patch_size=4")
    field = stage_shapes(trunk, ["blocks.0"], 32)["blocks.0"].field
    assert field.box(3, 3, 32) == (0, 0, 32, 32)
