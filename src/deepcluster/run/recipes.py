"""Recipes: settings to start from, each with its cost and what to expect; `auto` fits the paper's to the data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.options import flag
from deepcluster.data.survey import Survey
from deepcluster.data.views import ClusterView
from deepcluster.run.settings import Settings

# The paper has 1.28 million images in 10,000 clusters.
IMAGES_A_CLUSTER = 128
# Under this shorter side, the strides of networks made for 224 px leave too little of an image.
SMALL_IMAGE = 128
# The paper's epoch has 5,000 steps. Smaller sets than this need a smaller network and batches to make enough of them.
SMALL_SET = 200_000
# Fewer photos than this, and AlexNet at 224 px learns less from them, and slower, than a small trunk does.
FEW_PHOTOS = 50_000
# Views that a small set is trained on, whatever its size; and no fewer or more epochs than these.
SMALL_SET_VIEWS, FEWEST_EPOCHS, MOST_EPOCHS = 200_000, 20, 50
FEWEST_CLUSTERS = 50
SMALL_BATCH, TINY_SET = 64, 10_000
PAPER_IMAGES = 1_281_167
V2_FEWEST_CLUSTERS = 100
V2_LEAST_STEPS = 50
SMALL_TRUNKS = ("alexnet-small", "resnet18-small")
PHOTO_SIZE = 48
# Larger photos are kept at this shorter side: what the paper scales them to for its 224 px.
KEPT_SIDE = 256
# Images are grey if this share of them is; small grey images are digits, letters, scans, which a flip spoils.
GREY_SHARE = 0.95


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
        if isinstance(self.value, bool):
            return f"{flag(self.option if self.value else 'no_' + self.option)}: {self.reason}"
        value = ",".join(f"{part:g}" for part in self.value) if isinstance(self.value, tuple) else self.value
        return f"{flag(self.option)} {value}: {self.reason}"


# What small sets need, by measurement on CIFAR-10 and Imagenette (docs/benchmarks.md).
_SMALL_STEPS = (
    Change("lr", 0.03, "for small batches"),
    Change("lr_schedule", "cosine", "the last epochs settle"),
    Change("head_lr", 0.3, "a new head has few steps to learn its labels"),
    Change("head_momentum", 0.9, "the same"),
    Change("pca", 64, "more components of few images add noise to the groups"),
)
_SMALL_VIEWS = (
    Change("sobel", False, "colour helps where there are few images"),
    Change("crop_scale", (0.2, 1.0), "smaller crops show too little of a small image"),
    Change("jitter", 0.5, "so that groups are not made by colour alone"),
    Change("grey", 0.2, "the same"),
)
_GLYPHS = (
    Change("sobel", False, "small grey images have few edges"),
    Change("flip", False, "small grey images look like digits or letters, which a flip changes"),
    Change("crop_scale", (0.4, 1.0), "smaller crops cut digits and letters in pieces"),
    Change("head_lr", 0.1, "few kinds of images are learned soon"),
    Change("epochs", 25, "the same"),
)
_SMALL = {"batch_size": SMALL_BATCH, **{change.option: change.value for change in (*_SMALL_STEPS, *_SMALL_VIEWS)}}

# DeepCluster-v2: crops and colours as published for contrastive learning.
_V2_VIEWS = {"sobel": False, "jitter": 0.5, "jitter_share": 0.8, "grey": 0.2}
_V2 = {"method": "deepcluster-v2", "lr_schedule": "cosine", "kmeans_iterations": 10, **_V2_VIEWS}
_V2_SMALL = {
    **_V2,
    "arch": "alexnet-small",
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "projection": (512, 128),
    "crop_scale": (0.2, 1.0),
    "warmup_epochs": 1.0,
    # In a few long epochs the network moves too fast for what it remembers of the epoch before (docs/benchmarks.md).
    "look_again": True,
    "whiten": True,
    "pca": 64,
}

RECIPES = {
    "v2-resnet50": Recipe(
        "The paper's DeepCluster-v2: ResNet-50 on ImageNet, two crops of 224 px and six of 96, three groupings of 3,000 "
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
        "DeepCluster-v2 for photos of 32 px, CIFAR-like. 20,000 images, 8 epochs: 25 minutes of one thread; linear on the "
        "features 0.460 untrained, 0.538 by small-images in the same time, 0.566 by this. On a GPU: --arch resnet18-small.",
        {**_V2_SMALL, "image_size": 32, "clusters": (150, 150, 150), "epochs": 20},
    ),
    "v2-small-set": Recipe(
        "DeepCluster-v2 for a few thousand photos. 4,500 images, 16 epochs: 19 minutes of one thread; k-NN 0.393 untrained, "
        "0.453 by small-set in the same time, 0.519 by this.",
        {**_V2_SMALL, "image_size": 48, "clusters": (100, 100, 100), "epochs": 40},
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
        "Photos of 32 px, CIFAR-like. 20,000 images: 13 minutes on 2 CPU cores; k-NN 0.415 untrained, 0.514 after.",
        {**_SMALL, "arch": "alexnet-small", "image_size": 32, "clusters": 150, "epochs": 20},
    ),
    "small-set": Recipe(
        "For a few thousand photos.",
        {
            **_SMALL,
            "arch": "alexnet-small",
            "image_size": 48,
            "clusters": 50,
            "batch_size": 32,
            "reassign_every": 2,
            "epochs": 44,
        },
    ),
}


def choose_settings(explicit: Mapping[str, Any], seen: Survey) -> tuple[Settings, list[Change]]:
    """Settings of a run: what the person set, over the recipe, over the paper's; and what `auto` changed.

    Raises:
        InputError: a value is out of range for its option, or for these images.
    """
    start, changes = _named_recipe(explicit), []
    if explicit.get("recipe", "auto") == "auto":
        # Of two changes of an option the later one, which is of a narrower kind of images, counts.
        fit = _fit_v2 if explicit.get("method") == "deepcluster-v2" else _fit
        fitted = {change.option: change for change in fit(explicit, seen)}
        changes = [change for change in fitted.values() if change.option not in explicit]
        start = {change.option: change.value for change in changes}
    settings = Settings.from_dict({**start, **explicit})
    if settings.clustering == "kmeans" and max(settings.heads) > seen.n_images:
        raise InputError(
            f"clusters={max(settings.heads)} is more than the {seen.n_images:,} images; "
            f"use --clusters {seen.n_images} or fewer (--recipe auto would choose {_clusters(seen.n_images)})"
        )
    return settings, changes


def settings_before_data(explicit: Mapping[str, Any]) -> Settings:
    """What is known of the settings before the images are; `auto` may change what the person did not set.

    Raises:
        InputError: a value is out of range for its option, or the recipe is one of the other method.
    """
    return Settings.from_dict({**_named_recipe(explicit), **explicit})


def _named_recipe(explicit: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the recipe that the person named; none of `auto`.

    Raises:
        InputError: there is no such recipe or method, or the recipe is one of the other method.
    """
    named = {name: explicit[name] for name in ("recipe", "method") if name in explicit}
    recipe = Settings.from_dict(named).recipe
    if recipe == "auto":
        return {}
    settings = dict(RECIPES[recipe].settings)
    method = settings.get("method", Settings.method)
    if named.get("method", method) != method:
        raise InputError(f"recipe={recipe} is not one of method={named['method']}; use --recipe auto, or leave out --method")
    return settings


def fit_to_trunk(
    settings: Settings, explicit: Mapping[str, Any], *, width: int, n_images: int
) -> tuple[Settings, list[Change]]:
    """PCA no wider than the features, nor than the number of images allows; and what was changed.

    Raises:
        InputError: the person asked for a wider one.
    """
    is_v2 = settings.method == "deepcluster-v2"
    if is_v2 and not settings.whiten:
        return settings, []
    what = "the projection is" if is_v2 else f"{settings.arch}'s {settings.cluster_stage} are"
    width = settings.projection[1] if is_v2 else width
    most = min(width, n_images - 1)
    if settings.pca <= most:
        return settings, []
    why = f"{what} {width} wide, and there are {n_images:,} images"
    if "pca" in explicit:
        raise InputError(f"pca={settings.pca} is too wide: {why}; use --pca {most} or less")
    return replace(settings, pca=most), [Change("pca", most, why)]


def _clusters(n_images: int) -> int:
    """About 128 images a cluster, but at least 50 clusters of at least 10 images."""
    return max(2, min(n_images // 10, FEWEST_CLUSTERS), min(10_000, round(n_images / IMAGES_A_CLUSTER)))


def _fit(explicit: Mapping[str, Any], seen: Survey) -> Iterator[Change]:
    """Each setting of the paper that does not work on these images, with what does, as far as was measured."""
    side, count = seen.shorter_side, f"{seen.n_images:,} images"
    small_image = side < SMALL_IMAGE
    glyphs = small_image and seen.grey_share > GREY_SHARE
    arch = explicit.get("arch", "alexnet-small" if small_image or seen.n_images < FEW_PHOTOS else Settings.arch)
    if arch in SMALL_TRUNKS:
        yield Change(
            "arch", arch, f"the images are {side} px" if small_image else f"{count} are few for a network of 224 px"
        )
        yield Change("image_size", _image_size(side), f"the images are {side} px" if small_image else "quick, and enough")
    if side > KEPT_SIDE:
        needed = ClusterView(explicit.get("image_size", Settings.image_size)).resized
        yield Change("reduce_to", max(KEPT_SIDE, needed), f"photos of {side} px take long to read, and much room")
    if seen.n_images < PAPER_IMAGES and explicit.get("clustering") != "pic":
        clusters = _clusters(seen.n_images)
        yield Change(
            "clusters", clusters, f"{seen.n_images / clusters:.0f} images a cluster (in the paper {IMAGES_A_CLUSTER})"
        )
    if seen.n_images < SMALL_SET:
        epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(SMALL_SET_VIEWS / seen.n_images)))
        yield Change("epochs", epochs, f"{epochs * seen.n_images:,} views of {count}")
        batch = SMALL_BATCH if seen.n_images >= TINY_SET else SMALL_BATCH // 2
        yield Change("batch_size", batch, "more steps an epoch")
        if seen.n_images < TINY_SET and not glyphs:
            yield Change("reassign_every", 2, "a new head has few steps to learn its labels")
        yield from _SMALL_STEPS
    if arch in SMALL_TRUNKS:
        yield from _GLYPHS if glyphs else _SMALL_VIEWS


def _fit_v2(explicit: Mapping[str, Any], seen: Survey) -> Iterator[Change]:
    """The settings of the recipe of DeepCluster-v2 that is nearest to these images, and what these images change of it."""
    side, count = seen.shorter_side, f"{seen.n_images:,} images"
    small_image = side < SMALL_IMAGE
    few = small_image or seen.n_images < FEW_PHOTOS
    base = "v2-resnet50" if not few else "v2-small-images" if small_image else "v2-small-set"
    settings = {**RECIPES[base].settings}
    settings.pop("method")
    for name, value in settings.items():
        yield Change(name, value, f"as in recipe {base}")
    if few:
        yield Change("image_size", _image_size(side), f"the images are {side} px" if small_image else "quick, and enough")
    if small_image and seen.grey_share > GREY_SHARE:
        yield from (change for change in _GLYPHS if change.option in ("flip", "crop_scale"))
    if side > KEPT_SIDE:
        size = explicit.get("image_size", _image_size(side) if few else settings["image_size"])
        needed = ClusterView(size).resized
        yield Change("reduce_to", max(KEPT_SIDE, needed), f"photos of {side} px take long to read, and much room")
    if seen.n_images < PAPER_IMAGES:
        heads = len(settings["clusters"])
        clusters = min(settings["clusters"][0], max(_clusters(seen.n_images), min(seen.n_images // 10, V2_FEWEST_CLUSTERS)))
        yield Change("clusters", (clusters,) * heads, f"{seen.n_images / clusters:.0f} images a cluster")
    if seen.n_images < SMALL_SET:
        epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(SMALL_SET_VIEWS / seen.n_images)))
        yield Change("epochs", epochs, f"{epochs * seen.n_images:,} looks at {count}")
    batch = explicit.get("batch_size", settings["batch_size"])
    if not few and batch > seen.n_images // V2_LEAST_STEPS:
        batch = max(64, seen.n_images // V2_LEAST_STEPS)
        yield Change("batch_size", batch, f"{V2_LEAST_STEPS} steps an epoch of {count}")
    if not few and batch != settings["batch_size"]:
        yield Change("lr", settings["lr"] * batch / settings["batch_size"], "in proportion to the batch")


def _image_size(side: int) -> int:
    """Of small images their own side, of photos 48 px."""
    return max(32, min(96, -(-side // 8) * 8)) if side < SMALL_IMAGE else PHOTO_SIZE
