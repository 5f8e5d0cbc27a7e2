"""Step 1: look at every image. A trunk is run over the images; each row is written at the image's index.

N images, B rows of a batch, D features, P components after PCA.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from deepcluster.clustering.whitening import working_bytes
from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.text import size

# rows_BD and indices_B of the images of a batch that can be read, batch after batch.
Look = Callable[[], Generator[tuple[Tensor, Tensor], None, None]]

# Wider features are kept in half precision, whatever they were computed in: its rounding, 2⁻¹¹ of a value, is far below
# what the 256 largest components of 4,096 notice.
WIDE = 1024
LARGEST_HALF = 65504.0
# Beyond this a network has diverged, and squares of features would soon be no float32 numbers.
LARGEST = 1e15
# Room that a file of features leaves on the disk, for checkpoints and tables.
DISK_RESERVE = 1 << 30


def extract_features(
    batches: Iterable[tuple[Tensor, Tensor]], *, n_images: int, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Features_ND of all batches on the CPU; rows of images that were not seen are NaN.

    Args:
        batches: pairs of rows_BD and their indices_B.
        n_images: N.
        dim: D.
        dtype: of the rows kept; float16 halves the memory of networks that run in half precision.
    """
    features_ND = torch.full((n_images, dim), torch.nan, dtype=dtype)
    for rows_BD, indices_B in batches:
        features_ND[indices_B] = rows_BD.detach().to("cpu", dtype)
    return features_ND


@dataclass(frozen=True)
class MemoryPlan:
    """Where the rows of features are between step 1, which makes them, and step 2, which shortens them.

    Attributes:
        kind: "memory"; "file", a temporary one in `folder`; or "twice", nowhere: step 2 looks at the images again.
        n_images, dim, dtype: of the rows.
        other_bytes: memory that the whitening and the points take, whatever the kind.
    """

    kind: str
    n_images: int
    dim: int
    dtype: torch.dtype
    other_bytes: int
    folder: Path | None = None

    @property
    def features_bytes(self) -> int:
        """Of all rows."""
        return self.n_images * self.dim * self.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """Most memory that the plan takes."""
        return self.other_bytes + (self.features_bytes if self.kind == "memory" else 0)

    def describe(self) -> str:
        """The plan in a sentence, for the opening lines."""
        features = f"features {size(self.features_bytes)} as {str(self.dtype).removeprefix('torch.')}"
        if self.kind == "memory":
            return f"{features} in memory, whitening and points {size(self.other_bytes)}"
        if self.kind == "file":
            where = f"in a temporary file in {self.folder}, for they are more than --memory allows"
        else:
            where = "nowhere, for neither --memory nor the disk has room: each clustering looks at the images twice"
        return f"{features} {where}; whitening and points {size(self.other_bytes)} in memory"


def kept_dtype(dim: int, computed: torch.dtype) -> torch.dtype:
    """How rows are kept: float16 where they are wide, or were computed in half precision; else float32."""
    return torch.float16 if dim > WIDE or computed.itemsize == 2 else torch.float32


def least_bytes(n_images: int, dim: int, n_components: int) -> int:
    """Memory that the whitening and the points take even where no features are kept."""
    return working_bytes(dim) + 4 * n_images * n_components


def plan_memory(
    n_images: int,
    dim: int,
    n_components: int,
    *,
    budget_bytes: int,
    computed: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> MemoryPlan:
    """Features in memory if they fit, else in a file if the disk has room, else nowhere: the images are looked at twice.

    The points are the same with each, bit for bit where the network gives the same rows at a second look.

    Args:
        n_images, dim, n_components: N, D, P.
        budget_bytes: memory that features, whitening and points may take.
        computed: the number type of the network's rows.
        folder: where a temporary file may be, or will be made; None: no file.

    Raises:
        InputError: the budget is too small even without features.
    """
    least, dtype = least_bytes(n_images, dim, n_components), kept_dtype(dim, computed)
    if least > budget_bytes:
        raise InputError(
            f"--memory {size(budget_bytes)} is too small: the points of {n_images:,} images and the whitening of {dim:,} "
            f"features take {size(least)}; use --memory {-(-least // 10**6)}M or more, a smaller --pca, or --limit"
        )
    features_bytes = n_images * dim * dtype.itemsize
    if least + features_bytes <= budget_bytes:
        kind = "memory"
    elif folder is not None and features_bytes + DISK_RESERVE <= free_disk_bytes(folder):
        kind = "file"
    else:
        kind = "twice"
    return MemoryPlan(kind, n_images, dim, dtype, least, folder)


class FeatureRows:
    """The rows of N images, to be gone through again and again: kept as the plan says, or made anew each time.

    Args:
        look: runs the trunk over all images. Its batch number i has the images from i * batch_rows on, in order, that can be
            read; a batch without any may be left out.
        plan: where the rows are kept, and in which number type.
        batch_rows: images of a batch.

    Attributes (after `fill`):
        n_not_finite: images whose row is not finite, or beyond 1e15; they are left out, like those that can't be read.
        n_clamped: images with a value beyond float16's 65,504, in the place of which that is kept.
    """

    def __init__(self, look: Look, plan: MemoryPlan, *, batch_rows: int) -> None:
        self.plan = plan
        self.batch_rows = batch_rows
        self.n_not_finite = 0
        self.n_clamped = 0
        self._look = look
        self._kept: _RowsInMemory | _RowsInFile | None = None
        self._first: list[int] = []

    def fill(self, use: Callable[[Tensor], None]) -> None:
        """Look at the images for the first time; `use` is given the rows_BD of each batch, on the device where they are.

        Raises:
            TrainingError: the disk has no room for the file.
        """
        if self.plan.kind != "twice":
            self._kept = _RowsInMemory(self.plan) if self.plan.kind == "memory" else _RowsInFile(self.plan)
        self.n_not_finite, self.n_clamped, self._first = 0, 0, []
        for first, block_BD, n_not_finite, n_clamped in self._looked_at():
            self.n_not_finite, self.n_clamped = self.n_not_finite + n_not_finite, self.n_clamped + n_clamped
            if self._kept is not None:
                self._kept.write(first, block_BD.cpu())
                self._first.append(first)
            use(block_BD[~block_BD[:, 0].isnan()])

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The number of an image, and rows_BD of it and those that follow; NaN where there is none. All such batches."""
        if self.plan.kind == "twice":
            for first, block_BD, _, _ in self._looked_at():
                yield first, block_BD
        elif self._kept is None:
            raise RuntimeError("the rows are kept from fill to close")
        else:
            for first in self._first:
                yield first, self._kept.read(first, min(self.batch_rows, self.plan.n_images - first))

    def each(
        self,
        change: Callable[[Tensor], Tensor],
        *,
        width: int,
        device: torch.device,
        on_batch: Callable[[int], None] = lambda images: None,
    ) -> Tensor:
        """`change(rows_BD)` of all rows, (N, width) float32 on the device; NaN where there is no row.

        Args:
            on_batch: called with the number of images after each batch; may raise to stop.
        """
        changed_NW = torch.full((self.plan.n_images, width), torch.nan, device=device)
        for first, rows_BD in self.batches():
            changed_NW[first : first + len(rows_BD)] = change(rows_BD.to(device))
            on_batch(len(rows_BD))
        return changed_NW

    def _looked_at(self) -> Iterator[tuple[int, Tensor, int, int]]:
        """Batches as `batches` gives them, with the numbers of rows that are not finite and that were clamped."""
        with closing(self._look()) as looked_at:
            for rows_BD, indices_B in looked_at:
                if not len(indices_B):
                    continue
                first = int(indices_B[0]) // self.batch_rows * self.batch_rows
                rows_BD, n_not_finite, n_clamped = _as_kept(rows_BD, self.plan.dtype)
                n_rows = min(self.batch_rows, self.plan.n_images - first)
                block_BD = rows_BD.new_full((n_rows, self.plan.dim), torch.nan)
                block_BD[(indices_B - first).to(rows_BD.device)] = rows_BD
                yield first, block_BD, n_not_finite, n_clamped

    def close(self) -> None:
        """Let go of the rows; a file is gone then."""
        if self._kept is not None:
            self._kept.close()
        self._kept = None

    def __enter__(self) -> "FeatureRows":
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()


def _as_kept(rows_BD: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Rows in the type that is kept, whole rows of NaN where any value is not finite, and how many; and how many clamped."""
    rows_BD = rows_BD.detach()
    largest_B = rows_BD.abs().amax(dim=1).float()
    bad_B = ~(largest_B <= LARGEST)
    n_clamped = 0
    if dtype == torch.float16:
        n_clamped = int((~bad_B & (largest_B > LARGEST_HALF)).sum())
        if n_clamped:  # in float32, for bf16 has no 65,504
            rows_BD = rows_BD.float().clamp(-LARGEST_HALF, LARGEST_HALF)
    return rows_BD.to(dtype).masked_fill(bad_B[:, None], torch.nan), int(bad_B.sum()), n_clamped


class _RowsInMemory:
    def __init__(self, plan: MemoryPlan) -> None:
        self._rows_ND = torch.empty(plan.n_images, plan.dim, dtype=plan.dtype)

    def write(self, first: int, rows_BD: Tensor) -> None:
        self._rows_ND[first : first + len(rows_BD)] = rows_BD

    def read(self, first: int, n_rows: int) -> Tensor:
        return self._rows_ND[first : first + n_rows]

    def close(self) -> None:
        self._rows_ND = self._rows_ND[:0].clone()


class _RowsInFile:
    """Rows in a file that has no name, so that nothing is left of it, however the process ends.

    Read and written as a file, not as a memory map: a full disk is then an error that can be told, and no signal.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=plan.folder)  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):  # all the room that there will be need of, at once
                os.posix_fallocate(self._file.fileno(), 0, plan.features_bytes)
        except OSError as fault:
            if fault.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that can't promise room
                raise self._no_room(fault) from None

    def _no_room(self, fault: OSError) -> TrainingError:
        plan = self._plan
        return TrainingError(
            f"the features, {size(plan.features_bytes)}, could not be written into a temporary file in {plan.folder}: "
            f"{fault.strerror}. Make room there, or give them more --memory, then use --resume"
        )

    def _go_to(self, row: int) -> None:
        self._file.seek(row * self._plan.dim * self._plan.dtype.itemsize)

    def write(self, first: int, rows_BD: Tensor) -> None:
        try:
            self._go_to(first)
            self._file.write(rows_BD.contiguous().numpy().data.cast("B"))
        except OSError as fault:
            raise self._no_room(fault) from None

    def read(self, first: int, n_rows: int) -> Tensor:
        rows_BD = torch.empty(n_rows, self._plan.dim, dtype=self._plan.dtype)
        self._go_to(first)
        self._file.readinto(rows_BD.numpy().data.cast("B"))  # type: ignore[attr-defined]
        return rows_BD

    def close(self) -> None:
        self._file.close()
