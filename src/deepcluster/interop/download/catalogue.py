"""What can be downloaded: addresses, published sums, licences and sizes, as far as they are known."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.interop.download.unpack import Limits, Place, as_it_is, into, without_top

_MB = 1_000_000


@dataclass(frozen=True)
class Licence:
    """The terms of use: in short, and what is printed before the first byte."""

    name: str
    text: str
    must_be_accepted: bool = False


CC_BY_NC = Licence(
    "CC BY-NC 4.0",
    "These weights are published by Facebook AI Research under CC BY-NC 4.0 "
    "(https://creativecommons.org/licenses/by-nc/4.0): name their authors, and make no commercial use of them",
    must_be_accepted=True,
)
APACHE = Licence("Apache 2.0", "These weights are published by OpenMMLab under the Apache License 2.0")
IMAGENET = Licence(
    "terms of ImageNet",
    "The images are from ImageNet, whose terms (https://image-net.org/download) allow non-commercial research and education",
)
FLICKR = Licence(
    "terms of Flickr", "The images are from Flickr: their photographers hold the rights, and Flickr's terms apply"
)
NONE_STATED = Licence("none stated", "Its authors state no licence; they ask for a citation")


@dataclass(frozen=True)
class File:
    """A file of the net.

    Attributes:
        url: its address.
        digest: its published sum, whole or its beginning, as `fetch` takes it.
        bytes: its size, perhaps rounded; None = not known.
        place: of an archive: where its files go.
    """

    url: str
    digest: str | None = None
    bytes: int | None = None
    place: Place = as_it_is

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]

    def address(self, mirror: str | None) -> str:
        """Return the address, or that on a mirror: `MIRROR/HOST/PATH`, as `wget --force-directories` lays files out."""
        if mirror is None:
            return self.url
        parts = urlsplit(self.url)
        return f"{mirror.rstrip('/')}/{parts.hostname}{parts.path}"


@dataclass(frozen=True)
class Entry:
    """A model (files) or a data set (archives, which are unpacked into one folder).

    Attributes:
        name: what the user writes.
        about: what it is, in a few words.
        uses: commands that use it; `{path}` is the file of a model, or the folder of a data set.
        limits: of a data set: what its archives hold at most, together; None = a model.
        convert: of a data set that `train` can't read as it is: makes another folder of the one that was unpacked.
    """

    name: str
    about: str
    licence: Licence
    files: tuple[File, ...]
    uses: tuple[str, ...]
    limits: Limits | None = None
    convert: str = ""

    @property
    def bytes(self) -> int | None:
        """Size of all files; None = not known."""
        sizes = [file.bytes for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def room(self) -> int:
        """Bytes that are unpacked, and perhaps converted, about: the limits allow twice as much."""
        unpacked = self.limits.bytes // 2 if self.limits else 0
        return 2 * unpacked if self.convert else unpacked


_FAIR = "https://dl.fbaipublicfiles.com/deepcluster/"
_MM = "https://download.openmmlab.com/mmselfsup/"
_USE_MODEL = ("deepcluster info {path}", "deepcluster evaluate linear {path} --data IMAGES")
_USE_CLASSES = ("deepcluster train {path}/train", "deepcluster evaluate knn MODEL --data {path}")
_USE_TABLES = ("deepcluster train {path}/train.parquet", "deepcluster evaluate knn MODEL --data {path}")


def _fair(
    name: str, about: str, *paths: str, digest: str = "", size: int | None = None, uses: tuple[str, ...] = ()
) -> Entry:
    files = tuple(File(_FAIR + path, digest or None, size) for path in paths)
    return Entry(name, about, CC_BY_NC, files, uses or _USE_MODEL)


def _mm(name: str, about: str, path: str) -> Entry:
    """Return an entry of mmselfsup, whose file names end in the first 8 digits of their SHA-256."""
    digest = f"sha256:{path.rpartition('-')[2].partition('.')[0]}"
    return Entry(name, about, APACHE, (File(_MM + path, digest),), _USE_MODEL)


def _of_release(arch: str, about: str, digest: str, size: int) -> tuple[Entry, ...]:
    name, use_of_clusters = arch.lower(), ("deepcluster import {path} --out clusters.parquet",)
    return (
        _fair(f"deepcluster-{name}", f"{about}, PyTorch", f"{name}/checkpoint.pth.tar", digest=digest, size=size),
        _fair(f"deepcluster-{name}-caffe", f"{about}, Caffe", f"{name}/model.prototxt", f"{name}/model.caffemodel"),
        _fair(
            f"deepcluster-{name}-clusters",
            f"clusters of ImageNet by {about}",
            f"{name}/{name}_cluster_assignment.pickle",
            uses=use_of_clusters,
        ),
    )


_KINDS = {"": "", "_2x224": ", 2 crops of 224 px", "_bs256": ", batches of 256"}


def _swav(kind: str, about: str) -> Entry:
    epochs, _, rest = kind.partition("_")[2].partition("ep")
    about = f"{about}, ResNet-50, {epochs} epochs{_KINDS[rest]}"
    # The trunk, the projection and the prototypes as float32.
    return _fair(kind.replace("_", "-"), about, f"{kind}_pretrain.pth.tar", size=115 * _MB)


def _data(
    name: str,
    about: str,
    licence: Licence,
    *files: File,
    unpacked: int,
    count: int,
    uses: tuple[str, ...] = _USE_CLASSES,
    convert: str = "",
    ratio: float = 30.0,
) -> Entry:
    """Return a data set of about so many MB and files, as unpacked; twice as much is allowed."""
    return Entry(name, about, licence, files, uses, Limits(2 * unpacked * _MB, 2 * count, ratio), convert)


MODELS = (
    *_of_release("alexnet", "DeepCluster 2018, AlexNet", "sha256:3db70837", 400 * _MB),
    *_of_release("VGG16", "DeepCluster 2018, VGG-16", "sha256:b6b90ac1", 700 * _MB),
    _swav("deepclusterv2_800ep", "DeepCluster-v2"),
    _swav("deepclusterv2_400ep", "DeepCluster-v2"),
    _swav("deepclusterv2_400ep_2x224", "DeepCluster-v2"),
    *(_swav(f"swav_{kind}", "SwAV") for kind in ("100ep", "200ep", "400ep", "800ep")),
    *(_swav(f"swav_{kind}", "SwAV") for kind in ("200ep_bs256", "400ep_bs256", "400ep_2x224")),
    _swav("selav2_400ep", "SeLa-v2"),
    _swav("selav2_400ep_2x224", "SeLa-v2"),
    _fair("deepercluster", "DeeperCluster, VGG-16, YFCC100M", "ours/ours.pth"),
    _fair("deepcluster-yfcc", "DeepCluster, VGG-16, 1.3 M images of YFCC", "deepcluster/deepcluster_flickr.pth"),
    _fair("rotnet-yfcc", "RotNet, VGG-16, YFCC100M", "rotnet/rotnet_flickr.pth"),
    _fair("rotnet-imagenet", "RotNet, VGG-16, ImageNet", "rotnet/rotnet_imagenet.pth"),
    _mm(
        "mmselfsup-deepcluster",
        "DeepCluster, ResNet-50 with Sobel, of mmselfsup",
        "deepcluster/deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k-bb8681e2.pth",
    ),
    _mm("mmselfsup-odc", "ODC, ResNet-50, of mmselfsup", "odc/odc_resnet50_8xb64-steplr-440e_in1k_20220225-a755d9c0.pth"),
)


def _imagenette(ending: str, about: str, md5: str, size: int) -> Entry:
    file = File(f"https://s3.amazonaws.com/fast-ai-imageclas/imagenette2{ending}.tgz", f"md5:{md5}", size * _MB, without_top)
    return _data(f"imagenette{ending}", about, IMAGENET, file, unpacked=size, count=14_000)


def _cifar(classes: int, md5: str, size: int) -> Entry:
    file = File(f"https://www.cs.toronto.edu/~kriz/cifar-{classes}-python.tar.gz", f"md5:{md5}", size, without_top)
    about = f"60,000 images of 32 px, {classes} classes"
    return _data(f"cifar{classes}", about, NONE_STATED, file, unpacked=190, count=20, uses=_USE_TABLES, convert="cifar")


_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data/"
_USE_VOC = (
    "deepcluster evaluate voc07-svm MODEL --data {path}",
    "deepcluster evaluate voc07-classification MODEL --data {path}",
)
_USE_BUILDINGS = ("deepcluster evaluate retrieval MODEL --data {path}",)
DATA_SETS = (
    _data(
        "tiny-imagenet",
        "Tiny-ImageNet: 120,000 images of 64 px, 200 classes",
        IMAGENET,
        File(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
            248_100_043,
            without_top,
        ),
        unpacked=500,
        count=121_000,
    ),
    _imagenette("", "10 easy classes of ImageNet, full size", "fe2fc210e6bb7c5664d602c3cd71e612", 1560),
    _imagenette("-320", "10 easy classes of ImageNet, 320 px", "3df6f0d01a2c9592104656642f5e78a3", 340),
    _imagenette("-160", "10 easy classes of ImageNet, 160 px", "e793b78cc4c9e9a4ccc0c1155377a412", 100),
    _cifar(10, "c58f30108f718f92721af3b95e74349a", 170_498_071),
    _cifar(100, "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),
    _data(
        "stl10",
        "13,000 images of 96 px, 10 classes; 100,000 unlabelled",
        NONE_STATED,
        File(
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            "md5:91f7769df0f17e558f3565bffb0c7dfb",
            2640 * _MB,
            without_top,
        ),
        unpacked=3200,
        count=20,
        uses=("deepcluster train {path}/unlabeled.parquet", "deepcluster evaluate knn MODEL --data {path}"),
        convert="stl10",
    ),
    _data(
        "voc2007",
        "PASCAL VOC 2007, trainval and test",
        FLICKR,
        File(f"{_VOC}voc2007/VOCtrainval_06-Nov-2007.tar", "md5:c52e279531787c972589f7e41ab4ae64", 460 * _MB),
        File(f"{_VOC}voc2007/VOCtest_06-Nov-2007.tar", "md5:b6e924de25625d8de591ea690078ad9f", 451 * _MB),
        unpacked=910,
        count=30_000,
        uses=_USE_VOC,
    ),
    _data(
        "voc2012",
        "PASCAL VOC 2012, trainval",
        FLICKR,
        File(f"{_VOC}voc2012/VOCtrainval_11-May-2012.tar", "md5:6cd6e144f989b92b3379bac3b3de84fd", 2000 * _MB),
        unpacked=2000,
        count=60_000,
        uses=("deepcluster evaluate voc07-svm MODEL --data {path} --split train",),
    ),
    _data(
        "oxford5k",
        "Oxford buildings, with ground truth",
        FLICKR,
        File(f"{_VGG}oxbuildings/oxbuild_images-v1.tgz", None, 1_938_238_004, into("jpg", ".jpg")),
        File(f"{_VGG}oxbuildings/gt_files_170407.tgz", None, 1 * _MB, into("lab", ".txt")),
        unpacked=2000,
        count=6_000,
        uses=_USE_BUILDINGS,
    ),
    _data(
        "paris6k",
        "Paris buildings, with ground truth",
        FLICKR,
        File(f"{_VGG}parisbuildings/paris_1-v1.tgz", None, 1_269_538_001, into("jpg", ".jpg")),
        File(f"{_VGG}parisbuildings/paris_2-v1.tgz", None, 1270 * _MB, into("jpg", ".jpg")),
        File(f"{_VGG}parisbuildings/paris_120310.tgz", None, 1 * _MB, into("lab", ".txt")),
        unpacked=2600,
        count=7_500,
        uses=_USE_BUILDINGS,
    ),
)
ENTRIES = {entry.name: entry for entry in (*MODELS, *DATA_SETS)}
# What people ask for that no program may download.
BY_HAND = {
    "imagenet": "ImageNet needs an account: sign in at https://image-net.org/download, get ILSVRC2012_img_train.tar, "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, and unpack them (docs/data.md)",
}


def entry_of(name: str) -> Entry:
    """Return what can be downloaded under a name; raises InputError."""
    plain = name.lower()
    if plain in BY_HAND:
        raise InputError(BY_HAND[plain])
    if plain not in ENTRIES:
        near = did_you_mean(plain, [*ENTRIES, *BY_HAND])
        raise InputError(f"{name} is not in the list of downloads{near}; `deepcluster download --list` shows it")
    return ENTRIES[plain]
