"""How a student begins."""

from __future__ import annotations

import pytest
import torch

from limbeck import RecipeError
from limbeck.config.sections import Lora, Student
from limbeck.models.model import hidden_states
from limbeck.models.prune import LayerChoice
from limbeck.models.start import adapted_layers, adapters_told, add_adapters, begin, merge_adapters
from limbeck.models.weights import model_class
from tests.families import FAMILIES, OF_EXPERTS, SIZES

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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 0}, r"num_hidden_layers: must be a whole number from 1 to 1,000; got 0"),
        ({"num_hidden_layers": 3000}, r"must be a whole number from 1 to 1,000; got 3000"),
        ({"num_attention_heads": 0}, r"num_attention_heads: must be a whole number of at least 1; got 0"),
        ({"hidden_size": -4}, r"hidden_size: must be a whole number of at least 1; got -4"),
        ({"intermediate_size": True}, r"intermediate_size: must be a whole number of at least 1; got True"),
        ({"num_key_value_heads": 3}, r"config: these sizes don't go together"),
    ],
)
def test_sizes_that_no_model_has_are_refused(tiny, config, words):
    with pytest.raises(RecipeError, match=words):
        begin(student(scratch={"config": config}), lambda: tiny, None, 0)


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


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt-oss", "mamba", "gpt2", "gemma3, with images"])
def test_adapters_act_where_they_are_told_to_and_merge(family):
    """Every adapter changes the logits, so none is read past; folded in, the logits stay; and the rest is named."""
    config = FAMILIES[family](SIZES | {"vocab_size": 320, "eos_token_id": 0, "pad_token_id": 0})
    torch.manual_seed(0)
    net = model_class(config).from_config(config, dtype=torch.float32).eval()
    tokens = torch.arange(1, 30)[None]
    names = adapted_layers(net)[0]
    add_adapters(net, Lora(rank=2, alpha=4), 0)
    told = adapters_told(net)
    assert told.startswith(f"adapters on {len(names)} matrices")
    assert ("experts.down_proj" in told) == (family in OF_EXPERTS) and ("dt_proj" in told) == (family == "mamba")
    ours = [parameter for name, parameter in net.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in ours:
            parameter.normal_(std=0.1)
    net(tokens).logits.pow(2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in ours)
    with torch.no_grad():
        before = net(tokens).logits
        merge_adapters(net)
        assert torch.allclose(net(tokens).logits, before, atol=1e-4 * float(before.abs().max()))
    assert not any("lora" in name for name, _ in net.named_modules())
