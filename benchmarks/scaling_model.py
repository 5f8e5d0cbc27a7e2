"""What a run of a given size takes of memory, files and what travels. Pure functions; see scaling.py, and for seconds
scaling_seconds.py.

The formulas are counted from the code (docstrings of clustering/ and training/ name the same terms). N images, W ranks,
M = N / W of a rank, K clusters of a head, H heads, P components, D features, S super-clusters, V large crops, B images of
a step.
"""

from dataclasses import dataclass
from math import ceil

METHODS = ("deepcluster", "no second look", "deepcluster-v2", "deepercluster")
ROTATIONS = 4
# Of a row that is sent to the owner of its super-class, beside the features: its label, its loss and the loss's gradient.
LABEL_BYTES, LOSS_BYTES = 8, 4
# Of an image and head what every rank gets: its number, label, number once more, and distance.
GATHERED_BYTES = 8, 8, 8, 4

# How many crops of an image, and of which side.
Crops = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Network:
    """Facts of a trunk.

    Attributes:
        weights: numbers that are learned.
        dim: D.
        norms, channels: BatchNorm layers, and the sum of their channels.
        flops: of one image forward, by the side of the image; a multiplication and an addition are two.
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
        crops: of an image, number and side, large ones first.
        batch: images of a step, of all ranks.
        components: P; of DeepCluster-v2 the projection's.
        whitened: of DeepCluster-v2, to how many components its points are whitened before they are grouped; 0: they are not.
        iterations: of Lloyd.
        super_clusters: S, of DeeperCluster.
        hidden: width of the projection's hidden layer, of DeepCluster-v2.
        look_again: whether DeepCluster-v2 looks at the images before each clustering (its bank is then of one view).
        number_bytes: of a number that the network computes; 2 for bf16.
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
        """Whether it is DeepCluster-v2."""
        return self.method == "deepcluster-v2"

    @property
    def mine(self) -> float:
        """M, images of a rank."""
        return self.images / self.ranks

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return max(1, ceil(self.images / self.batch))

    @property
    def large(self) -> int:
        """V, crops whose points are kept."""
        return 1 if self.look_again else self.crops[0][0]

    @property
    def grouped_components(self) -> int:
        """Of the points as they are grouped."""
        return self.whitened or self.components

    @property
    def whitens(self) -> bool:
        """Whether points are whitened before they are grouped."""
        return not self.is_v2 or self.whitened > 0

    @property
    def unwhitened(self) -> int:
        """Width of the rows that are whitened."""
        return self.components if self.is_v2 else self.network.dim

    @property
    def whitenings(self) -> int:
        """How many whitenings are made: of each large crop that is kept its own."""
        return self.large if self.is_v2 else 1

    @property
    def looks(self) -> bool:
        """Whether all images are looked at before each clustering."""
        return self.look_again if self.is_v2 else self.method != "no second look"

    @property
    def supers(self) -> int:
        """Super-classes, each with a layer of its own on one rank; 0: the head is a whole, on every rank."""
        return self.super_clusters * ROTATIONS if self.method == "deepercluster" else 0

    @property
    def owned_share(self) -> float:
        """Share of the super-classes that the busiest rank owns; they are taken to be of one size."""
        return ceil(self.supers / self.ranks) / self.supers if self.supers else 0.0

    @property
    def head_weights(self) -> float:
        """Of what is learned on top of the trunk, on every rank: a head, that of the super-classes, or a projection."""
        dim = self.network.dim
        if self.is_v2:
            return dim * self.hidden + self.hidden * (3 + self.components) + self.components
        return (dim + 1.0) * (self.supers or self.clusters[0])

    @property
    def layer_weights(self) -> float:
        """Of the clusters' layers of all super-classes, each of which is on one rank."""
        return (self.network.dim + 1.0) * self.clusters[0] if self.supers else 0.0

    @property
    def weights(self) -> float:
        """All that are learned and are on every rank: their gradients are summed."""
        return self.network.weights + self.head_weights

    @property
    def image_flops(self) -> float:
        """Forward, of all crops of an image, the head's or the prototypes' too; not of its super-class's layer."""
        crops = sum(number for number, _ in self.crops)
        on_top = self.head_weights + (sum(self.clusters) * self.components if self.is_v2 else 0)
        return sum(number * self.network.flops[side] for number, side in self.crops) + 2 * crops * on_top

    @property
    def owned_rows(self) -> float:
        """Images of a step, of all ranks, whose losses the busiest owner computes."""
        return self.batch * self.owned_share

    @property
    def step_flops(self) -> float:
        """Forward, of a step on the busiest rank: its own images, and those of the super-classes that it owns."""
        layer = 2 * self.layer_weights / self.supers if self.supers else 0.0
        return self.batch / self.ranks * self.image_flops + self.owned_rows * layer

    @property
    def pixels(self) -> float:
        """Of all crops of an image."""
        return sum(number * side * side for number, side in self.crops)


def memory(job: Job) -> dict[str, float]:
    """Bytes of a rank at the moment when each is largest: on the device first, then of the machine ("host")."""
    n, m, p, d = job.images, job.mine, job.components, job.network.dim
    k = max(job.clusters)
    heads = len(job.clusters)
    # Weights, gradients, momentum, and DDP's copy of the gradients.
    found = {"weights": 4 * job.weights * (4 if job.ranks > 1 else 3)}
    if job.supers:
        # Their gradients stay where they are.
        found["layers of its super-classes"] = 4 * job.layer_weights * job.owned_share * 3
    if job.is_v2:
        # Kept as they come, put in order as a copy, and one head's as float32, scaled, and as bf16.
        found["bank"] = 4 * m * job.large * p + 10 * m * p
    else:
        found["points"] = 6 * m * p + ((8 * p + 48) * m if job.method == "deepercluster" else 0)
        found["covariance"] = 12 * d * d + 8 * d * max(2048, d)
        found["host: features"] = m * d * (2 if d > 1024 else 4) * (2 if job.method == "no second look" else 1)
    # Float64 sums of this rank and of all, means, and float32 centroids of now and before.
    groups = k if job.method != "deepercluster" else k / max(1, job.super_clusters * ROTATIONS)
    q = job.grouped_components
    found["centroids and sums"] = groups * q * (3 * 8 + 3 * 4) + (8 * k * q if groups != k else 0)
    found["numbers of images"] = n + 8 * m
    # Where a cluster is empty at the end: an order of this rank's points (repair.py).
    found["repair of empty clusters"] = 16 * m
    found["host: labels and distances"] = 12 * n * heads * 2  # Of now and of before, while they are matched.
    found["host: labels as they are gathered"] = 32 * n if job.ranks > 1 else 16 * n
    found["host: order of an epoch"] = 8 * n if job.is_v2 else 80 * n
    found["host: names"] = (8 + job.name_bytes) * n
    return found


def main_memory(job: Job) -> dict[str, float]:
    """Bytes that rank 0 takes beside: names as Python's strings, and the table that is written of them."""
    return {"host: table": (57 + 8 + 4 * job.name_bytes + 40) * job.images}


def files(job: Job) -> dict[str, float]:
    """Bytes in the run folder: of the last state, of all ranks' rows and layers, of one epoch's table."""
    state = 8 * job.weights + 12 * job.images * len(job.clusters) + 4 * job.components * sum(job.clusters)
    # Points are saved where a clustering was stopped; every rank reads the rows of all to go on.
    row = 16 + 2 * job.components * job.large if job.is_v2 else 4 * job.components + 8
    if job.method == "no second look":
        row = 2 * (2 * job.network.dim + 16)
    layers = {"layers": 8 * job.layer_weights} if job.supers else {}
    return {"state": state, **layers, "rows": row * job.images, "table": (12 + job.name_bytes) * job.images}


def traffic(job: Job) -> dict[str, float]:
    """Bytes that a rank sends in an epoch, by what for; of the head the rank that owns most."""
    if job.ranks == 1:
        return {}
    once = (job.ranks - 1) / job.ranks  # What a rank sends of n bytes that are gathered; of a sum twice that.
    sums, p, n = 2 * once, job.grouped_components, job.images
    found = {
        "gradients": sums * 4 * job.weights * job.steps,
        "BatchNorm": sums * (norm_bytes(job) + 24) * job.steps,
        "sums of clusters": sums * sum(8 * (p + 1) * k * (job.iterations + 1) + 4 * p * k for k in grouped(job)),
        "numbers of images": sums * n * len(job.clusters),
        "labels": once * sum(GATHERED_BYTES) * n * len(job.clusters),
    }
    if job.whitens:
        found["whitening"] = sums * 8 * job.unwhitened**2 * job.whitenings
    if job.supers:
        found["features to the head and back"] = head_bytes(job) * job.steps
        found["points to their group and back"] = once * (4 * p + 44) * job.mine
        found["numbers of images"] *= 2
        found["sums of clusters"] += sums * 4 * p * job.clusters[0]
    if job.method == "no second look":
        found["features to their rank"] = once * (16 + 2 * job.network.dim) * job.mine
    return found


def grouped(job: Job) -> tuple[float, ...]:
    """Clusters whose sums travel over all ranks; within super-clusters a group of one rank sends nothing."""
    if not job.supers:
        return job.clusters
    inside = job.clusters[0] / job.supers if job.ranks > job.supers else 0.0
    return job.super_clusters, inside


def head_bytes(job: Job) -> float:
    """That the busiest owner sends in a step: its images' features there, its owned images' gradients back.

    Features go in the network's own type. Of each image a label goes there, its loss back, and the loss's gradient there.
    Beside them to each rank the number of rows that come.
    """
    once, features = (job.ranks - 1) / job.ranks, job.network.dim * job.number_bytes
    there = job.batch / job.ranks * (1 - job.owned_share) * (features + LABEL_BYTES + LOSS_BYTES)
    back = once * job.owned_rows * (features + LOSS_BYTES)
    return there + back + once * 8 * job.ranks


def norm_bytes(job: Job) -> float:
    """Of the statistics that are summed in a step: float64 forward, float32 backward, for each size of crops."""
    channels = job.network.channels * len(job.crops) + (job.hidden if job.is_v2 else 0)
    return 8 * (2 * channels + norm_calls(job)) + 4 * 2 * channels


def norm_calls(job: Job) -> int:
    """Layers of BatchNorm that are run forward in a step."""
    return job.network.norms * len(job.crops) + int(job.is_v2)
