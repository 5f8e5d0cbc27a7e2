"""How long a run of a given size takes, step by step. Pure functions; see scaling.py.

What hardware does in a second comes in as `Constants` and `Fabric`; the rest is of the `Job` (scaling_model.py).
"""

from dataclasses import dataclass
from math import ceil

from scaling_links import Fabric
from scaling_model import GATHERED_BYTES, LABEL_BYTES, LOSS_BYTES, Crops, Job, files, grouped, norm_bytes, norm_calls

# Of a training step, what the backward pass is: gradients may travel meanwhile.
BACKWARD_SHARE = 2 / 3
# Small sums in a round of k-means beside the clusters' own: sizes, inertia, whether to stop. And at the start of each.
SUMS_OF_ROUND, SUMS_OF_START = 3, 8


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
        iteration_seconds: of an iteration of k-means, however few the points.
        row_seconds: of a row in an iteration, however few the centroids, times P.
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
    iteration_seconds: float
    row_seconds: float
    pair_seconds: float
    compared: float
    draw_seconds: float
    order_seconds: float
    gather_seconds: float
    match_seconds: float
    table_seconds: float
    disk_bytes: float


def seconds(job: Job, constants: Constants, fabric: Fabric) -> dict[str, float]:
    """Of an epoch after the first, by step."""
    found = {"look": 0.0, "whitening": 0.0}
    if job.looks:
        side = job.crops[0][1]
        network = job.mine * job.network.flops[side] / constants.look_flops
        found["look"] = side_by_side(network, job.mine * input_seconds(((1, side),), constants), constants)
    if job.whitens:
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
    dim = job.unwhitened
    rows = job.mine * constants.whiten_seconds * (dim * dim + 2 * dim * job.grouped_components)
    each = rows + constants.eigen_seconds * dim**3 + fabric.all_reduce_seconds(8 * dim * dim, job.ranks)
    return each * job.whitenings


def clustering_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Lloyd's iterations, of all heads; of DeeperCluster those of both levels."""
    p, rounds, starts = job.grouped_components, job.iterations + 1, len(job.clusters)
    compared, levels, travel = float(sum(job.clusters)), float(starts), 0.0
    if job.supers:
        compared = job.super_clusters + job.clusters[0] / job.supers
        # A rank works on its super-classes one after the other; each row is in one of them.
        levels, starts = 2.0, 1 + ceil(job.supers / job.ranks)
        travel = fabric.exchange_seconds((4 * p + 44) * job.mine, job.ranks)
    pairs = job.mine * compared * p * constants.pair_seconds * (1 + constants.compared * (rounds - 1))
    rows = rounds * (job.mine * levels * p * constants.row_seconds + starts * constants.iteration_seconds)
    small = starts * (rounds * SUMS_OF_ROUND + SUMS_OF_START) * fabric.all_reduce_seconds(8, job.ranks)
    sums = rounds * sum(fabric.all_reduce_seconds(8 * (p + 1) * k, job.ranks) for k in grouped(job))
    numbers = fabric.all_reduce_seconds(job.images, job.ranks) * len(job.clusters)
    return pairs + rows + travel + small + sums + numbers


def label_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Labels of all images to every rank, matched with those of before; the order of the epoch. Alike on every rank."""
    order = constants.order_seconds if job.is_v2 else constants.draw_seconds
    # The first head alone is numbered as before; clusters of super-classes are not.
    matched = constants.match_seconds if job.method != "deepercluster" else constants.match_seconds / 2
    return gathered_seconds(job, constants, fabric) + job.images * (matched + order)


def gathered_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Labels and distances of all images to every rank, of all heads."""
    counts = len(GATHERED_BYTES) * fabric.all_reduce_seconds(8 * job.ranks, job.ranks)
    travel = sum(fabric.gather_seconds(n_bytes * job.images, job.ranks) for n_bytes in GATHERED_BYTES)
    return len(job.clusters) * (counts + travel + job.images * constants.gather_seconds)


def training_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """All steps of an epoch: the network, or the images where they take longer, and what is summed over the ranks."""
    each = job.batch / job.ranks
    network = 3 * job.step_flops / constants.training_flops
    colours = each * job.pixels * constants.colour_seconds
    gradients = fabric.all_reduce_seconds(4 * job.weights, job.ranks)
    if fabric.overlap:
        gradients = max(0.0, gradients - BACKWARD_SHARE * network)
    calls = 2 * norm_calls(job)
    norms = calls * fabric.all_reduce_seconds(norm_bytes(job) / max(1, calls), job.ranks)
    step = network + colours + gradients + norms + head_seconds(job, fabric) + fabric.all_reduce_seconds(24, job.ranks)
    return job.images / job.batch * side_by_side(step, each * input_seconds(job.crops, constants), constants)


def table_seconds(job: Job, constants: Constants) -> float:
    """What rank 0 writes at the end of an epoch while the others wait, and the layers that a rank owns."""
    owned = 8 * job.layer_weights * job.owned_share
    return job.images * constants.table_seconds + (files(job)["state"] + owned) / constants.disk_bytes


def head_seconds(job: Job, fabric: Fabric) -> float:
    """Of a step's exchanges of the head, one after the other, for the rank that owns most."""
    if not job.supers or job.ranks == 1:
        return 0.0
    features = job.network.dim * job.number_bytes
    rows = (LABEL_BYTES, features, LOSS_BYTES, LOSS_BYTES, features)
    counts = fabric.exchange_seconds(8 * job.ranks, job.ranks)
    return counts + sum(fabric.exchange_seconds(job.owned_rows * row, job.ranks) for row in rows)
