"""Mask R-CNN with a feature pyramid: its levels, its pasted masks, and whole runs on drawn COCO folders."""

import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from math import floor, log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cocos import file_of, write_coco
from PIL import Image
from pycocotools import mask as tools
from ranks_helper import At, in_ranks
from torch import nn
from torch.nn.functional import grid_sample
from torchvision.ops import roi_align

from deepcluster.cli import main
from deepcluster.core.distributed import joined
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.work import Work
from deepcluster.evaluation.datasets.coco import crowds, image_sizes, open_coco, read_coco, with_objects
from deepcluster.evaluation.dense.detection.coco import SizedTargets, evaluate, make_detector, prepare
from deepcluster.evaluation.dense.detection.coco_options import CocoDetectionOptions
from deepcluster.evaluation.dense.detection.mask_rcnn import mask_rcnn, pyramid_stages
from deepcluster.evaluation.dense.detection.parts import Targets, training_view
from deepcluster.evaluation.dense.detection.pasting import encoded_masks, pasted
from deepcluster.evaluation.dense.detection.roi import AlignedPooler
from deepcluster.evaluation.dense.detection.training import weight_groups
from deepcluster.evaluation.dense.samples import Samples
from deepcluster.evaluation.layouts import find_data
from deepcluster.evaluation.options import PROTOCOLS
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.run.model import Model
from deepcluster.run.resumable import weights_hash

TINY: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "lr": 0.002,
    "warmup": 2,
    "clip": 10.0,
    "short_sides": (48, 64),
    "long_side": 64,
    "test_short_side": 48,
    "test_long_side": 64,
    "regions": 8,
}
OPTIONS = CocoDetectionOptions(**TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "coco", val=2, side=48)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_of(arch: str = "resnet18", work: Work | None = None) -> Model:
    return loaded(f"untrained:{arch}", device="cpu", workers=0, work=work or Work(interruption=new_interruption()))


def naive_level(left: float, top: float, right: float, bottom: float) -> int:
    """Equation 1 of the paper of FPN: k0 = 4 is the level of stride 16; P2 to P5."""
    return min(max(floor(4 + log2(sqrt((right - left) * (bottom - top)) / 224)), 2), 5)


def test_levels_of_boxes() -> None:
    sides = [1, 31, 56, 111.9, 112, 223, 224, 447, 448, 449, 2000]
    boxes = [(5.0, 3.0, 5.0 + side, 3.0 + side) for side in sides] + [(0.0, 0.0, 1000.0, 10.0), (0.0, 0.0, 10.0, 10_000.0)]
    random = np.random.default_rng(0).uniform(1, 900, (200, 2))
    boxes += [(2.0, 2.0, 2.0 + float(width), 2.0 + float(height)) for width, height in random]
    found = AlignedPooler(7, (4, 8, 16, 32)).levels(torch.tensor(boxes, dtype=torch.float64))
    assert (found + 2).tolist() == [naive_level(*box) for box in boxes]
    assert AlignedPooler(7, (4, 8, 16, 32)).levels(torch.zeros(1, 4)).tolist() == [0]


def test_regions_are_pooled_from_the_map_of_their_level() -> None:
    torch.manual_seed(0)
    maps = {str(stride): torch.rand(2, 3, 512 // stride, 512 // stride) for stride in (4, 8, 16, 32)} | {
        "pool": torch.rand(2, 3, 8, 8)
    }
    boxes = [torch.tensor([[10.0, 20.0, 50.0, 70.0], [0.0, 0.0, 500.0, 500.0]]), torch.tensor([[30.0, 30.0, 280.0, 260.0]])]
    found = AlignedPooler(7, (4, 8, 16, 32))(maps, boxes, [])
    for row, (image, box) in enumerate([(0, boxes[0][0]), (0, boxes[0][1]), (1, boxes[1][0])]):
        stride = 2 ** naive_level(*box.tolist())
        want = roi_align(maps[str(stride)][image : image + 1], [box[None]], 7, 1 / stride, 0, aligned=True)
        torch.testing.assert_close(found[row], want[0])


def test_the_pyramid_of_a_trunk() -> None:
    trunk = model_of().trunk
    assert [*pyramid_stages(trunk)] == ["layer1", "layer2", "layer3", "layer4"]
    torch.manual_seed(0)
    detector = mask_rcnn(trunk, 4, masks=True, norm=True, regions=8).eval()
    with torch.no_grad():
        maps = detector.backbone(torch.rand(1, 3, 128, 192))
    sizes = {name: tuple(map_BCHW.shape[1:]) for name, map_BCHW in maps.items()}
    assert sizes == {
        "layer1": (256, 32, 48),
        "layer2": (256, 16, 24),
        "layer3": (256, 8, 12),
        "layer4": (256, 4, 6),
        "pool": (256, 2, 3),
    }
    assert torch.equal(maps["pool"], maps["layer4"][:, :, ::2, ::2])
    images = detector.batching([torch.zeros(3, 128, 192, dtype=torch.uint8)])
    anchors_A4 = detector.rpn.anchor_generator(images, [*maps.values()])[0]
    start = 0
    for stride, side, map_BCHW in zip((4, 8, 16, 32, 64), (32, 64, 128, 256, 512), maps.values(), strict=True):
        height, width = map_BCHW.shape[2:]
        some = anchors_A4[start : start + 3 * height * width].reshape(height, width, 3, 4)
        start += 3 * height * width
        centres = (some[..., :2] + some[..., 2:]) / 2
        assert centres[1, 2].tolist() == [[2 * stride, stride]] * 3
        sides = some[..., 2:] - some[..., :2]
        assert sides[0, 0].prod(dim=1).sqrt().tolist() == pytest.approx([side] * 3, rel=0.02)
        assert (sides[0, 0, :, 1] / sides[0, 0, :, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.05)
    assert start == len(anchors_A4)


def test_heads_have_no_batch_norm_and_norms_no_decay() -> None:
    model = model_of()
    frozen = make_detector(model, 4, replace(OPTIONS, batchnorm="frozen"))
    detector = make_detector(model, 4, OPTIONS)
    norms = {name for name, layer in detector.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    in_pyramid = {name for name in norms if name.startswith("backbone.pyramid.")}
    assert len(in_pyramid) == 8
    assert all(name.startswith("backbone.") for name in norms)
    usual, norm_weights = weight_groups(detector, OPTIONS.lr, free_biases=False)
    assert len(norm_weights["params"]) == 2 * len(norms)
    assert norm_weights["weight_decay"] == 0
    both = {id(weight) for group in (usual, norm_weights) for weight in group["params"]}
    assert both == {id(weight) for weight in detector.parameters()}
    assert {name for name, layer in frozen.named_modules() if isinstance(layer, nn.BatchNorm2d)} == norms - in_pyramid
    assert len([*weight_groups(frozen, OPTIONS.lr, free_biases=False)]) == 1
    assert weights_hash(make_detector(model, 4, OPTIONS)) == weights_hash(detector)


def naive_mask(cells: np.ndarray, box: list[float], height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between the centres of cells, zeros around; pixel by pixel."""
    count, result = len(cells), np.zeros((height, width))
    around = np.pad(cells, 1)
    for y in range(height):
        for x in range(width):
            row = (y + 0.5 - box[1]) / (box[3] - box[1]) * count + 0.5
            column = (x + 0.5 - box[0]) / (box[2] - box[0]) * count + 0.5
            if 0 <= row <= count + 1 and 0 <= column <= count + 1:
                above, left = min(int(row), count), min(int(column), count)
                (a, b), (c, d) = around[above : above + 2, left : left + 2]
                down, right = row - above, column - left
                result[y, x] = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
    return result


@pytest.mark.parametrize("seed", range(6))
def test_pasted_masks_are_interpolated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, cells = 23, 31, int(rng.choice([4, 28]))
    corners = np.sort(rng.uniform(0, 1, (5, 2, 2)), axis=1) * [width, height]
    boxes = torch.from_numpy(corners.reshape(5, 4)).float()
    boxes[0], boxes[1] = torch.tensor([0.0, 0.0, width, height]), torch.tensor([3.2, 4.1, 3.3, 4.2])
    probabilities = torch.rand(5, cells, cells)
    masks = [*pasted(probabilities, boxes, (height, width))]
    for mask, one, box in zip(masks, probabilities.double(), boxes.double(), strict=True):
        assert mask.shape == (height, width)
        np.testing.assert_array_equal(mask, naive_mask(one.numpy(), box.tolist(), height, width) >= 0.5)
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        grid = torch.stack([(x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])], dim=-1) * 2 - 1
        theirs = grid_sample(one[None, None], grid[None].double(), align_corners=False)[0, 0]
        np.testing.assert_array_equal(mask, theirs.numpy() >= 0.5)
    for packed, mask in zip(encoded_masks(probabilities, boxes, (height, width)), masks, strict=True):
        assert isinstance(packed["counts"], str)
        np.testing.assert_array_equal(tools.decode(packed), mask)


def test_a_full_mask_fills_its_box() -> None:
    (mask,) = pasted(torch.ones(1, 28, 28), torch.tensor([[2.0, 3.0, 9.0, 5.0]]), (8, 12))
    want = np.zeros((8, 12))
    want[3:5, 2:9] = 1
    np.testing.assert_array_equal(mask, want)
    assert encoded_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (8, 12)) == []


def test_training_images_have_objects(folder: Path) -> None:
    data = read_coco(open_coco(folder).train)
    train = with_objects(data)
    assert (len(data), len(train), crowds(data)) == (4, 3, 1)
    for index in range(3):
        assert train.source.name(index) == data.source.name(index)
        assert torch.equal(train.read_objects(index, True).boxes_M4, data.read_objects(index, True).boxes_M4)
    assert image_sizes(train).tolist() == image_sizes(data).tolist()[:3]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from the command line: the folder with its results, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    words = ["--data", str(folder), "--device", "cpu", "--workers", "0", "--out", str(out)]
    for name, value in TINY.items():
        words += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("DEEPCLUSTER_CACHE", str(out / "cache"))
        assert main(["evaluate", "coco-detection", "untrained:resnet18", *words]) == 0
    return out, printed.getvalue()


def test_a_run_from_the_command_line(whole: tuple[Path, str]) -> None:
    """What it prints, and its files; nothing stays in the cache."""
    out, printed = whole
    for words in (
        "box AP75",
        "mask AP50",
        "mask AP by class",
        "coco train2017: 1 image without objects left out",
        "classes without objects to test on, left out of the mean: never",
    ):
        assert words in printed
    assert "creating index" not in printed
    pictures = sorted((out / "coco-detection").iterdir())
    assert [path.name for path in pictures] == ["000000000000.png", "000000000001.png"]
    assert Image.open(pictures[0]).width > 1000
    assert not [*(out / "cache" / "unfinished").iterdir()]


def test_a_stop_and_a_resume_change_nothing(
    folder: Path, whole: tuple[Path, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the training, then in the test."""
    for place, count in (("training", 2), ("detecting", 1)):
        interruption = new_interruption()
        stopped = model_of(work=Work(At(place, count), interruption))
        with interruption.listening(), pytest.raises(Interrupted):
            evaluate(stopped, folder, OPTIONS)
    said: list[str] = []
    again = model_of()
    monkeypatch.setattr(again.work.reporter, "say", said.append)
    found = evaluate(again, folder, OPTIONS)
    assert not any(line.startswith("step ") for line in said), "the training is over"
    known = json.loads((whole[0] / "coco-detection.json").read_text())
    assert found.as_dict()["results"] == known["results"]
    assert not [*(cache / "unfinished").iterdir()]


def test_boxes_only(tmp_path: Path, cache: Path) -> None:
    """Annotations without masks: refused, and used with the option."""
    bare = write_coco(tmp_path / "bare", masks=False)
    with pytest.raises(InputError, match="no object has a mask; --boxes-only"):
        evaluate(model_of(), bare, OPTIONS)
    found = evaluate(model_of(), bare, replace(OPTIONS, boxes_only=True, steps=1))
    assert [name for name in found.results if "mask" in name] == []
    assert found.headline == ("box AP",)


@pytest.mark.parametrize("arch", ["alexnet", "resnet18-small", "vgg16", "timm:vit_tiny_patch16_224"])
def test_trunks_without_a_pyramid(folder: Path, arch: str) -> None:
    with pytest.raises(InputError, match=r"needs maps of strides 4, 8, 16 and 32, and .* has .*: use resnet18, resnet50"):
        evaluate(model_of(arch), folder, OPTIONS)


@pytest.mark.parametrize("arch", ["timm:resnet10t", "torchvision:regnet_y_400mf", "timm:convnext_atto"])
def test_networks_of_libraries(arch: str) -> None:
    detector = mask_rcnn(model_of(arch).trunk, 3, masks=False, norm=True, regions=8).eval()
    with torch.no_grad():
        (found,) = detector([torch.zeros(3, 64, 96, dtype=torch.uint8)], [{}])
    assert found.keys() >= {"boxes", "labels", "scores"}


def test_images_of_another_size_than_annotated_are_left_out(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "coco")
    content = json.loads(file_of(folder, "train2017").read_text())
    content["images"][1]["height"] += 10
    file_of(folder, "train2017").write_text(json.dumps(content))
    data = read_coco(open_coco(folder).train, masks=False)
    samples = Samples(data, SizedTargets(Targets(data), image_sizes(data)), training_view([64], 96))
    (batch,) = samples.in_order(model_of(), range(4), 4)
    assert batch.unreadable == {1: "it has 72 x 64 pixels, and was annotated with 72 x 74"}
    assert [one.index for one in batch.samples] == [0, 2, 3]


def test_masks_stay_in_step_with_boxes_and_images(folder: Path) -> None:
    """Of views that are scaled and mirrored: a mask fills its box, and lies on the colour of its class."""
    train = with_objects(read_coco(open_coco(folder).train))
    samples = Samples(train, SizedTargets(Targets(train, masks=True), image_sizes(train)), training_view([40, 70], 90))
    for batch in samples.training(model_of(), 3, seed=0, steps=range(4)):
        for one in batch.samples:
            assert len(one.target["boxes"]) == len(one.target["masks"]) == len(one.target["labels"]) > 0
            for box_4, mask_HW, label in zip(*(one.target[name] for name in ("boxes", "masks", "labels")), strict=True):
                rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
                edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (edges - box_4).abs().max() <= 1.5
                red, _, blue = one.image_CHW[:, mask_HW.bool()].float().mean(dim=1)
                assert (red > blue) == (train.class_names[label] == "disc")


def test_bad_options_and_a_missing_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="long_side=100 must be at least the shorter side, 200"):
        CocoDetectionOptions(short_sides=(100, 200), long_side=100)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r'pip install "deepcluster\[dense\]"'):
        evaluate(model_of(), folder, OPTIONS)


def test_quick_settings_and_the_published_schedule() -> None:
    assert CocoDetectionOptions.from_dict({**PROTOCOLS["coco-detection"].quick}).steps == 300
    assert CocoDetectionOptions().drops == (60_000, 80_000)
    assert CocoDetectionOptions(lr_drops=(5,)).drops == (5,)


def work_of_ranks(folder: Path) -> None:
    with joined() as ranks:
        tested = prepare(model_of(work=Work(ranks=ranks)), folder, OPTIONS)
        assert len(tested.detections) == 2


@pytest.mark.slow
def test_it_learns_a_few_images_by_heart(tmp_path: Path, cache: Path) -> None:
    """Boxes and masks of four drawn images that it was trained on; three CPU-minutes."""
    folder = write_coco(tmp_path / "coco", train=5, objects=1)
    shutil.rmtree(folder / "val2017")
    shutil.copytree(folder / "train2017", folder / "val2017")
    shutil.copy(file_of(folder, "train2017"), file_of(folder, "val2017"))
    options = replace(
        OPTIONS, steps=200, lr=0.02, lr_drops=(150, 180), warmup=20, short_sides=(64,), long_side=96, regions=16
    )
    found = evaluate(model_of(), folder, replace(options, test_short_side=64, test_long_side=96))
    assert found.results["box AP50"] >= 0.95
    assert found.results["mask AP50"] >= 0.95


@pytest.mark.slow
def test_two_processes(folder: Path, cache: Path, tmp_path: Path) -> None:
    """They train and detect together; the first one then finds everything done."""
    in_ranks(2, tmp_path / "store", work_of_ranks, folder)
    assert len([*(cache / "unfinished").iterdir()]) == 2
    alone = model_of(work=Work(At("training", 1)))
    assert 0 <= evaluate(alone, folder, OPTIONS).best() <= 1


def test_evaluate_all_finds_the_folder(folder: Path) -> None:
    assert [name for name, _, _ in find_data(folder, ["coco-detection"])] == ["coco-detection"]
    assert [name for name, _, _ in find_data(folder.parent, [])].count("coco-detection") == 1
