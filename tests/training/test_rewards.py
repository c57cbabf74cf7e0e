"""Rewards in the loop: what they say of answers, what a step makes of them, what is refused; killed, it goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

import limbeck
from limbeck.config.recipe import parse
from limbeck.config.sections import Advantage, RewardEntry, Rollout, Writer
from limbeck.data.batches import Row
from limbeck.elicit.prompt import Prompt
from limbeck.objectives.policy import policy_loss
from limbeck.objectives.rewards import advantages
from limbeck.training.asking import Asking
from limbeck.training.group_rollout import GroupRollouts
from limbeck.training.rewards import Judged, rewards_of
from limbeck.types import RecipeError, UserError
from tests.flow_driver import drive
from tests.runs.test_pipeline import command
from tests.training.test_rollout import EOS, distance, losses, records, script

NUMBER = {"type": "number", "answer": 7}
STUDENT = {"by": "student", "max_tokens": 8}
ROLLOUT = {"prompts": 2, "group": 4, "rewards": [{"length": {"free": 1}}]}


def prompts(count=4, check=NUMBER):
    return [Prompt(f"p{n}", f"question {n}", check=check) for n in range(count)]


def judged(text="7", ids=(5, EOS), finished=True, check=NUMBER):
    return Judged(Prompt("p", "?", check=check), text, tuple(ids), finished, max_tokens=10)


def reward(name, **params):
    entry = RewardEntry(name=name, params=params)
    return rewards_of([entry], None, prompts(), 64).weighted[0][2]


@pytest.mark.parametrize(
    ("name", "params", "answer", "value"),
    [
        ("check", {}, judged("it is 7"), 1.0),
        ("check", {}, judged("it is 8"), 0.0),
        ("check", {}, judged("it is 7", finished=False), 0.0),
        ("check", {}, judged("7", finished=False, check=None), None),
        ("check", {}, judged("<think>7"), 0.0),
        ("check", {}, judged("7", check=None), None),
        ("check", {"by": {"type": "pattern", "pattern": "[a-z]+"}}, judged("abc", check=None), 1.0),
        ("finished", {}, judged(finished=False), 0.0),
        ("finished", {}, judged(), 1.0),
        ("length", {"free": 4}, judged(ids=range(4)), 0.0),
        ("length", {"free": 4}, judged(ids=range(7)), -0.5),
        ("length", {"free": 4}, judged(ids=range(10)), -1.0),
        ("length", {"free": 2, "most": 4}, judged(ids=range(3)), -0.5),
        ("length", {"free": 2, "most": 4}, judged(ids=range(9)), -1.0),
        ("repetition", {"gram": 2}, judged(ids=[1, 2, 1, 2, 1]), -0.5),
        ("repetition", {}, judged(ids=[1]), 0.0),
        ("thinking", {}, judged("<think>a</think>b"), 1.0),
        ("thinking", {}, judged("<think>a</think> "), 0.0),
        ("thinking", {}, judged("<think>a"), 0.0),
        ("thinking", {}, judged("b"), 0.0),
    ],
)
def test_what_an_answer_is_worth(name, params, answer, value):
    assert reward(name, **params).of(answer) == value


def test_a_reward_that_cannot_be_told_is_no_number():
    """Half of a sum is not the sum: the answer gets no advantage, and is left out of its group's mean."""
    both = rewards_of(
        [RewardEntry(name="check"), RewardEntry(name="finished", weight=0.5)], Advantage(scale="none"), prompts(), 10
    )
    scored = both.score([[judged(), judged("8", finished=False), judged(check=None)]])
    assert scored.total == [[1.5, 0.0, None]] and scored.unread == 1
    (advantage,) = both.advantages(scored, [[2, 2, 2]], 10)
    assert advantage == pytest.approx([0.75, -0.75, 0.0])
    assert scored.facts == {
        "reward": 0.75,
        "reward_deviation": 0.75,
        "reward_check": 0.5,
        "reward_finished": pytest.approx(0.6667),
        "equal_groups": 0.0,
        "unread_rewards": 1,
    }


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        (["chek"], "rollout.rewards[0]: there is no reward 'chek'; did you mean 'check'"),
        ([{"length": {}}], "rollout.rewards[0].length.free: is required"),
        ([{"length": {"free": 9, "most": 4}}], "not below most"),
        ([{"length": {"free": 8}}], "no answer is longer than the writer's max_tokens, 8: lower free"),
        ([{"check": {"weight": 0}}], "says nothing"),
        ([{"check": {"by": {"type": "nubmer"}}}], "no verifier 'nubmer'"),
        ([], "rollout.rewards"),
        ([{"length": {"free": 1, "mots": 4}}], "unknown key"),
    ],
)
def test_rewards_that_say_nothing_are_refused_with_their_place(recipe_data, rewards, words):
    data = recipe_data | {"writer": [STUDENT], "loss": ["ppo_clip"], "rollout": ROLLOUT | {"rewards": rewards}}
    with pytest.raises(RecipeError, match=re.escape(words)):
        limbeck.check(parse(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout": ROLLOUT | {"group": 1}}, "rollout.group: one answer"),
        ({"rollout": ROLLOUT | {"advantage": {"baseline": "step"}}}, "baseline: step with scale: group divides by 0"),
        ({"rollout": ROLLOUT | {"advantage": {"baseline": "none"}}}, "the same reward; set scale: none"),
        ({"rollout": ROLLOUT | {"advantage": {"baseline": "none", "scale": "step"}}}, "rollout.advantage: baseline"),
        ({"rollout": {"prompts": 2}}, "prompts is for answers that rewards judge"),
        ({"rollout": {"rewards": ["finished"]}}, "rewards need a size"),
        (
            {"rollout": ROLLOUT | {"resample": 2, "advantage": {"baseline": "step", "scale": "step"}}},
            "rollout.resample: with baseline: step",
        ),
        ({"rollout": ROLLOUT | {"replay": {"size": 8}}}, "rollout.replay"),
        ({"rollout": ROLLOUT | {"joint": {"teacher_share": 0.2}}}, "rollout.joint"),
        ({"rollout": ROLLOUT | {"passes": 2}, "loss": ["reinforce"]}, "rollout.passes: reinforce is right for"),
        ({"loss": ["reverse_kl"]}, "no loss reads the rewards"),
        ({"writer": [STUDENT | {"temperature": 0.7}]}, "draws from its own distribution"),
        ({"writer": [STUDENT | {"top_p": 0.9}]}, "draws from its own distribution"),
        ({"loss": ["ppo_clip", "minillm_long"]}, "makes advantages of its own"),
        ({"rollout": None}, "which rewards give"),
        ({"writer": [STUDENT | {"share": 0.5}, {"by": "teacher", "share": 0.5}]}, "the student alone writes"),
    ],
)
def test_what_does_not_go_with_rewards_is_refused(recipe_data, change, words):
    data = recipe_data | {"writer": [STUDENT], "loss": ["ppo_clip"], "rollout": ROLLOUT} | change
    data = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(RecipeError, match=re.escape(words)):
        limbeck.check(parse(data))


@pytest.mark.parametrize("penalty", ["kl_penalty_k2", "kl_penalty_k3"])
def test_a_penalty_goes_with_passes_and_not_with_older_text(recipe_data, penalty):
    data = recipe_data | {"writer": [STUDENT], "loss": ["ppo_clip", penalty]}
    limbeck.check(parse(data | {"rollout": ROLLOUT | {"passes": 2}}))
    with pytest.raises(RecipeError, match="ahead"):
        limbeck.check(parse(data | {"rollout": ROLLOUT | {"ahead": 2}}))


def test_prompts_that_cannot_be_checked_are_refused_unless_one_check_is_for_all():
    unchecked = [*prompts(2), Prompt("x", "why?", file="mine.jsonl", line=3)]
    with pytest.raises(
        RecipeError, match=re.escape("1 of 3 prompts have no check, such as that at mine.jsonl, line 3")
    ):
        rewards_of([RewardEntry(name="check")], None, unchecked, 8)
    rewards_of([RewardEntry(name="check", params={"by": NUMBER})], None, unchecked, 8)


def test_a_reward_that_is_no_number_is_told_by_its_name():
    named = rewards_of([RewardEntry(name="model", params={"path": "rm"})], None, prompts(), 8)

    class Broken:
        def score(self, conversations):
            return [float("nan") for _ in conversations]

    with pytest.raises(UserError, match="the reward model of an answer is nan"):
        replace(named, load=lambda _: Broken()).score([[judged()]])


# The source alone, with a scripted student


def source(
    answer=lambda number: 2 + number % 3, count=4, advantage=None, rewards=({"length": {"free": 1}},), **settings
):
    write = script(answer)
    rollout = Rollout(
        **{"prompts": 2, "group": 3} | settings,
        rewards=[{"name": name, "params": params} for entry in rewards for name, params in entry.items()],
    )
    slots = [Row(f"p{n}", (1, 2, n + 3), (), group=f"p{n}") for n in range(count)]
    asking = Asking(slots, write, Writer(by="student", max_tokens=16), seed=7, ends=frozenset({EOS}))
    judge = rewards_of(rollout.rewards, advantage, prompts(count), 16)
    made = GroupRollouts(asking, prompts(count), lambda slot, ids: "7", judge, rollout)
    return made, write.asked


def rows_of(turn):
    return [row for micro_batch in turn.micro_batches for row in micro_batch]


def test_a_step_asks_so_many_prompts_so_often_and_every_draw_is_another():
    made, asked = source()
    rows = rows_of(made.step_batch(0, 0.0, {}))
    groups = [row.group for row in rows]
    assert len(rows) == 6 and {groups.count(group) for group in groups} == {3}
    assert len({job.seed for job in asked}) == 6 and len({row.sample_id for row in rows}) == 6
    assert {
        group for step in range(1, 2) for group in [r.group for r in rows_of(made.step_batch(step, 0.1, {}))]
    } | set(groups) == {"p0", "p1", "p2", "p3"}, "an epoch asks every prompt"


def test_the_column_is_the_advantage_at_every_token():
    made, _ = source(advantage=Advantage(scale="none", count="tokens"))
    rows = rows_of(made.step_batch(0, 0.0, {}))
    for group in {row.group for row in rows}:
        rewards = {}
        for row in (row for row in rows if row.group == group):
            assert len(set(row.columns["advantage"])) == 1 and len(row.columns["advantage"]) == len(row.response_ids)
            rewards[row.columns["advantage"][0]] = -(len(row.response_ids) - 1) / 15
        mean = sum(rewards.values()) / 3
        assert list(rewards) == pytest.approx([value - mean for value in rewards.values()], abs=1e-6)


def test_the_penalty_has_the_weights_by_length_of_the_advantages():
    """As GRPO has it: the mean over answers of the mean over an answer's tokens; or the sums over a constant."""
    for count, want in (("answers", lambda n: 1 / (6 * n)), ("constant", lambda n: 1 / (6 * 16))):
        made, _ = source(advantage=Advantage(scale="none", count=count))
        rows = rows_of(made.step_batch(0, 0.0, {}))
        total = sum(len(row.response_ids) for row in rows)
        for row in rows:
            length = len(row.response_ids)
            assert row.columns["length_weight"] == pytest.approx((want(length) * total,) * length)
        row = min(rows, key=lambda row: len(row.response_ids))
        weights = torch.tensor(row.columns["length_weight"])
        log_prob, reference = torch.full_like(weights, -1.5), torch.full_like(weights, -1.0)
        for name in ("kl_penalty_k2", "kl_penalty_k3"):
            plain = policy_loss(name, log_prob, {"reference_log_prob": reference})
            found = policy_loss(name, log_prob, {"reference_log_prob": reference, "length_weight": weights})
            assert torch.allclose(found, weights * plain) and not torch.allclose(found, plain)


def test_passes_use_the_same_answers_again():
    made, asked = source(passes=3)
    first, again, third, new = (made.step_batch(step, step / 4, {}) for step in range(4))
    same = [
        sorted((row.sample_id, row.columns["advantage"]) for row in rows_of(turn)) for turn in (first, again, third)
    ]
    assert same[0] == same[1] == same[2] and len(asked) == 12
    assert [turn.facts["age"] for turn in (first, again, third, new)] == [0, 1, 2, 0]
    assert not {row.sample_id for row in rows_of(new)} & {row.sample_id for row in rows_of(first)}


def test_groups_that_teach_nothing_are_asked_again_and_fill_up_what_is_left():
    """The first four groups are equal; two of the next are not."""
    made, asked = source(lambda number: 3 if number < 9 else 2 + number % 3, resample=3)
    turn = made.step_batch(0, 0.0, {})
    assert len(rows_of(turn)) == 6 and turn.facts["equal_groups"] == 0.0 and turn.facts["written"] == len(asked) > 6
    made, asked = source(lambda number: 3 if number != 6 else 5, resample=1)
    turn = made.step_batch(0, 0.0, {})
    assert len(rows_of(turn)) == 6 and turn.facts["equal_groups"] == 0.5


def test_a_group_in_which_one_answer_has_a_reward_is_asked_again():
    made, asked = source(rewards=({"model": {"path": "rm"}},), resample=1)

    class Few:
        """Scores one answer of the first six, then all."""

        def score(self, conversations):
            first = len(asked) == 6
            return [None if first and n else float(n) for n in range(len(conversations))]

    made.rewards = replace(made.rewards, load=lambda _: Few())
    assert made.step_batch(0, 0.0, {}).facts["written"] == len(asked) == 12


@pytest.mark.parametrize("value", [0.1, 0.7, -0.2, 1 / 3])
def test_equal_rewards_teach_nothing_against_the_mean_of_a_step(value):
    """Whatever the mean's rounding says."""
    reward = torch.full((2, 5), value, dtype=torch.float64)
    present = torch.ones(2, 5, dtype=torch.bool)
    for scale in ("none", "step"):
        assert advantages(reward, present, baseline="step", scale=scale).abs().max() == 0
    present[1, 2:] = False
    assert advantages(reward, present, baseline="step", scale="none").abs().max() == 0


def test_patience_counts_writings_and_not_the_steps_that_read_them():
    made, asked = source(lambda number: 3, passes=4)
    for step in range(36):
        made.step_batch(step, 0.0, {})
    assert len(asked) == 9 * 6
    with pytest.raises(UserError, match="in 10 writings"):
        made.step_batch(36, 0.0, {})


def test_rewards_that_never_differ_end_the_training_with_a_remedy():
    made, _ = source(lambda number: 3)
    for step in range(9):
        assert made.step_batch(step, 0.0, {}).facts["equal_groups"] == 1.0
    with pytest.raises(UserError, match="nothing can be learnt"):
        made.step_batch(9, 0.0, {})


def test_nor_do_single_answers_whose_rewards_never_differ():
    """Against the mean of the step as against none: a reward that is always 0 teaches nothing either."""
    for advantage in (Advantage(baseline="step", scale="none"), Advantage(baseline="none", scale="none")):
        made, _ = source(lambda number: 1 + (number > 9**9), advantage=advantage, group=1, rewards=({"check": {}},))
        made.text = lambda slot, ids: "8"
        made.asking.ends = frozenset()
        for step in range(9):
            made.step_batch(step, 0.0, {})
        with pytest.raises(UserError, match="the rewards of all answers of a step were equal"):
            made.step_batch(9, 0.0, {})
    made, _ = source(
        lambda number: 3, advantage=Advantage(baseline="none", scale="none"), group=1, rewards=({"finished": {}},)
    )
    for step in range(12):
        made.step_batch(step, 0.0, {})  # always 1 is learnt from: it is not compared with anything


def test_a_judge_that_calls_all_a_tie_teaches_nothing():
    """Half of a comparison each: equal groups, and an end with a remedy."""
    made, _ = source(rewards=({"judge": {"compare": {"by": "judge"}}},))
    made.rewards = replace(made.rewards, judge=lambda step, pool: drive(step, pool, lambda *_: "VERDICT: TIE")[0])
    for step in range(9):
        facts = made.step_batch(step, 0.0, {}).facts
        assert facts["equal_groups"] == 1.0 and facts["reward"] == 0.5 and "unread_rewards" not in facts
    with pytest.raises(UserError, match=r"were equal \(0.5 on average\)"):
        made.step_batch(9, 0.0, {})


def test_a_student_that_says_nothing_is_told():
    made, _ = source(lambda number: 1, prompts=4)
    with pytest.raises(UserError, match="nothing but the end token"):
        made.step_batch(0, 0.0, {})


@pytest.mark.parametrize("passes", [1, 3])
def test_restored_the_source_goes_on_with_the_same_text(passes):
    whole, _ = source(passes=passes)
    turns = [rows_of(whole.step_batch(step, step / 8, {})) for step in range(8)]
    for cut in (1, 2, 5):
        first, asked = source(passes=passes)
        for step in range(cut):
            first.step_batch(step, step / 8, {})
        before = len(asked)
        second, _ = source(lambda number, before=before: 2 + (number + before) % 3, passes=passes)
        second.restore(first.state())
        assert [rows_of(second.step_batch(step, step / 8, {})) for step in range(cut, 8)] == turns[cut:]


# Whole trainings


def recipe(recipe_data, tmp_path, **change):
    data = recipe_data | {"writer": [STUDENT], "loss": ["ppo_clip"], "rollout": ROLLOUT} | change
    data["student"] = change.get("student", {"start": {"pretrained": recipe_data["teacher"]}})
    data["evaluate"] = data["evaluate"] | {"controls": ["untouched"]}
    return data


REPEAT = {"prompts": 4, "group": 6, "rewards": [{"repetition": {"gram": 1, "weight": -1}}]}


def test_a_student_learns_what_is_rewarded(recipe_data, tmp_path):
    train = {"steps": 30, "tokens_per_step": 256, "lr": 2e-2, "seed": 3}
    data = recipe(recipe_data, tmp_path, rollout=REPEAT, train=train)
    limbeck.run(parse(data), tmp_path / "repeats", stages=("elicit", "train"))
    rewards = [record["rollout"]["reward"] for record in records(tmp_path / "repeats")]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5]), rewards


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_the_penalty_compares_with_the_start(recipe_data, tmp_path, lora):
    """At the first step the student is its start: the penalty is 0, and grows as it moves away."""
    student = {"start": {"pretrained": recipe_data["teacher"]}} | ({"lora": lora} if lora else {})
    loss = [{"ppo_clip": {}}, {"kl_penalty_k3": {"weight": 1e-6}}]
    train = {"steps": 8, "tokens_per_step": 256, "lr": 1e-2, "seed": 3}
    data = recipe(recipe_data, tmp_path, student=student, loss=loss, train=train, rollout=REPEAT)
    limbeck.run(parse(data), tmp_path / "far", stages=("elicit", "train"))
    penalties = [record["terms"]["kl_penalty_k3@student"] for record in records(tmp_path / "far")]
    assert abs(penalties[0]) < 1e-9 and penalties[-1] > 1e-5


def test_distillation_stands_beside_the_reward(recipe_data, tmp_path):
    data = recipe(recipe_data, tmp_path, loss=["ppo_clip", {"reverse_kl": {"weight": 0.5}}])
    data["student"] = {"start": {"prune": {"layers": 3, "keep": "uniform"}}}
    limbeck.run(parse(data), tmp_path / "both", stages=("elicit", "train"))
    assert all(set(record["terms"]) == {"ppo_clip@student", "reverse_kl"} for record in records(tmp_path / "both"))


@pytest.mark.long
@pytest.mark.parametrize("passes", [2])
@pytest.mark.promise("R3")
def test_killed_and_run_again_the_losses_are_the_same_to_the_bit(recipe_data, tmp_path, passes):
    data = recipe(
        recipe_data,
        tmp_path,
        loss=["ppo_clip", {"kl_penalty_k2": {"weight": 0.1}}],
        rollout=ROLLOUT | {"passes": passes},
    )
    data["train"] = data["train"] | {"save_seconds": 0, "steps": 6}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    assert command("train", file, "--out", killed, crash_at="train.after_step:3").returncode == 137
    done = command("train", file, "--out", killed)
    assert done.returncode == 0, done.stderr
    assert command("train", file, "--out", clean).returncode == 0
    assert losses(killed) == losses(clean) and distance(killed, clean) == 0


def test_a_reward_of_none_moves_nothing(recipe_data, tmp_path):
    """All answers equal: the loss is 0 and the first update changes no weight, to the bit."""
    data = recipe(recipe_data, tmp_path, rollout=ROLLOUT | {"rewards": [{"repetition": {"gram": 50}}]})
    data["train"] = data["train"] | {"steps": 2}
    limbeck.run(parse(data), tmp_path / "still", stages=("elicit", "train"))
    assert [record["loss"] for record in records(tmp_path / "still")] == [0.0, 0.0]
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "still" / "student" / "model.safetensors")
    original = load_file(f"{recipe_data['teacher']}/model.safetensors")
    assert all(torch.equal(trained[name], original[name]) for name in trained.keys() & original.keys())


# Reward models


class Longer:
    """Stands for a reward model: the score is the number of letters, and 'x' can't be read."""

    def __init__(self):
        self.asked = []

    def score(self, conversations):
        self.asked.append(conversations)
        return [None if text == "x" else float(len(text)) for _, text, _ in conversations]


def test_a_reward_model_judges_all_answers_of_a_step_at_once():
    entries = [RewardEntry(name="model", params={"path": "rm"}), RewardEntry(name="finished", weight=0.5)]
    model = Longer()
    named = rewards_of(entries, Advantage(), prompts(), 10)
    assert named.models == ["rm"]
    rewards = replace(named, load=lambda name: {"rm": model}[name])
    cut = judged("12", finished=False)
    scored = rewards.score([[judged("123"), cut], [judged("<think>so</think>1"), judged("<think>so")], [judged("x")]])
    assert scored.total == [[3.5, 2.0], [1.5, 1.5], [None]] and scored.unread == 1
    assert scored.parts == {"model": 1.75, "finished": 0.8} and scored.why["model_no_answer"] == 1
    (conversations,) = model.asked
    assert [(text, is_cut) for _, text, is_cut in conversations] == [
        ("123", False),
        ("12", True),
        ("1", False),
        ("x", False),
    ]
    assert conversations[0][0] == judged().prompt.messages
    penalty = replace(rewards, weighted=[("model", -1.0, rewards.weighted[0][2])])
    assert penalty.score([[judged("123"), judged("1"), judged("<think>so</think> ")]]).total == [[-3.0, -1.0, -3.0]]


@pytest.fixture
def reward_model(recipe_data, tmp_path):
    """A run that trains a reward model that likes `a` and dislikes the rest."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"why {n}", "chosen": "a a a", "rejected": "the red house"}) + "\n" for n in range(8)
        )
    )
    held_out = tmp_path / "held_pairs.jsonl"
    held_out.write_text('{"prompt": "count", "chosen": "a a", "rejected": "red"}\n')
    data = {
        "name": "likes-a",
        "teacher": recipe_data["teacher"],
        "student": {"start": {"pretrained": recipe_data["teacher"]}, "head": "scalar"},
        "prompts": {"from": str(pairs)},
        "writer": [{"by": "corpus"}],
        "loss": ["bradley_terry"],
        "train": {"steps": 4, "tokens_per_step": 64, "lr": 3e-3},
        "evaluate": {"prompts": str(held_out)},
    }
    return limbeck.run(parse(data), tmp_path / "rm", stages=("train",)).folder


def test_a_run_is_rewarded_by_a_model_and_bound_to_it(recipe_data, reward_model, tmp_path):
    rollout = ROLLOUT | {"rewards": [{"model": str(reward_model)}, {"finished": {"weight": 0.1}}]}
    data = recipe(recipe_data, tmp_path, rollout=rollout)
    data["train"] = data["train"] | {"steps": 2}
    plan = limbeck.check(parse(data))
    without = limbeck.check(parse(data | {"rollout": ROLLOUT}))
    assert plan.judged == without.judged == (16, pytest.approx(16 * 8 * 0.65, abs=16))
    assert plan.memory_bytes > without.memory_bytes and plan.trained_tokens == plan.judged[1]
    out = tmp_path / "rewarded"
    limbeck.run(parse(data), out, stages=("train",))
    facts = [record["rollout"] for record in records(out)]
    assert all(abs(of["reward"] - of["reward_model"] - 0.1 * of["reward_finished"]) < 1e-3 for of in facts)
    assert all(of["reward_deviation"] > 0 for of in facts)
    assert "likes-a" not in json.loads((out / "inputs.json").read_text())["reward models"]
    weights = reward_model / "student" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(UserError, match="reward models changed since"):
        limbeck.run(parse(data), out, stages=("train",))


def test_what_is_no_reward_model_is_refused(recipe_data, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("name: x\n")
    for name, words in (
        (recipe_data["teacher"], "gives no score of a text"),
        (str(tmp_path / "begun"), "has no student yet"),
        (str(tmp_path / "none"), "no model"),
    ):
        data = recipe(recipe_data, tmp_path, rollout=ROLLOUT | {"rewards": [{"model": name}]})
        with pytest.raises(RecipeError, match=rf"rollout\.rewards: .*{words}"):
            limbeck.check(parse(data))
