"""Where the features of all images are kept between step 1, which extracts them, and step 2, which whitens them.

M images of this rank, B batch, D features, P components after PCA.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.whitening import working_bytes
from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.text import size

# Wider features are kept as bfloat16, whatever they were computed in: its rounding, 2⁻⁹ of a value, is too small to change
# the 256 largest of 4,096 components, and its range is that of float32.
WIDE = 1024
# Beyond this a network has diverged, and squares of features would soon overflow float32.
LARGEST = 1e15
# Bytes that a file of features leaves free on the disk, for checkpoints and tables.
DISK_RESERVE = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Where the rows of features are kept: in memory, or in a temporary file.

    Attributes:
        n_images, dim, dtype: M, D and type of the rows.
        other_bytes: memory that the whitening and the points take in either case.
        folder: folder of the temporary file; None: in memory.
    """

    n_images: int
    dim: int
    dtype: torch.dtype
    other_bytes: int
    folder: Path | None = None

    @property
    def features_bytes(self) -> int:
        """Bytes of all rows."""
        return self.n_images * self.dim * self.dtype.itemsize

    def describe(self) -> str:
        """Return the plan in a sentence, for the opening lines."""
        features = f"features {size(self.features_bytes)} as {str(self.dtype).removeprefix('torch.')}"
        if self.folder is None:
            return f"{features} in memory, whitening and points {size(self.other_bytes)}"
        return (
            f"{features} in a temporary file in {self.folder}, since they exceed --memory; "
            f"whitening and points {size(self.other_bytes)} in memory"
        )

    def allocate(self) -> Tensor:
        """Return rows (M, D) to be written, in memory or in a file without a name that disappears with the process.

        Raises:
            TrainingError: the disk has no room for the file.
        """
        if self.folder is None:
            return torch.empty(self.n_images, self.dim, dtype=self.dtype)
        kind = np.int16 if self.dtype == torch.bfloat16 else np.float32  # NumPy has no bfloat16.
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # All of the space at once, so that a full disk is an error here and not a signal later.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.features_bytes)
                else:
                    file.truncate(self.features_bytes)
                return torch.from_numpy(np.memmap(file, kind, "r+", shape=(self.n_images, self.dim))).view(self.dtype)
        except OSError as fault:
            raise TrainingError(
                f"the features, {size(self.features_bytes)}, could not be written into a temporary file in {self.folder}: "
                f"{fault.strerror}. Make room there, or allow more --memory, then use --resume"
            ) from None


def least_bytes(n_images: int, dim: int, n_components: int) -> int:
    """Return the memory that the whitening and the points take wherever the features are kept."""
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
    """Keep features in memory if they fit, else in a file. The points are the same bit for bit.

    Args:
        n_images, dim, n_components: M, D, P.
        budget_bytes: memory that features, whitening and points may take.
        computed: number type of the network's rows.
        folder: where a temporary file may be made; None: nowhere.

    Raises:
        InputError: the budget is too small even without features, or neither memory nor disk has room for them.
    """
    least = least_bytes(n_images, dim, n_components)
    dtype = torch.bfloat16 if dim > WIDE else computed
    if least > budget_bytes:
        raise InputError(
            f"--memory {size(budget_bytes)} is too small: the points of {n_images:,} images and the whitening of {dim:,} "
            f"features take {size(least)}; use --memory {-(-least // 10**6)}M or more, a smaller --pca, or --limit"
        )
    in_memory = MemoryPlan(n_images, dim, dtype, least)
    if least + in_memory.features_bytes <= budget_bytes:
        return in_memory
    room = 0 if folder is None else free_disk_bytes(folder) - DISK_RESERVE
    if in_memory.features_bytes > room:
        raise InputError(
            f"the features of {n_images:,} images, {size(in_memory.features_bytes)}, fit neither into --memory "
            f"{size(budget_bytes)} nor onto the disk of {folder or 'the run'} ({size(max(0, room))} to spare); allow more "
            f"--memory ({-(-(least + in_memory.features_bytes) // 10**6)}M), make room, or use --limit"
        )
    return MemoryPlan(n_images, dim, dtype, least, folder)


def as_kept(rows_BD: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return rows in the type that is kept, and how many are bad: NaN, since a value is not finite or beyond 1e15."""
    bad_B = ~(rows_BD.abs().amax(dim=1).float() <= LARGEST)
    return rows_BD.to(dtype).masked_fill(bad_B[:, None], torch.nan), int(bad_B.sum())
