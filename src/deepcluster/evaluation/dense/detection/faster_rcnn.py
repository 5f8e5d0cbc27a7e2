"""Fast and Faster R-CNN (Girshick, ICCV 2015; Ren et al., NeurIPS 2015) of torchvision's parts, with the published losses.

R regions, C classes with the background, A anchors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from deepcluster.evaluation.dense.detection.parts import PROPOSALS, FixedAnchors, at_least_float32

# A smooth L1 loss is quadratic below it: torchvision's, Fast R-CNN's and detectron2's (0: plain L1).
BETA = 1 / 9


class FloatHead(RPNHead):  # type: ignore[misc]
    """torchvision's head of an RPN; what it returns is float32 also under autocast, since boxes are made of it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return scores (B, A, H, W) and changes (B, 4 A, H, W) of the anchors of each map."""
        scores, changes = super().forward(x)
        return [*map(at_least_float32, scores)], [*map(at_least_float32, changes)]


class FloatPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's last layers, with Fast R-CNN's random weights; what it returns is float32 also under autocast."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, C) and changes (R, 4 C) of the regions."""
        logits_RC, changes_R4C = super().forward(x)
        return at_least_float32(logits_RC), at_least_float32(changes_R4C)


class RegionProposals(RegionProposalNetwork):  # type: ignore[misc]
    """A region proposal network for maps of `width` channels.

    Args:
        before, after: largest number of proposals of an image before and after non-maximum suppression, (training, test).
        beta: of the smooth L1 loss.
    """

    def __init__(
        self,
        width: int,
        anchors: FixedAnchors,
        before: tuple[int, int],
        after: tuple[int, int],
        *,
        beta: float = BETA,
    ) -> None:
        counts = [dict(zip(("training", "testing"), one, strict=True)) for one in (before, after)]
        head = FloatHead(width, anchors.num_anchors_per_location()[0])
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, *counts, nms_thresh=0.7)
        self.beta = beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of scores and boxes of the anchors that are drawn."""
        positive_A, negative_A = (torch.cat(one).bool() for one in self.fg_bg_sampler(labels))
        drawn_A, labels_A = positive_A | negative_A, torch.cat(labels)
        targets_A4 = torch.cat(regression_targets)[positive_A]
        boxes = smooth_l1_loss(pred_bbox_deltas[positive_A], targets_A4, beta=self.beta, reduction="sum")
        scores_A = objectness.flatten()[drawn_A]
        scores = nn.functional.binary_cross_entropy_with_logits(scores_A, labels_A[drawn_A])
        return scores, boxes / max(1, len(scores_A))


class GivenProposals(nn.Module):
    """Stands where Faster R-CNN has its region proposal network: returns the proposals of the targets."""

    def forward(
        self, images: Any, maps: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image, and no losses."""
        return [target[PROPOSALS] for target in targets], {}


class BoxHeads(RoIHeads):  # type: ignore[misc]
    """The second stage: torchvision's, with another loss of boxes and another choice of the background.

    Args:
        regions: drawn of an image in training.
        foreground: largest share of these that show an object, which is an IoU of 0.5.
        background_from: smallest IoU with an object of those that show none; Fast R-CNN chose hard ones by it.
        beta: of the smooth L1 loss.
        scores_from, nms, most: of the detections of an image: smallest score, IoU above which the lower score of a class is
            left out, and largest number.
        masks: pooler, head and predictor of masks, as torchvision's.
    """

    def __init__(
        self,
        pooler: nn.Module,
        head: nn.Module,
        predictor: nn.Module,
        *,
        regions: int,
        foreground: float = 0.25,
        background_from: float = 0.0,
        beta: float = BETA,
        scores_from: float = 0.05,
        nms: float = 0.5,
        most: int = 100,
        masks: tuple[nn.Module, nn.Module, nn.Module] | None = None,
    ) -> None:
        drawn, kept = (0.5, 0.5, regions, foreground, None), (scores_from, nms, most)
        super().__init__(pooler, head, predictor, *drawn, *kept, *(masks or ()))
        self.background_from, self.beta = background_from, beta

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each proposal the object nearest to it and its label: 0 the background, -1 neither."""
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        if self.background_from:
            for boxes_R4, objects_M4, labels_R in zip(proposals, gt_boxes, labels, strict=True):
                if len(objects_M4):
                    easy_R = box_iou(boxes_R4, objects_M4).amax(dim=1) < self.background_from
                    labels_R[easy_R & (labels_R == 0)] = -1
        return matched, labels

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the detections of each image, and no losses; in training no detections, and the losses."""
        if targets is None:
            return super().forward(features, proposals, image_shapes)  # type: ignore[no-any-return]
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        rows = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits_RC, changes_R4C = self.box_predictor(rows)
        losses = box_losses(logits_RC, changes_R4C, torch.cat(labels), torch.cat(wanted), self.beta)
        if self.has_mask():
            losses |= {"loss_mask": self._mask_loss(features, proposals, image_shapes, targets, matched, labels)}
        return [], losses

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        """Return the loss of the masks of the proposals that show an object."""
        shown = [torch.where(one > 0)[0] for one in labels]
        boxes = [one[rows] for one, rows in zip(proposals, shown, strict=True)]
        objects = [one[rows] for one, rows in zip(matched, shown, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        return maskrcnn_loss(at_least_float32(logits), boxes, masks, classes, objects)  # type: ignore[no-any-return]


def box_losses(
    logits_RC: Tensor, changes_R4C: Tensor, labels_R: Tensor, wanted_R4: Tensor, beta: float
) -> dict[str, Tensor]:
    """Return the losses of the classes of regions and of their boxes, both per region (Fast R-CNN, section 2.3)."""
    shown = torch.where(labels_R > 0)[0]
    changes_M4 = changes_R4C.unflatten(1, (-1, 4))[shown, labels_R[shown]]
    boxes = smooth_l1_loss(changes_M4, wanted_R4[shown], beta=beta, reduction="sum")
    count = max(1, len(labels_R))
    classes = cross_entropy(logits_RC, labels_R, reduction="sum")
    return {"loss_classes": classes / count, "loss_boxes": boxes / count}
