"""What a run is: frozen, typed, validated settings. The defaults are the paper's; recipes.py fits them to other data.

Every field carries its help, its old names in the 2018 code, and its choices: the command line is drawn from here.
Rules that a field's own bounds can't say, and those between settings, are in config_checks.py.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.options import Checked, option
from deepcluster.data.crops import parse_crops
from deepcluster.models.archs import ARCHITECTURES
from deepcluster.run.settings_checks import check_settings

CACHES = ("auto", "memory", "none")
RECIPES = (
    "auto",
    "paper-alexnet",
    "paper-vgg16",
    "small-images",
    "small-set",
    "v2-resnet50",
    "v2-small-images",
    "v2-small-set",
)
METHODS = ("deepcluster", "deepcluster-v2")


@dataclass(frozen=True)
class Settings(Checked):
    """Settings of a training run; the defaults are those of the paper's AlexNet on ImageNet.

    Raises:
        InputError: a value is out of range, naming the option, the value and what may be used.
    """

    method: str = option(
        "deepcluster",
        "training method: that of the paper of 2018, or deepcluster-v2 of 2020, which looks at several crops of each image "
        "and needs no pass of its own over the images to group them",
        group="method",
        choices=METHODS,
    )
    recipe: str = option(
        "auto",
        "settings to start from; auto fits the paper's to the data, and says how",
        group="method",
        choices=RECIPES,
    )

    arch: str = option(
        "alexnet",
        f"the trunk, the network that is trained: {', '.join(ARCHITECTURES)}; or any of a library, as torchvision:NAME or "
        "timm:NAME",
        group="trunk",
    )
    init: str | None = option(
        None,
        "weights to start from: a run, a checkpoint, or a file of torchvision's or timm's weights (default: random ones)",
        group="trunk",
    )
    image_size: int = option(224, "side of the images that the network sees, in pixels", group="trunk", at_least=8)
    reduce_to: int = option(
        0,
        "shorter side to which larger photos are made smaller as they are decoded, before any view is cut (0: never); they "
        "are then read several times as fast and take less room",
        group="trunk",
        at_least=0,
    )
    sobel: bool = option(True, "fixed Sobel layer in front, so that colour is not seen", group="trunk")
    dropout: float = option(0.5, "dropout in the fully connected layers", group="trunk", at_least=0, below=1)

    clustering: str = option(
        "kmeans",
        "how features are grouped: kmeans, or pic, power iteration clustering, which finds the number of clusters itself",
        group="clustering",
        choices=("kmeans", "pic"),
    )
    balance: bool = option(
        False, "clusters of nearly equal size (k-means with Sinkhorn-Knopp), where k-means gives giants", group="clustering"
    )
    clusters: int | tuple[int, ...] = option(
        10_000,
        "number of clusters; for deepcluster-v2 several numbers, such as 3000,3000,3000: groupings that are learned side by "
        "side, of which people see the first",
        group="clustering",
        aliases=("--k", "--nmb-cluster", "--nmb_cluster"),
        at_least=2,
    )
    pca: int = option(
        256, "features after PCA and whitening (of deepcluster-v2: with --whiten)", group="clustering", at_least=1
    )
    kmeans_iterations: int = option(20, "Lloyd iterations", group="clustering", at_least=1)
    cluster_stage: str = option(
        "features",
        "stage whose features are clustered: features (the trunk's last), or one that info lists",
        group="clustering",
    )
    reassign_every: int = option(
        1, "epochs from one clustering to the next", group="clustering", aliases=("--reassign",), at_least=1
    )

    look_again: bool | None = option(
        None,
        "look at all images before each clustering (default: the first version does, deepcluster-v2 does not), or group the "
        "features that their crops had in the epoch before",
        group="clustering",
    )
    stop_reassigning: int = option(
        0,
        "the last epoch that begins with a clustering; its labels are learned to the end (0: none)",
        group="clustering",
        at_least=0,
    )
    super_clusters: int = option(
        0,
        "group in two steps: so many super-clusters first, then clusters in each (DeeperCluster, arXiv 1905.01278); 0: in "
        "one",
        group="clustering",
        at_least=0,
    )
    rotations: bool = option(
        False,
        "turn the images by quarters, and learn the turn as well (DeeperCluster, with --super-clusters)",
        group="clustering",
    )

    epochs: int = option(200, "epochs to train", group="training", at_least=1, resumable=True)
    batch_size: int = option(256, "images a step", group="training", aliases=("--batch",), at_least=2)
    lr: float = option(0.05, "learning rate of trunk and head", group="training", at_least=0)
    lr_schedule: str = option(
        "constant",
        "learning rate of the trunk over the run; cosine falls to zero",
        group="training",
        choices=("constant", "cosine"),
    )
    warmup_epochs: float = option(0.0, "epochs in which the learning rate rises from zero", group="training", at_least=0)
    optimizer: str = option("sgd", "sgd, or lars, for batches of thousands", group="training", choices=("sgd", "lars"))
    clip_gradient: float = option(0.0, "longest gradient, over all weights (0: any)", group="training", at_least=0)
    momentum: float = option(0.9, "momentum of the trunk's SGD", group="training", at_least=0, below=1)
    head_lr: float | None = option(
        None, "learning rate of the head (default: the same); short epochs need a quick head", group="training", at_least=0
    )
    head_momentum: float = option(
        0.0, "momentum of the head's SGD; short epochs need some", group="training", at_least=0, below=1
    )
    weight_decay: float = option(1e-5, "weight decay, as a number (1e-5)", group="training", aliases=("--wd",), at_least=0)
    sampling: str = option(
        "uniform",
        "images are drawn uniformly over clusters, or as the 2018 code happened to",
        group="training",
        choices=("uniform", "as-published"),
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "share of the image's area that a training crop shows, least and most", group="training"
    )
    crops: str = option(
        "",
        "crops that deepcluster-v2 learns of an image, how many and of which side, large ones first, such as 2x224,6x96 "
        "(empty: two of --image-size)",
        group="training",
    )
    small_crop_scale: tuple[float, float] = option(
        (0.05, 0.14), "as --crop-scale, for deepcluster-v2's crops after the large ones", group="training"
    )
    flip: bool = option(True, "flip half of the training crops left to right", group="training")
    jitter: float = option(0.0, "strength of random colours, 0 to 1", group="training", at_least=0)
    jitter_share: float = option(1.0, "share of the training crops whose colours change", group="training", at_least=0)
    grey: float = option(0.0, "share of the training crops that lose their colour", group="training", at_least=0)
    blur: float = option(0.0, "share of the training crops that are blurred", group="training", at_least=0)
    projection: tuple[int, int] = option(
        (2048, 128),
        "widths of deepcluster-v2's projection: its hidden layer, and what is grouped",
        group="training",
        at_least=1,
    )
    whiten: bool = option(
        False,
        "whiten what deepcluster-v2 groups, so that no few directions decide; the first version always does",
        group="clustering",
    )
    temperature: float = option(0.1, "of deepcluster-v2's softmax", group="training")

    seed: int = option(31, "seed of everything random", group="run", at_least=0, below=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="run", resumable=True)
    precision: str = option(
        "auto",
        "auto is bf16 where the machine is quick at it, else fp32; fp64 is slow, for comparisons",
        group="run",
        choices=("auto", "fp32", "bf16", "fp64"),
    )
    compile: bool = option(
        False,
        "compile the network for this machine first (torch.compile): minutes at the start",
        group="run",
        resumable=True,
    )
    workers: int | None = option(
        None, "threads that prepare images (default: one a core, at most 16)", group="run", at_least=0, resumable=True
    )
    cache: str = option(
        "auto",
        "where decoded images are kept: memory; a folder, in files; auto: in memory where a quarter of it is enough, else "
        "in files of the usual cache folder, where half of its disk is; or none",
        group="run",
        resumable=True,
    )
    cache_size: str = option(
        "auto",
        "most disk space for copies of remote and compressed data, such as 50G (auto: 20G, or a quarter of what is free)",
        group="run",
        resumable=True,
    )
    memory: str = option(
        "auto",
        "memory that features, whitening and points may take, such as 8G or 500M (auto: 60% of what is free); where it is "
        "too little, features go to a file in the run folder, or the images are looked at twice, with the same result",
        group="run",
        resumable=True,
    )
    limit: int | None = option(None, "use this many images, spread evenly over the data", group="run", at_least=1)
    eval_every: int = option(
        0,
        "every so many epochs, the accuracy of the features where labels are known (0: never)",
        group="run",
        at_least=0,
        resumable=True,
    )
    eval_with: str = option(
        "knn",
        "what --eval-every asks: votes of the 20 nearest other images, or a linear probe on four fifths of them",
        group="run",
        choices=("knn", "linear"),
        resumable=True,
    )
    checkpoint_minutes: float = option(
        10.0, "minutes between checkpoints inside an epoch", group="run", at_least=0, resumable=True
    )
    checkpoint_every: int = option(
        20, "keep the checkpoint of every so many epochs (0: the last alone)", group="run", at_least=0, resumable=True
    )
    tensorboard: bool = option(
        False,
        "also write scalars, clusters and a projector for TensorBoard into RUN/tensorboard (needs the extra tensorboard)",
        group="run",
        resumable=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)

    @property
    def heads(self) -> tuple[int, ...]:
        """Clusters of each grouping that is learned; one, but for deepcluster-v2."""
        return self.clusters if isinstance(self.clusters, tuple) else (self.clusters,)

    @property
    def n_clusters(self) -> int:
        """Clusters of the grouping that people see."""
        return self.heads[0]

    @property
    def looks_again(self) -> bool:
        """Whether all images are looked at before each clustering."""
        return self.method == "deepcluster" if self.look_again is None else self.look_again

    @property
    def crop_groups(self) -> tuple[tuple[int, int], ...]:
        """How many crops of an image, and of which side; large ones first (deepcluster-v2)."""
        return parse_crops(self.crops) if self.crops else ((2, self.image_size),)

    def cache_folder(self) -> Path | None:
        """The folder that `cache` names, if it names one.

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
        """For the lines that people read."""
        if self.clustering == "pic":
            return "clusters by power iteration"
        numbers = " + ".join(f"{count:,}" for count in self.heads)
        within = f" in {self.super_clusters:,} super-clusters" if self.super_clusters else ""
        return f"{numbers} {'balanced ' if self.balance else ''}clusters{within}"
