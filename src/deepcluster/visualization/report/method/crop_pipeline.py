"""What a run of DeepCluster-v2 does to one image: a projection, prototypes, several crops (arXiv 2006.09882).

N images, B batch, C channels, H and W pixels, D features, P components, K clusters of a grouping, V crops of an image,
G groupings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepcluster.clustering.whitening import Whitening
from deepcluster.data.multi_crop import MultiCropView, crop_draws
from deepcluster.models.projection import Projection
from deepcluster.visualization.report.method.pipeline import TOGETHER, Floats, Integers, Pipeline


@dataclass(frozen=True, kw_only=True)
class CropPipeline(Pipeline):
    """A run of DeepCluster-v2.

    Attributes:
        projection: as it is now, in eval mode.
        whitening: of the points that are grouped; None where they are grouped as they are on the sphere.
        looks_again: whether the centre views of all images are grouped, and not the crops of the epoch before.
        view: the crops that are learned together.
        prototypes: of each grouping that was learned last, (K, P), of unit length.
        labels_GN: what was learned last: cluster of every image in each grouping, -1 = unassigned.
        order_N: images in the order of the last epoch.
        temperature: of the softmax over the prototypes.
        optimizer: "sgd" or "lars".
    """

    version: ClassVar[int] = 2
    projection: Projection
    view: MultiCropView
    prototypes: Sequence[Tensor]
    labels_GN: Tensor
    order_N: Integers
    temperature: float = 0.1
    whitening: Whitening | None = None
    looks_again: bool = False
    optimizer: str = "sgd"

    @property
    def order(self) -> Integers:
        """The images in the order in which the last epoch drew them: each once."""
        return self.order_N

    @property
    def n_large(self) -> int:
        """Large crops of an image, whose points are grouped."""
        return self.view.crops[0][0]

    @property
    def hidden(self) -> int:
        """Width of the layer between features and points."""
        return int(self.projection.layers[0].out_features)  # type: ignore[arg-type]

    @property
    def n_projected(self) -> int:
        """Width of the projection; whitening may keep fewer components."""
        return int(self.projection.layers[-1].out_features)  # type: ignore[arg-type]

    def unscaled(self, features_BD: Tensor) -> Tensor:
        """Numbers, float32, that the last layer of the projection gives."""
        return self._projected(features_BD, self._ready_projection.layers)

    def points(self, features_BD: Tensor) -> Tensor:
        """Points (B, P), float32, on the sphere, whitened where the run groups them so."""
        points_BP = self._projected(features_BD, self._ready_projection)
        return points_BP if self.whitening is None else self.whitening.transform(points_BP)

    @property
    def _ready_projection(self) -> Projection:
        return self.projection.to(self.machine.device, self.machine.dtype).eval()

    def _projected(self, features_BD: Tensor, layers: torch.nn.Module) -> Tensor:
        rows = []
        with torch.no_grad(), self.machine.autocast():
            for some_BD in features_BD.split(TOGETHER):
                rows.append(layers(some_BD.to(self.machine.device, self.machine.dtype)).float().cpu())
        return torch.cat(rows)

    def crops(self, image_HWC: Tensor, position: int) -> "list[Crop]":
        """The crops of an image at a position of the last trained epoch, as the run drew them; large ones first."""
        draws_VR = crop_draws(self.seed, self.trained_epoch, position, 1, self.view.n_views)[0]
        sides = tuple(np.full(1, side) for side in image_HWC.shape[:2])
        crops: list[Crop] = []
        for number, (cut_VCHW, view) in enumerate(zip(self.view([image_HWC], draws_VR[None]), self.view.views, strict=True)):
            for cut_CHW in cut_VCHW:
                draws_1R = draws_VR[len(crops) : len(crops) + 1]
                given_1CHW = self.machine.put(cut_CHW[None])
                coloured, sharp, vivid = (
                    colours(given_1CHW, draws_1R)[0].cpu()
                    for colours in (self.colours, replace(self.colours, blur=0.0), replace(self.colours, grey=0.0))
                )
                box_4 = view.boxes(draws_1R, *sides)[0]
                plain_CHW = replace(view, flip=False)([image_HWC], draws_1R)[0]
                crops.append(
                    Crop(
                        cut_CHW=cut_CHW,
                        coloured_CHW=coloured,
                        box_4=tuple(box_4.tolist()),
                        is_large=number == 0,
                        is_flipped=not torch.equal(plain_CHW, cut_CHW),
                        is_grey=not torch.equal(coloured, vivid),
                        is_blurred=not torch.equal(coloured, sharp),
                    )
                )
        return crops

    def points_of(self, images_BCHW: Tensor) -> Tensor:
        """Points on the sphere, where prototypes are, float32 on the CPU, of images (uint8, or in [0, 1]) of one size."""
        with torch.no_grad(), self.machine.autocast():
            features_BD = self.ready_trunk(self.seen(images_BCHW))
            points_BP: Tensor = self._ready_projection(features_BD).float().cpu()
        return points_BP

    def lesson(self, image_HWC: Tensor, index: int) -> "CropLesson | None":
        """What the last trained epoch showed of an image, and what the network says of it now; None where it did not."""
        positions = self.drawn_positions(index)
        if not len(positions):
            return None
        position, labels_G = int(positions[0]), self.labels_GN[:, index]
        crops = self.crops(image_HWC, position)
        # One size after the other, as crops come.
        bounds = [0, *np.cumsum([count for count, _ in self.view.crops]).tolist()]
        parts = [torch.stack([crop.coloured_CHW for crop in crops[first:end]]) for first, end in pairwise(bounds)]
        points_VP = torch.cat([self.points_of(part) for part in parts]).double()
        scores = [points_VP @ prototypes_KP.cpu().double().T / self.temperature for prototypes_KP in self.prototypes]
        losses_GV = [
            cross_entropy(scores_VK, label.expand(len(crops)), reduction="none", ignore_index=-1)
            for scores_VK, label in zip(scores, labels_G, strict=True)
        ]
        return CropLesson(
            position=position,
            labels=labels_G.tolist(),
            counts=[len(prototypes_KP) for prototypes_KP in self.prototypes],
            sizes=[int((row_N == label).sum()) for row_N, label in zip(self.labels_GN, labels_G, strict=True)],
            crops=crops,
            points_VP=points_VP,
            probabilities_VK=scores[0].softmax(dim=1).numpy(),
            losses_VG=torch.stack(losses_GV, dim=1).numpy(),
        )


@dataclass(frozen=True)
class Crop:
    """A crop that training drew.

    Attributes:
        cut_CHW: uint8, before colours change.
        coloured_CHW: as the network is given it, before it normalises it: uint8, or in [0, 1]; on the CPU.
        box_4: top, left, height and width in its image, pixels.
    """

    cut_CHW: Tensor
    coloured_CHW: Tensor
    box_4: tuple[int, ...]
    is_large: bool
    is_flipped: bool
    is_grey: bool
    is_blurred: bool


@dataclass(frozen=True)
class CropLesson:
    """The last trained epoch, for one image.

    Attributes:
        position: where in the epoch the image came.
        labels: its cluster in each grouping, -1 = none.
        counts, sizes: clusters of each grouping, and images with the image's label.
        points_VP: float64, of its crops as the network is now, in eval mode.
        probabilities_VK: that the softmax over the first grouping's prototypes gives each crop.
        losses_VG: cross-entropy of each crop in each grouping; 0 where there is no label.
    """

    position: int
    labels: list[int]
    counts: list[int]
    sizes: list[int]
    crops: list[Crop]
    points_VP: Tensor
    probabilities_VK: Floats
    losses_VG: Floats

    @property
    def guess(self) -> float:
        """What blind guessing costs, the mean over groupings, in nats."""
        return float(np.log(self.counts).mean())
