"""A GGUF file is held within its bounds before a library reads it."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from limbeck.commands.serve import serve
from limbeck.models.folder import convert_gguf
from limbeck.models.gguf_file import check_gguf
from limbeck.models.to_gguf.types import TYPES
from limbeck.models.to_gguf.write import write_gguf
from limbeck.types import UserError

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
