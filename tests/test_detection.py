"""What detectors share: views with their boxes, padded batches, losses, detections in spans."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_objects import write_devkit
from models_helper import make_model
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from deepcluster.evaluation.datasets.dense import Objects, ObjectSet
from deepcluster.evaluation.datasets.voc import open_voc
from deepcluster.evaluation.datasets.voc_boxes import objects_of
from deepcluster.evaluation.dense.detection import parts as d
from deepcluster.evaluation.dense.detection.box_heads import parts_of
from deepcluster.evaluation.dense.detection.faster_rcnn import BETA, BoxHeads, RegionProposals, box_losses
from deepcluster.evaluation.dense.detection.training import Recipe, make_detector
from deepcluster.evaluation.dense.detection.voc_options import Voc0712DetectionOptions
from deepcluster.evaluation.dense.samples import Samples
from deepcluster.evaluation.trainer import Diverged
from deepcluster.models.archs import make_trunk
from deepcluster.models.geometry import Geometry
from deepcluster.models.trunk import normalise

RECIPE = Recipe(
    batchnorm="train", fixed_stage="", free_biases=False, difficult=True, beta=0.0, rpn_beta=0.0, scores_from=0.01, nms=0.5
)  # fmt: skip
OPTIONS = Voc0712DetectionOptions(regions=16, test_regions=100, batch_size=2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ObjectSet:
    """Six images, the first without objects."""
    kit = write_devkit(tmp_path_factory.mktemp("voc") / "VOC2007", {"train": 6}, empty=1)
    return objects_of(open_voc(kit), "train")


def detector_of(model: Any, **options: Any) -> d.Detector:
    parts = parts_of(model.copy_of_trunk(), model.image_size, 0)
    return make_detector(model, parts, RECIPE, replace(OPTIONS, **options), given=False, classes=21)


def test_boxes_stay_on_their_objects_in_random_views(drawn: ObjectSet) -> None:
    samples = Samples(drawn, d.Targets(drawn), d.training_view((60, 90, 140), 160))
    sides, mirrored = set(), set()
    for index in range(1, 6):
        objects = drawn.read_objects(index, False)
        for seed in range(6):
            found = samples.sample(index, seed)
            height, width = found.image_CHW.shape[1:]
            sides.add(min(height, width))
            boxes = found.target["boxes"]
            assert boxes.shape == objects.boxes_M4.shape and torch.equal(found.target["labels"], objects.labels_M)
            factor = torch.tensor([width / found.size[1], height / found.size[0]] * 2)
            as_they_were = objects.boxes_M4 * factor
            flipped = as_they_were.clone()
            flipped[:, 0], flipped[:, 2] = width - as_they_were[:, 2], width - as_they_were[:, 0]
            is_mirrored = not torch.allclose(boxes, as_they_were, atol=1e-3)
            mirrored.add(is_mirrored)
            assert torch.allclose(boxes, flipped if is_mirrored else as_they_were, atol=1e-3)
            # The last drawn is in front: the middle of its box has its colour, more than any other.
            left, top, right, bottom = (int(one) for one in boxes[-1])
            middle = found.image_CHW[:, (top + bottom) // 2, (left + right) // 2]
            assert int(middle.argmax()) == {7: 0, 12: 1, 18: 2}[int(found.target["labels"][-1])]
    assert len(sides) > 3 and mirrored == {True, False}


def test_the_longer_side_is_limited_and_the_test_is_not_random(drawn: ObjectSet) -> None:
    samples = Samples(drawn, d.Targets(drawn, objects=False), d.test_view(200, 220))
    for index in range(6):
        one, other = samples.sample(index, 1), samples.sample(index, 2)
        assert torch.equal(one.image_CHW, other.image_CHW) and one.target == {}
        short, long = sorted(one.image_CHW.shape[1:])
        assert short == 200 or long == 220


def test_targets_leave_out_crowds_slivers_and_difficult_objects_if_asked(drawn: ObjectSet) -> None:
    objects = Objects(
        torch.tensor([[0.0, 0, 30, 30], [5, 5, 5.4, 40], [10, 10, 90, 60], [1, 1, 9, 9]]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([False, False, True, False]),
        torch.tensor([False, False, False, True]),
        torch.ones(4, 70, 100, dtype=torch.uint8),
    )
    data = replace(drawn, read_objects=lambda index, masks: objects)
    for difficult, labels in ((True, [1, 3]), (False, [1])):
        targets = d.Targets(data, masks=True, difficult=difficult)
        _, target = d.test_view(35, 100)(torch.zeros(3, 70, 100, dtype=torch.uint8), targets(0, 70, 100))
        assert target["labels"].tolist() == labels
        assert target["boxes"][0].tolist() == [0, 0, 15, 15]
        assert target["masks"].shape == (len(labels), 35, 50)


def test_an_image_without_objects_has_empty_targets(drawn: ObjectSet) -> None:
    found = Samples(drawn, d.Targets(drawn), d.training_view((64,), 128)).sample(0)
    assert found.target["boxes"].shape == (0, 4) and found.target["labels"].shape == (0,)


def test_proposals_change_with_the_image(drawn: ObjectSet) -> None:
    boxes = drawn.read_objects(2, False).boxes_M4
    targets = d.Targets(drawn, proposals=lambda index: drawn.read_objects(index, False).boxes_M4)
    for seed in range(4):
        found = Samples(drawn, targets, d.training_view((50, 120), 200)).sample(2, seed)
        assert torch.equal(found.target["proposals"], found.target["boxes"]) and len(found.target["boxes"]) == len(boxes)


def test_padding_repeats_the_edges_so_that_sobel_sees_nothing_there() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in ((40, 50), (30, 70))]
    batch = d.Batching(shift=5)(images)
    assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(40, 50), (30, 70)]
    for image, padded, (height, width) in zip(images, batch.tensors, batch.image_sizes, strict=True):
        assert torch.equal(padded[:, 5 : 5 + height, 5 : 5 + width], normalise(image[None])[0])
    trunk = make_trunk("alexnet-small", image_size=32, sobel=True)
    edges = trunk.edges(batch.tensors)
    # The edge of the second image goes on to the right, bottom and left; beyond its corners all is one colour.
    assert edges[1, :, 37:-1, 77:-1].abs().max() < 1e-5 and edges[1, :, 1:4, 77:-1].abs().max() < 1e-5
    assert edges[1, 0, 10:30, 77:-1].abs().max() < 1e-5, "no edge from left to right"
    assert edges[1, 1, 37:-1, 10:70].abs().max() < 1e-5, "no edge from top to bottom"


def test_the_batch_is_torchvisions_inside_the_images() -> None:
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)]
    theirs = GeneralizedRCNNTransform(64, 96, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])([images[0] / 255])[0]
    assert torch.allclose(d.Batching()(images).tensors, theirs.tensors, atol=1e-5)


def test_an_image_in_a_batch_is_the_image_alone(tmp_path: Path, drawn: ObjectSet) -> None:
    model = make_model(tmp_path, workers=0, sobel=True)
    detector = detector_of(model).eval()
    samples = Samples(drawn, d.Targets(drawn, objects=False), d.test_view(96, 128))
    found = [samples.sample(index) for index in range(6)]
    images = [one.image_CHW for one in found]
    with torch.no_grad():
        alone = [detector([image], [{}])[0] for image in images]
        same = [
            one for one in range(6) if d.Batching()([images[one]]).tensors.shape == d.Batching()([images[0]]).tensors.shape
        ]
        together = dict(zip(same, detector([images[one] for one in same], [{}] * len(same)), strict=True))
    assert len(same) > 1
    for index, one in together.items():
        assert torch.allclose(one["boxes"], alone[index]["boxes"], atol=1e-3) and len(one["scores"])
        assert torch.allclose(one["scores"], alone[index]["scores"], atol=1e-4)
    # What is found in a set is what is found in each image alone, in pixels of the image itself.
    detections, unreadable, spans = d.detect_all(model, detector, samples, d.detections_of(model, detector))
    for index, one in enumerate(detections):
        height, width = found[index].size
        scale = torch.tensor([width, height] * 2) / torch.tensor([*found[index].image_CHW.shape[1:]]).flip(0).repeat(2)
        assert torch.allclose(one.boxes_D4, alone[index]["boxes"] * scale, atol=1e-3)
        assert torch.equal(one.scores_D, alone[index]["scores"])
        assert (one.boxes_D4 >= 0).all() and (one.boxes_D4[:, 2] <= width).all() and (one.boxes_D4[:, 3] <= height).all()
        assert (one.scores_D.diff() <= 0).all()
    assert not unreadable
    spans.done()


def test_losses_are_torchvisions(drawn: ObjectSet, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, changes = torch.randn(20, 5, generator=generator), torch.randn(20, 20, generator=generator)
    labels, wanted = torch.randint(0, 5, (20,), generator=generator), torch.randn(20, 4, generator=generator)
    ours = box_losses(logits, changes, labels, wanted, BETA)
    theirs = fastrcnn_loss(logits, changes, [labels], [wanted])
    assert torch.allclose(torch.stack([*ours.values()]), torch.stack(theirs), atol=1e-6)
    shown = torch.where(labels > 0)[0]
    chosen = changes.reshape(20, 5, 4)[shown, labels[shown]]
    plain = box_losses(logits, changes, labels, wanted, 0.0)["loss_boxes"]
    assert torch.allclose(plain, (chosen - wanted[shown]).abs().sum() / 20)
    assert torch.allclose(ours["loss_classes"], cross_entropy(logits, labels))
    none = box_losses(logits[:0], changes[:0], labels[:0], wanted[:0], 0.0)
    assert [float(one) for one in none.values()] == [0, 0]
    # The region proposal network's, on the same draw of anchors.
    anchors = d.FixedAnchors([[32]], [Geometry(16, 0.0)])
    ours_rpn = RegionProposals(8, anchors, (10, 10), (10, 10), beta=BETA)
    scores, moves = torch.randn(60, 1, generator=generator), torch.randn(60, 4, generator=generator)
    labels, targets = [torch.tensor([1.0, 0, -1] * 20)], [torch.randn(60, 4, generator=generator)]
    mine = ours_rpn.compute_loss(scores, moves, labels, targets)
    their = super(RegionProposals, ours_rpn).compute_loss(scores, moves, labels, targets)
    assert torch.allclose(torch.stack(mine), torch.stack(their))
    ours_rpn.beta = 0.0
    positive = labels[0] > 0
    l1 = smooth_l1_loss(moves[positive], targets[0][positive], beta=0.0, reduction="sum") / 40
    assert torch.allclose(ours_rpn.compute_loss(scores, moves, labels, targets)[1], l1)


def test_the_background_of_fast_rcnn_overlaps_an_object() -> None:
    nothing = torch.nn.Identity()
    heads = BoxHeads(nothing, nothing, nothing, regions=16, background_from=0.1)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [5, 0, 15, 10], [9, 9, 19, 19], [50, 50, 60, 60]])
    objects = torch.tensor([[0.0, 0, 10, 10]])
    _, labels = heads.assign_targets_to_proposals(
        [boxes, boxes], [objects, objects[:0]], [torch.tensor([7]), torch.tensor([])]
    )
    assert box_iou(boxes, objects).flatten().tolist() == pytest.approx([1, 10 / 12, 1 / 3, 1 / 199, 0])
    assert labels[0].tolist() == [7, 7, 0, -1, -1]
    assert labels[1].tolist() == [0] * 5, "an image without objects is all background"


def test_a_loss_that_is_no_number_stops_at_once(drawn: ObjectSet, tmp_path: Path) -> None:
    model = make_model(tmp_path, workers=0)
    detector = detector_of(model)
    batch = next(Samples(drawn, d.Targets(drawn), d.training_view((64,), 128)).in_order(model, [1, 0], 2))
    losses = d.losses_of(model, detector)(batch)
    assert list(losses) == ["objectness", "rpn_box_reg", "classes", "boxes"]
    with torch.no_grad():
        detector.roi_heads.box_predictor.bbox_pred.weight.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(Diverged, match="the loss of boxes became nan"):
        d.losses_of(model, detector)(batch)


def test_several_sizes_of_images_and_none_with_objects_train(drawn: ObjectSet, tmp_path: Path) -> None:
    model = make_model(tmp_path, workers=0)
    detector = detector_of(model)
    samples = Samples(drawn, d.Targets(drawn), d.training_view((64,), 128))
    for indices in ([0, 0], [0, 3], [3, 4]):
        losses = d.losses_of(model, detector)(next(samples.in_order(model, indices, 2)))
        torch.stack([*losses.values()]).sum().backward()
    assert all(np.isfinite(weight.grad.sum().item()) for weight in detector.parameters() if weight.grad is not None)
