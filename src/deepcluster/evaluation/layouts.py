"""Which data sets a folder holds, and which protocols can use them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deepcluster.evaluation.datasets.buildings import is_buildings
from deepcluster.evaluation.datasets.coco import is_coco
from deepcluster.evaluation.datasets.labelled import has_train_val
from deepcluster.evaluation.datasets.masks import LAYOUTS as MASK_LAYOUTS
from deepcluster.evaluation.datasets.masks import is_masks
from deepcluster.evaluation.datasets.voc import is_voc
from deepcluster.evaluation.options import PROTOCOLS


def has_classes(data: Path) -> bool:
    """Return whether there are two parts with class folders; the parts of COCO and Cityscapes have none."""
    return has_train_val(data) and not is_coco(data) and not MASK_LAYOUTS["cityscapes"].fits(data.parent)


# What the folder of a data set looks like, in words and as a check.
LAYOUTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "classes": ("class folders in train/ and val/", has_classes),
    "voc": ("a Pascal VOC devkit", is_voc),
    "masks": ("images with a class per pixel: VOC, Cityscapes or COCO", is_masks),
    "buildings": ("Oxford or Paris buildings with their ground truth", is_buildings),
    "coco": ("COCO's annotations/instances_*.json and images", is_coco),
    "voc masks": (
        f"{MASK_LAYOUTS['voc'].wanted}, or {MASK_LAYOUTS['sbd'].wanted}",
        lambda data: MASK_LAYOUTS["voc"].fits(data) or MASK_LAYOUTS["sbd"].fits(data),
    ),
    "cityscapes": (MASK_LAYOUTS["cityscapes"].wanted, MASK_LAYOUTS["cityscapes"].fits),
}


def find_data(root: Path, only: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Yield protocol, folder of its data, and the name of its file: with that of the data where there are several."""
    inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    # What fits by what is in it, as VOC does by its VOCdevkit, is not looked for in there again.
    by_layout = {
        name: [root] if root.is_dir() and fits(root) else [folder for folder in inside if fits(folder)]
        for name, (_, fits) in LAYOUTS.items()
    }
    for protocol in only or PROTOCOLS:
        fitting = by_layout[PROTOCOLS[protocol].layout]
        for folder in fitting:
            yield protocol, folder, protocol if len(fitting) == 1 else f"{protocol}-{folder.resolve().name}"
