"""The registry of clusterers: what each of them offers, and that one file and one entry add another."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepcluster.clustering import CLUSTERERS, Clusterer, clusterer
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.errors import InputError

SETTINGS = SimpleNamespace(n_clusters=1200, kmeans_iterations=3, super_clusters=4)

TOY = """
import torch

from deepcluster.clustering import Assignment, Clusterer
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.work import no_advance


class Toy(Clusterer):
    explanation = "Images are dealt to clusters in turn."
    max_iter = most_steps = 1

    def __init__(self, n_clusters=8):
        self.n_clusters = n_clusters

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.n_clusters)

    @classmethod
    def describe(cls, settings):
        return f"{settings.n_clusters:,} toy clusters"

    def cluster(self, points_NP, *, seed=0, ranks=ONE_PROCESS, advance=no_advance):
        advance(1)
        labels_N = torch.arange(len(points_NP)) % self.n_clusters
        return Assignment(labels_N, torch.zeros(len(points_NP)), torch.zeros(self.n_clusters, points_NP.shape[1]))
"""


def test_one_file_and_one_entry_add_a_clusterer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CLUSTERERS, "toy", "toy:Toy")
    found = clusterer("toy")
    units: list[int] = []
    assert found.describe(SETTINGS) == "1,200 toy clusters"
    toy = found.from_settings(SimpleNamespace(n_clusters=3))
    assignment = toy.cluster(torch.zeros(7, 2), seed=0, ranks=ONE_PROCESS, advance=units.append)
    assert assignment.labels_N.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sum(units) <= toy.most_steps
    assert toy.fit([[0.0], [1], [2], [3]]).labels_.tolist() == [0, 1, 2, 0]
    sys.modules.pop("toy")


@pytest.mark.parametrize(
    ("name", "described", "steps"),
    [
        ("kmeans", "1,200 clusters", 4),
        ("balanced", "1,200 balanced clusters", 9),
        ("pic", "clusters by power iteration", 200),
        ("hierarchical", "1,200 clusters in 4 super-clusters", 20),
    ],
)
def test_each_clusterer_is_made_from_settings_and_describes_itself(name: str, described: str, steps: int) -> None:
    found = clusterer(name)
    assert found.describe(SETTINGS) == described
    assert found.explanation.endswith(".")
    assert found.from_settings(SETTINGS).most_steps == steps


@pytest.mark.parametrize("name", CLUSTERERS)
def test_each_clusterer_fits_within_its_steps(name: str) -> None:
    points_NP = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    points_NP[7] = torch.nan
    clusters = clusterer(name).from_settings(SimpleNamespace(n_clusters=12, kmeans_iterations=5, super_clusters=3))
    units: list[int] = []
    found = clusters.cluster(points_NP, seed=2, ranks=ONE_PROCESS, advance=units.append)
    again = clusters.cluster(points_NP, seed=2, ranks=ONE_PROCESS, advance=units.append)
    assert torch.equal(found.labels_N, again.labels_N)
    assert found.labels_N[7] == -1 and bool((found.labels_N[8:] >= 0).all())
    assert 0 < sum(units) <= 2 * clusters.most_steps


@pytest.mark.parametrize("name", CLUSTERERS)
def test_each_cluster_takes_the_arguments_of_the_contract(name: str) -> None:
    wanted, given = (inspect.signature(cls.cluster).parameters for cls in (Clusterer, clusterer(name)))
    assert wanted.keys() <= given.keys()
    extra = given.keys() - wanted.keys()
    assert all(given[argument].default is not inspect.Parameter.empty for argument in extra)


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"unknown clustering 'kmean'.*kmeans.*: use one of kmeans, balanced, pic"):
        clusterer("kmean")
