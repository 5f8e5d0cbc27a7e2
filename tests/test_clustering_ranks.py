"""k-means over real processes: however the points are spread, labels and centroids are those of one process, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.distributed import group
from deepcluster.core.errors import InputError

N, CLUSTERS = 600, 30
# Where the rows of each rank begin and end; rows 400 to 402 are not finite.
SHARES = {
    2: {"uneven": [0, 130, N], "no rows on the first": [0, 0, N]},
    4: {"one without rows, one without finite ones": [0, 400, 403, 403, N], "even": [0, 150, 300, 450, N]},
}
FITS: dict[str, dict[str, Any]] = {
    "random": {"init": "random", "max_iter": 12},
    "k-means++": {"init": "k-means++", "max_iter": 12},
    "spherical": {"init": "k-means++", "max_iter": 12, "spherical": True},
    "tolerance": {"init": "random", "max_iter": 30, "tol": 0.01},
    "many become empty": {"max_iter": 12},
    "many become empty, one iteration": {"max_iter": 1},
    "many become empty, spherical": {"max_iter": 12, "spherical": True},
}


def points() -> Tensor:
    """Blobs of 20 components, numbers of many sizes, a third of the rows equal, some not finite."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 20, generator=generator)
    points_NP = centres[torch.randint(40, (N,), generator=generator)] + 0.5 * torch.randn(N, 20, generator=generator)
    points_NP *= torch.logspace(-3, 1, 20)
    points_NP[::3] = points_NP[0]
    points_NP[[7, 400, 401, 402, N - 1]] = torch.nan
    return points_NP


def kmeans_of(name: str) -> KMeans:
    if not name.startswith("many become empty"):
        return KMeans(CLUSTERS, **FITS[name])
    start_KP = points()[450 : 450 + CLUSTERS].nan_to_num()
    start_KP[15:] += 40
    return KMeans(CLUSTERS, init=start_KP, **FITS[name])


def work(rank: int, world: int, folder: Path) -> None:
    """All fits of one rank, kept in a file."""
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), world), rank, world) as ranks:
        found: dict[tuple[str, str], Assignment] = {}
        for shares, bounds in SHARES[world].items():
            own_NP = points()[bounds[rank] : bounds[rank + 1]]
            for name in FITS:
                found[shares, name] = kmeans_of(name).cluster(own_NP, seed=3, ranks=ranks)
            with pytest.raises(InputError, match=f"clusters={N} .* {N - 5} points"):
                KMeans(N).cluster(own_NP, ranks=ranks)
        torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=SHARES, ids="{} ranks".format)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[tuple[str, str], Assignment]]:
    """What each rank found."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    spawn(work, args=(world, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("name", FITS)
def test_ranks_find_what_one_process_finds(name: str, ranks: list[dict[tuple[str, str], Assignment]]) -> None:
    expected = kmeans_of(name).cluster(points(), seed=3)
    assert expected.n_repaired > 0 or not name.startswith("many become empty")
    for shares in SHARES[len(ranks)]:
        found = [rank[shares, name] for rank in ranks]
        assert torch.equal(torch.cat([assignment.labels_N for assignment in found]), expected.labels_N)
        distances_N = torch.cat([assignment.distances_N for assignment in found])
        assert torch.equal(distances_N.nan_to_num(-1), expected.distances_N.nan_to_num(-1))
        for assignment in found:
            assert torch.equal(assignment.centroids_KP, expected.centroids_KP)
            assert assignment.n_repaired == expected.n_repaired
            np.testing.assert_allclose(assignment.inertia_history, expected.inertia_history, rtol=1e-12)
