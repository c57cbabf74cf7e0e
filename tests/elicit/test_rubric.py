"""Rubrics, referees, and a planted rule: criteria that are met or not, prompts that are hard or easy, what can't be read
of either, and what both orders recover that one does not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations, permutations

import pytest

from limbeck.elicit.compare import Compare
from limbeck.elicit.flow import Reader, unjudged, with_answer
from limbeck.elicit.pairs import PreferencePairs, RankedLists
from limbeck.elicit.ratings import TOO_LONG, UNREADABLE
from limbeck.elicit.referee import Referee
from limbeck.elicit.rubric import MET, NOT_MET, Rubric, read_criteria, read_met
from limbeck.elicit.run import _facts
from limbeck.elicit.select import Top
from limbeck.elicit.verdicts import VerdictsAsText
from limbeck.report.elicited import elicitation_section
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


# A planted rule


LENGTHS, BIAS = range(1, 10), 3


def planted(bias=BIAS, unreadable=()):
    """A judge with a true preference, the shorter answer, that sees the first one as `bias` letters shorter than it is;
    of some pairs of lengths it says nothing that can be read."""

    def reply(request, _):
        a, b = re.search(r"Answer A:\n\| (x+)\n\nAnswer B:\n\| (x+)\n", request.messages[-1]["content"]).groups()
        if {len(a), len(b)} in unreadable:
            return "Both are fine."
        return f"VERDICT: {verdict_of(len(a), len(b), bias)}"

    return reply


def verdict_of(a, b, bias=BIAS):
    return "A" if a - bias < b else "TIE" if a - bias == b else "B"


def all_pairs():
    """Every two lengths, each way round, as the two answers to a prompt of its own."""
    return candidates(*((f"{one} {two}", "x" * one, "x" * two) for one in LENGTHS for two in LENGTHS if one != two))


def outcomes(judged):
    """(the first one's length, the second's, what the comparison said of the first one) of every pair."""
    pairs = zip(judged[0::2], judged[1::2], strict=True)
    return [(*map(int, one.meta["prompt_id"].split()), one.meta["compared"][0]["outcome"]) for one, _ in pairs]


def with_ids(pool):
    return [replace(sample, meta=sample.meta | {"prompt_id": sample.messages[0]["content"]}) for sample in pool]


def test_a_planted_rule_is_recovered_in_both_orders_and_not_in_one():
    """Of 72 pairs, one order gets the 15 wrong whose second answer is shorter by less than the bias; both orders get
    none wrong, and leave open what the bias hides."""
    judged, tally, asked = drive(Compare(by="judge"), with_ids(all_pairs()), planted())
    found = outcomes(judged)
    assert len(found) == 72 and len(asked) == 144
    decided = [(one, two, outcome) for one, two, outcome in found if outcome != "tied"]
    assert all((outcome == "won") == (one < two) for one, two, outcome in decided), "what is decided is right"
    assert len(decided) == sum(abs(one - two) > BIAS for one, two, _ in found) == 30
    one_order = [(one, two, verdict_of(one, two)) for one, two, _ in found]
    wrong = [(one, two) for one, two, verdict in one_order if verdict == ("A" if one > two else "B")]
    assert len(wrong) == 15 and all(0 < one - two < BIAS for one, two in wrong)
    right = sum(verdict == ("A" if one < two else "B") for one, two, verdict in one_order)
    assert right == 51, "in one order 51 of 66 verdicts are right, in both 30 of 30"

    # What is told of the judge, counted here by hand
    both = [(verdict_of(one, two), verdict_of(two, one)) for one, two, _ in found]  # forward, backward
    same = sum((forward, backward) in (("A", "B"), ("B", "A"), ("TIE", "TIE")) for forward, backward in both)
    said = [verdict for pair in both for verdict in pair if verdict != "TIE"]
    assert tally.facts["swap_consistency"] == same / 72 == 30 / 72
    assert tally.facts["first_position_share"] == pytest.approx(said.count("A") / len(said)) == pytest.approx(102 / 132)
    assert tally.facts["tie"] == 42 and tally.facts["longer_wins"] == 0 and "unparsable" not in tally.facts
    fair = drive(Compare(), with_ids(all_pairs()), planted(bias=0))[1].facts
    assert (fair["swap_consistency"], fair["first_position_share"], fair.get("tie")) == (1, 0.5, None)


def test_a_ranking_by_wins_follows_the_rule_whatever_the_order_of_the_answers():
    """All 120 orders of five answers: the wins of both orders never rank a longer one before a shorter, and pairs made
    of them are never reversed; one order ranks wrongly in most of them."""
    lengths = (2, 4, 5, 7, 9)
    reversed_in_one, wins_of = 0, set()
    for order in permutations(lengths):
        judged, _, _ = drive(Compare(), candidates(("why", *("x" * length for length in order))), planted())
        wins = {len(s.messages[-1]["content"]): s.meta["scores"]["wins"] for s in judged}
        wins_of.add(tuple(wins[length] for length in lengths))
        assert all(wins[one] >= wins[two] for one, two in combinations(lengths, 2))
        chosen, rejected = drive(PreferencePairs(score="wins"), judged)[0]
        assert len(chosen.messages[-1]["content"]) < len(rejected.messages[-1]["content"])
        points = dict.fromkeys(lengths, 0.0)
        for one, two in combinations(order, 2):  # the verdicts of one order alone
            verdict = verdict_of(one, two)
            points[one] += {"A": 1, "TIE": 0.5, "B": 0}[verdict]
            points[two] += {"A": 0, "TIE": 0.5, "B": 1}[verdict]
        reversed_in_one += any(points[one] < points[two] for one, two in combinations(lengths, 2))
    assert len(wins_of) == 1, "the order of the answers makes no difference"
    assert reversed_in_one == 111


def test_the_page_tells_what_could_not_be_read_and_how_far_the_judge_can_be_trusted(tmp_path):
    blank = ({1, 9}, {4, 5})
    _, tally, _ = drive(Compare(), with_ids(all_pairs()), planted(unreadable=blank))
    assert tally.facts["unparsable"] == 4 and tally.facts["unparsable_share"] == pytest.approx(4 / 72)
    assert tally.facts["swap_consistency"] == pytest.approx(28 / 68), "of the pairs that could be read"
    account = {"steps": [{**_facts(tally), "kind": "feedback", "answers": {"ok": 144}}], "models": {"judge": "j@1"}}
    (tmp_path / "elicitation.json").write_text(json.dumps(account))
    ((name, facts),) = elicitation_section(tmp_path).facts
    told = dict(facts)
    assert name == "step" and told["unparsable"] == "4" and told["pairs"] == "72"
    assert float(told["swap consistency"]) == pytest.approx(28 / 68, abs=5e-3)
    said = [
        verdict_of(one, two) for one in LENGTHS for two in LENGTHS if one != two and {one, two} not in blank
    ]  # each pair stands both ways round, so each verdict is given twice
    share = said.count("A") / (len(said) - said.count("TIE"))
    assert float(told["first position share"]) == pytest.approx(share, abs=5e-3)


# A judge's comparisons as text


def test_comparisons_that_both_orders_agree_on_are_taught_in_both():
    pool = candidates(("why", "x", "xxxxxx", "xx"))
    taught, tally, _ = drive(VerdictsAsText(), pool, planted())
    assert [s.messages[-1]["content"][-1] for s in taught] == ["A", "B", "B", "A"], (
        "x and xx differ by less than the bias"
    )
    assert tally.dropped == {"the verdict changes with the order": 1} and tally.facts["pairs"] == 3
    first = taught[0].messages[0]["content"]
    assert "Answer A:\n| x\n" in first and first.endswith("VERDICT: TIE") and len(taught[0].messages) == 2
    assert len({s.meta["prompt_id"] for s in taught}) == 4 and {s.writer for s in taught} == {"writer"}
    assert [s.meta["outcome"] for s in taught] == ["first", "first", "second", "second"]
    assert drive(VerdictsAsText(), pool, lambda *_: "no idea")[1].dropped == {"no verdict can be read": 3}
    assert drive(VerdictsAsText(), pool, reader=Reader(fits=lambda *_: False))[1].dropped == {"too long": 3}
