"""Caffe models of whole networks: OpenCV computes the trunk's features of BGR bytes, and what is written is read again."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.interop.caffe.messages import Malformed, Word
from deepcluster.interop.caffe.network import network_of
from deepcluster.interop.caffe.prototxt import parse, write
from deepcluster.interop.caffe.read import CaffeModel, model_of, read_caffe
from deepcluster.interop.caffe.wire import encode
from deepcluster.interop.caffe.write import describe, write_caffe
from deepcluster.interop.loading import load
from deepcluster.models.archs import make_trunk
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from deepcluster.models.trunk import Trunk, normalise

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD


def trained(arch: str, *, sobel: bool) -> tuple[Trunk, tuple[Tensor, Tensor]]:
    """A trunk whose BatchNorm statistics and biases are not the initial ones, and a top layer of 10 clusters."""
    trunk = make_trunk(arch, sobel=sobel).eval()
    draws = torch.Generator().manual_seed(1)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.3, generator=draws)
            layer.running_var.uniform_(0.5, 2, generator=draws)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=draws)
            nn.init.normal_(layer.bias, generator=draws)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, generator=draws)
    return trunk, (torch.randn(10, trunk.dim, generator=draws) / 64, torch.randn(10, generator=draws))


@pytest.fixture(scope="module")
def alexnet() -> tuple[Trunk, tuple[Tensor, Tensor]]:
    return trained("alexnet", sobel=True)


@pytest.fixture(scope="module")
def files(alexnet: tuple[Trunk, tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    trunk, top_layer = alexnet
    return write_caffe(trunk, tmp_path_factory.mktemp("caffe") / "v1.0", top_layer=top_layer, mean=MEAN, std=STD)


def agree(net: Any, trunk: Trunk, top_layer: tuple[Tensor, Tensor] | None, *names: str) -> None:
    """OpenCV's features before and after the ReLU, and its scores, are the trunk's of the same pixels."""
    rng = np.random.default_rng(0)
    # Noise, and an image with plain areas and edges.
    images = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8), np.full((224, 224, 3), 7, np.uint8)]
    images[1][60:180, 90:] = (250, 120, 0)
    net.setInput(cv2.dnn.blobFromImages(images))
    rgb_BCHW = torch.from_numpy(np.stack(images)[..., ::-1].copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = trunk(normalise(rgb_BCHW))
        wanted = [features, features.relu()]
        if top_layer is not None:
            wanted.append(features.relu() @ top_layer[0].T + top_layer[1])
    for found, ours in zip(net.forward(names), wanted, strict=True):
        assert ours.abs().max() > 1
        assert np.abs(found - ours.numpy()).max() <= 1e-4


def test_opencv_computes_the_features_of_bgr_bytes(alexnet: tuple[Trunk, tuple[Tensor, Tensor]], files: list[Path]) -> None:
    net = cv2.dnn.readNetFromCaffe(*map(str, files))
    agree(net, *alexnet, "AddmmBackward27", "ThresholdBackward28", "AddmmBackward29")
    names = net.getLayerNames()
    # The layers that the release's scripts and its users name.
    assert [name for name in names if name.startswith("ConvNd")] == [
        f"ConvNdBackward{n}" for n in (1, 2, 3, 4, 5, 9, 13, 16, 19)
    ]
    assert {"DropoutBackward23", "ThresholdBackward28", "BatchNormBackward6_bn", "BatchNormBackward6_scale"} <= set(names)


def test_a_caffe_model_is_a_model(alexnet: tuple[Trunk, tuple[Tensor, Tensor]], files: list[Path]) -> None:
    """Either file of the pair, with the clusters that its last layer predicts."""
    trunk, (weight_KD, bias_K) = alexnet
    pixels = torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for file in files:
        model = load(file)
        assert (model.settings.arch, model.settings.sobel, model.settings.n_clusters) == ("alexnet", True, 10)
        assert "2 more that give 10 clusters" in model.remark
        space, clusters = model.clusters()
        with torch.no_grad():
            features_BD = trunk(normalise(pixels))
            assert torch.equal(model.trunk(normalise(pixels)), features_BD)
            scores_BK = features_BD.relu() @ weight_KD.T + bias_K
            assert torch.equal(clusters.nearest(space.transform(features_BD))[0], scores_BK.argmax(dim=1))


def opened(net: dict[str, Any]) -> Any:
    """OpenCV's network of the same text and weights."""
    text, binary = write(text_of(net)).encode(), b"".join(encode(net, "NetParameter"))
    return cv2.dnn.readNetFromCaffe(np.frombuffer(text, np.uint8), np.frombuffer(binary, np.uint8))


def test_opencv_computes_the_features_without_sobel() -> None:
    """Other means, no top layer, and the same names of the convolutions."""
    trunk, _ = trained("alexnet", sobel=False)
    net = describe(trunk, "m", top_layer=None, mean=MEAN, std=STD, image_size=224)
    reader = opened(net)
    agree(reader, trunk, None, "AddmmBackward27", "ThresholdBackward28")
    assert reader.getLayer("ConvNdBackward19").blobs[0].shape == (256, 384, 3, 3)
    model = model_of(network_of(net))
    check_same(model, trunk)
    assert (model.arch, model.sobel, model.top_layer, model.mean, model.std) == ("alexnet", False, None, MEAN, STD)


def check_same(model: CaffeModel, trunk: Trunk) -> None:
    """The same tensors, bit for bit; so also the same features."""
    state = trunk.state_dict()
    assert list(model.tensors) == list(state)
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(model.tensors[name], value), name
    trunk.load_state_dict(model.tensors)


@pytest.mark.parametrize(
    "by", ["both, by the binary", "both, by the text", "the binary only", "deploy.prototxt", "another name"]
)
def test_what_is_written_is_read(
    by: str, alexnet: tuple[Trunk, tuple[Tensor, Tensor]], files: list[Path], tmp_path: Path
) -> None:
    trunk, top_layer = alexnet
    text, binary = files
    assert (text.name, binary.name) == ("v1.0.prototxt", "v1.0.caffemodel")
    if not by.startswith("both"):
        binary = tmp_path / "m.caffemodel"
        binary.symlink_to(files[1])
        if by == "deploy.prototxt":
            (tmp_path / "deploy.prototxt").write_bytes(text.read_bytes())
            (tmp_path / "train_val.prototxt").write_text("layer { }", encoding="utf-8")
        elif by == "another name":
            (tmp_path / "net.prototxt").write_bytes(text.read_bytes())
    model = read_caffe(text if by.endswith("text") else binary)
    assert (model.arch, model.sobel, model.image_size, model.mean, model.std) == ("alexnet", True, 224, MEAN, STD)
    assert model.remarks == ()
    check_same(model, trunk)
    assert model.top_layer is not None
    assert torch.equal(model.top_layer[0], top_layer[0]) and torch.equal(model.top_layer[1], top_layer[1])


def text_of(net: dict[str, Any]) -> dict[str, Any]:
    """The network without its weights."""
    return {**net, "layer": [{name: value for name, value in layer.items() if name != "blobs"} for layer in net["layer"]]}


@pytest.fixture
def net(alexnet: tuple[Trunk, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The whole network as a message; tests change it."""
    return describe(alexnet[0], "m", top_layer=alexnet[1], mean=MEAN, std=STD, image_size=224)


def layer(net: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in net["layer"] if one["name"] == [name])
    return found


def read(net: dict[str, Any]) -> CaffeModel:
    """Read the network from its text and its weights, as from two files."""
    return model_of(network_of(parse(write(text_of(net))), net))


def blob(values: Any, *shape: int) -> dict[str, Any]:
    return {"data": [np.array(values, np.float32)], "shape": [{"dim": list(shape)}]}


def pixelwise(name: str, weight: Any, bias: Any, bottom: str, top: str, **more: int) -> dict[str, Any]:
    weight = np.array(weight, np.float32)
    return {
        "name": [name],
        "type": ["Convolution"],
        "bottom": [bottom],
        "top": [top],
        "convolution_param": [{"num_output": [len(weight)], "kernel_size": [1], **{key: [n] for key, n in more.items()}}],
        "blobs": [blob(weight, *weight.shape, 1, 1), blob(bias, len(weight))],
    }


def one_convolution(net: dict[str, Any]) -> None:
    """Grey of normalised pixels in one layer."""
    weights = 1 / (3 * 255 * np.array(STD))[::-1]
    offset = -np.mean(np.array(MEAN) / STD)
    net["layer"][:3] = [pixelwise("grey", [weights], [offset], "data", "ConvNdBackward3")]


def power_and_scale(net: dict[str, Any]) -> None:
    """A Power layer, a depthwise convolution, BatchNorm by its sums with Scale, then grey with the swap."""
    power = {"name": ["power"], "type": ["Power"], "bottom": ["data"], "top": ["p"]}
    power["power_param"] = [{"scale": [1 / 255], "shift": [-0.25]}]  # type: ignore[list-item]
    shift = pixelwise("shift", [[1], [1], [1]], [0.25] * 3, "p", "q", group=3)
    sums = [blob(10 * np.array(MEAN[::-1]), 3), blob(10 * (np.array(STD[::-1]) ** 2 - 1e-3), 3), blob([10], 1)]
    norm = {"name": ["n"], "type": ["BatchNorm"], "bottom": ["q"], "top": ["q"], "blobs": sums}
    norm["batch_norm_param"] = [{"eps": [1e-3]}]  # type: ignore[list-item]
    scale = {"name": ["s"], "type": ["Scale"], "bottom": ["q"], "top": ["q"], "blobs": [blob([0.5] * 3, 3)]}
    grey = pixelwise("grey", [[2 / 3] * 3], [0], "q", "ConvNdBackward3")
    net["layer"][:3] = [power, shift, norm, scale, grey]


def renamed(net: dict[str, Any]) -> None:
    """All layers and maps have other names, and the input is a layer."""
    for number, one in enumerate(net["layer"]):
        one["name"] = [f"layer {number}"]
        for side in ("bottom", "top"):
            one[side] = [f"map of {one[side][0]}"]
    shape = {"shape": [{"dim": [10, 3, 224, 224]}]}
    net["layer"].insert(0, {"name": ["in"], "type": ["Input"], "top": ["map of data"], "input_param": [shape]})
    del net["input"], net["input_dim"]


def other_words(net: dict[str, Any]) -> None:
    """`pad` for `pad_h` and `pad_w`, two strides, a Flatten, a Reshape, layers of training, and a loss."""
    for one in net["layer"]:
        for parameters in one.get("convolution_param", []):
            for names, together in ((("pad_h", "pad_w"), "pad"), (("kernel_h", "kernel_w"), "kernel_size")):
                parameters[together] = [parameters.pop(name)[0] for name in names]
            parameters["stride_h"] = parameters["stride_w"] = parameters.pop("stride")
            parameters["dilation"] = [1]
    flat = {"name": ["f"], "type": ["Flatten"], "bottom": ["MaxPool2dBackward22"], "top": ["f"]}
    again = {"name": ["r"], "type": ["Reshape"], "bottom": ["f"], "top": ["MaxPool2dBackward22"]}
    place = [one["name"] for one in net["layer"]].index(["DropoutBackward23"])
    net["layer"][place:place] = [flat, again]
    data = {"name": ["d"], "type": ["Data"], "top": ["data", "label"], "include": [{"phase": [Word("TRAIN")]}]}
    loss = {"name": ["l"], "type": ["SoftmaxWithLoss"], "bottom": ["AddmmBackward29", "label"], "top": ["l"]}
    net["layer"] = [data, *net["layer"], loss]
    split = {"name": ["split"], "type": ["Split"], "bottom": ["ConvNdBackward19"], "top": ["x", "y"]}
    place = [one["name"] for one in net["layer"]].index(["BatchNormBackward20_bn"])
    net["layer"][place]["bottom"] = ["y"]
    net["layer"].insert(place, split)


def old_blobs(net: dict[str, Any]) -> None:
    """Four named sides, fully connected weights as 1×1×out×in or transposed, doubles, and no biases of zeros."""
    for one in net["layer"]:
        for weights in one.get("blobs", []):
            shape = weights.pop("shape")[0]["dim"]
            shape = [1] * (4 - len(shape)) + shape
            weights |= {name: [side] for name, side in zip(("num", "channels", "height", "width"), shape, strict=True)}
    fc = layer(net, "AddmmBackward27")
    weight = fc["blobs"][0]["data"][0]
    fc["blobs"][0] = {"double_data": [weight.T.astype(np.float64)], "shape": [{"dim": list(weight.T.shape)}]}
    fc["inner_product_param"][0]["transpose"] = [True]
    for name in ("ConvNdBackward3", "ConvNdBackward4"):
        layer(net, name)["convolution_param"][0]["bias_term"] = [False]
        del layer(net, name)["blobs"][1]


@pytest.mark.parametrize(
    "change", [one_convolution, power_and_scale, renamed, other_words, old_blobs], ids=lambda f: f.__name__
)
def test_the_same_network_in_other_words(
    change: Callable[[dict[str, Any]], None], alexnet: tuple[Trunk, tuple[Tensor, Tensor]], net: dict[str, Any]
) -> None:
    change(net)
    model = read(net)
    check_same(model, alexnet[0])
    assert (model.mean, model.std) == (MEAN, STD)
    assert model.top_layer is not None and torch.equal(model.top_layer[0], alexnet[1][0])
    assert model.remarks == (("left out 1 layer: l",) if change is other_words else ())


def test_old_form_of_layers_with_merged_batch_norm(net: dict[str, Any]) -> None:
    """`layers` of an enumeration's types; they are older than BatchNorm, which is merged into the convolutions."""
    old = {"Convolution": "CONVOLUTION", "ReLU": "RELU", "Pooling": "POOLING", "Dropout": "DROPOUT"}
    old["InnerProduct"] = "INNER_PRODUCT"
    kept = [one for one in net["layer"] if one["type"][0] in old]
    for before, one in pairwise(kept):
        in_place = one["top"] == one["bottom"]
        one["bottom"] = list(before["top"])
        one["top"] = list(one["bottom"] if in_place else one["name"])
    layers = [{**one, "type": [Word(old[one["type"][0]])]} for one in kept]
    text = write({"input": ["data"], "layers": text_of({"layer": layers})["layer"]})
    theirs = opened({**net, "layer": kept})
    model = model_of(network_of(parse(text), {"layers": layers}))
    assert model.remarks == ("it has no BatchNorm layers; ours pass on what they get",)
    trunk = make_trunk("alexnet").eval()
    trunk.load_state_dict(model.tensors)
    agree(theirs, trunk, model.top_layer, "AddmmBackward27", "ThresholdBackward28", "AddmmBackward29")


def test_other_normalisations_are_kept(net: dict[str, Any]) -> None:
    """Grey of raw pixels, as of a network that takes 0 to 255."""
    net["layer"][:3] = [pixelwise("grey", [[1 / 3] * 3], [0], "data", "ConvNdBackward3")]
    model = read(net)
    assert model.std == pytest.approx((1 / 255,) * 3) and model.mean == (0, 0, 0)
    assert "standard deviation 0.003922, 0.003922, 0.003922, not ImageNet's" in model.remarks[0]


@pytest.mark.parametrize("sobel", [True, False])
def test_another_mean_and_deviation(sobel: bool, alexnet: tuple[Trunk, tuple[Tensor, Tensor]]) -> None:
    """A trunk with the statistics that were read has the features of the one that was written."""
    trunk = alexnet[0] if sobel else trained("alexnet", sobel=False)[0]
    mean, std = (0.5, 0.4, 0.3), (0.228, 0.25, 0.2)
    model = model_of(network_of(describe(trunk, "m", top_layer=None, mean=mean, std=std, image_size=224)))
    assert model.std == pytest.approx(std) and ("mean 0.5, 0.4, 0.3 and" in model.remarks[0]) is not sobel
    pixels_BCHW = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    maps = []
    for values in ((mean, std), (model.mean, model.std)):
        shift, scale = torch.tensor(values)[..., None, None]
        maps.append(trunk.edges((pixels_BCHW - shift) / scale))
    assert torch.allclose(*maps, atol=1e-5)


def set_value(name: str, parameters: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda net: layer(net, name)[parameters][0].update({field: [value]})


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(net: dict[str, Any]) -> None:
        for name in names:
            layer(net, name)["type"] = ["Dropout"]

    return change


def grow(net: dict[str, Any]) -> None:
    layer(net, "BatchNormBackward6_bn")["blobs"] = [blob([1] * 95, 95), blob([1] * 95, 95), blob([1], 1)]


def spoil(net: dict[str, Any]) -> None:
    layer(net, "ConvNdBackward9")["blobs"][1]["data"] = [np.full(256, np.nan, np.float32)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            set_value("ConvNdBackward5", "convolution_param", "pad_w", 3),
            r"is convolution 96×2×11×11, .* \(width 4 and 3\) where",
        ),
        (
            set_value("ConvNdBackward9", "convolution_param", "stride", 2),
            "layer ConvNdBackward9 is .*stride 2.* where alexnet .*stride 1",
        ),
        (set_value("ConvNdBackward9", "convolution_param", "dilation", 2), "dilation 2"),
        (set_value("ConvNdBackward4", "convolution_param", "pad_h", 0), "ConvNdBackward4 is not the Sobel layer"),
        (set_value("MaxPool2dBackward8", "pooling_param", "pool", Word("AVE")), "is ave pooling 3×3"),
        (set_value("AddmmBackward24", "inner_product_param", "num_output", 4095), "AddmmBackward24 .*4095 numbers fit"),
        (set_value("ThresholdBackward7", "relu_param", "negative_slope", 0.1), "negative slope 0.1"),
        (drop("ThresholdBackward25"), "layer AddmmBackward27 is .* has ReLU"),
        (
            drop("AddmmBackward27", "ThresholdBackward28", "AddmmBackward29"),
            "it ends where alexnet .* has fully connected 4096×4096",
        ),
        (drop("ThresholdBackward28"), "after its features it has fully connected 10×4096"),
        (drop("ConvNdBackward9"), r"4 convolutions \(alexnet 5"),
        (drop("ConvNdBackward4"), "don't make an RGB image of BGR pixels"),
        (
            drop("ConvNdBackward1", "ConvNdBackward2", "ConvNdBackward3"),
            "takes pixels as they are, so that what is to be sub",
        ),
        (drop("ConvNdBackward3"), "don't make|is not the Sobel|convolution"),
        (grow, "BatchNormBackward6_bn .batch norm. has 95 channels, not 96"),
        (spoil, "ConvNdBackward9 are not finite"),
        (lambda net: net.update(input_dim=[1, 3, 227, 227]), "at 227 px its pooling 3×3 of stride 2 makes 27 of 56 pixels"),
        (lambda net: net.update(input_dim=[1, 3, 500, 500]), "alexnet for images of 500 px has fully connected 4096×50176"),
        (
            lambda net: net.update(input_dim=[1, 3, 9999, 9999]),
            "1×3×9999×9999, not square images of 3 channels and at most 512 px",
        ),
    ],
)
def test_other_networks_are_refused(change: Callable[[dict[str, Any]], None], reason: str, net: dict[str, Any]) -> None:
    layer(net, "ThresholdBackward7").setdefault("relu_param", [{}])
    change(net)
    with pytest.raises(Malformed, match=reason):
        read(net)


def test_what_cannot_be_written_is_refused(alexnet: tuple[Trunk, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alexnet and vgg16, not of alexnet-small; use --format onnx"):
        write_caffe(make_trunk("alexnet-small", image_size=32), tmp_path / "m", mean=MEAN, std=STD)
    with pytest.raises(InputError, match="at 227 px its pooling 3×3 of stride 2 makes 27 of 56 pixels"):
        write_caffe(alexnet[0], tmp_path / "m", mean=MEAN, std=STD, image_size=227)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("sobel", [True, False])
def test_vgg16(sobel: bool, tmp_path: Path) -> None:
    trunk, top_layer = trained("vgg16", sobel=sobel)
    files = write_caffe(trunk, tmp_path / "vgg16.caffemodel", top_layer=top_layer, mean=MEAN, std=STD)
    names = "AddmmBackward52", "ThresholdBackward53", "AddmmBackward54"
    agree(cv2.dnn.readNetFromCaffe(*map(str, files)), trunk, top_layer, *names)
    model = read_caffe(files[1])
    assert (model.arch, model.sobel) == ("vgg16", sobel)
    check_same(model, trunk)
