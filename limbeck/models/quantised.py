"""Folders whose weights are codes already (bitsandbytes, AWQ, GPTQ, FP8, MXFP4): which library reads them, and what
they can be: a teacher, where the library is there. A student's weights must be numbers that a step can change.

FP8 and MXFP4 are read as plain numbers, so such a model can be anything that another can.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from limbeck.types import UserError

CONVERT = (
    "give the model that it was made of, or convert it: load it in transformers, net.dequantize(), net.save_pretrained"
)


@dataclass(frozen=True)
class Quantised:
    """A way of quantising that transformers reads: the library that it takes, and whether it is read as numbers."""

    title: str
    library: str | None = None
    install: str = ""
    as_numbers: Any = None


KINDS = {
    "bitsandbytes": Quantised("bitsandbytes", "bitsandbytes", "pip install 'limbeck[quantise]'"),
    "awq": Quantised("AWQ", "gptqmodel", "pip install gptqmodel"),
    "gptq": Quantised("GPTQ", "gptqmodel", "pip install gptqmodel"),
    "compressed-tensors": Quantised("compressed-tensors", "compressed_tensors", "pip install compressed-tensors"),
    "fp8": Quantised("FP8", as_numbers=lambda: FineGrainedFP8Config(dequantize=True)),
    "mxfp4": Quantised("MXFP4", as_numbers=lambda: Mxfp4Config(dequantize=True)),
}


def quantisation(config: Any) -> str | None:
    """The way in which a folder's weights are quantised, from its configuration; None if they are numbers."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    way = settings.get("quant_method")
    if way is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        way = "bitsandbytes"
    return str(getattr(way, "value", way))


def as_read(config: Any) -> dict[str, Any]:
    """What `from_pretrained` must be told to read such a folder, beyond what the folder says itself."""
    way = quantisation(config)
    kind = KINDS.get(way or "")
    return {} if kind is None or kind.as_numbers is None else {"quantization_config": kind.as_numbers()}


def check_readable(config: Any, source: str) -> None:
    """Refuse a quantised folder that can't be read here.

    Raises:
        UserError: it names what to install, or how to convert the folder.
    """
    way = quantisation(config)
    if way is None:
        return
    kind = KINDS.get(way)
    if kind is None:
        raise UserError(f"{source} is quantised ({way}) in a way that is not read here: {CONVERT}")
    if kind.library is not None and find_spec(kind.library) is None:
        raise UserError(f"{source} is {kind.title}-quantised, which takes {kind.library}: {kind.install}; or {CONVERT}")


def check_numbers(config: Any, source: str) -> None:
    """Refuse a folder whose weights stay codes where they are to be trained, or made into a student.

    Raises:
        UserError: it says how to convert the folder.
    """
    check_readable(config, source)
    way = quantisation(config)
    if way is not None and KINDS[way].as_numbers is None:
        raise UserError(
            f"{source} is quantised ({KINDS[way].title}): it can be a teacher, but no student can start from it, since"
            f" its weights can't be trained; {CONVERT}"
        )


def drop_quantisation(config: Any) -> None:
    """Make the configuration of a model that was read as numbers say so, in place."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
