"""Memory, files and traffic of a run of a given size. Pure functions; see scaling.py, and scaling_seconds.py for times.

The formulas are counted from the code (docstrings of clustering/ and training/ name the same terms). N images, W ranks,
M = N / W images of a rank, K clusters of a head, H heads, P components, D features, S super-clusters, V large crops,
B images per step.
"""

from dataclasses import dataclass
from math import ceil

METHODS = ("deepcluster", "deepcluster-v2", "deepercluster")
ROTATIONS = 4
# Bytes that every rank receives per image and head: label and distance.
GATHERED_BYTES = 8, 4

# Number of crops per image, and their side.
Crops = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Network:
    """Facts of a trunk.

    Attributes:
        weights: number of trainable weights.
        dim: D.
        norms, channels: number of BatchNorm layers, and the sum of their channels.
        flops: floating-point operations of a forward pass of one image, by its side; a multiply-add counts as two.
    """

    weights: int
    dim: int
    norms: int
    channels: int
    flops: dict[int, float]


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        images, ranks: N, W.
        clusters: K of each head.
        crops: number and side of an image's crops, large ones first.
        batch: images per step, over all ranks.
        components: P; for DeepCluster-v2 the projection's.
        whitened: components after whitening of DeepCluster-v2's points; 0: they are not whitened.
        iterations: Lloyd iterations.
        super_clusters: S, for DeeperCluster.
        hidden: width of the projection's hidden layer, for DeepCluster-v2.
        look_again: True if DeepCluster-v2 extracts features before each clustering (its bank then has one view).
        number_bytes: bytes of a number in the network; 2 for bf16.
    """

    method: str
    images: float
    ranks: int
    network: Network
    clusters: tuple[int, ...]
    crops: Crops
    batch: int
    components: int
    iterations: int = 20
    super_clusters: int = 0
    hidden: int = 2048
    look_again: bool = False
    whitened: int = 0
    name_bytes: int = 24
    number_bytes: int = 2

    @property
    def is_v2(self) -> bool:
        """True for DeepCluster-v2."""
        return self.method == "deepcluster-v2"

    @property
    def mine(self) -> float:
        """M, images of a rank."""
        return self.images / self.ranks

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return max(1, ceil(self.images / self.batch))

    @property
    def large(self) -> int:
        """V, crops whose points are kept."""
        return 1 if self.look_again else self.crops[0][0]

    @property
    def point_components(self) -> int:
        """Components of the points that are clustered."""
        return self.whitened or self.components

    @property
    def whitens(self) -> bool:
        """True if points are whitened before they are clustered."""
        return not self.is_v2 or self.whitened > 0

    @property
    def unwhitened(self) -> int:
        """Width of the rows that are whitened."""
        return self.components if self.is_v2 else self.network.dim

    @property
    def whitenings(self) -> int:
        """Number of whitenings: one for each large crop that is kept."""
        return self.large if self.is_v2 else 1

    @property
    def extracts(self) -> bool:
        """True if features of all images are extracted before each clustering."""
        return self.look_again or not self.is_v2

    @property
    def supers(self) -> int:
        """Number of super-classes, pairs of super-cluster and rotation; 0: clusters are not hierarchical."""
        return self.super_clusters * ROTATIONS if self.method == "deepercluster" else 0

    @property
    def head_weights(self) -> float:
        """Trainable weights on top of the trunk: a head, with its super-classes if it has any, or a projection."""
        dim = self.network.dim
        if self.is_v2:
            return dim * self.hidden + self.hidden * (3 + self.components) + self.components
        return (dim + 1.0) * (self.supers + self.clusters[0])

    @property
    def weights(self) -> float:
        """All trainable weights; every rank has them, and their gradients are summed."""
        return self.network.weights + self.head_weights

    @property
    def image_flops(self) -> float:
        """Operations of a forward pass of all crops of an image, head or prototypes included.

        In a hierarchical head an image needs the super-classes and the clusters of its own super-class.
        """
        crops = sum(number for number, _ in self.crops)
        if self.is_v2:
            on_top = self.head_weights + sum(self.clusters) * self.components
        else:
            on_top = (self.network.dim + 1.0) * (self.supers + self.clusters[0] / max(1, self.supers))
        return sum(number * self.network.flops[side] for number, side in self.crops) + 2 * crops * on_top

    @property
    def step_flops(self) -> float:
        """Operations of a forward pass of a rank's images of a step."""
        return self.batch / self.ranks * self.image_flops

    @property
    def pixels(self) -> float:
        """Pixels of all crops of an image."""
        return sum(number * side * side for number, side in self.crops)


def memory(job: Job) -> dict[str, float]:
    """Return the peak bytes of a rank, by content: on the device first, then on the machine ("host")."""
    n, m, p, d = job.images, job.mine, job.components, job.network.dim
    k = max(job.clusters)
    heads = len(job.clusters)
    # Weights, gradients, momentum, and DDP's copy of the gradients.
    found = {"weights": 4 * job.weights * (4 if job.ranks > 1 else 3)}
    if job.is_v2:
        # Stored, copied into order, and one head's as float32, scaled, and as bf16.
        found["bank"] = 4 * m * job.large * p + 10 * m * p
    else:
        # Hierarchical: also those of one super-class.
        found["points"] = 6 * m * p + (10 * p * m / job.super_clusters if job.supers else 0)
        found["covariance"] = 12 * d * d + 8 * d * max(2048, d)
        found["host: features"] = m * d * (2 if d > 1024 else 4)
    # Float64 sums of this rank and of all, means, and float32 centroids of this and the previous iteration.
    inner, q = k / max(1, job.supers), job.point_components
    found["centroids and sums"] = inner * q * (3 * 8 + 3 * 4) + (8 * k * q if job.supers else 0)
    # If a cluster is empty at the end: an order of this rank's points (starts.py).
    found["repair of empty clusters"] = 16 * m
    found["host: labels and distances"] = 12 * n * heads * 2  # Current and previous, while they are matched.
    found["host: labels while they are gathered"] = 16 * n if job.ranks > 1 else 0.0
    found["host: order of an epoch"] = 8 * n if job.is_v2 else 80 * n
    found["host: names"] = (8 + job.name_bytes) * n
    return found


def main_memory(job: Job) -> dict[str, float]:
    """Return the additional bytes of rank 0: names as Python strings, and the table that is written from them."""
    return {"host: table": (57 + 8 + 4 * job.name_bytes + 40) * job.images}


def files(job: Job) -> dict[str, float]:
    """Return the bytes in the run folder: the last state, the rows of all ranks, the table of one epoch."""
    state = 8 * job.weights + 12 * job.images * len(job.clusters) + 4 * job.components * sum(job.clusters)
    rows = {"rows": (16 + 2 * job.components * job.large) * job.images} if job.is_v2 else {}
    return {"state": state, **rows, "table": (12 + job.name_bytes) * job.images}


def traffic(job: Job) -> dict[str, float]:
    """Return the bytes that a rank sends per epoch, by purpose."""
    if job.ranks == 1:
        return {}
    once = (job.ranks - 1) / job.ranks  # What a rank sends of n gathered bytes; twice that for a sum.
    sums, p, n = 2 * once, job.point_components, job.images
    found = {
        "gradients": sums * 4 * job.weights * job.steps,
        "BatchNorm": sums * (norm_bytes(job) + 24) * job.steps,
        "sums of clusters": sums
        * sum(times * (8 * (p + 1) * k * (job.iterations + 1) + 4 * p * k) for k, times in clusterings(job)),
        "labels": once * sum(GATHERED_BYTES) * n * len(job.clusters),
    }
    if job.whitens:
        found["whitening"] = sums * 8 * job.unwhitened**2 * job.whitenings
    return found


def clusterings(job: Job) -> tuple[tuple[float, int], ...]:
    """Return the runs of k-means per clustering: number of clusters, and how many runs have it."""
    if not job.supers:
        return tuple((k, 1) for k in job.clusters)
    return (job.super_clusters, 1), (job.clusters[0] / job.supers, job.supers)


def norm_bytes(job: Job) -> float:
    """Return the bytes of BatchNorm statistics summed per step: float64 forward, float32 backward, per size of crops."""
    channels = job.network.channels * len(job.crops) + (job.hidden if job.is_v2 else 0)
    return 8 * (2 * channels + norm_calls(job)) + 4 * 2 * channels


def norm_calls(job: Job) -> int:
    """Return the number of BatchNorm layers of the forward passes of a step."""
    return job.network.norms * len(job.crops) + int(job.is_v2)
