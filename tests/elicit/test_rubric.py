"""Rubrics and referees: criteria that are met or not, prompts that are hard or easy, and what can't be read of either."""

from __future__ import annotations

import re

import pytest

from limbeck.elicit.flow import Reader, unjudged, with_answer
from limbeck.elicit.pairs import PreferencePairs, RankedLists
from limbeck.elicit.ratings import TOO_LONG, UNREADABLE
from limbeck.elicit.referee import Referee
from limbeck.elicit.rubric import MET, NOT_MET, Rubric, read_criteria, read_met
from limbeck.elicit.select import Top
from limbeck.types import RecipeError, Sample
from tests.elicit.test_feedback import candidates
from tests.flow_driver import answers, drive, texts


def said(text, finish="ok"):
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": text})
    return Sample(messages, "judge", meta={"finish": finish})


READ = {
    "MET: YES": MET, "Because.\n**Met: no.**": NOT_MET, "yes": MET, "No.": NOT_MET, "**YES**": MET,
    "MET: YES\nMET: NO": UNREADABLE, "MET: YES\nas I said": UNREADABLE, "yes, mostly": UNREADABLE, "MET: PARTLY": UNREADABLE,
    "": UNREADABLE, "<think>MET: YES": UNREADABLE, "<think>no</think>MET: YES": MET, "1": UNREADABLE, "REVISE: YES": UNREADABLE,
}  # fmt: skip


def test_a_verdict_on_a_criterion_is_read_strictly():
    assert {text: read_met(said(text)) for text in READ} == READ
    assert read_met(said("MET: YES", "length")) == UNREADABLE


def test_criteria_are_read_from_a_numbered_list_alone():
    assert read_criteria(said("1. Is short.\n2) **Is true.**\n3. Is short.\n4. Is kind."), 3) == [
        "Is short.", "Is true.", "Is kind.",
    ]  # fmt: skip
    assert read_criteria(said("1. a\n2. b\n3. c"), 2) == ["a", "b"]
    assert read_criteria(said("Be short, and be true."), 3) == [] == read_criteria(said("1. a", "length"), 3)


def judge_of(truth, criteria="1. Has an x.\n2. Has a y.\n3. Has a z."):
    """Writes these criteria, and holds an answer to the letter that each names, unless `truth` says otherwise."""

    def reply(request, _):
        text = request.messages[-1]["content"]
        if text.endswith("Criteria:"):
            return criteria
        answer, letter = re.search(r"Answer:\n\| (\w*)\n\nCriterion:\n\| Has an? (\w)", text).groups()
        return truth.get((answer, letter), f"MET: {'YES' if letter in answer else 'NO'}")

    return reply


def test_the_score_is_the_share_of_criteria_that_are_met():
    pool = candidates(("why", "xyz", "xy", "none"), ("who", "z"))
    judged, tally, asked = drive(Rubric(by="judge", author="author"), pool, judge_of({}))
    assert [sample.meta["scores"]["rubric"] for sample in judged] == [1, 2 / 3, 0, 1 / 3]
    assert [request.model for request in asked] == ["author@1"] * 2 + ["judge@1"] * 12, "criteria once for each prompt"
    assert judged[1].meta["rubric"] == {"Has an x.": MET, "Has a y.": MET, "Has a z.": NOT_MET}
    assert (
        judged[3].meta["criteria"] == ["Has an x.", "Has a y.", "Has a z."] and judged[0].meta["rubric_by"] == "judge"
    )
    assert len(judged[0].parents) == 1 + 3, "the reply with the criteria, and one for each verdict"
    assert tally.facts == {
        "prompts_without_criteria": 0, "of_its_own_answers": 0, "verdicts": 12, "mean_share_met": pytest.approx(0.5),
    }  # fmt: skip
    pairs, _, _ = drive(PreferencePairs(score="rubric"), judged)
    assert texts(pairs) == [("why", "xyz"), ("why", "none")] and pairs[0].meta["margin"] == 1
    assert [s.meta["place"] for s in drive(RankedLists(score="rubric"), judged)[0]] == [0, 1, 2]
    assert texts(drive(Top(score="rubric", least=0.5), judged)[0]) == [("why", "xyz"), ("why", "xy")]


def test_the_recipe_can_give_the_criteria_and_then_nobody_writes_any():
    step = Rubric(criteria=["Has an x.", "Has a y."], author="author")
    judged, _, asked = drive(step, candidates(("why", "x", "xy", "z")), judge_of({}))
    assert step.asks() == ("teacher",) and len(asked) == 6 and {request.model for request in asked} == {"writer"}
    assert Rubric().asks() == ("teacher",) and Rubric(by="a", author="b").asks() == ("a", "b")
    assert [sample.meta["scores"]["rubric"] for sample in judged] == [0.5, 1, 0]


def test_a_verdict_that_cannot_be_read_is_a_value_and_gives_no_score():
    pool = candidates(("why", "xyz", "xy"))
    judged, tally, asked = drive(Rubric(retries=3), pool, judge_of({("xy", "z"): "hard to say"}))
    assert judged[0].meta["scores"] == {"rubric": 1} and not judged[1].meta["scores"]
    assert judged[1].meta["rubric"]["Has a z."] == UNREADABLE and tally.facts["unreadable"] == 1
    assert len(asked) == 1 + 6 + 3 and tally.facts["asked_again"] == 3 and asked[-1].sampling.temperature > 0
    assert len({request.key for request in asked}) == len(asked)
    assert drive(PreferencePairs(score="rubric"), judged)[1].dropped["no score rubric"] == 1

    no_list, tally, asked = drive(Rubric(retries=1), pool, judge_of({}, criteria="Be good."))
    assert (
        len(asked) == 2
        and tally.facts["prompts_without_criteria"] == 1
        and "no criteria could be read" in tally.notes[0]
    )
    assert [s.meta["rubric"] for s in no_list] == [{}, {}] and not any(s.meta["scores"] for s in no_list)
    mute = drive(Rubric(criteria=["Has an x."], retries=0), pool, lambda *_: ("MET: YES", "length"))[1]
    assert mute.facts["unreadable"] == 2 and "this model can't judge so" in mute.notes[0]
    flat = drive(Rubric(criteria=["Has an x."]), pool, lambda *_: "yes")[1]
    assert "they tell no answer from another" in flat.notes[0]
    long, tally, asked = drive(Rubric(criteria=["Is short."]), pool, reader=Reader(fits=lambda *_: False))
    assert not asked and long[0].meta["rubric"] == {"Is short.": TOO_LONG} and tally.facts["too_long"] == 2


def test_a_rubrics_judge_is_held_to_its_verdict_and_shown_data():
    form = Reader(unheld=lambda form: "")
    pool = answers(("why\n\nCriterion:\nbe nice", "x\n\nMET: YES"))
    ask_of = lambda request, _: "MET: NO"  # noqa: E731
    held = drive(Rubric(criteria=["Has an x."]), pool, ask_of, reader=form)[2]
    assert held[0].form is not None and held[0].form.labels == ("MET: YES", "MET: NO")
    assert "| Criterion:\n| be nice" in held[0].messages[-1]["content"]
    assert "\n| MET: YES\n" in held[0].messages[-1]["content"]
    free = drive(Rubric(criteria=["Has an x."], reasons=True), pool, ask_of, reader=form)[2]
    assert free[0].form is None and "Say why" in free[0].messages[-1]["content"]


def test_criteria_that_say_nothing_are_refused():
    for criteria in (["a", "a "], [" "], []):
        with pytest.raises(ValueError):
            Rubric(criteria=criteria)


def test_what_was_judged_is_forgotten_with_the_answer():
    judged, _, _ = drive(Rubric(criteria=["Has an x."]), candidates(("why", "x", "y")), judge_of({}))
    assert not {"rubric", "rubric_by", "scores"} & unjudged(judged[0]).meta.keys()
    assert with_answer(judged[0], said("z")).meta["criteria"] == ["Has an x."]


# Referees


def matches(*groups, names=("teacher", "untouched")):
    """Answers to each prompt by the models of these names."""
    return [
        Sample(sample.messages, f"{name}@1", meta=sample.meta | {"by": name, "prompt_id": prompt})
        for prompt, *answered in groups
        for name, sample in zip(names, answers(*((prompt, text) for text in answered)), strict=False)
    ]


def points(worth, bias=0):
    """A referee that gives each answer its worth, and the first one `bias` more."""

    def reply(request, _):
        one, two = re.findall(r"Answer \d:\n\| (\w+)", request.messages[-1]["content"])
        return f"So.\nRATING 1: {worth[one] + bias}\nRATING 2: {worth[two]}"

    return reply


WORTH = {"best": 8, "good": 7, "fair": 6, "bad": 2}
POOL = (("a", "best", "bad"), ("b", "good", "fair"), ("c", "good", "good"), ("d", "bad", "best"))


def test_a_prompt_is_hard_where_the_teacher_leads_by_the_threshold_in_both_orders_on_average():
    tagged, tally, asked = drive(Referee(by="judge"), matches(*POOL), points(WORTH))
    assert [(s.meta["level"], s.meta["scores"]["lead"]) for s in tagged] == [
        ("hard", 6), ("hard", 1), ("easy", 0), ("easy", -6),
    ]  # fmt: skip
    assert texts(tagged) == [("a", "best"), ("b", "good"), ("c", "good"), ("d", "bad")], "the teacher's answers"
    assert [s.meta["attempt"] for s in tagged] == ["bad", "fair", "good", "best"] and len(asked) == 8
    assert tally.facts == {
        "hard": 2, "easy": 2, "unreadable": 0, "of_its_own_answers": 0, "mean_lead": 0.25, "swap_consistency": 1,
        "lead_of_the_first": 0,
    }  # fmt: skip
    biased, tally, _ = drive(Referee(), matches(*POOL), points(WORTH, bias=2))
    assert [s.meta["level"] for s in biased] == ["hard", "hard", "easy", "easy"], (
        "a bias is taken out by the two orders"
    )
    assert tally.facts["lead_of_the_first"] == 2 and tally.facts["swap_consistency"] == 0.5
    assert [s.meta["level"] for s in drive(Referee(threshold=1.5), matches(*POOL), points(WORTH))[0]] == [
        "hard", "easy", "easy", "easy",
    ]  # fmt: skip
    assert drive(Referee(threshold=7), matches(*POOL), points(WORTH))[1].notes[0].startswith("every prompt is easy")


def test_points_that_cannot_be_read_make_a_prompt_neither_hard_nor_easy():
    def mute(request, n):
        return "RATING 1: 8" if "| bad" in request.messages[-1]["content"] else points(WORTH)(request, n)

    tagged, tally, asked = drive(Referee(retries=1), matches(*POOL), mute)
    assert [s.meta["prompt_id"] for s in tagged] == ["b", "c"] and tally.facts["unreadable"] == 2
    assert tally.dropped == {"its points can't be read": 2} and len(asked) == 8 + 4 and tally.facts["asked_again"] == 4
    none, tally, _ = drive(Referee(retries=0), matches(*POOL), lambda *_: "fine")
    assert none == [] and "this model can't judge so" in tally.notes[0]
    lone, tally, asked = drive(Referee(), matches(("a", "best")))
    assert lone == [] == asked and tally.dropped == {"no answer of untouched": 1}
    assert drive(Referee(), matches(*POOL), reader=Reader(fits=lambda *_: False))[1].dropped == {TOO_LONG: 4}


def test_a_referee_that_divides_nothing_is_refused():
    with pytest.raises(RecipeError, match=re.escape("by: [teacher, untouched]")):
        Referee().refuse("elicit[1].referee", frozenset({"scores"}), None)
    Referee().refuse("elicit[1].referee", frozenset({"by"}), None)
    for wrong in ({"threshold": 10}, {"scale": (5, 1)}, {"student": "teacher"}):
        with pytest.raises(ValueError):
            Referee(**wrong)
