"""A pass over the images of a source: what is computed from the centre view of each, in memory or in numbered parts.

N images, B batch.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import DeepClusterError
from deepcluster.core.retry import ConnectionLost
from deepcluster.core.work import Advance, Interruption, Work
from deepcluster.data.loader import Loader
from deepcluster.data.views import ClusterView
from deepcluster.run.parts import Columns, Parts, check_shared


@dataclass(frozen=True)
class Pass:
    """What a pass computes.

    Attributes:
        empty: the row of an unreadable image by column: its shape, its type and its values.
        compute: takes uint8 images (B, 3, S, S) to rows (B, …) by column, on the CPU.
        view: what is computed from, of side S.
        batch_size: images per batch. Results depend on it in their last digits.
        facts: what tells the rows from those of other passes over the same images.
        names: names of clusters, for tables.
        kept_ND: features of all images (N, D), NaN for unreadable ones, as `kept_features` has them: no image is read.
        of_features: takes features (B, D), float32, to rows by column, as `compute` does; None where it can't.
    """

    empty: Columns
    compute: Callable[[Tensor], Mapping[str, Tensor]]
    view: ClusterView
    batch_size: int
    facts: tuple[object, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    kept_ND: Tensor | None = None
    of_features: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows of an image."""
        return sum(row.nbytes for row in self.empty.values())

    def over(
        self, loader: Loader, spans: Sequence[range], advance: Advance, interruption: Interruption
    ) -> Iterator[Columns]:
        """Yield the rows of each span of images, whose batches come in one stream: workers do not wait at its ends."""
        if not spans:
            return
        indices = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        try:
            with closing(self._batches(loader, indices)) as batches:
                for span in spans:
                    rows = {name: np.full((len(span), *row.shape), row, row.dtype) for name, row in self.empty.items()}
                    for start in range(0, len(span), self.batch_size):
                        with interruption.at_once():  # A batch of a large network takes a minute on a small machine.
                            indices_B, computed = next(batches)
                        for name, values in computed.items():
                            rows[name][indices_B.numpy() - span.start] = values.numpy()
                        advance(min(self.batch_size, len(span) - start))
                    yield rows
        except ConnectionLost:
            advance(0)  # The stop that ended the waiting, if there was one, is what is reported.
            raise

    def _batches(self, loader: Loader, indices: Tensor) -> Generator[tuple[Tensor, Mapping[str, Tensor]], None, None]:
        """Yield the indices of the readable images of each batch, and their rows by column."""
        if self.kept_ND is None or self.of_features is None:
            for batch in loader.cluster_views(self.view, indices, self.batch_size):
                yield batch.indices_B, self.compute(batch.images_BCHW) if len(batch.indices_B) else {}
            return
        for indices_B in indices.split(self.batch_size):
            features_BD = self.kept_ND[indices_B]
            known_B = ~features_BD[:, 0].isnan()
            if not known_B.all():
                _, _, unreadable = loader.images.some(indices_B[~known_B].numpy())
                loader.unreadable.update(unreadable)
            yield indices_B[known_B], self.of_features(features_BD[known_B].float()) if known_B.any() else {}

    def in_memory(self, loader: Loader, work: Work) -> dict[str, NDArray[Any]]:
        """Return the rows (N, …) of all images of a loader."""
        count = len(loader.images)
        with work.track("features", count) as advance:
            [rows] = self.over(loader, [range(count)], advance, work.interruption)
        return dict(rows)

    def into(self, parts: Parts, loader: Callable[[], AbstractContextManager[Loader]], work: Work) -> None:
        """Make the parts that are missing: each rank makes consecutive ones, and waits for the others at the end.

        Args:
            loader: opens a loader of the images.

        Raises:
            InputError: the folder of the parts can't be used, or some ranks do not see it.
        """
        ranks = work.ranks
        with _writing_into(parts.folder, work):
            missing = ranks.from_main(parts.missing)
            check_shared(parts.folder, ranks)
        mine = missing[ranks.part(len(missing))]
        wanted, own = (sum(len(parts.spans[number]) for number in some) for some in (missing, mine))
        if wanted < parts.n_rows:
            work.reporter.say(f"{parts.n_rows - wanted:,} of {parts.n_rows:,} images are done: continuing from there")
        if not missing:
            return
        with loader() as opened, work.track("features", wanted) as advance:
            # The first rank shows what all have done, if they are as fast as it is.
            spans, done = [parts.spans[number] for number in mine], _scaled(advance, wanted, own)
            rows_of = self.over(opened, spans, done, work.interruption)
            for number, rows in zip(mine, rows_of, strict=True):
                with _writing_into(parts.folder, work):
                    known = opened.unreadable
                    parts.write(number, rows, {index: known[index] for index in parts.spans[number] if index in known})
        ranks.barrier()
        work.check()


@contextmanager
def _writing_into(folder: Path, work: Work) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise DeepClusterError(f"could not write into {folder}: {fault}; {work.interruption.advice}") from fault


def _scaled(advance: Advance, total: int, own: int) -> Advance:
    """Return a function that counts units of `own`, and passes them on in proportion, `total` in all."""
    done = 0

    def count(units: int) -> None:
        nonlocal done
        before, done = done, done + units
        advance(done * total // own - before * total // own)

    return count
