"""Recipes: settings to start from, each with its cost and what to expect; and `auto`, which fits the paper's to the data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepcluster.config import Settings, flag
from deepcluster.data.survey import Survey
from deepcluster.errors import InputError

# The paper has 1.28 million images in 10,000 clusters.
IMAGES_A_CLUSTER = 128
# Below this shorter side, the strides of networks made for 224 px leave too little of an image.
SMALL_IMAGE = 128
# The paper's epoch has 5,000 steps. Sets of fewer images than this need smaller networks and batches to make enough of them.
SMALL_SET = 50_000


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from the paper's AlexNet, and what they cost and give."""

    about: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A setting that `auto` fitted to the data."""

    option: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = ",".join(f"{part:g}" for part in self.value) if isinstance(self.value, tuple) else self.value
        return f"{flag(self.option)} {value}: {self.reason}"


_SMALL = {
    "arch": "alexnet-small",
    "sobel": False,
    "dropout": 0.0,
    "batch_size": 64,
    "lr_schedule": "cosine",
    "crop_scale": (0.2, 1.0),
    "jitter": 0.5,
    "grey": 0.2,
}

RECIPES = {
    "paper-alexnet": Recipe(
        "The paper's AlexNet with Sobel filters, k = 10,000, 500 epochs of ImageNet: 12 days of one P100 (the paper, "
        "section 4). ImageNet linear probe conv1-5: 13.4 32.3 41.0 39.6 38.2 % (arXiv v2, table 1).",
        {"epochs": 500},
    ),
    "paper-vgg16": Recipe(
        "The same with VGG-16 (the paper, section 4.6); VOC07 detection 65.9 mAP.",
        {"arch": "vgg16", "epochs": 500},
    ),
    "small-images": Recipe("For images of 32 to 96 px, CIFAR-like.", {**_SMALL, "image_size": 32}),
    "small-set": Recipe("For a few thousand photos.", {**_SMALL, "image_size": 96}),
}


def choose_settings(explicit: Mapping[str, Any], seen: Survey, *, on_gpu: bool) -> tuple[Settings, list[Change]]:
    """Settings of a run: what the person set, over the recipe, over the paper's; and what `auto` changed.

    Raises:
        InputError: a value is out of range for its option, or for these images.
    """
    recipe = explicit.get("recipe", "auto")
    changes = []
    if recipe == "auto":
        changes = [change for change in _fit(explicit, seen, on_gpu=on_gpu) if change.option not in explicit]
        start = {change.option: change.value for change in changes}
    else:
        start = dict(RECIPES[recipe].settings)
    settings = Settings.from_dict({**start, **explicit})
    if settings.clusters > seen.n_images:
        raise InputError(
            f"clusters={settings.clusters} is more than the {seen.n_images:,} images; "
            f"use --clusters {seen.n_images} or fewer (--recipe auto would choose {_clusters(seen.n_images)})"
        )
    return settings, changes


def fit_to_trunk(
    settings: Settings, explicit: Mapping[str, Any], *, width: int, n_images: int
) -> tuple[Settings, list[Change]]:
    """PCA no wider than the features, nor than the number of images allows; and what was changed.

    Raises:
        InputError: the person asked for a wider one.
    """
    most = min(width, n_images - 1)
    if settings.pca <= most:
        return settings, []
    why = f"{settings.arch}'s {settings.cluster_stage} are {width} wide, and there are {n_images:,} images"
    if "pca" in explicit:
        raise InputError(f"pca={settings.pca} is too wide: {why}; use --pca {most} or less")
    return replace(settings, pca=most), [Change("pca", most, why)]


def _clusters(n_images: int) -> int:
    return max(2, min(n_images, 10_000, max(10, round(n_images / IMAGES_A_CLUSTER))))


def _fit(explicit: Mapping[str, Any], seen: Survey, *, on_gpu: bool) -> Iterator[Change]:
    n_images = f"{seen.n_images:,} images"
    small_set = seen.n_images < SMALL_SET
    if _clusters(seen.n_images) != Settings.clusters:
        yield Change("clusters", _clusters(seen.n_images), f"about {IMAGES_A_CLUSTER} images a cluster, as in the paper")
