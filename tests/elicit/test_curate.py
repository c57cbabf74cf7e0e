"""Texts to a specification, conversations, rewritten questions and quiz questions: every reason to go, exact counts, checks that hold."""

from __future__ import annotations

import json

import pytest

from limbeck.elicit.choices import FewShotChoices, read_question
from limbeck.elicit.curate import FEATURES, Stories, Textbook
from limbeck.elicit.dialogue import SelfChat, read_transcript
from limbeck.elicit.rewrite import Rewrite, numbers
from limbeck.elicit.verify import parse_check, verify
from limbeck.types import LogProb
from tests.flow_driver import drive, prompts, texts


def said(request):
    return request.messages[-1]["content"]


def words():
    return [*prompts("dog", "box", kind="noun"), *prompts("carry", kind="verb"), *prompts("happy", kind="adjective")]


def test_stories_hold_their_words_and_an_end():
    endings = [
        "a happy {noun} carried it home.",
        "A sad {noun} carried it.",
        "a happy {noun} carried it",
        ("a happy", "length"),
    ]

    def reply(request, n):
        noun = "dog" if '"dog"' in said(request) else "boxe"
        text = endings[n]
        return (text[0], text[1]) if isinstance(text, tuple) else text.replace("{noun}", noun + "s")

    pool, tally, asked = drive(Stories(count=4, features=2), words(), reply)
    assert len(pool) == 1 and tally.dropped == {"a word is missing": 1, "no end": 1, "answer: length": 1}
    assert (
        all(sum(told in said(request) for told in FEATURES.values()) == 2 for request in asked)
        and len(pool[0].parents) == 2
    )
    assert drive(Stories(), prompts("dog", kind="noun"))[1].dropped == {"no verb among the words": 1}


def test_lessons_and_exercises_follow_a_drawn_specification():
    pool, _, asked = drive(Textbook(each=3), prompts("tides", "rust"), lambda *_: "a lesson")
    assert (
        len(pool) == len(asked) == 6
        and len({said(request) for request in asked}) > 3
        and all(request.key for request in asked)
    )
    pool, tally, _ = drive(
        Textbook(form="exercise"), prompts("a", "b"), lambda request, n: ["do it", "do it. Solution: so"][n]
    )
    assert len(pool) == 1 and tally.dropped == {"no solution": 1}


def test_two_roles_take_turns():
    def reply(request, n):
        return f"question {n}?" if said(request).endswith("User:") else f"answer {n}"

    (talk,), tally, asked = drive(SelfChat(turns=3), prompts("first?"), reply)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3 and len(asked) == 5 == SelfChat(
        turns=3
    ).estimate(1).requests
    assert [m["content"] for m in talk.messages] == [
        "first?",
        "answer 0",
        "question 1?",
        "answer 2",
        "question 3?",
        "answer 4",
    ]
    assert (
        "Assistant: answer 0" in said(asked[1])
        and not tally.dropped
        and len(talk.parents) == 6
        and talk.response_ids == (1, 2)
    )


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("As an AI, I", "the user falls out of the role"),
        ("first?", "a turn is repeated"),
        (("x", "empty"), "answer: empty"),
    ],
)
def test_a_user_that_falls_out_of_its_role_ends_the_conversation(user, reason):
    (talk,), tally, _ = drive(
        SelfChat(turns=3), prompts("first?"), lambda r, n: user if said(r).endswith("User:") else "an answer"
    )
    assert len(talk.messages) == 2 and tally.dropped == {reason: 1} and tally.facts == {"ended_early": 1}


def test_a_conversation_in_one_piece_is_read_as_far_as_it_goes():
    text = " How deep is it?\n[AI] Very.\n[Human] And wide?\n[AI] Too.\n[AI] Still me."
    pool, _, asked = drive(SelfChat(how="one_call", turns=3), prompts("the sea"), lambda *_: text)
    assert [m["content"] for m in pool[0].messages] == ["How deep is it?", "Very.", "And wide?", "Too."] and len(
        asked
    ) == 1
    pool, _, _ = drive(SelfChat(how="one_call", turns=3), prompts("the sea"), lambda *_: (text, "length"))
    assert len(pool[0].messages) == 2
    for said_, reason in (
        ("nothing", "no conversation"),
        (("a\n[AI] b", "length"), "answer: length"),
        (("", "empty"), "answer: empty"),
    ):
        assert drive(SelfChat(how="one_call"), prompts("x"), lambda *_, said_=said_: said_)[1].dropped == {reason: 1}
    assert read_transcript("[AI] first", 3) == [] and len(read_transcript("[Human] a [AI] b [Human] c [AI] d", 1)) == 2


GOLD = {"type": "number", "answer": 12}


def test_rephrased_questions_keep_their_numbers_and_check():
    pool = prompts("Has 3 bags of 4. How many?", "No number known")
    pool[0].meta["check"] = GOLD
    reply = iter(["4 in each of 3 bags, so how many?", "5 in each of 3 bags?", "has 3 bags of 4. how many?"])
    found, tally, asked = drive(Rewrite(how=["rephrase"], each=3), pool, lambda *_: next(reply))
    assert [text for text, _ in texts(found)] == [
        "Has 3 bags of 4. How many?",
        "4 in each of 3 bags, so how many?",
    ] and len(asked) == 3
    assert (
        tally.dropped == {"no number as its answer": 1, "numbers changed": 1, "the same words": 1}
        and found[1].meta["check"] == GOLD
    )
    assert numbers("1,000 and 2.50") == ["1000", "2.5"]


def test_backward_questions_ask_for_the_number_that_is_gone():
    pool = prompts("Has 3 bags of 4. How many?")
    pool[0].meta["answers"] = ["12 in all: 3 x 4 = 12"]
    found, _, asked = drive(Rewrite(how=["backward"], originals=False), pool)
    ((text, _),), (sample,) = texts(found), found
    assert (
        not asked
        and "the answer to the question above is 12" in text
        and text.count("x") - text.count("unknown number x") == 1
    )
    hidden = sample.meta["check"]["answer"]
    assert hidden in (3, 4) and text.startswith("Has 3 bags of x" if hidden == 4 else "Has x bags of 4")
    assert verify(parse_check(sample.meta["check"], "here"), f"x is {hidden}") and json.dumps(sample.meta["check"])
    assert drive(Rewrite(how=["backward"]), pool)[0][1:] == found


def test_statements_hold_the_answer_and_hide_another_number():
    pool = prompts("A box has 3 bags of 4. How many?", "And 5?")
    pool[0].meta["check"], pool[1].meta["check"] = GOLD, {"type": "number", "answer": 5}
    reply = iter(["The bags of the box hold 12.\nNext", "It is six."])
    found, tally, asked = drive(Rewrite(how=["self_verification"], originals=False), pool, lambda *_: next(reply))
    ((text, _),) = texts(found)
    assert len(asked) == 2 and tally.dropped == {"the answer is not in the statement": 1}
    assert (
        text.startswith("A box has")
        and "hold 12." in text
        and "How many" not in text
        and found[0].meta["check"]["answer"] in (3, 4)
    )


def test_quiz_questions_in_one_piece():
    good = '{"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 2}'
    said_ = iter([f"Sure: {good} done", "no", '{"question": "Q?", "choices": ["a", "a", "c", "d"], "answer": 2}'])
    found, tally, asked = drive(
        FewShotChoices(how="direct", count=3, shown=2), prompts("one?", "two?", "three?"), lambda *_: next(said_),
        lambda question: LogProb({"A": -1.0, "B": -2.0, "C": -0.5, "D": -9.0}[question.answer], 1),
    )  # fmt: skip
    (sample,) = found
    assert (
        tally.dropped == {"no question with four choices": 2}
        and len(asked) == 3
        and tally.facts == {"likeliest_is_the_one_named": 1}
    )
    assert sample.messages[-1]["content"] == "C" and sample.meta["weight"] == max(sample.meta["probabilities"])
    assert sum(sample.meta["probabilities"]) == pytest.approx(1) and verify(sample.meta["check"], "C")
    assert said(asked[0]).startswith("Here are questions of a quiz:\n\n1. ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"question": 1}', '{"question": "q", "choices": ["a","b","c","d"], "answer": true}', '{"question": "q", "choices": ["a","b","c","d"], "answer": 4}', "{" * 5000])  # fmt: skip
def test_what_is_no_question_is_none(text):
    assert read_question(text) is None


def test_quiz_questions_by_steps():
    def reply(request, n):
        text = said(request)
        if "Write three wrong" in text:
            return "cat\n2. Dog.\n3. cow\n4. pig" if "Q0" in text else "cat"
        return "dog" if text.endswith("Answer:") else f"Q{n}"

    found, tally, asked = drive(FewShotChoices(count=2), prompts(*"abcdef"), reply, lambda q: LogProb(-1.0, 1))
    (sample,) = found
    lines = sample.messages[0]["content"].splitlines()
    assert len(asked) == 6 and tally.dropped == {"fewer than three wrong answers": 1}
    right = sample.meta["check"]["answer"]
    assert f"{right}. dog" in lines and sorted(line[3:] for line in lines if line[1:3] == ". ") == [
        "cat",
        "cow",
        "dog",
        "pig",
    ]


def test_choices_keep_their_numbers_and_no_text_that_was_cut_off():
    def reply(request, n):
        text = said(request)
        if "Write three wrong" in text:
            return ("1. 1914\n2. 1915\n3. 1916\n4. 19", "length")
        return (
            ("1918" if "Q0" in text else "in the", "ok" if "Q0" in text else "length") if "Answer:" in text else f"Q{n}"
        )

    found, tally, _ = drive(FewShotChoices(count=2), prompts(*"abcdef"), reply, lambda q: LogProb(-1.0, 1))
    assert tally.dropped == {"answer: length": 1} and len(found) == 1
    assert {line[3:] for line in found[0].messages[0]["content"].splitlines() if line[1:3] == ". "} == {
        "1914", "1915", "1916", "1918",
    }  # fmt: skip
