"""Options of detection and segmentation of objects on COCO; nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepcluster.core.options import option
from deepcluster.evaluation.dense.detection.options import SgdOptions


@dataclass(frozen=True)
class CocoDetectionOptions(SgdOptions):
    """Mask R-CNN with a feature pyramid (FPN) on COCO 2017, the "1x" schedule, as MoCo's and mmselfsup's tables."""

    steps: int = option(90_000, "steps of SGD", at_least=1)
    batch_size: int = option(16, "images per step", at_least=1)
    lr: float = option(0.02, "learning rate after the warm-up, for 16 images per step: half for 8", at_least=0)
    lr_drops: tuple[int, ...] = option(
        (), "steps at which the learning rate is divided by 10 (default: after 2/3 and 8/9 of them)", at_least=1
    )
    warmup: int = option(1_000, "steps during which the learning rate rises from 1/1000 of its value", at_least=0)
    weight_decay: float = option(1e-4, "weight decay; BatchNorm has none", at_least=0)
    short_sides: tuple[int, ...] = option(
        tuple(range(640, 801, 32)), "shorter sides in pixels to which images are scaled in training", at_least=32
    )
    long_side: int = option(1333, "longest side in pixels in training", at_least=32)
    test_short_side: int = option(800, "shorter side in pixels in the test", at_least=32)
    test_long_side: int = option(1333, "longest side in pixels in the test", at_least=32)
    regions: int = option(512, "regions of an image on which the heads are trained", at_least=1)
    batchnorm: str = option(
        "auto",
        "BatchNorm of trunk and pyramid: statistics of this process's images (train), of all processes' (sync; auto), or "
        "those of the model, and a pyramid without BatchNorm (frozen)",
        choices=("auto", "train", "frozen", "sync"),
    )
    boxes_only: bool = option(False, "no masks: for annotations that have boxes only, or to save time")

    @property
    def drops(self) -> tuple[int, ...]:
        """The steps at which the learning rate is divided by 10."""
        return self.lr_drops or (self.steps * 2 // 3, self.steps * 8 // 9)


# A first look on a processor: minutes. The rate and the clipping suit batches of two and weights of any scale.
QUICK: Mapping[str, Any] = {
    "steps": 300,
    "batch_size": 2,
    "lr": 0.005,
    "warmup": 50,
    "clip": 10.0,
    "short_sides": (224,),
    "long_side": 448,
    "test_short_side": 224,
    "test_long_side": 448,
    "regions": 64,
}
