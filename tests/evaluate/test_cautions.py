"""What figures rest on, and the sentences that follow: few items, one seed, few steps, a task that was cut."""

from __future__ import annotations

import pytest

from limbeck.config.recipe import load_recipe, parse
from limbeck.config.significance import CLEAR_ITEMS, LEAST_ITEMS, LEAST_STEPS
from limbeck.evaluate.cautions import basis, task_facts
from limbeck.evaluate.tasks import load_task, tasks_of
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError


def said(tasks=(), **changes):
    facts = {"held_out": 60, "seeds": [1, 2, 3], "steps": 400} | changes
    return " ".join(basis(tasks, **facts)["cautions"])


def test_enough_of_everything_needs_no_caution():
    assert said([load_task("everyday")]) == ""
    assert basis([load_task("topics")], held_out=60, seeds=[7], steps=None) | {"cautions": []} == {
        "items": {"held_out": 60, "topics": 48}, "seeds": [7], "cautions": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [7]}, "this one training run"),
        ({"steps": 6}, "6 steps"),
        ({"steps": 1}, "1 step:"),
        ({"held_out": CLEAR_ITEMS - 1}, "held-out: 29"),
        ({"tasks": [load_task("lookup")]}, "lookup: 18"),
        ({"tasks": [load_task("everyday", 60)]}, "everyday was measured on 60 of its 72 items"),
    ],
)
def test_what_is_too_little_is_said_with_its_number(changes, words):
    assert words in said(**changes)


def test_the_thresholds_are_where_they_say():
    assert said(held_out=CLEAR_ITEMS, steps=LEAST_STEPS, seeds=[1, 2]) == ""
    assert LEAST_ITEMS < CLEAR_ITEMS == 30


def test_a_task_is_whole_unless_its_own_entry_limits_it(recipe_data):
    recipe = parse({**recipe_data, "evaluate": {"metrics": ["fidelity", "topics"], "limit": 3}})
    (task,) = resolve(recipe).tasks
    assert len(task.items) == task.available == 48 and len(resolve(recipe).held_out_prompts) <= 3
    assert {"items": 48, "of": 48}.items() <= task_facts(task).items()
    entries = ["fidelity", {"topics": {"limit": 5}}, {"topics@typos": {"limit": 2}}, "choices"]
    limited = parse({**recipe_data, "evaluate": {"metrics": entries, "limit": 3}})
    assert [len(task.items) for task in resolve(limited).tasks] == [5, 2, 48]
    assert limited.evaluate.metrics == ["fidelity", "topics", "topics@typos", "choices"]
    again = parse(limited.resolved())
    assert again == limited and again.hash == limited.hash != recipe.hash
    assert {"items": 5, "of": 48}.items() <= task_facts(resolve(limited).tasks[0]).items()


def test_a_list_of_metrics_takes_limits_and_set_replaces_them(recipe_data, tmp_path):
    short = parse({**recipe_data, "evaluate": ["fidelity", {"topics": {"limit": 5}}]})
    assert short.evaluate.limits == {"topics": 5}
    assert load_recipe("quickstart").evaluate.limits == {"everyday": 60}
    assert load_recipe("quickstart", ["evaluate.limits.everyday=10"]).evaluate.limits == {"everyday": 10}
    assert len(tasks_of(["fidelity", "topics"], None)[0].items) == 48
    assert "limits" not in load_recipe("grpo").resolved()["evaluate"]  # older hashes stay


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        ({"metrics": ["fidelity", {"topics": {"limit": 0}}]}, r"evaluate.metrics\[1\].topics.limit.*got 0"),
        ({"metrics": ["fidelity", {"topics": {"limit": True}}]}, "got True"),
        ({"metrics": ["fidelity", {"topics": {"most": 3}}]}, "a task with a limit is written"),
        ({"metrics": ["fidelity", {"topics": 3}]}, "a task with a limit is written"),
        ({"metrics": ["fidelity", {}]}, "a task with a limit is written"),
        ({"metrics": ["fidelity", {"topics": {"limit": 3}, "sums": {"limit": 3}}]}, "a task with a limit is written"),
        ({"metrics": [{"fidelity": {"limit": 3}}]}, "evaluate.limit bounds"),
        ({"metrics": ["fidelity"], "limits": {"topics": 3}}, "none of the tasks in metrics"),
        ({"metrics": ["fidelity", "topics"], "limits": {"fidelity": 3}}, "evaluate.limit bounds"),
        ({"metrics": ["fidelity", "topics"], "limits": 3}, "evaluate.limits"),
    ],
)
def test_a_limit_that_is_none_is_refused(evaluate, match, recipe_data):
    with pytest.raises(RecipeError, match=match):
        parse({**recipe_data, "evaluate": evaluate})
