"""Selection, verification, votes and scores: every reason to go, and the samples that stay."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
from pydantic import ValidationError

from limbeck.elicit.answer import AnswerPrompts
from limbeck.elicit.flow import with_scores
from limbeck.elicit.merit import DIGITS, Deita, DifferenceSampling, Difficulty, InstructionFollowingDifficulty, expected
from limbeck.elicit.select import (
    Bins,
    Deduplicate,
    Diverse,
    Length,
    Limit,
    Novel,
    Refusals,
    Repetitive,
    Script,
    Top,
    Without,
)
from limbeck.elicit.steps import check_steps
from limbeck.elicit.verified import BestOf, Verify, Vote, final_answer
from limbeck.types import LogProb, RecipeError
from tests.flow_driver import answers, drive, prompts, texts


def with_meta(sample, **meta):
    return replace(sample, meta=sample.meta | meta)


def kept(step, pool):
    found, tally, asked = drive(step, pool)
    assert not asked and tally.taken == tally.given + sum(tally.dropped.values())
    return [answer for _, answer in texts(found)], dict(tally.dropped)


def test_novelty_is_against_what_was_kept_before():
    pool = answers(("name three red fruits", "a"), ("name three red fruits now", "b"), ("tell me a joke", "c"))
    assert kept(Novel(), pool) == (["a", "c"], {"like an earlier one": 1})
    assert kept(Novel(of="answer"), answers(("x", "one two three"), ("y", "one two three")))[0] == ["one two three"]


def test_equal_texts_and_near_duplicates():
    long = " ".join(f"w{n}" for n in range(60))
    pool = answers(("a", long), ("a", f"{long} end"), ("a", long.upper()), ("b", "other words"))
    assert kept(Deduplicate(of="answer"), pool) == ([long, "other words"], {"a near-duplicate": 1, "the same text": 1})


def test_lengths_scripts_and_words():
    pool = answers(("p", "one"), ("p", "one two three"), ("p", "a b c d e"))
    assert kept(Length(least=2, most=4), pool) == (["one two three"], {"too short": 1, "too long": 1})
    with pytest.raises(ValidationError, match="more than most"):
        Length(least=5, most=2)
    pool = answers(("p", "hello wörld"), ("p", "привет мир"), ("p", "123"))
    assert kept(Script(of="answer"), pool) == (["hello wörld"], {"another script": 1, "no letters": 1})
    pool = answers(("p", "draw a cat"), ("p", "a drawer"), ("p", "DRAW!"))
    assert kept(Without(words=["draw"]), pool) == (["a drawer"], {"holds 'draw'": 2})


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I’m sorry, I cannot do this", True), ("As an AI language model, I", True),
        ("Unfortunately, I can't", True), ("I cannot provide that", True), ("Sorry is a word of regret.", False),
        ("I can tell you that 3 + 4 is 7.", False), ("As an example, take 3.", False), ("He said: I'm sorry.", False), ("", False),
    ],
)  # fmt: skip
def test_refusals_are_told_by_how_an_answer_opens(answer, declines):
    assert kept(Refusals(), answers(("p", answer)))[1] == ({"declines": 1} if declines else {})


def test_repetition():
    pool = answers(("p", "a b c d " * 5), ("p", "a b c d e f g h"), ("p", "short"))
    assert kept(Repetitive(), pool) == (["a b c d e f g h", "short"], {"repeats itself": 1})


def test_limits_and_diversity():
    pool = answers(*[("p", str(n)) for n in range(9)])
    assert kept(Limit(count=2), pool)[0] == ["0", "1"]
    drawn = kept(Limit(count=4, how="random"), pool)[0]
    assert (
        len(drawn) == 4
        and drawn == sorted(drawn) != ["0", "1", "2", "3"]
        and drawn == kept(Limit(count=4, how="random"), pool)[0]
    )
    assert kept(Limit(count=99, how="random"), pool)[1] == {}
    pool = answers(("p", "red cat"), ("p", "red cat here"), ("p", "blue dog"))
    assert kept(Diverse(count=2, of="answer"), pool) == (["red cat", "blue dog"], {"near one that is kept": 1})


def rated(*values, name="s"):
    pool = answers(*[("p", str(n)) for n in range(len(values))])
    return [
        sample if value is None else with_scores(sample, **{name: value})
        for sample, value in zip(pool, values, strict=True)
    ]


def test_the_best_by_a_score():
    pool = rated(3.0, 1.0, None, 2.0)
    assert kept(Top(score="s", count=2), pool) == (["0", "3"], {"no score s": 1, "not among the best": 1})
    assert kept(Top(score="s", share=0.34, lowest=True), pool)[0] == ["1"]
    assert kept(Top(score="s", least=1.5, most=2.5), pool)[0] == ["3"]
    for wrong in ({}, {"count": 1, "share": 0.5}):
        with pytest.raises(ValidationError):
            Top(score="s", **wrong)
    assert kept(Bins(score="s", bins=2, count=1), rated(0.1, 0.2, 0.3, 0.4, None))[0] == ["0", "2"]
    pool = rated(1.0, 3.0, 3.0, None)
    pool = [type(sample)(sample.messages, sample.writer, meta=sample.meta | {"prompt_id": "q"}) for sample in pool]
    assert kept(BestOf(score="s"), pool) == (["1"], {"not among the best": 2, "no score s": 1})


def test_verdicts_of_checks_and_of_given_answers():
    pool = answers(("p", "it is 4"), ("p", "it is 5"), check={"type": "number", "answer": 4})
    found, tally, _ = drive(Verify(), pool)
    assert [sample.meta["scores"] for sample in found] == [{"verified": 1.0}] and tally.dropped == {"check: number": 1}
    assert tally.facts == {"pass_rate": 0.5}
    pool = answers(("p", "#### 1,000"), ("p", "999"), answers=["so 1000 it is"])
    assert kept(Verify(against="number"), pool) == (["#### 1,000"], {"check: given answer, by number": 1})
    bare = [*answers(("p", "x")), *prompts("q")]
    assert kept(Verify(), bare) == ([], {"nothing to check it by": 1, "no answer": 1})
    assert kept(Verify(unchecked="keep"), bare) == (["x"], {"no answer": 1})


@pytest.mark.parametrize(("settings", "refused"), [({"n": 5}, True), ({"n": 5, "all": True}, False), ({}, False)])
def test_a_vote_over_answers_of_which_equal_ones_are_one_is_refused(settings, refused):
    steps = [("answer", AnswerPrompts(**settings)), ("vote", Vote())]
    with pytest.raises(RecipeError, match="all: true") if refused else nullcontext():
        check_steps(steps, prompts("a"))


def test_the_majority_needs_no_gold():
    pool = answers(("p", "so 4"), ("p", "it's 4.0"), ("p", "5"), ("p", "none"))
    pool = [type(sample)(sample.messages, sample.writer, meta={"prompt_id": "q"}) for sample in pool]
    found, tally, _ = drive(Vote(), pool)
    assert [answer for _, answer in texts(found)] == ["so 4", "it's 4.0"] and found[0].meta["scores"] == {
        "agreement": 0.5
    }
    assert tally.dropped == {"outvoted": 1, "no final answer": 1}
    assert kept(Vote(keep="first"), pool)[0] == ["so 4"] and kept(Vote(least=0.6), pool)[1]["too little agreement"] == 2
    assert final_answer(with_meta(pool[0], finish="length"), "number") is None
    tied = [
        type(sample)(sample.messages, sample.writer, meta={"prompt_id": "q"})
        for sample in answers(("p", "2"), ("p", "1"))
    ]
    assert kept(Vote(keep="first"), tied)[0] == ["2"]


@pytest.mark.parametrize(
    ("text", "rule", "final"),
    [
        ("7 then 1,234.50", "number", "1234.5"), ("nothing", "number", None), ("A or B? The answer is (C).", "choice", "C"),
        ("I think it's B", "choice", "B"), ("The answer is B, since A is too small and C is too large.", "choice", "B"), ("The answer is B. I would go with that", "choice", "B"),
        ("a long way", "choice", None), (" Blue, sky! ", "exact", "blue sky"), ("...", "exact", None),
    ],
)  # fmt: skip
def test_what_an_answer_comes_to(text, rule, final):
    assert final_answer(answers(("p", text))[0], rule) == final


def test_the_difference_keeps_what_the_scoring_model_alone_foresees():
    """Three kinds of text: noise (bad for both), boilerplate (good for both), and what only the large model knows."""
    nats = {
        "xq zv kw": (-30.0, -31.0),
        "see above": (-2.0, -2.5),
        "the Rhine": (-3.0, -20.0),
        "Marie Curie": (-2.0, -30.0),
    }
    pool = answers(*((f"question {n}", text) for n, text in enumerate(nats)), ("question 9", " "))

    def score(question):
        return nats[question.answer][question.model == "small"]

    found, tally, _ = drive(DifferenceSampling(reference="small", share=0.5), pool, score=score)
    assert [text for _, text in texts(found)] == ["the Rhine", "Marie Curie"]
    assert tally.dropped == {"no answer": 1, "the reference finds it as likely": 2}
    assert found[0].meta["scores"]["difference"] == pytest.approx((20 - 3) / len("the Rhine"))
    shifted, _, _ = drive(
        DifferenceSampling(reference="small", share=0.5), pool, score=lambda one: score(one) - 0.3 * len(one.answer)
    )
    assert texts(shifted) == texts(found), "as much worse for both, and the same is chosen"
    everything, _, _ = drive(DifferenceSampling(share=1.0), pool, score=score)
    assert len(everything) == 4


def test_ifd_is_the_ratio_of_both_perplexities():
    pool = answers(("easy", "one two"), ("useless", "three four"), ("hard", "five six"), ("empty", " "))
    after = {"one two": -2.0, "three four": -6.0, "five six": -3.8}

    def score(question):
        return LogProb(after[question.answer] if question.messages else -4.0, 2)

    found, tally, _ = drive(InstructionFollowingDifficulty(share=0.5), pool, score=score)
    assert texts(found) == [("hard", "five six")] and tally.dropped == {
        "no answer": 1, "the prompt does not help with the answer": 1, "the prompt helps too much": 1,
    }  # fmt: skip
    assert found[0].meta["scores"]["ifd"] == pytest.approx(math.exp(1.9) / math.exp(2.0))
    found, _, _ = drive(Difficulty(), pool[:1], score=score)
    assert found[0].meta["scores"] == {"difficulty": 1.0}


def test_deita_takes_complex_good_and_different_samples():
    pool = answers(
        ("hard red", "good answer"),
        ("hard red", "good answer"),
        ("hard blue", "bad text"),
        ("easy green", "good words"),
    )

    def score(question):
        text, digit = question.messages[0]["content"], int(question.answer)
        best = (
            (6 if "hard" in text else 1) if "Complexity:" in text else (6 if "good" in text.split("Answer: ")[1] else 2)
        )
        return LogProb(-10.0 * abs(digit - best), 1)

    found, tally, _ = drive(Deita(count=2), pool, score=score)
    assert texts(found) == [("hard red", "good answer"), ("hard blue", "bad text")]
    assert tally.dropped == {"like a better one": 1, "enough samples": 1}
    assert found[0].meta["scores"]["deita"] == pytest.approx(36, abs=0.1) and found[1].meta["scores"][
        "quality"
    ] == pytest.approx(2, abs=0.1)
    assert (
        expected([math.log(1 / 6)] * 6) == pytest.approx(3.5)
        and expected([-1000.0, -1000.0]) == 1.5
        and len(DIGITS) == 6
    )
