"""The batches of an epoch: where they lie in the order of its images, and which part of each belongs to this rank."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from deepcluster.core.distributed import Ranks, part_of
from deepcluster.core.errors import InputError
from deepcluster.core.text import are, count_of
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import View


def even_batches(count: int, batch_size: int, ranks: Ranks) -> list[slice]:
    """Return the positions of the batches of an epoch. Sizes differ by at most one, so none is too small for BatchNorm.

    Raises:
        InputError: they are too small to give an image to each rank.
    """
    n_batches = max(1, min(-(-count // batch_size), count // 2))
    if count < ranks.size:
        raise InputError(f"{are(count, 'image')} too few for {ranks.size} processes: use {max(1, count // 2)} or fewer")
    if count // n_batches < ranks.size:
        raise InputError(
            f"a batch of {count_of(count // n_batches, 'image')} is too small for {ranks.size} processes: use --batch-size "
            f"{2 * ranks.size} or more (it counts the images of all processes), or fewer processes"
        )
    return [part_of(count, number, n_batches) for number in range(n_batches)]


def part_of_batch(positions: slice, ranks: Ranks) -> slice:
    """Return this rank's part of the positions of a batch."""
    mine = ranks.part(positions.stop - positions.start)
    return slice(positions.start + mine.start, positions.start + mine.stop)


def training_batches(
    loader: Loader,
    view: View,
    order_N: Tensor,
    batches: Sequence[slice],
    ranks: Ranks,
    *,
    seed: int,
    epoch: int,
    first: int = 0,
) -> Iterator[tuple[int, Batch, slice]]:
    """Yield number, this rank's part and the positions (over all ranks) of each batch of an epoch, from batch `first` on.

    Args:
        view: what the network sees of an image.
        order_N: indices of the images in the order of the epoch.
        batches: what `even_batches` returns.
        seed, epoch: the random views depend on them and on the position.
    """
    parts = [part_of_batch(positions, ranks) for positions in batches]
    views = loader.training_views(view, order_N, parts, seed=seed, epoch=epoch, first_batch=first)
    yield from zip(range(first, len(batches)), views, batches[first:], strict=True)
