"""Recipes: settings to start from, each with its cost and what to expect; and what `auto` is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepcluster.core.options import flag

SMALL_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from the paper's AlexNet, with their cost and what to expect."""

    about: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A setting that `auto` adapted to the data."""

    option: str
    value: Any
    reason: str

    def __str__(self) -> str:
        if isinstance(self.value, bool):
            return flag(self.option if self.value else "no_" + self.option)
        value = ",".join(f"{part:g}" for part in self.value) if isinstance(self.value, tuple) else self.value
        return f"{flag(self.option)} {value}"


def by_reason(changes: Sequence[Change]) -> list[str]:
    """Return changes as lines: those with the same reason together."""
    together: dict[str, list[str]] = {}
    for change in changes:
        together.setdefault(change.reason, []).append(str(change))
    return [f"{' '.join(options)}: {reason}" for reason, options in together.items()]


# What small sets need, by measurement on CIFAR-10 and Imagenette (docs/benchmarks.md).
SMALL_STEPS = (
    Change("lr", 0.03, "for small batches"),
    Change("lr_schedule", "cosine", "the last epochs settle"),
    Change("pca", 64, "more components of few images add noise to the clusters"),
)
# With a standardised input, one rate suits the head of any network (docs/benchmarks.md).
HEAD = (
    Change("head_norm", True, "the length of features differs by a factor of 2,500 between networks"),
    Change("head_lr", 4.0, "each clustering starts a new head, which on few images gets few steps"),
    Change("head_momentum", 0.9, "each clustering starts a new head, which on few images gets few steps"),
)
SMALL_VIEWS = (
    Change("sobel", False, "colour helps where there are few images"),
    Change("crop_scale", (0.2, 1.0), "smaller crops show too little of a small image"),
    Change("jitter", 0.5, "so that clusters are not made by colour only"),
    Change("grey", 0.2, "so that clusters are not made by colour only"),
)
GLYPHS = (
    Change("sobel", False, "small grey images have few edges"),
    Change("flip", False, "small grey images look like digits or letters, which a flip changes"),
    Change("crop_scale", (0.4, 1.0), "smaller crops cut digits and letters into pieces"),
    Change("epochs", 25, "few kinds of images are learned soon"),
)
_SMALL = {change.option: change.value for change in (*SMALL_STEPS, *HEAD, *SMALL_VIEWS)}
_SMALL["batch_size"] = SMALL_BATCH

# DeepCluster-v2: crops and colours as published for contrastive learning.
_V2_VIEWS = {"sobel": False, "jitter": 0.5, "jitter_share": 0.8, "grey": 0.2}
_V2 = {"method": "deepcluster-v2", "lr_schedule": "cosine", "kmeans_iterations": 10, **_V2_VIEWS}
_V2_SMALL = {
    **_V2,
    "arch": "resnet-patches",
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "projection": (512, 128),
    "crop_scale": (0.2, 1.0),
    "warmup_epochs": 1.0,
    # In a few long epochs the network changes too fast for projections of the previous epoch (docs/benchmarks.md).
    "look_again": True,
    "whiten": True,
    "pca": 64,
}

PUBLISHED_V2 = "as published for DeepCluster-v2"
V2_REASONS = {
    "arch": "made for these images",
    "lr_schedule": "the last epochs settle",
    "kmeans_iterations": PUBLISHED_V2,
    "sobel": "the paper has Sobel filters only before AlexNet and VGG-16",
    "jitter": "so that clusters are not made by colour only",
    "jitter_share": "so that clusters are not made by colour only",
    "grey": "so that clusters are not made by colour only",
    "batch_size": "more steps per epoch",
    "lr": "for small batches",
    "weight_decay": "more than the paper's, for few images",
    "projection": "narrower than published, for few images",
    "crop_scale": "smaller crops show too little of a small image",
    "warmup_epochs": "the projection is random at first",
    "look_again": "in few long epochs the network changes too fast for the projections of the previous epoch",
    "whiten": "without it a few directions of the projection decide all clusters",
    "pca": "more components of few images add noise to the clusters",
}

RECIPES = {
    "v2-resnet50": Recipe(
        "The paper's DeepCluster-v2: ResNet-50 on ImageNet, two crops of 224 px and six of 96, three heads of 3,000 "
        "clusters, LARS, 800 epochs of batches of 4,096: some 2,800 hours of V100. What to expect: 75.2 % by a linear "
        "classifier (SwAV's README); not repeated here.",
        {
            **_V2,
            "arch": "resnet50",
            "clusters": (3000, 3000, 3000),
            "image_size": 224,
            "crops": "2x224,6x96",
            "crop_scale": (0.14, 1.0),
            "small_crop_scale": (0.05, 0.14),
            "jitter": 1.0,
            "blur": 0.5,
            "projection": (2048, 128),
            "batch_size": 4096,
            "optimizer": "lars",
            "lr": 4.8,
            "warmup_epochs": 10.0,
            "weight_decay": 1e-6,
            "epochs": 800,
        },
    ),
    "v2-small-images": Recipe(
        "DeepCluster-v2 for photos of 32 px, CIFAR-like. 20,000 images, 18 epochs: 17 minutes on 2 CPU cores; k-NN 0.523 "
        "untrained, 0.652 after. On a GPU with ResNet-18, larger batches and more epochs: not measured there yet.",
        {**_V2_SMALL, "image_size": 32, "crops": "2x24", "clusters": (150, 150, 150), "epochs": 20},
    ),
    "v2-small-set": Recipe(
        "DeepCluster-v2 for a few thousand photos. 4,500 images, 41 epochs: 17 minutes on 2 CPU cores; k-NN 0.514 "
        "untrained, 0.640 after.",
        {**_V2_SMALL, "image_size": 48, "crops": "2x36", "clusters": (100, 100, 100), "epochs": 40},
    ),
    "paper-alexnet": Recipe(
        "The paper's AlexNet with Sobel filters on ImageNet: k = 10,000, 500 epochs, about two weeks of one GPU of 2018. "
        "What to expect: table 1 of the paper; not repeated here yet.",
        {"epochs": 500},
    ),
    "paper-vgg16": Recipe(
        "The same with VGG-16. What to expect: the paper's tables for VGG-16; not repeated here yet.",
        {"arch": "vgg16", "epochs": 500},
    ),
    "small-images": Recipe(
        "Photos of 32 px, CIFAR-like. 20,000 images: 13 minutes on 2 CPU cores. With alexnet-small k-NN 0.415 untrained, "
        "0.514 after; with resnet-patches not measured yet.",
        {**_SMALL, "arch": "resnet-patches", "image_size": 32, "clusters": 150, "epochs": 20},
    ),
    "tiny-imagenet": Recipe(
        # 100 images per cluster and 5 clusters per class. The paper has 128 images per cluster (781 clusters here) and 10
        # clusters per class (2,000 here, of 50 images). On CIFAR-10, 20 per cluster were too few (docs/benchmarks.md).
        "Tiny-ImageNet-200: 100,000 photos of 64 px. Some 4 hours on 2 CPU cores, estimated from small-images, which has a "
        "twentieth of the pixels; neither the time nor an accuracy is measured yet.",
        {**_SMALL, "arch": "resnet-patches", "image_size": 64, "clusters": 1000, "epochs": 20},
    ),
    "small-set": Recipe(
        "For a few thousand photos.",
        {
            **_SMALL,
            "arch": "resnet-patches",
            "image_size": 48,
            "clusters": 50,
            "batch_size": 32,
            "reassign_every": 2,
            "epochs": 44,
        },
    ),
}
