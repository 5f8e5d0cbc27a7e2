"""What each protocol can be told. The command line is drawn from here: nothing of this imports torch."""

from dataclasses import dataclass

from deepcluster.core.options import Checked, option

CROPS = ("random", "fixed")
FORMATS = ("text", "markdown", "latex")


@dataclass(frozen=True)
class LinearOptions(Checked):
    """A linear classifier on frozen stages; the defaults are those of the paper's table 1 (ImageNet, Places205)."""

    stages: str = option("all", "stages to put a classifier on, with commas between (conv1,conv3); all: in one pass")
    head: str = option(
        "pooled",
        "what the classifier sees of a stage: its map pooled to at most 9,600 numbers, or (avgpool) its average",
        choices=("pooled", "avgpool"),
    )
    epochs: int = option(90, "passes over the training images", at_least=1)
    batch_size: int = option(256, "images a step", at_least=1)
    lr: float = option(0.01, "learning rate at the start", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(1e-4, "weight decay, as a number; the published script has 1e-7", at_least=0)
    ten_crops: bool = option(False, "average the probabilities of ten crops of each image, not of the centre alone")
    fast: bool = option(False, "features of the centre crop, kept on disk, and L-BFGS: a number in seconds")
    seed: int = option(31, "seed of the order, the crops and the first weights", at_least=0, below=2**63)


@dataclass(frozen=True)
class KnnOptions(Checked):
    """Votes of the nearest training images, weighted by exp(cosine / temperature) (Wu et al., CVPR 2018)."""

    stages: str | None = option(None, "stages, with commas between, or all (default: the one that embed gives)")
    k: tuple[int, ...] = option(
        (), "numbers of neighbours, with commas between (default: 1,5,10,20,200, as far as there are images)", at_least=1
    )
    temperature: float = option(0.07, "of the votes", at_least=1e-3)


@dataclass(frozen=True)
class ClustersOptions(Checked):
    """k-means on the features against the classes."""

    stages: str | None = option(None, "stages, with commas between, or all (default: the one that embed gives)")
    k: tuple[int, ...] = option((), "numbers of clusters, with commas between (default: the number of classes)", at_least=2)
    pca: int = option(0, "whiten the features to this many first, as training does (0: as they are)", at_least=0)
    iterations: int = option(100, "most iterations of k-means", at_least=1)
    start: str = option(
        "k-means++", "where k-means starts; random rows save a pass for each cluster", choices=("k-means++", "random")
    )
    seed: int = option(31, "seed of k-means", at_least=0, below=2**63)


@dataclass(frozen=True)
class VocClassificationOptions(Checked):
    """Fine-tuning on Pascal VOC 2007's 20 classes, as the paper's table 2."""

    finetune: str = option("all", "train the whole network, or the fully connected layers alone", choices=("all", "fc6-8"))
    split: str = option(
        "trainval", "images to train on: train (tested on val) or trainval (tested on test)", choices=("train", "trainval")
    )
    train_batchnorm: bool = option(
        False, "with fc6-8: train the scales of BatchNorm in the frozen convolutions, too (with all they are trained anyway)"
    )
    iterations: int = option(80_000, "steps of SGD", at_least=1)
    halve_every: int = option(5_000, "steps from one halving of the rate to the next", at_least=1)
    batch_size: int = option(16, "images a step", at_least=1)
    lr: float = option(0.003, "learning rate at the start", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(1e-6, "weight decay, as a number", at_least=0)
    test_crops: str = option(
        "random", "ten random crops of an image are averaged, or ten fixed ones", choices=("random", "fixed")
    )
    image_size: int | None = option(None, "side of the crops in pixels (default: that of the model)", at_least=8)
    seed: int = option(31, "seed of order, crops and new layers", at_least=0, below=2**63)


@dataclass(frozen=True)
class VocSvmOptions(Checked):
    """Linear SVMs on frozen stages, Pascal VOC 2007's 20 classes (Goyal et al., ICCV 2019)."""

    stages: str = option("all", "stages, with commas between, or all")
    split: str = option(
        "auto",
        "images to train on: train (tested on val) or trainval (tested on test); auto: trainval where test has annotations",
        choices=("auto", "train", "trainval"),
    )
    low_shot: bool = option(
        False, "also train on few positives of each class (1, 2, 4, 8, 16, 32, 64, 96), several draws of each, best stage"
    )
    draws: int = option(5, "with --low-shot: draws of each number of positives", at_least=1)
    seed: int = option(31, "seed of the folds, the draws and the SVMs", at_least=0, below=2**63)


@dataclass(frozen=True)
class SemiSupervisedOptions(Checked):
    """Fine-tuning of the whole network on a few labels."""

    labels: tuple[float, ...] = option((0.01, 0.1), "shares of the labels, with commas between", at_least=1e-6)
    label_list: str | None = option(
        None, "file with the training images that keep their label, a name a line; in place of the shares"
    )
    epochs: int = option(20, "passes over the labelled images", at_least=1)
    min_steps: int = option(200, "more passes where so few images would be learned in fewer steps than this", at_least=0)
    batch_size: int = option(256, "images a step", at_least=2)
    trunk_lr: tuple[float, ...] = option((0.001, 0.01, 0.1), "learning rates of the trunk to try", at_least=0)
    head_lr_factor: tuple[float, ...] = option((1.0, 10.0, 100.0), "rates of the head to try, as multiples", at_least=0)
    held_out: float = option(0.2, "share of the labelled images that the rates are chosen on", at_least=0.01, below=1)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(0.0, "weight decay, as a number", at_least=0)
    scratch: bool = option(True, "also train the same network from random weights, for comparison")
    seed: int = option(31, "seed of the choice of labels, the order, the crops and the head", at_least=0, below=2**63)


@dataclass(frozen=True)
class RetrievalOptions(Checked):
    """Instance retrieval on Oxford and Paris buildings by R-MAC (Tolias et al., ICLR 2016), as the paper's table 5."""

    whiten_on: str | None = option(None, "folder of images that PCA-whitening is learned on (default: the other data set)")
    stage: str | None = option(None, "stage of the trunk (default: the last convolutional one)")
    size: int = option(1024, "larger side of the images in pixels", at_least=32)
    levels: int = option(3, "L, levels of regions", at_least=1)
    pca: int = option(512, "numbers of a descriptor after PCA-whitening", at_least=1)
    multiscale: bool = option(False, "add up the descriptors at full size, 1/√2 and 1/2 of it")
    query_expansion: int = option(0, "average a query with its K best answers and ask again (0: no)", at_least=0)


PROTOCOLS: dict[str, type[Checked]] = {
    "linear": LinearOptions,
    "knn": KnnOptions,
    "clusters": ClustersOptions,
    "voc07-classification": VocClassificationOptions,
    "voc07-svm": VocSvmOptions,
    "semi-supervised": SemiSupervisedOptions,
    "retrieval": RetrievalOptions,
}

# Shorter settings, for a first look; the results say what they were.
QUICK: dict[str, dict[str, object]] = {
    "linear": {"fast": True},
    "voc07-classification": {"iterations": 1_000, "halve_every": 250},
    "voc07-svm": {"low_shot": False},
    "semi-supervised": {"trunk_lr": (0.01,), "head_lr_factor": (1.0, 10.0)},
    "retrieval": {"size": 512},
}
