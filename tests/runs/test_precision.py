"""Precision from recipe to report: what a run keeps apart by it, and that every precision runs to its end."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import load_recipe, parse
from limbeck.models.load import load_model
from limbeck.models.placement import Precision
from limbeck.models.quantise import QuantisedLinear
from limbeck.progress import Silent
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.storage import checkpoint
from limbeck.storage.store import Store
from limbeck.types import RecipeError, UserError, content_hash

KEYS = {"teacher": ("dtype", "quantise"), "train": ("precision",), "lora": ("base",)}
TEACHERS = {"dtype": "bfloat16", "quantise": "int8"}


def changed(data, **paths):
    """The recipe's data with values at dotted paths."""
    data = copy.deepcopy(data)
    if isinstance(data["teacher"], str):
        data["teacher"] = {"model": data["teacher"]}
    for path, value in paths.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return data


def with_lora(data, base=None, **paths):
    data = changed(data, **paths)
    lora = {"rank": 2, "alpha": 4} | ({} if base is None else {"base": base})
    data["student"] = {"start": {"pretrained": data["teacher"]["model"]}, "lora": lora}
    return data


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder):
    return json.loads((folder / "evaluation" / "summary.json").read_text())["systems"]


def begun(data, folder):
    return Run(resolve(parse(data)), folder, Silent())


# What is in a recipe's hash


@pytest.mark.parametrize("name", sorted(recipe_files())[::5])
def test_recipes_that_say_nothing_of_precision_keep_their_hash(name):
    recipe = load_recipe(name)
    resolved = recipe.resolved()
    lora = resolved["student"].get("lora", {})
    assert not any(key in resolved["teacher"] for key in KEYS["teacher"])
    assert "precision" not in resolved["train"] and "base" not in lora and "machine" not in resolved
    assert recipe.hash == content_hash(resolved)


def test_saying_float32_is_saying_nothing(recipe_data):
    plain = with_lora(recipe_data)
    spelt = with_lora(recipe_data, "float32", teacher__dtype="float32", train__precision="float32")
    assert parse(spelt).hash == parse(plain).hash


@pytest.mark.parametrize(
    "paths",
    [
        {"teacher__dtype": "bfloat16"},
        {"teacher__dtype": "float16"},
        {"teacher__quantise": "int8"},
        {"teacher__quantise": "int4"},
        {"train__precision": "bfloat16"},
    ],
)
def test_each_precision_is_another_recipe(recipe_data, paths):
    plain = parse(recipe_data)
    other = parse(changed(recipe_data, **paths))
    assert other.hash != plain.hash and parse(other.resolved()).hash == other.hash


def test_each_base_is_another_recipe(recipe_data):
    hashes = {parse(with_lora(recipe_data, base)).hash for base in (None, "bfloat16", "int8", "int4")}
    assert len(hashes) == 4


@pytest.mark.parametrize("machine", [{"device": "cpu"}, {"micro_tokens": 64}, {"checkpointing": True}, {"head_mib": 2}])
def test_where_a_recipe_runs_is_not_in_its_hash(recipe_data, machine):
    assert parse({**recipe_data, "machine": machine}).hash == parse(recipe_data).hash


@pytest.mark.parametrize(
    ("teacher", "place"),
    [
        ({"model": "m", "quantise": "int2"}, "teacher.quantise"),
        ({"model": "m", "dtype": "float64"}, "teacher.dtype"),
        ({"model": "m", "weights": "live", "quantise": "int8"}, "teacher.quantise"),
        ({"server": {"url": "http://127.0.0.1:1/v1", "name": "m"}, "dtype": "bfloat16"}, "teacher.dtype"),
    ],
)
def test_a_precision_that_a_teacher_can_not_have_is_refused_by_its_place(recipe_data, teacher, place):
    with pytest.raises(RecipeError) as error:
        parse({**recipe_data, "teacher": teacher})
    assert error.value.path.startswith(place)


def test_what_has_no_int4_is_refused_before_anything_is_spent(recipe_data, monkeypatch):
    monkeypatch.setattr("limbeck.models.quantise.find_spec", lambda _: None)
    for data, place in (
        (changed(recipe_data, teacher__quantise="int4"), "teacher.quantise"),
        (with_lora(recipe_data, "int4"), "student.lora.base"),
    ):
        with pytest.raises(RecipeError, match="pip install") as error:
            limbeck.check(parse(data))
        assert error.value.path == place
        monkeypatch.undo()
        assert limbeck.check(parse(data))
        monkeypatch.setattr("limbeck.models.quantise.find_spec", lambda _: None)


# What the precisions of a teacher share: nothing


@pytest.mark.parametrize("precision", TEACHERS)
@pytest.mark.promise("R12")
def test_answers_of_another_precision_are_never_taken(recipe_data, tmp_path, precision):
    other = changed(recipe_data, **{f"teacher__{precision}": TEACHERS[precision]})
    plain, short = begun(recipe_data, tmp_path), begun(other, tmp_path)  # one store for both
    ours = {sample.id for sample in plain.text.training()}
    theirs = {sample.id for sample in short.text.training()}
    assert ours and theirs and not ours & theirs
    assert short.models.teacher_identity == plain.models.teacher_identity + f"+{TEACHERS[precision]}"
    assert short.models.teacher.identity == short.models.teacher_identity
    again = begun(other, tmp_path)
    assert {sample.id for sample in again.text.training()} == theirs and not again.models.loaded  # its own are


def test_a_cache_of_another_precision_is_refused(recipe_data, tmp_path):
    cache = {"hidden": {"dtype": "float32"}, "folder": str(tmp_path / "shared")}
    plain = changed(recipe_data, teacher__cache=cache)
    limbeck.run(parse(plain), tmp_path / "plain", stages=("elicit", "train"))
    with pytest.raises(UserError, match="shared"):
        limbeck.run(parse(changed(plain, teacher__quantise="int8")), tmp_path / "int8", stages=("elicit", "train"))


def test_log_probs_of_a_reference_in_another_precision_are_computed_anew(recipe_data, tmp_path):
    data = recipe_data | {
        "writer": [{"by": "teacher", "share": 1, "max_tokens": 8}, {"by": "untouched", "share": 1, "max_tokens": 8}],
        "loss": ["dpo"],
        "train": {"steps": 1, "tokens_per_step": 64, "lr": 1e-3},
    }
    for base in (None, "int8"):
        data["student"] = {"start": {"prune": {"layers": 3, "keep": "uniform"}}, "lora": {"rank": 2, "base": base}}
        run = begun(data, tmp_path)
        student = run.models.student_to_train()
        run.job("student", student)
        with Store(tmp_path / "store.sqlite") as store:
            judges = {e.judge for e in store.evidence(f"log_prob of {student.vocab_size} tokens")} | {
                e.judge for e in store.evidence("log_prob")
            }
        assert student.identity in judges and student.identity.endswith("+int8" if base else "")
    assert len(judges) == 2


# Whole runs


@pytest.mark.parametrize(
    ("precision", "cache"),
    [
        ({"dtype": "bfloat16"}, None),
        ({"dtype": "bfloat16"}, {"hidden": {}}),
        ({"dtype": "bfloat16"}, {"top_k": {"k": 16}}),
        ({"dtype": "float16"}, None),
        ({"quantise": "int8"}, {"hidden": {}}),
        ({"quantise": "int4"}, None),
    ],
)
def test_a_teacher_in_any_precision_teaches_and_is_measured(recipe_data, tmp_path, precision, cache):
    data = changed(recipe_data, **{f"teacher__{key}": value for key, value in precision.items()})
    data["teacher"] |= {} if cache is None else {"cache": cache}
    data["evaluate"] |= {"controls": ["untouched"], "metrics": ["fidelity"]}
    data["train"]["tokens_per_step"] = 4000  # the whole text, so that the loss falls at every step
    out = tmp_path / "out"
    limbeck.run(parse(data), out)
    systems = summary(out)
    assert systems["teacher"]["forward_kl"]["value"] == 0
    assert systems["untouched"]["forward_kl"]["value"] > 0.01
    assert len(losses(out)) == 6 and losses(out)[-1] < losses(out)[0]
    student = load_model(str(out / "student")).net
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.long
@pytest.mark.parametrize(
    "start", [{"prune": {"layers": 3, "keep": "uniform"}}, {"scratch": {"config": {"num_hidden_layers": 2}}}]
)
@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"quantise": "int8"}])
def test_a_student_is_made_from_weights_that_were_never_rounded(recipe_data, tmp_path, precision, start):
    data = changed(recipe_data, **{f"teacher__{key}": value for key, value in precision.items()})
    data["student"]["start"] = start
    plain = changed(recipe_data, student__start=start)
    ours, theirs = (begun(each, tmp_path / name).models.initial_student() for each, name in ((data, "a"), (plain, "b")))
    assert ours.identity == theirs.identity
    for name, weight in ours.net.named_parameters():
        assert torch.equal(weight, theirs.net.get_parameter(name)) and weight.dtype == torch.float32


@pytest.mark.long
@pytest.mark.parametrize("base", ["bfloat16", "int8", "int4"])
def test_adapters_on_rounded_weights_train_go_on_and_are_exported_into_the_whole_ones(recipe_data, tmp_path, base):
    data = with_lora(recipe_data, base)
    data["evaluate"] |= {"controls": ["untouched"], "metrics": ["fidelity"]}
    data["train"]["save_seconds"] = 0
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    limbeck.run(parse(data), straight)
    assert losses(straight)[0] > 1e-5  # the rounding is what the adapters make good
    done = []
    with pytest.raises(limbeck.progress.StoppedError):
        limbeck.run(parse(data), broken, stop=lambda: bool(done.append(1)) or (broken / "metrics.jsonl").exists())
    assert 0 < len(losses(broken)) < 6
    limbeck.run(parse(data), broken)
    assert losses(broken) == losses(straight)
    tensors = checkpoint.load_newest(straight / "checkpoints").tensors
    trained = {name for name in tensors if name.startswith("weight/")}
    assert len(trained) == 4 * 7 * 2 and all("lora_" in name for name in trained)
    assert {tensors[name].dtype for name in trained} == {torch.float32}
    exported = AutoModelForCausalLM.from_pretrained(straight / "student")
    whole = load_model(data["teacher"]["model"]).net
    for name, weight in whole.named_parameters():
        layer = f"weight/{name.removesuffix('weight')}"
        if f"{layer}lora_A.default.weight" in tensors:
            a_RI, b_OR = (tensors[f"{layer}lora_{part}.default.weight"] for part in "AB")
            weight = weight + (b_OR @ a_RI) * 2.0
        assert torch.equal(exported.get_parameter(name), weight), name


def test_the_teacher_is_the_student_without_adapters_only_in_the_same_precision(recipe_data, tmp_path):
    def shares(base, **paths):
        run = begun(with_lora(recipe_data, base, **paths), tmp_path / f"{base}-{len(paths)}")
        student = run.models.student_to_train()
        run.job("student", student)
        assert run.models.student_is_adapted_teacher == (student.identity == run.models.teacher_identity)
        return run.models.student_is_adapted_teacher and not run.models.loaded

    assert shares(None) and shares("int8", teacher__quantise="int8") and shares("bfloat16", teacher__dtype="bfloat16")
    assert not shares("int8") and not shares(None, teacher__quantise="int8")


def test_a_teacher_is_quantised_for_the_other_kinds_too(recipe_data, tmp_path):
    several = {"beside": [{"model": recipe_data["teacher"]}], "quantise": "int8"}
    data = changed(recipe_data, **{f"teacher__{key}": value for key, value in several.items()})
    run = begun(data, tmp_path / "several")
    job = run.job("student", run.models.student_to_train())
    assert job.objective.teacher is not None
    for teacher in run.models.loaded.values():
        assert any(isinstance(module, QuantisedLinear) for module in teacher.model.net.modules())
        assert teacher.identity.endswith("+int8")
    assert run.models.loaded and run.models.teacher_precision == Precision(quantise="int8")
