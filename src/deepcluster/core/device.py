"""Where the network runs and in which precision."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepcluster.core.distributed import local_rank, ranks_here
from deepcluster.core.errors import InputError
from deepcluster.core.limits import free_memory, usable_cores
from deepcluster.core.text import count_of


@contextmanager
def true_float32() -> Iterator[None]:
    """Multiply float32 in float32, whatever precision is chosen for networks: neither autocast nor TF32 nor bf16."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def cpu_has_bf16() -> bool:
    """Return True if this processor has bf16 products; elsewhere bf16 is slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class Machine:
    """A device and the precision of the products on it."""

    device: torch.device
    precision: str

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> "Machine":
        """Return the machine for `device` (auto, cpu, cuda, cuda:N, mps) and `precision` (auto, fp32, bf16, fp64).

        Raises:
            InputError: there is no such device.
        """
        _limit_threads()
        chosen = _device(device)
        if precision == "auto":
            quick = torch.cuda.is_bf16_supported(including_emulation=False) if chosen.type == "cuda" else cpu_has_bf16()
            precision = "bf16" if quick and chosen.type != "mps" else "fp32"
        return cls(chosen, precision)

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and inputs."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def clustering_device(self) -> torch.device:
        """Where features are whitened and clustered: sums are float64, which MPS lacks."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @property
    def feature_dtype(self) -> torch.dtype:
        """Type in which features are kept: that in which they are computed. float16 would lose very small and large ones."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def put(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, as `to_device` does."""
        return to_device(tensor, self.device)

    def describe(self) -> str:
        """Return device, threads and precision, for the opening lines."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} ({self.device}), {self.precision}"
        if self.device.type == "cpu":
            return f"cpu, {count_of(torch.get_num_threads(), 'thread')}, {self.precision}"
        return f"{self.device}, {self.precision}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. What a GPU does at the moment is not waited for: the copy is made from pinned memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def _limit_threads() -> None:
    """Use no more threads than processors, where the user has not chosen: torch does not know the quota of a container."""
    cores = max(1, usable_cores() // ranks_here())
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return _own_gpu(torch.device("cuda"))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise InputError(
            f"--device {name}: this machine has no such device; use --device cpu (deepcluster doctor shows what it has)"
        )
    return _own_gpu(device)


def _own_gpu(device: torch.device) -> torch.device:
    """Return the GPU of this process, where several processes run on the machine."""
    if device.type != "cuda" or ranks_here() == 1:
        return device
    if local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"{ranks_here()} processes are more than the {count_of(torch.cuda.device_count(), 'GPU')} of this machine; use "
            "torchrun --nproc-per-node gpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def free_memory_bytes() -> int:
    """Return this process's share of the free memory, within the limits of a container or job."""
    return free_memory() // ranks_here()


def free_disk_bytes(folder: Path) -> int:
    """Return the free space on the disk where a folder is, or will be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free
