"""A CUDA device with real numbers on a CPU build of torch: it refuses to mix devices, and counts synchronisations.

A tensor of the device is a wrapper around a CPU tensor. Every operation runs on the CPU tensors. So results are
those of the CPU, while shapes, devices and copies are treated as CUDA treats them.

What synchronises is taken from torch 2.13: aten/src/ATen/native/cuda/Copy.cu (copies), CUDAScalar.cu
(_local_scalar_dense), Nonzero.cu, Repeat.cu (repeat_interleave), SummaryOps.cu (bincount), Unique.cu, and
IndexingUtils.h (masks and host tensors as indices). Whether pageable memory blocks the host: CUDA C++ API reference,
"API synchronization behavior".
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

CPU = torch.device("cpu")
ROOT = f"{Path(__file__).parents[1]}/"
aten: Any = torch.ops.aten

# The size of the result is on the device.
_SIZE_UNKNOWN = (
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::one_hot",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
)
_ANSWER_ON_HOST = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::allclose", "aten::is_nonzero")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
_COPIES = ("aten::_to_copy", "aten::to", "aten::copy_")


class GpuTensor(torch.Tensor):
    """on_host: the CPU tensor with its numbers."""

    on_host: torch.Tensor
    gpu: "SimulatedGpu"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor, gpu: "SimulatedGpu") -> "GpuTensor":
        made: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device="cuda:0",
        )
        made.on_host, made.gpu = on_host, gpu
        gpu.allocate(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a simulated GPU's tensor, outside of simulated_gpu()")


@dataclass(frozen=True)
class Synchronisation:
    """A moment at which the host waits for the device. place: the line of this repository that asked for it."""

    why: str
    place: str


class SimulatedGpu:
    """syncs: all so far, in order. copies: to the device without waiting."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.syncs: list[Synchronisation] = []
        self.copies = 0
        self.total_bytes, self.allocated_bytes, self.peak_bytes, self.reserved_bytes = 2**30, 0, 0, 0
        """reserved_bytes: with what the allocator keeps for later, until it is told to empty its cache."""
        self._users: Counter[int] = Counter()
        self._pinned: dict[int, torch.Tensor] = {}
        """Kept, so that no other memory gets their addresses."""

    def allocate(self, wrapper: "GpuTensor") -> None:
        """Count the memory that a new wrapper stands for, unless others share it, until the last is gone."""
        storage = wrapper.on_host.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if self._users[address] == 0:
            self.allocated_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
            self.reserved_bytes = max(self.reserved_bytes, self.allocated_bytes)
        self._users[address] += 1
        weakref.finalize(wrapper, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if self._users[address] == 0:
            self.allocated_bytes -= size

    def memory_functions(self) -> dict[str, Callable[..., Any]]:
        """Of torch.cuda, by name."""

        def trim() -> None:
            self.reserved_bytes = self.allocated_bytes

        def forget_peak(device: Any = None) -> None:
            self.peak_bytes = self.allocated_bytes

        return {
            "_lazy_init": lambda: None,
            "memory_allocated": lambda device=None: self.allocated_bytes,
            "max_memory_allocated": lambda device=None: self.peak_bytes,
            "reset_peak_memory_stats": forget_peak,
            "empty_cache": trim,
            "mem_get_info": lambda device=None: (self.total_bytes - self.reserved_bytes, self.total_bytes),
        }

    def is_pinned(self, x: torch.Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def wait(self, why: str) -> None:
        self.syncs.append(Synchronisation(why, _place()))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        if name == "aten::is_pinned":
            return not isinstance(args[0], GpuTensor) and self.is_pinned(args[0])
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            return self.pin(args[0].clone())
        if name in _COPIES:
            args, kwargs = (), _by_name(func, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        own = [x for x in flat if isinstance(x, GpuTensor)]
        asked = kwargs.get("device")
        on_gpu = bool(own) if asked is None else torch.device(asked).type == "cuda"
        if not own and not on_gpu:
            made = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
            return self.pin(made) if kwargs.get("pin_memory") else made
        if name in _COPIES:
            return self._copy(func, kwargs)
        if own:
            self._refuse_mixtures(name, func, args, flat)
        self._note_waiting(name, args, kwargs)
        return self._compute(func, args, kwargs, own, on_gpu)

    def _compute(self, func: Any, args: Any, kwargs: Any, own: Sequence[GpuTensor], on_gpu: bool) -> Any:
        wrapper_of = {id(x.on_host): x for x in own}
        args, kwargs = tree_map_only(GpuTensor, lambda x: x.on_host, (args, kwargs))
        kwargs = {key: CPU if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not on_gpu:
                return x
            return wrapper_of[id(x)] if id(x) in wrapper_of else GpuTensor(x, self)

        return tree_map(wrapped, func(*args, **kwargs))

    def _copy(self, func: Any, kwargs: dict[str, Any]) -> Any:
        is_into = func._schema.name == "aten::copy_"
        source, target = (kwargs["src"], kwargs["self"]) if is_into else (kwargs["self"], kwargs.get("other"))
        asked, from_gpu, non_blocking = kwargs.get("device"), isinstance(source, GpuTensor), kwargs.get("non_blocking")
        to_gpu = isinstance(target, GpuTensor) if target is not None else from_gpu
        if asked is not None:
            to_gpu = torch.device(asked).type == "cuda"
        if from_gpu and not to_gpu:
            # Where torch makes the target, it makes it of pinned memory if the host is not to wait.
            if not non_blocking or (is_into and not self.is_pinned(kwargs["self"])):
                self.wait("copy to the host")
        elif to_gpu and not from_gpu:
            if not non_blocking:
                self.wait("copy to the device")
            elif not self.is_pinned(source):
                self.wait("copy to the device from pageable memory")
            else:
                self.copies += 1
        own = [x for x in (target, source) if isinstance(x, GpuTensor)]
        copied = self._compute(func, (), kwargs, own, to_gpu)
        if from_gpu != to_gpu and not is_into and to_gpu:
            copied.on_host = copied.on_host.clone() if copied.on_host is source else copied.on_host
        elif from_gpu and not to_gpu and copied is source.on_host:
            copied = copied.clone()
        return copied

    def _refuse_mixtures(self, name: str, func: Any, args: Any, flat: Sequence[Any]) -> None:
        allowed: list[Any] = []
        if name in _INDEXING:
            allowed += [x for x in args[1] if x is not None]  # indices may be anywhere
            allowed += [x for x in args[2:3] if isinstance(x, torch.Tensor) and x.dim() == 0]
        elif torch.Tag.pointwise in func.tags or name in ("aten::fill_", "aten::masked_fill_", "aten::masked_fill"):
            written = args[0] if func._schema.is_mutable else None
            allowed += [x for x in flat if isinstance(x, torch.Tensor) and x.dim() == 0 and x is not written]
        for x in flat:
            if isinstance(x, torch.Tensor) and not isinstance(x, GpuTensor) and all(x is not ok for ok in allowed):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func}, at {_place()})"
                )

    def _note_waiting(self, name: str, args: Any, kwargs: Any) -> None:
        if name in _ANSWER_ON_HOST or name in _SIZE_UNKNOWN:
            self.wait(name.removeprefix("aten::"))
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            if any(isinstance(repeats, GpuTensor) for repeats in args[-1:]):
                self.wait("repeat_interleave without output_size")
        elif name in _INDEXING:
            for index in args[1]:
                if index is None:
                    continue
                if not isinstance(index, GpuTensor):
                    self.wait("index on the host")
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("boolean mask as an index")


_BY_DISPATCH: dict[Any, Any] = {
    torch.Tensor.__float__: lambda x: float(aten.item(x)),
    torch.Tensor.__int__: lambda x: int(aten.item(x)),
    torch.Tensor.__index__: lambda x: int(aten.item(x)),
    torch.Tensor.nonzero: aten.nonzero,
    torch.nonzero: aten.nonzero,
    torch.Tensor.copy_: aten.copy_,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.item: aten.item,
    torch.Tensor.__invert__: aten.bitwise_not,
}


class _Dispatch(TorchDispatchMode):
    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.run(func, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """What torch does in C++ before it dispatches, where a CPU build knows no CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device, pin = kwargs.pop("device"), kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return (made.pin_memory() if pin else made).to(device)
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        if func in _BY_DISPATCH:
            return _BY_DISPATCH[func](*args, **kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], GpuTensor):
            part, tensors = _sliced(*args)
            return part if tensors is None else aten.index(part, tensors)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], GpuTensor):
            (part, tensors), value = _sliced(*args[:2]), args[2]
            if tensors is None:
                return aten.copy_(part, value) if isinstance(value, torch.Tensor) else aten.fill_(part, value)
            if not isinstance(value, torch.Tensor):
                value = torch.full((), value, dtype=part.dtype, device=part.device)
            return aten.index_put_(part, tensors, value)
        return func(*args, **kwargs)


def _sliced(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """x[index] up to its tensors, as torch/csrc/autograd/python_variable_indexing.cpp: these index what is left."""
    indices = list(index) if isinstance(index, tuple) else [index]
    tensors: list[torch.Tensor | None] = []
    dim = 0
    for nth, i in enumerate(indices):
        if i is Ellipsis:
            dim += x.dim() - dim - sum(rest is not None for rest in indices[nth + 1 :])
        elif i is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(i, int):
            x = x.select(dim, i)
        elif isinstance(i, slice):
            x, dim = aten.slice(x, dim, i.start, i.stop, i.step or 1), dim + 1
        else:
            tensors += [None] * (dim - len(tensors)) + [i if isinstance(i, torch.Tensor) else torch.tensor(i)]
            dim += 1
    return x, tensors or None


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Within it, this thread's torch has a device "cuda"."""
    gpu = SimulatedGpu()
    with ExitStack() as stack:
        for name, function in gpu.memory_functions().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(torch.inference_mode())  # a CPU build cannot record gradients of CUDA tensors
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch(gpu))
        yield gpu


def _by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _place() -> str:
    """file:function of the nearest caller that is neither torch nor this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/torch/" not in file and "contextlib" not in file:
            return f"{file.removeprefix(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
