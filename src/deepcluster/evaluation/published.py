"""Numbers that others published, by protocol, each with the place where it stands; to print beside ours.

All are in percent. `checked`: the number was read at its source, or where the source is quoted. The others are what we
remember of a paper's table, and are printed with a mark that says so: check them before you cite them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deepcluster.evaluation.results import Table

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Published:
    """One row of somebody's table.

    Attributes:
        protocol: a name in `deepcluster.evaluation.options.PROTOCOLS`.
        data: the data set, and what of it.
        system: who made the features, and how where that matters.
        arch: as `train --arch` names it, or as its authors do.
        numbers: in percent, by stage, number of neighbours, split, ...: as ours are named where there is the same.
        source: repository and file, or paper and table.
        checked: the number was read there; if not, it is remembered.
    """

    protocol: str
    data: str
    system: str
    arch: str
    numbers: Numbers
    source: str
    checked: bool = True

    def cited(self) -> str:
        """The source as it is printed."""
        return self.source if self.checked else f"from memory of {self.source}, not checked"


def _by(names: str, *values: float) -> Numbers:
    return dict(zip(names.split(), values, strict=True))


def _convs(*values: float) -> Numbers:
    return _by("conv1 conv2 conv3 conv4 conv5", *values)


def _layers(*values: float) -> Numbers:
    """Stages of a ResNet, and where there is a sixth number, the average of the last."""
    return dict(zip(("stem", "layer1", "layer2", "layer3", "layer4", "avgpool"), values, strict=False))


def _svm(svm: float, *low_shot: float) -> Numbers:
    shots = (1, 2, 4, 8, 16, 32, 64, 96)
    return {"SVM": svm} | dict(zip((f"k={k}" for k in shots), low_shot, strict=bool(low_shot)))


PAPER = "Caron et al., arXiv 1807.05520v2"
ZOO = "open-mmlab/mmselfsup, docs/MODEL_ZOO.md"
MM_DEEPCLUSTER = "open-mmlab/mmselfsup, configs/selfsup/deepcluster/README.md"
MM_ODC = "open-mmlab/mmselfsup, configs/selfsup/odc/README.md"
SWAV = "facebookresearch/swav, README.md"
DINO = "facebookresearch/dino, README.md"
SELA = "yukimasano/self-label, README.md"
SCAN = "wvangansbeke/Unsupervised-Classification, README.md"
SOLO = "vturrisi/solo-learn, README.md"
LIGHTLY = "lightly-ai/lightly, docs/source/getting_started/benchmarks.rst"

_LINEAR_ALEXNET = [
    ("ImageNet", "DeepCluster", _convs(13.4, 32.3, 41.0, 39.6, 38.2), f"{PAPER}, table 1"),
    ("ImageNet", "DeepCluster", _convs(12.9, 29.2, 38.2, 39.8, 36.1), "Caron et al., ECCV 2018, table 1"),
    ("Places205", "DeepCluster", _convs(19.6, 33.2, 39.2, 39.8, 34.7), f"{PAPER}, table 1"),
]
_LINEAR_RESNET50 = [
    ("ImageNet", "DeepCluster, Sobel, 200 epochs", _layers(12.78, 30.81, 43.88, 57.71, 51.68, 46.92), MM_DEEPCLUSTER),
    ("ImageNet", "DeepCluster, no Sobel, a user's run", {"avgpool": 50.40}, "open-mmlab/mmselfsup, pull request 46"),
    ("ImageNet", "ODC, 440 epochs", _layers(14.76, 31.82, 42.44, 55.76, 57.70, 53.42), MM_ODC),
    ("ImageNet", "random weights", _layers(11.37, 16.21, 13.47, 9.07, 6.54, 4.35), ZOO),
    ("ImageNet", "trained on its labels", _layers(15.18, 33.96, 47.86, 67.56, 76.17, 74.12), ZOO),
    ("ImageNet", "SeLa, 10 × 3,000 clusters", {"top-1": 61.5}, SELA),
    ("ImageNet", "SeLa, the same, augmented as MoCo-v2", {"top-1": 68.8}, SELA),
    ("ImageNet", "DeepCluster-v2, 400 epochs, 2×224", {"avgpool": 70.2}, SWAV),
    ("ImageNet", "DeepCluster-v2, 400 epochs, 2×160 + 4×96", {"avgpool": 74.3}, SWAV),
    ("ImageNet", "DeepCluster-v2, 800 epochs, 2×224 + 6×96", {"avgpool": 75.2}, SWAV),
    ("ImageNet", "SwAV, 100 epochs, 2×224 + 6×96", {"avgpool": 72.1}, SWAV),
    ("ImageNet", "SwAV, 800 epochs, 2×224 + 6×96", {"avgpool": 75.3}, SWAV),
    ("Places205", "DeepCluster, Sobel, 200 epochs", _layers(18.80, 33.93, 41.44, 47.22, 42.61), MM_DEEPCLUSTER),
    ("Places205", "ODC, 440 epochs", _layers(19.28, 34.09, 40.90, 47.04, 48.35), MM_ODC),
]
_LINEAR_SMALL = [
    ("CIFAR-10", "DeepCluster-v2, 1,000 epochs", "resnet18-small", 88.85),
    ("CIFAR-10", "SwAV, 1,000 epochs", "resnet18-small", 89.17),
    ("CIFAR-10", "MoCo-v3, 1,000 epochs", "resnet18-small", 93.10),
    ("CIFAR-100", "DeepCluster-v2, 1,000 epochs", "resnet18-small", 63.61),
    ("CIFAR-100", "SwAV, 1,000 epochs", "resnet18-small", 64.88),
    ("ImageNet-100", "DeepCluster-v2, 400 epochs", "resnet18", 75.4),
    ("ImageNet-100", "SwAV, 400 epochs", "resnet18", 74.28),
]
_DINO_TABLE = "Caron et al., arXiv 2104.14294, table 2"
_KNN = [
    ("ImageNet", "DeepCluster-v2, 800 epochs", "resnet50", {"top-1": 67.1}, _DINO_TABLE, False),
    ("ImageNet", "DINO", "resnet50", {"top-1": 67.5}, DINO, True),
    ("ImageNet", "ODC, 440 epochs", "resnet50", _by("k=10 k=20 k=100 k=200", 38.5, 39.1, 37.8, 36.9), MM_ODC, True),
    ("ImageNet", "SwAV, 100 epochs", "resnet50", {"top-1": 49.5}, LIGHTLY, True),
    ("CIFAR-10", "SwAV, 200 epochs, batch 512", "resnet18-small", {"k=200": 84.2}, LIGHTLY, True),
    ("CIFAR-10", "SwAV, 800 epochs, batch 512", "resnet18-small", {"k=200": 88.4}, LIGHTLY, True),
    ("Imagenette, 128 px", "SwAV, 800 epochs", "resnet18", {"k=200": 90.2}, LIGHTLY, True),
]
_SCORES = "accuracy nmi adjusted_rand"
_CLUSTERS = [
    ("ImageNet, 1,000 clusters", "SeLa, its own clusters", "resnet50", _by(_SCORES, 30.5, 65.7, 16.2), SELA),
    ("ImageNet, 1,000 clusters", "SCAN, its own clusters", "resnet50", _by(_SCORES, 39.9, 72.0, 27.5), SCAN),
    ("ImageNet", "MoCo-v2, k-means (how many clusters is not told)", "resnet50", _by("nmi adjusted_rand", 75.4, 15.8), SELA),
    ("CIFAR-10, 10 clusters", "SCAN with self-labelling", "resnet18-small", _by(_SCORES, 88.3, 79.7, 77.2), SCAN),
]
_FINETUNED = "fc6-8 all"
_VOC = [
    ("DeepCluster", "alexnet", _by(_FINETUNED, 72.0, 73.7), f"{PAPER}, table 2", False),
    ("DeepCluster, scales of BatchNorm frozen", "alexnet", {"fc6-8": 70.4}, "facebookresearch/deepcluster, README.md", True),
]
_SVM = [
    (
        "DeepCluster, Sobel, 200 epochs; best stage layer4",
        _svm(74.26, 29.37, 37.99, 45.85, 55.57, 62.48, 66.15, 70.00, 71.37),
        MM_DEEPCLUSTER,
    ),
    ("ODC, 440 epochs; best stage layer4", _svm(78.42, 32.42, 40.27, 49.95, 59.96, 65.71, 69.99, 73.64, 75.13), MM_ODC),
    ("random weights; best stage layer1", _svm(30.22), ZOO),
    (
        "trained on ImageNet's labels; best stage layer4",
        _svm(87.17, 52.99, 63.55, 73.7, 78.79, 81.76, 83.75, 85.18, 85.97),
        ZOO,
    ),
]
_SWAV_TABLE = "Caron et al., arXiv 2006.09882, table of semi-supervised learning"
_SEMI = [
    ("random weights", 1.56, 21.78, ZOO, True),
    ("DeepCluster, Sobel, 200 epochs", 33.44, 52.94, ZOO, True),
    ("ODC, 440 epochs", 32.39, 58.15, ZOO, True),
    ("SwAV, 800 epochs", 53.9, 70.2, _SWAV_TABLE, False),
    ("trained on all of its labels", 68.68, 74.53, ZOO, True),
]
_QUOTED = "facebookresearch/deepcluster, issue 58"
_RETRIEVAL = [
    ("DeepCluster, Sobel", _by("Oxford5k Paris6k", 61.1, 74.9), f"{PAPER}, table 5", False),
    ("trained on ImageNet's labels, Sobel", _by("Oxford5k Paris6k", 72.4, 81.5), f"{_QUOTED}, which quotes the paper", True),
    ("trained on ImageNet's labels, colour", _by("Oxford5k Paris6k", 64.9, 81.3), f"{_QUOTED}, a user's run", True),
    ("DeeperCluster, YFCC100M", _by("Oxford5k Paris6k", 55.8, 73.4), f"{_QUOTED}, which quotes its paper", True),
]


def _rows() -> Iterator[Published]:
    for data, system, numbers, source in _LINEAR_ALEXNET:
        yield Published("linear", data, system, "alexnet", numbers, source, checked=False)
    yield Published("linear", "ImageNet", "SeLa, 10,000 clusters", "alexnet", {"top-1": 43.8}, SELA)
    for data, system, numbers, source in _LINEAR_RESNET50:
        yield Published("linear", data, system, "resnet50", numbers, source)
    for data, system, arch, value in _LINEAR_SMALL:
        yield Published("linear", data, system, arch, {"avgpool": value}, SOLO)
    for data, system, arch, numbers, source, checked in _KNN:
        yield Published("knn", data, system, arch, numbers, source, checked)
    for data, system, arch, numbers, source in _CLUSTERS:
        yield Published("clusters", data, system, arch, numbers, source)
    for system, arch, numbers, source, checked in _VOC:
        yield Published("voc07-classification", "VOC07 test", system, arch, numbers, source, checked)
    for system, numbers, source in _SVM:
        yield Published("voc07-svm", "VOC07 test", system, "resnet50", numbers, source)
    for system, one, ten, source, checked in _SEMI:
        numbers = {"1 % of labels": one, "10 % of labels": ten}
        yield Published("semi-supervised", "ImageNet", system, "resnet50", numbers, source, checked)
    for system, numbers, source, checked in _RETRIEVAL:
        yield Published("retrieval", "Oxford5k, Paris6k", system, "vgg16", numbers, source, checked)


PUBLISHED: tuple[Published, ...] = tuple(_rows())


def published_for(protocol: str, data_name: str | None = None, arch: str | None = None) -> list[Published]:
    """What is known of a protocol: first the rows of the same data set, and among these those of the same architecture.

    Args:
        data_name: name of a data set; cifar10, CIFAR-10 and cifar_10 are the same. None: they stay as they are.
        arch: as `train --arch` names it.
    """
    wanted = _plain(data_name or "")

    def strangeness(row: Published) -> tuple[bool, bool]:
        known = [_plain(name) for name in row.data.split(", ")]
        return bool(wanted) and wanted not in known, arch is not None and row.arch != arch

    return sorted((row for row in PUBLISHED if row.protocol == protocol), key=strangeness)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def published_table(protocol: str, data_name: str | None = None, arch: str | None = None) -> Table | None:
    """`published_for` as a table; None where nothing is known."""
    rows = published_for(protocol, data_name, arch)
    if not rows:
        return None
    return Table(["system", "data", "network", "percent", "source"], [_cells(row) for row in rows])


def _cells(row: Published) -> Sequence[str]:
    numbers = ", ".join(f"{name.replace('_', ' ')} {_as_published(value)}" for name, value in row.numbers.items())
    return [row.system, row.data, row.arch, numbers, row.cited()]


def _as_published(value: float) -> str:
    """One decimal, or the two that it was given with."""
    return f"{value:.2f}".removesuffix("0")
