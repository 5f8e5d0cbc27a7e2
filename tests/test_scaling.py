"""The model of docs/scaling.md: its formulas against cases worked out by hand, and against the code that they count."""

import sys
from dataclasses import replace
from math import isclose
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scaling_links import Fabric, Link, ring_seconds, simulated_ring_seconds
from scaling_measure import fitted_link, job_of, network_facts
from scaling_model import METHODS, Job, Network, clusterings, memory, norm_bytes, traffic
from scaling_seconds import (
    SUMS_OF_ROUND,
    SUMS_OF_START,
    Constants,
    clustering_seconds,
    seconds,
    training_seconds,
)

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.distributed import Ranks
from deepcluster.models.archs import make_trunk
from deepcluster.models.convnets import ConvNet
from deepcluster.models.heads import Projection
from deepcluster.models.synchronised import synchronise_batch_norms
from deepcluster.run.settings import Settings

NETWORK = Network(weights=1_000_000, dim=512, norms=5, channels=1000, flops={32: 1e8})
JOB = Job("deepcluster-v2", 1e5, 4, NETWORK, (100, 50), ((2, 32),), 256, 128, iterations=10)
ONES = Constants(**dict.fromkeys(Constants.__dataclass_fields__, 1e-9) | {"cores": 0.0, "kept": 1.0, "disk_bytes": 1e9})
# 4 super-clusters, each with 4 rotations; 1,000 clusters in each super-class.
HIERARCHICAL = replace(
    JOB, method="deepercluster", clusters=(16_000,), super_clusters=4, crops=((1, 32),), ranks=64, batch=640
)
FABRIC = Fabric(Link(1e-5, 1e9), Link(1e-4, 1e8), ranks_per_machine=4)


class CountingRanks(Ranks):
    """A single process that records the bytes of its sums and of the rows that it gives to be gathered."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.gathered: list[int] = []

    def sum(self, value: Tensor) -> Tensor:
        self.sent.append(value.nbytes)
        return value

    def gather(self, rows_M: Tensor) -> Tensor:
        self.gathered.append(rows_M.nbytes)
        return rows_M


def test_a_ring_of_four_by_hand() -> None:
    # 2 · 3 messages of a quarter of 4 MB: each 1 ms of latency and 1 ms at 1 GB/s.
    assert isclose(ring_seconds(4e6, 4, Link(1e-3, 1e9)), 6 * 2e-3)


@pytest.mark.parametrize("ranks", [2, 3, 8, 17])
def test_the_simulation_of_equal_links_is_the_formula(ranks: int) -> None:
    link = Link(3e-5, 2e8)
    for n_bytes in (10.0, 1e6):
        assert isclose(simulated_ring_seconds(n_bytes, [link] * ranks), ring_seconds(n_bytes, ranks, link), rel_tol=1e-9)


def test_the_simulation_waits_for_the_slowest_link() -> None:
    quick, slow = Link(0.0, 1e9), Link(0.0, 1e8)
    found = simulated_ring_seconds(8e6, [quick] * 7 + [slow])
    # The slow link hands on 14 parts of 1 MB one after the other; before and after it at most a part on each other link.
    assert 14 * 1e-2 - 1e-9 <= found <= 14 * 1e-2 + 14 * 1e-3
    assert found < ring_seconds(8e6, 8, slow) + 14 * 1e-3


def test_the_link_of_exact_times_is_found() -> None:
    link, sizes = Link(2e-4, 5e8), (1_000, 100_000, 10_000_000)
    found, worst = fitted_link(sizes, [ring_seconds(size, 4, link) for size in sizes], 4)
    assert isclose(found.latency, link.latency, rel_tol=1e-6) and isclose(found.bytes_per_second, 5e8, rel_tol=1e-6)
    assert worst < 1e-6


def test_one_rank_sends_nothing_and_waits_for_no_other() -> None:
    single = replace(JOB, ranks=1)
    assert traffic(single) == {}
    assert seconds(single, ONES, FABRIC) == seconds(single, ONES, Fabric(Link(9.0, 1.0), Link(9.0, 1.0)))


@pytest.mark.parametrize("method", METHODS)
def test_more_ranks_take_less_memory_and_compute_and_as_much_for_labels(method: str) -> None:
    job = replace(JOB, method=method, images=1e8, super_clusters=4, clusters=(100,))
    more, still = replace(job, ranks=16), Fabric(Link(0.0, 1e30), Link(0.0, 1e30))
    few, many = seconds(job, ONES, still), seconds(more, ONES, still)
    assert many["training"] < few["training"] and many["clustering"] < few["clustering"]
    assert isclose(many["labels"], few["labels"], rel_tol=1e-6)
    assert sum(memory(more).values()) < sum(memory(job).values())
    assert memory(more)["host: labels and distances"] == memory(job)["host: labels and distances"]


def test_what_k_means_sends_is_what_it_sums() -> None:
    ranks = CountingRanks()
    points = torch.nn.functional.normalize(torch.randn(3000, 128, generator=torch.Generator().manual_seed(0)))
    found = KMeans(100, max_iter=10, spherical=True).cluster(points, ranks=ranks)
    rounds = len(found.inertia_history)
    job = replace(JOB, images=3000, ranks=2, clusters=(100,), iterations=rounds - 1)
    counts = traffic(job)
    # With two ranks each sends a sum once; a start takes some bytes more, whatever the points.
    expected = counts["sums of clusters"]
    assert expected <= sum(ranks.sent) <= expected + 60_000
    # Whether to stop is summed by the run, not here; the sums of the clusters are one per round.
    assert rounds * SUMS_OF_ROUND < len(ranks.sent) <= rounds * SUMS_OF_ROUND + SUMS_OF_START


def test_what_norms_send_is_what_they_sum() -> None:
    sent = []

    class Counting(Ranks):
        size = 2

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            sent.append(value.nbytes)
            return value

    trunk = make_trunk("alexnet-small", image_size=32, sobel=False)
    facts = network_facts("alexnet-small", [32], sobel=False)
    projection = Projection(trunk.dim, 64, 16, seed=0)
    network = synchronise_batch_norms(torch.nn.Sequential(trunk, projection), Counting())
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    job = replace(JOB, network=facts, hidden=64, components=16)
    assert sum(sent) == norm_bytes(job)
    assert job.head_weights == sum(weight.numel() for weight in projection.parameters())


def test_facts_of_a_trunk() -> None:
    facts = network_facts("alexnet-small", [32, 64], sobel=True)
    trunk = make_trunk("alexnet-small", image_size=32, sobel=True)
    assert isinstance(trunk, ConvNet) and facts.dim == trunk.dim
    assert facts.weights == sum(weight.numel() for weight in trunk.parameters() if weight.requires_grad)
    assert facts.flops[64] > 2 * facts.flops[32] > 0


def test_clustering_by_hand() -> None:
    job = replace(JOB, ranks=1, iterations=1, clusters=(100,))
    constants = replace(ONES, pair_seconds=1e-12, compared=0.5)
    # 1e5 rows, 100 clusters, 128 components: all pairs, then half of them; and twice what a row and an iteration take.
    pairs = 1e5 * 100 * 128 * 1e-12 * 1.5
    assert isclose(clustering_seconds(job, constants, FABRIC), pairs + 2 * (1e5 * 128 * 1e-9 + 1e-9))
    slow = replace(constants, iteration_seconds=0.01)
    # Of one point, an iteration is what it costs by itself; each head has its own.
    few = replace(job, images=1, clusters=(1, 1))
    assert isclose(clustering_seconds(few, slow, FABRIC), 2 * 2 * 0.01, rel_tol=1e-3)


def test_a_hierarchical_head_by_hand() -> None:
    # 16 super-classes and 16,000 clusters of 513 weights each; every rank has all of them.
    assert HIERARCHICAL.weights == 1_000_000 + 513 * (16 + 16_000)
    # An image needs the scores of the super-classes, and of the 1,000 clusters of its own.
    assert isclose(HIERARCHICAL.step_flops, 10 * (1e8 + 2 * 513 * (16 + 1000)))
    assert isclose(traffic(HIERARCHICAL)["gradients"], 2 * 63 / 64 * 4 * HIERARCHICAL.weights * HIERARCHICAL.steps)
    still = Fabric(Link(0.0, 1e30), Link(0.0, 1e30))
    constants = replace(ONES, training_flops=1e9, colour_seconds=0.0, crop_seconds=0.0, pixel_seconds=0.0)
    steps = HIERARCHICAL.images / HIERARCHICAL.batch
    assert isclose(training_seconds(HIERARCHICAL, constants, still), steps * 3 * HIERARCHICAL.step_flops / 1e9)


def test_hierarchical_clustering_runs_one_super_class_after_the_other() -> None:
    assert clusterings(HIERARCHICAL) == ((4, 1), (1000, 16))
    iteration = replace(ONES, iteration_seconds=1.0, row_seconds=0.0, pair_seconds=0.0)
    still = Fabric(Link(0.0, 1e30), Link(0.0, 1e30))
    # The super-clusters, then each of 16 super-classes: 10 iterations and a last assignment each.
    assert isclose(clustering_seconds(HIERARCHICAL, iteration, still), 17 * 11)


def test_what_labels_send_is_what_is_gathered() -> None:
    ranks = CountingRanks()
    # The rows of one of 3 ranks, which go to the two others.
    Assignment(torch.zeros(20, dtype=torch.int64), torch.zeros(20), torch.zeros(1, 2)).over_ranks(ranks)
    expected = traffic(replace(JOB, images=60, ranks=3, clusters=(1,)))["labels"]
    assert isclose(2 * sum(ranks.gathered), expected)


def test_settings_become_a_job() -> None:
    settings = Settings(method="deepcluster-v2", arch="alexnet-small", image_size=32, clusters=(9, 5), sobel=False)
    job = job_of(settings, 1000, 2)
    assert (job.method, job.clusters, job.crops, job.components) == ("deepcluster-v2", (9, 5), ((2, 32),), 128)
    whitened = replace(settings, whiten=True, pca=64)
    assert (job.whitened, job_of(whitened, 1000, 2).whitened, job.number_bytes) == (0, 64, 2)
    assert job_of(replace(settings, precision="fp32"), 1000, 2).number_bytes == 4
    assert job.extracts is False and job_of(Settings(image_size=64, arch="alexnet-small"), 9, 1).extracts


def test_a_feature_pass_takes_a_view_of_each_image() -> None:
    extracting = replace(JOB, look_again=True, ranks=1)
    found = seconds(extracting, replace(ONES, feature_flops=1e9), FABRIC)["features"]
    # 1e5 images of 1e8 operations each, then a crop of 32 x 32 cut by the same core.
    assert isclose(found, 1e5 * (1e8 / 1e9 + 1e-9 * (1 + 32 * 32)))
    assert seconds(replace(extracting, look_again=False), ONES, FABRIC)["features"] == 0
