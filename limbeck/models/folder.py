"""A model as a Hugging Face folder: read, written, converted from GGUF.

No remote code is run and no pickle is read: safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from limbeck.models.gguf_file import check_gguf
from limbeck.models.quantised import as_read, drop_quantisation
from limbeck.models.to_gguf.families import read_settings
from limbeck.models.weights import (
    check_amount,
    check_config,
    check_files,
    check_loaded,
    first_line,
    model_class,
    refuse_scores,
    text_config,
)
from limbeck.storage.files import full_disk_as_os_error, new_directory, write_json
from limbeck.types import UserError

ANY_TEXT = "a, 1. Die Welt? Привет 你好 東京 안녕 سلام नमस्ते"  # some of which any tokenizer knows
SPECIAL = {  # tokens with a meaning, and llama.cpp's keys for them
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
LOCAL_TRACES = ("is_local", "local_files_only", "_name_or_path", "name_or_path")


def read_weights(folder: Path, source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The decoder in a folder, in evaluation mode. `source` is the user's name for it.

    Raises:
        UserError: not a causal language model, damaged, or without some of its weights.
    """
    config = read_config(folder, source)
    refuse_scores(config, source)
    check_files(folder, source)
    try:
        check_amount(folder, config, source)
        net: PreTrainedModel
        net, info = model_class(config).from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, all by name
            output_loading_info=True,
            **as_read(config),
        )
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds on files that it can't use; the user needs one
        raise UserError(f"can't load the model {source!r}: {first_line(error)}") from error
    check_loaded(info, source)
    if as_read(config):
        drop_quantisation(net.config)
    _tell_own_head(net)
    net.eval()
    return net


def _tell_own_head(net: PreTrainedModel) -> None:
    """Let the configuration of a model whose files hold a head of its own not call it tied: transformers goes by the
    files then, but servers and other programs by the configuration."""
    head: Any = net.get_output_embeddings()
    embedding: Any = net.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for part in (net.config, text_config(net.config)):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def read_tokenizer(folder: Path, source: str) -> Tokenizer:
    """The tokenizer in a folder. Its chat template is looked at by `load.py`, where a recipe may give it one.

    Raises:
        UserError: there is none, or it has no token of text or no end token.
    """
    try:
        with quiet():
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            read = set(tokenizer(ANY_TEXT, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the library raises many kinds on files that it can't use; the user needs one
        reason = _reason(folder / "tokenizer_config.json", error)
        raise UserError(f"can't load the tokenizer of {source!r}: {reason}{_cure(folder)}") from error
    if not read - set(tokenizer.all_special_ids):  # some classes make an empty one where their files are missing
        raise UserError(
            f"the tokenizer of {source!r} knows no token of text{_cure(folder) or ': its tokenizer.json is damaged'}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source!r} has no end-of-sequence token; use an instruction-tuned model, or add one to"
            " its tokenizer"
        )
    return tokenizer


def _reason(file: Path, error: Exception) -> str:
    """A library's words; or that a model takes its makers' own code, for which they recommend to run it."""
    if "custom code" not in str(error):
        return first_line(error)
    return f"{file.name} asks for code of its makers, which is never run here: choose a model that transformers knows"


def _cure(folder: Path) -> str:
    """What helps against a tokenizer that can't be loaded, where its files tell."""
    if (folder / "tokenizer.json").exists():
        return ""
    pieces = [file.name for file in sorted(folder.glob("*.model"))]
    if pieces:  # as the makers of Llama 2 and Mistral 7B gave it
        return (
            f"; it has {pieces[0]} and no tokenizer.json: put the tokenizer.json of the same model beside it, or pip"
            " install sentencepiece protobuf, which convert it"
        )
    return "; it has no tokenizer.json: save the model's tokenizer beside its weights"


def read_config(folder: Path, source: str) -> Any:
    """The configuration in a folder.

    Raises:
        UserError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_config(config, source)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds on settings that it can't use; the user needs one
        raise UserError(
            f"can't read the configuration of {source!r}: {_reason(folder / 'config.json', error)}"
        ) from error
    return config


def convert_gguf(path: Path, target: Path, template: str | None = None) -> None:
    """Dequantise a GGUF file to fp32 and save it as a Hugging Face directory, with a chat `template` if the file has
    none.

    Raises:
        UserError: a file that is not a whole GGUF model of a known architecture.
    """
    check_gguf(path)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            check_config(config, str(path))
            reader = GGUFReader(path)
            _read_settings(config, reader, str(path))
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            tokenizer = _with_own_tokens(tokenizer, reader)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            net, info = loaded
            check_loaded(info | {"unexpected_keys": ()}, str(path))  # such as rope_freqs, which became settings
            _check_biases(net, reader, str(path))
        except UserError:
            raise
        except Exception as error:  # the reader raises many kinds on a broken file; the user needs one
            raise UserError(f"{path} can't be read as a GGUF model: {error}") from error
        tokenizer.chat_template = tokenizer.chat_template or template
        net.generation_config.eos_token_id = _ends(reader, tokenizer)
        with new_directory(target) as folder:
            save_model(net, tokenizer, folder)


def _read_settings(config: Any, reader: GGUFReader, source: str) -> None:
    """Add to a configuration the settings of its file that the library doesn't read."""
    arch = reader.fields["general.architecture"].contents()
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith(f"{arch}.")}
    factors = {
        tensor.name: torch.from_numpy(tensor.data.astype("float32"))
        for tensor in reader.tensors
        if tensor.name.startswith(("rope_freqs.", "rope_factors_"))
    }
    read_settings(config, fields | {"general.architecture": arch}, factors, source)


def _check_biases(net: PreTrainedModel, reader: GGUFReader, source: str) -> None:
    """Refuse a file with more biases than the library's model has places for; it would drop them silently.

    Raises:
        UserError: the message names the first of them.
    """
    given = [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]
    if len(given) > sum(name.endswith("bias") for name in net.state_dict()):
        raise UserError(
            f"{source}: its biases, such as {given[0]}, have no place in the {net.config.model_type} model that is read"
            " from such a file: take the Hugging Face folder of the model"
        )


def _ends(reader: GGUFReader, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's own, and those that the file names besides."""
    found = (reader.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    named = {field.contents() for field in found if field is not None}
    further = {int(end) for end in named if isinstance(end, int) and 0 <= end < len(tokenizer)}
    return [tokenizer.eos_token_id, *sorted(further - {tokenizer.eos_token_id})]


def _with_own_tokens(tokenizer: Any, reader: GGUFReader) -> Any:
    """A tokenizer with the special tokens of its file alone, where the library's classes add some that the model has no
    rows for, or spell those of the file otherwise."""
    wanted = ("model", "tokens", "token_type", *SPECIAL.values())
    found = {key: reader.fields.get(f"tokenizer.ggml.{key}") for key in wanted}
    fields = {key: field.contents() for key, field in found.items() if field is not None}
    texts, kinds, end = fields.get("tokens"), fields.get("token_type"), fields.get("eos_token_id")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not texts or not kinds or state["model"]["type"] != "BPE":
        return tokenizer
    if all(one["id"] < len(texts) for one in state["added_tokens"]) and end in (None, tokenizer.eos_token_id):
        return tokenizer
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED) if fields.get("model") == "gpt2" else (TokenType.CONTROL,)
    special = {number: texts[number] for number, kind in enumerate(kinds) if kind in whole}
    spelled = {number: text for text, number in state["model"]["vocab"].items() if number < len(texts)} | special
    state["model"]["vocab"] = {text: number for number, text in spelled.items()}
    if state["model"].get("unk_token") not in state["model"]["vocab"]:
        state["model"]["unk_token"] = None
    state["added_tokens"] = [
        one
        for one in state["added_tokens"]
        if not one["special"] and one["id"] < len(texts) and one["id"] not in special
    ]
    backend = Backend.from_str(json.dumps(state))
    for number, text in sorted(special.items()):
        token = AddedToken(text, normalized=False, special=kinds[number] == TokenType.CONTROL)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    names = {name: texts[fields[key]] for name, key in SPECIAL.items() if key in fields}
    begins = {key: bool(getattr(tokenizer, key, False)) for key in ("add_bos_token", "add_eos_token")}
    template = tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names, **begins)


def save_model(net: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face directory without traces of this machine. `folder` must exist; see `new_directory`."""
    with quiet():
        with full_disk_as_os_error():
            net.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        write_json(folder / name, {key: value for key, value in settings.items() if key not in LOCAL_TRACES})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the libraries' progress bars and warnings; errors still raise."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
