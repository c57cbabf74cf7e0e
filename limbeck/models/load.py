"""Load a model with its tokenizer: a Hugging Face directory, a hub id, a GGUF file, or a name that Limbeck knows.

GGUF weights are dequantised once, saved as a Hugging Face directory in the cache, and loaded from there ever after.
No remote code is run and no pickle is read: safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from limbeck.models.context import PromptContext
from limbeck.models.named import NAMED, fetch, home
from limbeck.objectives.head import Head
from limbeck.storage.files import exclusive, file_sha256, full_disk_as_os_error, new_directory, sweep, write_json
from limbeck.types import Message, UserError, content_hash, nearest

EDGE = 2**20
HUB_METADATA = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
LOCAL_TRACES = ("is_local", "local_files_only", "_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Model:
    """A decoder, its tokenizer, and `identity`: what a request key names (name and content, not a path).

    `prompt_context` is what it is shown beside the prompt, where that is something.
    """

    net: PreTrainedModel
    tokenizer: Tokenizer
    identity: str
    prompt_context: PromptContext | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as the tokenizer and the generation settings name them."""
        named = getattr(self.net.generation_config, "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return frozenset(token for token in ids if isinstance(token, int))

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; a head may have more rows."""
        return len(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def max_length(self) -> int:
        return int(getattr(self.net.config, "max_position_embeddings", 0) or 2**31)

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """The conversation as token ids, through the model's own (sandboxed) chat template, ready to be answered."""
        seen = messages if self.prompt_context is None else self.prompt_context(messages)
        ids: Any = self.tokenizer.apply_chat_template(list(seen), add_generation_prompt=True, return_dict=True)
        return list(ids["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        """A text as token ids, nothing added; what looks like a control token in it is text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def raw_ids(self, text: str) -> list[int]:
        """A text as token ids, its control tokens taken as such: for texts of ours in the model's own format, never for
        content."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def with_context(self, prompt_context: PromptContext | None) -> Model:
        """The same model shown something else beside the prompt: another teacher, with a name of its own."""
        return replace(
            self,
            prompt_context=prompt_context,
            identity=self.named(self.identity.partition("+sight-")[0], prompt_context),
        )

    @staticmethod
    def named(identity: str, prompt_context: PromptContext | None) -> str:
        """The identity of a model that is shown something."""
        return identity if prompt_context is None else f"{identity}+sight-{prompt_context.name}"


def header_of(tokenizer: Tokenizer) -> str | None:
    """The text before a user's first message in the chat template; None where the template puts other things around
    it."""
    mark = "USER MESSAGE"
    before, found, _ = str(
        tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    ).partition(mark)
    return before if found and before else None


def hidden_states(net: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, D] after the final norm. Right padding needs no mask: attention is causal."""
    hidden_BTD: Tensor = net.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def head_of(net: PreTrainedModel) -> Head:
    """The output projection, with the bias, soft cap, logit scale and LoRA adapter that the model has.

    Raises:
        UserError: a head that is not a linear layer.
    """
    config: Any = net.config.get_text_config()
    layer: Any = net.get_output_embeddings()
    low_rank = None
    if hasattr(layer, "lora_A"):
        if len(layer.active_adapters) != 1 or layer.disable_adapters:
            raise UserError(
                f"{net.config.model_type}: its head has several adapters, or a disabled one; merge them first"
            )
        (name,) = layer.active_adapters
        if not layer.merged:
            low_rank = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        layer = layer.get_base_layer()
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{net.config.model_type}: its head is not a linear layer; choose another model")
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite divides, Cohere multiplies
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, float(cap) if cap else None, low_rank)


def load_model(source: str, dtype: torch.dtype = torch.float32) -> Model:
    """Load `source` for inference, in evaluation mode.

    Args:
        source: a name of `limbeck models`, a directory in Hugging Face form, a `.gguf` file, or a hub id `owner/name`.

    Raises:
        UserError: nothing there, or something that is not a causal language model; the message says what to do.
    """
    folder, label = resolve(source)
    with quiet():
        try:
            net = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"can't load the model {source!r}: {str(error).splitlines()[0]}") from error
        tokenizer = load_tokenizer(source)
    net.eval()
    _check_head(net, source)
    return Model(net, tokenizer, _identity(folder, label))


@torch.no_grad()
def _check_head(net: PreTrainedModel, source: str) -> None:
    """Families scale and cap their logits under many names: losses would silently be another model's if one were
    missed."""
    tokens_BT = torch.arange(1, 5, device=net.device)[None]
    theirs_TV = net(tokens_BT, use_cache=False).logits[0].float()
    if not bool(theirs_TV.isfinite().all()):
        raise UserError(
            f"{source}: its logits are NaN or infinite: its weights are damaged, or overflow in {net.dtype}; fetch it"
            " again"
        )
    ours_TV = head_of(net).logits(hidden_states(net, tokens_BT)[0]).float()
    if not torch.allclose(ours_TV, theirs_TV, rtol=1e-2, atol=1e-2 * float(theirs_TV.abs().max())):
        raise UserError(
            f"{source}: models of type {net.config.model_type!r} make logits in a way not known here; choose another"
        )


def is_ready(source: str) -> bool:
    """False where a named model or a GGUF file still has to be fetched or converted."""
    if source in NAMED:
        return _converted(source).exists()
    return not source.endswith(".gguf") or _converted_file(source).exists()


def model_identity(source: str) -> str:
    """What `load_model(source).identity` will be, without loading the weights."""
    return _identity(*resolve(source))


def _identity(folder: Path, label: str) -> str:
    return f"{label}@{fingerprint(folder)}"


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer alone.

    Raises:
        UserError: no such model, or one without a tokenizer.
    """
    folder = _metadata_folder(source)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load the tokenizer of {source!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        missing = "end-of-sequence token" if tokenizer.eos_token_id is None else "chat template"
        raise UserError(
            f"the tokenizer of {source!r} has no {missing}; use an instruction-tuned model, or add one to its tokenizer"
        )
    return tokenizer


def load_config(source: str) -> Any:
    """The sizes of a model, for plans and early refusals: no weights are read, and a named model is not fetched.

    Raises:
        UserError: no such model.
    """
    if source in NAMED:
        return SimpleNamespace(**NAMED[source].config)
    folder = _metadata_folder(source)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the configuration of {source!r}: {str(error).splitlines()[0]}") from error


def resolve(source: str) -> tuple[Path, str]:
    """(directory in Hugging Face form, label). Fetches and converts where the source asks for it."""
    if source in NAMED:
        _convert_once(lambda: fetch(source), _converted(source), NAMED[source].template)
        return _converted(source), source
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        target = _converted_file(source)
        _convert_once(lambda: path, target)
        return target, path.stem
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{source} holds no config.json, so it is not a model in Hugging Face form")
        return path, path.resolve().name
    if _is_hub_id(source):
        return _from_hub(source, ["*.safetensors", *HUB_METADATA]), source
    raise UserError(
        f"no model {source!r}: not a directory, not a .gguf file, not a hub id (owner/name), and not a known"
        f" name{nearest(source, NAMED)}"
    )


def _metadata_folder(source: str) -> Path:
    """Where configuration and tokenizer lie; of a hub repository no weights are fetched for them."""
    return _from_hub(source, HUB_METADATA) if _is_hub_id(source) else resolve(source)[0]


def _is_hub_id(source: str) -> bool:
    local = source in NAMED or source.endswith(".gguf") or Path(source).expanduser().is_dir()
    return not local and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _from_hub(repository: str, files: list[str]) -> Path:
    """A local snapshot of a hub repository: safetensors, configuration and tokenizer only."""
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"can't fetch {repository!r} from the hub: {reason}; give a directory or a .gguf file instead"
        ) from error


def _converted_file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no GGUF file at {source}")
    return home() / "converted" / file_sha256(path)[:16]


def _converted(name: str) -> Path:
    return home() / "converted" / f"{name}-{NAMED[name].sha256[:16]}"


def _convert_once(weights: Callable[[], Path], target: Path, template: str | None = None) -> None:
    """Convert where it was not done before; of two processes at once the second waits for the first."""
    if target.exists():
        return
    with exclusive(home() / ".lock", wait=True):
        sweep(target.parent)
        if not target.exists():
            convert_gguf(weights(), target, template)


def convert_gguf(path: Path, target: Path, template: str | None = None) -> None:
    """Dequantise a GGUF file to fp32 and save it as a Hugging Face directory, with a chat `template` where the file has
    none.

    Raises:
        UserError: a file that is not a GGUF model of a known architecture.
    """
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            net = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
        except Exception as error:  # the reader raises many kinds on a broken file; the user needs one
            raise UserError(f"{path} can't be read as a GGUF model: {error}") from error
        tokenizer.chat_template = tokenizer.chat_template or template
        with new_directory(target) as folder:
            save_model(net, tokenizer, folder)


def save_model(net: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face directory without traces of this machine. `folder` exists; see `new_directory`."""
    with quiet():
        with full_disk_as_os_error():
            net.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        write_json(folder / name, {key: value for key, value in settings.items() if key not in LOCAL_TRACES})


def fingerprint(folder: Path) -> str:
    """16 hex digits over the configuration, the tokenizer and the edges of every weight file (first and last MiB,
    size).

    Not a proof against tampering in the middle of a file: it tells models apart, cheaply.
    """
    parts: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            with file.open("rb") as weights:
                head = weights.read(EDGE)
                weights.seek(max(0, file.stat().st_size - EDGE))
                parts[file.name] = [file.stat().st_size, content_hash([head.hex(), weights.read(EDGE).hex()])]
        elif file.suffix in {".json", ".jinja", ".model"}:
            parts[file.name] = file_sha256(file)
    return content_hash(parts)[:16]


def check_same_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """Losses over the vocabulary compare token by token, so both must mean the same by every id.

    Raises:
        UserError: the vocabularies differ; the message shows where.
    """
    ours = student.get_vocab()
    theirs = teacher.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise UserError(
        f"teacher and student have different vocabularies: {len(different)} tokens differ, for example {different[:3]};"
        " use a student of the teacher's family, or read the teacher through a bridge (teacher.bridge: {})"
    )


def check_takes_system(tokenizer: Tokenizer) -> None:
    """Refuse a chat template that has no place for a system message.

    Raises:
        UserError: it refuses one, or leaves it out.
    """
    marked = [{"role": "system", "content": "limbeck-probe"}, PROBE[0]]
    none = "the teacher's chat template has no place for a system message; put it into teacher.context.user instead"
    try:
        shown = str(tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template raises whatever it likes
        raise UserError(none) from error
    if "limbeck-probe" not in shown:
        raise UserError(none)


PROBE = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
)


def check_same_template(teacher: Tokenizer, student: Tokenizer) -> None:
    """The teacher judges the student's very tokens, so both must frame a conversation, and end an answer, alike.

    Raises:
        UserError: chat templates that render differently, or different end-of-sequence tokens.
    """
    if teacher.eos_token != student.eos_token:
        raise UserError(
            f"teacher and student end an answer with different tokens, {teacher.eos_token!r} and {student.eos_token!r}:"
            " give the student the teacher's tokenizer (copy its tokenizer files into the student's folder)"
        )
    ours, theirs = (
        str(tokenizer.apply_chat_template(list(PROBE), add_generation_prompt=True, tokenize=False))
        for tokenizer in (student, teacher)
    )
    if ours != theirs:
        at = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"teacher and student frame a conversation differently (chat templates): {theirs[at : at + 40]!r} of the"
            f" teacher is {ours[at : at + 40]!r} of the student, so the teacher would judge prompts that it does not"
            " know; give the student the teacher's chat template"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and notes off the terminal; errors still raise."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
