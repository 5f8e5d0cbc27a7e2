"""Where in the order of an epoch its batches are, and which part of each is this rank's."""

from deepcluster.core.distributed import part_of, rank, world_size
from deepcluster.core.errors import InputError


def even_batches(count: int, batch_size: int) -> list[slice]:
    """Positions of the batches of an epoch, which differ by one image at most: none is too small for BatchNorm.

    Raises:
        InputError: they are too small to give an image to each rank.
    """
    n_batches = max(1, min(-(-count // batch_size), count // 2))
    if count < world_size():
        raise InputError(f"{count} images are too few for {world_size()} processes: use {max(1, count // 2)} or fewer")
    if count // n_batches < world_size():
        raise InputError(
            f"a batch of {count // n_batches} images is too small for {world_size()} processes: use --batch-size "
            f"{2 * world_size()} or more (it counts the images of all processes), or fewer processes"
        )
    return [part_of(count, number, n_batches) for number in range(n_batches)]


def part_of_slice(positions: slice) -> slice:
    """This rank's part of the positions of a batch."""
    mine = part_of(positions.stop - positions.start, rank(), world_size())
    return slice(positions.start + mine.start, positions.start + mine.stop)
