"""Comparing methods: the same conditions for all, resumable, and nothing claimed that the seeds and items do not allow."""

from __future__ import annotations

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.config.recipe import parse
from limbeck.evaluate.run import Questions
from limbeck.models.teacher import InProcessTeacher
from limbeck.progress import StoppedError
from limbeck.runs.advice import replaced_settings
from limbeck.runs.compare import Comparison, _common, _teacher_tokens, entries
from limbeck.storage.files import read_jsonl
from limbeck.types import Sample, UserError
from tests.conftest import make_recipe_data, write_prompts


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return make_recipe_data(tiny_folder, write_prompts(folder), folder)


@pytest.fixture
def recipe_data(data):
    return copy.deepcopy(data)


@pytest.fixture(scope="module")
def methods(data):
    """The common recipe and three methods on it: fine-tuning, forward and reverse KL, whose own settings are other ones."""
    common = parse(data)
    made = [parse(data | {"name": name, "loss": [loss], "train": {"steps": 77, "lr": 0.5}})
            for name, loss in (("seq-kd", "cross_entropy"), ("forward-kl", "forward_kl"), ("reverse-kl", "reverse_kl"))]  # fmt: skip
    return common, made


@pytest.fixture(scope="module")
def finished(methods, tmp_path_factory):
    common, made = methods
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_STORE", "none")
        return limbeck.compare(made, tmp_path_factory.mktemp("compared") / "cmp", like=common, seeds=2).folder


@pytest.fixture
def compared(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "cmp")


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_a_comparison_from_recipes_to_page(methods, compared):
    common, _ = methods
    found = read(compared)
    assert list(found["systems"]) == ["teacher", "untouched", "seq-kd", "forward-kl", "reverse-kl"]
    assert found["base"] == "seq-kd" and found["seeds"] == [common.train.seed, common.train.seed + 1]
    assert set(found["paired"]) == {"forward-kl - seq-kd", "reverse-kl - seq-kd"}
    for differences in found["paired"].values():
        for facts in differences.values():
            assert 0 < facts["p"] <= facts["p_holm"] <= 1 and facts["low"] <= facts["value"] <= facts["high"]
    assert set(found["systems"]["seq-kd"]) <= set(found["metrics"])
    page = (compared / "report.html").read_text()
    assert "forward-kl" in page and re.search(r"<svg", page)


def test_all_methods_have_the_same_text_steps_and_tokens(methods, compared):
    common, _ = methods
    found = read(compared)
    cost = found["cost"]
    assert len({(facts["teacher_tokens"], facts["steps"], facts["trained_tokens"]) for facts in cost.values()}) == 1
    for run in (compared / "runs").iterdir():
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        assert recipe["train"]["lr"] == common.train.lr and recipe["prompts"]["seed"] == common.train.seed
        assert not (run / "store.sqlite").exists(), "the text is drawn once, for all"
    losses = [
        [r["loss"] for r in read_jsonl(compared / "runs" / f"forward-kl-s{seed}" / "metrics.jsonl")]
        for seed in found["seeds"]
    ]
    assert losses[0] != losses[1], "seeds vary the order of the text"


def test_values_pool_the_seeds(compared):
    found = read(compared)
    for method in ("seq-kd", "forward-kl"):
        by_seed = [found["by_seed"][method][str(seed)]["forward_kl"] for seed in found["seeds"]]
        assert by_seed[0] != by_seed[1]
        assert found["systems"][method]["forward_kl"]["value"] == pytest.approx(
            sum(by_seed) / 2
        )  # the same tokens for both
    difference = found["paired"]["forward-kl - seq-kd"]["forward_kl"]["value"]
    values = [found["systems"][name]["forward_kl"]["value"] for name in ("forward-kl", "seq-kd")]
    assert difference == pytest.approx(values[0] - values[1])


def test_only_the_first_seeds_students_are_kept(compared):
    kept = sorted(run.name for run in (compared / "runs").iterdir() if (run / "student").exists())
    first = read(compared)["seeds"][0]
    assert kept == sorted(f"{name}-s{first}" for name in ("seq-kd", "forward-kl", "reverse-kl"))


@pytest.mark.long
def test_a_stopped_comparison_goes_on_and_repeats_nothing(methods, compared, tmp_path, monkeypatch):
    common, made = methods
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 60

    with pytest.raises(StoppedError):
        limbeck.compare(made, tmp_path / "stopped", like=common, seeds=2, stop=stop)
    limbeck.compare(made, tmp_path / "stopped", like=common, seeds=2)
    whole, again = read(compared), read(tmp_path / "stopped")
    for one in (whole, again):
        for timed in ("efficiency", "speeds", "cost", "name"):
            one.pop(timed)
    assert whole == again
    monkeypatch.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr("limbeck.training.loop.train", lambda *_: pytest.fail("trained again"))
    limbeck.compare(made, tmp_path / "stopped", like=common, seeds=2)


def answer(writer, ids, finish="ok"):
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c"})
    return Sample(messages, writer, ids, meta={"writer": writer, "finish": finish})


def test_tokens_of_the_teacher_are_counted_here_where_its_server_gave_text(tmp_path):
    written = [
        answer("teacher", (1, 2)),
        answer("teacher", None),
        answer("teacher", None, "length"),
        answer("corpus", None),
    ]
    assert _teacher_tokens(written, str.split) == 2 + (3 + 1) + 3
    (tmp_path / "metrics.jsonl").write_text('{"response_tokens": 4, "seconds": 1.0}\n')

    def cost(samples):
        made = Comparison(tmp_path, None, (), (), base="", reporter=None, stop=bool)
        made.common = SimpleNamespace(models=SimpleNamespace(reader=SimpleNamespace(text_ids=str.split)))
        run = SimpleNamespace(path=lambda name: tmp_path / name, text=SimpleNamespace(training=lambda: samples))
        return made._cost([run])

    assert cost(written) == {"teacher_tokens": 9, "trained_tokens": 4, "steps": 1, "seconds": 1}
    assert "teacher_tokens" not in cost([answer("elicited", (1, 2))]), "what its steps asked for is not all there"


def test_the_text_of_an_elicited_method_is_searched_for_what_is_asked():
    made = Comparison(None, None, ("a", "b"), (1, 2), base="a", reporter=None, stop=bool)
    made.common = SimpleNamespace(questions=Questions(None, (), "the common text", None))
    runs = [
        SimpleNamespace(text=text, recipe=SimpleNamespace(elicit=steps))
        for text, steps in (("common", None), ("own", ["answer"]))
    ]
    made.runs = [(name, seed, run) for seed in (1, 2) for name, run in zip("ab", runs, strict=True)]
    assert made.questions.text == "the common text" and made.questions.others == ["own"]


def test_what_cannot_be_compared_is_refused(methods, tmp_path, recipe_data):
    common, made = methods
    with pytest.raises(UserError, match="at least two"):
        entries(made[:1], common)
    with pytest.raises(UserError, match="stands twice"):
        entries([made[0], made[0]], common)
    with pytest.raises(UserError, match="is none of the recipes"):
        limbeck.compare(made, tmp_path / "a", like=common, base="dpo")
    with pytest.raises(UserError, match="at least one, each once"):
        limbeck.compare(made, tmp_path / "a", like=common, seeds=[3, 3])
    refused = CliRunner().invoke(app, ["compare", "seq-kd", "forward-kl", "--set", "train.steps=3"])
    assert isinstance(refused.exception, UserError) and "--like" in str(refused.exception)
    corpus = parse(recipe_data | {"name": "gold", "writer": [{"by": "corpus"}]})
    with pytest.raises(UserError, match="whether a corpus writes"):
        entries([made[0], corpus], common)
    assert not (tmp_path / "a").exists()


def test_a_judge_is_left_out_of_a_comparison(methods, recipe_data):
    common, made = methods
    recipe_data["evaluate"]["judge"] = "./nowhere"
    with_judge = parse(recipe_data)
    assert with_judge.hash != common.hash and _common([with_judge], None).hash == _common([common], None).hash
    judged = [recipe.model_copy(update={"evaluate": with_judge.evaluate}) for recipe in made]
    found = entries(judged, with_judge)
    assert [entry.recipe.hash for entry in found] == [entry.recipe.hash for entry in entries(made, common)]
    for entry in found:
        limbeck.check(entry.recipe)


def test_recipes_that_would_be_one_training_are_refused(methods, data):
    """They differ in settings that all methods take from the common recipe, so the page would tell of nothing."""
    common, made = methods
    high, low = (
        parse(data | {"name": name, "train": data["train"] | {"lr": lr}}) for name, lr in (("high", 0.5), ("low", 0.1))
    )
    with pytest.raises(UserError, match=r"high and low differ in nothing but .*: to compare settings, run each recipe"):
        entries([made[0], high, low], common)
    (name,) = (name for loss in data["loss"] for name in ([loss] if isinstance(loss, str) else loss))
    written = parse(data | {"name": "written", "loss": [{name: {"temperature": 1.0, "weight": 1}}]})
    with pytest.raises(UserError, match=r"high and written differ in nothing"):
        entries([high, written], common)
    assert [entry.name for entry in entries([made[0], high], common)] == ["seq-kd", "high"]
    assert replaced_settings(high, low) == ["high: train.lr 0.5 is not used, 0.1 of low is"]
    lora = parse(data | {"name": "lora", "student": data["student"] | {"lora": {"rank": 4}}})
    assert "lora: student.lora.rank 4 is not used" in replaced_settings(lora, common)
    assert not replaced_settings(common, common)


def test_a_folder_of_another_comparison_is_refused(methods, compared):
    common, made = methods
    before = (compared / "comparison.json").read_bytes()
    with pytest.raises(UserError, match="another comparison"):
        limbeck.compare(made[:2], compared, like=common, seeds=2)
    assert (compared / "comparison.json").read_bytes() == before


@pytest.mark.long
def test_the_command(methods, compared, tmp_path):
    from tests.runs.test_pipeline import command

    files = []
    for recipe in (*methods[1], methods[0]):
        files.append(tmp_path / f"{recipe.name}.yaml")
        files[-1].write_text(yaml.safe_dump(recipe.resolved()))
    done = command("compare", *files[:3], "--like", files[3], "--seeds", 2, "--out", compared, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert result["report"].endswith("report.html") and "seq-kd" in result["verdict"]
