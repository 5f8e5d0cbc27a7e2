"""Results of images, computed in spans that are kept on disk: a stop loses one span at most, and ranks share the work."""

from collections.abc import Callable
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors, save_tensors
from deepcluster.core.work import Advance
from deepcluster.run.model import Model
from deepcluster.run.resumable import FOLDER, digest_of

SPAN = 64


class Spans:
    """What is computed of all images of a set, 64 at a time.

    Args:
        count: number of images.
        facts: everything that the results depend on, beside the model's weights.
        span: number of images computed at a time.
    """

    def __init__(self, model: Model, count: int, *facts: object, span: int = SPAN) -> None:
        key = digest_of(model.weights, count, span, *facts)
        self._model = model
        self.spans = [range(first, min(first + span, count)) for first in range(0, count, span)]
        self._files = [model.cache / FOLDER / f"{key}-{number:05}.pt" for number in range(len(self.spans))]

    def compute(
        self, what: str, make: Callable[[range, Advance], dict[str, Any]], *, unit: str = "images"
    ) -> list[dict[str, Any]]:
        """Return the result of each span, in order, on every rank; those on disk are not made again.

        Args:
            what: name of the work, for the progress line.
            make: returns tensors and plain values of the images of a span; calls its second argument with the number of
                images done.
            unit: noun of what is counted.

        Returns:
            results whose tensors lie in files: those of other spans do not take memory while one is read.

        Raises:
            InputError: `make` raised it on any rank.
        """
        ranks, work = self._model.work.ranks, self._model.work
        mine = [number for number in range(len(self.spans)) if number % ranks.size == ranks.rank]
        missing = [number for number in mine if self._kept(number) is None]
        fault: InputError | None = None
        try:
            with work.track(what, sum(len(self.spans[number]) for number in missing), unit) as advance:
                for number in missing:
                    made = make(self.spans[number], advance)
                    self._files[number].parent.mkdir(parents=True, exist_ok=True)
                    save_tensors(self._files[number], made)
        except InputError as found_here:
            fault = found_here
        for found_there in ranks.gather_objects(fault):
            if found_there is not None:
                raise found_there
        found = [self._kept(number) for number in range(len(self.spans))]
        lost = [number for number, one in enumerate(found) if one is None]
        if lost:
            raise InputError(
                f"{self._files[lost[0]]} can't be read: all processes need one cache folder (DEEPCLUSTER_CACHE)"
            )
        return [one for one in found if one is not None]

    def _kept(self, number: int) -> dict[str, Any] | None:
        try:
            return load_tensors(self._files[number], mapped=True) if self._files[number].is_file() else None
        except InputError:
            return None

    def done(self) -> None:
        """Delete what is kept."""
        for file in self._files:
            file.unlink(missing_ok=True)
