"""Tasks asked in another way: only the question changes, and always in the same way."""

from __future__ import annotations

import random

import pytest

from limbeck.evaluate.perturb import PERTURBATIONS, perturbed
from limbeck.evaluate.records import ItemResult, SystemRecords
from limbeck.evaluate.summary import robustness
from limbeck.evaluate.tasks import load_task, tasks_of
from limbeck.types import RecipeError

QUESTION = 'Which planet, "Jupiter Major" or McDonald 4500x, is nearest?'


def test_what_must_stay_stays():
    for seed in range(50):
        found = PERTURBATIONS["typos"](QUESTION, random.Random(seed))
        assert '"Jupiter Major"' in found and "McDonald 4500x" in found and sorted(found) == sorted(QUESTION)
        for before, after in zip(QUESTION.split(), found.split(), strict=True):
            assert (before[0], before[-1], len(before)) == (after[0], after[-1], len(after))
    assert (
        PERTURBATIONS["lower_case"](QUESTION, random.Random(0))
        == 'which planet, "Jupiter Major" or McDonald 4500x, is nearest?'
    )
    assert PERTURBATIONS["distraction"](QUESTION, random.Random(0)).endswith(QUESTION)
    assert any(PERTURBATIONS["typos"](QUESTION, random.Random(seed)) != QUESTION for seed in range(9))


@pytest.mark.parametrize("name", ["everyday", "choices", "topics", "lookup"])
@pytest.mark.parametrize("how", PERTURBATIONS)
def test_only_the_question_changes(name, how):
    task = load_task(name)
    asked = perturbed(task, how)
    assert asked.name == f"{name}@{how}" and perturbed(task, how) == asked
    assert sum(a.text != b.text for a, b in zip(asked.items, task.items, strict=True)) > len(task.items) / 2
    for a, b in zip(asked.items, task.items, strict=True):
        assert a.id == f"{b.id}@{how}"
        for kept in ("choices", "answer", "check", "answers", "documents", "relevances", "kind"):
            assert getattr(a, kept, None) == getattr(b, kept, None)


def test_relative_drop_is_over_the_same_items():
    plain = load_task("choices", 4)
    asked = perturbed(plain, "typos")

    def system(before, after):
        scored = {task.name: [ItemResult(item.id, {"acc": float(value)}) for item, value in zip(task.items, values, strict=False)]
                  for task, values in ((plain, before), (asked, after))}  # fmt: skip
        return [SystemRecords("m", [], [], [], [], [], scored, {})]

    found = robustness(
        {
            "a": system([1, 1, 1, 1], [1, 0, 1, 1]),
            "b": system([0, 0, 0, 0], [1, 1, 0, 0]),
            "c": system([1, 1], [0, 1, 1, 1]),
        },
        [plain, asked],
    )
    drops = found["choices@typos/acc"]
    assert drops["a"]["value"] == pytest.approx(0.25) and drops["a"]["low"] <= 0.25 <= drops["a"]["high"]
    assert "b" not in drops, "nothing to drop from"
    assert drops["c"]["value"] == pytest.approx(0.5) and drops["c"]["n"] == 2


def test_recipes_name_them():
    assert [task.name for task in tasks_of(["fidelity", "everyday", "everyday@typos"])] == [
        "everyday",
        "everyday@typos",
    ]
    for metric, words in (
        ("everyday@tpyos", "did you mean 'typos'"),
        ("passages@typos", "asks no question"),
        ("everyday", "is given twice"),
    ):
        with pytest.raises(RecipeError, match=words):
            tasks_of(["fidelity", "everyday", metric])
    with pytest.raises(RecipeError, match="fidelity is always measured"):
        tasks_of(["everyday"])
