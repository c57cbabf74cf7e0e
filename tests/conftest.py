"""A tiny model in Hugging Face form, made here: every test of the product's own logic runs on it in seconds."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.evaluate import efficiency
from limbeck.models import fingerprint
from limbeck.models.load import load_model
from limbeck.models.model import Model

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "the cat sat on the mat",
    "a dog ran to the red house",
    "why is the sky blue",
    "count one two three four five",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_net(layers: int = 4, seed: int = 0, vocab_size: int = 300, head_dim: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tokenizer()
    make_net(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    return load_model(str(tiny_folder))


@pytest.fixture(autouse=True)
def own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test's runs share answers among themselves alone, never with the user's."""
    monkeypatch.setenv("LIMBECK_STORE", "none")


@pytest.fixture(autouse=True)
def own_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes of the files of tests are kept among themselves."""
    monkeypatch.setattr(fingerprint, "home", lambda: tmp_path_factory.getbasetemp() / "home")


@pytest.fixture(autouse=True)
def short_speed_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of speeds is the same with fewer tokens."""
    monkeypatch.setattr(efficiency, "DECODED", 4)
    monkeypatch.setattr(efficiency, "PREFILL_TOKENS", 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


PROMPTS = [
    f"why is the {colour} {thing} on the {place}"
    for colour in ("red", "blue", "old")
    for thing in ("cat", "dog", "car")
    for place in ("mat", "house")
]


def write_prompts(folder: Path) -> Path:
    import json

    file = folder / "prompts.jsonl"
    lines = [
        json.dumps({"id": f"p{i}", "prompt": text, "check": {"type": "contains", "all": ["a"]}})
        for i, text in enumerate(PROMPTS)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


@pytest.fixture
def recipe_data(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> dict:
    return make_recipe_data(tiny_folder, prompt_file, tmp_path)


def make_recipe_data(tiny_folder: Path, prompt_file: Path, folder: Path) -> dict:
    held_out = folder / "held_out.jsonl"
    held_out.write_text(
        '{"id": "h1", "prompt": "count one two"}\n{"id": "h2", "prompt": "a dog ran", "check": {"type": "contains", "all": ["zzz"]}}\n'
    )
    return {
        "name": "tiny",
        "teacher": str(tiny_folder),
        "student": {"start": {"prune": {"layers": 3, "keep": "importance", "calibration": 2}}},
        "prompts": {"from": str(prompt_file)},
        "writer": [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 12}],
        "loss": ["forward_kl"],
        "train": {"steps": 6, "tokens_per_step": 32, "lr": 1e-3, "seed": 3},
        "evaluate": {"metrics": ["fidelity", {"everyday": {"limit": 8}}], "prompts": str(held_out), "max_tokens": 12},
    }
