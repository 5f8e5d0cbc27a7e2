"""What a run of a given size takes: memory of a rank, bytes moved, seconds of each step. Pure functions; see scaling.py.

The formulas are counted from the code (docstrings of clustering/ and training/ name the same terms); what hardware does in
a second comes in as `Constants` and `Fabric`. N images, W ranks, M = N / W of a rank, K clusters of a head, H heads,
P components, D features, S super-clusters, V large crops.
"""

from dataclasses import dataclass
from math import ceil

from scaling_links import Fabric

METHODS = ("deepcluster", "no second look", "deepcluster-v2", "deepercluster")
# DDP sums gradients in parts of this size.
BUCKET_BYTES = 25 << 20
# Of a training step, what the backward pass is: gradients may travel meanwhile.
BACKWARD_SHARE = 2 / 3
ROTATIONS = 4

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
class Constants:
    """What a rank does in a second, or how long a unit of each kind of work takes it.

    Attributes:
        training_flops, look_flops: of the network, forward and backward, and forward alone.
        cores: that prepare a rank's images; 0: the network's own core does, between the steps.
        decode_seconds: of one image on one core.
        kept: share of the images that are in memory, decoded, when they are wanted.
        crop_seconds, pixel_seconds: of a crop that is cut and scaled, and of each of its pixels, on one core.
        colour_seconds: of a pixel whose colours change, where the network runs.
        whiten_seconds: of a row, times D².
        eigen_seconds: of D³, once.
        pair_seconds: of a row and a centroid that are compared, times P.
        compared: share of all pairs that are compared in an iteration, on average.
        draw_seconds: of an image that is drawn evenly over clusters; order_seconds: of one that is put into a random order.
        gather_seconds: of an image whose label is put to its place, for each head.
        match_seconds: of an image whose cluster is numbered as before and compared with before.
        table_seconds: of an image, in the table of an epoch.
        disk_bytes: that a checkpoint is written with a second.
    """

    training_flops: float
    look_flops: float
    cores: float
    decode_seconds: float
    kept: float
    crop_seconds: float
    pixel_seconds: float
    colour_seconds: float
    whiten_seconds: float
    eigen_seconds: float
    pair_seconds: float
    compared: float
    draw_seconds: float
    order_seconds: float
    gather_seconds: float
    match_seconds: float
    table_seconds: float
    disk_bytes: float


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        images, ranks: N, W.
        clusters: K of each head.
        crops: of an image, number and side, large ones first.
        batch: images of a step, of all ranks.
        components: P.
        iterations: of Lloyd.
        super_clusters: S, of DeeperCluster.
        hidden: width of the projection's hidden layer, of DeepCluster-v2.
        look_again: whether DeepCluster-v2 looks at the images before each clustering (its bank is then of one view).
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
    name_bytes: int = 24

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
    def looks(self) -> bool:
        """Whether all images are looked at before each clustering."""
        return self.look_again if self.is_v2 else self.method != "no second look"

    @property
    def head_weights(self) -> float:
        """Of what lies on the trunk and is learned: a head, or a projection."""
        dim = self.network.dim
        if self.is_v2:
            return dim * self.hidden + self.hidden * (3 + self.components) + self.components
        supers = self.super_clusters * ROTATIONS if self.method == "deepercluster" else 0
        return (dim + 1.0) * (self.clusters[0] + supers)

    @property
    def weights(self) -> float:
        """All that are learned."""
        return self.network.weights + self.head_weights

    @property
    def image_flops(self) -> float:
        """Forward, of all crops of an image, the head's or the prototypes' too."""
        crops = sum(number for number, _ in self.crops)
        if self.is_v2:
            on_top = self.head_weights + sum(self.clusters) * self.components
        elif self.method == "deepercluster":
            on_top = self.head_weights / (self.super_clusters * ROTATIONS)
        else:
            on_top = self.head_weights
        return sum(number * self.network.flops[side] for number, side in self.crops) + 2 * crops * on_top

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
    if job.is_v2:
        # Kept as they come, put in order as a copy, and one head's as float32, scaled, and as bf16.
        found["bank"] = 4 * m * job.large * p + 10 * m * p
    else:
        found["points"] = 6 * m * p + ((8 * p + 48) * m if job.method == "deepercluster" else 0)
        found["covariance"] = 12 * d * d + 8 * d * max(2048, d)
        found["host: features"] = m * d * (2 if d > 1024 else 4) * (2 if job.method == "no second look" else 1)
    # Float64 sums of this rank and of all, means, and float32 centroids of now and before.
    groups = k if job.method != "deepercluster" else k / max(1, job.super_clusters * ROTATIONS)
    found["centroids and sums"] = groups * p * (3 * 8 + 3 * 4) + (8 * k * p if groups != k else 0)
    found["numbers of images"] = n + 8 * m
    # Where a cluster is empty at the end: distances and labels of all images, and their orders (repair.py).
    found["repair of empty clusters"] = 48 * n
    found["host: labels and distances"] = 12 * n * heads * 2  # Of now and of before, while they are matched.
    found["host: labels as they are gathered"] = 32 * n if job.ranks > 1 else 16 * n
    found["host: order of an epoch"] = 8 * n if job.is_v2 else 80 * n
    found["host: names"] = (8 + job.name_bytes) * n
    return found


def main_memory(job: Job) -> dict[str, float]:
    """Bytes that rank 0 takes beside: names as Python's strings, and the table that is written of them."""
    return {"host: table": (57 + 8 + 4 * job.name_bytes + 40) * job.images}


def files(job: Job) -> dict[str, float]:
    """Bytes in the run folder: of the last state, of all ranks' rows, of one epoch's table."""
    state = 8 * job.weights + 12 * job.images * len(job.clusters) + 4 * job.components * sum(job.clusters)
    # Points are saved where a clustering was stopped; every rank reads the rows of all to go on.
    row = 16 + 2 * job.components * job.large if job.is_v2 else 4 * job.components + 8
    if job.method == "no second look":
        row = 2 * (2 * job.network.dim + 16)
    return {"state": state, "rows": row * job.images, "table": (12 + job.name_bytes) * job.images}


def traffic(job: Job) -> dict[str, float]:
    """Bytes that a rank sends in an epoch, by what for."""
    if job.ranks == 1:
        return {}
    once = (job.ranks - 1) / job.ranks  # What a rank sends of n bytes that are gathered; of a sum twice that.
    sums, p, n = 2 * once, job.components, job.images
    found = {
        "gradients": sums * 4 * job.weights * job.steps,
        "BatchNorm": sums * (norm_bytes(job) + 24) * job.steps,
        "sums of clusters": sums * sum(8 * (p + 1) * k * (job.iterations + 1) + 4 * p * k for k in grouped(job)),
        "numbers of images": sums * n * len(job.clusters),
        "labels": once * 28 * n * len(job.clusters),
    }
    if not job.is_v2:
        found["whitening"] = sums * 8 * job.network.dim**2
    if job.method == "deepercluster":
        found["points to their group and back"] = once * (4 * p + 44) * job.mine
        found["numbers of images"] *= 2
        found["sums of clusters"] += sums * 4 * p * job.clusters[0]
    if job.method == "no second look":
        found["features to their rank"] = once * (16 + 2 * job.network.dim) * job.mine
    return found


def grouped(job: Job) -> tuple[float, ...]:
    """Clusters whose sums travel over all ranks; within super-clusters a group of one rank sends nothing."""
    if job.method != "deepercluster":
        return job.clusters
    supers = job.super_clusters * ROTATIONS
    inside = job.clusters[0] / supers * ceil(supers / job.ranks) if job.ranks > supers else 0.0
    return job.super_clusters, inside


def norm_bytes(job: Job) -> float:
    """Of the statistics that are summed in a step: float64 forward, float32 backward, for each size of crops."""
    channels = job.network.channels * len(job.crops) + (job.hidden if job.is_v2 else 0)
    return 8 * (2 * channels + norm_calls(job)) + 4 * 2 * channels


def norm_calls(job: Job) -> int:
    """Layers of BatchNorm that are run forward in a step."""
    return job.network.norms * len(job.crops) + int(job.is_v2)


def seconds(job: Job, constants: Constants, fabric: Fabric) -> dict[str, float]:
    """Of an epoch after the first, by step."""
    found = {"look": 0.0, "whitening": 0.0}
    if job.looks:
        side = job.crops[0][1]
        network = job.mine * job.network.flops[side] / constants.look_flops
        found["look"] = side_by_side(network, job.mine * input_seconds(((1, side),), constants), constants)
    if not job.is_v2:
        found["whitening"] = whitening_seconds(job, constants, fabric)
    found["clustering"] = clustering_seconds(job, constants, fabric)
    found["labels"] = label_seconds(job, constants, fabric)
    found["training"] = training_seconds(job, constants, fabric)
    found["table and state"] = table_seconds(job, constants)
    return found


def input_seconds(crops: Crops, constants: Constants) -> float:
    """Of an image on all cores of a rank: decoded where it is not kept, and cut into crops."""
    work = (1 - constants.kept) * constants.decode_seconds
    work += sum(number * (constants.crop_seconds + side * side * constants.pixel_seconds) for number, side in crops)
    return work / (constants.cores or 1)


def side_by_side(network: float, images: float, constants: Constants) -> float:
    """The longer of the two, or both where they share a core."""
    return max(network, images) if constants.cores else network + images


def whitening_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Covariance, its eigenvectors (alike on every rank), and the points."""
    dim = job.network.dim
    rows = job.mine * constants.whiten_seconds * (dim * dim + 2 * dim * job.components)
    return rows + constants.eigen_seconds * dim**3 + fabric.all_reduce_seconds(8 * dim * dim, job.ranks)


def clustering_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Lloyd's iterations, of all heads; of DeeperCluster those of both levels."""
    p, rounds = job.components, job.iterations + 1
    if job.method == "deepercluster":
        compared = job.super_clusters + job.clusters[0] / (job.super_clusters * ROTATIONS)
        travel = fabric.exchange_seconds((4 * p + 44) * job.mine, job.ranks)
    else:
        compared, travel = sum(job.clusters), 0.0
    pairs = job.mine * compared * p * constants.pair_seconds * (1 + constants.compared * (rounds - 1))
    sums = sum(fabric.all_reduce_seconds(8 * (p + 1) * k, job.ranks) for k in grouped(job))
    numbers = fabric.all_reduce_seconds(job.images, job.ranks) * len(job.clusters)
    return pairs + travel + rounds * sums + numbers


def label_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Labels of all images to every rank, matched with those of before; the order of the epoch. Alike on every rank."""
    gathered = fabric.gather_seconds(28 * job.images * len(job.clusters), job.ranks)
    order = constants.order_seconds if job.is_v2 else constants.draw_seconds
    # The first head alone is numbered as before; clusters of super-classes are not.
    matched = constants.match_seconds if job.method != "deepercluster" else constants.match_seconds / 2
    return gathered + job.images * (constants.gather_seconds * len(job.clusters) + matched + order)


def training_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """All steps of an epoch: the network, or the images where they take longer, and what is summed over the ranks."""
    each = job.batch / job.ranks
    network = each * 3 * job.image_flops / constants.training_flops
    colours = each * job.pixels * constants.colour_seconds
    gradients = fabric.all_reduce_seconds(4 * job.weights, job.ranks)
    if fabric.overlap:
        gradients = max(0.0, gradients - BACKWARD_SHARE * network)
    calls = 2 * norm_calls(job)
    norms = calls * fabric.all_reduce_seconds(norm_bytes(job) / max(1, calls), job.ranks)
    step = network + colours + gradients + norms + fabric.all_reduce_seconds(24, job.ranks)
    return job.images / job.batch * side_by_side(step, each * input_seconds(job.crops, constants), constants)


def table_seconds(job: Job, constants: Constants) -> float:
    """What rank 0 writes at the end of an epoch while the others wait."""
    return job.images * constants.table_seconds + files(job)["state"] / constants.disk_bytes
