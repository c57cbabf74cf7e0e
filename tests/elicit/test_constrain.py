"""`ask` with `constrain`: what the teacher is held to, by default and where the recipe says so, and what ignores it."""

from __future__ import annotations

import json

import pytest

from limbeck import check
from limbeck.config.recipe import load_recipe, parse
from limbeck.elicit.flow import StepContext, Tally
from limbeck.elicit.run import _facts, _summary
from limbeck.elicit.steps import steps_of
from limbeck.models import constrain
from limbeck.types import RecipeError, Sample
from tests.elicit.test_ask import COLOURS, asking, refused
from tests.flow_driver import prompts

FACTS = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}, "required": ["z"]}
PATTERN = {"pattern": r"Grade: (\d)"}
FORMS = {"json": {"json": FACTS}, "label": COLOURS, "pattern": PATTERN, "text": "text"}


def held(step, replies=(), unheld=lambda form: ""):
    """(the forms of the requests, the pool, the tally)."""
    tally, forms, sent, left = Tally("ask"), [], None, list(replies)
    plan = step.run(prompts("a", "b", "c"), StepContext("m", 7, "0/ask", unheld=unheld), tally)
    while True:
        try:
            requests = plan.send(sent)
        except StopIteration as end:
            return forms, end.value, tally
        forms += [request.form for request in requests]
        sent = [
            Sample((*request.messages, {"role": "assistant", "content": left.pop(0) if left else "x"}), "m", (1,), meta={"finish": "ok"})
            for request in requests
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("constrain", "kinds"),
    [(None, {"json"}), ("auto", {"json", "label", "pattern"}), (True, {"json", "label", "pattern"}), (False, set())],
)
def test_what_is_held(constrain, kinds):
    for kind, form in FORMS.items():
        if kind == "text" and constrain is True:
            assert "any text is read as text" in refused(constrain=True)
            continue
        forms, _, _ = held(asking(parse=form, constrain=constrain, retries=0))
        assert all((found is not None) == (kind in kinds) for found in forms) and len(forms) == 3
        if kind in kinds:
            assert set(forms) == {asking(parse=form).parse.form}


def test_the_schema_is_text_in_its_own_order():
    assert list(json.loads(asking(parse={"json": FACTS}).parse.form.schema)["properties"]) == ["z", "a"]


def test_a_teacher_that_can_t_be_held_is_asked_freely_and_that_is_said_once():
    step = asking(parse={"json": FACTS}, retries=2)
    forms, _, tally = held(step, unheld=lambda form: "it has no llguidance")
    assert forms == [None] * 9
    assert tally.notes == ["answers are not held to their form: it has no llguidance"]
    assert _summary(tally).endswith("; answers are not held to their form: it has no llguidance")
    assert _facts(tally)["notes"] == tally.notes and "notes" not in _facts(Tally("x"))
    assert "asked_in_form" not in tally.facts


def test_answers_that_ignore_their_form_are_counted_and_told():
    replies = ['{"z": "y"}', 'Here: {"z": "y"}', '{"a": 1}', '{"z": "x"}']
    _, pool, tally = held(asking(parse={"json": FACTS}, retries=1), replies)
    assert tally.facts == {"asked_in_form": 4, "outside_form": 2, "asked_again": 1}
    assert tally.notes == ["the writer ignores the form of answers: 2 of 4 don't keep to it"]
    assert len(pool) == 3, "what can be read is read, the rest is asked again"
    _, _, whole = held(asking(parse=COLOURS, constrain=True), ["red", " dark red", "blue"])
    assert whole.facts == {"asked_in_form": 3, "outside_form": 0} and not whole.notes


@pytest.mark.parametrize(
    ("form", "keeps", "breaks"),
    [
        ({"json": FACTS}, ['{"z": "y"}', ' {"a": 2, "z": ""}\n'], ["```json\n{\"z\": 1}\n```", '{"z": 1}', "{", '{"z": "y"} x', "NaN"]),
        (COLOURS, ["red", " dark red\n"], ["Red", "It is red.", "red blue", ""]),
        (PATTERN, ["Grade: 4"], ["Grade: 4.", "So: Grade: 4", ""]),
    ],
)  # fmt: skip
def test_what_keeps_to_a_form(form, keeps, breaks):
    parsing = asking(parse=form).parse
    assert all(map(parsing.keeps_to_form, keeps)) and not any(map(parsing.keeps_to_form, breaks))


def test_a_slow_pattern_is_no_form_that_is_kept():
    assert not asking(parse={"pattern": "((a|aa)+)$"}).parse.keeps_to_form("a" * 200 + "b")


@pytest.mark.parametrize("words", ["maybe", 3])
def test_other_words_are_refused(words):
    assert "elicit[0].ask.constrain" in refused(constrain=words)


def elicits(recipe_data, **settings):
    steps = [{"ask": {"prompt": "{{ prompt }}", "max_tokens": 8} | settings}]
    return parse(recipe_data | {"elicit": steps, "writer": [{"by": "elicited"}]})


def test_check_refuses_what_the_teacher_can_t_be_held_to(recipe_data, monkeypatch):
    monkeypatch.setattr(constrain, "find_spec", lambda name: None)
    check(elicits(recipe_data, parse={"json": FACTS}, constrain="auto"))
    with pytest.raises(
        RecipeError, match=r"^elicit\[0\]\.ask\.constrain: .*pip install 'limbeck\[constrain\]'; or leave"
    ):
        check(elicits(recipe_data, parse={"json": FACTS}, constrain=True))
    served = recipe_data | {
        "teacher": {"model": recipe_data["teacher"], "server": {"url": "http://127.0.0.1:9/v1", "name": "m", "kind": "openai"}}
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"ask\.constrain: OpenAI can't be held to one of some labels; or leave"):
        check(elicits(served, parse=COLOURS, constrain=True))


def test_older_recipes_keep_their_hashes_and_their_requests():
    recipe = load_recipe("classify-with-a-prompt")
    assert "constrain" not in json.dumps(recipe.resolved())
    ((_, step),) = steps_of(recipe.elicit)
    assert set(held(step)[0]) == {None}
