"""Reward models from a recipe to a folder that plain transformers loads: what they learn, keep, show and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import limbeck
from limbeck.config.recipe import parse
from limbeck.elicit.prompt import Prompt
from limbeck.evaluate.judge import judge_pairs
from limbeck.models.scores import Scorer, load_scorer
from limbeck.progress import StoppedError
from limbeck.types import RecipeError
from tests.conftest import PROMPTS

GOOD, BAD = "the cat sat", "a dog ran to the red house"
HELD_OUT = ("count one two", "a dog ran", "why blue", "the mat sat", "red sky")


def lines(file, prompts, **labels):
    rows = [{"prompt": prompt, "chosen": GOOD, "rejected": BAD} | labels for prompt in prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def data(tiny_folder, tmp_path):
    return {
        "name": "reward-model",
        "teacher": str(tiny_folder),
        "student": {"start": {"pretrained": str(tiny_folder)}, "head": "scalar"},
        "prompts": {"from": lines(tmp_path / "train.jsonl", PROMPTS)},
        "writer": [{"by": "corpus"}],
        "loss": ["bradley_terry"],
        "train": {"steps": 8, "tokens_per_step": 64, "lr": 3e-3, "seed": 3, "save_seconds": 0},
        "evaluate": {"prompts": lines(tmp_path / "held_out.jsonl", HELD_OUT)},
    }


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def scores_by_transformers(folder, side):
    net = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt in HELD_OUT
        for answer in (GOOD, BAD)
    ]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return net(**batch).logits[:, 0]


def test_a_planted_preference_is_learnt_and_the_folder_gives_the_same_scores(data, tmp_path):
    out = tmp_path / "out"
    data["train"] |= {"save_seconds": 60}
    limbeck.run(parse(data), out)
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    student, longer = summary["systems"]["student"], summary["systems"]["longer"]
    least = pytest.approx(0.025 ** (1 / 5))  # of five right ones
    assert student["preference/accuracy"] == {"value": 1.0, "low": least, "high": 1.0, "n": 5}
    assert student["preference/margin"]["low"] > 0.5 and 0 < student["preference/ece"]["value"] < 0.5
    assert longer == {
        "preference/accuracy": {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 5)), "n": 5}
    }
    assert "forward_kl" not in student and "teacher" not in summary["systems"]
    kept = records(out / "evaluation" / "task-preference+student.jsonl")
    ours = [score for record in kept for score in record["facts"]["scores"]]
    for side in ("right", "left"):
        assert scores_by_transformers(out / "student", side).tolist() == pytest.approx(ours, abs=1e-4), side
    page = (out / "report.html").read_text()
    assert "Pairs in the right order" in page and "Calibration of preferences" in page
    assert "AutoModelForSequenceClassification" in (out / "student" / "README.md").read_text()
    scorer = load_scorer(str(out))  # a run stands for its student
    question = ({"role": "user", "content": HELD_OUT[0]},)
    told = scorer.score([(question, GOOD, False), (question, GOOD * 200, False), (question, BAD, False)])
    assert told[0] == pytest.approx(ours[0], abs=1e-5) and told[1] is None and told[2] == pytest.approx(ours[1])


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_stopped_and_run_again_it_ends_in_the_same_weights_to_the_bit(data, tmp_path, lora):
    data["student"] |= {"lora": lora} if lora else {}
    data["train"] |= {"steps": 3}
    recipe = parse(data)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def stop():
        file = stopped / "metrics.jsonl"
        return file.exists() and len(file.read_text().splitlines()) == 1

    with pytest.raises(StoppedError):
        limbeck.run(recipe, stopped, stop=stop, stages=("elicit", "train"))
    for folder in (stopped, whole):
        limbeck.run(recipe, folder, stages=("elicit", "train"))
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (stopped, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(f"{data['teacher']}/model.safetensors")
    moved = {name for name in start.keys() & ours.keys() if not torch.equal(start[name], ours[name])}
    assert moved and ("model.embed_tokens.weight" in moved) == (lora is None) and "score.weight" in ours


def test_labels_of_pairs_reach_the_loss(data, tmp_path):
    """With p = 0.5 both answers are as good, and the least loss is log 2; the margin is asked for by the loss."""
    data["prompts"] = {"from": lines(tmp_path / "even.jsonl", PROMPTS, probability=0.5, margin=2)}
    data["train"] |= {"steps": 12, "lr": 1e-2, "save_seconds": 60}
    limbeck.run(parse(data), tmp_path / "even", stages=("elicit", "train"))
    losses = [record["loss"] for record in records(tmp_path / "even" / "metrics.jsonl")]
    assert losses[0] > losses[-1] > 0.69314 and losses[-1] < 0.72
    data |= {"loss": [{"bradley_terry": {"margin": 1}}], "train": data["train"] | {"steps": 1}}
    limbeck.run(parse(data), tmp_path / "margin", stages=("elicit", "train"))
    assert json.loads((tmp_path / "margin" / "metrics.jsonl").read_text())["loss"] > losses[0]


REFUSED = [
    ({"loss": ["forward_kl"]}, "loss[0].forward_kl: forward_kl reads distributions over the vocabulary"),
    ({"loss": ["bradley_terry", "cross_entropy"]}, "loss[1].cross_entropy"),
    ({"loss": ["dpo"]}, "loss[0].dpo"),
    ({"loss": [{"bradley_terry": {"margin": 1}}]}, "no line has one"),
    ({"writer": [{"by": "student"}]}, "writer: a student with a scalar head writes nothing; leave student out"),
    ({"writer": [{"by": "corpus"}, {"by": "untouched"}]}, "leave untouched out"),
    ({"evaluate": {"metrics": ["fidelity"]}}, "fidelity is measured of a student that writes"),
    ({"evaluate": {"metrics": ["preference", "everyday"]}}, "everyday is measured of a student that writes"),
    ({"evaluate": {"controls": ["sft_control"]}}, "sft_control is a control of a student that writes"),
    ({"evaluate": {"judge": "tiny"}}, "evaluate.judge"),
    ({"head": None}, "set student.head: scalar"),
    ({"head": "scalr"}, "student.head: 'scalr' is not allowed here; did you mean 'scalar'"),
]


def test_what_can_not_work_is_refused_before_anything_is_loaded(data):
    for change, words in REFUSED:
        changed = data | {"student": dict(data["student"]), "evaluate": dict(data["evaluate"])}
        if "head" in change:
            changed["student"]["head"] = change["head"] or "vocabulary"
        changed["evaluate"] |= change.get("evaluate", {})
        changed |= {key: value for key, value in change.items() if key not in ("head", "evaluate")}
        with pytest.raises(RecipeError, match=re.escape(words)):
            limbeck.check(parse(changed))
    limbeck.check(parse(data))


def test_held_out_prompts_without_pairs_and_wrong_labels_are_refused(data, tmp_path):
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"prompt": "count one two", "answer": "three"}\n')
    with pytest.raises(limbeck.UserError, match=r"evaluate\.prompts: none of the 1 held-out prompts has two answers"):
        limbeck.check(parse(data | {"evaluate": {"prompts": str(alone)}}))
    for labels, words in (({"probability": 1.5}, "from 0 to 1"), ({"margin": "much"}, "of 0 or more")):
        file = lines(tmp_path / "wrong.jsonl", PROMPTS, **labels)
        with pytest.raises(limbeck.UserError, match=words):
            limbeck.check(parse(data | {"prompts": {"from": file}}))


def test_a_model_of_scores_is_no_model_that_writes(data, tmp_path, tiny_folder):
    limbeck.run(parse(data | {"train": data["train"] | {"steps": 1}}), tmp_path / "out", stages=("elicit", "train"))
    with pytest.raises(limbeck.UserError, match=r"gives scores of a text .* and writes none"):
        limbeck.check(parse(data | {"teacher": str(tmp_path / "out" / "student")}))
    with pytest.raises(limbeck.UserError, match="gives no score of a text"):
        load_scorer(str(tiny_folder))


def test_a_reward_model_judges_pairs_by_their_scores():
    class Length:
        def score(self, conversations):
            return [None if answer == "?" else float(len(answer)) for _, answer, _ in conversations]

    scorer = Scorer(None)
    object.__setattr__(scorer, "score", Length().score)
    prompts = [Prompt(name, name) for name in "abcd"]
    first = {"a": "long", "b": "x", "c": "same", "d": "?"}
    second = {"a": "no", "b": "longer", "c": "also", "d": "so"}
    verdicts = judge_pairs(scorer, prompts, first, second)
    assert [verdict.outcome for verdict in verdicts] == ["first", "second", "tie", "too_long"]
    assert all(verdict.consistent for verdict in verdicts[:3]) and verdicts[0].replies[0] == "4 and 2"


def test_where_writers_make_the_pairs_they_make_the_held_out_ones_too(data, tmp_path):
    train, held_out = tmp_path / "asked.jsonl", tmp_path / "held.jsonl"
    for file, prompts in ((train, PROMPTS), (held_out, HELD_OUT)):
        file.write_text("".join(json.dumps({"prompt": prompt, "answer": GOOD}) + "\n" for prompt in prompts))
    data |= {"prompts": {"from": str(train)}, "writer": [{"by": "corpus"}, {"by": "teacher", "max_tokens": 6}]}
    data |= {"evaluate": {"prompts": str(held_out)}, "train": data["train"] | {"steps": 1}}
    recipe = parse(data)
    assert limbeck.check(recipe).requests == len(PROMPTS) + len(HELD_OUT)
    out = tmp_path / "made"
    limbeck.run(recipe, out)
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert summary["tasks"]["preference"] == {"prompts": 5, "pairs": 5}


def test_thinking_is_not_scored(data, tmp_path):
    """As where a reward reads what follows the thinking: the same losses and scores with thoughts and without."""
    plain = Path(data["prompts"]["from"]), Path(data["evaluate"]["prompts"])
    data["train"] |= {"steps": 2}
    limbeck.run(parse(data), tmp_path / "plain")
    for file in plain:
        file.write_text(file.read_text().replace(GOOD, f"<think>hm</think>{GOOD}"))
    limbeck.run(parse(data), tmp_path / "thinks")
    for name in ("metrics.jsonl", "evaluation/task-preference+student.jsonl"):
        ours, theirs = (records(tmp_path / run / name) for run in ("plain", "thinks"))
        keys = ("loss", "grad_norm") if name == "metrics.jsonl" else ("scores",)
        assert [[record[key] for key in keys] for record in ours] == [
            [record[key] for key in keys] for record in theirs
        ]
