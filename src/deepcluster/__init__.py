"""DeepCluster: unsupervised learning of visual features, and clusters, from a folder of images.

The names below are imported at their first use, which keeps `import deepcluster` fast.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepcluster.api import train as train
    from deepcluster.applied.assigning import assign as assign
    from deepcluster.applied.clustering import cluster as cluster
    from deepcluster.applied.comparing import compare as compare
    from deepcluster.applied.duplicates import duplicates as duplicates
    from deepcluster.applied.embedding import embed as embed
    from deepcluster.applied.naming import name_clusters as name_clusters
    from deepcluster.applied.rows import Clusters as Clusters
    from deepcluster.applied.rows import Embeddings as Embeddings
    from deepcluster.applied.sample import sample as sample
    from deepcluster.applied.similar import similar as similar
    from deepcluster.clustering.assignment import Assignment as Assignment
    from deepcluster.clustering.balanced import BalancedKMeans as BalancedKMeans
    from deepcluster.clustering.kmeans import KMeans as KMeans
    from deepcluster.clustering.pic import PowerIterationClustering as PowerIterationClustering
    from deepcluster.clustering.whitening import Whitening as Whitening
    from deepcluster.core.errors import DeepClusterError as DeepClusterError
    from deepcluster.core.errors import InputError as InputError
    from deepcluster.core.errors import Interrupted as Interrupted
    from deepcluster.core.errors import TrainingError as TrainingError
    from deepcluster.evaluation.protocols import evaluate as evaluate
    from deepcluster.interop.download import download as download
    from deepcluster.interop.exports import export as export
    from deepcluster.interop.importing import import_file as import_file
    from deepcluster.interop.loading import load as load
    from deepcluster.models.archs import register as register
    from deepcluster.run.model import Model as Model
    from deepcluster.run.runs import Run as Run
    from deepcluster.run.settings import Settings as Settings
    from deepcluster.visualization.report.command import report as report

_HOMES = {
    "train": "api",
    "embed": "applied.embedding",
    "assign": "applied.assigning",
    "similar": "applied.similar",
    "duplicates": "applied.duplicates",
    "sample": "applied.sample",
    "compare": "applied.comparing",
    "cluster": "applied.clustering",
    "name_clusters": "applied.naming",
    "Embeddings": "applied.rows",
    "Clusters": "applied.rows",
    "evaluate": "evaluation.protocols",
    "report": "visualization.report.command",
    "export": "interop.exports",
    "load": "interop.loading",
    "register": "models.archs",
    "download": "interop.download",
    "import_file": "interop.importing",
    "Model": "run.model",
    "Run": "run.runs",
    "KMeans": "clustering.kmeans",
    "BalancedKMeans": "clustering.balanced",
    "PowerIterationClustering": "clustering.pic",
    "Whitening": "clustering.whitening",
    "Assignment": "clustering.assignment",
    "Settings": "run.settings",
    "DeepClusterError": "core.errors",
    "InputError": "core.errors",
    "TrainingError": "core.errors",
    "Interrupted": "core.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"deepcluster.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deepcluster' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
