"""The protocols and their options, from which the command line is made: nothing here imports torch.

A protocol is one module of this package with `evaluate(model, data, options) -> Results`, and one entry of `PROTOCOLS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.options import Checked, option
from deepcluster.evaluation.dense.detection import coco_options, voc_options
from deepcluster.evaluation.dense.frozen import options as frozen_options
from deepcluster.evaluation.dense.segmentation import options as segmentation_options

FORMATS = ("text", "markdown", "latex")


@dataclass(frozen=True)
class LinearOptions(Checked):
    """A linear classifier on frozen stages; the defaults are those of the paper's table 1 (ImageNet, Places205)."""

    stages: str = option("all", "stages to train a classifier on, separated by commas (conv1,conv3); all: in one pass")
    head: str = option(
        "pooled",
        "input of the classifier: the stage's map pooled to at most 9,600 numbers, or (avgpool) its average",
        choices=("pooled", "avgpool"),
    )
    epochs: int = option(90, "passes over the training images", at_least=1)
    batch_size: int = option(256, "images per step", at_least=1)
    lr: float = option(0.01, "learning rate at the start", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(1e-4, "weight decay; the published script uses 1e-7", at_least=0)
    ten_crops: bool = option(False, "average the probabilities of ten crops of each image instead of the centre crop only")
    fast: bool = option(False, "features of the centre crop, kept on disk, and L-BFGS: a result in seconds")
    seed: int = option(31, "seed of the order, the crops and the first weights", at_least=0, below=2**63)


@dataclass(frozen=True)
class KnnOptions(Checked):
    """Votes of the nearest training images, weighted by exp(cosine / temperature) (Wu et al., CVPR 2018)."""

    stages: str | None = option(None, "stages, separated by commas, or all (default: the one that embed uses)")
    k: tuple[int, ...] = option(
        (), "numbers of neighbours, separated by commas (default: 1,5,10,20,200, as far as there are images)", at_least=1
    )
    temperature: float = option(0.07, "temperature of the votes", at_least=1e-3)


@dataclass(frozen=True)
class ClustersOptions(Checked):
    """Agreement of k-means on the features with the classes."""

    stages: str | None = option(None, "stages, separated by commas, or all (default: the one that embed uses)")
    k: tuple[int, ...] = option((), "numbers of clusters, separated by commas (default: the number of classes)", at_least=2)
    pca: int = option(0, "whiten the features to this many components first, as training does (0: off)", at_least=0)
    iterations: int = option(100, "maximum number of k-means iterations", at_least=1)
    start: str = option(
        "k-means++", "start of k-means; random rows save a pass per cluster", choices=("k-means++", "random")
    )
    seed: int = option(31, "seed of k-means", at_least=0, below=2**63)


@dataclass(frozen=True)
class VocClassificationOptions(Checked):
    """Fine-tuning on Pascal VOC 2007's 20 classes, as the paper's table 2."""

    finetune: str = option("all", "train the whole network, or only the fully connected layers", choices=("all", "fc6-8"))
    split: str = option(
        "trainval", "images to train on: train (tested on val) or trainval (tested on test)", choices=("train", "trainval")
    )
    train_batchnorm: bool = option(
        False, "with fc6-8: also train the scales of BatchNorm in the frozen convolutions (always trained with all)"
    )
    iterations: int = option(80_000, "steps of SGD", at_least=1)
    halve_every: int = option(5_000, "steps between halvings of the learning rate", at_least=1)
    batch_size: int = option(16, "images per step", at_least=1)
    lr: float = option(0.003, "learning rate at the start", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(1e-6, "weight decay", at_least=0)
    crop_scale: tuple[float, float] = option((0.1, 0.5), "smallest and largest share of the image that a random crop shows")
    test_crops: str = option(
        "random", "average ten random crops of an image, or ten fixed ones", choices=("random", "fixed")
    )
    train_set: bool = option(False, "also test on the images trained on")
    image_size: int | None = option(None, "side of the crops in pixels (default: that of the model)", at_least=8)
    seed: int = option(31, "seed of order, crops and new layers", at_least=0, below=2**63)

    def __post_init__(self) -> None:
        super().__post_init__()
        least, largest = self.crop_scale
        if not 0 < least <= largest <= 1:
            raise InputError(f"crop_scale={least:g},{largest:g} must be two shares with 0 < least <= largest <= 1")


@dataclass(frozen=True)
class VocSvmOptions(Checked):
    """Linear SVMs on frozen stages, Pascal VOC 2007's 20 classes (Goyal et al., ICCV 2019)."""

    stages: str = option("all", "stages, separated by commas, or all")
    split: str = option(
        "auto",
        "images to train on: train (tested on val) or trainval (tested on test); auto: trainval where test has annotations",
        choices=("auto", "train", "trainval"),
    )
    low_shot: bool = option(
        False, "also train on few positives per class (1, 2, 4, 8, 16, 32, 64, 96), several draws of each, best stage"
    )
    draws: int = option(5, "with --low-shot: draws of each number of positives", at_least=1)
    seed: int = option(31, "seed of the folds, the draws and the SVMs", at_least=0, below=2**63)


@dataclass(frozen=True)
class SemiSupervisedOptions(Checked):
    """Fine-tuning of the whole network on a few labels."""

    labels: tuple[float, ...] = option((0.01, 0.1), "shares of the labels, separated by commas", at_least=1e-6)
    label_list: str | None = option(
        None, "file with the training images that keep their label, one name per line; replaces the shares"
    )
    epochs: int = option(20, "passes over the labelled images", at_least=1)
    min_steps: int = option(200, "minimum number of steps; with few images there are more passes", at_least=0)
    batch_size: int = option(256, "images per step", at_least=2)
    trunk_lr: tuple[float, ...] = option((0.001, 0.01, 0.1), "learning rates of the trunk to try", at_least=0)
    head_lr_factor: tuple[float, ...] = option((1.0, 10.0, 100.0), "rates of the head to try, as multiples", at_least=0)
    held_out: float = option(0.2, "share of the labelled images on which the rates are chosen", at_least=0.01, below=1)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(0.0, "weight decay", at_least=0)
    scratch: bool = option(True, "also train the same network from random weights, for comparison")
    seed: int = option(31, "seed of the choice of labels, the order, the crops and the head", at_least=0, below=2**63)


@dataclass(frozen=True)
class RetrievalOptions(Checked):
    """Instance retrieval on Oxford and Paris buildings by R-MAC (Tolias et al., ICLR 2016), as the paper's table 5."""

    whiten_on: str | None = option(None, "folder of images to learn PCA-whitening on (default: the other data set)")
    stage: str | None = option(None, "stage of the trunk (default: the last convolutional one)")
    size: int = option(1024, "longer side of the images in pixels", at_least=32)
    levels: int = option(3, "L, levels of regions", at_least=1)
    pca: int = option(512, "dimension of a descriptor after PCA-whitening", at_least=1)
    multiscale: bool = option(False, "sum the descriptors at full size, 1/√2 and 1/2 of it")
    query_expansion: int = option(0, "average a query with its K best answers and search again (0: off)", at_least=0)


@dataclass(frozen=True)
class Protocol:
    """What the command line, `evaluate` and `evaluate all` know of a protocol.

    Attributes:
        options: a class of options; its docstring is the help of the command.
        module: has `evaluate(model, data, options) -> Results`; and `prepare`, with the same arguments, if several processes
            can do its long work together: they leave it in the cache folder, where `evaluate` finds it.
        layout: a name in `layouts.LAYOUTS`: on which folders `evaluate all` runs it.
        quick: shorter settings, for a first look; the results record them.
        in_all: what `evaluate all` changes of the defaults.
    """

    options: type[Checked]
    module: str
    layout: str
    quick: Mapping[str, Any] = field(default_factory=dict)
    in_all: Mapping[str, Any] = field(default_factory=dict)


HERE = "deepcluster.evaluation"
PROTOCOLS: dict[str, Protocol] = {
    "linear": Protocol(LinearOptions, f"{HERE}.linear", "classes", quick={"fast": True}),
    "knn": Protocol(KnnOptions, f"{HERE}.knn", "classes", in_all={"stages": "all", "k": (20,)}),
    "clusters": Protocol(ClustersOptions, f"{HERE}.clusters", "classes"),
    "voc07-classification": Protocol(
        VocClassificationOptions, f"{HERE}.voc07_classification", "voc", quick={"iterations": 1_000, "halve_every": 250}
    ),
    "voc07-svm": Protocol(VocSvmOptions, f"{HERE}.voc07_svm", "voc", quick={"low_shot": False}, in_all={"low_shot": True}),
    "semi-supervised": Protocol(
        SemiSupervisedOptions,
        f"{HERE}.semi_supervised",
        "classes",
        quick={"trunk_lr": (0.01,), "head_lr_factor": (1.0, 10.0)},
    ),
    "retrieval": Protocol(RetrievalOptions, f"{HERE}.retrieval", "buildings", quick={"size": 512}),
    "segmentation-linear": Protocol(
        frozen_options.SegmentationLinearOptions, f"{HERE}.dense.frozen.linear", "masks", quick={"cells": 20_480}
    ),
    "segmentation-knn": Protocol(
        frozen_options.SegmentationKnnOptions, f"{HERE}.dense.frozen.knn", "masks", quick={"memory": 20_480}
    ),
    "segmentation-clusters": Protocol(
        frozen_options.SegmentationClustersOptions,
        f"{HERE}.dense.frozen.clusters",
        "masks",
        quick={"cells": 20_480, "overclusters": 100, "runs": 2},
    ),
    "voc12-segmentation": Protocol(
        segmentation_options.Voc12SegmentationOptions,
        f"{HERE}.dense.segmentation.voc12",
        "voc masks",
        quick=segmentation_options.QUICK,
    ),
    "cityscapes-segmentation": Protocol(
        segmentation_options.CityscapesSegmentationOptions,
        f"{HERE}.dense.segmentation.cityscapes",
        "cityscapes",
        quick=segmentation_options.QUICK,
    ),
    "voc07-detection": Protocol(
        voc_options.Voc07DetectionOptions, f"{HERE}.dense.detection.voc07", "voc", quick=voc_options.QUICK
    ),
    "voc0712-detection": Protocol(
        voc_options.Voc0712DetectionOptions,
        f"{HERE}.dense.detection.voc0712",
        "voc",
        quick=voc_options.QUICK_0712,
    ),
    "coco-detection": Protocol(
        coco_options.CocoDetectionOptions, f"{HERE}.dense.detection.coco", "coco", quick=coco_options.QUICK
    ),
}
