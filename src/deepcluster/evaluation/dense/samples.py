"""Images with their annotations, prepared by worker processes, each random view a function of (seed, position).

Images and targets go through torchvision's transforms (v2), which keep boxes and masks in step with the image.
N images of a set, B batch.
"""

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from deepcluster.core.distributed import Ranks, part_of
from deepcluster.core.errors import InputError, UnreadableImage, WorkerLost
from deepcluster.core.processes import leave_signals_to_parent, start_method
from deepcluster.data.decode import decode
from deepcluster.evaluation.datasets.dense import DenseSet, MaskSet
from deepcluster.evaluation.trainer import order_of, seed_of, seeded
from deepcluster.run.model import Model

# What torchvision's transforms take: tensors of its own types (boxes, masks) change with the image, others do not.
Target = dict[str, Tensor]
Augment = Callable[[tv_tensors.Image, Target], tuple[Tensor, Target]]
# Returns the target of an image, given its index, height and width.
ReadTarget = Callable[[int, int, int], Target]
# The name of the mask of an image among its targets.
MASK = "mask"


@dataclass(frozen=True)
class Sample:
    """An image (3, H, W), uint8, and its target as plain tensors, after the transforms.

    Attributes:
        index: of the image in its set.
        size: height and width of the image before the transforms.
    """

    index: int
    image_CHW: Tensor
    target: Target
    size: tuple[int, int]


@dataclass(frozen=True)
class SampleBatch:
    """Samples, and why the other images of the batch can't be read, by index."""

    samples: list[Sample]
    unreadable: dict[int, str]

    @property
    def indices_B(self) -> Tensor:
        """Return the index of each image."""
        return torch.tensor([sample.index for sample in self.samples], dtype=torch.int64)

    def split(self, size: int) -> "list[SampleBatch]":
        """Return batches of at most `size` of the samples."""
        return [SampleBatch(self.samples[first : first + size], {}) for first in range(0, len(self.samples), size)]


@dataclass(frozen=True)
class ReadMask:
    """Reads the mask of an image at its own size, as the target `MASK`."""

    data: MaskSet

    def __call__(self, index: int, height: int, width: int) -> Target:
        """Return the target of an image of a height and width; raise `InputError` if its mask has another size."""
        mask_HW = self.data.read_mask(index)
        if mask_HW.shape != (height, width):
            wrong = f"{mask_HW.shape[1]} x {mask_HW.shape[0]} pixels, the image {width} x {height}"
            raise InputError(f"{self.data.source.name(index)}: its mask has {wrong}; a mask must have the size of its image")
        return {MASK: tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(mask_HW)))}


# Index of an image and the seed of its random view.
_Key = tuple[int, int]
_Packed = tuple[int, NDArray[np.uint8], dict[str, NDArray[Any]], tuple[int, int]]


@dataclass(frozen=True)
class Samples:
    """A set of images, what is read of each, and how it is changed.

    Attributes:
        read_target: called where the image can be read.
        augment: may draw from torch's random generator.
    """

    data: DenseSet
    read_target: ReadTarget
    augment: Augment

    def sample(self, index: int, seed: int = 0) -> Sample:
        """Return the view of an image that is a function of the seed.

        Raises:
            UnreadableImage: the image can't be decoded.
            InputError: its annotation can't be used.
        """
        image_HWC = decode(self.data.source.read(index))
        height, width = image_HWC.shape[:2]
        image = tv_tensors.Image(torch.from_numpy(image_HWC.transpose(2, 0, 1).copy()))
        with seeded(seed, torch.device("cpu")):
            image_CHW, target = self.augment(image, self.read_target(index, height, width))
        plain = {name: torch.as_tensor(value.as_subclass(Tensor)) for name, value in target.items()}
        return Sample(index, image_CHW.as_subclass(Tensor), plain, (height, width))

    def training(self, model: Model, batch_size: int, *, seed: int, steps: range) -> Generator[SampleBatch, None, None]:
        """Yield this rank's part of the batches of some steps: all images in a random order, again and again.

        The batches are full: an epoch may end, and the next one begin, within a batch.
        """
        return self._loaded(model, _TrainingKeys(len(self.data), batch_size, seed, steps, model.work.ranks))

    def in_order(self, model: Model, indices: Sequence[int], batch_size: int = 1) -> Generator[SampleBatch, None, None]:
        """Yield batches of some images in this order; their views are functions of the index."""
        keys = [(index, seed_of(0, index)) for index in indices]
        return self._loaded(model, [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)])

    def _loaded(self, model: Model, keys: Any) -> Generator[SampleBatch, None, None]:
        # As arrays, which go through pipes: tensors would go through /dev/shm, of which containers have 64 MB.
        workers = model.workers
        several: dict[str, Any] = {"multiprocessing_context": start_method(), "worker_init_fn": _begin} if workers else {}
        loader: Any = DataLoader(_Decoding(self), batch_sampler=keys, num_workers=workers, collate_fn=list, **several)
        for packed in _until_a_worker_dies(loader):
            found, faults = [], {}
            for one in packed:
                if isinstance(one, InputError):
                    raise one
                if isinstance(one[1], str):
                    faults[one[0]] = one[1]
                    continue
                index, image_CHW, target, size = cast(_Packed, one)
                tensors = {name: torch.from_numpy(value) for name, value in target.items()}
                found.append(Sample(index, torch.from_numpy(image_CHW), tensors, size))
            yield SampleBatch(found, faults)


class _Decoding(Dataset[Any]):
    """What torch's loader asks for samples, in a worker process."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, key: _Key) -> _Packed | tuple[int, str] | InputError:
        try:
            one = self._samples.sample(*key)
        except UnreadableImage as fault:
            return key[0], str(fault)
        except InputError as fault:  # Raised here, it would come with the traceback of the worker in its message.
            return fault
        target = {name: value.contiguous().numpy() for name, value in one.target.items()}
        return one.index, one.image_CHW.contiguous().numpy(), target, one.size


@dataclass(frozen=True)
class _TrainingKeys:
    """The keys of this rank's part of each batch."""

    count: int
    batch_size: int
    seed: int
    steps: range
    ranks: Ranks

    def __iter__(self) -> Iterator[list[_Key]]:
        known, order_N = -1, torch.empty(0)
        mine = part_of(self.batch_size, self.ranks.rank, self.ranks.size)
        for step in self.steps:
            keys = []
            for position in range(step * self.batch_size + mine.start, step * self.batch_size + mine.stop):
                epoch, row = divmod(position, self.count)
                if epoch != known:
                    known, order_N = epoch, order_of(self.count, self.seed, epoch)
                keys.append((int(order_N[row]), seed_of(self.seed, position)))
            yield keys

    def __len__(self) -> int:
        return len(self.steps)


def _begin(number: int) -> None:
    leave_signals_to_parent()


def _until_a_worker_dies(loader: Any) -> Iterator[Any]:
    """Yield what torch's loader does.

    Raises:
        WorkerLost: a worker process was killed.
    """
    # torch would raise its error wherever the caller is just then; without its handler it does so where it waits.
    is_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    handler = signal.getsignal(signal.SIGCHLD) if is_main else None
    batches = iter(loader)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from batches
    except RuntimeError as fault:
        if not str(fault).startswith("DataLoader worker"):
            raise
        raise WorkerLost(
            "a process that prepares images was killed, perhaps because memory is short: use fewer --workers, or "
            "--workers 0 for none"
        ) from fault
