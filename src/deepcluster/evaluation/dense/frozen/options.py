"""Options of the frozen protocols of segmentation: nothing here imports torch."""

from dataclasses import dataclass

from deepcluster.core.options import Checked, option

STAGES = "stages with a map, separated by commas, or all"
LAST = 3
LAST_STAGES = f"{STAGES} (default: the last {LAST})"
TESTED = (
    "images to test on: val, test or, of VOC, a list in ImageSets/Segmentation; auto: val, or test where there is no val"
)
SIDE = "longer side of the images in pixels (default: twice the side that the model was trained on)"
# The smallest memory of Balazevic et al., NeurIPS 2023: 1,024 · 10².
CELLS = 102_400
SEED = "seed of the choice of cells"


@dataclass(frozen=True)
class SegmentationLinearOptions(Checked):
    """A linear classifier on the cells of frozen maps (a 1×1 convolution), tested at the images' own size."""

    stages: str = option("all", STAGES)
    lists: str = option("auto", f"{TESTED}; trained on train, or on trainval for test")
    side: int | None = option(None, SIDE, at_least=1)
    cells: int = option(CELLS, "number of cells to train on, the same number from each image", at_least=1)
    l2: float = option(1e-3, "strength of the penalty on the weights of standardised channels", at_least=0)
    seed: int = option(31, SEED, at_least=0, below=2**63)


@dataclass(frozen=True)
class SegmentationKnnOptions(Checked):
    """Votes of the nearest cells of the training images, without training (Balazevic et al., NeurIPS 2023)."""

    stages: str | None = option(None, LAST_STAGES)
    lists: str = option("auto", f"{TESTED}; trained on train, or on trainval for test")
    side: int | None = option(None, SIDE, at_least=1)
    memory: int = option(CELLS, "number of cells that vote, the same number from each image", at_least=1)
    k: int = option(30, "number of neighbours", at_least=1)
    temperature: float = option(
        0.02, "temperature of the votes, whose weights are softmax(cosine / temperature)", at_least=1e-3
    )
    seed: int = option(31, SEED, at_least=0, below=2**63)


@dataclass(frozen=True)
class SegmentationClustersOptions(Checked):
    """k-means on the cells of the test images, each cluster matched to a class."""

    stages: str | None = option(None, LAST_STAGES)
    lists: str = option("auto", TESTED)
    side: int | None = option(None, SIDE, at_least=1)
    cells: int = option(CELLS, "number of cells to cluster, the same number from each image", at_least=1)
    overclusters: int = option(500, "K of overclustering, where several clusters may stand for one class", at_least=2)
    pca: int = option(0, "whiten the cells to this many components first, as training does (0: off)", at_least=0)
    iterations: int = option(100, "maximum number of k-means iterations", at_least=1)
    runs: int = option(5, "number of k-means runs with different starts, of which the mean is reported", at_least=1)
    seed: int = option(31, "seed of the choice of cells and of the first k-means run", at_least=0, below=2**63 - 1024)
