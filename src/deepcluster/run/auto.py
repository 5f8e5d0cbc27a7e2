"""`--recipe auto`: the paper's settings adapted to images, network and device, each change with its reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.data.survey import Survey
from deepcluster.data.views import ClusterView
from deepcluster.run.crops import LEAST_SIDE, scaled_crops
from deepcluster.run.recipes import (
    GLYPHS,
    HEAD,
    PUBLISHED_V2,
    RECIPES,
    SMALL_BATCH,
    SMALL_STEPS,
    SMALL_VIEWS,
    V2_REASONS,
    Change,
)
from deepcluster.run.settings import Settings

# The paper has 1.28 million images in 10,000 clusters.
IMAGES_PER_CLUSTER = 128
# Below this shorter side, the strides of networks made for 224 px leave too little of an image.
SMALL_IMAGE = 128
# The paper's epoch has 5,000 steps. Smaller sets than this need smaller batches for enough steps.
SMALL_SET = 200_000
# From fewer photos than this, AlexNet at 224 px learns less, and more slowly, than a small trunk.
FEW_PHOTOS = 50_000
# Training views of a small set, whatever its size, within these numbers of epochs.
SMALL_SET_VIEWS, FEWEST_EPOCHS, MOST_EPOCHS = 200_000, 20, 50
FEWEST_CLUSTERS = 50
TINY_SET = 10_000
PAPER_IMAGES = 1_281_167
V2_FEWEST_CLUSTERS = 100
V2_LEAST_STEPS = 50
CPU_TRUNK = "resnet-patches"
SMALL_TRUNKS = (CPU_TRUNK, "alexnet-small", "resnet18-small")
# The paper puts Sobel filters before these, to keep clusters from being made by colour; they take 224 px.
PAPER_TRUNKS = ("alexnet", "vgg16", "vgg16-deepercluster")
# DeepCluster-v2 of small images on a GPU: the trunk, the largest batch and its learning rate, and the images that all epochs
# show, within these numbers of epochs.
GPU_TRUNK = "resnet18-small"
GPU_BATCH, GPU_LR = 256, 0.1
GPU_IMAGES, GPU_FEWEST_EPOCHS, GPU_MOST_EPOCHS = 10_000_000, 100, 500
PHOTO_SIZE = 48
# Below this side, little is left of a photo.
LEAST_OF_A_PHOTO = 32
# Sides of few photos, and of small images at least, for networks that reduce them by 32.
LARGE_STRIDE_SIZE, LARGE_STRIDE_LEAST = 96, 64
# Larger photos are kept at this shorter side, to which the paper scales them for its 224 px.
KEPT_SIDE = 256
# Images count as grey if this share of them is. Small grey images are digits, letters or scans, which a flip spoils.
GREY_SHARE = 0.95


def choose_settings(
    user_options: Mapping[str, Any], sample: Survey, *, device: str | None = None, weights: Sequence[Change] = ()
) -> tuple[Settings, list[Change]]:
    """Return the settings of a run, and what was adapted.

    User options override what the initial weights fix, which overrides the recipe, which overrides the paper's.

    Args:
        weights: what the weights of `--init` fix.
        device: cpu, cuda or mps; by default what `--device` is on this machine.

    Raises:
        InputError: a value is out of range for its option, or for these images.
    """
    if user_options.get("minutes") and "epochs" in user_options:
        raise InputError(
            f"minutes={user_options['minutes']:g} chooses the number of epochs; leave out --epochs or --minutes"
        )
    fixed = [change for change in weights if change.option not in user_options]
    user_options = {**{change.option: change.value for change in fixed}, **user_options}
    recipe, is_v2 = user_options.get("recipe", "auto"), user_options.get("method") == "deepcluster-v2"
    device = device or Machine.choose(user_options.get("device", Settings.device)).device.type
    fit: Iterator[Change] = iter(())
    if recipe == "auto":
        fit = _fit_v2(user_options, sample, device) if is_v2 else _fit(user_options, sample)
    elif recipe == "v2-small-images" and device == "cuda":
        fit = _fit_gpu(user_options, sample.n_images, RECIPES[recipe].settings["image_size"])
    # Later changes win: they apply to a narrower kind of data.
    fitted = {change.option: change for change in fit}
    changes = [change for change in fitted.values() if change.option not in user_options]
    start = _named_recipe(user_options) | {change.option: change.value for change in changes}
    settings = Settings.from_dict({**start, **user_options})
    if settings.clustering != "pic" and max(settings.heads) > sample.n_images:
        raise InputError(
            f"clusters={max(settings.heads)} is more than the {sample.n_images:,} images; "
            f"use --clusters {sample.n_images} or fewer (--recipe auto would choose {_clusters(sample.n_images)})"
        )
    if settings.images_per_epoch(sample.n_images) < 2:
        raise InputError(
            f"epoch_length={settings.epoch_length:g} of {sample.n_images:,} images leaves fewer than 2 per epoch; "
            f"use --epoch-length {2 / sample.n_images:.2g} or more"
        )
    return settings, [*fixed, *changes]


def hints(user_options: Mapping[str, Any], settings: Settings, sample: Survey) -> list[str]:
    """Return what the user might rather choose: the better method, where it was measured (docs/benchmarks.md), or a size."""
    small_image, said = sample.shorter_side < SMALL_IMAGE, []
    if not small_image and settings.image_size < LEAST_OF_A_PHOTO:
        said.append(
            f"--image-size {settings.image_size}: little is left of photos of {sample.shorter_side} px; "
            f"use {LEAST_OF_A_PHOTO} or more"
        )
    glyphs = small_image and sample.grey_share > GREY_SHARE
    chosen = "method" in user_options or settings.recipe != "auto" or settings.init is not None
    if chosen or glyphs or sample.n_images >= FEW_PHOTOS:
        return said
    figures = "linear 0.566 instead of 0.538 on 20,000 images of 32 px, with alexnet-small"
    if not small_image:
        figures = "k-NN 0.519 instead of 0.453 on 4,500 photos, with alexnet-small"
    return [*said, f"--method deepcluster-v2 learns more from few images in the same time: {figures}"]


def settings_before_data(user_options: Mapping[str, Any]) -> Settings:
    """Return what is known of the settings before the images are. `auto` may change what the user did not set.

    Raises:
        InputError: a value is out of range for its option, or the recipe belongs to the other method.
    """
    return Settings.from_dict({**_named_recipe(user_options), **user_options})


def _named_recipe(user_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the recipe that the user named; none for `auto`.

    Raises:
        InputError: there is no such recipe or method, or the recipe belongs to the other method.
    """
    named = {name: user_options[name] for name in ("recipe", "method") if name in user_options}
    recipe = Settings.from_dict(named).recipe
    if recipe == "auto":
        return {}
    settings = dict(RECIPES[recipe].settings)
    method = settings.get("method", Settings.method)
    if named.get("method", method) != method:
        raise InputError(
            f"recipe={recipe} does not go with method={named['method']}; use --recipe auto, or leave out --method"
        )
    if "crops" in settings and "image_size" in user_options:
        settings["crops"] = scaled_crops(settings["crops"], user_options["image_size"] / settings["image_size"])
    if settings.get("arch") == CPU_TRUNK != user_options.get("arch", CPU_TRUNK):
        settings.pop("crops", None)  # Other networks may take images of one size only.
    return settings


def fit_to_trunk(
    settings: Settings, user_options: Mapping[str, Any], *, width: int, n_images: int, batch_norm: bool = True
) -> tuple[Settings, list[Change]]:
    """Return the settings with what a trunk changes, and the changes: PCA components, and with `auto` the learning rate.

    Args:
        width: D, the width of the features that are clustered.
        batch_norm: the trunk has BatchNorm layers.

    Raises:
        InputError: the user asked for more components than features and images allow.
    """
    changes = []
    if settings.recipe == "auto" and not batch_norm and "lr" not in user_options:
        changes = [Change("lr", settings.lr / 3, "a network without BatchNorm needs smaller steps")]
        settings = replace(settings, lr=settings.lr / 3)
    is_v2 = settings.method == "deepcluster-v2"
    if is_v2 and not settings.whiten:
        return settings, changes
    what = "the projection is" if is_v2 else f"{settings.arch}'s {settings.cluster_stage} are"
    width = settings.projection[1] if is_v2 else width
    most = min(width, n_images - 1)
    if settings.pca <= most:
        return settings, changes
    why = f"{what} {width} wide, and there are {n_images:,} images"
    if "pca" in user_options:
        raise InputError(f"pca={settings.pca} is too wide: {why}; use --pca {most} or less")
    return replace(settings, pca=most), [*changes, Change("pca", most, why)]


def _clusters(n_images: int) -> int:
    """Return the number of clusters: about 128 images per cluster, but at least 50 clusters of at least 10 images."""
    return max(2, min(n_images // 10, FEWEST_CLUSTERS), min(10_000, round(n_images / IMAGES_PER_CLUSTER)))


def _fit(user_options: Mapping[str, Any], sample: Survey) -> Iterator[Change]:
    """Yield each setting of the paper that does not work on these images, with what does, as far as was measured."""
    side, count = sample.shorter_side, f"{sample.n_images:,} images"
    small_image = side < SMALL_IMAGE
    glyphs = small_image and sample.grey_share > GREY_SHARE
    few = small_image or sample.n_images < FEW_PHOTOS
    arch = user_options.get("arch", CPU_TRUNK if few else Settings.arch)
    is_own = arch not in PAPER_TRUNKS
    if arch in SMALL_TRUNKS:
        yield Change(
            "arch", arch, f"the images are {side} px" if small_image else f"{count} are few for a network of 224 px"
        )
    if is_own and few:
        yield _image_size_for(arch, side)
    if side > KEPT_SIDE:
        needed = _resized(user_options, Settings.image_size)
        yield Change("reduce_to", max(KEPT_SIDE, needed), f"photos of {side} px take long to read, and much memory")
    if sample.n_images < PAPER_IMAGES and user_options.get("clustering") != "pic":
        clusters = _clusters(sample.n_images)
        yield Change(
            "clusters", clusters, f"{sample.n_images / clusters:.0f} images per cluster (in the paper {IMAGES_PER_CLUSTER})"
        )
    if sample.n_images < SMALL_SET:
        epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(SMALL_SET_VIEWS / sample.n_images)))
        yield Change("epochs", epochs, f"{epochs * sample.n_images:,} views of {count}")
        batch = SMALL_BATCH if sample.n_images >= TINY_SET else SMALL_BATCH // 2
        yield Change("batch_size", batch, "more steps per epoch")
        if sample.n_images < TINY_SET and not glyphs:
            yield Change("reassign_every", 2, "each clustering starts a new head, which on few images gets few steps")
        yield from SMALL_STEPS
    if is_own:
        yield Change("sobel", False, "the paper has Sobel filters only before AlexNet and VGG-16")
    if is_own or sample.n_images < SMALL_SET:
        yield from HEAD
    if is_own and few:
        yield from GLYPHS if glyphs else SMALL_VIEWS


def _fit_v2(user_options: Mapping[str, Any], sample: Survey, device: str) -> Iterator[Change]:
    """Yield the settings of the DeepCluster-v2 recipe nearest to these images, and what images and device change."""
    side, count = sample.shorter_side, f"{sample.n_images:,} images"
    small_image = side < SMALL_IMAGE
    few = small_image or sample.n_images < FEW_PHOTOS
    base = "v2-resnet50" if not few else "v2-small-images" if small_image else "v2-small-set"
    settings = {**RECIPES[base].settings}
    settings.pop("method")
    for name, value in settings.items():
        yield Change(name, value, V2_REASONS.get(name, PUBLISHED_V2) if few else PUBLISHED_V2)
    arch = user_options.get("arch", GPU_TRUNK if small_image and device == "cuda" else settings["arch"])
    fitted = _image_size_for(arch, side) if few else Change("image_size", settings["image_size"], "as published")
    yield fitted
    large = user_options.get("image_size", fitted.value)
    if few and arch == CPU_TRUNK:
        crop = max(LEAST_SIDE, 3 * large // 4)
        yield Change("crops", f"2x{crop}", "smaller crops than the images take half the time (arXiv 1906.06423)")
    elif "crops" in settings and (few or large != settings["image_size"]):
        why = "as large as the images" if few else f"the small crops of the recipe go with {settings['image_size']} px"
        yield Change("crops", f"2x{large}", why)
    if small_image and sample.grey_share > GREY_SHARE:
        yield from (change for change in GLYPHS if change.option in ("flip", "crop_scale"))
    if side > KEPT_SIDE:
        needed = _resized(user_options, fitted.value)
        yield Change("reduce_to", max(KEPT_SIDE, needed), f"photos of {side} px take long to read, and much memory")
    if sample.n_images < PAPER_IMAGES:
        heads = len(settings["clusters"])
        clusters = min(
            settings["clusters"][0], max(_clusters(sample.n_images), min(sample.n_images // 10, V2_FEWEST_CLUSTERS))
        )
        yield Change("clusters", (clusters,) * heads, f"{sample.n_images / clusters:.0f} images per cluster")
    if sample.n_images < SMALL_SET:
        epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(SMALL_SET_VIEWS / sample.n_images)))
        yield Change("epochs", epochs, f"{epochs * sample.n_images:,} views of {count}")
    if small_image and device == "cuda":
        yield from _fit_gpu(user_options, sample.n_images, large)
    batch = user_options.get("batch_size", settings["batch_size"])
    if not few and batch > sample.n_images // V2_LEAST_STEPS:
        batch = max(64, sample.n_images // V2_LEAST_STEPS)
        yield Change("batch_size", batch, f"{V2_LEAST_STEPS} steps per epoch of {count}")
    if not few and batch != settings["batch_size"]:
        yield Change("lr", settings["lr"] * batch / settings["batch_size"], "in proportion to the batch")


def _fit_gpu(user_options: Mapping[str, Any], n_images: int, image_size: int) -> Iterator[Change]:
    """Yield what DeepCluster-v2 of small images changes on a GPU; nothing if the user chose another trunk."""
    if user_options.get("arch", GPU_TRUNK) != GPU_TRUNK:
        return
    batch = user_options.get("batch_size", max(64, min(GPU_BATCH, n_images // V2_LEAST_STEPS)))
    epochs = max(GPU_FEWEST_EPOCHS, min(GPU_MOST_EPOCHS, round(GPU_IMAGES / n_images)))
    yield Change("arch", GPU_TRUNK, "a GPU has the time for a ResNet-18")
    yield Change("projection", (2048, 128), "as published with a ResNet-18")
    yield Change("crops", f"2x{user_options.get('image_size', image_size)}", "as large as the images")
    yield Change(
        "batch_size", batch, f"{-(-n_images // batch):,} steps per epoch; {GPU_BATCH} is published with a ResNet-18"
    )
    yield Change("lr", GPU_LR * batch / GPU_BATCH, "in proportion to the batch")
    yield Change("epochs", epochs, f"{epochs * n_images:,} images in all, as a GPU has the time for them")


def _resized(user_options: Mapping[str, Any], image_size: int) -> int:
    """Return the shorter side to which images are scaled for their features."""
    return ClusterView(user_options.get("image_size", image_size), user_options.get("crop_pct", Settings.crop_pct)).resized


def _image_size_for(arch: str, side: int) -> Change:
    """Return the side at which a network takes few photos, or small images."""
    if side < SMALL_IMAGE:
        least = 32 if arch in SMALL_TRUNKS else LARGE_STRIDE_LEAST
        return Change("image_size", max(least, min(96, -(-side // 8) * 8)), f"the images are {side} px")
    size = PHOTO_SIZE if arch in SMALL_TRUNKS else LARGE_STRIDE_SIZE
    return Change("image_size", size, f"quick on a CPU; 128 shows more, in {(128 / size) ** 2:.0f} times the time")
