"""The head of every family gives the model's own logits; models padded to other vocabularies meet on the tokens they share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from limbeck import UserError, run
from limbeck.config.recipe import parse
from limbeck.models.load import load_model
from limbeck.models.model import head_of, hidden_states
from tests.conftest import make_net, make_tokenizer

SIZES = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}  # fmt: skip
FAMILIES = {
    "soft cap (Gemma 2)": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "multiplied (Cohere)": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "divided (Granite)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "plain (Llama)": lambda: make_net(layers=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_own_logits(family):
    torch.manual_seed(0)
    net = FAMILIES[family]().eval()
    tokens = torch.randint(1, 80, (2, 7))
    with torch.no_grad():
        want = net(tokens).logits.float()
        got = head_of(net).logits(hidden_states(net, tokens).flatten(0, 1))
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_head_with_bias_and_an_adapter_gives_the_models_own_logits():
    torch.manual_seed(0)
    net = make_net(layers=1)
    net.lm_head, net.config.tie_word_embeddings = nn.Linear(32, 300), False
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"]), net)
    with torch.no_grad():
        net.lm_head.lora_B["default"].weight.normal_()
        net.lm_head.get_base_layer().bias.normal_()
        tokens = torch.randint(1, 80, (1, 6))
        got = head_of(net).logits(hidden_states(net, tokens).flatten(0, 1))
        torch.testing.assert_close(got, net(tokens).logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_head_that_would_be_misread_is_refused(tmp_path, monkeypatch):
    make_net(layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    load_model(str(tmp_path / "model"))
    monkeypatch.setattr("limbeck.models.load.head_of", lambda net: replace(head_of(net), scale=1.5))
    with pytest.raises(UserError, match="logits"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(("student", "teacher"), [(340, 320), (320, 340)])
def test_heads_padded_to_different_sizes_meet_on_the_shared_tokens(tmp_path, prompt_file, student, teacher):
    tokenizer = make_tokenizer()
    for name, size, seed in (("student", student, 1), ("teacher", teacher, 0)):
        make_net(layers=2, seed=seed, vocab_size=size).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe = parse({
        "name": "padded", "teacher": str(tmp_path / "teacher"), "student": {"start": {"pretrained": str(tmp_path / "student")}},
        "prompts": {"from": str(prompt_file)}, "writer": [{"by": "teacher", "max_tokens": 8}], "loss": ["forward_kl"],
        "train": {"steps": 12, "tokens_per_step": 60, "lr": 1e-3}, "evaluate": {"metrics": ["fidelity"], "limit": 2, "max_tokens": 6},
    })  # fmt: skip
    folder = run(recipe, tmp_path / "run").folder
    systems = json.loads((folder / "evaluation" / "summary.json").read_text())["systems"]
    assert systems["student"]["forward_kl"]["value"] < systems["untouched"]["forward_kl"]["value"]
    assert json.loads((folder / "student" / "config.json").read_text())["vocab_size"] == student
