"""Where models are put, and in which precision: devices that are there, and what a model's identity says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from limbeck.config import ranks
from limbeck.config.machine import Machine
from limbeck.types import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Precision:
    """How a model's weights are kept. `suffix` is part of the model's identity: another precision is another model."""

    dtype: torch.dtype = torch.float32
    quantise: str | None = None

    @classmethod
    def named(cls, dtype: str | None, quantise: str | None = None) -> Precision:
        """From a recipe's words; None stands for float32."""
        return cls(torch.float32 if dtype is None else getattr(torch, dtype), quantise)

    @classmethod
    def of_base(cls, base: str | None) -> Precision:
        """Of the frozen weights under adapters, from a recipe's `student.lora.base`."""
        return cls.named(base) if base in (None, "bfloat16") else cls(quantise=base)

    @property
    def suffix(self) -> str:
        words = [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        return "".join(f"+{word}" for word in [*words, *([self.quantise] if self.quantise else [])])


FULL = Precision()


@dataclass(frozen=True)
class Placement:
    """A device, and the attention implementation of the models there (None: transformers' choice)."""

    device: torch.device = CPU
    attention: str | None = None

    def put(self, net: PreTrainedModel) -> PreTrainedModel:
        """Move a model here, in place.

        Raises:
            UserError: no room there, or an attention that the model or this machine does not have.
        """
        if self.attention not in (None, net.config._attn_implementation):
            try:
                net.set_attn_implementation(self.attention)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"machine.attention: {net.config.model_type} can't use {self.attention!r} here:"
                    f" {str(error).splitlines()[0]}; leave it out, or write sdpa"
                ) from error
        if net.device != self.device:
            try:
                net.to(self.device)  # type: ignore[arg-type]  # transformers' own `to` is not typed
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.device} has no room for {net.config.model_type} of {net.num_parameters():,} weights in"
                    f" {net.dtype}: give the teacher dtype: bfloat16 or quantise: int4, or a machine.teacher_device of"
                    " its own"
                ) from error
            net.tie_weights()
        return net


@dataclass(frozen=True)
class Devices:
    """The devices of a run: where the student is, with everything that is compared with it, and where teachers are."""

    machine: Machine

    @cached_property
    def student(self) -> Placement:
        return Placement(find_device(self.machine.device, "machine.device"), self.machine.attention)

    @cached_property
    def teacher(self) -> Placement:
        if self.machine.teacher_device is None:
            return self.student
        return Placement(find_device(self.machine.teacher_device, "machine.teacher_device"), self.machine.attention)

    def facts(self) -> dict[str, str]:
        """What was taken, for people and for the run folder."""
        return {"device": describe(self.student.device), "teacher_device": describe(self.teacher.device)}


def find_device(name: str, path: str = "device") -> torch.device:
    """The device of this name; `auto` is the first CUDA device where there is one, else the CPU. Each of several ranks
    gets the CUDA device of its own number.

    Raises:
        UserError: it is not on this machine; the message says what is. Or several ranks would share it.
    """
    if name == "auto" and not torch.cuda.is_available():
        return CPU
    if name == "auto" or (name == "cuda" and ranks.is_launched()):
        name = f"cuda:{ranks.local_rank()}"
    elif ranks.local_world_size() > 1 and name != "cpu":
        raise UserError(
            f"{path}: {ranks.local_world_size()} ranks can't share {name!r}: write auto or cuda, so that each takes the"
            " CUDA device of its number, or cpu"
        )
    try:
        device = torch.device(name)
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        here = ", ".join(_devices_here())
        raise UserError(
            f"{path}: there is no {name!r} here ({str(error).splitlines()[0]}); this machine has {here}: name one of"
            " those, or leave it out"
        ) from error


def check_dtype(dtype: torch.dtype, device: torch.device, path: str) -> None:
    """Refuse a type that the device only imitates. `path` is where the recipe asks for it.

    Raises:
        UserError: the device has no bfloat16; the message says what to write instead.
    """
    if dtype == torch.bfloat16 and device.type == "cuda":
        with torch.cuda.device(device):
            has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        if not has_it:
            raise UserError(f"{path}: {describe(device)} has no bfloat16: leave it out there, or take another device")


def multiplies_in_bfloat16() -> bool:
    """Whether the processor has products of bfloat16 (AVX-512 BF16 or AMX), which take half of float32's time."""
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _devices_here() -> list[str]:
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def describe(device: torch.device) -> str:
    """The device in words: its name, and the model where the system says it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on an accelerator; None for the CPU, and where the device can't say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the process, has no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)
