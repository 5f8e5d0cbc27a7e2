"""Time of a run of a given size, step by step. Pure functions; see scaling.py.

The speed of the hardware is in `Constants` and `Fabric`, the size of the run in `Job` (scaling_model.py).
"""

from dataclasses import dataclass

from scaling_links import Fabric
from scaling_model import GATHERED_BYTES, Crops, Job, clusterings, files, norm_bytes, norm_calls

# Share of the backward pass in a training step, during which gradients may travel.
BACKWARD_SHARE = 2 / 3
# Small sums per round of k-means besides those of the points: sizes, inertia, whether to stop. And at the start of each run.
SUMS_OF_ROUND, SUMS_OF_START = 3, 8


@dataclass(frozen=True)
class Constants:
    """Speed of a rank: operations or bytes per second, or seconds per unit of work.

    Attributes:
        training_flops, feature_flops: operations per second of a training step, and of a forward pass.
        cores: that prepare a rank's images; 0: the network's own core does, between the steps.
        decode_seconds: per image on one core.
        kept: share of the images that are kept decoded in memory.
        crop_seconds, pixel_seconds: per crop that is cut and scaled, and per pixel of it, on one core.
        colour_seconds: per pixel of colour augmentation, on the network's device.
        whiten_seconds: per row and D².
        eigen_seconds: per D³, once.
        iteration_seconds: per iteration of k-means, however few the points.
        row_seconds: per row, component and iteration, however few the centroids.
        pair_seconds: per component and compared pair of a row and a centroid.
        compared: mean share of all pairs that are compared in an iteration.
        draw_seconds: per image drawn uniformly over clusters; order_seconds: per image of a random order.
        gather_seconds: per image and head, to put a gathered label into place.
        match_seconds: per image, to match cluster numbers with the previous ones and compute NMI.
        table_seconds: per image of an epoch's table.
        disk_bytes: bytes per second at which a checkpoint is written.
    """

    training_flops: float
    feature_flops: float
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
    """Return the seconds of an epoch after the first, by step."""
    found = {"features": 0.0, "whitening": 0.0}
    if job.extracts:
        side = job.crops[0][1]
        network = job.mine * job.network.flops[side] / constants.feature_flops
        found["features"] = side_by_side(network, job.mine * input_seconds(((1, side),), constants), constants)
    if job.whitens:
        found["whitening"] = whitening_seconds(job, constants, fabric)
    found["clustering"] = clustering_seconds(job, constants, fabric)
    found["labels"] = label_seconds(job, constants, fabric)
    found["training"] = training_seconds(job, constants, fabric)
    found["table and state"] = table_seconds(job, constants)
    return found


def input_seconds(crops: Crops, constants: Constants) -> float:
    """Return the seconds per image on all cores of a rank: decoding, unless it is kept, and crops."""
    work = (1 - constants.kept) * constants.decode_seconds
    work += sum(number * (constants.crop_seconds + side * side * constants.pixel_seconds) for number, side in crops)
    return work / (constants.cores or 1)


def side_by_side(network: float, images: float, constants: Constants) -> float:
    """Return the longer of the two, or their sum if they share a core."""
    return max(network, images) if constants.cores else network + images


def whitening_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Return the seconds of the covariance, its eigenvectors (the same on every rank), and the points."""
    dim = job.unwhitened
    rows = job.mine * constants.whiten_seconds * (dim * dim + 2 * dim * job.point_components)
    each = rows + constants.eigen_seconds * dim**3 + fabric.all_reduce_seconds(8 * dim * dim, job.ranks)
    return each * job.whitenings


def clustering_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Return the seconds of Lloyd's iterations of all heads; for DeeperCluster of both levels."""
    p, rounds, starts = job.point_components, job.iterations + 1, len(job.clusters)
    compared, levels = float(sum(job.clusters)), float(starts)
    if job.supers:
        compared = job.super_clusters + job.clusters[0] / job.supers
        # All ranks work on the super-classes one after the other; each row is in one of them.
        levels, starts = 2.0, 1 + job.supers
    pairs = job.mine * compared * p * constants.pair_seconds * (1 + constants.compared * (rounds - 1))
    rows = rounds * (job.mine * levels * p * constants.row_seconds + starts * constants.iteration_seconds)
    small = starts * (rounds * SUMS_OF_ROUND + SUMS_OF_START) * fabric.all_reduce_seconds(8, job.ranks)
    sums = rounds * sum(times * fabric.all_reduce_seconds(8 * (p + 1) * k, job.ranks) for k, times in clusterings(job))
    return pairs + rows + small + sums


def label_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Return the seconds to gather labels, match them with the previous ones, and draw the order; the same on every rank."""
    order = constants.order_seconds if job.is_v2 else constants.draw_seconds
    # Only the first head's clusters are matched; those of super-classes are not.
    matched = constants.match_seconds if job.method != "deepercluster" else constants.match_seconds / 2
    return gathered_seconds(job, constants, fabric) + job.images * (matched + order)


def gathered_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Return the seconds until every rank has the labels and distances of all images and heads."""
    counts = len(GATHERED_BYTES) * fabric.all_reduce_seconds(8 * job.ranks, job.ranks)
    travel = sum(fabric.gather_seconds(n_bytes * job.images, job.ranks) for n_bytes in GATHERED_BYTES)
    return len(job.clusters) * (counts + travel + job.images * constants.gather_seconds)


def training_seconds(job: Job, constants: Constants, fabric: Fabric) -> float:
    """Return the seconds of all steps of an epoch: the slower of network and images, and the sums over ranks."""
    each = job.batch / job.ranks
    network = 3 * job.step_flops / constants.training_flops
    colours = each * job.pixels * constants.colour_seconds
    gradients = fabric.all_reduce_seconds(4 * job.weights, job.ranks)
    if fabric.overlap:
        gradients = max(0.0, gradients - BACKWARD_SHARE * network)
    calls = 2 * norm_calls(job)
    norms = calls * fabric.all_reduce_seconds(norm_bytes(job) / max(1, calls), job.ranks)
    step = network + colours + gradients + norms + fabric.all_reduce_seconds(24, job.ranks)
    return job.images / job.batch * side_by_side(step, each * input_seconds(job.crops, constants), constants)


def table_seconds(job: Job, constants: Constants) -> float:
    """Return the seconds in which rank 0 writes table and state at the end of an epoch while the others wait."""
    return job.images * constants.table_seconds + files(job)["state"] / constants.disk_bytes
