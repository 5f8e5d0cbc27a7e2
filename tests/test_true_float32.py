"""Clustering multiplies in float32, whatever precision a user has chosen for the network."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deepcluster.clustering.balanced import BalancedKMeans
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import true_float32

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def by_the_old_name() -> None:
    torch.set_float32_matmul_precision("medium")


def by_the_new_name() -> None:
    BACKENDS[0].fp32_precision, BACKENDS[1].fp32_precision = "tf32", "bf16"


@pytest.fixture(params=[by_the_old_name, by_the_new_name])
def chosen(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A coarser float32 product and autocast, as chosen for a network; the setting that must be left."""
    before = [backend.fp32_precision for backend in BACKENDS]
    request.param()
    with torch.autocast("cpu", torch.bfloat16):
        yield ["tf32", "bf16"]
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def test_the_choice_is_suspended_and_restored(chosen: list[str]) -> None:
    table = torch.randn(300, 300)
    with true_float32():
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", "ieee"]
        product = table @ table
    assert product.dtype == torch.float32
    assert [backend.fp32_precision for backend in BACKENDS] == chosen
    assert (table @ table).dtype == torch.bfloat16


def points() -> Tensor:
    return torch.randn(400, 20, generator=torch.Generator().manual_seed(0))


WORK: dict[str, Callable[[], Tensor]] = {
    "kmeans": lambda: KMeans(30).cluster(points()).centroids_KP,
    "balanced": lambda: BalancedKMeans(20, max_iter=3).cluster(points()).centroids_KP,
    "neighbours": lambda: nearest_neighbours(points(), points(), k=5)[1],
    "whitening": lambda: Whitening(10).fit_transform(points()),
}
EXPECTED = {name: work() for name, work in WORK.items()}


@pytest.mark.parametrize("name", WORK)
def test_it_changes_nothing(name: str, chosen: list[str]) -> None:
    assert torch.equal(WORK[name](), EXPECTED[name])
    assert [backend.fp32_precision for backend in BACKENDS] == chosen
