"""Options of the detection protocols on Pascal VOC; nothing here imports torch."""

from dataclasses import dataclass
from typing import Any

from deepcluster.core.options import option
from deepcluster.evaluation.dense.detection.options import SgdOptions

SPLIT = "images to train on: train (tested on val) or trainval (tested on test); auto: trainval where test has annotations"


@dataclass(frozen=True)
class DetectionOptions(SgdOptions):
    """What detectors on Pascal VOC have in common."""

    test_regions: int = option(300, "regions of an image that the network proposes in the test", at_least=1)
    split: str = option("auto", SPLIT, choices=("auto", "train", "trainval"))


@dataclass(frozen=True)
class Voc07DetectionOptions(DetectionOptions):
    """Fast R-CNN on Pascal VOC 2007, as the paper's table 2."""

    finetune: str = option("all", "train the whole network, or only the box head", choices=("all", "fc6-8"))
    proposals: str | None = option(
        None,
        "file (.mat, .npz, .csv, .parquet), or folder of files, with regions of all images that may show objects, such as "
        "selective search's (default: those of a region proposal network)",
    )
    lr_drops: tuple[int, ...] = option(
        (), "steps at which the learning rate is divided by 10 (default: after 1/3 and 2/3 of them)", at_least=1
    )
    short_sides: tuple[int, ...] = option(
        (480, 576, 688, 864, 1200), "shorter sides in pixels to which images are scaled in training", at_least=32
    )
    long_side: int = option(2000, "longest side in pixels in training", at_least=32)
    batchnorm: str = option(
        "auto",
        "BatchNorm: statistics of the model (frozen; auto), of this process's images (train) or of all processes' (sync)",
        choices=("auto", "train", "frozen", "sync"),
    )

    @property
    def drops(self) -> tuple[int, ...]:
        """The steps at which the learning rate is divided by 10."""
        return self.lr_drops or (self.steps // 3, self.steps * 2 // 3)


@dataclass(frozen=True)
class Voc0712DetectionOptions(DetectionOptions):
    """Faster R-CNN on Pascal VOC 2007 and 2012, tested on 2007, as MoCo's table."""

    freeze: str = option(
        "none", "train all weights, or (body) only those after the map of regions", choices=("none", "body")
    )
    steps: int = option(24_000, "steps of SGD", at_least=1)
    batch_size: int = option(16, "images per step", at_least=1)
    lr: float = option(
        0.02, "learning rate after the warm-up, for 16 images per step: scale it with their number", at_least=0
    )
    lr_drops: tuple[int, ...] = option(
        (), "steps at which the learning rate is divided by 10 (default: after 3/4 and 11/12 of them)", at_least=1
    )
    warmup: int = option(100, "steps during which the learning rate rises to its value", at_least=0)
    weight_decay: float = option(1e-4, "weight decay; BatchNorm has none", at_least=0)
    short_sides: tuple[int, ...] = option(
        tuple(range(480, 801, 32)), "shorter sides in pixels to which images are scaled in training", at_least=32
    )
    long_side: int = option(1333, "longest side in pixels in training", at_least=32)
    test_short_side: int = option(800, "shorter side in pixels in the test", at_least=32)
    test_long_side: int = option(1333, "longest side in pixels in the test", at_least=32)
    regions: int = option(512, "regions of an image on which the box head is trained", at_least=1)
    test_regions: int = option(1_000, "regions of an image that the network proposes in the test", at_least=1)
    batchnorm: str = option(
        "auto",
        "BatchNorm: statistics of this process's images (train), of all processes' (sync; auto), or of the model (frozen)",
        choices=("auto", "train", "frozen", "sync"),
    )

    @property
    def drops(self) -> tuple[int, ...]:
        """The steps at which the learning rate is divided by 10."""
        return self.lr_drops or (self.steps * 3 // 4, self.steps * 11 // 12)


# A look on a processor: minutes. The rates and the clipping suit weights of any scale, and two images per step.
QUICK: dict[str, Any] = {
    "steps": 400,
    "batch_size": 2,
    "lr": 0.005,
    "lr_drops": (300,),
    "warmup": 100,
    "clip": 10.0,
    "short_sides": (224,),
    "long_side": 448,
    "test_short_side": 224,
    "test_long_side": 448,
    "regions": 64,
    "test_regions": 100,
}
# Trained BatchNorm bears larger steps than frozen.
QUICK_0712: dict[str, Any] = {**QUICK, "lr": 0.02}
