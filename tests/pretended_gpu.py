"""A GPU that is not there: shapes without numbers on the device "cuda", operations counted, and every wait for it found.

Tensors of the device are `FakeTensor`s. Tensors of the CPU are real ones: what a step works out there runs as always.
A wait is what makes the CPU wait for the GPU: a number that is read, a boolean index, a copy from or to pageable memory.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Not the first one, which other tests may really have: what the code keeps for this device is of no use to it.
GPU = torch.device("cuda", 7)
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
# What C++ is given as the device: its autograd asks a GPU's driver for streams, and does without for "meta".
_IN_CPP = torch.device("meta")
_ATEN = torch.ops.aten
# Operations that read numbers from the GPU, or whose result has as many rows as the numbers say.
_READS = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "unique", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "linalg_inv_ex", "histc", "multinomial",
)  # fmt: skip
# Operations of one kernel that take a number of the CPU as an argument; others copy it.
_TAKE_NUMBERS = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "lt", "gt", "eq", "ge", "le")
_NO_KERNEL = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias")
# What autocast runs in bf16.
_IN_BF16 = {torch.conv2d, torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm}


class PretendedGPU:
    """Count the kernels of what runs within `running`, and find its waits.

    Attributes:
        kernels: number of kernels by part of the step and operation. A convolution's backward pass has one for each
            gradient; an operation on a list one for all its tensors, or one each where torch has no common one.
        waits: what waited, and where.
    """

    def __init__(self) -> None:
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: list[str] = []
        self.parts = ["other"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let "cuda" be this GPU."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True))
            stack.enter_context(mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True))
            stack.enter_context(mock.patch.object(nn.Module, "_apply", _moved_once))
            for mode in (_FAKE, _Operations(self), _Functions()):
                stack.enter_context(mode)
            yield

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose kernels count as those of the part `name`."""

        def of_part(*args: Any, **kwargs: Any) -> Any:
            self.parts.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.parts.pop()

        return of_part

    def by_part(self) -> dict[str, int]:
        """Return the number of kernels of each part."""
        totals: Counter[str] = Counter()
        for (part, _), count in self.kernels.items():
            totals[part] += count
        return dict(totals)

    def wait(self, what: str) -> None:
        """Note a wait, with the innermost lines of the project that led to it."""
        lines = [frame for frame in traceback.extract_stack() if "deepcluster" in frame.filename.split("src")[-1]]
        where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.line}" for frame in lines[:-4:-1])
        self.waits.append(f"{what}: {where}")


class _Operations(TorchDispatchMode):
    """Operations below autograd: those on the GPU are checked and counted, those on the CPU run."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return _IN_CPP
        if (device := kwargs.get("device")) is not None and torch.device(device).type == _IN_CPP.type:
            kwargs["device"] = device = GPU
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_gpu = any(isinstance(one, FakeTensor) for one in tensors)
        if not on_gpu and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._check(func, args, kwargs, tensors)
        self.gpu.kernels[self.gpu.parts[-1], func.overloadpacket.__name__] += _kernels(func, args)
        if func is _ATEN._to_copy.default and not on_gpu:
            like = args[0].to(memory_format=kwargs.get("memory_format") or torch.preserve_format)
            return torch.empty_strided(like.shape, like.stride(), dtype=kwargs.get("dtype") or like.dtype, device=GPU)
        if func.overloadpacket.__name__.startswith("_fused_"):  # In place, and without a shape function.
            return None
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Note a wait if this operation on the GPU is one."""
        name, overload = func.overloadpacket.__name__, f"{func.overloadpacket.__name__}.{func._overloadname}"
        here = [one for one in tensors if not isinstance(one, FakeTensor)]
        if name in _READS or overload in _READS:
            self.gpu.wait(f"{name} reads from the GPU")
        elif name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.gpu.wait(f"{name} with a boolean index")
        elif torch.device(kwargs.get("device") or GPU).type == "cpu" or (
            name == "copy_" and not isinstance(args[0], FakeTensor)
        ):
            self.gpu.wait("a copy from the GPU")
        elif name in ("_to_copy", "copy_") and here:
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if not (getattr(here[0], "is_page_locked", False) and asynchronous):
                self.gpu.wait(f"a blocking copy of {tuple(here[0].shape)} to the GPU")
        elif any(one.ndim or name not in _TAKE_NUMBERS for one in here):
            self.gpu.wait(f"{overload} of the GPU and the CPU")


class _Functions(TorchFunctionMode):
    """Functions above autograd: the device that tensors say they are on, page-locked memory, and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):
            if func == Tensor.device.__get__:
                return args[0].fake_device
            if func == Tensor.is_cuda.__get__:
                return args[0].fake_device.type == "cuda"
            if func is Tensor.to:  # C++ would copy it, since it has another device there.
                is_there = lambda one: isinstance(one, torch.device | str) and torch.device(one).type == "cuda"  # noqa: E731
                args = [args[0], *(one for one in args[1:] if not is_there(one) and one is not None)]
                kwargs = {name: one for name, one in kwargs.items() if not is_there(one)}
                if len(args) == 1 and not kwargs.keys() & {"device", "dtype", "memory_format"}:
                    return args[0]
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_page_locked = True
            return pinned
        if not torch.is_autocast_enabled("cuda"):
            self._cast.clear()
        elif func in _IN_BF16:
            args, kwargs = [self._in_bf16(one) for one in args], {name: self._in_bf16(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)

    def _in_bf16(self, value: Any) -> Any:
        """Return float32 tensors in bf16; weights are cast once in a context."""
        if not isinstance(value, FakeTensor) or value.dtype != torch.float32:
            return value
        if not (value.requires_grad and value.is_leaf):
            return value.to(torch.bfloat16)
        if id(value) not in self._cast:
            self._cast[id(value)] = value, value.to(torch.bfloat16)
        return self._cast[id(value)][1]


_move = nn.Module._apply


def _moved_once(network: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a network to the GPU, where it then stays: weights that are `FakeTensor`s can't be exchanged."""
    is_there = any(isinstance(one, FakeTensor) for one in network.parameters())
    return network if is_there else _move(network, *args, **kwargs)


def _kernels(func: Any, args: Any) -> int:
    """Return the least number of kernels of an operation."""
    name = func.overloadpacket.__name__
    if func.is_view or name.startswith(_NO_KERNEL):
        return 0
    if name == "convolution_backward":
        return sum(args[-1])
    if name.startswith("_foreach_"):
        lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
        alike = all(one.shape == first.shape for others in lists[1:] for first, one in zip(lists[0], others, strict=True))
        return 1 if alike else len(lists[0])
    return 1
