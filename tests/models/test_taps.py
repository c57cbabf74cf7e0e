"""Recording must not change what a model computes, and must give what its attention really sees.

Shapes: B rows, T positions, H query heads, G key-value heads, A head width.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import limbeck
from limbeck.models.model import hidden_states
from limbeck.models.taps import features

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 4


def make(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(5)
    sizes = SIZES | changes
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**sizes, query_pre_attn_scalar=3, sliding_window=WINDOW, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
TOKENS_BT = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(0))


@FAMILIES
def test_recording_leaves_the_results_bit_for_bit_the_same(family):
    net = make(family)
    with torch.no_grad():
        plain = hidden_states(net, TOKENS_BT)
        recorded, _ = features(net, TOKENS_BT, range(4), range(1, 4))
        again = hidden_states(net, TOKENS_BT)
    assert torch.equal(plain, recorded) and torch.equal(plain, again)


@FAMILIES
def test_hidden_states_are_those_that_transformers_reports(family):
    net = make(family)
    with torch.no_grad():
        want = net.get_decoder()(input_ids=TOKENS_BT, use_cache=False, output_hidden_states=True).hidden_states
        last, got = features(net, TOKENS_BT, (0, 2, 3))
    assert sorted(got.hidden) == [0, 2, 3] and not got.attention
    for index, state in got.hidden.items():
        assert torch.equal(state, want[index]), index
    assert got.hidden[3] is last


@FAMILIES
@pytest.mark.parametrize("layer", [1, 2])
def test_recorded_queries_and_keys_give_the_attention_of_the_eager_model(family, layer):
    net = make(family)
    with torch.no_grad():
        _, got = features(net, TOKENS_BT, (), (layer,))
        net.set_attn_implementation("eager")
        eager_BHTT = net.get_decoder()(input_ids=TOKENS_BT, use_cache=False, output_attentions=True).attentions[
            layer - 1
        ]
    assert list(got.attention) == [layer]
    query, key, value = got.attention[layer]
    assert query.shape == (2, 4, 11, 8) and key.shape == value.shape == (2, 2, 11, 8)
    visible = torch.ones(11, 11, dtype=torch.bool).tril()
    if family == "gemma3" and layer == 1:
        visible &= ~torch.ones(11, 11, dtype=torch.bool).tril(-WINDOW)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / math.sqrt(8)
    torch.testing.assert_close(scores.masked_fill(~visible, -math.inf).softmax(-1), eager_BHTT, rtol=1e-4, atol=1e-6)


@FAMILIES
def test_recorded_values_give_what_goes_into_the_output_projection(family):
    net = make(family)
    seen = []
    projection = net.get_decoder().layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        _, got = features(net, TOKENS_BT, (), (2,))
    handle.remove()
    query, key, value = (x if x.shape[1] == 4 else x.repeat_interleave(2, dim=1) for x in got.attention[2])
    scores = query @ key.transpose(2, 3) / math.sqrt(8)
    weights = scores.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    torch.testing.assert_close((weights @ value).transpose(1, 2).reshape(2, 11, 32), seen[0], rtol=1e-4, atol=1e-5)


def test_a_row_alone_is_recorded_as_in_a_padded_batch():
    net = make("llama")
    padded = TOKENS_BT.clone()
    padded[0, 6:] = 0
    with torch.no_grad():
        _, batch = features(net, padded, (1,), (2,))
        _, alone = features(net, padded[:1, :6], (1,), (2,))
    torch.testing.assert_close(batch.hidden[1][:1, :6], alone.hidden[1], rtol=1e-4, atol=1e-5)
    for many, one in zip(batch.attention[2], alone.attention[2], strict=True):
        torch.testing.assert_close(many[:1, :, :6], one, rtol=1e-4, atol=1e-5)


def gradients(net: PreTrainedModel) -> dict[str, torch.Tensor]:
    net.zero_grad()
    last, got = features(net, TOKENS_BT, (1,), (2,))
    (last.square().sum() + got.hidden[1].sin().sum() + sum(x.square().sum() for x in got.attention[2])).backward()
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


@FAMILIES
def test_gradients_flow_through_what_was_recorded(family):
    net = make(family)
    _, got = features(net, TOKENS_BT, (1,), (2,))
    for part, (tensor, projection) in enumerate(zip(got.attention[2], ("q_proj", "k_proj", "v_proj"), strict=True)):
        weights = [getattr(layer.self_attn, projection).weight for layer in net.get_decoder().layers]
        found = torch.autograd.grad(tensor.square().sum(), weights, retain_graph=True, allow_unused=True)
        assert found[0].abs().sum() > 0 and found[1].abs().sum() > 0 and found[2] is None, part
    (found,) = torch.autograd.grad(got.hidden[1].sin().sum(), [net.get_input_embeddings().weight])
    assert found.abs().sum() > 0


@FAMILIES
def test_gradient_checkpointing_gives_the_same_gradients(family):
    net = make(family).train()
    want = gradients(net)
    net.gradient_checkpointing_enable()
    assert net.is_activation_checkpointing
    got = gradients(net)
    assert want.keys() == got.keys() and len(want) > 20
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_checkpointing_that_would_lose_the_gradient_is_refused():
    net = make("llama").train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    net.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    with pytest.raises(limbeck.UserError, match="use_reentrant"):
        features(net, TOKENS_BT, (), (2,))
    assert net.config._attn_implementation == "sdpa"


def hooks(net: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_the_model_is_left_as_it_was():
    net = make("llama")
    features(net, TOKENS_BT, (0, 1, 3), (1,))
    assert net.config._attn_implementation == "sdpa" and hooks(net) == 0


def test_the_model_is_left_as_it_was_after_an_error():
    net = make("llama")
    with torch.no_grad():
        plain = hidden_states(net, TOKENS_BT)

    def explode(module, inputs):
        raise RuntimeError("in the middle")

    handle = net.get_decoder().layers[1].register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="in the middle"):
        features(net, TOKENS_BT, (0, 1), (1, 2))
    handle.remove()
    assert net.config._attn_implementation == "sdpa" and hooks(net) == 0
    with torch.no_grad():
        recorded, got = features(net, TOKENS_BT, (), (1,))
    assert torch.equal(recorded, plain) and list(got.attention) == [1]


def test_two_models_can_be_recorded_one_after_the_other():
    nets = [make("llama"), make("qwen3")]
    _, first = features(nets[0], TOKENS_BT, (), (1,))
    query = first.attention[1][0].clone()
    _, second = features(nets[1], TOKENS_BT, (), (1,))
    assert torch.equal(first.attention[1][0], query) and not torch.equal(second.attention[1][0], query)


@pytest.mark.parametrize(
    ("hidden", "attention", "words"),
    [((4,), (), "outside 0 to 3"), ((-1,), (), "outside 0 to 3"), ((), (0,), "outside 1 to 3"), ((), (1, 4), r"\[4\]")],
)
def test_layers_that_are_not_there_are_refused(hidden, attention, words):
    with pytest.raises(limbeck.UserError, match=words):
        features(make("llama"), TOKENS_BT, hidden, attention)


def test_attention_other_than_sdpa_is_refused_with_the_remedy():
    net = make("llama")
    net.set_attn_implementation("eager")
    with pytest.raises(limbeck.UserError, match="attn_implementation='sdpa'"):
        features(net, TOKENS_BT, (), (1,))
    assert net.config._attn_implementation == "eager"
    _, got = features(net, TOKENS_BT, (1,))
    assert got.hidden[1].shape == (2, 11, 32)


def test_attention_outside_the_interface_is_refused():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0
    )
    net = FalconForCausalLM(config).eval()
    assert net.config._attn_implementation == "sdpa"
    with pytest.raises(limbeck.UserError, match="AttentionInterface"):
        features(net, TOKENS_BT, (), (1,))
    assert net.config._attn_implementation == "sdpa"
    _, got = features(net, TOKENS_BT, (1,))  # its layers are a list by another name
    assert got.hidden[1].shape == (*TOKENS_BT.shape, 32)


def test_a_layer_whose_attention_never_runs_is_refused():
    net = make("llama")
    net.get_decoder().layers[1].self_attn.layer_idx = 0
    net.get_decoder().layers[0].self_attn.layer_idx = 7
    with pytest.raises(limbeck.UserError, match=r"layers \[2\]"):
        features(net, TOKENS_BT, (), (2,))
    assert net.config._attn_implementation == "sdpa"
