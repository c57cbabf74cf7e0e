"""Dropping layers: nothing dropped is nothing changed; what does nothing goes first; caches stay right."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, JambaConfig

from limbeck.models.prune import (
    Calibration,
    _LayerRunner,
    block_influence,
    check_kept,
    choose_layers,
    drop_layers,
    layers_of,
)
from limbeck.types import UserError
from tests.conftest import make_net
from tests.families import FAMILIES, SIZES


@pytest.fixture
def calibration():
    noise = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 250, (3, 20), generator=noise)
    positions = torch.zeros(3, 20, dtype=torch.bool)
    positions[:, 8:19] = True
    return Calibration(tokens, positions)


def silence(net, index):
    """Make a layer the identity: both of its outputs are zero."""
    with torch.no_grad():
        layers_of(net)[index].self_attn.o_proj.weight.zero_()
        layers_of(net)[index].mlp.down_proj.weight.zero_()


def test_dropping_no_layer_gives_the_same_logits_bit_for_bit(tiny, calibration):
    copy = drop_layers(tiny.net, range(4))
    with torch.inference_mode():
        assert torch.equal(copy(calibration.tokens_BT).logits, tiny.net(calibration.tokens_BT).logits)
    assert copy is not tiny.net and len(layers_of(tiny.net)) == 4


def test_dropping_an_idle_layer_changes_no_logit(tiny, calibration):
    silence(tiny.net, 2)
    with torch.inference_mode():
        whole = tiny.net(calibration.tokens_BT).logits
        assert torch.equal(drop_layers(tiny.net, [0, 1, 3])(calibration.tokens_BT).logits, whole)


def test_cached_generation_equals_uncached_after_dropping(tiny):
    student = drop_layers(tiny.net, [0, 3])
    assert student.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in layers_of(student)] == [0, 1]
    ids = torch.tensor([tiny.prompt_ids(({"role": "user", "content": "why is the sky blue"},))])
    options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        student.generate(ids, use_cache=True, **options), student.generate(ids, use_cache=False, **options)
    )


def test_a_pruned_student_loads_again_with_the_same_logits(tiny, calibration, tmp_path):
    from limbeck.models.folder import save_model
    from limbeck.models.load import load_model

    student = drop_layers(tiny.net, [0, 2, 3])
    save_model(student, tiny.tokenizer, tmp_path)
    with torch.inference_mode():
        assert torch.equal(
            load_model(str(tmp_path)).net(calibration.tokens_BT).logits, student(calibration.tokens_BT).logits
        )


@pytest.mark.parametrize("keep", ["importance", "block_influence"])
def test_layers_that_do_nothing_go_first(tiny, calibration, keep):
    silence(tiny.net, 1)
    silence(tiny.net, 2)
    choice = choose_layers(tiny.net, keep, 2, lambda: calibration)
    assert choice.kept == (0, 3)
    if keep == "importance":
        assert all(abs(cost) < 1e-6 for _, cost in choice.drops)


def test_importance_costs_are_the_kl_of_the_pruned_model(tiny, calibration):
    choice = choose_layers(tiny.net, "importance", 3, lambda: calibration)
    ((dropped, cost),) = choice.drops

    def kl_without(layer: int) -> float:
        student = drop_layers(tiny.net, [index for index in range(4) if index != layer])
        with torch.inference_mode():
            p, q = (
                net(calibration.tokens_BT).logits[calibration.positions_BT].double().log_softmax(-1)
                for net in (tiny.net, student)
            )
        return float((p.exp() * (p - q)).sum(-1).mean())

    costs = {layer: kl_without(layer) for layer in range(4)}
    assert dropped == min(costs, key=costs.get)
    assert cost == pytest.approx(costs[dropped], rel=1e-4)


def test_more_drops_than_candidates(calibration):
    """The pool of candidates must not run dry: 14 layers to 2 are 12 drops with 8 candidates a round."""
    net = make_net(layers=14)
    silence(net, 3)
    told = []
    choice = choose_layers(net, "importance", 2, lambda: calibration, lambda done, total: told.append((done, total)))
    assert len(choice.kept) == 2 and len(choice.drops) == 12 and choice.drops[0][0] == 3
    assert told[-1][0] == told[-1][1]


def test_what_follows_the_layers_is_found_and_what_is_hidden_is_refused(tiny, calibration):
    """Whatever the decoder calls after its last layer counts, by any name; a step that is no module of its can't be seen."""
    decoder = tiny.net.get_decoder()
    with torch.inference_mode():
        assert _LayerRunner(tiny.net, calibration).tail == [decoder.norm]
    hook = decoder.register_forward_hook(lambda _, __, told: type(told)(last_hidden_state=told.last_hidden_state * 2))
    with pytest.raises(UserError, match="don't give the model's states"):
        block_influence(tiny.net, calibration)
    hook.remove()
    assert len(block_influence(tiny.net, calibration)) == 4


def test_block_influence_of_an_idle_layer_is_zero(tiny, calibration):
    silence(tiny.net, 2)
    influence = block_influence(tiny.net, calibration)
    assert influence[2] == pytest.approx(0, abs=1e-6) and min(influence[:2]) > 1e-3


def test_simple_ways(tiny):
    def never() -> Calibration:
        raise AssertionError("needs no text")

    assert choose_layers(tiny.net, "first", 2, never).kept == (0, 1)
    assert choose_layers(tiny.net, "uniform", 3, never).kept == (0, 2, 3)
    assert choose_layers(tiny.net, [1, 3], 2, never).kept == (1, 3)


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 4], [-1, 2]])
def test_impossible_lists_are_refused(tiny, kept):
    with pytest.raises(UserError, match="0 to 3"):
        drop_layers(tiny.net, kept)


def family_net(family):
    """A tiny model of another family (`tests/families.py`)."""
    config = FAMILIES[family](SIZES | {"vocab_size": 320, "eos_token_id": [0, 5, 6, 7], "pad_token_id": 0})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [0, 1, 3], [3]])
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "deepseek-v3", "smollm3", "gemma2", "gpt-oss"])
def test_layers_told_by_number_or_period_are_those_that_were_kept(family, kept, tmp_path):
    student = drop_layers(family_net(family), kept)
    student.save_pretrained(tmp_path)
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, student(tokens).logits)
    assert student.config.eos_token_id == [0, 5, 6, 7]  # as long as the layers are many, and no list of layers


def test_layers_that_no_configuration_describes_are_refused():
    """Jamba's attention comes once a period, and its configuration has no list for it; a hybrid needs attention."""
    jamba = JambaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    check_kept(jamba, [0, 1])
    with pytest.raises(UserError, match="attn_layer_period"):
        check_kept(jamba, [0, 2])
    with pytest.raises(UserError, match="a layer of each kind"):
        check_kept(FAMILIES["lfm2"](SIZES | {"vocab_size": 320}), [0, 2])
