"""Figures per label and per field, against their definitions, and the share of the teacher's score."""

from __future__ import annotations

import json

import numpy as np
import pytest

from limbeck.evaluate.by_label import OTHER, by_field, by_label, label_figures, labels_of, said_label, write_questions
from limbeck.evaluate.choice import macro_f1
from limbeck.evaluate.records import ItemResult, SystemRecords
from limbeck.evaluate.summary import summarise
from limbeck.evaluate.tasks import load_task
from limbeck.evaluate.worth import kept
from limbeck.storage.files import read_jsonl


def records(name, task, results):
    return SystemRecords(name=name, fidelity=[], own=[], own_text=[], free=[], answers=[], tasks={task: results}, efficiency={})  # fmt: skip


def task_of(folder, items, **more):
    folder.mkdir(exist_ok=True)
    data = {"name": "mine", "version": "1", "description": "d", "test": "test.jsonl", **more}
    (folder / "task.yaml").write_text(json.dumps(data))
    (folder / "test.jsonl").write_text("".join(json.dumps({"id": n, **item}) + "\n" for n, item in enumerate(items)))
    return load_task(str(folder))


def test_figures_of_a_label_are_those_of_its_definition():
    truth = np.array([0, 0, 0, 1, 1, 2])
    chosen = np.array([0, 0, 1, 1, 3, 2])  # 3 is none of the labels
    figures = label_figures(truth, chosen, ["a", "b", "c"])
    a, b, c = figures["by_label"]
    assert (a["precision"]["value"], a["recall"]["value"], a["f1"]["value"]) == (
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(0.8),
    )
    assert (b["precision"]["value"], b["recall"]["value"], b["items"], b["chosen"]) == (0.5, 0.5, 2, 2)
    assert c["f1"]["value"] == 1.0 and figures["macro_f1"]["value"] == pytest.approx((0.8 + 0.5 + 1) / 3)
    assert figures["confusions"] == [[0, 0, 2], [0, 1, 1], [1, 1, 1], [1, 3, 1], [2, 2, 1]]
    assert a["recall"]["low"] <= 2 / 3 <= a["recall"]["high"] and a["recall"]["n"] == 3


def test_a_label_that_is_never_said_has_no_precision_and_one_that_is_nowhere_no_f1():
    figures = label_figures(np.array([0, 0]), np.array([1, 1]), ["a", "b", "c"])
    a, b, c = figures["by_label"]
    assert a["precision"] is None and a["recall"]["value"] == 0 and b["recall"] is None and c["f1"] is None
    assert figures["macro_f1"]["value"] == 0.0


def test_what_is_always_right_or_always_wrong_has_a_width():
    """Twenty of twenty right is no proof of all: by chance alone a share of 0.83 gives as many."""
    figures = label_figures(np.array([0] * 20 + [1] * 5), np.array([0] * 20 + [2] * 5), ["a", "b"])
    a, b = figures["by_label"]
    for name in ("precision", "recall", "f1"):
        assert (a[name]["value"], a[name]["high"]) == (1, 1) and a[name]["low"] == pytest.approx(0.025 ** (1 / 20))
    assert (b["recall"]["value"], b["recall"]["low"]) == (0, 0)
    assert b["recall"]["high"] == pytest.approx(1 - 0.025 ** (1 / 5)) == b["f1"]["high"]
    assert label_figures(np.array([0, 1] * 10), np.array([0, 1] * 10), ["a", "b"])["macro_f1"]["low"] < 0.84


def test_a_task_that_is_always_right_has_a_width_in_the_summary(tmp_path):
    task = task_of(tmp_path / "t", [{"prompt": "p", "check": {"type": "exact", "answer": "x"}}] * 20)
    scores = [ItemResult(f"mine/{n}", {"pass_rate": 1.0, "tokens": 1.0}, text="x") for n in range(20)]
    found = summarise({name: [records(name, "mine", scores)] for name in ("teacher", "student")}, [task], [])
    passed, tokens = (found["systems"]["student"][f"mine/{name}"] for name in ("pass_rate", "tokens"))
    assert passed == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 20)), "high": 1.0, "n": 20}
    assert tokens["low"] == tokens["high"] == 1, "a length is no share"


def test_macro_f1_is_the_tasks_own_to_the_bit():
    rng = np.random.default_rng(3)
    truth, chosen = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    assert label_figures(truth, chosen, list("abcdefg"))["macro_f1"] == macro_f1(truth, chosen, 7).as_dict()


def test_labels_of_a_task_are_its_own_or_those_of_its_checks(tmp_path):
    choice = [{"prompt": "p", "check": {"type": "choice", "labels": ["yes", "no"], "answer": a}} for a in ("yes", "no")]
    assert labels_of(task_of(tmp_path / "a", choice)) == ["yes", "no"]
    exact = [{"prompt": "p", "check": {"type": "exact", "answer": a}} for a in ("x", "y", "x", "y")]
    assert labels_of(task_of(tmp_path / "b", exact)) == ["x", "y"]
    answers = [{"prompt": "p", "check": {"type": "exact", "answer": str(n)}} for n in range(5)]
    assert labels_of(task_of(tmp_path / "c", answers)) == []
    mixed = [choice[0], {"prompt": "p", "check": {"type": "exact", "answer": "x"}}, {"prompt": "no check"}]
    assert labels_of(task_of(tmp_path / "d", mixed)) == []
    sampled = {"settings": {"temperature": 1.0, "samples": 2}}
    assert labels_of(task_of(tmp_path / "e", choice, **sampled)) == []
    assert labels_of(load_task("topics"))[:2] == ["food", "health"] and labels_of(load_task("choices")) == []


@pytest.mark.parametrize(
    ("check", "text", "label"),
    [
        ({"type": "choice", "answer": "yes"}, "The answer is no.", "no"),
        ({"type": "choice", "answer": "yes"}, "yes or no", OTHER),
        ({"type": "choice", "answer": "yes"}, "<think>no, no</think>yes", "yes"),
        ({"type": "choice", "answer": "yes"}, "<think>yes", OTHER),
        ({"type": "choice", "answer": "yes"}, "", OTHER),
        ({"type": "exact", "answer": "yes"}, "Yes.", "yes"),
        ({"type": "exact", "answer": "yes"}, "NO", "no"),
        ({"type": "exact", "answer": "yes"}, "yes, surely", OTHER),
    ],
)
def test_what_an_answer_says_is_read_as_its_check_reads_it(check, text, label):
    assert said_label({**check, "labels": ["yes", "no"]}, text, ["yes", "no"]) == label


def test_written_labels_are_counted_and_others_are_none(tmp_path):
    items = [{"prompt": "p", "check": {"type": "choice", "labels": ["yes", "no"], "answer": a}} for a in ("yes", "no")]
    task = task_of(tmp_path / "t", items)
    said = [ItemResult(f"mine/{n}", {"pass_rate": 0.0}, text=text) for n, text in enumerate(("no", "what?"))]
    found = by_label(
        {"student": [records("student", "mine", said)], "teacher": [records("teacher", "mine", [])]}, [task]
    )
    assert found["mine"]["labels"] == ["yes", "no", OTHER] and set(found["mine"]["systems"]) == {"student"}
    assert found["mine"]["systems"]["student"]["confusions"] == [[0, 1, 1], [1, 2, 1]]


def test_labels_and_fields_are_read_after_the_words_that_end_the_thinking(tmp_path):
    thinking = {"settings": {"thinking": {"most": 64, "cue": "Answer:"}}}
    check = {"type": "choice", "labels": ["cat", "dog"], "answer": "cat"}
    pets = task_of(tmp_path / "a", [{"prompt": "p", "check": check}], **thinking)
    said = [ItemResult("mine/0", {"pass_rate": 1.0}, text="It purrs, so it is no dog. Answer: cat")]
    found = by_label({"student": [records("student", "mine", said)]}, [pets])["mine"]["systems"]["student"]
    assert found["confusions"] == [[0, 0, 1]]
    forms = task_of(
        tmp_path / "b", [{"prompt": "p", "check": {"type": "json", "equals": {"city": "Rome"}}}], **thinking
    )
    said = [ItemResult("mine/0", {"pass_rate": 1.0}, text='Not {"city": "Oslo"}. Answer: {"city": "Rome"}')]
    found = by_field({"student": [records("student", "mine", said)]}, [forms])["mine"]
    assert found["city"]["student"]["value"] == 1


def test_fields_are_exact_or_not(tmp_path):
    equals = [{"city": "Rome", "year": 1990}, {"city": "Oslo"}, {"city": "Bonn"}]
    task = task_of(tmp_path / "t", [{"prompt": "p", "check": {"type": "json", "equals": one}} for one in equals])
    texts = ['{"city": "Rome", "year": 1991}', 'Here: {"city": "Oslo", "more": 1}', "Bonn"]
    results = [ItemResult(f"mine/{n}", {"pass_rate": 0.0}, text=text) for n, text in enumerate(texts)]
    found = by_field({"student": [records("student", "mine", results)]}, [task])["mine"]
    assert found["city"]["student"]["value"] == pytest.approx(2 / 3) and found["city"]["student"]["n"] == 3
    assert found["year"]["student"] == {"value": 0.0, "low": 0.0, "high": 0.975, "n": 1}


def test_questions_keep_the_text_and_the_right_answer(tmp_path):
    items = [{"prompt": "p1", "check": {"type": "exact", "answer": "x"}}, {"prompt": "p2"}]
    write_questions(tmp_path, [task_of(tmp_path / "t", items), load_task("topics", 1), load_task("lookup", 1)])
    lines = read_jsonl(tmp_path / "questions.jsonl")
    assert lines[0] == {"task": "mine", "item": "mine/0", "text": "p1", "answer": "x"} and "answer" not in lines[1]
    assert lines[2]["answer"] == "food" and "answer" not in lines[3] and len(lines) == 4


def test_the_share_of_the_teachers_score_is_over_the_same_items(tmp_path):
    task = task_of(tmp_path / "t", [{"prompt": "p", "check": {"type": "exact", "answer": "x"}}] * 40)

    def of(name, rights, first=0):
        scores = [ItemResult(f"mine/{n}", {"pass_rate": float(n < rights)}, text="") for n in range(first, 40)]
        return records(name, "mine", scores)

    share = kept(of("student", 24), of("teacher", 32), [task])["mine/pass_rate"]
    assert share["value"] == 0.75 and share["low"] < 0.75 < share["high"] <= 1 and share["n"] == 40
    assert kept(of("student", 30), of("teacher", 40, first=20), [task])["mine/pass_rate"]["value"] == 0.5
    assert kept(of("student", 9), of("teacher", 0), [task]) == {"mine/pass_rate": None}
    assert kept(of("student", 9), records("teacher", "mine", []), [task]) == {}
