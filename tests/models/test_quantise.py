"""Weights in 8 and 4 bits, and in shorter types: what is rounded, by how much, and what gradients pass through it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from limbeck.config.sections import Lora
from limbeck.evaluate.efficiency import sizes
from limbeck.models import placement
from limbeck.models.copy import cast
from limbeck.models.load import load_model, model_identity
from limbeck.models.model import hidden_states
from limbeck.models.placement import FULL, Precision
from limbeck.models.quantise import Int4Linear, Int8Linear, QuantisedLinear, quantise, refuse
from limbeck.models.start import add_adapters, merge_adapters, merge_into
from limbeck.models.vllm import save
from limbeck.types import RecipeError, UserError
from tests.conftest import make_net

CPU = torch.device("cpu")
KINDS = {"int8": Int8Linear, "int4": Int4Linear}
RMS_ERROR = {"int8": (1e-3, 0.012), "int4": (0.05, 0.12)}  # of a weight's standard deviation, for normal weights
TOKENS = torch.tensor([[5, 9, 17, 40, 33, 8, 7]])


def layer(inputs=128, outputs=48, bias=True):
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, bias=bias)


def quantised(kind, seed=0):
    net = make_net(seed=seed)
    quantise(net, kind, CPU, "tiny")
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_by_no_more_than_their_bits_allow(kind):
    plain = layer()
    nn.init.normal_(plain.weight)
    error = KINDS[kind].of(plain, CPU).dequantised(torch.float32) - plain.weight.detach()
    least, most = RMS_ERROR[kind]
    assert least < float(error.square().mean().sqrt()) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_is_the_linear_layer_of_its_rounded_weights(kind, bias, dtype):
    plain = layer(bias=bias).to(dtype)
    rounded = KINDS[kind].of(plain, CPU)
    exact = copy.deepcopy(plain)
    exact.weight.data = rounded.dequantised(dtype)
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    mine, right = rounded(x), exact(x)
    assert mine.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(mine, right, **close)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (mine, right))
    torch.testing.assert_close(ours, theirs, rtol=close["rtol"], atol=close["atol"] * float(theirs.abs().max()))
    assert not any(parameter.requires_grad for parameter in rounded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_reaches_quantised_layers_and_their_gradients(kind):
    rounded = KINDS[kind].of(layer(), CPU)
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rounded(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = rounded.dequantised(torch.float32).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_does_not_depend_on_the_others(kind):
    net = quantised(kind)
    alone = hidden_states(net, TOKENS)
    loud = torch.randint(5, 290, (6, TOKENS.shape[1]))
    together = hidden_states(net, torch.cat([TOKENS, loud]))[:1]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_but_not_embeddings_norms_and_head_are_quantised(kind):
    plain, net = make_net(), quantised(kind)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert type(net.get_submodule(name)) is KINDS[kind], name
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert torch.equal(net.lm_head.weight, plain.lm_head.weight) and net.dtype == torch.float32
    assert torch.equal(net.model.norm.weight, plain.model.norm.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_stays_itself_when_it_is_copied_cast_and_moved(kind):
    net = quantised(kind)
    before = hidden_states(net, TOKENS)
    again = copy.deepcopy(net).to("cpu")
    cast(again, torch.float32)
    assert torch.equal(hidden_states(again, TOKENS), before)
    cast(again, torch.bfloat16)
    frequencies = again.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, net.model.rotary_emb.inv_freq)
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.dtype == torch.bfloat16
    assert torch.equal(again.model.layers[0].mlp.up_proj.scale, net.model.layers[0].mlp.up_proj.scale)
    torch.testing.assert_close(hidden_states(again, TOKENS).float(), before, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_count_weights_and_the_bytes_that_they_take(kind, tiny_folder):
    plain, short = load_model(str(tiny_folder)), load_model(str(tiny_folder), Precision.named(None, kind))
    ours, theirs = sizes(short), sizes(plain)
    assert ours["parameters"] == theirs["parameters"]
    inside = sum(m.weights for m in short.net.modules() if isinstance(m, QuantisedLinear))
    scales = sum(m.scale.numel() for m in short.net.modules() if isinstance(m, QuantisedLinear))
    assert theirs["bytes"] - ours["bytes"] == inside * 4 - inside * (1 if kind == "int8" else 0.5) - scales * 4


PRECISIONS = [("bfloat16", None), ("float16", None), (None, "int8"), (None, "int4"), ("bfloat16", "int4")]


@pytest.mark.parametrize(("dtype", "kind"), PRECISIONS)
def test_a_model_is_loaded_in_a_precision_that_its_identity_names(tiny_folder, dtype, kind):
    precision = Precision.named(dtype, kind)
    model = load_model(str(tiny_folder), precision)
    plain = load_model(str(tiny_folder))
    assert model.identity == model_identity(str(tiny_folder), precision) == plain.identity + precision.suffix
    assert precision.suffix and model.net.dtype == getattr(torch, dtype or "float32")
    error = (hidden_states(model.net, TOKENS).float() - hidden_states(plain.net, TOKENS)).abs().mean()
    assert 1e-5 < error < (1 if kind == "int4" else 0.1)


def test_float32_is_no_precision_of_its_own():
    assert Precision.named("float32") == Precision.named(None) == Precision.of_base(None) == FULL and not FULL.suffix


def test_rows_that_int4_has_no_blocks_for_are_refused():
    net = make_net()
    net.model.layers[2].mlp.down_proj = nn.Linear(40, 32, bias=False)
    with pytest.raises(UserError, match=r"mine: int4 takes rows of a multiple of 32 .*layers.2.mlp.down_proj has 40"):
        quantise(net, "int4", CPU, "mine")
    net.config.intermediate_size = 40
    with pytest.raises(RecipeError, match="the model's intermediate_size is 40: write int8") as error:
        refuse("int4", net.config, "teacher.quantise")
    assert error.value.path == "teacher.quantise"
    refuse("int8", net.config, "teacher.quantise")
    quantise(net, "int8", CPU, "mine")
    assert type(net.model.layers[2].mlp.down_proj) is Int8Linear


def test_a_model_whose_weights_are_elsewhere_than_in_linear_layers_is_refused():
    net = make_net(layers=1)
    net.experts = nn.Parameter(torch.zeros(8, 64, 64))  # as mixtures of experts keep them
    with pytest.raises(UserError, match=r"only .* of the .* weights .* of a llama: give dtype: bfloat16"):
        quantise(net, "int8", CPU, "mine")


def test_int4_without_its_library_names_the_extra(monkeypatch, tiny_folder):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[quantise\]'"):
        load_model(str(tiny_folder), Precision.named(None, "int4"))
    monkeypatch.setattr("limbeck.models.quantise.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[quantise\]', or write int8"):
        refuse("int4", make_net().config, "student.lora.base")
    assert load_model(str(tiny_folder), Precision.named(None, "int8")).identity.endswith("+int8")


def test_a_device_that_only_imitates_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda _: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    old = torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"teacher.dtype: cuda:0 \(an old one\) has no bfloat16"):
        placement.check_dtype(torch.bfloat16, old, "teacher.dtype")
    placement.check_dtype(torch.float16, old, "teacher.dtype")
    placement.check_dtype(torch.bfloat16, CPU, "teacher.dtype")


# Under adapters


def trained(base, lora, seed=3):
    """The base with adapters whose B has been moved away from 0."""
    net = make_net()
    cast(net, Precision.of_base(base).dtype)
    if base in KINDS:
        quantise(net, base, CPU, "tiny")
    add_adapters(net, lora, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return net


@pytest.mark.parametrize("base", [None, "bfloat16", "int8", "int4"])
def test_adapters_in_float32_are_all_that_has_a_gradient(base):
    net = trained(base, Lora(rank=2, alpha=4))
    hidden_states(net, TOKENS).float().square().sum().backward()
    given = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert given == {name for name, _ in net.named_parameters() if "lora_" in name} and len(given) == 4 * 7 * 2
    assert {parameter.dtype for name, parameter in net.named_parameters() if name in given} == {torch.float32}


@pytest.mark.parametrize("base", ["bfloat16", "int8", "int4"])
def test_adapters_are_folded_into_the_weights_as_they_were(base):
    lora = Lora(rank=2, alpha=4)
    net, whole = trained(base, lora), make_net()
    adapters = {name: parameter.detach().clone() for name, parameter in net.named_parameters() if "lora_" in name}
    merge_into(whole, net, lora)
    changed = 0
    for name, weight in make_net().named_parameters():
        b_OR = adapters.get(name.removesuffix("weight") + "lora_B.default.weight")
        if b_OR is not None:
            a_RI = adapters[name.removesuffix("weight") + "lora_A.default.weight"]
            weight = weight + (b_OR @ a_RI) * (lora.alpha / lora.rank)
            changed += 1
        assert torch.equal(whole.get_parameter(name), weight), name
    assert changed == 4 * 7


def test_folding_into_an_equal_model_is_folding_in_place():
    lora = Lora(rank=2, alpha=4)
    net, whole = trained(None, lora), make_net()
    merge_into(whole, net, lora)
    merge_adapters(net)
    for name, weight in net.named_parameters():
        assert torch.equal(whole.get_parameter(name), weight), name


@pytest.mark.parametrize("base", [None, "bfloat16", "int8", "int4"])
def test_a_server_is_sent_the_numbers_that_rounded_weights_and_adapters_stand_for(base, tiny, tmp_path):
    net = trained(base, Lora(rank=2, alpha=4))
    save(net, tiny.tokenizer, tmp_path / "sent")
    sent = load_model(str(tmp_path / "sent"))
    error = (hidden_states(sent.net, TOKENS) - hidden_states(net, TOKENS).float()).abs().mean()
    assert error < (0.05 if base == "bfloat16" else 1e-4)
