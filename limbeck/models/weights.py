"""Whether a folder's files hold the weights of its configuration, told by `transformers` on the meta device, where a
model has sizes and no numbers; and the sizes of a model, read from there and not from names in a configuration.

Nothing here reads weights.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from limbeck.types import UserError, printable

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
LFS = b"version https://git-lfs"
NAMES_SHOWN = 3
NUMBERS_IN_A_BYTE = 2  # of the densest weights that are read, of 4 bits
MOST = {"num_hidden_layers": 1000, "hidden_size": 2**20, "vocab_size": 2**24, "max_position_embeddings": 2**40}


def model_class(config: Any) -> Any:
    """The automatic class that knows this configuration: of decoders of text, else of those that also read images,
    whose text part is what is distilled.

    Raises:
        UserError: transformers knows no decoder of this type.
    """
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise UserError(
        f"models of type {getattr(config, 'model_type', '?')!r} are not supported: transformers has no decoder of text"
        " of that type"
    )


def scores_text(config: Any) -> bool:
    """Whether a configuration is of a model that gives scores or classes of a text, and writes none."""
    names = getattr(config, "architectures", None)
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


def refuse_scores(config: Any, source: str) -> None:
    """Refuse a model that gives scores or classes where one that writes is needed. UserError names it."""
    if scores_text(config):
        raise UserError(
            f"{source} gives scores of a text ({config.architectures[0]}) and writes none: name it as a reward"
            " (rollout.rewards: [{model: ...}]), and a model that writes here"
        )


def empty_model(config: Any) -> PreTrainedModel:
    """The model of a configuration on the meta device: all names and sizes, no numbers.

    Raises:
        UserError: no decoder, or sizes that don't go together.
    """
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _empty(_Hashed(config, f"{type(config).__name__} {settings}"))


class _Hashed:
    """A configuration as a key: equal where all settings are."""

    def __init__(self, config: Any, text: str) -> None:
        self.config = config
        self.text = text

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.text == other.text


@lru_cache(maxsize=16)
def _empty(key: _Hashed) -> PreTrainedModel:
    config = copy.deepcopy(key.config)  # from_config writes into what it gets
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"):
            net: PreTrainedModel = model_class(config).from_config(config, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # each family's own code raises its own kinds
        raise UserError(
            f"the configuration (model type {getattr(config, 'model_type', '?')!r}) describes no model that can be"
            f" built: {first_line(error)}"
        ) from error
    return net


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text: all of it, unless the model also reads images or sound."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_config(config: Any, source: str) -> None:
    """Refuse a configuration whose sizes are no numbers, or of a model that nobody has: to build it without weights
    would take minutes.

    Raises:
        UserError: the message names the setting and its value.
    """
    for name, most in MOST.items():
        value = getattr(text_config(config), name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(
                f"{source}: its config.json has {name} {printable(repr(value))}, which must be a whole number from 1 to"
                f" {most:,}: copy it again, or undo what was edited"
            )


def context_length(config: Any) -> int:
    """How many tokens a model of this configuration can read; without a limit, a very large number."""
    return int(getattr(text_config(config), "max_position_embeddings", None) or sys.maxsize)


def head_rows(net: PreTrainedModel) -> int:
    """How many tokens a model has logits for."""
    head: Any = net.get_output_embeddings()
    return int(head.weight.shape[0])


def layer_list(decoder: Any) -> tuple[str, nn.ModuleList]:
    """(its name in the decoder, the list of the decoder's layers).

    Raises:
        UserError: a decoder without exactly one list of layers.
    """
    count = text_config(decoder.config).num_hidden_layers
    found = [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"{decoder.config.model_type}: dropping or comparing layers needs a decoder with one list of layers, and"
            f" this one has {len(found)}"
        )
    return found[0]


def check_folder(folder: Path, config: Any, source: str) -> None:
    """Refuse a folder whose safetensors are not whole, or hold other tensors than its configuration asks for.

    Raises:
        UserError: the message names the file or the tensor.
    """
    check_files(folder, source)
    refuse_scores(config, source)
    if getattr(config, "quantization_config", None) is not None:
        return  # the names of codes and scales are those of the library that reads them
    try:
        _, info = model_class(config).from_pretrained(
            folder,
            device_map="meta",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # each family's own code raises its own kinds
        raise UserError(f"can't load the model {source!r}: {first_line(error)}") from error
    check_loaded(info, source)


def check_amount(folder: Path, config: Any, source: str) -> None:
    """Refuse a configuration that asks for many more numbers than its files can hold, before memory is taken for them.

    Raises:
        UserError: the message names the tensors.
    """
    held = sum(file.stat().st_size for file in _weight_files(folder, source))
    if sum(tensor.numel() for tensor in empty_model(config).parameters()) > NUMBERS_IN_A_BYTE * held:
        check_folder(folder, config, source)


def check_files(folder: Path, source: str) -> None:
    """Refuse weight files that are missing, empty, cut off, placeholders, or pickles.

    Raises:
        UserError: the message names the file.
    """
    files = _weight_files(folder, source)
    for file in files:
        if not file.exists():
            raise UserError(f"{source}: {file.name} is missing, which its index names: copy it again")
        with file.open("rb") as start:
            head = start.read(len(LFS))
        if head == LFS:
            raise UserError(f"{source}: {file.name} is a placeholder of Git LFS, not weights: run `git lfs pull` there")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"can't load the model {source!r}: {file.name} is damaged or cut off ({first_line(error)}): copy it"
                " again"
            ) from error


def _weight_files(folder: Path, source: str) -> list[Path]:
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [folder / str(name) for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{source}: {index.name} can't be read ({first_line(error)}): copy it again") from error
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise UserError(
            f"{source}: its weights are in {pickled[0]} alone, a format that can run code and is not read: save them as"
            " safetensors (net.save_pretrained in transformers does)"
        )
    raise UserError(f"{source} has no weights: no model.safetensors and no model.safetensors.index.json")


def check_loaded(info: dict[str, Any], source: str) -> None:
    """Refuse a load that left tensors without weights, or weights without a tensor; `info` is what `from_pretrained`
    says of it. Tied heads may be absent, and transformers does not count them.

    Raises:
        UserError: the message names the first tensors.
    """
    for error in info.get("error_msgs") or ():
        raise UserError(f"{source}: {first_line(error)}")
    for key, remedy in (
        (
            "mismatched_keys",
            "have another size in the files than in config.json: files of two models, or edited",
        ),
        ("missing_keys", "are missing in its files and would be random numbers: copy them again, all shards"),
        (
            "unexpected_keys",
            "are in its files and have no place in its config.json: files of two models, or edited",
        ),
    ):
        names = sorted(_name(entry) for entry in info.get(key) or ())
        if names:
            raise UserError(f"{source}: {_listed(names)} {remedy}")


def _name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    name, *sizes = entry
    return f"{name} ({' and '.join(str(list(size)) for size in sizes)})"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"the weights {', '.join(names[:NAMES_SHOWN])}{more}"


def first_line(error: object) -> str:
    """The first line of a library's words; the name of its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
