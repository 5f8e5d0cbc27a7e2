"""Options of `cluster`: those of a training run that concern clusters (`run.settings`). Nothing here imports torch."""

from dataclasses import dataclass, field, fields
from typing import Any

from deepcluster.core.options import Checked
from deepcluster.run.settings import Settings

_OF_RUNS = {one.name: one for one in fields(Settings)}


def _as_in_a_run(name: str, **changed: Any) -> Any:
    """Return an option of `Settings`, with another default or help text where these are given."""
    default = changed.pop("default", _OF_RUNS[name].default)
    return field(default=default, metadata={**_OF_RUNS[name].metadata, "section": "clustering", "method": "", **changed})


@dataclass(frozen=True)
class ClusterOptions(Checked):
    """How features are clustered without training.

    Raises:
        InputError: a value is out of range, naming the option, the value and what may be used.
    """

    clustering: str = _as_in_a_run("clustering")
    super_clusters: int = _as_in_a_run("super_clusters")
    whiten: bool = _as_in_a_run(
        "whiten",
        default=True,
        help="PCA and whitening, so that a few directions do not dominate; without it, rows are only scaled to unit length "
        "(k-means then goes by the cosine)",
    )
    pca: int | None = _as_in_a_run(
        "pca", default=None, help="components after PCA and whitening (default: one per 100 images, 8 to 256)"
    )
    kmeans_iterations: int = _as_in_a_run("kmeans_iterations")
    seed: int = _as_in_a_run("seed")
    precision: str = _as_in_a_run(
        "precision", help="precision of the network: auto is that of MODEL's run, or what the machine is fast at"
    )
