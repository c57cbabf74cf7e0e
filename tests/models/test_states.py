"""What all rows begin with is computed once, and nothing else changes: states, gradients, models that can't share."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from limbeck.models.model import hidden_states
from limbeck.models.states import SHORTEST_PREFIX, common_prefix, shared_states
from tests.conftest import make_net


def batch(shared=SHORTEST_PREFIX + 4, rows=3, width=30, seed=0):
    tokens = torch.randint(1, 200, (rows, width), generator=torch.Generator().manual_seed(seed))
    tokens[:, :shared] = tokens[:1, :shared]
    tokens[:, shared] = torch.arange(rows) + 1
    return tokens


def test_the_common_prefix_is_counted():
    assert common_prefix(batch(11)) == 11
    assert common_prefix(batch(11)[:1]) == 0, "one row shares with nobody"
    assert common_prefix(torch.ones(3, 6, dtype=torch.long)) == 5, "never all of it"
    assert common_prefix(torch.tensor([[1, 2], [3, 2]])) == 0


@pytest.mark.parametrize("shared", [SHORTEST_PREFIX, 20, 29])
def test_states_and_gradients_are_those_of_a_plain_pass(shared):
    net, tokens = make_net().double(), batch(shared)
    weight = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(states):
        net.zero_grad()
        (states * weight).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    plain, once = hidden_states(net, tokens), shared_states(net, tokens)
    torch.testing.assert_close(once, plain, rtol=1e-9, atol=1e-10)
    want, got = gradients(plain), gradients(once)
    for name in want:
        off = float((got[name] - want[name]).norm() / want[name].norm())
        assert off < 1e-6, f"{name}: {off} (the norms of this model round to fp32)"


def test_the_beginning_goes_through_once():
    net, tokens, seen = make_net(), batch(), []
    net.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    shared_states(net, tokens)
    assert seen == [(1, SHORTEST_PREFIX + 4), (3, 30 - SHORTEST_PREFIX - 4)]
    seen.clear()
    shared_states(net, batch(SHORTEST_PREFIX - 1))
    assert seen == [(3, 30)], "a short beginning is not worth it"


def test_dropout_and_sliding_windows_go_through_as_they_are():
    net, tokens = make_net(), batch()
    net.config.attention_dropout = 0.1
    seen = []
    net.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    net.train()
    shared_states(net, tokens)
    net.eval()
    shared_states(net, tokens)
    assert seen == [(3, 30), (1, SHORTEST_PREFIX + 4), (3, 30 - SHORTEST_PREFIX - 4)]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    gemma = Gemma3ForCausalLM(config).eval()
    torch.testing.assert_close(shared_states(gemma, tokens), hidden_states(gemma, tokens))
