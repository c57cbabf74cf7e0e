"""Folders of adapters, and folders whose weights are codes: read where they can be, refused by name elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from limbeck.config.recipe import parse
from limbeck.models.load import check_source, load_model, load_tokenizer, model_identity
from limbeck.models.quantised import CONVERT
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.types import RecipeError, UserError

TOKENS = torch.arange(1, 9)[None]


@pytest.fixture
def adapters(tiny_folder, tmp_path):
    """A folder of PEFT's, and the logits of the model that it stands for."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), settings).eval()
    net.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        return tmp_path / "adapters", net(TOKENS).logits


def test_a_folder_of_adapters_is_its_base_with_them(adapters, tiny_folder):
    folder, wanted = adapters
    check_source(str(folder))
    model = load_model(str(folder))
    with torch.no_grad():
        assert torch.allclose(model.net(TOKENS).logits, wanted, atol=1e-4)
        assert not torch.allclose(load_model(str(tiny_folder)).net(TOKENS).logits, wanted, atol=1e-2)
    assert model.identity == model_identity(str(folder)) != model_identity(str(tiny_folder))
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(tiny_folder)).get_vocab()


def test_a_student_starts_from_a_folder_of_adapters(adapters, recipe_data, tmp_path):
    data = recipe_data | {"student": {"start": {"pretrained": str(adapters[0])}}}
    run(parse(data), tmp_path / "run", stages=("elicit", "train"))
    assert load_model(str(tmp_path / "run" / "student")).net.config.num_hidden_layers == 4


def test_adapters_beside_whole_weights_are_refused(adapters, tiny_folder):
    for file in tiny_folder.iterdir():
        shutil.copy(file, adapters[0])
    with pytest.raises(UserError, match="which is meant"):
        check_source(str(adapters[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "nowhere"}, "no model 'nowhere'"),
        ({"peft_type": "IA3"}, "only LoRA"),
    ],
)
def test_adapters_without_a_base_are_refused(adapters, change, words):
    file = adapters[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words):
        check_source(str(adapters[0]))


@pytest.mark.parametrize("ways", [["adapters"], ["other", "adapters"]], ids=["itself", "two of them"])
def test_adapters_whose_bases_go_in_a_circle_are_refused(adapters, ways):
    folder = adapters[0]
    shutil.copytree(folder, folder.parent / "other")
    for place, base in zip(["adapters", "other"], ways, strict=False):
        file = folder.parent / place / "adapter_config.json"
        settings = {"base_model_name_or_path": str(folder.parent / base)}
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match="leads back to itself"):
        check_source(str(folder))


def test_another_models_adapters_are_refused(adapters):
    file = adapters[0] / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(lost := sorted(weights)[0])
    save_file(weights, file)
    with pytest.raises(UserError, match=lost):
        load_model(str(adapters[0]))


def declared(tiny_folder, folder, **settings):
    shutil.copytree(tiny_folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    ("method", "words"), [("awq", "pip install gptqmodel"), ("gptq", "pip install gptqmodel"), ("odd", "not read here")]
)
def test_codes_without_their_library_are_refused_at_check(method, words, tiny_folder, recipe_data, tmp_path):
    folder = declared(tiny_folder, tmp_path / "q", quant_method=method, bits=4)
    with pytest.raises(RecipeError, match=words) as told:
        check(parse(recipe_data | {"teacher": str(folder)}))
    assert CONVERT in str(told.value)


@pytest.fixture
def in_four_bits(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    shutil.copytree(tiny_folder, tmp_path / "nf4")
    config = AutoConfig.from_pretrained(tiny_folder, hidden_size=128, head_dim=32, intermediate_size=128)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "nf4")  # kernels take 64 weights at a time
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", quantization_config=settings)
    net.save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_in_four_bits_teaches(in_four_bits, tiny_folder, recipe_data, tmp_path):
    data = recipe_data | {"teacher": str(in_four_bits), "student": {"start": {"pretrained": str(tiny_folder)}}}
    run(parse(data), tmp_path / "run", stages=("elicit", "train"))
    teacher = load_model(str(in_four_bits)).net
    assert any(type(module).__name__ == "Linear4bit" for module in teacher.modules())


def test_no_student_starts_from_codes(in_four_bits, recipe_data, tiny_folder):
    for data in (
        {"teacher": str(in_four_bits)},
        {"student": {"start": {"pretrained": str(in_four_bits)}}},
        {"student": {"start": {"pretrained": str(in_four_bits)}, "lora": {"rank": 2, "alpha": 4}}},
    ):
        with pytest.raises(RecipeError, match="no student can start from it"):
            check(parse(recipe_data | data))


def test_fp8_is_read_as_numbers(tiny_folder, tmp_path):
    """Codes with a scale a block: the model is the one whose weights they stand for, and any road is open to it."""
    folder = declared(
        tiny_folder, tmp_path / "fp8", quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32]
    )
    weights = load_file(folder / "model.safetensors")
    wanted = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    for name in [name for name in weights if "proj" in name]:
        codes = weights[name].to(torch.float8_e4m3fn)
        rows, columns = (-(-size // 32) for size in codes.shape)
        weights[name] = codes
        weights[f"{name}_scale_inv"] = torch.full((rows, columns), 2.0)
        wanted.get_parameter(name).data = codes.float() * 2.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(folder))
    with torch.no_grad():
        assert torch.allclose(model.net(TOKENS).logits, wanted(TOKENS).logits, atol=1e-4)
    assert getattr(model.net.config, "quantization_config", None) is None
