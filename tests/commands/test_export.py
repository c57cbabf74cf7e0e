"""Exports of tiny models: opened by the packaged llama.cpp and compared, refused where they are wrong, and their errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Codes
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaConfig, MistralConfig, PreTrainedTokenizerFast

from limbeck.commands.export import run
from limbeck.commands.export.ollama import frames_of, modelfile
from limbeck.commands.export.run import export, exported_once
from limbeck.commands.export.student import OWN_PROMPTS, find_student
from limbeck.models.folder import save_model
from limbeck.models.load import load_model
from limbeck.models.template import render
from limbeck.models.to_gguf import families, types, vocabulary, write
from limbeck.models.to_gguf.types import TYPES, encode
from limbeck.models.to_gguf.vocabulary import pre_tokenizer
from limbeck.progress import Silent
from limbeck.types import UserError
from tests.conftest import CORPUS, make_tokenizer
from tests.families import FAMILIES, SIZES, make_model

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|system|>Be kind.<|end|>\n{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for"
)


def export_to(where, out, form="gguf", kind=None):
    return export(where, form, kind, out, reporter=Silent())


@pytest.fixture
def run_folder(tiny_folder, tmp_path):
    """A run with a student, and two prompts that its evaluation held out."""
    folder = tmp_path / "a run"
    shutil.copytree(tiny_folder, folder / "student")
    (folder / "recipe.yaml").write_text("name: tiny\n")
    (folder / "evaluation").mkdir()
    lines = [
        json.dumps({"prompt_id": str(n), "prompt": text}) for n, text in enumerate(("why is the sky", "count one"))
    ]
    (folder / "evaluation" / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(run, "can_check", lambda: False)


def field(file, key):
    return GGUFReader(file).fields[key].contents()


def test_a_run_becomes_a_file_that_is_the_student(run_folder, tiny):
    record = export(run_folder, "gguf", None, None, Silent())
    folder = run_folder / "exports" / "gguf-f16"
    assert record["folder"] == str(folder) and sorted(file.name for file in folder.iterdir()) == [
        "a-run-f16.gguf",
        "export.json",
    ]
    kept = json.loads((folder / "export.json").read_text())
    agreement = kept["agreement"]
    assert agreement["prompts"] == 2, "the run's own held-out prompts"
    assert 0 <= agreement["kl_nats_per_token"] < 0.001 and agreement["same_first_choice"] > 0.9
    assert agreement["same_prompt_tokens"]
    file = folder / kept["file"]
    assert kept["bytes"] == file.stat().st_size and len(kept["sha256"]) == 64
    assert field(file, "tokenizer.chat_template") == tiny.tokenizer.chat_template
    assert field(file, "tokenizer.ggml.eos_token_id") == field(file, "tokenizer.ggml.eot_token_id") == tiny.end_of_turn
    assert field(file, "tokenizer.ggml.pre") == "gpt-2" and not list(run_folder.rglob("*.tmp"))


FAMILY_NAMES = [
    "llama",
    "llama, tied",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3",
]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_is_the_student(family, tmp_path, monkeypatch):
    """Random weights, large, so that a wrong order or scale is seen (KL 0.2 to 1 nats)."""
    monkeypatch.setitem(FAMILIES, "mistral", lambda sizes: MistralConfig(**sizes, sliding_window=None))
    make_model(family, tmp_path / "m", 0, make_tokenizer())
    model = load_model(str(tmp_path / "m"))
    assert model.net.config.model_type in families.FAMILIES
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
            elif "norm" in name:
                parameter.add_(torch.randn(len(parameter), generator=torch.Generator().manual_seed(0)) * 0.3)
    save_model(model.net, model.tokenizer, tmp_path / "m")
    assert export_to(tmp_path / "m", tmp_path / "out")["agreement"]["kl_nats_per_token"] < 0.001


def test_every_family_is_tried():
    assert {FAMILIES[family](SIZES | {"vocab_size": 320}).model_type for family in FAMILY_NAMES} == set(
        families.FAMILIES
    )


def test_a_wrong_file_is_refused_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    right = families.FAMILIES["llama"]
    monkeypatch.setitem(families.FAMILIES, "llama", replace(right, interleaved=False))
    with pytest.raises(UserError, match=r"the export is not the student: .* nats a token"):
        export_to(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_other_tokens_is_refused(tiny_folder, tmp_path, monkeypatch):
    tokens = vocabulary._tokens

    def swapped(*arguments):
        texts, kinds = tokens(*arguments)
        a, e = texts.index("a"), texts.index("e")
        texts[a], texts[e] = "e", "a"
        return texts, kinds

    monkeypatch.setattr(vocabulary, "_tokens", swapped)
    with pytest.raises(UserError, match="reads text otherwise than the student"):
        export_to(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_does_not_open_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "add_sizes", lambda *_, **more: None)
    with pytest.raises(UserError, match=r"llama.cpp can't open the export"):
        export_to(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_server_ends_with_whoever_started_it(tiny_folder, tmp_path):
    record = export_to(tiny_folder, tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "limbeck.commands.export.serve_alone",
        str(tmp_path / "out" / record["file"]),
        "256",
    ]
    ended = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("http://127.0.0.1:") and ended.returncode == 0


def test_without_the_server_it_says_that_nothing_was_checked(tiny_folder, tmp_path, unchecked):
    record = export_to(tiny_folder, tmp_path / "out", kind="q8_0")
    assert record["agreement"] is None and "pip install 'limbeck[serve]'" in record["note"]
    assert (tmp_path / "out" / record["file"]).is_file()


def test_small_types_without_llama_cpp(tiny_folder, tmp_path, monkeypatch):
    types._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[serve\]', or take f16 or q8_0"):
        export_to(tiny_folder, tmp_path / "out", kind="q4_k_m")


def test_more_ids_than_rows(tmp_path):
    make_model("llama", tmp_path / "m", 0, make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<more{number}>" for number in range(40)])
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="340 ids and its embedding 320 rows"):
        export_to(tmp_path / "m", tmp_path / "out")


def test_adapters_are_folded_in(tiny_folder, tmp_path, tiny):
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(
        load_model(str(tiny_folder)).net, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    net.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    net.save_pretrained(tmp_path / "lora")
    record = export_to(tmp_path / "lora", tmp_path / "out")
    assert record["agreement"]["kl_nats_per_token"] < 0.001 and record["file"] == "lora-f16.gguf"


def test_a_folder_in_another_precision(run_folder):
    (run_folder / "student" / "README.md").write_text("# card\n")
    record = export(run_folder, "hf", "bf16", None, Silent())
    folder = run_folder / "exports" / "hf-bf16"
    assert 0 < record["agreement"]["kl_nats_per_token"] < 0.05
    assert "bfloat16" in (folder / "config.json").read_text() and (folder / "README.md").read_text() == "# card\n"
    assert {file["file"] for file in record["files"]} >= {"model.safetensors", "tokenizer.json", "README.md"}
    assert export(run_folder, "hf", None, run_folder / "same", Silent())["agreement"]["kl_nats_per_token"] == 0


# Ollama


@pytest.mark.parametrize(("template", "uncovered"), [(CHATML, ""), (LLAMA2, ""), (NO_SYSTEM, "system messages")])
def test_the_frames_are_those_of_the_template(template, uncovered):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    frames, differs = frames_of(tokenizer)
    assert uncovered in differs and bool(differs) == bool(uncovered)
    talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    assert frames.framed(talk) == render(tokenizer, talk)


def test_a_modelfile(run_folder, unchecked):
    settings = run_folder / "student" / "generation_config.json"
    settings.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [0, 1]}))
    record = export(run_folder, "ollama", "q8_0", None, Silent())
    lines = (run_folder / "exports" / "ollama-q8_0" / "Modelfile").read_text().splitlines()
    assert lines[0] == f"FROM ./{record['file']}" and "{{ range .Messages }}" in lines[1]
    assert lines[2:] == [
        'PARAMETER stop "<|end|>"', 'PARAMETER stop "<|user|>"', "PARAMETER num_ctx 256", "PARAMETER temperature 0.7", "PARAMETER top_p 0.9"
    ]  # fmt: skip


def test_greedy_without_settings_and_braces_are_refused():
    tokenizer = make_tokenizer()
    text, _ = modelfile(tokenizer, "x.gguf", [0], None, 99)
    assert "PARAMETER temperature 0\n" in text and "num_ctx 99" in text
    tokenizer.chat_template = CHATML.replace("Be kind.", "{{ '{{' }}")
    with pytest.raises(UserError, match="braces"):
        modelfile(tokenizer, "x.gguf", [0], None, 99)


# Weights and tokenizers


@pytest.mark.parametrize("codes", [Codes.Q4_0, Codes.Q4_K, Codes.Q5_K, Codes.Q6_K, Codes.Q8_0])
def test_codes_stand_for_the_weights(codes):
    weights = np.random.default_rng(0).standard_normal((6, 512), dtype=np.float32)
    off = np.abs(dequantize(encode(weights, codes), codes) - weights).mean()
    assert off < {Codes.Q8_0: 0.01, Codes.Q6_K: 0.03, Codes.Q5_K: 0.05}.get(codes, 0.12)


def test_which_matrices_get_more_bits():
    """As llama.cpp's own program stores them: of 30 layers the first and last eighth, and every third between."""
    kind = TYPES["q4_k_m"]
    more = [n for n in range(30) if kind.codes_of(f"blk.{n}.ffn_down.weight", (512, 1536), 30, True) == Codes.Q6_K]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert kind.codes_of("token_embd.weight", (9, 512), 30, True) == Codes.Q6_K
    assert kind.codes_of("token_embd.weight", (9, 512), 30, False) == Codes.Q4_K
    assert kind.codes_of("blk.4.attn_q.weight", (9, 576), 30, True) == Codes.Q5_0, "rows that 256 does not divide"
    assert kind.codes_of("blk.4.attn_q.weight", (9, 40), 30, True) == Codes.F16
    assert kind.codes_of("blk.4.attn_norm.weight", (512,), 30, True) == Codes.F32


@pytest.mark.parametrize("name", ["smollm", "qwen2", "dbrx", "llama-bpe"])
def test_a_tokenizer_is_known_by_how_it_cuts(name):
    tokenizer = make_tokenizer()
    patterns = {pre: found for pre, _, found in vocabulary.PRE_TOKENIZERS}[name]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    first = pre_tokenizers.Split(Regex(patterns[0]), "isolated")
    if name == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, plain])
    tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
    assert pre_tokenizer(tokenizer, "x") == name


@pytest.fixture
def pieces():
    """A tokenizer in the manner of SentencePiece: spaces as ▁, no cutting before the merges, bytes for other letters."""
    start = Tokenizer(models.BPE())
    start.normalizer = normalizers.Replace(" ", "▁")
    start.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(start.to_str())["model"]
    first = ["<end>", "<unk>", "<user>", "<bot>", *(f"<0x{number:02X}>" for number in range(256))]
    vocab = {token: number for number, token in enumerate([*first, *sorted(learnt["vocab"], key=learnt["vocab"].get)])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = start.normalizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<end>", "<unk>", "<user>", "<bot>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = CHATML.replace("<|system|>Be kind.<|end|>", "").replace("<|{{ m['role'] }}|>", "<user>").replace(
        "<|end|>", "<end>").replace("<|assistant|>", "<bot>")  # fmt: skip
    return tokenizer


def test_a_tokenizer_of_pieces(pieces, tmp_path, monkeypatch):
    """The comparison reads a text with emoji, Japanese and umlauts, and the prompts."""
    monkeypatch.setitem(FAMILIES, "pieces", lambda sizes: GemmaConfig(**(sizes | {"vocab_size": 500, "head_dim": 16})))
    make_model("pieces", tmp_path / "m", 0, pieces)
    record = export_to(tmp_path / "m", tmp_path / "out")
    assert record["agreement"]["kl_nats_per_token"] < 0.001 and record["agreement"]["same_prompt_tokens"]
    assert field(tmp_path / "out" / record["file"], "tokenizer.ggml.model") == "llama"


# What a user can do wrong


def test_mistakes_are_one_message_with_the_cure(run_folder, tiny_folder, tmp_path, monkeypatch):
    def refused(message, *arguments, **settings):
        with pytest.raises(UserError, match=message):
            export_to(*arguments, **settings)
        assert not list(tmp_path.glob("out*"))

    out = tmp_path / "out"
    refused("there is no folder", tmp_path / "nowhere", out)
    refused(r"no such form; there are gguf, ollama, hf|no such form", run_folder, out, form="onnx")
    refused(
        r"--type q3_k_s is not made here.*llama-quantize STUDENT-f16.gguf STUDENT-q3_k_s.gguf Q3_K_S",
        run_folder,
        out,
        kind="q3_k_s",
    )
    refused("none of a folder's", run_folder, out, form="hf", kind="q8_0")
    refused("give a folder", run_folder, tmp_path / "out.gguf")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    refused("is a file, so .* can't be made", run_folder, tmp_path / "file" / "out")
    refused("exists: remove it, or give another --out", run_folder, tmp_path / "there")
    make_model("gpt2", tmp_path / "gpt2", 0, make_tokenizer())
    refused(r"'gpt2' are not exported as GGUF \(those that are: gemma", tmp_path / "gpt2", out)
    (run_folder / "student").rename(tmp_path / "gone")
    refused("has no student yet: `limbeck run", run_folder, out)
    (tmp_path / "empty").mkdir()
    refused("no config.json", tmp_path / "empty", out)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    refused("0 MB free, and the export takes 67 MB: make room", tiny_folder, out)


def test_tokenizers_that_llama_cpp_does_not_have(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}, settings["pre_tokenizer"]]}  # fmt: skip
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"cuts text in a way that llama.cpp has no name for.*convert_hf_to_gguf.py"):
        export_to(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropped_layers_that_llama_cpp_can_not_know(tmp_path):
    make_model("smollm3", tmp_path / "m", 0, make_tokenizer())
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"no_rope_layers": [1, 0, 1, 1]}))
    with pytest.raises(UserError, match="no rotary embedding in every 4th layer, and layer 1 differs"):
        export_to(tmp_path / "m", tmp_path / "out")


def test_exit_status(tmp_path):
    command = [sys.executable, "-m", "limbeck", "export", str(tmp_path), "--to", "gguf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no config.json" in done.stderr and "Traceback" not in done.stderr


# Serving


def test_a_served_student_is_exported_once_for_its_weights(run_folder, tmp_path, unchecked):
    name, file = exported_once(run_folder, Silent())
    before = file.stat().st_mtime_ns
    assert name == "a-run" and exported_once(run_folder, Silent()) == (name, file) and file.stat().st_mtime_ns == before
    weights = run_folder / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    _, other = exported_once(run_folder, Silent())
    assert other != file and not file.exists()
    with pytest.raises(UserError, match="not a run folder"):
        exported_once(shutil.copytree(run_folder / "student", tmp_path / "plain"), Silent())


def test_prompts_of_a_folder_are_our_own(tiny_folder, run_folder):
    assert find_student(tiny_folder).prompts == OWN_PROMPTS
    assert find_student(run_folder / "student").run == run_folder
