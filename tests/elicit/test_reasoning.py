"""Reasoning traces: taken apart, rated, filtered and drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from limbeck.elicit.answer import AnswerPrompts
from limbeck.elicit.flow import with_scores
from limbeck.elicit.reasoning import (
    AsThinking,
    BalancedDraw,
    PassRate,
    ReasoningQuality,
    RequireThinking,
    TraceLengths,
    standardised,
)
from limbeck.elicit.select import Top
from limbeck.elicit.trace import only_in_thinking, trace_of
from limbeck.elicit.verified import BestOf, Verify
from limbeck.types import RecipeError
from tests.flow_driver import answers, drive, prompts, texts

FOUR = {"type": "number", "answer": 4}


def group(prompt, *replies, **meta):
    """Answers to one prompt."""
    return [replace(sample, meta=sample.meta | {"prompt_id": prompt}) for sample in answers(*[(prompt, text) for text in replies], **meta)]  # fmt: skip


def rates(pool):
    return [sample.meta.get("scores", {}).get("pass_rate") for sample in pool]


CHANNELS = "<|channel|>analysis<|message|>so 12<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>"


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "fault"),
    [
        ("7", None, "7", ""),
        ("I think it is 7", None, "I think it is 7", ""),
        ("", None, "", ""),
        ("<think>\nso 12\n</think>\n\n7", "so 12", "7", ""),
        ("so 12\n</think>\n\n7", "so 12", "7", ""),  # the prompt opened it
        ("[THINK]so 12[/THINK]7", "so 12", "7", ""),
        ("◁think▷so 12◁/think▷7", "so 12", "7", ""),
        ("<|START_THINKING|>so 12<|END_THINKING|><|START_RESPONSE|>7<|END_RESPONSE|>", "so 12", "7", ""),
        ("<|channel>thought\nso 12<channel|>7", "so 12", "7", ""),
        ("<THINK>so 12</think>7", "so 12", "7", ""),
        (CHANNELS, "so 12", "7", ""),
        ("analysisso 12assistantfinal7", "so 12", "7", ""),
        ("<|channel|>final<|message|>7", None, "7", ""),
        ("<think>so 12</think>```xml\n<think>\n```", "so 12", "```xml\n<think>\n```", ""),
        ("<think>so 12", "so 12", None, "thinking without an end"),
        ("<think>so 12</thinking>7", "so 12</thinking>7", None, "thinking without an end"),
        ("<|channel|>analysis<|message|>so 12", "so 12", None, "thinking without an end"),
        ("analysisso We need", None, "analysisso We need", ""),
        ("<think>a</think><think>b", "a", None, "thinking without an end"),
        ("<think> \n</think>7", "", "7", "empty thinking"),
        ("</think>7", "", "7", "empty thinking"),
        ("<think>a</think><think>b</think>7", "a", "7", "thinking twice"),
        ("<think>a</think></think>7", "a", "7", "thinking twice"),
        ("<think>a</think>7\n<think>sure</think>\n", "a", "7", "thinking twice"),
        ("Well.\n<think>a</think>7", "Well.\n<think>a", "Well.\n7", "thinking in the wrong place"),
        ("Well <think>a</think>7", "Well <think>a", "7", "thinking in the wrong place"),
        ("7\n<think>\nsure", "7\n<think>\nsure", None, "thinking in the wrong place"),
        ("<think>a</think>\n\n", "a", "", "no answer after the thinking"),
        ("<|channel|>analysis<|message|>a<|end|>", "a", None, "no answer after the thinking"),
    ],
)
def test_a_trace_taken_apart(text, thinking, answer, fault):
    trace = trace_of(text)
    assert (trace.thinking, trace.answer, trace.fault) == (thinking, answer, fault)


def test_an_answer_that_only_the_thinking_boxes():
    assert only_in_thinking(trace_of("<think>\\boxed{1 2}</think>I am done."))
    assert not only_in_thinking(trace_of("<think>\\boxed{1 2}</think>It is 12."))
    assert not only_in_thinking(trace_of("<think>12</think>Done.")) and not only_in_thinking(trace_of("\\boxed{3}"))


def test_the_pass_rate_is_that_of_a_prompts_answers():
    pool = group("a", "4", "5", "so 4", "<think>4", check=FOUR) + group("b", "4", check=FOUR) + group("c", "9", "8", check=FOUR)  # fmt: skip
    found, tally, asked = drive(PassRate(), pool)
    assert rates(found) == [0.5] * 4 + [1.0] + [0.0] * 2 and not asked and not tally.dropped
    assert tally.facts == {"prompts": 3, "pass_rate": 0.5, "always_solved": 1, "never_solved": 1}
    medium, tally, _ = drive(Top(score="pass_rate", least=0.2, most=0.8), found)
    assert [text for _, text in texts(medium)] == ["4", "5", "so 4", "<think>4"] and tally.dropped == {"pass_rate out of bounds": 3}  # fmt: skip
    solved, tally, _ = drive(Verify(), medium)
    assert [sample.meta["scores"] for sample in solved] == [{"pass_rate": 0.5, "verified": 1.0}] * 2
    assert tally.dropped == {"check: number": 1, "thinking without an end": 1}


def test_what_cant_be_checked_has_no_pass_rate():
    pool = [*group("a", "4", "x"), *prompts("q"), *group("b", "4", check=FOUR)]
    found, tally, _ = drive(PassRate(), pool)
    assert rates(found) == [1.0] and tally.dropped == {"nothing to check it by": 2, "no answer": 1}
    found, tally, _ = drive(PassRate(unchecked="keep"), pool)
    assert rates(found) == [None, None, 1.0] and tally.dropped == {"no answer": 1}
    found, tally, _ = drive(PassRate(against="number"), group("a", "so 4", "5", answers=["it is 4"]))
    assert rates(found) == [0.5, 0.5]
    found, tally, _ = drive(PassRate(), [])
    assert (found, tally.facts) == ([], {})


def test_cut_off_answers_count_as_wrong_and_repeated_ones_each():
    def reply(request, number):
        return [("it is 4", "ok"), ("it is 4", "ok"), ("4 and then", "length"), ("<think>4</think> ", "ok"), ("", "empty"), ("no", "refused")][number]  # fmt: skip

    pool = prompts("2 and 2?", check=FOUR)
    every, tally, _ = drive(AnswerPrompts(n=6, all=True), pool, reply)
    assert len(every) == 5 and tally.dropped == {"answer: refused": 1}
    rated, tally, _ = drive(PassRate(), every)
    assert rates(rated) == [0.4] * 5
    kept, tally, _ = drive(Verify(), rated)
    assert [text for _, text in texts(kept)] == ["it is 4"] * 2
    assert tally.dropped == {"answer: length": 1, "check: number": 2}
    fewer, tally, _ = drive(AnswerPrompts(n=6), pool, reply)
    assert len(fewer) == 1 and tally.dropped["the same answer again"] == 1 and tally.dropped["answer: length"] == 1


def test_lengths_and_the_shortest_longest_and_middle_of_a_prompt():
    found, tally, _ = drive(
        TraceLengths(), [*group("a", "<think>one two</think>three", "one two", "<think>one two three"), *prompts("q")]
    )
    lengths = [(s.meta["scores"]["thinking_length"], s.meta["scores"]["answer_length"]) for s in found]
    assert lengths == [(2, 1), (0, 2), (3, 0)] and tally.dropped == {"no answer": 1}
    pool = [with_scores(sample, n=value) for sample, value in zip(group("a", *"abcde"), (3, 1, 3, 2, 1), strict=True)]
    pool += [with_scores(*group("b", "f"), n=7), *group("b", "g")]

    def best(**settings):
        found, tally, _ = drive(BestOf(score="n", **settings), pool)
        assert tally.taken == tally.given + sum(tally.dropped.values()) and tally.dropped["no score n"] == 1
        return "".join(text for _, text in texts(found))

    assert (best(), best(lowest=True), best(median=True)) == ("af", "bf", "df")
    assert (best(n=2), best(n=2, lowest=True), best(n=2, median=True)) == ("acf", "bef", "def")
    assert best(n=9, median=True) == best(n=9) == "abcdef"
    even = [with_scores(sample, n=value) for sample, value in zip(group("a", *"abcd"), (4, 3, 2, 1), strict=True)]
    assert texts(drive(BestOf(score="n", median=True), even)[0]) == [("a", "c")], "the lower of two"
    with pytest.raises(ValidationError, match="not both"):
        BestOf(score="n", lowest=True, median=True)


def test_answers_that_think_once_to_an_end_and_then_answer():
    good = "<think>2 and 2 is 4</think>It is 4."
    pool = group(
        "a", good, "4", "<think>4", "<think></think>4", "<think>a</think><think>b</think>4", "So: <think>a</think>4", "<think>4</think>",
        "<think>it is 4</think>It is 5.", "<think>it is 5</think>It is 5.", check=FOUR,
    )  # fmt: skip
    found, tally, _ = drive(RequireThinking(), [*pool, *prompts("q")])
    assert [text for _, text in texts(found)] == [good, "<think>it is 5</think>It is 5."]
    assert tally.dropped == {
        "no thinking": 1, "thinking without an end": 1, "empty thinking": 1, "thinking twice": 1, "thinking in the wrong place": 1,
        "no answer after the thinking": 1, "the answer stands in the thinking alone": 1, "no answer": 1,
    }  # fmt: skip
    found, tally, _ = drive(
        RequireThinking(), group("a", "<think>\\boxed{4}</think>Done.", "<think>\\boxed{4}</think>4")
    )
    assert len(found) == 1 and tally.dropped == {"the answer stands in the thinking alone": 1}
    mixed = group("a", "<think>так что 4</think>4", "<think>so 4</think>4", "<think>4</think>4")
    found, tally, _ = drive(RequireThinking(script="latin"), mixed)
    assert len(found) == 2 and tally.dropped == {"thinking in another script": 1}


def test_limos_rules_in_closed_form():
    pool = group("a", "check x x x", "perhaps since", "x x x x x x") + prompts("q")
    found, tally, _ = drive(ReasoningQuality(), pool)
    scores = [sample.meta["scores"]["reasoning_quality"] for sample in found]
    length, checks = standardised([4, 2, 6]), standardised([0.25, 0, 0])
    half = standardised([0, 0.5, 0])
    expected = [0.3 * a + 0.2 * b + 0.25 * c + 0.25 * c for a, b, c in zip(length, checks, half, strict=True)]
    assert scores == pytest.approx(expected) and tally.dropped == {"no answer": 1}
    assert standardised([1, 3]) == [-1, 1] and standardised([2, 2]) == [0, 0] and standardised([5]) == [0] and standardised([]) == []  # fmt: skip
    (alone,), _, _ = drive(ReasoningQuality(), group("a", "check"))
    assert alone.meta["scores"]["reasoning_quality"] == 0


def drawn(pool, seed=0, **settings):
    found, tally, _ = drive(BalancedDraw(**settings), pool, seed=seed)
    assert tally.taken == tally.given + sum(tally.dropped.values())
    return [text for _, text in texts(found)], tally


def test_a_draw_is_balanced_over_kinds_and_favours_high_scores():
    many = [
        with_scores(sample, n=n) for n, sample in enumerate(group("a", *[f"m{n}" for n in range(40)], kind="maths"))
    ]
    few = [
        with_scores(sample, n=n) for n, sample in enumerate(group("b", *[f"f{n}" for n in range(10)], kind="physics"))
    ]
    pool = many + few
    taken = Counter(text[0] for seed in range(200) for text in drawn(pool, seed, count=1)[0])
    assert 70 < taken["m"] < 130, "each kind is as likely, however many it has"
    tops = Counter(text for seed in range(400) for text in drawn(few, seed, count=1, weight="n")[0])
    # ranks weigh 1/2, 1/4, 1/8, ...
    assert 160 < tops["f9"] < 240 and 70 < tops["f8"] < 130 and tops["f0"] < 10
    even = Counter(text for seed in range(400) for text in drawn(few, seed, count=1, weight="n", decay=1.0)[0])
    assert min(even.values()) > 15
    chosen, tally = drawn(pool, count=20, weight="n")
    assert chosen == drawn(pool, count=20, weight="n")[0] != drawn(pool, 1, count=20, weight="n")[0]
    assert chosen == [text for _, text in texts(pool) if text in chosen] and len(set(chosen)) == 20
    assert tally.dropped == {"not drawn": 30} and tally.facts == {"kinds": 2}


def test_a_draw_at_its_edges():
    few = [with_scores(sample, n=1.0) for sample in group("b", "x", "y", kind="physics")]
    none = group("c", "z")
    assert drawn(few, count=9)[0] == ["x", "y"] and drawn([], count=3)[0] == []
    chosen, tally = drawn([*few, *none], count=9, weight="n")
    assert chosen == ["x", "y"] and tally.dropped == {"no score n": 1}
    assert drawn([*few, *none], count=9)[1].facts == {"kinds": 2}, "samples without a kind are one"
    ties = Counter(drawn(few, seed, count=1, weight="n")[0][0] for seed in range(300))
    assert ties["x"] > 160 > ties["y"], "of equal ones, the first ranks higher"
    assert BalancedDraw(count=5).estimate(3).samples == 3 and BalancedDraw(count=5).estimate(30).samples == 5
    BalancedDraw(count=1, by="topic").refuse("elicit[1].draw", frozenset({"topic"}), None)
    with pytest.raises(RecipeError, match=r"elicit\[0\].draw.by: no sample has a 'kinds'.*kind"):
        BalancedDraw(count=1, by="kinds").refuse("elicit[0].draw", frozenset(), [])


def test_reasons_become_thinking():
    (sample,) = answers(("2 and 2?", "Two and two make 4. The answer is 4."), rationale="Two and two make 4.", final="4", check=FOUR)  # fmt: skip
    found, tally, _ = drive(AsThinking(), [sample, *answers(("q", "4")), *prompts("p")])
    assert texts(found) == [("2 and 2?", "<think>\nTwo and two make 4.\n</think>\n\nThe answer is 4.")]
    assert tally.dropped == {"no reasons": 2} and trace_of(texts(found)[0][1]).fault == ""
    assert len(drive(RequireThinking(), drive(PassRate(), found)[0])[0]) == 1
    assert drive(AsThinking(label="{final}"), [sample])[0][0].messages[-1]["content"].endswith("\n\n4")
    for wrong in ("so", "{final} {x}", "{final}{final}"):
        with pytest.raises(ValidationError, match="final"):
            AsThinking(label=wrong)
