"""Model folders that are not whole, not sound, or not what they say: refused by name, never a traceback, never silent."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from limbeck.config.recipe import parse
from limbeck.models import template_names
from limbeck.models.export import check_export, export
from limbeck.models.load import check_source, load_model, load_tokenizer
from limbeck.models.model import Model
from limbeck.models.prune import drop_layers
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.types import RecipeError, UserError
from tests.conftest import make_net, make_tokenizer

SEED = 20261129
LOST = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    return tmp_path / "m"


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, words):
    """Refused without weights, and when it is loaded."""
    for attempt in (check_source, load_model):
        with pytest.raises(UserError, match=words):
            attempt(str(folder))


@pytest.mark.promise("S11")
def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, lambda weights: weights.pop(LOST))
    refused(folder, LOST)


def test_a_foreign_tensor_is_named(folder):
    edit_weights(folder, lambda weights: weights.update({"model.layers.9.odd": torch.ones(2)}))
    refused(folder, "model.layers.9.odd")


def test_sizes_that_the_files_cant_hold_take_no_memory(folder, monkeypatch):
    """Mismatched tensors are made before they are named: heads of 2**20 took 5 GiB."""
    edit_json(folder / "config.json", head_dim=2**20)
    monkeypatch.setattr("limbeck.models.folder.model_class", lambda config: pytest.fail("weights are made"))
    refused(folder, "q_proj")


@pytest.mark.parametrize("names", [7, "x", [7], None])
def test_architectures_that_are_no_names_say_nothing(folder, names):
    edit_json(folder / "config.json", architectures=names)
    with contextlib.suppress(UserError):  # of transformers', which reads them, too
        load_model(str(folder))


@pytest.mark.promise("S11")
def test_a_tensor_of_another_size_is_named(folder):
    edit_weights(folder, lambda weights: weights.update({LOST: torch.ones(3, 3)}))
    refused(folder, LOST)


def test_a_tied_head_may_be_absent(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    check_source(str(folder))
    load_model(str(folder))


def test_a_configuration_of_fewer_layers_is_refused(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    refused(folder, "model.layers.3")


def sharded(folder):
    net = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(folder):
    lost = sharded(folder)[-1]
    check_source(str(folder))
    lost.unlink()
    refused(folder, lost.name)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "damaged"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\xff" * 50, "damaged")],
)
def test_a_file_without_weights_is_named(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, words)


def test_a_cut_file_is_named(folder):
    os.truncate(folder / "model.safetensors", 20000)
    refused(folder, "model.safetensors is damaged")


@pytest.mark.promise("S1")
def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "can run code")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder, tiny_folder, recipe_data):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<odd{n}>" for n in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="resize_token_embeddings"):
        load_model(str(folder))
    with pytest.raises(UserError, match="resize_token_embeddings"):
        check(parse(recipe_data | {"teacher": str(folder)}))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "TokenizersBackend"])
def test_a_tokenizer_without_its_file_is_refused(name, folder, recipe_data):
    """Of some classes transformers makes an empty one then, which reads every text as nothing."""
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(UserError, match=r"it has no tokenizer\.json"):
        load_model(str(folder))
    with pytest.raises(RecipeError, match=r"student\.start\.pretrained: .*it has no tokenizer\.json"):
        check(parse(recipe_data | {"student": {"start": {"pretrained": str(folder)}}}))


def test_pieces_that_take_a_library_are_refused_with_it(folder, capfd):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(UserError, match=r"it has tokenizer\.model and no tokenizer\.json.*sentencepiece"):
        load_model(str(folder))
    assert "environment" not in capfd.readouterr().err  # what transformers logs of it


def test_check_refuses_before_the_run(folder, recipe_data):
    edit_weights(folder, lambda weights: weights.pop(LOST))
    with pytest.raises(UserError, match=LOST):
        check(parse(recipe_data | {"student": {"start": {"pretrained": str(folder)}}}))


def test_a_hole_in_the_ids_keeps_the_highest(folder):
    """cl100k has holes: the number of tokens is less than the highest id, which may be the end token."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary, last = data["model"]["vocab"], max(data["model"]["vocab"].values())
    for token in data["added_tokens"]:
        if token["content"] == "<|end|>":
            token["id"] = last + 1
    vocabulary["<|end|>"] = last + 1
    file.write_text(json.dumps(data))
    net = make_net(vocab_size=last + 2)
    net.save_pretrained(folder)
    model = load_model(str(folder))
    assert model.tokenizer.eos_token_id == last + 1
    assert model.vocab_size == last + 2 > len(model.tokenizer)


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError):
        load_model(str(tmp_path / "bert"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.mkdir()])
def test_what_is_no_file_is_not_opened(make, name, folder):
    (folder / name).unlink()
    make(folder / name)
    refused(folder, f"{name} is no file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 3000),
        ("num_hidden_layers", "4"),
        ("hidden_size", 0),
        ("vocab_size", -1),
        ("max_position_embeddings", 2**70),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(name, value, folder):
    edit_json(folder / "config.json", **{name: value})
    refused(folder, name)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "too much time or memory"),
        ("{{ 'x' * 10**10 }}", "too much time or memory"),
        ("{{ messages[0]['content'] }}{{ 'x' * 10**7 }}", "characters"),
    ],
)
@pytest.mark.promise("S3")
def test_a_template_without_bounds_is_refused(template, words, folder, monkeypatch):
    monkeypatch.setattr(template_names, "OWN_CPU_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=words):
        load_tokenizer(str(folder))


# What is exported


def test_an_export_ends_where_the_student_was_taught_to(tmp_path):
    net = make_net()
    net.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0)
    net.config.eos_token_id = 7
    model = Model(net, make_tokenizer(), "m")
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [0, 7]
    assert net.config.eos_token_id == 7  # the model in memory is as it was


def test_an_export_carries_no_settings_that_transformers_refuses(tmp_path):
    net = make_net()
    net.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    net.generation_config.temperature, net.generation_config.top_p = 0.9, 0.6  # of a sampler, without do_sample
    (tmp_path / "out").mkdir()
    export(Model(net, make_tokenizer(), "m"), tmp_path / "out")
    GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)
    assert "temperature" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_a_head_of_its_own_is_called_so(folder, tmp_path):
    """Files with a head beside a configuration that says it is tied: transformers goes by the files, and other
    programs, to which a student is exported, by the configuration."""
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * 2}))
    model = load_model(str(folder))
    assert torch.equal(model.net.lm_head.weight, model.net.model.embed_tokens.weight * 2)
    pruned = drop_layers(model.net, [0, 2])
    assert torch.equal(pruned.lm_head.weight, model.net.lm_head.weight)
    (tmp_path / "out").mkdir()
    export(replace(model, net=pruned), tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert load_model(str(tmp_path / "out")).net.lm_head.weight.equal(pruned.lm_head.weight)


@pytest.mark.parametrize("share", [0.7, 0.0], ids=["loaded whole", "tensor by tensor"])
def test_an_export_that_differs_is_refused(tmp_path, share, monkeypatch):
    monkeypatch.setattr("limbeck.models.export.SHARE_FREE", share)
    model = Model(make_net(), make_tokenizer(), "m")
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out")
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight += 0.1
    with pytest.raises(UserError, match="in memory"):
        check_export(model, tmp_path / "out")
    edit_weights(tmp_path / "out", lambda weights: weights.pop(LOST))
    with pytest.raises(UserError, match=LOST):
        check_export(model, tmp_path / "out")


# Anything else


def broken(folder, rng):
    """One mutation of a folder, in words."""
    file = rng.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    data = bytearray(file.read_bytes())
    way = rng.choice(["remove", "empty", "cut", "flip", "value", "drop", "type"])
    if way in ("value", "drop", "type") and file.suffix == ".json":
        content = json.loads(data)
        key = rng.choice(sorted(content)) if content else ""
        if way == "drop":
            content.pop(key, None)
        else:
            content[key] = rng.choice([-1, 0, 3, 10**6, "x", None, [], {}, 0.5, True])
        file.write_text(json.dumps(content))
        return f"{way} {file.name} {key} {content.get(key)}"[:120]
    if way == "remove":
        file.unlink()
    elif way in ("empty", "value", "drop", "type"):
        file.write_bytes(b"")
    elif way == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    else:  # the first bytes hold names and sizes; later ones are numbers, any of which could be meant
        data[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
    return f"{way} {file.name}"


@pytest.mark.promise("S11")
def test_mutated_folders_are_refused_in_words_or_work(tiny_folder, tmp_path):
    """Sixty of them: a UserError, or a model that computes what its files say; and `check` refuses no less by files
    than loading does."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    tokens = torch.arange(1, 9)[None]
    told = 0
    for number in range(60):
        target = tmp_path / f"m{number}"
        shutil.copytree(tiny_folder, target)
        what = broken(target, rng)
        try:
            check_source(str(target))
            model = load_model(str(target))
            logits = model.net(tokens).logits
            again = load_model(str(target)).net(tokens).logits
        except UserError as error:
            told += 1
            assert str(error).strip(), what
        else:
            assert logits.isfinite().all() and torch.equal(logits, again), what  # nothing was filled at random
    assert told >= 15


def test_a_student_of_a_folder_runs_to_the_end(folder, recipe_data, tmp_path):
    """The exported student of a plain run is what was trained, to the bit."""
    data = recipe_data | {"student": {"start": {"prune": {"keep": [0, 2]}}}}
    run(parse(data | {"teacher": str(folder)}), tmp_path / "run", stages=("elicit", "train"))
    student = load_model(str(tmp_path / "run" / "student"))
    assert student.net.config.num_hidden_layers == 2
