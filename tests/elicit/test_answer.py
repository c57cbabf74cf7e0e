"""Labeling: answers, explanations, reasons in one call or two, different and contrastive ones; every question counted."""

from __future__ import annotations

import pytest

from limbeck.elicit.answer import EXPLAINING, AnswerPrompts, Explain
from limbeck.elicit.flow import with_scores
from limbeck.elicit.given import CorpusAnswers
from limbeck.elicit.rationale import CONCLUDE, Contrastive, DiverseRationales, Rationale, final_of
from tests.flow_driver import answers, drive, prompts, texts


def test_every_prompt_is_asked_n_times_and_equal_answers_are_kept_once():
    pool, tally, asked = drive(
        AnswerPrompts(n=3),
        prompts("a", "b"),
        lambda request, n: "same" if request.messages[-1]["content"] == "a" else str(n),
    )
    assert texts(pool) == [("a", "same"), ("b", "3"), ("b", "4"), ("b", "5")]
    assert len(asked) == len({request.key for request in asked}) == 6 and tally.dropped == {"the same answer again": 2}
    assert all(sample.response_ids == (1, 2) and sample.meta["prompt_id"] in ("p0", "p1") for sample in pool)


def test_what_is_not_whole_is_counted_by_what_became_of_it():
    finishes = ["ok", "length", "empty", "refused", "error"]
    pool, tally, _ = drive(AnswerPrompts(), prompts(*"abcde"), lambda request, n: ("text", finishes[n]))
    assert len(pool) == 1 and tally.dropped == {f"answer: {finish}": 1 for finish in finishes[1:]}
    assert tally.taken == tally.given + sum(tally.dropped.values())


def test_a_system_message_is_the_writers_alone_unless_it_is_kept():
    for keep in (False, True):
        (sample,), _, (request,) = drive(
            AnswerPrompts(system="Be brief.", keep_system=keep), prompts("a"), lambda *_: "x"
        )
        assert [m["role"] for m in request.messages] == ["system", "user"]
        assert [m["role"] for m in sample.messages] == (["system"] if keep else []) + ["user", "assistant"]


def test_explanations_draw_a_message_for_each_prompt_and_erase_it():
    pool, _, asked = drive(Explain(), prompts(*map(str, range(60))), lambda *_: "x")
    used = {request.messages[0]["content"] for request in asked}
    assert len(used) > 10 and used <= set(EXPLAINING) and len(set(EXPLAINING)) == 16
    assert all(sample.messages[0]["role"] == "user" for sample in pool)
    again = drive(Explain(), prompts(*map(str, range(60))), lambda *_: "x")
    assert [request.key for request in again[2]] == [request.key for request in asked] and again[0] == pool
    (kept,), _, _ = drive(Explain(keep_system=True), prompts("0"), lambda *_: "x")
    assert kept.messages[0]["role"] == "system"


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("So the answer is 12.", "12"), ("The answer is: **42**", "42"), ("Answer: blue\n", "blue"), ("The answer is \\(\\boxed{28}\\).", "28"), ("the final answer is $3.50.", "3.50"),
        ("The answer is 1. No, the answer is 2.", "2"), ("I don't know", None), ("The answer is", None), ("First \\boxed{1}, so each basket has \\(\\boxed{6}\\).", "6"), ("\\boxed{7} it seems. The answer is 8.", "8"), ("\\boxed{}", None), ("The answer is " + "x" * 300, None),
    ],
)  # fmt: skip
def test_the_final_answer_is_what_the_text_says_last(text, final):
    assert final_of(text) == final


def test_reasons_take_two_calls_a_question():
    def reply(request, n):
        return "2 and 2 make 4" if request.messages[-1]["content"] != CONCLUDE else "Therefore, the answer is 4."

    pool, tally, asked = drive(Rationale(n=2), prompts("2 + 2?", "1 + 3?"), reply)
    assert len(asked) == 8 and tally.dropped == {}
    assert texts(pool)[0] == ("2 + 2?", "2 and 2 make 4\n\nTherefore, the answer is 4.")
    assert (pool[0].meta["rationale"], pool[0].meta["final"], len(pool[0].parents)) == ("2 and 2 make 4", "4", 3)
    second = asked[4].messages
    assert [m["role"] for m in second] == ["user", "assistant", "user"] and second[0]["content"].endswith(
        "step by step."
    )
    assert Rationale(n=2).estimate(2).requests == 8


def test_reasons_in_one_call_end_in_an_answer_or_go():
    said = ["Three and one is four. The answer is 4.", "I can't say."]
    pool, tally, asked = drive(Rationale(calls=1), prompts("a", "b"), lambda request, n: said[n])
    assert len(asked) == 2 and len(pool) == 1 and tally.dropped == {"no answer at the end of the reasons": 1}
    assert (pool[0].meta["rationale"], pool[0].meta["final"]) == ("Three and one is four.", "4") and pool[
        0
    ].response_ids == (1, 2)


def test_different_right_rationales_are_kept():
    said = [
        "Take 3 away from 7. The answer is 4.", "Take 3 away from 7. The answer is 4.", "Half of eight. The answer is 4.", "The answer is 5.",
        "Count from three up to seven. The answer is 4.", "Add one to three apples. The answer is 4.",
    ]  # fmt: skip
    pool, tally, _ = drive(
        DiverseRationales(n=6, keep=3),
        prompts("7 - 3?", check={"type": "number", "answer": 4}),
        lambda request, n: said[n],
    )
    assert [sample.messages[-1]["content"] for sample in pool] == [said[0], said[2], said[4]]
    assert tally.dropped == {"too like another rationale": 1, "wrong answer": 1, "enough rationales": 1}


def test_contrast_explains_the_given_answer_against_another():
    pool = prompts("red or blue?", "cat or dog?")
    for sample, answer in zip(pool, ("blue", "cat"), strict=True):
        sample.meta["answers"] = [answer]
    found, tally, asked = drive(
        Contrastive(strength=0.25), [*pool, *prompts("no answer")], lambda request, n: f"because {n}"
    )
    assert tally.dropped == {"no answer is given": 1} and len(asked) == 4
    assert all(request.contrast == 0.25 and request.against != request.messages for request in asked)
    assert "Answer: blue" in asked[0].messages[0]["content"] and "Answer: cat" in asked[0].against[0]["content"]
    assert [bool(sample.meta.get("counterfactual")) for sample in found] == [False, True, False, True]
    assert texts(found)[0] == ("red or blue?", "because 0\n\nTherefore, the answer is blue.")
    plain, _, asked = drive(Contrastive(against="empty", counterfactual=False), pool, lambda *_: "so")
    assert len(plain) == len(asked) == 2 and asked[0].against[0]["content"].count("Answer: \n") == 1


def test_given_answers_are_the_corpus_own():
    pool = prompts("a", "b", "c")
    pool[0].meta["answers"], pool[1].meta["answers"] = ["x", "y"], ["z"]
    found, tally, asked = drive(CorpusAnswers(), pool)
    assert texts(found) == [("a", "x"), ("b", "z")] and not asked and tally.dropped == {"no answer is given": 1}
    assert {sample.writer for sample in found} == {"corpus"} and texts(drive(CorpusAnswers(answers=2), pool)[0])[
        :2
    ] == [
        ("a", "x"),
        ("a", "y"),
    ]


def test_new_answers_take_the_place_of_the_old_ones_and_of_what_was_said_of_them():
    pool = [
        with_scores(sample, rating=5.0, pass_rate=0.5)
        for sample in answers(("a", "old"), ("a", "older"), final="4", rationale="so 4")
    ]
    found, tally, asked = drive(AnswerPrompts(), pool, lambda *_: "new")
    assert texts(found) == [("a", "new")] and len(asked) == 1 and not tally.dropped
    assert found[0].meta == {"prompt_id": "p0", "finish": "ok", "scores": {"pass_rate": 0.5}}
    (waiting,), _, _ = drive(AnswerPrompts(), prompts("a", final="4"), lambda *_: "new")
    assert waiting.meta["final"] == "4"


def test_given_answers_that_were_cut_off_say_so():
    pool = prompts("a", answers=["x", "y"], cut=[1])
    assert [sample.meta["finish"] for sample in drive(CorpusAnswers(answers=2), pool)[0]] == ["ok", "length"]
