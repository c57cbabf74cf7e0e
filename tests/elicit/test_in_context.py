"""How much an answer helps as an example (ARTE), and prompts that a template makes of samples."""

from __future__ import annotations

import pytest

from limbeck.elicit.ask import Ask
from limbeck.elicit.flow import Reader
from limbeck.elicit.frame import NewPrompt
from limbeck.elicit.in_context import InContext
from limbeck.elicit.pairs import PreferencePairs
from limbeck.types import LogProb, RecipeError
from tests.flow_driver import answers, drive, prompts, texts

GIVEN = [
    prompt
    for number, right in enumerate((4, 9, 16))
    for prompt in prompts(
        f"What is {number + 2} squared?", answers=[f"It is {right}."], check={"type": "number", "answer": right}
    )
]
DRAFTS = answers(("Say it.", "a good one"), ("Say it.", "a bad one"))


def content(messages):
    return [message["content"] for message in messages]


def test_an_answer_helps_by_how_much_likelier_the_right_answers_are_after_it():
    """The mean over the probes of the gain in nats per token, each against the same probe without an example."""
    asked = []

    def score(question):
        asked.append(question)
        example = question.messages[1]["content"] if len(question.messages) > 1 else ""
        square = float(question.answer.removeprefix("It is ").rstrip("."))
        return LogProb({"": -2 * square, "a good one": -square, "a bad one": -3 * square}[example], 4)

    step = InContext(by="student", probes=9)
    rated, tally, requests = drive(step, DRAFTS, score=score, given=GIVEN)
    assert [sample.meta["scores"]["helps"] for sample in rated] == pytest.approx([29 / 3 / 4, -29 / 3 / 4], abs=1e-12)
    assert not requests and {question.model for question in asked} == {"student"} and len(asked) == 3 + 2 * 3
    assert content(asked[3].messages)[:2] == ["Say it.", "a good one"]
    assert [message["role"] for message in asked[3].messages] == ["user", "assistant", "user"]
    assert tally.facts["probes"] == 3 and tally.facts["that_help"] == 1
    assert tally.facts["without_an_example"] == pytest.approx(-29 / 3 * 2 / 4)
    chosen, rejected = drive(PreferencePairs(score="helps"), rated)[0]
    assert texts([chosen, rejected]) == [("Say it.", "a good one"), ("Say it.", "a bad one")]


def test_by_accuracy_a_probe_is_right_by_its_check_and_a_lost_answer_counts_for_nothing():
    def reply(request, _):
        said = content(request.messages)
        number = int(said[-1].split()[2])
        if said[0] == "Say it." and said[1] == "a good one":
            return f"It is {number**2}."
        if said[0] == "Say it.":
            return ("", "error") if number == 2 else "I don't know."
        return f"It is {number**2}." if number == 3 else "I don't know."

    step = InContext(by="student", probes=3, measure="accuracy")
    rated, tally, requests = drive(step, DRAFTS, reply, given=GIVEN)
    assert [sample.meta["scores"]["helps"] for sample in rated] == pytest.approx([2 / 3, -1 / 2])
    assert {request.model for request in requests} == {"student@1"} and tally.facts["without_an_example"] == 1 / 3
    assert all(request.sampling.temperature == 0 for request in requests)
    lost, tally, _ = drive(step, DRAFTS[:1], lambda *_: ("", "error"), given=GIVEN)
    assert not lost and tally.dropped == {"no answer to any probe": 1}


def test_a_draft_of_a_question_is_answered_by_its_author_first():
    """Of drafts of a task, and answers of another, in one pool; an author's answer that is cut off makes no example."""
    pool = [*answers(("Ask!", "Why?"), ("Ask!", "Long?"), task="question"), *DRAFTS[:1]]
    scored = []

    def reply(request, _):
        assert request.model == "author@1"
        return ("Because", "length") if request.messages[0]["content"] == "Long?" else "Therefore."

    def score(question):
        scored.append(content(question.messages)[:-1])
        return -1.0

    step = InContext(by="student", author="author", questions="question", probes=2)
    rated, tally, asked = drive(step, pool, reply, score, given=GIVEN)
    assert [content(request.messages) for request in asked] == [["Why?"], ["Long?"]]
    assert texts(rated) == [("Ask!", "Why?"), ("Say it.", "a good one")] and tally.dropped == {"answer: length": 1}
    assert scored == [[], [], *[["Why?", "Therefore."]] * 2, *[["Say it.", "a good one"]] * 2]
    assert step.asks() == ("student", "author")
    assert step.demands_of("student") == {"text", "log_probs"} and step.demands_of("author") == {"text"}


def test_a_probe_that_stands_in_the_sample_itself_tells_nothing():
    scored = []
    copied = answers(
        (f"Like this: {GIVEN[0].messages[0]['content']}", "one"), ("Say it.", GIVEN[1].messages[0]["content"])
    )
    rated, _, _ = drive(
        InContext(by="student", probes=3), copied, score=lambda q: scored.append(q) or -1.0, given=GIVEN
    )
    of_each = [content(question.messages)[2] for question in scored[3:]]
    assert len(rated) == 2 and len(of_each) == 4
    assert GIVEN[0].messages[0]["content"] not in of_each[:2] and GIVEN[1].messages[0]["content"] not in of_each[2:]
    none, tally, _ = drive(InContext(probes=1), copied[:1], score=lambda _: -1.0, given=GIVEN[:1])
    assert not none and tally.dropped == {"all probes stand in it": 1}
    crowded = Reader(fits=lambda messages, tokens: len(messages) == 1)
    none, tally, _ = drive(InContext(probes=3), DRAFTS, score=lambda _: -1.0, given=GIVEN, reader=crowded)
    assert not none and tally.dropped == {"too long to be shown": 2}


def test_what_the_step_can_not_be_is_refused():
    with pytest.raises(ValueError, match="drafts of questions need an author"):
        InContext(questions="question")
    with pytest.raises(ValueError, match="set measure: accuracy"):
        InContext(against="number")
    plain = prompts("What is it?")
    with pytest.raises(RecipeError, match=r"elicit\[2\].in_context: no prompt has an answer beside it"):
        InContext().refuse_prompts("elicit[2].in_context", plain)
    with pytest.raises(RecipeError, match="no prompt has a check beside it"):
        InContext(measure="accuracy").refuse_prompts("elicit[2].in_context", prompts("What?", answers=["So."]))
    InContext(measure="accuracy", against="number").refuse_prompts("x", prompts("What?", answers=["4"]))


def test_a_template_makes_a_prompt_that_the_student_sees():
    pool = answers(("What is 2 squared?", "It is 4."), check={"type": "number", "answer": 4}, answers=["4"], kind="sum")
    (new,), tally, _ = drive(NewPrompt(prompt="One more like this:\n{{ prompt }} ({{ kind }})", task="question"), pool)
    assert texts([new]) == [("One more like this:\nWhat is 2 squared? (sum)", None)]
    assert new.meta["task"] == "question" and "check" not in new.meta and "answers" not in new.meta
    assert new.parents == (pool[0].id,) and new.meta["prompt_id"] != pool[0].meta["prompt_id"]
    both, _, _ = drive(NewPrompt(prompt="{{ answer }} Is that right?", keep_answer=True, add=True), pool)
    assert texts(both) == [("What is 2 squared?", "It is 4."), ("It is 4. Is that right?", "It is 4.")]
    none, tally, _ = drive(NewPrompt(prompt="{{ answer }}!", keep_answer=True), prompts("What?"))
    assert not none and sum(tally.dropped.values()) == 1
    with pytest.raises(RecipeError, match=r"at.prompt: there is no field 'promt'; did you mean 'prompt'"):
        NewPrompt(prompt="{{ promt }}").refuse("at", frozenset(), pool)


def test_a_named_model_is_asked_what_a_template_says():
    (sample,), _, asked = drive(
        Ask(by="tutor", prompt="Another like {{ prompt }}", into="prompt"), prompts("this"), lambda *_: "that"
    )
    assert asked[0].model == "tutor@1" and texts([sample]) == [("that", None)]
    assert (
        Ask(by="tutor", prompt="{{ prompt }}").asks() == ("tutor",)
        and Ask(by="tutor", prompt="{{ prompt }}").shows() is None
    )
