"""What `check` promises: steps by the text that is there, a server's time, and trainings too short or too long."""

from __future__ import annotations

import json

import pytest

from limbeck.config.recipe import parse
from limbeck.elicit.ask import Ask
from limbeck.elicit.transform import LabelOnly
from limbeck.runs.advice import LITTLE_TEXT, MOST_EPOCHS, training_cautions
from limbeck.runs.lengths import TokenCounter, counted_by, lengths_of, stored_answer
from limbeck.runs.opening import crowd_advice
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check, check_method
from limbeck.runs.resolve import resolve
from limbeck.storage.metrics_log import steps_made
from limbeck.types import UserError

LABELS = ("food", "money", "sport")
EPOCH = {"epochs": 2, "tokens_per_step": 24, "lr": 1e-3, "seed": 7}


@pytest.fixture
def corpus(tmp_path, recipe_data):
    """A recipe that trains on given answers: short ones, where max_tokens would promise long ones."""
    file = tmp_path / "corpus.jsonl"
    lines = [{"prompt": f"why is the cat number {n} red", "answer": LABELS[n % 3]} for n in range(60)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {key: value for key, value in recipe_data.items() if key != "writer"}
    return {
        **data,
        "prompts": {"from": str(file)},
        "writer": [{"by": "corpus"}],
        "loss": ["cross_entropy"],
        "train": EPOCH,
        "evaluate": {"metrics": ["fidelity"], "limit": 4, "controls": []},
    }


def within(promised, made, factor=1.5):
    return made / factor <= promised <= made * factor


def test_given_answers_are_counted_not_guessed(corpus, tmp_path):
    plan = check(parse(corpus))
    folder = run(parse(corpus), tmp_path / "run", stages=("elicit", "train"))
    made = steps_made(folder)
    assert within(plan.steps, made), (plan.steps, made)
    assert "counted in the prompts' own answers" in plan.answers
    assert json.loads((folder / "plan.json").read_text())["steps"] == plan.steps


def test_steps_that_ask_for_labels_are_short(corpus, tmp_path):
    steps = [{"given": {}}]
    plan = check(parse({**corpus, "elicit": steps, "writer": [{"by": "elicited"}]}))
    assert "counted" in plan.answers
    labels = Ask(prompt="Label {{ prompt }}", parse={"label": LABELS}, max_tokens=200)
    assert labels.answer_tokens() < 5 < Ask(prompt="Label {{ prompt }}", max_tokens=200).answer_tokens() == 130
    assert labels.estimate(10).tokens < 10 * 5 * 3
    assert Ask(prompt="x", into="topic", parse={"label": LABELS}).answer_tokens() is None
    assert LabelOnly().answer_tokens() < 10


def test_the_stores_answers_tell_how_long_the_others_will_be(recipe_data, tmp_path):
    recipe = parse({**recipe_data, "train": EPOCH})
    folder = run(recipe, tmp_path / "run", stages=("elicit", "train"))
    made = steps_made(folder)
    told = check_method(resolve(recipe), folder=folder)
    assert "run folder" in told.answers and within(told.steps, made), (told.steps, made)
    assert stored_answer(tmp_path / "none.sqlite") is None
    (tmp_path / "broken.sqlite").write_text("no database")
    assert stored_answer(tmp_path / "broken.sqlite") is None
    assert "assumed, 65% of max_tokens" in check(recipe).answers


def test_prompts_are_counted_by_the_tokenizer_else_by_letters(recipe_data):
    method = resolve(parse(recipe_data))

    def refuse(_):
        raise UserError("this template takes no such conversation")

    by_letters = lengths_of(method.recipe, (), method.training_prompts, tokens=TokenCounter.by_letters()).prompt
    refused = lengths_of(method.recipe, (), method.training_prompts, tokens=counted_by(refuse, len)).prompt
    counted = lengths_of(method.recipe, (), method.training_prompts, tokens=counted_by(lambda _: 500, len)).prompt
    assert by_letters == refused and counted == 500


def test_epochs_are_of_the_text_that_stands_beside_the_students(recipe_data):
    """Half of each step is the student's, so that reading all of the teacher's takes twice the steps."""
    teacher = {"by": "teacher", "max_tokens": 16}
    train = {"epochs": 8, "tokens_per_step": 64, "lr": 0.001, "seed": 3}
    alone = check(parse(recipe_data | {"writer": [teacher], "train": train})).steps
    beside = check(parse(recipe_data | {"writer": [teacher, teacher | {"by": "student"}], "train": train})).steps
    assert beside == pytest.approx(2 * alone, abs=1) and alone > 2


def test_trainings_that_are_too_short_or_too_long_are_said(recipe_data):
    recipe = parse({**recipe_data, "train": {"steps": 9, "tokens_per_step": 64}})
    (short,) = training_cautions(recipe, 9, 1.0, 600)
    assert "about 9 steps" in short and "tokens_per_step than 64" in short
    (part,) = training_cautions(recipe, 300, 0.5, 40_000)
    assert "50% of the text" in part
    (again,) = training_cautions(recipe, 300, 40.0, 5_000)
    assert "read 40 times" in again and "fewer train.steps" in again
    assert training_cautions(recipe, 300, MOST_EPOCHS + 1, LITTLE_TEXT) == ()
    assert training_cautions(recipe, 300, 1.0, 40_000) == ()
    on_policy = parse({**recipe_data, "writer": [{"by": "student"}]})
    assert training_cautions(on_policy, 300, 40.0, 5_000) == ()
    assert ("note", short) in [line for line in check(recipe).lines() if "9 steps" in line[1] and line[0] == "note"]


@pytest.mark.parametrize(
    ("threads", "running", "cores", "advised"),
    [(2, 5.2, 2, True), (2, 1.9, 2, False), (1, 9.0, 2, False), (8, 9.0, 64, False), (2, None, 2, False)],
)
def test_a_crowded_machine_gets_one_line_of_advice(threads, running, cores, advised):
    advice = crowd_advice(threads, running, cores)
    assert bool(advice) is advised and (not advised or "machine.threads=1" in advice)
