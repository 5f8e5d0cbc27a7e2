"""What detectors of objects share: views and their targets, batches of images of several sizes, anchors, detection.

Boxes are (left, top, right, bottom) in pixels of the scaled image.
B batch, C channels, H and W pixels, M objects, A anchors, D detections.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms import v2

from deepcluster.core.work import Advance
from deepcluster.evaluation.datasets.dense import Detections, ObjectSet
from deepcluster.evaluation.dense.detection.pasting import encoded_masks
from deepcluster.evaluation.dense.samples import Augment, Sample, SampleBatch, Samples, Target
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.trainer import Diverged
from deepcluster.models.geometry import Geometry
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import weights_hash

# Sides of a batch are multiples of it: the coarsest stride of usual networks.
MULTIPLE = 32
# Objects of a narrower box are left out of training.
SMALLEST_SIDE = 1.0
PROPOSALS = "proposals"

# Returns boxes (R, 4) in pixels of the image itself, which may show objects, given the index of the image.
ReadProposals = Callable[[int], Tensor]


@dataclass(frozen=True)
class Targets:
    """Reads the objects of an image on which a detector is trained: boxes (M, 4), labels (M,), masks (M, H, W) if asked for.

    Crowds are left out.

    Attributes:
        difficult: keep objects that are marked "difficult".
        proposals: where regions that may show objects come from; they are the target's `proposals`.
        objects: read objects; without, as in a test, the target has proposals at most.
    """

    data: ObjectSet
    masks: bool = False
    difficult: bool = True
    proposals: ReadProposals | None = None
    objects: bool = True

    def __call__(self, index: int, height: int, width: int) -> Target:
        """Return the target of an image of a height and width."""
        target: Target = {}

        def boxes(values_M4: Tensor) -> Tensor:
            found: Tensor = tv_tensors.BoundingBoxes(values_M4.reshape(-1, 4), format="XYXY", canvas_size=(height, width))
            return found

        if self.proposals is not None:
            target[PROPOSALS] = boxes(self.proposals(index))
        if self.objects:
            found = self.data.read_objects(index, self.masks)
            kept_M = ~found.crowd_M if self.difficult else ~(found.crowd_M | found.difficult_M)
            target |= {"boxes": boxes(found.boxes_M4[kept_M]), "labels": found.labels_M[kept_M]}
            if self.masks and found.masks_MHW is not None:
                target["masks"] = tv_tensors.Mask(found.masks_MHW[kept_M])
        return target


def keep_visible(image_CHW: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
    """Leave out objects and proposals of which less than a pixel is in the image."""
    target = dict(target)
    for name, with_it in (("boxes", ("boxes", "labels", "masks")), (PROPOSALS, (PROPOSALS,))):
        if name in target:
            box_M4 = target[name].as_subclass(Tensor)
            kept_M = (box_M4[:, 2:] - box_M4[:, :2] >= SMALLEST_SIDE).all(dim=1)
            target |= {key: target[key].as_subclass(Tensor)[kept_M] for key in with_it if key in target}
    return image_CHW, target


def training_view(sides: Sequence[int], longest: int) -> Augment:
    """Return the random view of detectors: the shorter side is one of `sides`, the longer at most `longest`; or mirrored."""
    scaled = v2.RandomShortestSize(list(sides), max_size=longest)
    return cast(Augment, v2.Compose([scaled, v2.RandomHorizontalFlip(), v2.ClampBoundingBoxes(), keep_visible]))


def test_view(side: int, longest: int) -> Augment:
    """Return the view of a test: the shorter side is `side`, the longer at most `longest`."""
    scaled = v2.RandomShortestSize([side], max_size=longest)
    return cast(Augment, v2.Compose([scaled, v2.ClampBoundingBoxes(), keep_visible]))


@dataclass(frozen=True)
class Batching:
    """Makes a normalised batch of uint8 images that are already scaled.

    Images are padded by their edges, at which a Sobel layer sees nothing. Boxes stay in pixels of the image: what is padded
    at the left and top moves the cells of the maps, which are then centred `shift` pixels further left and higher.

    Attributes:
        shift: pixels padded at left and top.
        dtype: of the network's weights.
    """

    shift: int = 0
    dtype: torch.dtype = torch.float32

    def __call__(self, images: Sequence[Tensor]) -> ImageList:
        """Return the batch with the sizes (height, width) of its images."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (MULTIPLE * ceil((max(sides) + self.shift) / MULTIPLE) for sides in zip(*sizes, strict=True))
        batch_BCHW = torch.stack([self._padded(image, height, width) for image in images])
        return ImageList(normalise(batch_BCHW).to(self.dtype), sizes)

    def _padded(self, image_CHW: Tensor, height: int, width: int) -> Tensor:
        rows, columns = (
            (torch.arange(to, device=image_CHW.device) - self.shift).clamp(0, side - 1)
            for to, side in zip((height, width), image_CHW.shape[1:], strict=True)
        )
        return image_CHW[:, rows][:, :, columns]


class Detector(nn.Module):
    """A detector of two stages, of torchvision's parts (its `GeneralizedRCNN` scales and normalises images by itself).

    Args:
        backbone: returns maps by name.
        rpn: as torchvision's `RegionProposalNetwork`.
        roi_heads: as torchvision's `RoIHeads`.
    """

    def __init__(self, batching: Batching, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module) -> None:
        super().__init__()
        self.batching, self.backbone, self.rpn, self.roi_heads = batching, backbone, rpn, roi_heads

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]]) -> Any:
        """Return the losses by name in training, else `boxes`, `labels` and `scores` of each image by descending score."""
        batch = self.batching(images)
        maps = self.backbone(batch.tensors)
        proposals, first_losses = self.rpn(batch, maps, targets)
        found, losses = self.roi_heads(maps, proposals, batch.image_sizes, targets if self.training else None)
        return {**first_losses, **losses} if self.training else found


class StageMaps(nn.Module):
    """The backbone of torchvision's detectors: the maps of some stages of a trunk, float32 also under autocast.

    Boxes are computed in the type of the maps, for which bf16 has too few digits.
    """

    def __init__(self, trunk: Trunk, stages: Sequence[str]) -> None:
        super().__init__()
        self.trunk, self.stages = trunk, tuple(stages)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the map of each stage by its name."""
        found = self.trunk.maps(x_BCHW, self.stages)
        return {name: at_least_float32(found[name]) for name in self.stages}


def at_least_float32(x: Tensor) -> Tensor:
    """Return bf16 as float32, other types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FixedAnchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors at the centres of the cells of one map or several, whose strides are given, not inferred from sizes.

    Args:
        sides: of the anchors of each map, in pixels.
        cells: where the cells of each map are, in pixels of the image: after the shift of `Batching`.
    """

    def __init__(
        self,
        sides: Sequence[Sequence[int]],
        cells: Sequence[Geometry],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        super().__init__(tuple(map(tuple, sides)), (tuple(ratios),) * len(sides))
        self.cells = tuple(cells)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of each image."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        grids = [list(one.shape[-2:]) for one in feature_maps]
        strides: Any = [[cell.stride, cell.stride] for cell in self.cells]
        found = self.grid_anchors(grids, strides)
        anchors_A4 = torch.cat([one + cell.offset for one, cell in zip(found, self.cells, strict=True)])
        return [anchors_A4 for _ in image_list.image_sizes]


def on_device(model: Model, batch: SampleBatch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images and targets of a batch on the model's device, boxes in the type of its weights."""
    put, dtype = model.machine.put, model.machine.dtype
    images = [put(sample.image_CHW) for sample in batch.samples]
    targets = [
        {name: put(value.to(dtype) if name in ("boxes", PROPOSALS) else value) for name, value in sample.target.items()}
        for sample in batch.samples
    ]
    return images, targets


def losses_of(model: Model, network: nn.Module) -> Callable[[SampleBatch], Mapping[str, Tensor]]:
    """Return the function that `fine_tune` minimises, of a `Detector`; it raises `Diverged`."""

    def losses(batch: SampleBatch) -> Mapping[str, Tensor]:
        found = network(*on_device(model, batch))
        named = {name.removeprefix("loss_"): value for name, value in found.items()}
        # At once: where numbers are not finite there are no proposals, which layers may not bear.
        for name, value in zip(named, torch.stack([*named.values()]).detach().tolist(), strict=True):
            if not isfinite(value):
                raise Diverged(name, value, "one of its steps")
        return named

    return losses


def to_original(boxes_D4: Tensor, sample: Sample) -> Tensor:
    """Return boxes of a sample's image in pixels of the image before it was scaled."""
    (height, width), (scaled_height, scaled_width) = sample.size, sample.image_CHW.shape[1:]
    factor_4 = torch.tensor([width / scaled_width, height / scaled_height] * 2)
    return (boxes_D4.cpu().float() * factor_4).clamp(min=0).minimum(torch.tensor([width, height] * 2))


def detections_of(model: Model, network: nn.Module) -> Callable[[Sample], Detections]:
    """Return the function that finds objects in an image, with a `Detector` in eval mode.

    Each image is alone: what is padded for a larger one would change the map at its borders.
    """

    def detect(sample: Sample) -> Detections:
        with torch.inference_mode(), model.machine.autocast():
            (found,) = network(*on_device(model, SampleBatch([sample], {})))
        boxes_D4, scores_D, labels_D = (found[name].cpu() for name in ("boxes", "scores", "labels"))
        boxes_D4 = to_original(boxes_D4, sample)
        masks = encoded_masks(found["masks"][:, 0], boxes_D4, sample.size) if "masks" in found else None
        return Detections(boxes_D4, scores_D.float(), labels_D, masks)

    return detect


def detect_all(
    model: Model,
    network: nn.Module,
    samples: Samples,
    detect: Callable[[Sample], Detections],
    *facts: object,
) -> tuple[list[Detections], dict[int, str], Spans]:
    """Return what is found in each image of a set, on every rank; and why images can't be read, by index (none found).

    Args:
        network: in eval mode; what was found is kept until its weights change.
        samples: with the view of the test.
        facts: what the detections depend on beside network and images.
    """
    spans = Spans(model, len(samples.data), "detections", weights_hash(network), data_key(samples.data.source), *facts)

    def make(span: range, advance: Advance) -> dict[str, Any]:
        found: dict[int, Detections] = {}
        unreadable: dict[int, str] = {}
        for batch in samples.in_order(model, span):
            found |= {sample.index: detect(sample) for sample in batch.samples}
            unreadable |= batch.unreadable
            advance(1)
        each = [found.get(index, _nothing()) for index in span]
        return {
            "counts": torch.tensor([len(one.scores_D) for one in each]),
            "boxes": torch.cat([one.boxes_D4 for one in each]),
            "scores": torch.cat([one.scores_D for one in each]),
            "labels": torch.cat([one.labels_D for one in each]),
            "masks": [one.masks for one in each],
            "unreadable": unreadable,
        }

    every: list[Detections] = []
    faults: dict[int, str] = {}
    for part in spans.compute("detecting", make):
        counts = part["counts"].tolist()
        rows = zip(*(part[name].split(counts) for name in ("boxes", "scores", "labels")), part["masks"], strict=True)
        every += [Detections(*row) for row in rows]
        faults |= part["unreadable"]
    return every, faults, spans


def _nothing() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
