"""A pretend device "gpu" on a machine without one: each tensor on it wraps a CPU tensor that computes for real.

Values exist, so code that depends on data runs and gives the CPU's results to the bit. Checked or counted:

- an operator that is given tensors of both devices where CUDA would raise: raised as `MixedDevices`;
- waits, where the host would wait for the device (`.item()`, nonzero, a mask as index, a copy to the host);
- uploads, copies from the host's memory;

the last two by their place in the package. The device registers itself for the whole process: use it in a subprocess.

Not covered: kernels, speed, memory, CUDA's nondeterminism. `parameter.data = x` does not reach the wrapped tensor, `to`
unties tied weights (call `tie_weights`), `inference_mode` becomes `no_grad`, and attention runs its plain form.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import limbeck

NAME = "gpu"
PACKAGE = str(Path(limbeck.__file__).parent)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "copy"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip


class MixedDevices(RuntimeError):
    """Tensors of two devices in one operator."""


class Counts:
    """Waits and uploads by place, and the number of operators on the device."""

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()
        self.operators = 0

    def clear(self) -> None:
        self.waits.clear()
        self.uploads.clear()
        self.operators = 0


COUNTS = Counts()


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Counts]:
    """Inside, `device="gpu"` works. Counts start anew."""
    device()
    COUNTS.clear()
    lifted_before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # `torch.tensor(data, device="gpu")` is made on the host, then moved by us
    mode = torch.autograd.grad_mode.inference_mode  # a wrapper can't be a view of an inference tensor
    kept = mode.__enter__, mode.__exit__
    mode.__enter__ = _enter_no_grad
    mode.__exit__ = _leave_no_grad
    try:
        with _Mode():
            yield COUNTS
    finally:
        mode.__enter__, mode.__exit__ = kept
        torch._C._set_only_lift_cpu_tensors(lifted_before)


@functools.cache
def device() -> torch.device:
    """The pretend device, registered at the first call."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    backend_registration._setup_privateuseone_for_python_backend(NAME, device_guard=Guard())
    return torch.device(f"{NAME}:0")


def _enter_no_grad(mode: Any) -> Any:
    stand_in = torch.no_grad()
    mode.__dict__.setdefault("_instead", []).append(stand_in)
    return stand_in.__enter__()


def _leave_no_grad(mode: Any, *error: Any) -> Any:
    return mode._instead.pop().__exit__(*error)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class Gpu(Tensor):
    """A tensor on the pretend device; `inner` is the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Gpu:
        assert not isinstance(inner, Gpu)
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device(),
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Gpu({self.inner!r})"

    def tolist(self) -> Any:
        COUNTS.waits[f"tolist: {_place()}"] += 1
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a tensor of the device to numpy at {_place()}")

    def new_tensor(self, data: Any, **how: Any) -> Gpu:
        COUNTS.uploads[f"new_tensor: {_place()}"] += 1
        return Gpu(torch.tensor(data, dtype=how.get("dtype", self.dtype)))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, _uploaded(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _uploaded(index), value)


def _uploaded(index: Any) -> Any:
    """Lists as indices go to the device, as torch does it in C++, past every mode."""
    if isinstance(index, tuple):
        return tuple(_uploaded(part) for part in index)
    if isinstance(index, (list, range)):
        COUNTS.uploads[f"list as index: {_place()}"] += 1
        return Gpu(torch.tensor(list(index)))
    return index


def _place() -> str:
    """The innermost two lines of the package on the stack, else the innermost of the models' library or an optimizer."""
    stack = traceback.extract_stack()
    frames = [frame for frame in stack if frame.filename.startswith(PACKAGE)][-2:]
    frames = (
        frames
        or [frame for frame in stack if "transformers" in frame.filename or "/torch/optim" in frame.filename][-1:]
    )
    short = (
        f"{frame.filename.removeprefix(PACKAGE + '/').split('site-packages/')[-1]}:{frame.lineno}" for frame in frames
    )
    return " < ".join(reversed(list(short)))


def _bare(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, Gpu) else leaf, value)


def _wrapped(value: Any) -> Any:
    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, Gpu):
            return leaf
        return Gpu(leaf.detach() if leaf.requires_grad else leaf)

    return tree_map(wrap, value)


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: on the wrapped tensors, looked at and counted."""
    name = operator._schema.name.split("::")[-1]
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, Gpu)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, Gpu)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not on_device and (asked is None or asked.type == "cpu"):
        return operator(*args, **kwargs)
    COUNTS.operators += 1
    noise = kwargs.get("generator")
    if noise is not None and noise.device.type != NAME:
        raise MixedDevices(f"{operator}: a generator of the host for a tensor of the device at {_place()}")
    if name in COPIES:
        return _copied(operator, args, kwargs, asked)
    if on_device and on_host:
        _check(operator, args, on_device, on_host)
    if on_device and _waits(operator, name, args, kwargs):
        COUNTS.waits[f"{name}: {_place()}"] += 1
    plain = {key: value for key, value in kwargs.items() if key != "device"}
    if asked is not None:
        plain["device"] = "cpu"
    result = operator(*_bare(args), **_bare(plain))
    if asked is not None and asked.type == "cpu":
        return result
    if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(result)[0]):
        return result
    return _with_same_objects(operator, args, kwargs, _wrapped(result))


def _waits(operator: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name in INDEXING:
        return _masked(name, args)
    counted = name == "repeat_interleave" and operator._overloadname == "Tensor"
    return name in WAITS or (counted and kwargs.get("output_size") is None)


def _masked(name: str, args: Any) -> bool:
    """Whether an index is a mask whose ones must be counted; a masked fill with a number needs no count."""
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    if not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return False
    return name == "index" or args[2].dim() > 0 or len(indices) > 1


def _check(operator: Any, args: Any, on_device: list[Tensor], on_host: list[Tensor]) -> None:
    """CUDA's rules, about: numbers of the host in pointwise operators, indices of the host, and nothing else."""
    if operator._schema.name.split("::")[-1] in INDEXING:
        target_on_device = isinstance(args[0], Gpu)
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if target_on_device and not all(isinstance(index, Gpu) for index in indices):
            COUNTS.uploads[f"index from the host: {_place()}"] += 1
        if target_on_device and (len(args) < 3 or isinstance(args[2], Gpu) or args[2].dim() == 0):
            return
    elif torch.Tag.pointwise in operator.tags and all(tensor.dim() == 0 for tensor in on_host):
        return
    shapes = [f"gpu{tuple(tensor.shape)}" for tensor in on_device[:3]] + [
        f"cpu{tuple(tensor.shape)}" for tensor in on_host[:3]
    ]
    raise MixedDevices(f"{operator}: tensors of two devices, {', '.join(shapes)}, at {_place()}")


def _copied(operator: Any, args: Any, kwargs: dict[str, Any], asked: torch.device | None) -> Any:
    if not operator._schema.name.endswith("_to_copy"):
        target, source = args[0], args[1]
        _count_copy(source, to_device=isinstance(target, Gpu))
        result = operator(*_bare(args), **_bare(kwargs))
        return target if operator._schema.name.endswith("copy_") else _wrapped(result)
    source = args[0]
    to_device = isinstance(source, Gpu) if asked is None else asked.type == NAME
    _count_copy(source, to_device)
    plain = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    result = torch.ops.aten._to_copy.default(_bare(source), **plain)
    return _wrapped(result) if to_device else result


def _count_copy(source: Tensor, to_device: bool) -> None:
    if isinstance(source, Gpu) and not to_device:
        COUNTS.waits[f"to the host: {_place()}"] += 1
    elif not isinstance(source, Gpu) and to_device:
        COUNTS.uploads[f"upload: {_place()}"] += 1


def _with_same_objects(operator: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """What an operator writes into is given back as the very object that came in."""
    schema = operator._schema
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs

    def same(returned: Any, value: Any) -> Any:
        if returned.alias_info is None or not returned.alias_info.is_write:
            return value
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.before_set == returned.alias_info.before_set:
                return given[argument.name]
        return value

    if len(schema.returns) == 1:
        return same(schema.returns[0], result)
    if not isinstance(result, (list, tuple)):
        return result
    return type(result)(same(returned, value) for returned, value in zip(schema.returns, result, strict=True))
