"""STaR's rationalisation and RFT's distinct paths."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from limbeck.elicit.rationalise import Rationalise, right_answer
from limbeck.elicit.transform import DistinctPaths, equations_of
from tests.flow_driver import answers, drive, prompts, texts

SEVEN = {"type": "number", "answer": 7}


def test_only_unsolved_prompts_are_asked_again_and_learnt_without_the_hint():
    pool = answers(("a?", "it is 7"), ("b?", "it is 8"), ("c?", "9"), ("d?", "7 7"), check=SEVEN)
    pool = [replace(s, meta=s.meta | {"prompt_id": p}) for s, p in zip(pool, "abcb", strict=True)]
    said = iter(["So 3 + 4 = 7. The answer is 7."])
    left, tally, requests = drive(Rationalise(), pool, lambda *_: next(said))
    assert [request.messages[-1]["content"].partition("\n")[0] for request in requests] == ["c?"]
    assert "The right answer is 7." in requests[0].messages[-1]["content"]
    assert texts(left)[:2] == texts([pool[0], pool[3]]), "right answers pass, one of b's two"
    new = left[-1]
    assert [message["content"] for message in new.messages] == ["c?", "So 3 + 4 = 7. The answer is 7."]
    assert new.meta["rationalised"] and new.meta["scores"]["verified"] == 1.0 and new.meta["prompt_id"] == "c"
    assert tally.dropped == {"wrong": 2}
    assert tally.facts == {"prompts_solved": 2, "prompts_asked_again": 1, "prompts_solved_with_the_hint": 1}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("The answer is 8.", "wrong with the hint, too"),
        (("The answer is 7.", "length"), "answer: length"),
        (("", "empty"), "answer: empty"),
    ],
)
def test_what_the_hint_does_not_help_is_left_out(reply, reason):
    left, tally, _ = drive(Rationalise(), answers(("a?", "8"), check=SEVEN), lambda *_: reply)
    assert left == [] and tally.dropped == {"wrong": 1, reason: 1}


def test_a_prompt_without_a_right_answer_is_left_out_and_nothing_is_asked():
    left, tally, requests = drive(Rationalise(), answers(("a?", "8")))
    assert left == [] and not requests
    assert tally.dropped == {"no answer that can be checked": 1, "no right answer to give as a hint": 1}


def test_the_hint_is_the_checks_answer_or_the_corpuss():
    (bare,) = prompts("a?")
    for meta, right in [
        ({"check": SEVEN}, "7"),
        ({"check": {"type": "exact", "answer": ["yes", "y"]}}, "yes"),
        ({"check": {"type": "contains", "all": ["x"]}, "answers": ["So it is 3. The answer is 3."]}, "3"),
        ({"answers": ["Paris"]}, "Paris"),
        ({}, None),
    ]:
        assert right_answer(replace(bare, meta=bare.meta | meta)) == right
    for hint in ("no field", "{prompt} alone", "{prompt} {answer} {more}"):
        with pytest.raises(ValidationError, match="hint must hold"):
            Rationalise(hint=hint)


def test_one_answer_for_every_list_of_equations():
    pool = answers(
        ("a?", "First 3 x 4 = 12, then 12 + 1 = 13."),
        ("a?", "3 × 4 = 12 and so 12+1=13"),
        ("a?", "12 + 1 = 13, since 3 x 4 = 12"),
        ("a?", "It is 13."),
        ("a?", "Surely 13."),
        ("b?", "3 x 4 = 12. 12 + 1 = 13."),
    )
    pool = [replace(s, meta=s.meta | {"prompt_id": s.messages[0]["content"]}) for s in pool]
    left, tally, _ = drive(DistinctPaths(), pool)
    assert left == [pool[0], pool[2], pool[3], pool[5]] and tally.dropped == {"the same equations": 2}
    assert equations_of("$1,200 / 4 = $300, again 1200 ÷ 4 = 300") == ["1200/4=300"]
