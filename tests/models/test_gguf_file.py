"""A GGUF file is held within its bounds before a library reads it."""

from __future__ import annotations

import json
import struct
import time

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from limbeck.commands.serve import serve
from limbeck.models.folder import convert_gguf, read_weights
from limbeck.models.gguf_file import check_gguf
from limbeck.models.load import load_model
from limbeck.models.to_gguf import families
from limbeck.models.to_gguf.types import TYPES
from limbeck.models.to_gguf.write import write_gguf
from limbeck.types import UserError
from tests.conftest import make_tokenizer
from tests.families import FAMILIES, make_model

LAYERS = "llama.block_count"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small file that is whole, though no model."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b", "<s>"])
    writer.add_token_scores([0.5, 1.0, 2.0])
    writer.add_tensor("plain", np.ones((3, 5), dtype=np.float32))
    writer.add_tensor("blocks", np.zeros((2, 34), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def refusal(path, content):
    """Why this is refused; None if it is not."""
    path.write_bytes(content)
    began = time.thread_time()
    try:
        check_gguf(path)
    except UserError as error:
        return str(error)
    finally:
        assert time.thread_time() - began < 1
    return None


@pytest.mark.promise("S11")
def test_every_cut_is_refused(whole, tmp_path):
    path = tmp_path / "x.gguf"
    assert refusal(path, whole) is None
    said = [refusal(path, whole[:end]) for end in range(len(whole) - 60)]  # the last tensor may be padded
    assert all(words is not None and "download it again" in words for words in said)
    assert any("before the end of the tensor" in words for words in said) and any(
        "ends in the middle" in words for words in said
    )


@pytest.mark.promise("S11")
def test_any_byte_changed_ends_at_once(whole, tmp_path):
    path = tmp_path / "x.gguf"
    head = whole.index(b"blocks") + 60
    said = [
        refusal(path, whole[:at] + bytes([byte]) + whole[at + 1 :]) for at in range(head) for byte in (0, 1, 0x7F, 0xFF)
    ]
    assert sum(words is not None for words in said) > head


ENDLESS = 2**60


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("tensors", lambda b: b[:8] + struct.pack("<Q", ENDLESS) + b[16:], "dimensions|ends in the middle|unknown"),
        ("settings", lambda b: b[:16] + struct.pack("<Q", ENDLESS) + b[24:], "ends in the middle|unknown"),
        (
            "an array of numbers",  # the library would read nothing, 2^60 times
            lambda b: b.replace(struct.pack("<IQ", 6, 3), struct.pack("<IQ", 6, ENDLESS)),
            "ends in the middle",
        ),
        ("arrays in arrays", lambda b: b.replace(struct.pack("<IQ", 6, 3), struct.pack("<IQ", 9, 3)), "arrays in an"),
        ("big endian", lambda b: b[:4] + b[4:8][::-1] + b[8:], "little endian"),
        ("alignment", lambda b: b.replace(struct.pack("<II", 4, 64), struct.pack("<II", 4, 63)), "power of two"),
    ],
)
@pytest.mark.promise("S11")
def test_what_would_keep_a_reader_busy_for_ever_is_refused(whole, tmp_path, name, changed, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(changed(whole))
    for use in (lambda: convert_gguf(path, tmp_path / "out"), lambda: serve(str(path))):
        with pytest.raises(UserError, match=words):
            use()


def test_more_layers_than_any_model_has_are_refused_before_they_are_built(whole, tmp_path):
    old = LAYERS.encode() + struct.pack("<II", 4, 2)
    assert old in whole
    (tmp_path / "x.gguf").write_bytes(whole.replace(old, LAYERS.encode() + struct.pack("<II", 4, 2**31)))
    with pytest.raises(UserError, match="num_hidden_layers 2147483648"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.promise("S11")
def test_weights_that_it_lacks_are_named_and_never_random(tiny_folder, tmp_path):
    write_gguf(tiny_folder, tmp_path / "tiny.gguf", TYPES["f32"], "tiny")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "whole")
    content = (tmp_path / "tiny.gguf").read_bytes()
    assert content.count(b"blk.1.attn_q.weight") == 1
    (tmp_path / "other.gguf").write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight are missing .* and would be random"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_biases_that_would_be_dropped_are_refused(tmp_path, monkeypatch):
    """The library reads Llama's files without them, though the model has them."""
    _, file = written("biased", lambda d: LlamaConfig(**d, attention_bias=True), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"its biases, such as blk.0.attn_k.bias, have no place in the llama model"):
        convert_gguf(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


LLAMA_31 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LLAMA_31 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
WINDOWS = {"head_dim": 16, "sliding_window": 8}
CONFIGS = {
    "llama3": lambda d: LlamaConfig(**d, rope_parameters=LLAMA_31),
    "llama3 of 32": lambda d: LlamaConfig(**d, rope_parameters=LLAMA_31 | {"factor": 32.0}),
    "linear": lambda d: LlamaConfig(**d, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "wide heads": lambda d: Qwen3Config(**d, head_dim=16),
    "gemma2": lambda d: Gemma2Config(
        **d, **WINDOWS, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=None
    ),
    "gemma3": lambda d: Gemma3TextConfig(
        **d,
        **WINDOWS,
        query_pre_attn_scalar=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    ),
}


def written(kind, config, tmp_path, monkeypatch, tokenizer=None):
    """A tiny model of this configuration, as a folder and as a GGUF file."""
    monkeypatch.setitem(FAMILIES, kind, config)
    make_model(kind, tmp_path / "model", 0, tokenizer or make_tokenizer())
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", TYPES["f32"], "tiny")
    return tmp_path / "model", tmp_path / "model.gguf"


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_model_is_the_same_after_its_file_was_read(kind, tmp_path, monkeypatch):
    folder, file = written(kind, CONFIGS[kind], tmp_path, monkeypatch)
    convert_gguf(file, tmp_path / "again")
    ids = torch.randint(4, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = (read_weights(place, "x", torch.float32)(ids).logits for place in (folder, tmp_path / "again"))
    assert (before - after).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("turns", "changed", "words"),
    [
        (LLAMA_31 | {"low_freq_factor": 2.0, "high_freq_factor": 6.0}, {}, "rope_freqs.weight, whose factors"),
        ({"rope_type": "default", "rope_theta": 1e4}, {"add_rope_scaling_type": "yarn"}, "rope.scaling.type yarn"),
        ({"rope_type": "default", "rope_theta": 1e4}, {"add_rope_scaling_attn_factors": 1.2}, "rope.scaling.attn_f"),
    ],
)
def test_a_stretch_that_can_not_be_read_is_refused(turns, changed, words, tmp_path, monkeypatch):
    add = families.add_sizes

    def add_more(writer, *sizes, **more):
        add(writer, *sizes, **more)
        for name, value in changed.items():
            getattr(writer, name)(families.RopeScalingType(value) if value == "yarn" else value)

    monkeypatch.setattr("limbeck.models.to_gguf.write.add_sizes", add_more)
    _, file = written("turned", lambda d: LlamaConfig(**d, rope_parameters=turns), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"stretched in a way .*{words}.*as a folder in Hugging Face form"):
        convert_gguf(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_a_scale_of_attention_that_llama_cpp_does_not_take_is_not_written(kind, tmp_path, monkeypatch):
    def config(sizes):
        made = CONFIGS[kind](sizes)
        made.query_pre_attn_scalar = 24
        return made

    with pytest.raises(UserError, match=r"its query_pre_attn_scalar is 24, and llama\.cpp takes 16"):
        written(kind, config, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "layers", "scalar"),
    [("gemma2", 42, 256), ("gemma2", 46, 144), ("gemma3_text", 34, 256), ("gemma3_text", 62, 144)],
)
def test_only_the_largest_gemmas_are_scaled_by_their_hidden_size(kind, layers, scalar):
    made = {"gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}[kind](
        num_hidden_layers=layers, hidden_size=4608, num_attention_heads=32, head_dim=256
    )
    assert families.attention_scalar(made) == scalar


@pytest.mark.parametrize("end", ["<stop>", "<|finish|>", "<| end |>", "<｜end▁of▁turn｜>"])
def test_a_tokenizer_whose_end_has_a_name_of_its_own(end, tmp_path, monkeypatch):
    plain = make_tokenizer()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str().replace("<|end|>", end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
    tokenizer.chat_template = plain.chat_template.replace("<|end|>", end)
    folder, file = written("llama", FAMILIES["llama"], tmp_path, monkeypatch, tokenizer)
    convert_gguf(file, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["eos_token"] == end
    before, after = load_model(str(folder)), load_model(str(tmp_path / "again"))
    chat = ({"role": "user", "content": f"why is the sky{end} blue?"},)
    assert before.prompt_ids(chat) == after.prompt_ids(chat) and before.eos_ids == after.eos_ids == {0}
