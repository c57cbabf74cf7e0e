"""How a student begins."""

from __future__ import annotations

import pytest
import torch

from limbeck import RecipeError
from limbeck.config.sections import Student
from limbeck.models.model import hidden_states
from limbeck.models.prune import LayerChoice
from limbeck.models.start import begin

TOKENS = torch.tensor([[5, 0, 7, 0, 9]])


def student(**start):
    return Student.model_validate({"start": start})


def test_the_end_token_learns_on_the_input_side_too_although_it_is_the_padding_token(tiny):
    assert tiny.net.get_input_embeddings().padding_idx == 0 and tiny.tokenizer.eos_token_id == 0
    net = begin(student(prune={"layers": 2}), lambda: tiny, LayerChoice((0, 3)), seed=0).net
    hidden_states(net, TOKENS).sum().backward()
    assert net.get_input_embeddings().weight.grad[0].any()


def test_scratch_is_seeded_and_takes_settings(tiny):
    one, same, other = (
        begin(student(scratch={"config": {"num_hidden_layers": 2}}), lambda: tiny, None, seed).net for seed in (1, 1, 2)
    )
    assert one.config.num_hidden_layers == 2
    with torch.inference_mode():
        assert torch.equal(one(TOKENS).logits, same(TOKENS).logits)
        assert not torch.equal(one(TOKENS).logits, other(TOKENS).logits)


def test_an_unknown_setting_names_the_nearest(tiny):
    with pytest.raises(RecipeError, match="num_hidden_layers"):
        begin(student(scratch={"config": {"num_hidden_layer": 2}}), lambda: tiny, None, 0)


def test_scratch_of_a_model_with_settings_per_layer_can_be_exported(tiny, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from limbeck.models.folder import save_model
    from limbeck.models.load import load_model
    from limbeck.models.model import Model

    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    assert len(config.layer_types) == 3
    teacher = Model(Qwen3ForCausalLM(config).eval(), tiny.tokenizer, "q")
    for layers in (2, 5):
        net = begin(student(scratch={"config": {"num_hidden_layers": layers}}), lambda: teacher, None, 0).net
        save_model(net, tiny.tokenizer, tmp_path)
        with torch.inference_mode():
            assert torch.equal(load_model(str(tmp_path)).net(TOKENS).logits, net(TOKENS).logits)


def test_another_vocabulary_is_refused(tiny):
    with pytest.raises(RecipeError, match="vocabulary"):
        begin(student(scratch={"config": {"vocab_size": 50}}), lambda: tiny, None, 0)


def test_pretrained_is_loaded_from_its_directory(tiny, tiny_folder):
    net = begin(student(pretrained=str(tiny_folder)), lambda: tiny, None, 0).net
    with torch.inference_mode():
        assert torch.equal(net(TOKENS).logits, tiny.net(TOKENS).logits)
