"""An accelerator that is none: tensors on the device ``pretend`` hold their values on the CPU.

It shows faults of device discipline where there is no GPU. Every operation runs, with values, but raises what CUDA
raises where tensors of the CPU and of the device meet, and what a GPU would be waited for is counted in ``WAITS``.
FakeTensorMode was tried first: on a PyTorch without CUDA it makes ``cuda`` tensors, but can neither move a module with
gradients to them nor go backward ("PyTorch is not linked with support for cuda devices"), and, having no values, ends
at the first `nonzero`, which the gate needs once per pass.

`install` cannot be undone: use a process of its own.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
WAITS: collections.Counter[str] = collections.Counter()
"""Operations that wait for a GPU, with the line of gemify or transformers that asked for them."""
aten = torch.ops.aten
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class PretendTensor(torch.Tensor):
    """A tensor of the device: its values are a tensor of the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.values})"

    def tolist(self) -> Any:
        _count("tolist")
        return self.values.tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _as_tensors(index: Any) -> Any:
    """An index whose lists are tensors: torch would move them to the device in a way of its own."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _count(func: Any) -> None:
    frame, where = sys._getframe(1), "test"
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/gemify/" in name or "/transformers/" in name:
            where = f"{'/'.join(name.rsplit('/', 3)[1:])}:{frame.f_lineno}"
            break
        frame = frame.f_back
    WAITS[f"{func} {where}"] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, PretendTensor)]
    device = kwargs.get("device")
    to_device = bool(ours) if device is None else torch.device(device).type == NAME
    if not ours and not to_device:
        return func(*args, **kwargs)
    if func._can_decompose():  # in inference mode these come as they are
        with _Factories():
            return func.decompose(*args, **kwargs)
    _require_one_device(func, args, tensors)
    across = func in _COPIES and (not to_device or len(ours) < len(tensors)) and tensors[-1].numel()
    if func in _WAITING or across:
        _count(func)
    if func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):
        _count(func)  # a mask: its size is asked for
    known = {id(t.values): t for t in ours}
    plain_args, plain_kwargs = tree_map(lambda t: t.values if isinstance(t, PretendTensor) else t, (args, kwargs))
    if device is not None:
        plain_kwargs["device"] = "cpu" if to_device else device
    made = func(*plain_args, **plain_kwargs)
    if not to_device or func is aten._local_scalar_dense.default:
        return made
    if func is aten.copy_.default and not isinstance(args[0], PretendTensor):
        return args[0]

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value)

    return tree_map(wrap, made)


def _require_one_device(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise as CUDA does; it takes numbers, copies, and indices of the CPU (for which it waits)."""
    strange = [t for t in tensors if not isinstance(t, PretendTensor)]
    if func in _COPIES or all(t.dim() == 0 for t in strange):
        return
    if func in _INDEXED and isinstance(args[0], PretendTensor):
        indices = [t for t in args[1] if t is not None]
        if all(any(t is index for index in indices) for t in strange):
            _count(func)
            return
    raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {NAME} and cpu")


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where none is among the arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def install() -> None:
    """Add the device to this process, in all of its threads."""
    import threading

    backend = _DummyBackendModule()
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
    _setup_privateuseone_for_python_backend(NAME, backend_module=backend)
    _Factories().__enter__()
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _through_the_cpu(getattr(torch, name)))
    run = threading.Thread.run

    def run_with_factories(self: threading.Thread) -> None:
        with _Factories():
            run(self)

    threading.Thread.run = run_with_factories  # type: ignore[method-assign]


def _through_the_cpu(make: Any) -> Any:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, **({} if device is None else {"device": device}), **kwargs)
        if isinstance(data, PretendTensor):
            return data.to(kwargs.get("dtype") or data.dtype)
        return make(data, *args, **kwargs).to(device)

    return made
