"""Options that all detection protocols have; nothing here imports torch."""

from dataclasses import dataclass

from deepcluster.core.errors import InputError
from deepcluster.core.options import Checked, option


@dataclass(frozen=True)
class SgdOptions(Checked):
    """Schedule, sizes of images and BatchNorm; the defaults are Fast R-CNN's."""

    steps: int = option(150_000, "steps of SGD", at_least=1)
    batch_size: int = option(2, "images per step", at_least=1)
    lr: float = option(
        0.001, "learning rate after the warm-up, for batches of this size: half of both is the same", at_least=0
    )
    lr_drops: tuple[int, ...] = option((), "steps at which the learning rate is divided by 10", at_least=1)
    warmup: int = option(0, "steps during which the learning rate rises to its value", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(5e-4, "weight decay", at_least=0)
    clip: float = option(0.0, "clip the norm of the gradient (0: off)", at_least=0)
    short_sides: tuple[int, ...] = option(
        (600,), "shorter sides in pixels to which images are scaled in training", at_least=32
    )
    long_side: int = option(1000, "longest side in pixels in training", at_least=32)
    test_short_side: int = option(600, "shorter side in pixels in the test", at_least=32)
    test_long_side: int = option(1000, "longest side in pixels in the test", at_least=32)
    regions: int = option(128, "regions of an image on which the heads are trained", at_least=1)
    batchnorm: str = option(
        "auto",
        "BatchNorm: statistics of this process's images (train), of all processes' (sync), or those of the model (frozen)",
        choices=("auto", "train", "frozen", "sync"),
    )
    seed: int = option(31, "seed of order, views, regions and new layers", at_least=0, below=2**63)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("long_side", max(self.short_sides)), ("test_long_side", self.test_short_side)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least the shorter side, {least}")

    @property
    def drops(self) -> tuple[int, ...]:
        """The steps at which the learning rate is divided by 10."""
        return self.lr_drops
