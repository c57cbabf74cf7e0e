"""Tiny models of the families that are tried, and the roads that each is sent down: one table, which
`tests/models/test_families.py` runs cell by cell and `docs/generate.py` prints.

A family is one line: a configuration of `transformers`. Add one, and the test says which roads it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
CONVOLVED = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
IMAGES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _gemma3_images(d: dict[str, Any]) -> Any:
    images = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.Gemma3Config(
        text_config=d | WINDOW,
        vision_config=images | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )


def _qwen3_next(d: dict[str, Any]) -> Any:
    linear = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    linear |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    experts = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16}
    kinds = ["linear_attention", "full_attention"] * 2
    return T.Qwen3NextConfig(**(d | linear | experts | {"head_dim": 8, "layer_types": kinds}))


def _without(d: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in d.items() if name not in names}


OF_EXPERTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mixtral": lambda d: T.MixtralConfig(**d, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda d: T.GptOssConfig(**d, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "qwen3-moe": lambda d: T.Qwen3MoeConfig(**d, **EXPERTS, head_dim=8, num_experts=4, mlp_only_layers=[0]),
    "qwen2-moe": lambda d: T.Qwen2MoeConfig(
        **d, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16, decoder_sparse_step=2
    ),
    "deepseek-v3": lambda d: T.DeepseekV3Config(
        **(d | EXPERTS | {"num_key_value_heads": 4}), n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda d: T.LlamaConfig(**d),
    "llama, tied": lambda d: T.LlamaConfig(**d, tie_word_embeddings=True),
    "mistral": lambda d: T.MistralConfig(**d, sliding_window=8),
    "qwen2": lambda d: T.Qwen2Config(**d),
    "qwen3": lambda d: T.Qwen3Config(**d, head_dim=16),
    "gemma": lambda d: T.GemmaConfig(**d, head_dim=16),
    "gemma2": lambda d: T.Gemma2Config(**(d | WINDOW)),
    "gemma3": lambda d: T.Gemma3TextConfig(**(d | WINDOW)),
    "phi": lambda d: T.PhiConfig(**d),
    "phi3": lambda d: T.Phi3Config(**d),
    "olmo2": lambda d: T.Olmo2Config(**d),
    "granite": lambda d: T.GraniteConfig(**d, logits_scaling=8.0, embedding_multiplier=12.0),
    "cohere": lambda d: T.CohereConfig(**d, logit_scale=0.0625),
    "smollm3": lambda d: T.SmolLM3Config(**d, no_rope_layers=[1, 1, 1, 0]),
    "stablelm": lambda d: T.StableLmConfig(**d),
    "starcoder2": lambda d: T.Starcoder2Config(**d, sliding_window=8),
    "glm4": lambda d: T.Glm4Config(**d, head_dim=8),
    "nemotron": lambda d: T.NemotronConfig(**d),
    "gpt2": lambda d: T.GPT2Config(
        **_without(d, *SIZES), n_embd=32, n_layer=4, n_head=4, n_positions=256
    ),
    "gpt-neox": lambda d: T.GPTNeoXConfig(**_without(d, "num_key_value_heads")),
    "opt": lambda d: T.OPTConfig(**_without(d, "num_key_value_heads"), ffn_dim=64, word_embed_proj_dim=32),
    "bloom": lambda d: T.BloomConfig(**_without(d, *SIZES), hidden_size=32, n_layer=4, n_head=4),
    "falcon": lambda d: T.FalconConfig(**_without(d, "num_key_value_heads", "intermediate_size")),
    **OF_EXPERTS,
    "lfm2": lambda d: T.Lfm2Config(**d, **CONVOLVED, block_ff_dim=64, block_auto_adjust_ff_dim=False),
    "mamba": lambda d: T.MambaConfig(
        **_without(d, *SIZES), hidden_size=32, num_hidden_layers=4, state_size=8
    ),
    "mamba2": lambda d: T.Mamba2Config(
        **_without(d, *SIZES), hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=1
    ),
    "qwen3-next": _qwen3_next,
    "gemma3, with images": _gemma3_images,
    "qwen2.5-vl": lambda d: T.Qwen2_5_VLConfig(
        text_config=d | {"rope_parameters": TURNS}, vision_config=IMAGES | {"fullatt_block_indexes": [0]}
    ),
    "qwen3-vl": lambda d: T.Qwen3VLConfig(
        text_config=d | {"rope_parameters": TURNS, "head_dim": 8},
        vision_config=IMAGES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}  # fmt: skip
ROADS: dict[str, dict[str, Any]] = {
    "pretrained": {"student": {"start": {"pretrained": "OTHER"}}},
    "prune": {"student": {"start": {"prune": {"layers": 2, "keep": "importance", "calibration": 2}}}},
    "scratch": {"student": {"start": {"scratch": {"config": {}}}}},
    "LoRA": {"student": {"start": {"pretrained": "OTHER"}, "lora": {"rank": 2, "alpha": 4}}},
    "on-policy": {
        "student": {"start": {"pretrained": "OTHER"}},
        "writer": [{"by": "student", "max_tokens": 6}],
        "loss": [{"jsd": {"teacher_share": 0.5}}],
    },
}
CHECKED = "greedy text as transformers"
KINDS = ("gpt2", "qwen2-moe", "lfm2", "gemma3, with images")
REFUSED: dict[tuple[str, str], str] = {}


def cells(whole: bool) -> list[tuple[str, str]]:
    """(family, road) of the whole table, or of a part that any change can afford to run: the families whose layers,
    caches or configurations differ in kind down every road, and each of the others down one, in turn."""
    roads = list(ROADS)
    return [
        (family, road)
        for number, family in enumerate(FAMILIES)
        for road in roads
        if whole or (family in KINDS and road != "pretrained") or roads[number % len(roads)] == road
    ]


def make_model(family: str, folder: Path, seed: int, tokenizer: Any) -> None:
    """A tiny random model of a family in a folder, with a tokenizer."""
    from limbeck.models.folder import quiet, save_model
    from limbeck.models.weights import model_class

    ends = {"vocab_size": 320, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    config = FAMILIES[family](SIZES | ends)
    torch.manual_seed(seed)
    with quiet():
        net = model_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    folder.mkdir(parents=True)
    save_model(net, tokenizer, folder)


def recipe_of(road: str, folder: Path, prompts: Path) -> dict[str, Any]:
    """The recipe of a road: `teacher` and `other` are folders in `folder`."""
    base = {
        "name": "family",
        "teacher": str(folder / "teacher"),
        "prompts": {"from": str(prompts), "limit": 6},
        "writer": [{"by": "teacher", "max_tokens": 6}],
        "loss": ["forward_kl"],
        "train": {"steps": 1, "tokens_per_step": 16, "lr": 1e-3, "seed": 3},
        "evaluate": {"metrics": ["fidelity"], "limit": 2, "max_tokens": 6, "controls": []},
    } | ROADS[road]
    start = base["student"]["start"]  # type: ignore[index]
    if "pretrained" in start:
        base["student"] = {**base["student"], "start": {"pretrained": str(folder / "other")}}  # type: ignore[dict-item]
    return base
