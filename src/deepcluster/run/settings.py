"""What a run is: frozen, typed, validated settings. The defaults are the paper's; recipes.py adapts them to other data.

Each option is defined here, once: type, default, help, bounds, method, section of the help. The command line and the checks
are derived from it. Nothing here imports torch.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from deepcluster.clustering import CLUSTERERS, clusterer
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.options import Checked, flag, option
from deepcluster.models.archs import ARCHITECTURES, check_arch
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from deepcluster.run.crops import parse_crops

LOGGER_NAMES = ("tensorboard", "wandb", "mlflow")
CACHES = ("auto", "memory", "none")
V2_RECIPES = ("v2-resnet50", "v2-small-images", "v2-small-set")
RECIPES = ("auto", "paper-alexnet", "paper-vgg16", "small-images", "tiny-imagenet", "small-set", *V2_RECIPES)
V1, V2 = METHODS = ("deepcluster", "deepcluster-v2")
# Options of version 0.1.0 that are gone, and what to use instead.
REMOVED = {
    "balance": "use --clustering balanced",
    "head_start": "a new head always starts from random weights; leave it out",
}

# What --recipe auto may choose otherwise than the paper.
ADAPTED = frozenset(
    (
        *("arch", "image_size", "reduce_to", "sobel"),
        *("clusters", "pca", "whiten", "kmeans_iterations", "reassign_every", "look_again"),
        *(
            "epochs",
            "batch_size",
            "lr",
            "lr_schedule",
            "warmup_epochs",
            "optimizer",
            "head_lr",
            "head_norm",
            "head_momentum",
        ),
        *("weight_decay", "crop_scale", "crops", "small_crop_scale", "flip", "jitter", "jitter_share", "grey", "blur"),
        "projection",
    )
)

# Options by the section of the help that shows them.
_method, _trunk, _clustering, _training, _run = (
    partial(option, section=section) for section in ("method", "trunk", "clustering", "training", "run")
)


@dataclass(frozen=True)
class Settings(Checked):
    """Settings of a training run; the defaults are those of the paper's AlexNet on ImageNet.

    Raises:
        InputError: a value is out of range, naming the option, the value and what may be used.
    """

    removed: ClassVar[Mapping[str, str]] = REMOVED
    adapted: ClassVar[frozenset[str]] = ADAPTED

    method: str = _method(
        V1,
        "training method: the paper's of 2018, or deepcluster-v2 of 2020, which trains on several crops of each image and "
        "clusters without a pass over the images",
        choices=METHODS,
    )
    recipe: str = _method(
        "auto", "settings to start from; auto adapts the paper's to the data and prints each change", choices=RECIPES
    )

    arch: str = _trunk(
        "alexnet",
        f"the trunk, the network that is trained: {', '.join(ARCHITECTURES)}; or any network of a library, as "
        "torchvision:NAME or timm:NAME",
    )
    init: str | None = _trunk(
        None,
        "weights to start from: a run, a checkpoint, or a file of torchvision's or timm's weights, also as ARCH@FILE; "
        "pretrained, the published weights of --arch; or timm:NAME@pretrained, which chooses --arch too (default: random)",
    )
    image_size: int = _trunk(224, "side in pixels of the images that the network sees", at_least=8)
    reduce_to: int = _trunk(
        0,
        "shorter side in pixels to which larger photos are reduced while they are decoded, before any view is cut (0: "
        "never); reading is then several times as fast and takes less memory",
        at_least=0,
    )
    sobel: bool = _trunk(True, "fixed Sobel layer in front, which removes colour")
    mean: tuple[float, float, float] = _trunk(
        IMAGENET_MEAN, "mean of red, green and blue (0 to 1) by which images are normalised; that of the weights of --init"
    )
    std: tuple[float, float, float] = _trunk(IMAGENET_STD, "standard deviation of red, green and blue, as --mean")
    interpolation: str = _trunk(
        "bilinear",
        "how images are resized for the features; that of the weights, where --init names published ones",
        choices=("bilinear", "bicubic"),
    )
    crop_pct: float = _trunk(
        0.875, "share of the resized image's shorter side that the centre crop for the features shows, as --interpolation"
    )
    dropout: float = _trunk(0.5, "dropout in the fully connected layers", at_least=0, below=1)

    clustering: str = _clustering(
        "kmeans",
        "clustering algorithm: kmeans; balanced, clusters of nearly equal size (k-means with Sinkhorn-Knopp); pic, power "
        "iteration clustering, which finds the number of clusters itself; hierarchical, clusters within super-clusters",
        choices=CLUSTERERS,
        method=V1,
    )
    clusters: int | tuple[int, ...] = _clustering(
        10_000,
        "number of clusters; for deepcluster-v2 one number per head, such as 3000,3000,3000: clusterings that are learned "
        "side by side; tables and report show the first",
        aliases=("--k", "--nmb-cluster", "--nmb_cluster"),
        at_least=2,
    )
    super_clusters: int = _clustering(
        0,
        "super-clusters of --clustering hierarchical, each of which is then clustered (DeeperCluster, arXiv 1905.01278)",
        at_least=0,
        method=V1,
    )
    rotations: bool = _clustering(
        False,
        "rotate the images by quarter turns, and learn the rotation too (DeeperCluster, with --clustering hierarchical)",
        method=V1,
    )
    pca: int = _clustering(256, "components after PCA and whitening (deepcluster-v2: with --whiten)", at_least=1)
    whiten: bool = _clustering(
        False, "whiten what deepcluster-v2 clusters, so that a few directions do not dominate; deepcluster always whitens"
    )
    kmeans_iterations: int = _clustering(20, "Lloyd iterations", at_least=1)
    cluster_stage: str = _clustering(
        "features", "stage whose features are clustered: features (the trunk's last), or one that info lists", method=V1
    )
    reassign_every: int = _clustering(1, "epochs from one clustering to the next", aliases=("--reassign",), at_least=1)
    look_again: bool = _clustering(
        False,
        "extract the features of all images before each clustering, as deepcluster does, instead of clustering the "
        "projections of the previous epoch's crops",
        method=V2,
    )
    stop_reassigning: int = _clustering(
        0, "last epoch that begins with a clustering; its labels are trained on to the end (0: none)", at_least=0
    )

    epochs: int = _training(200, "epochs to train", at_least=1, resumable=True)
    minutes: float = _training(
        0.0,
        "train for about so many minutes: the number of epochs is that which a short trial of this machine, at the start, "
        "expects to fit (0: --epochs)",
        at_least=0,
        resumable=True,
    )
    epoch_length: float = _training(
        1.0,
        "images drawn per epoch, as a multiple of their number (2: twice as many steps between two clusterings)",
        at_least=0,
        method=V1,
    )
    batch_size: int = _training(256, "images per step", aliases=("--batch",), at_least=2)
    lr: float = _training(0.05, "learning rate of trunk and head", at_least=0)
    lr_schedule: str = _training(
        "constant", "schedule of the trunk's learning rate; cosine falls to zero", choices=("constant", "cosine")
    )
    lr_restarts: tuple[int, ...] = _training(
        (),
        "epochs after which --lr-schedule cosine begins again, at a third of --lr; --resume of a finished run with more "
        "--epochs adds one",
        at_least=1,
    )
    warmup_epochs: float = _training(0.0, "epochs of linear warm-up of the learning rate", at_least=0)
    optimizer: str = _training("sgd", "sgd, or lars, for batches of thousands", choices=("sgd", "lars"))
    clip_gradient: float = _training(0.0, "clip the global gradient norm (0: off)", at_least=0)
    momentum: float = _training(0.9, "momentum of the trunk's SGD", at_least=0, below=1)
    head_lr: float | None = _training(
        None, "learning rate of the head (without it that of the trunk); short epochs need a high one", at_least=0, method=V1
    )
    head_norm: bool = _training(
        False, "standardise the input of the head (BatchNorm), so that one rate of the head suits any network", method=V1
    )
    head_momentum: float = _training(
        0.0, "momentum of the head's SGD; short epochs need some", at_least=0, below=1, method=V1
    )
    weight_decay: float = _training(1e-5, "weight decay, as a number (1e-5)", aliases=("--wd",), at_least=0)
    sampling: str = _training(
        "uniform",
        "draw images uniformly over clusters, or as the 2018 code does",
        choices=("uniform", "as-published"),
        method=V1,
    )
    crop_scale: tuple[float, float] = _training(
        (0.08, 1.0), "least and largest share of the image's area that a training crop shows"
    )
    crops: str = _training(
        "",
        "crops of each image that deepcluster-v2 trains on, number and side, large ones first, such as 2x224,6x96 "
        "(empty: two of --image-size)",
        method=V2,
    )
    small_crop_scale: tuple[float, float] = _training(
        (0.05, 0.14), "as --crop-scale, for deepcluster-v2's crops after the large ones", method=V2
    )
    flip: bool = _training(True, "flip half of the training crops left to right")
    jitter: float = _training(0.0, "strength of colour jitter, 0 to 1", at_least=0)
    jitter_share: float = _training(1.0, "share of the training crops with colour jitter", at_least=0)
    grey: float = _training(0.0, "share of the training crops in greyscale", at_least=0)
    blur: float = _training(0.0, "share of the training crops that are blurred", at_least=0)
    projection: tuple[int, int] = _training(
        (2048, 128),
        "widths of deepcluster-v2's projection: hidden layer, and output, which is clustered",
        at_least=1,
        method=V2,
    )
    temperature: float = _training(0.1, "temperature of deepcluster-v2's softmax", method=V2)

    seed: int = _run(31, "seed of everything random", at_least=0, below=2**63)
    device: str = _run("auto", "auto, cpu, cuda, cuda:N or mps", resumable=True)
    precision: str = _run(
        "auto",
        "auto is bf16 where the machine is fast at it, else fp32; fp64 is slow, for comparisons",
        choices=("auto", "fp32", "bf16", "fp64"),
    )
    compile: bool = _run(
        False, "compile the network for this machine first (torch.compile); takes minutes at the start", resumable=True
    )
    workers: int | None = _run(
        None, "processes that prepare images (default: one per core, at most 16)", at_least=0, resumable=True
    )
    cache: str = _run(
        "auto",
        "where decoded images are kept: memory; a folder, in files; none; auto: in memory if a quarter of it is enough, "
        "else in files of the usual cache folder if half of its disk is",
        resumable=True,
    )
    cache_size: str = _run(
        "auto",
        "most disk space for copies of remote and compressed data, such as 50G (auto: 20G, or a quarter of what is free)",
        resumable=True,
    )
    memory: str = _run(
        "auto",
        "memory for features, whitening and points, such as 8G or 500M (auto: 60% of what is free); if it is too small, "
        "features go to a temporary file in the run folder, with the same result",
        resumable=True,
        method=V1,
    )
    limit: int | None = _run(None, "use only this many images, spread evenly over the data", at_least=1)
    eval_every: int = _run(
        0,
        "measure the accuracy of the features every N epochs, where labels are known (0: never)",
        at_least=0,
        resumable=True,
    )
    eval_with: str = _run(
        "knn",
        "measure of --eval-every: votes of the 20 nearest other images, or a linear probe on four fifths of them",
        choices=("knn", "linear"),
        resumable=True,
    )
    checkpoint_minutes: float = _run(10.0, "minutes between checkpoints within an epoch", at_least=0, resumable=True)
    checkpoint_every: int = _run(
        20,
        "keep the checkpoint of every N-th epoch (0: none), beside those of the first and the last",
        at_least=0,
        resumable=True,
    )
    log_to: str = _run(
        "",
        f"loggers, separated by commas: {', '.join(LOGGER_NAMES)}; TensorBoard gets scalars, clusters and a projector in "
        "RUN/tensorboard, the others the numbers of each epoch",
        resumable=True,
    )
    tensorboard: bool = _run(False, "the same as --log-to tensorboard", resumable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        self._check_method()
        self._check_clustering()
        if 0 < self.reduce_to < self.image_size:
            raise InputError(
                f"reduce_to={self.reduce_to} is less than image_size={self.image_size}, what the network sees; "
                f"use 0 (never), or {self.image_size} or more"
            )

    @classmethod
    def from_saved(cls, values: Mapping[str, Any], *, resume: bool = False) -> Self:
        """Return the settings of a run folder or checkpoint, which version 0.1.0 may have written.

        Args:
            resume: refuse a run that depends on removed options.

        Raises:
            InputError: the values can't be used, or not for a resume.
        """
        kept = {name: value for name, value in values.items() if name not in REMOVED}
        if len(kept) == len(values):
            return cls.from_dict(kept)
        lost = [name for name in ("head_start",) if values.get(name, "random") != "random"]
        if values.get("balance"):
            kept["clustering"] = "balanced"
        elif kept.get("super_clusters"):
            kept["clustering"] = "hierarchical"
        looked_again = kept.pop("look_again", None)
        if kept.get("method", V1) == V2:
            kept["look_again"] = bool(looked_again)
        elif looked_again is False:
            lost.append("look_again")
        if lost and resume:
            named = ", ".join(flag(name) for name in lost)
            raise InputError(
                f"this run was started by version 0.1.0 with {named}, which is gone: its checkpoints can be used, but not "
                "resumed; start another run with --out"
            )
        return cls.from_dict(kept)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of clusters of each clustering that is learned: one, except for deepcluster-v2."""
        return self.clusters if isinstance(self.clusters, tuple) else (self.clusters,)

    @property
    def n_clusters(self) -> int:
        """Number of clusters of the clustering that is reported."""
        return self.heads[0]

    @property
    def crop_groups(self) -> tuple[tuple[int, int], ...]:
        """Number and side of the crops of an image that deepcluster-v2 trains on, large ones first."""
        return parse_crops(self.crops) if self.crops else ((2, self.image_size),)

    def images_per_epoch(self, n_images: int) -> int:
        """Return how many images an epoch trains on."""
        return int(self.epoch_length * n_images)

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers that follow the run."""
        named = [name.strip() for name in self.log_to.split(",") if name.strip()]
        return tuple(dict.fromkeys([*named, *["tensorboard"] * self.tensorboard]))

    def cache_folder(self) -> Path | None:
        """Return the folder that `cache` names, if it names one.

        Raises:
            InputError: it may be a misspelt word.
        """
        if self.cache in CACHES:
            return None
        folder = Path(self.cache).expanduser()
        if folder.is_dir() or "/" in self.cache or os.sep in self.cache:
            return folder
        raise InputError(
            f"cache={self.cache!r} is none of {', '.join(CACHES)}{did_you_mean(self.cache, CACHES)}, and no folder; "
            f"for a new folder write ./{self.cache}"
        )

    def describe_clusters(self) -> str:
        """Return how many clusters of which kind there are, for printed lines."""
        if self.method == V2:
            return f"{' + '.join(f'{count:,}' for count in self.heads)} clusters"
        description: str = clusterer(self.clustering).describe(self)
        return description

    def _check_values(self) -> None:
        """Check what the bounds of a single option can't express."""
        check_arch(self.arch)
        for name in ("memory", "cache_size"):
            size_in_bytes(name, getattr(self, name))
        self.cache_folder()
        for name in self.loggers:
            if name not in LOGGER_NAMES:
                near = did_you_mean(name, LOGGER_NAMES)
                raise InputError(f"log_to={self.log_to}: unknown logger {name!r}{near}; use {', '.join(LOGGER_NAMES)}")
        if self.crops:
            parse_crops(self.crops)
        for name in ("crop_scale", "small_crop_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"{name}={low:g},{high:g} must be two shares with 0 < least <= largest <= 1")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct={self.crop_pct:g} must be more than 0 and at most 1; 0.875 is usual")
        if min(self.std) <= 0:
            raise InputError(f"std={','.join(f'{one:g}' for one in self.std)} must be more than 0 for each channel")
        ends = (*self.lr_restarts, self.epochs)
        if self.lr_restarts and self.lr_schedule != "cosine":
            raise InputError(f"lr_restarts={_listed(self.lr_restarts)} goes only with --lr-schedule cosine; leave it out")
        if list(ends) != sorted(set(ends)):
            raise InputError(
                f"lr_restarts={_listed(self.lr_restarts)} must be ascending, and less than epochs={self.epochs}"
            )
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature:g} must be more than 0; 0.1 is usual")
        for name in ("grey", "jitter", "jitter_share", "blur"):
            if getattr(self, name) > 1:
                raise InputError(f"{name}={getattr(self, name):g} must lie between 0 and 1")

    def _check_method(self) -> None:
        """Refuse options of the other method. Their defaults pass, since a saved run has all options."""
        for one in fields(self):
            value, method = getattr(self, one.name), one.metadata["method"]
            if method and method != self.method and value != one.default:
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise InputError(
                    f"{one.name}={shown} goes only with --method {method}, not with {self.method}; leave it out"
                )
        if self.method == V1 and len(self.heads) > 1:
            shown = ",".join(map(str, self.heads))
            raise InputError(f"clusters={shown}: several clusterings go only with --method {V2}; give one number")
        side = self.crop_groups[0][1]
        if self.method == V2 and side > self.image_size:
            raise InputError(
                f"crops={self.crops} begins with crops of {side} px, more than image_size={self.image_size}, the side at "
                f"which features are taken; use --image-size {side} or more"
            )

    def _check_clustering(self) -> None:
        hierarchical = self.clustering == "hierarchical"
        if hierarchical and not self.super_clusters:
            raise InputError("clustering=hierarchical needs the number of super-clusters: give --super-clusters, such as 4")
        if self.super_clusters and not hierarchical:
            raise InputError(
                f"super_clusters={self.super_clusters} goes with --clustering hierarchical, not {self.clustering}: "
                f"use --clustering hierarchical --super-clusters {self.super_clusters}"
            )
        if self.super_clusters > self.n_clusters:
            raise InputError(f"super_clusters={self.super_clusters} is more than clusters={self.n_clusters}")
        if self.rotations and not hierarchical:
            raise InputError("rotations are learned with --clustering hierarchical and --super-clusters, such as 4")


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def size_in_bytes(name: str, text: str) -> int | None:
    """Return the bytes of a size such as 8G, 500 MB or 1.5GiB (of 1,024³); None for auto.

    Raises:
        InputError: it is none of these.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{name}={text!r} is not a size: use auto, or a number with K, M, G or T, such as 8G or 500M")
    number, letter, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter or " "))
