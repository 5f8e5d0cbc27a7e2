"""Options of the pictures and of the report. The command line is built from them: nothing here imports torch."""

from dataclasses import dataclass

from deepcluster.core.options import Checked, option

STAGES = "stages whose filters to show, separated by commas, or all; by default the last one with feature maps"


@dataclass(frozen=True)
class FilterOptions(Checked):
    """Pictures that excite a filter, by gradient ascent."""

    stage: str | None = option(None, STAGES)
    channels: str = option("0-63", "filters to show: 0-63, 1,5,9 or all")
    objective: str = option(
        "fourier", "fourier, or published (of pixels, as in the paper)", choices=("fourier", "published")
    )
    steps: int | None = option(None, "steps of the ascent; by default 200, or 1,000 with published", at_least=1)
    image_size: int | None = option(None, "side of the pictures in pixels; by default the model's", at_least=8, below=4097)
    lr: float | None = option(None, "learning rate of the ascent; by default 0.05, or 3 with published", at_least=0)
    weight_decay: float | None = option(None, "published: weight decay of the picture; by default 1e-5", at_least=0)
    sigma: float | None = option(
        None, "published: standard deviation of the blur in pixels; by default 0.3", at_least=0, below=64
    )
    blur_every: int | None = option(None, "published: steps between two blurs; by default 5", at_least=1)
    batch_size: int | None = option(None, "filters per batch; by default as many as fit into a little memory", at_least=1)
    seed: int = option(31, "seed of the starting points", at_least=0, below=2**63)


@dataclass(frozen=True)
class TopImagesOptions(Checked):
    """Images of a data set that excite a filter most."""

    stage: str | None = option(None, STAGES)
    channels: str = option("all", "filters to show: 0-63, 1,5,9 or all")
    count: int = option(9, "images per filter", at_least=1)
    rank: str = option(
        "peak", "score of an image: the highest activation of its map (peak), or the mean", choices=("peak", "mean")
    )


@dataclass(frozen=True)
class ReportOptions(Checked):
    """What the page holds."""

    title: str | None = option(None, "heading of the page  [name of the run and of its data]")
    map_images: int = option(5_000, "images on the map, drawn at random from a larger set", at_least=0)
    thumbnail: int | None = option(
        None, "side of the thumbnails in pixels  [as large as fits: 128 to 16]", at_least=16, below=513
    )
    clusters: int | None = option(None, "for a table: number of clusters to make of its embeddings", at_least=1)
    embedding_column: str | None = option(None, "for a table: column of the embeddings")
    name_column: str | None = option(None, "for a table: column of the names")
    cluster_column: str | None = option(None, "for a table: column of the clusters")
    label_column: str | None = option(None, "for a table: column of the labels")
    seed: int = option(31, "seed of random choices", at_least=0, below=2**63)
