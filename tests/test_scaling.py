"""The model of docs/scaling.md: its formulas against cases worked out by hand, and against the code that they count."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isclose
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from deepcluster.training.grouping import over_all_images
from scaling_links import Fabric, Link, ring_seconds, simulated_ring_seconds
from scaling_measure import fitted_link, job_of, network_facts
from scaling_model import METHODS, Job, Network, files, head_bytes, memory, norm_bytes, traffic
from scaling_seconds import (
    SUMS_OF_ROUND,
    SUMS_OF_START,
    Constants,
    clustering_seconds,
    head_seconds,
    seconds,
    training_seconds,
)

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.distributed import Ranks
from deepcluster.models.convnets import ConvNet
from deepcluster.models.heads import HierarchicalHead
from deepcluster.models.make import make_trunk
from deepcluster.models.projection import Projection
from deepcluster.models.synchronised import synchronise_batch_norms
from deepcluster.run.settings import Settings

NETWORK = Network(weights=1_000_000, dim=512, norms=5, channels=1000, flops={32: 1e8})
JOB = Job("deepcluster-v2", 1e5, 4, NETWORK, (100, 50), ((2, 32),), 256, 128, iterations=10)
ONES = Constants(**dict.fromkeys(Constants.__dataclass_fields__, 1e-9) | {"cores": 0.0, "kept": 1.0, "disk_bytes": 1e9})
# 4 super-clusters, each with 4 rotations; layers of 1,000 clusters.
SPREAD = replace(JOB, method="deepercluster", clusters=(16_000,), super_clusters=4, crops=((1, 32),), ranks=64, batch=640)
FABRIC = Fabric(Link(1e-5, 1e9), Link(1e-4, 1e8), ranks_per_machine=4)


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


def test_one_rank_sends_nothing_and_waits_for_nobody() -> None:
    alone = replace(JOB, ranks=1)
    assert traffic(alone) == {}
    assert seconds(alone, ONES, FABRIC) == seconds(alone, ONES, Fabric(Link(9.0, 1.0), Link(9.0, 1.0)))


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
    sent = []

    class CountingRanks(Ranks):
        def sum(self, value: torch.Tensor) -> torch.Tensor:
            sent.append(value.nbytes)
            return value

    points = torch.nn.functional.normalize(torch.randn(3000, 128, generator=torch.Generator().manual_seed(0)))
    found = KMeans(100, iterations=10, spherical=True).fit(points, ranks=CountingRanks())
    rounds = len(found.inertia_history)
    job = replace(JOB, images=3000, ranks=2, clusters=(100,), iterations=rounds - 1)
    counts = traffic(job)
    # Of two ranks each sends what is summed once; a start takes some bytes more, whatever the points.
    expected = counts["sums of clusters"]
    assert expected <= sum(sent) <= expected + 60_000
    # Whether to stop is summed by the run, not here; the numbers of the images are one sum, those of clusters one a round.
    assert len(sent) == rounds * SUMS_OF_ROUND + SUMS_OF_START + 1


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


def test_a_spread_head_by_hand() -> None:
    # 16 super-classes on 64 ranks: one on each of 16, of 1,000 clusters of 513 weights, for 40 of the 640 images.
    assert SPREAD.weights == 1_000_000 + 513 * 16
    assert memory(SPREAD)["layers of its super-classes"] == 12 * 513 * 1000
    assert memory(replace(SPREAD, ranks=6))["layers of its super-classes"] == 12 * 513 * 3000
    assert files(SPREAD)["layers"] == 8 * 513 * 16_000
    own = 10 * (1e8 + 2 * 513 * 16)
    assert isclose(SPREAD.step_flops, own + 40 * 2 * 513 * 1000)
    # One rank does all, and nothing travels.
    alone = replace(SPREAD, ranks=1)
    assert isclose(alone.step_flops, 640 * (1e8 + 2 * 513 * (16 + 1000)))
    assert head_seconds(alone, FABRIC) == 0 and "features to the head and back" not in traffic(alone)
    # 15 of 16 of 10 images leave; of the 40 that are owned 63 of 64 came from elsewhere. Features are of 512 numbers.
    sent = 10 * 15 / 16 * (1024 + 8 + 4) + 40 * 63 / 64 * (1024 + 4)
    assert isclose(head_bytes(SPREAD), sent + 63 * 8)
    assert isclose(traffic(SPREAD)["features to the head and back"], head_bytes(SPREAD) * SPREAD.steps)
    # Gradients that travel are those that every rank has.
    assert isclose(traffic(SPREAD)["gradients"], 2 * 63 / 64 * 4 * SPREAD.weights * SPREAD.steps)


def test_a_step_waits_for_the_rank_that_owns_most() -> None:
    still = Fabric(Link(0.0, 1e30), Link(0.0, 1e30))
    constants = replace(ONES, training_flops=1e9, colour_seconds=0.0, crop_seconds=0.0, pixel_seconds=0.0)
    steps = SPREAD.images / SPREAD.batch
    assert isclose(training_seconds(SPREAD, constants, still), steps * 3 * SPREAD.step_flops / 1e9)
    slow = replace(still, inside=Link(0.0, 1e6), between=Link(0.0, 1e6))
    # Twice 40 rows of 512 numbers of 2 bytes come to a rank through an eighth of the machine's link, from 56 of 64 ranks.
    features = 2 * 40 * 1024 * (56 / 64) / (1e6 / 8)
    assert features < head_seconds(SPREAD, replace(slow, ranks_per_machine=8)) < 1.5 * features


@pytest.fixture(scope="module")
def sent_by_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes that the first of 3 ranks hands to its exchanges, of a step of the head and of labels that are gathered."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_count_bytes, args=(str(folder),), nprocs=3)
    found: dict[str, dict[str, int]] = torch.load(folder / "sent.pt", weights_only=True)
    return found


def _count_bytes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder, "store")), 3), rank=rank, world_size=3)
    sent = {"exchanged": 0, "summed": 0, "gathered": 0}

    def counted(work: Callable[..., object], name: str, of: Callable[..., int]) -> Callable[..., object]:
        def counting(*args: torch.Tensor, **options: list[int]) -> object:
            sent[name] += of(*args, **options)
            return work(*args, **options)

        return counting

    def leaving(
        arrived: torch.Tensor, given: torch.Tensor, *, input_split_sizes: Sequence[int] = (1, 1, 1), **_: object
    ) -> int:
        rows = sum(count for other, count in enumerate(input_split_sizes) if other != rank)
        return rows * given[:1].numel() * given.element_size()

    dist.all_to_all_single = counted(dist.all_to_all_single, "exchanged", leaving)
    dist.all_reduce = counted(dist.all_reduce, "summed", lambda value: value.nbytes)
    dist.all_gather = counted(dist.all_gather, "gathered", lambda parts, value: 2 * value.nbytes)
    # 4 super-classes of 5 clusters; each rank has two images of each.
    head = HierarchicalHead(32, torch.arange(4).repeat_interleave(5), seed=0)
    features_BD = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses_B = head.loss_within(features_BD, torch.arange(4).repeat_interleave(2) * 5)
    losses_B.sum().backward()
    of_head, sent_before = dict(sent), dict(sent)
    rows = torch.arange(20) + 20 * rank
    over_all_images(Assignment(torch.zeros(20, dtype=torch.int64), torch.zeros(20), torch.zeros(1, 2)), rows, 60)
    if rank == 0:
        of_labels = {name: sent[name] - sent_before[name] for name in sent}
        torch.save({"head": of_head, "labels": of_labels}, Path(folder, "sent.pt"))
    dist.destroy_process_group()


def test_what_a_spread_head_sends_is_what_it_exchanges(sent_by_three: dict[str, dict[str, int]]) -> None:
    network = replace(NETWORK, dim=32)
    job = replace(SPREAD, network=network, super_clusters=1, clusters=(20,), ranks=3, batch=24)
    sent = sent_by_three["head"]
    # Of the 4 super-classes the first rank owns two.
    assert job.owned_share == 0.5 and sent["exchanged"] > 0
    assert isclose(sent["exchanged"], head_bytes(job)) and not sent.get("summed")


def test_what_labels_send_is_what_is_gathered(sent_by_three: dict[str, dict[str, int]]) -> None:
    expected = traffic(replace(JOB, images=60, ranks=3, clusters=(1,)))["labels"]
    assert isclose(sent_by_three["labels"]["gathered"], expected)


def test_settings_become_a_job() -> None:
    settings = Settings(method="deepcluster-v2", arch="alexnet-small", image_size=32, clusters=(9, 5), sobel=False)
    job = job_of(settings, 1000, 2)
    assert (job.method, job.clusters, job.crops, job.components) == ("deepcluster-v2", (9, 5), ((2, 32),), 128)
    whitened = replace(settings, whiten=True, pca=64)
    assert (job.whitened, job_of(whitened, 1000, 2).whitened, job.number_bytes) == (0, 64, 2)
    assert job_of(replace(settings, precision="fp32"), 1000, 2).number_bytes == 4
    assert job_of(Settings(look_again=False, image_size=64, arch="alexnet-small"), 9, 1).method == "no second look"
    assert job.looks is False and job_of(Settings(image_size=64, arch="alexnet-small"), 9, 1).looks


def test_a_look_takes_a_view_of_each_image() -> None:
    looking = replace(JOB, look_again=True, ranks=1)
    found = seconds(looking, replace(ONES, look_flops=1e9), FABRIC)["look"]
    # 1e5 images of 1e8 operations each, then a crop of 32 x 32 cut by the same core.
    assert isclose(found, 1e5 * (1e8 / 1e9 + 1e-9 * (1 + 32 * 32)))
    assert seconds(replace(looking, look_again=False), ONES, FABRIC)["look"] == 0
