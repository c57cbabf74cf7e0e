"""A named model judges the student's answers in the loop: what its verdicts are worth, whom they are asked of, once."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.config.sections import Advantage, RewardEntry
from limbeck.elicit.flow import Reader
from limbeck.elicit.prompt import Prompt
from limbeck.progress import StoppedError
from limbeck.training import distributed
from limbeck.training.rewards import Judged, rewards_of
from limbeck.types import RecipeError, UserError
from tests.flow_driver import drive
from tests.scripted_server import Scripted, answer
from tests.training.test_rewards import ROLLOUT, STUDENT, recipe, source
from tests.training.test_rollout import records


def said(text, prompt="why", finished=True):
    return Judged(Prompt(prompt, prompt), text, (1, 2), finished, max_tokens=10)


def scored(params, groups, reply=None, score=None, reader=Reader(), **settings):  # noqa: B008 (frozen)
    """What a judge that is played says of groups of answers, and what it was asked."""
    rewards = rewards_of([RewardEntry(name="judge", params=params, **settings)], Advantage(scale="none"), [], 10)
    asked = []

    def judge(step, pool):
        judged, _, requests = drive(step, pool, reply, score, reader=reader)
        asked.extend(requests)
        return judged

    rewards = replace(rewards, judge=judge)
    return rewards, rewards.score(groups), asked


def shown(request):
    return re.findall(r"Answer(?: \w)?:\n\| ([^\n]*)", request.messages[-1]["content"])


def test_a_rating_is_its_place_on_the_scale():
    ratings = {"good": "RATING: 5", "fair": "RATING: 2", "bad": "RATING: 1"}
    params = {"rate": {"by": "judge", "together": False}}
    groups = [[said("good"), said("<think>hm</think>fair")], [said("bad", "who"), said("good", "who")]]
    _, found, asked = scored(params, groups, lambda request, _: ratings[shown(request)[0]], weight=2.0)
    assert found.total == [[2.0, 0.5], [0.0, 2.0]] and found.parts == {"judge": 0.5625} and not found.why
    assert {request.model for request in asked} == {"judge@1"} and len(asked) == 4


def test_a_judge_waits_for_no_other_rank(monkeypatch):
    """One rank judges for all, which wait for it outside of collectives (`distributed.from_first`)."""

    def collective(*_):
        raise AssertionError("the other ranks are not here")

    for name in ("gather", "wait", "from_first"):
        monkeypatch.setattr(distributed, name, collective)
    test_a_rating_is_its_place_on_the_scale()


def test_an_expected_rating_needs_no_words():
    chances = {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.25, "5": 0.15}
    params = {"rate": {"by": "judge", "expected": True}}
    _, found, asked = scored(params, [[said("a")]], score=lambda question: math.log(chances[question.answer]))
    mean = sum(int(digit) * chance for digit, chance in chances.items())
    assert found.total[0][0] == pytest.approx((mean - 1) / 4) and not asked


def test_criteria_and_comparisons_are_rewards_too():
    params = {"rubric": {"by": "judge", "criteria": ["Has an x.", "Has a y."]}}
    reply = lambda request, _: (  # noqa: E731
        "yes" if request.messages[-1]["content"].split("| Has a")[1].split(".")[0][-1] in shown(request)[0] else "no"
    )
    assert scored(params, [[said("xy"), said("x"), said("z")]], reply)[1].total == [[1.0, 0.5, 0.0]]

    def longer(request, _):
        one, two = shown(request)
        return f"VERDICT: {'A' if len(one) > len(two) else 'B' if len(two) > len(one) else 'TIE'}"

    _, found, asked = scored({"compare": {"by": "judge"}}, [[said("aa"), said("a"), said("aa")]], longer)
    assert found.total == [[0.75, 0.0, 0.75]] and len(asked) == 6


def test_what_cannot_be_read_is_no_reward_and_is_counted_by_its_kind():
    """Such an answer has no advantage and stands in no mean of its group. One that says nothing is worth nothing."""
    replies = {"good": "RATING: 5", "bad": "RATING: 1", "odd": "very good", "cut": ("RATING: 5", "length")}
    params = {"rate": {"by": "judge", "together": False, "retries": 0}}
    group = [said(text) for text in ("good", "odd", "bad", "cut", "", "<think>no end")]
    rewards, found, asked = scored(params, [group], lambda request, _: replies[shown(request)[0]])
    assert found.total == [[1.0, None, 0.0, None, 0.0, 0.0]] and found.unread == 2 and len(asked) == 4
    assert found.facts["judge_unreadable"] == 2 and found.facts["judge_no_answer"] == 2
    worst = scored(params, [group[-2:] + group[:1]], lambda request, _: replies[shown(request)[0]], weight=-1.0)[1]
    assert worst.total == [[-1.0, -1.0, -1.0]], "as a penalty it is the largest"
    assert found.facts["reward"] == 0.25 and found.facts["unread_rewards"] == 2
    (advantage,) = rewards.advantages(found, [[2] * 6], 10)
    assert advantage == pytest.approx([0.75, 0, -0.25, 0, -0.25, -0.25])
    long = scored(params, [group[:2]], reader=Reader(fits=lambda *_: False))[1]
    assert long.total == [[None, None]] and long.facts["judge_too_long"] == 2
    alone = scored({"compare": {"by": "judge"}}, [[said("a")]])[1]
    assert alone.facts["judge_nothing_to_compare_it_with"] == 1
    assert scored({"compare": {"by": "judge"}}, [[said("a"), said(" ")]])[1].total == [[1.0, 0.0]]
    mute = scored({"compare": {"by": "judge"}}, [[said("a"), said("b")]], lambda *_: "I like both.")[1]
    assert mute.facts["judge_unreadable"] == 2


def test_the_metrics_count_verdicts_that_cannot_be_read():
    """In a source of groups: those answers keep an advantage of 0."""
    made, _ = source(rewards=({"judge": {"rate": {"by": "judge", "together": False, "retries": 0}}},))
    replies = iter(["RATING: 5", "no", "RATING: 1"] * 2)
    judge = lambda step, pool: drive(step, pool, lambda *_: next(replies))[0]  # noqa: E731
    made.rewards = replace(made.rewards, judge=judge)
    turn = made.step_batch(0, 0.0, {})
    assert turn.facts["judge_unreadable"] == turn.facts["unread_rewards"] == 2 and turn.facts["reward"] == 0.5
    assert sorted(made.memory.advantages) == pytest.approx([-1, -1, 0, 0, 1, 1], rel=1)


def test_a_judge_of_which_nothing_can_be_read_ends_the_training_with_a_remedy():
    made, _ = source(rewards=({"judge": {"rate": {"by": "judge", "together": False, "retries": 0}}},))
    made.rewards = replace(made.rewards, judge=lambda step, pool: drive(step, pool, lambda *_: "no")[0])
    for step in range(9):
        made.step_batch(step, 0.0, {})
    with pytest.raises(UserError, match=r"no answer .* can be told; judge unreadable: 6 of the last: name another"):
        made.step_batch(9, 0.0, {})


# In a run


@pytest.fixture
def data(recipe_data, tmp_path):
    data = recipe(recipe_data, tmp_path, rollout=ROLLOUT | {"rewards": [{"judge": "judge"}]}, writer=[STUDENT])
    data["models"] = {"judge": {"server": {"url": "http://127.0.0.1:1/v1", "name": "toy"}}}
    return data


REFUSED = [
    (lambda d: d["rollout"].update(rewards=[{"judge": "juge"}]), r"rollout\.rewards\[0\]\.judge: 'juge' can't judge .*'judge'"),
    (lambda d: d["rollout"].update(rewards=[{"judge": {"rate": {}}}]), r"'teacher' can't judge while the student trains"),
    (lambda d: d["rollout"].update(rewards=[{"judge": {}}]), r"give exactly one of rate, rubric"),
    (lambda d: d["rollout"].update(rewards=[{"judge": {"rate": {"by": "judge", "scal": 1}}}]), r"rollout\.rewards\[0\]\.judge\.rate\.scal: unknown key"),
    (lambda d: d["rollout"].update(rewards=[{"judge": {"rate": {"by": "judge", "expected": True}}}]), r"it needs log probs, and judge is behind a server"),
    (lambda d: d["rollout"].update(rewards=["finished"]), r"models\.judge: no step and no judge names it"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_judges_that_are_not_there_or_can_not_are_refused_with_their_place(data, number):
    change, error = REFUSED[number]
    change(data)
    with pytest.raises(RecipeError, match=error):
        limbeck.check(parse(data))


def script(number, body):
    """Rates by the number of letters, and can't decide on some."""
    texts = re.findall(r"Answer \d+:\n((?:\| [^\n]*\n?)+)", body["messages"][-1]["content"])
    lines = [f"RATING {n}: {1 + len(text) % 5}" for n, text in enumerate(texts, 1) if len(text) % 7]
    return answer("\n".join(["Hm.", *lines]), tokens=2)


def keys_in(folder):
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        return {key for (key,) in db.execute("select key from answers")}


def test_a_served_judge_rewards_and_is_billed_and_nothing_is_asked_twice(data, tmp_path):
    """Stopped in its second half and run again, the training ends as its twin, and asks for what is not there alone."""
    with Scripted(script) as server:
        price = {"input": 1e6, "output": 2e6}
        data["models"]["judge"]["server"] |= {"url": server.url, "price": price}
        data["train"] = data["train"] | {"steps": 4, "save_seconds": 0}
        data["machine"] = {"answers": "none"}
        recipe = parse(data)
        limbeck.run(recipe, tmp_path / "clean", stages=("elicit", "train"))
        asked = len(server.seen)
        steps = [record["rollout"] for record in records(tmp_path / "clean")]
        assert all(0 <= step["reward"] <= 1 for step in steps) and any(step["reward"] > 0 for step in steps)
        told = sum(step.get("unread_rewards", 0) for step in steps)
        assert told == sum(step.get("judge_unreadable", 0) for step in steps)
        inputs = json.loads((tmp_path / "clean" / "inputs.json").read_text())
        assert inputs["model judge"].startswith("served:toy-")
        with closing(sqlite3.connect(tmp_path / "clean" / "store.sqlite")) as db:
            billed = dict(db.execute("select writer, count(*) from bills group by writer"))
        assert billed[inputs["model judge"]] == asked > 0 and inputs["teacher"] not in billed

        stops = iter([False] * 60)
        with pytest.raises(StoppedError):
            limbeck.run(recipe, tmp_path / "cut", stages=("elicit", "train"), stop=lambda: next(stops, True))
        there = keys_in(tmp_path / "cut")
        before = len(server.seen)
        limbeck.run(recipe, tmp_path / "cut", stages=("elicit", "train"))
        assert len(server.seen) - before == len(keys_in(tmp_path / "cut") - there)
        assert keys_in(tmp_path / "cut") == keys_in(tmp_path / "clean")
        losses = [[record["loss"].hex() for record in records(tmp_path / name)] for name in ("cut", "clean")]
        assert losses[0] == losses[1]


def test_a_judge_that_is_here_rewards_by_its_probabilities(data, tiny_folder, tmp_path):
    roomy = shutil.copytree(tiny_folder, tmp_path / "roomy")
    settings = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    data["models"] = {"judge": str(roomy)}
    data["rollout"]["rewards"] = [{"judge": {"rate": {"by": "judge", "expected": True}, "weight": 2.0}}]
    data["train"] = data["train"] | {"steps": 2}
    limbeck.run(parse(data), tmp_path / "out", stages=("elicit", "train"))
    for record in records(tmp_path / "out"):
        assert 0 < record["rollout"]["reward"] < 2 and "unread_rewards" not in record["rollout"]
    assert json.loads((tmp_path / "out" / "inputs.json").read_text())["model judge"].startswith("roomy@")
