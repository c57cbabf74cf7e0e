"""A run's evaluation on a tiny model: controls, leaks, resuming; and summaries of made-up records against hand-worked figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.choice import CLASSIFICATION, MULTIPLE_CHOICE
from limbeck.evaluate.items import ChoiceSettings, LabelSettings
from limbeck.evaluate.records import ItemFidelity, ItemResult, SystemRecords
from limbeck.evaluate.statistics import holm, mcnemar
from limbeck.evaluate.summary import by_kind, columns, recovery, summarise, values_by_seed, warnings
from limbeck.evaluate.task import Task
from limbeck.models.model import Model
from limbeck.progress import StoppedError
from limbeck.storage.files import read_jsonl
from limbeck.types import RecipeError, UserError

NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "nll",
    "teacher_nll",
    "entropy",
    "top1",
    "top5",
    "wrong",
    "same_wrong",
)


def item(name, tokens, nats, **sums):
    known = dict.fromkeys(NAMES, 1.0) | {"forward_kl": nats} | sums
    return ItemFidelity(
        name,
        tokens,
        known,
        {"8": (nats, tokens)},
        {"number": (nats, tokens)},
        Reliability.of([0.5] * tokens, [1] * tokens),
    )


def measured(name, nats, own=(), **sums):
    """A system with these nats on answers a, b, c ... of 2, 4, 6 ... tokens, and its own texts (text, finished)."""
    given = [item(chr(97 + place), 2 * place + 2, value, **sums) for place, value in enumerate(nats)]
    texts = [
        {"tokens": 5, "text": text, "finished": ended, "repetition": None if len(text) < 5 else 0.5}
        for text, ended in own
    ]
    return SystemRecords(
        name, given, [item(chr(97 + n), 5, 1.0) for n in range(len(texts))], texts, [], [], {}, {"layers": 2}
    )


def test_values_are_sums_over_items_by_sums_of_tokens_and_pool_the_seeds():
    seeds = [measured("m-s1", [1.0, 2.0, 3.0], nll=2.0), measured("m-s2", [2.0, 4.0, 6.0], nll=4.0)]
    found = summarise(
        {"teacher": [measured("teacher", [0, 0, 0])], "m": seeds, "base": [measured("base", [3.0, 6.0, 9.0])]},
        [],
        [("m", "base")],
    )
    m = found["systems"]["m"]
    assert m["forward_kl"]["value"] == pytest.approx((6 + 12) / (12 + 12)) and m["forward_kl"]["n"] == 3
    assert m["perplexity"]["value"] == pytest.approx(math.exp((6 + 12) / 24)) and "nll" not in m
    assert m["agree_when_wrong"]["value"] == 1
    assert m["ece"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "n": 3})
    assert found["paired"]["m - base"]["forward_kl"]["value"] == pytest.approx(18 / 24 - 18 / 12)
    assert {"title", "unit", "better", "group"} == set(found["metrics"]["forward_kl"]) and set(m) <= set(
        found["metrics"]
    )
    assert values_by_seed([1, 2], seeds, []) == {
        "1": pytest.approx(values_by_seed([1], seeds[:1], [])["1"]),
        "2": pytest.approx(values_by_seed([2], seeds[1:], [])["2"]),
    }
    assert values_by_seed([1, 2], seeds, [])["2"]["forward_kl"] == pytest.approx(1.0)


def test_differences_are_of_the_items_that_both_have():
    short = measured("b", [1.0, 1.0])
    found = summarise({"a": [measured("a", [1.0, 3.0, 100.0])], "b": [short]}, [], [("a", "b")])
    facts = found["paired"]["a - b"]["forward_kl"]
    assert facts["value"] == pytest.approx((4 - 2) / 6) and facts["n"] == 2


def test_an_item_without_a_figure_under_one_seed_counts_under_the_others():
    first, second, third = (
        measured("s1", [1.0], own=[("a text of words", True), ("x", True)]),
        measured("s2", [1.0], own=[("x", True), ("a text of words", True)]),
        measured("s3", [1.0], own=[("x", True), ("x", True)]),
    )
    found = summarise({"m": [first, second], "some": [first, third]}, [], [("m", "m")])
    assert found["systems"]["m"]["own_repetition"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    assert found["paired"]["m - m"]["own_repetition"]["value"] == 0
    assert "own_repetition" not in found["systems"]["some"] and "own_finished" in found["systems"]["some"]


def test_few_items_prove_nothing():
    few = summarise({"a": [measured("a", [1.0] * 9)], "b": [measured("b", [2.0] * 9)]}, [], [("a", "b")])["paired"][
        "a - b"
    ]["forward_kl"]
    many = summarise({"a": [measured("a", [1.0] * 10)], "b": [measured("b", [2.0] * 10)]}, [], [("a", "b")])["paired"][
        "a - b"
    ]["forward_kl"]
    assert few["p"] == 1 and many["p"] < 0.01


QUIZ = Task("quiz", "1", "", MULTIPLE_CHOICE, ("acc", "probability"), ChoiceSettings(), ())


def quizzed(name, right, weight=1.0):
    """A system with these scores on the items of a task."""
    weights = {} if weight == 1 else {"acc": weight}
    scored = [
        ItemResult(f"q{n}", {"acc": float(score), "probability": 0.5 + score / 4}, weights)
        for n, score in enumerate(right)
    ]
    return replace(measured(name, [1.0] * 12), tasks={"quiz": scored})


def test_right_and_wrong_answers_of_two_trainings_are_told_apart_by_mcnemar():
    ours, theirs = [1] * 7 + [0] + [1] * 4, [0] * 7 + [1] + [1] * 4
    paired = summarise({"a": [quizzed("a", ours)], "b": [quizzed("b", theirs)]}, [QUIZ], [("a", "b")])["paired"][
        "a - b"
    ]
    acc, other = paired["quiz/acc"], paired["quiz/probability"]
    assert acc["p"] == mcnemar(ours, theirs).p == pytest.approx(2 * (1 + 8) / 2**8) and acc["test"] == "mcnemar"
    assert set(other) == set(paired["forward_kl"]) == {"value", "low", "high", "n", "p"} and other["p"] != acc["p"]
    assert acc["value"] == pytest.approx(0.5)
    assert (acc["low"], acc["high"]) == pytest.approx((4 * other["low"], 4 * other["high"])), (
        "the interval stays the bootstrap's"
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([quizzed("a", [1] * 9)], [quizzed("b", [0] * 9)]),
        ([quizzed("a", [1] * 11 + [0.5])], [quizzed("b", [0] * 12)]),
        ([quizzed("a", [1] * 12, 2.0)], [quizzed("b", [0] * 12, 2.0)]),
        ([quizzed("a", [1] * 12)] * 2, [quizzed("b", [0] * 12)] * 2),
        ([quizzed("a", [1] * 12)] * 2, [quizzed("b", [0] * 12)]),
    ],
    ids=["few items", "a share", "weights", "seeds", "seeds against one"],
)
def test_the_bootstrap_tests_what_mcnemar_cannot(a, b):
    acc = summarise({"a": a, "b": b}, [QUIZ], [("a", "b")])["paired"]["a - b"]["quiz/acc"]
    assert set(acc) == {"value", "low", "high", "n", "p"}
    assert acc["p"] == (1 if acc["n"] < 10 else pytest.approx(2 / 2001))


MOODS = Task("moods", "1", "", CLASSIFICATION, ("macro_f1", "acc"), LabelSettings(labels=("a", "b")), ())


def labelled(name, wrong):
    """A system that is wrong on the first items of a classification."""
    said = [
        ItemResult(f"m{n}", {"acc": float(n >= wrong)}, facts={"answer": n % 2, "chosen": (n + (n < wrong)) % 2})
        for n in range(40)
    ]
    return replace(measured(name, [1.0] * 40), tasks={"moods": said})


def test_a_tasks_own_figure_is_the_mean_over_seeds():
    trainings = [labelled(f"m-s{wrong}", wrong) for wrong in (2, 20, 8)]
    of = {len(seeds): summarise({"m": seeds}, [MOODS], [])["systems"]["m"] for seeds in (trainings, trainings[:1])}
    each = [summarise({"m": [one]}, [MOODS], [])["systems"]["m"]["moods/macro_f1"] for one in trainings]
    assert of[1]["moods/macro_f1"] == each[0]
    whole = of[3]["moods/macro_f1"]
    assert whole["value"] == pytest.approx(sum(one["value"] for one in each) / 3) and whole["n"] == 40
    assert whole["low"] < min(one["value"] for one in each) and whole["high"] > max(one["value"] for one in each)
    same = summarise({"m": [trainings[0]] * 2}, [MOODS], [])["systems"]["m"]["moods/macro_f1"]
    assert same == pytest.approx(each[0])


def test_many_comparisons_can_still_tell():
    """The smallest p value of 2,000 resamples times 51 is above 0.05."""
    ours, theirs = [measured("a", [1.0] * 20)], [measured("b", [2.0] * 20)]
    systems = {"base": theirs} | {f"m{n}": ours for n in range(51)}
    paired = summarise(systems, [], [(f"m{n}", "base") for n in range(51)])["paired"]
    p = {pair: differences["forward_kl"]["p"] for pair, differences in paired.items()}
    assert len(p) == 51 and max(holm(p).values()) <= 0.01


def test_what_was_recovered():
    teacher, untouched, student = (
        [measured(name, nats)] for name, nats in (("t", [0, 0, 0]), ("u", [4.0, 4.0, 4.0]), ("s", [1.0, 1.0, 1.0]))
    )
    found = recovery(student, untouched, teacher, [])
    assert found["forward_kl"]["value"] == pytest.approx(0.75)
    assert found["reverse_kl"] is None, "teacher and untouched are equal there: nothing to recover"
    assert "entropy" not in found, "neither side of it is better"


def test_own_text_without_a_figure_counts_for_nothing():
    found = columns(measured("m", [1.0], own=[("word", True), ("some longer text", False)]), [])
    assert found["own_repetition"].ids == ("b",) and found["own_finished"].values.tolist() == [1.0, 0.0]
    assert "own_tokens" not in columns(measured("m", [1.0]), []), "no own text: no figure, not a zero"


def test_kinds_and_warnings():
    systems = {
        "teacher": [measured("teacher", [0, 0], own=[("x", True)])],
        "student": [measured("s", [2.0, 8.0], own=[("y", False)])],
    }
    found = by_kind(systems, {"a": "fact", "b": "sum"}, [])
    assert found["fact"]["student"]["forward_kl"]["value"] == 1 and found["sum"]["student"]["forward_kl"]["value"] == 2
    assert by_kind(systems, {"a": "fact", "b": "fact"}, []) == {}, "one kind is no table"
    told = warnings(systems, summarise(systems, [], []), ["student"])
    assert any("Only 2 held-out answers" in text for text in told) and any("ends 0%" in text for text in told)


@pytest.fixture
def leaky(recipe_data, prompt_file):
    """A held-out prompt of 13 words and a task item stand in the training prompts, dressed up."""
    held_out = "why does the old red house on the hill look blue when rain falls"
    with Path(recipe_data["evaluate"]["prompts"]).open("a") as file:
        file.write(json.dumps({"id": "planted", "prompt": held_out}) + "\n")
    with prompt_file.open("a") as file:
        file.write(json.dumps({"id": "thief", "prompt": f"Tell me: {held_out.upper()}?!"}) + "\n")
    return parse(recipe_data)


def test_a_planted_leak_is_named_on_the_page_and_in_no_figure(leaky, tmp_path):
    limbeck.run(leaky, tmp_path / "out")
    folder = tmp_path / "out" / "evaluation"
    summary = json.loads((folder / "summary.json").read_text())
    (leak,) = [leak for leak in summary["leaks"] if leak["item"] == "planted"]
    assert leak["training"] == "thief" and leak["kind"] in ("contained", "overlap")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "planted" in page and "thief" in page
    for file in folder.glob("*.jsonl"):
        assert all(record.get("prompt_id") != "planted" for record in read_jsonl(file)), file
    assert summary["held_out"]["answers"] == summary["systems"]["student"]["forward_kl"]["n"] == 2


def test_an_exact_copy_is_refused_before_anything_is_spent(recipe_data, prompt_file):
    with prompt_file.open("a") as file:
        file.write('{"prompt": "count one two"}\n')
    with pytest.raises(RecipeError, match="training prompts too"):
        limbeck.check(parse(recipe_data))


def test_controls_on_gold_and_on_shuffled_answers(recipe_data, prompt_file, tmp_path):
    lines = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    prompt_file.write_text("".join(json.dumps(line | {"answer": "one two three"}) + "\n" for line in lines))
    recipe_data["evaluate"]["controls"] = ["untouched", "sft_control", "gold_control", "shuffled_control"]
    limbeck.run(parse(recipe_data), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
    assert list(summary["systems"]) == [
        "teacher",
        "untouched",
        "sft_control",
        "gold_control",
        "shuffled_control",
        "student",
    ]
    assert len({system["forward_kl"]["value"] for system in summary["systems"].values()}) == 6
    steps = {name: len(read_jsonl(tmp_path / "out" / place / "metrics.jsonl")) for name, place in
             (("student", "."), ("gold", "controls/gold_control"), ("shuffled", "controls/shuffled_control"))}  # fmt: skip
    assert set(steps.values()) == {6}


def test_gold_is_refused_where_there_is_none(recipe_data):
    recipe_data["evaluate"]["controls"] = ["gold_control"]
    with pytest.raises(RecipeError, match="gold_control"):
        limbeck.check(parse(recipe_data))


def test_a_stopped_evaluation_goes_on_and_loads_only_what_is_left(recipe_data, tmp_path, monkeypatch):
    recipe, out = parse(recipe_data), tmp_path / "out"
    limbeck.run(recipe, out, stages=("elicit", "train"))
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 25

    with pytest.raises(StoppedError):
        limbeck.run(recipe, out, stop=stop, stages=("evaluate",))
    done = {file: file.stat().st_mtime_ns for file in (out / "evaluation").glob("*-*.jsonl")}
    assert done and not (out / "evaluation" / "summary.json").exists()
    limbeck.run(recipe, out, stages=("evaluate",))
    assert {file: file.stat().st_mtime_ns for file in done} == done
    (out / "evaluation" / "summary.json").unlink()
    monkeypatch.setattr("limbeck.evaluate.measure.answer_all", lambda *_: pytest.fail("answered again"))
    monkeypatch.setattr("limbeck.runs.run.load_model", lambda *_: pytest.fail("loaded again"))
    limbeck.run(recipe, out, stages=("evaluate",))


def test_records_of_other_questions_are_not_taken_for_these(recipe_data, tmp_path):
    folder, out = tmp_path / "mytask", tmp_path / "out"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "{name: mytask, version: 1, kind: multiple_choice, description: mine, test: test.jsonl}"
    )
    (folder / "test.jsonl").write_text('{"question": "the cat?", "choices": ["sat", "ran"], "answer": 0}\n')
    recipe_data["evaluate"]["metrics"] = ["fidelity", str(folder)]
    limbeck.run(parse(recipe_data), out)
    (out / "evaluation" / "summary.json").unlink()
    (folder / "test.jsonl").write_text('{"question": "the cat?", "choices": ["sat", "ran"], "answer": 1}\n')
    others = {file: file.stat().st_mtime_ns for file in (out / "evaluation").glob("fidelity-*.jsonl")}
    wrong = (out / "evaluation" / "task-mytask+student.jsonl").read_text()
    limbeck.run(parse(recipe_data), out)
    assert (out / "evaluation" / "task-mytask+student.jsonl").read_text() != wrong
    assert {file: file.stat().st_mtime_ns for file in others} == others, "what the change does not touch is kept"


def test_own_text_is_trained_on_by_nobody_and_measured_in_its_own_ids(recipe_data, tmp_path, monkeypatch):
    recipe_data["evaluate"]["own_prompts"] = 1
    monkeypatch.setattr(Model, "decode", lambda self, ids: " ".join(map(str, ids)))
    limbeck.run(parse(recipe_data), tmp_path / "out")
    (record,) = read_jsonl(tmp_path / "out" / "evaluation" / "own-student.jsonl")
    assert record["tokens"] == len(record["text"].split()) <= 12 and record["prompt_id"] == "h1"


def test_a_run_without_any_held_out_answer_is_told(recipe_data, prompt_file, tmp_path):
    texts = [
        "why is the red cat on the mat and why is the sky blue today",
        "count one two three four five six seven eight nine ten eleven twelve",
    ]
    with Path(recipe_data["evaluate"]["prompts"]).open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in texts)
    with prompt_file.open("a") as file:
        file.writelines(json.dumps({"prompt": text.upper()}) + "\n" for text in texts)
    with pytest.raises(UserError, match="held-out"):
        limbeck.run(parse(recipe_data), tmp_path / "out")
