"""Write a model's folder as one GGUF file, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, get_tensor_name_map
from safetensors import safe_open
from transformers import GenerationConfig

from limbeck.models.folder import read_config
from limbeck.models.load import load_tokenizer
from limbeck.models.quantised import quantisation
from limbeck.models.to_gguf.families import Family, add_sizes, arranged, extra_tensors, family_of
from limbeck.models.to_gguf.types import FileType, encode, stored_bytes
from limbeck.models.to_gguf.vocabulary import add_vocabulary
from limbeck.models.weights import first_line
from limbeck.types import UserError

ROOM = 64 * 2**20  # bytes that must stay free: the vocabulary, and what else is written
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: where it is, its name in the GGUF file, and its shape."""

    file: Path | None
    source: str
    target: str
    shape: tuple[int, ...]


def write_gguf(folder: Path, path: Path, kind: FileType, name: str, progress: Progress = lambda done, of: None) -> None:
    """Write the model in `folder` (Hugging Face form, whole weights) to `path`. `name` stands for it in messages.

    Raises:
        UserError: a family, a tokenizer or weights that can't be written, or too little room on the disk.
    """
    config = read_config(folder, name)
    if quantisation(config) is not None:
        raise UserError(f"{name}: its weights are codes already: export the folder that they were made of")
    family = family_of(config, name)
    extra = extra_tensors(config)
    tensors = _tensors(folder, family, config, name)
    tensors += [Stored(None, target, target, tuple(weight.shape)) for target, weight in extra.items()]
    rows = next(tensor.shape[0] for tensor in tensors if tensor.target == "token_embd.weight")
    tied = not any(tensor.target == "output.weight" for tensor in tensors)
    codes = [kind.codes_of(tensor.target, tensor.shape, config.num_hidden_layers, tied) for tensor in tensors]
    sizes = [stored_bytes(tensor.shape, code) for tensor, code in zip(tensors, codes, strict=True)]
    check_room(path.parent, sum(sizes))
    writer = GGUFWriter(path, family.name)
    writer.add_name(name)
    writer.add_file_type(kind.number)
    writer.add_quantization_version(2)
    add_sizes(writer, family, config, rows=rows, name=name)
    add_vocabulary(writer, load_tokenizer(str(folder)), rows, name, ends=_configured_ends(folder))
    for tensor, code, size in zip(tensors, codes, sizes, strict=True):
        writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), size, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (tensor, code) in enumerate(zip(tensors, codes, strict=True), 1):
        weight = extra[tensor.source] if tensor.file is None else _read(tensor.file, tensor.source)
        weights = arranged(family, config, tensor.source, weight).numpy()
        writer.write_tensor_data(encode(weights, code))
        progress(number, len(tensors))
    writer.close()


def _configured_ends(folder: Path) -> set[int]:
    """Tokens that end an answer according to the settings of generation, or without them to the configuration's file,
    since the defaults of its class are no tokens of this model.

    Raises:
        UserError: the settings can't be read.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            found: Any = GenerationConfig.from_pretrained(folder).eos_token_id
        except Exception as error:  # the library raises many kinds on settings that it can't use
            raise UserError(f"{file} can't be read ({first_line(error)}): mend it, or take it away") from error
    else:
        settings = json.loads((folder / "config.json").read_text())
        found = settings.get("eos_token_id", settings.get("text_config", {}).get("eos_token_id"))
    return {end for end in (found if isinstance(found, list) else [found]) if isinstance(end, int)}


def check_room(folder: Path, wanted: int) -> None:
    """Refuse to begin a file that the disk has no room for.

    Raises:
        UserError: less than `wanted` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted + ROOM:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free, and the export takes {(wanted + ROOM) / 1e6:.0f} MB: make room,"
            " take a smaller --type, or give --out on another disk"
        )


def _tensors(folder: Path, family: Family, config: Any, name: str) -> list[Stored]:
    """All tensors of the folder by llama.cpp's names, the embedding first."""
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for source in sorted(tensors.keys()):
                if source == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise UserError(f"{name}: llama.cpp's {family.name!r} models have no tensor for {source}")
                found.append(Stored(file, source, target, tuple(tensors.get_slice(source).get_shape())))
    if not any(tensor.target == "token_embd.weight" for tensor in found):
        raise UserError(f"{name}: {folder} has no embedding in safetensors, so it is not a whole model")
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        weight: torch.Tensor = tensors.get_tensor(name)
    return weight.float()
