"""The families of models that are written as GGUF: the sizes that llama.cpp reads, and the tensors that it has in
another order or scale. `read_settings` is the way back, for what `transformers` leaves out of a file.

A family is one entry of `FAMILIES`. That an entry is right is seen by the comparison that follows every export, and by
the tests, which send a tiny model of each family through the packaged llama.cpp. Not covered: mixtures of experts,
state-space and hybrid models, models that read images, which llama.cpp's own converter knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from torch import Tensor

from limbeck.types import UserError

USELESS = "llama.cpp's own convert_hf_to_gguf.py may know it, or serve the folder with transformers or vLLM"
BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B, whose attention llama.cpp scales otherwise
HEADS_OF_ANY_SIZE = ("llama", "mistral", "qwen2", "qwen3")
STRETCHED_BY_LIBRARY = ("gemma4", "gpt_oss", "gpt-oss")  # transformers sets the rotary embedding of these itself
PUBLISHED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED |= {"original_max_position_embeddings": 8192}  # Llama 3.1 to 3.3
PUBLISHED_FACTORS = (8.0, 32.0)
HARMLESS = ("type", "factor", "finetuned", "original_context_length")  # of rope.scaling, without a stretch or linear


@dataclass(frozen=True)
class Family:
    """How a type of model is written.

    Args:
        arch: llama.cpp's name for it.
        add: writes the sizes that are its own.
        interleaved: its rotary embedding turns neighbouring columns of a head, and not halves: queries and keys are
            written in that order.
        norm_offset: what the model adds to the weights of its norms, which llama.cpp wants added.
        windows: llama.cpp has this family's layers that attend to a window of the last tokens. Where it has none, the
            context ends with the window: up to there, the layers are the same.
        refuse: a reason why a configuration can't be written, or nothing.
    """

    arch: MODEL_ARCH
    add: Callable[[GGUFWriter, Any], None] = lambda writer, config: None
    interleaved: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    refuse: Callable[[Any], str] = lambda config: ""

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


def _granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _period(period: int, skipped: Callable[[Any, int], bool], what: str) -> Callable[[Any], str]:
    """llama.cpp takes every `period`-th layer to be another kind; a student with dropped layers may have others."""

    def refuse(config: Any) -> str:
        for layer in range(config.num_hidden_layers):
            if skipped(config, layer) != ((layer + 1) % period == 0):
                return f"llama.cpp expects {what} in every {period}th layer, and layer {layer} differs"
        return ""

    return refuse


def attention_scalar(config: Any) -> int:
    """The number by whose root llama.cpp divides the attention scores of Gemma 2 and 3; a file doesn't hold it."""
    if config.num_hidden_layers == BY_HIDDEN_SIZE[config.model_type]:
        return int(config.hidden_size // config.num_attention_heads)
    return head_size(config)


def _gemma(period: int) -> Callable[[Any], str]:
    full = _period(period, lambda config, layer: config.layer_types[layer] == "full_attention", "full attention")

    def refuse(config: Any) -> str:
        if config.query_pre_attn_scalar != attention_scalar(config):
            return (
                f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes"
                f" {attention_scalar(config)} for a model of these sizes"
            )
        return full(config)

    return refuse


FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "smollm3": Family(
        MODEL_ARCH.SMOLLM3,
        interleaved=True,
        refuse=_period(4, lambda config, layer: not config.no_rope_layers[layer], "no rotary embedding"),
    ),
    "granite": Family(MODEL_ARCH.GRANITE, _granite, interleaved=True),
    "olmo2": Family(MODEL_ARCH.OLMO2),
    "gemma": Family(MODEL_ARCH.GEMMA, norm_offset=1.0),
    "gemma2": Family(
        MODEL_ARCH.GEMMA2,
        _gemma2,
        norm_offset=1.0,
        windows=True,
        refuse=_gemma(2),
    ),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3,
        _gemma3,
        norm_offset=1.0,
        windows=True,
        refuse=_gemma(6),
    ),
}


def family_of(config: Any, name: str) -> Family:
    """The family of a configuration. `name` stands for the model.

    Raises:
        UserError: it has none, or this model of it can't be written.
    """
    kind = getattr(config, "model_type", "?")
    if kind not in FAMILIES:
        raise UserError(
            f"{name}: models of type {kind!r} are not exported as GGUF (those that are: {', '.join(sorted(FAMILIES))});"
            f" {USELESS}"
        )
    if reason := FAMILIES[kind].refuse(config):
        raise UserError(f"{name} can't be exported as GGUF: {reason}; {USELESS}")
    return FAMILIES[kind]


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(family: Family, config: Any) -> int:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(
        min(config.max_position_embeddings, window) if window and not family.windows else config.max_position_embeddings
    )


def add_sizes(writer: GGUFWriter, family: Family, config: Any, rows: int, name: str) -> None:
    """Write the sizes of a model.

    Raises:
        UserError: a rotary embedding that is stretched in a way llama.cpp doesn't know.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(family, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    family.add(writer, config)
    turns = _turns(config)
    writer.add_rope_freq_base(float(turns["rope_theta"]))
    local = config.rope_parameters.get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = turns.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(turns["factor"]))
    elif kind not in ("default", "llama3"):
        raise UserError(f"{name}: a rotary embedding of type {kind!r} is not exported as GGUF; {USELESS}")


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """What llama.cpp reads as tensors and the folder has as settings: the factors of Llama 3's rotary embedding."""
    turns = _turns(config)
    if turns.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float64) / head_size(config)
    plain = float(turns["rope_theta"]) ** -exponents
    return {"rope_freqs.weight": (plain / stretched.double()).float()}


def _turns(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding; those of full attention where there are two kinds."""
    settings: dict[str, Any] = config.rope_parameters
    return settings.get("full_attention") or settings


def arranged(family: Family, config: Any, name: str, weight: Tensor) -> Tensor:
    """A tensor of the folder as llama.cpp has it."""
    if family.interleaved:
        for part, heads in ((".q_proj.", config.num_attention_heads), (".k_proj.", config.num_key_value_heads)):
            if part in name:
                pairs: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2)
                return pairs.flatten(0, 2).contiguous()
    if family.norm_offset and name.endswith("norm.weight"):
        return weight + family.norm_offset
    return weight


def read_settings(config: Any, fields: Mapping[str, Any], factors: Mapping[str, Tensor], name: str) -> None:
    """Set in a configuration what `transformers` leaves out of a GGUF file: head size, caps and scale of attention,
    rotary embedding.

    Args:
        config: as `transformers` read it; changed in place.
        fields: the file's settings by their keys.
        factors: the file's tensors that stretch the rotary embedding, by their names.
        name: stands for the file in messages.

    Raises:
        UserError: a rotary embedding that is stretched in a way that can't be rebuilt.
    """
    arch = f"{fields['general.architecture']}."
    own = {key.removeprefix(arch): value for key, value in fields.items() if key.startswith(arch)}
    size = own.get("attention.key_length")
    whole = own.get("rope.dimension_count", size) == size
    if size and whole and config.model_type in HEADS_OF_ANY_SIZE and head_size(config) != size:
        config.head_dim = int(size)
    if config.model_type == "gemma2":
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if own.get(cap, getattr(config, cap)) != getattr(config, cap):
                setattr(config, cap, float(own[cap]) or None)
    if config.model_type in BY_HIDDEN_SIZE and config.query_pre_attn_scalar != attention_scalar(config):
        config.query_pre_attn_scalar = attention_scalar(config)
    if arch.rstrip(".") not in STRETCHED_BY_LIBRARY:
        reason = _stretch(config, own) or _stretch_by_factors(config, factors)
        if reason:
            raise UserError(
                f"{name}: its rotary embedding is stretched in a way that can't be read from a GGUF file ({reason}):"
                " take the same model as a folder in Hugging Face form, or serve the file (`limbeck serve`) and use it"
                " as a served model"
            )


def _stretch(config: Any, own: Mapping[str, Any]) -> str:
    """Set a linear stretch of the rotary embedding, as llama.cpp reads it; returns what can't be set, or nothing."""
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))) or 1.0
    kind = own.get("rope.scaling.type", "linear")
    unknown = [key for key in own if key.startswith("rope.scaling.") and key.split(".", 2)[2] not in HARMLESS]
    if kind not in ("none", "linear"):
        return f"rope.scaling.type {kind}"
    if unknown:
        return unknown[0]
    settings: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    local = settings.get("sliding_attention")
    if local and own.get("rope.freq_base_swa", local["rope_theta"]) != local["rope_theta"]:
        local["rope_theta"] = float(own["rope.freq_base_swa"])
    if kind == "linear" and factor != 1.0:
        if not settings:
            return f"rope.scaling.factor {factor:g}"
        _turns(config).update(rope_type="linear", factor=factor)
    return ""


def _stretch_by_factors(config: Any, factors: Mapping[str, Tensor]) -> str:
    """Set Llama 3's stretch of the rotary embedding where the file's factors are those of its published settings;
    returns what can't be set, or nothing."""
    for name, found in factors.items():
        if bool((found == 1).all()):
            continue
        settings = getattr(config, "rope_parameters", None)
        if name != "rope_freqs.weight" or not settings or settings.get("rope_type", "default") != "default":
            return f"the tensor {name}"
        for factor in PUBLISHED_FACTORS:
            config.rope_parameters = {**settings, **PUBLISHED, "factor": factor}
            expected = extra_tensors(config)[name]
            if expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3):
                break
        else:
            return f"the tensor {name}, whose factors are not those of Llama 3.1 to 3.3"
    return ""
