"""Options of the protocols that fine-tune a network for segmentation: nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from deepcluster.core.errors import InputError
from deepcluster.core.options import Checked, option

FCN32, FCN_D8 = "fcn32", "fcn-d8"
# What the user leaves open. FCN-32s: voc-fcn-alexnet of fcn.berkeleyvision.org; FCN of dilation 8: mmselfsup 0.x.
VOC12: dict[str, dict[str, Any]] = {
    FCN32: {"steps": 100_000, "batch_size": 20, "lr": 1e-4, "schedule": "fixed", "short_side": 0, "batchnorm": "frozen"},
    FCN_D8: {"steps": 20_000, "batch_size": 16, "lr": 0.01, "schedule": "poly", "short_side": 512, "batchnorm": "auto"},
}
CITYSCAPES: dict[str, Any] = {**VOC12[FCN_D8], "steps": 40_000, "batch_size": 8, "short_side": 1025}
# Colorization's variant of FCN-32s (feature_learning_tests of richzhang/colorization), which later papers follow.
THIRDS_STEPS = 150_000
# Settings for a first look: minutes on a CPU. At the rate of 0.0001, FCN-32s would learn nothing in so few steps.
QUICK: dict[str, Any] = {"steps": 300, "batch_size": 4, "short_side": 96, "lr": 0.01}

_MODES, _SCHEDULES = ("auto", "train", "frozen", "sync"), ("auto", "fixed", "thirds", "poly")
_BATCHNORM = (
    "BatchNorm of the trunk: statistics of the images of each process (train) or of all processes (sync), or those of the "
    "model, with its scales and biases (frozen)"
)
_SCHEDULE = (
    "learning rate: constant (fixed), divided by 10 after each third of the steps (thirds), or falling to a hundredth (poly)"
)


@dataclass(frozen=True)
class SegmentationOptions(Checked):
    """What both protocols have; None and "auto" are what `completed` replaces."""

    finetune: str = option(
        "all",
        "train the whole network, or only its fully connected layers and the new ones",
        choices=("all", "fc6-8"),
    )
    batchnorm: str = option("auto", f"{_BATCHNORM}; auto: sync", choices=_MODES)
    schedule: str = option("auto", f"{_SCHEDULE}; auto: poly", choices=_SCHEDULES)
    steps: int | None = option(None, "steps of SGD (default: 20,000; fcn32: 100,000, thirds 150,000)", at_least=1)
    batch_size: int | None = option(None, "images per step (default: 16; fcn32: 20)", at_least=1)
    lr: float | None = option(None, "learning rate at the start (default: 0.01; fcn32: 0.0001)", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(5e-4, "weight decay", at_least=0)
    short_side: int | None = option(
        None,
        "shorter side of the images in pixels, before random scaling and at the test; the longer is at most four times as "
        "long; 0: the images at their own size, for fcn32 only (default: 512; fcn32: 0)",
        at_least=0,
    )
    crop: int | None = option(None, "side of the random crops of fcn-d8 in pixels (default: --short-side)", at_least=8)
    seed: int = option(31, "seed of the order, the views and the new layers", at_least=0, below=2**63)

    def completed(self, known: Mapping[str, Any]) -> Self:
        """Return the options with the known values of those that the user left open."""
        values = {name: getattr(self, name) for name in known}
        if values["steps"] is None and values["schedule"] == "thirds":
            known = {**known, "steps": THIRDS_STEPS}
        return replace(self, **{name: known[name] for name, value in values.items() if value in (None, "auto")})


@dataclass(frozen=True)
class Voc12SegmentationOptions(SegmentationOptions):
    """Fine-tuning for segmentation on Pascal VOC 2012: FCN-32s as in the paper's table 2, or FCN with dilation 8."""

    batchnorm: str = option(
        "auto", f"{_BATCHNORM}; auto: sync; with fcn32, which sees one image at a time, frozen", choices=_MODES
    )
    schedule: str = option("auto", f"{_SCHEDULE}; auto: poly; with fcn32 fixed", choices=_SCHEDULES)
    recipe: str = option(
        "auto",
        "FCN-32s on whole images (fcn32), or FCN with dilation 8 on random crops (fcn-d8); auto: fcn32 for networks with "
        "fully connected layers (alexnet, vgg16)",
        choices=("auto", FCN32, FCN_D8),
    )
    lists: str = option(
        "auto",
        "list of ImageSets/Segmentation to test on: val, test, seg11valid (val of VOC 2011 without SBD's training images); "
        "auto: val, or test where there is no val",
    )


@dataclass(frozen=True)
class CityscapesSegmentationOptions(SegmentationOptions):
    """Fine-tuning for segmentation on Cityscapes: FCN with dilation 8 on random crops, tested by sliding windows."""

    steps: int | None = option(None, "steps of SGD (default: 40,000)", at_least=1)
    batch_size: int | None = option(None, "images per step (default: 8)", at_least=1)
    lr: float | None = option(None, "learning rate at the start (default: 0.01)", at_least=0)
    short_side: int | None = option(
        None,
        "shorter side of the images in pixels, before random scaling and at the test; the longer is at most twice as long "
        "(default: 1025)",
        at_least=8,
    )
    crop: int | None = option(
        None, "side of the random crops, and of the test's windows, in pixels (default: ¾ of --short-side)", at_least=8
    )


def check_recipe(options: SegmentationOptions, recipe: str) -> None:
    """Raise `InputError` where completed options do not go with the recipe."""
    if recipe == FCN32 and options.crop is not None:
        raise InputError(f"--crop {options.crop}: fcn32 trains on whole images; leave it out, or use --recipe fcn-d8")
    if recipe == FCN32 and options.batchnorm == "sync":
        raise InputError("--batchnorm sync: fcn32 sees one image at a time; use frozen (the default) or train")
    if recipe == FCN_D8 and not options.short_side:
        raise InputError("--short-side 0: fcn-d8 trains on crops of resized images; give their shorter side in pixels")
