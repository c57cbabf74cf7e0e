"""Many prompts out of few: every filter, every count, and the same pool from the same seed."""

from __future__ import annotations

import json

import pytest

from limbeck.config.builtin import seed_files
from limbeck.elicit.evolve import EvolInstruct
from limbeck.elicit.expand import Alpaca, SelfInstruct, unfit
from limbeck.elicit.imagine import Backtranslate, Imagine, Magpie
from limbeck.elicit.prompts import load_prompts
from limbeck.elicit.similar import Novelty
from limbeck.types import UserError
from tests.flow_driver import drive, prompts, texts

SEEDS = prompts(
    *(
        f"Seed number {n} about {word}"
        for n, word in enumerate("apples bears cars doors eggs fish goats hats ink jam".split())
    )
)
for seed in SEEDS:
    seed.meta["answers"] = ["an answer"]


def said(request):
    return request.messages[-1]["content"] if request.messages else ""


class Writer:
    """Plays the writer of Self-Instruct: lists, verdicts, instances."""

    def __init__(self, listed, instance="Input: a b c\nOutput: c b a", verdict="No", finish="ok"):
        self.listed, self.instance, self.verdict, self.finish = iter(listed), instance, verdict, finish

    def __call__(self, request, n):
        text = said(request)
        if text.startswith("Here is a list"):
            return next(self.listed), self.finish
        return self.verdict if "Classification:" in text else self.instance


def test_self_instruct_asks_filters_and_makes_instances():
    first = (
        "Sort the letters of a word by the alphabet.\n10. Draw a picture of your house please.\n11. Too short now\n12. Write a program that counts sheep\n"
        "13. (odd beginning of this one)\n14. Sort the letters of a word by the alphabet!\n15. Seed number 3 about doors"
    )
    pool, tally, asked = drive(
        SelfInstruct(count=1, requests=5, together=2), SEEDS, Writer([first, "Name the tallest tree in the wood."])
    )
    assert texts(pool) == [("Sort the letters of a word by the alphabet.\n\na b c", "c b a")]
    assert tally.dropped == {
        "needs what a text can't hold": 1, "too short": 1, "asks for a program": 1, "like another task": 2, "more than wanted": 1,
        "begins with a sign": 1,
    }  # fmt: skip
    assert tally.facts["requests"] == 2 and tally.facts["new_instructions"] == 2 and tally.facts["classification"] == 0
    lists = [said(request) for request in asked if said(request).startswith("Here is a list")]
    assert (
        len(lists) == 2
        and all(f"\n{n}. Seed number" in text for text in lists for n in range(1, 9))
        and lists[0].endswith("\n9.")
    )
    assert len(pool[0].parents) == 2 and asked[0].sampling.presence_penalty == 2.0


def test_later_rounds_show_what_was_made():
    words = ["lamps", "boats", "trees", "birds", "roads", "stars", "coins", "books"]
    listed = [f"{word.title()} are sold by {n} {word} sellers" for n, word in enumerate(words)]
    _, _, asked = drive(SelfInstruct(count=6, requests=8, together=1), SEEDS, Writer(listed))
    lists = [said(request) for request in asked if said(request).startswith("Here is a list")]
    assert len(lists) == 6
    shown = [sum("are sold by" in line for line in text.splitlines()) for text in lists]
    assert shown == [0, 1, 2, 2, 2, 2] and all(
        text.count("Seed number") == 8 - made for text, made in zip(lists, shown, strict=True)
    )


def test_a_weak_writer_ends_when_the_requests_are_used_up():
    pool, tally, asked = drive(SelfInstruct(count=9, requests=7, together=5), SEEDS, Writer([""] * 7))
    assert pool == [] and len(asked) == 7 and tally.facts["requests"] == 7


def test_tasks_alone_wait_for_an_answer_and_any_named_model_makes_them():
    step = SelfInstruct(by="strong", count=1, requests=1, instances=0)
    pool, _, asked = drive(step, SEEDS, Writer(["Name every river that you know."]))
    assert texts(pool) == [("Name every river that you know.", None)] and len(asked) == 1
    estimate = step.estimate(9)
    assert (estimate.requests, estimate.samples) == (1, 1) and step.answer_tokens() is None
    whole = SelfInstruct(by="strong", count=1, requests=1)
    _, _, asked = drive(whole, SEEDS, Writer(["Name every river that you know."]))
    assert [request.model for request in asked] == ["strong@1"] * 3 and whole.asks() == ("strong",)


def test_what_was_cut_off_loses_its_end():
    pool, tally, _ = drive(
        SelfInstruct(count=2, requests=1),
        SEEDS,
        Writer(["Name every river that you know.\n10. Explain how a"], finish="length"),
    )
    assert tally.dropped["cut off"] == 1 and len(pool) == 1


@pytest.mark.parametrize(
    ("instance", "finish", "found", "reason"),
    [
        ("Input: <noinput>\nOutput: Once upon a time there was a sailor who", "length", [], "instance cut off"),
        ("Once upon a time there was a sailor who", "length", [], "instance cut off"),
        ("Input: a\nOutput: b\nInput: c\nOut", "length", ["b"], "instance cut off"),
        ("Output: Once upon a time", "filtered", [], "answer: filtered"),
        ("I'm sorry, but I can't help with that.", "refused", [], "answer: refused"),
    ],
)
def test_an_instance_that_is_not_whole_is_not_taught(instance, finish, found, reason):
    pool, tally, _ = drive(
        SelfInstruct(count=1, requests=1), SEEDS, Writer(["Sort the things in the box."], (instance, finish))
    )
    assert [answer for _, answer in texts(pool)] == found and tally.dropped[reason] == 1


@pytest.mark.parametrize("finish", ["refused", "filtered"])
def test_a_reply_that_the_writer_did_not_write_lists_no_task(finish):
    refusal = "I'm sorry, but I can't help with that.\nInput: <noinput>\nOutput: no"
    for step in (SelfInstruct(count=1, requests=1), Alpaca(count=1, requests=1)):
        pool, tally, _ = drive(step, SEEDS, lambda request, n: (refusal, finish))
        assert pool == [] and tally.dropped == {f"answer: {finish}": 1}


def test_thinking_before_a_list_is_no_task():
    listed = "<think>\nThey want other kinds of tasks.\n</think>\n\nName every river that you know."
    pool, _, _ = drive(SelfInstruct(count=1, requests=1, instances=0), SEEDS, Writer([listed]))
    assert texts(pool) == [("Name every river that you know.", None)]


@pytest.mark.parametrize(
    ("instance", "verdict", "found", "reason"),
    [
        ("Label: positive\nInput: so good\nLabel: negative\nInput: so bad", "Yes", [("so good", "positive")], None),
        ("Input: <noinput>\nOutput: yes it is", "No", [("", "yes it is")], None), ("just an answer", "No", [("", "just an answer")], None),
        ("Input: a\nOutput: a", "No", [], "instance without a proper output"), ("Input: a\nOutput:", "No", [], "instance without a proper output"),
        ("Input: a\nOutput: b\nInput: a\nOutput: c", "No", [], "same input with different outputs"),
        ("Output: here it is:", "No", [], "instance without a proper output"), ("", "Yes", [], "no instance"),
    ],
)  # fmt: skip
def test_instances_are_read_and_checked(instance, verdict, found, reason):
    pool, tally, _ = drive(
        SelfInstruct(count=1, requests=1), SEEDS, Writer(["Sort the things in the box."], instance, verdict)
    )
    wanted = [
        (f"Sort the things in the box.\n\n{given}" if given else "Sort the things in the box.", output)
        for given, output in found
    ]
    assert texts(pool) == wanted and (reason is None or tally.dropped[reason])
    assert tally.facts["classification"] == (verdict == "Yes")


def test_the_filter_of_instructions():
    assert (
        unfit("Say hello to us", ()) is None
        and unfit("a b c", ()) == "too short"
        and unfit("word " * 151, ()) == "too long"
    )
    assert unfit("Plot the data for me", ("plot",)) and unfit("The plotter is broken today", ("plot",)) is None
    assert unfit("écris une lettre ici", ()) == "begins with a sign"


def test_alpaca_reads_tasks_out_of_one_answer():
    text = (
        " Name a green fruit you like.\nInput: <noinput>\nOutput: a lime\n5. Instruction: Add up the numbers below.\nInput: 1, 2\nOutput: 3\n"
        "6. Instruction: Show the video to me now.\nInput:\nOutput: no\n7. Instruction: Without output here it is"
    )
    pool, tally, asked = drive(
        Alpaca(count=5, requests=2, together=2), [*SEEDS, *prompts("no answer")], lambda request, n: text
    )
    assert texts(pool) == [("Name a green fruit you like.", "a lime"), ("Add up the numbers below.\n\n1, 2", "3")]
    assert tally.dropped == {
        "a seed without an answer": 1,
        "needs what a text can't hold": 2,
        "a part is missing": 2,
        "like another task": 2,
    }
    assert len(asked) == 2 and said(asked[0]).count("Output: an answer") == 3 and asked[0].sampling.temperature == 1.0


# Evolution


class Evolving:
    """Adds a word to every prompt; `equal` and `answers` say what goes wrong in which round."""

    def __init__(self, equal=(), answers=None, prompts=None):
        self.equal, self.answers, self.prompts, self.turn = equal, answers or {}, prompts or {}, 0

    def __call__(self, request, n):
        text = said(request)
        if text.endswith("New prompt:"):
            self.turn += 1
            return self.prompts.get(self.turn, f"harder {self.turn} than before")
        if "Do these two prompts" in text:
            return "Equal" if self.turn in self.equal else "Not equal."
        return self.answers.get(self.turn, f"answer {self.turn} with content")


def test_each_round_evolves_the_last_and_gives_all_generations():
    pool, tally, asked = drive(EvolInstruct(rounds=3), prompts("a first prompt"), Evolving())
    assert texts(pool) == [(f"harder {n} than before", f"answer {n} with content") for n in (1, 2, 3)]
    assert len(asked) == 9 == EvolInstruct(rounds=3).estimate(1).requests and not tally.dropped
    evolving = [said(request) for request in asked if said(request).endswith("New prompt:")]
    assert "a first prompt" in evolving[0] and "harder 1 than before" in evolving[1] and "harder 2" in evolving[2]
    assert [sample.meta["generation"] for sample in pool] == [1, 2, 3]


@pytest.mark.parametrize(
    ("writer", "reason"),
    [
        (Evolving(equal=[1]), "adds nothing"), (Evolving(prompts={1: "a first PROMPT"}), "adds nothing"),
        (Evolving(answers={1: "Sorry, I can't."}), "the answer says sorry"), (Evolving(answers={1: "It is, and. The!"}), "the answer says nothing"),
        (Evolving(prompts={1: "The rewritten prompt: do it"}), "speaks of the prompt"), (Evolving(answers={1: ("x", "length")}), "answer: length"),
        (Evolving(prompts={1: ("x y", "length")}), "prompt cut off"), (Evolving(prompts={1: " "}), "no prompt"),
        (Evolving(prompts={1: ("I can't.", "refused")}), "prompt: refused"),
    ],
)  # fmt: skip
def test_what_failed_goes_and_the_old_prompt_tries_again(writer, reason):
    pool, tally, asked = drive(EvolInstruct(rounds=2), prompts("a first prompt"), writer)
    assert tally.dropped == {reason: 1} and len(pool) == 1 and pool[0].meta["generation"] == 2
    evolving = [said(request) for request in asked if said(request).endswith("New prompt:")]
    assert all("a first prompt" in text for text in evolving)


def test_all_operators_are_drawn_and_long_apologies_stay():
    long = Evolving(answers=dict.fromkeys(range(99), "sorry " + "word " * 90))
    pool, tally, _ = drive(EvolInstruct(rounds=1, originals=True), prompts(*(f"prompt {n}" for n in range(40))), long)
    assert len(pool) == 80 and set(tally.facts) == {
        f"{name}_tried" for name in ("constrain", "deepen", "concretise", "reason", "complicate", "widen")
    }


# Out of nothing


def test_magpie_lets_the_writer_speak_as_the_user():
    turns = [
        "What is the tallest tree?",
        "what is the tallest tree?",
        "Hm",
        "assistant: hello there you",
        "",
        "How do bees find home?",
    ]

    def reply(request, n):
        if request.raw is not None:
            return turns[n], "ok" if turns[n] else "empty"
        return f"answer to {said(request)}"

    pool, tally, asked = drive(Magpie(count=6), prompts("not used"), reply, header="<|user|>")
    assert [prompt for prompt, _ in texts(pool)] == [turns[0], turns[5]] and texts(pool)[0][
        1
    ] == f"answer to {turns[0]}"
    assert tally.dropped == {"like another one": 1, "too short": 1, "speaks in a role's name": 1, "answer: empty": 1}
    raw = [request for request in asked if request.raw is not None]
    assert (
        len(raw) == 6 == len({request.key for request in raw})
        and raw[0].sampling.stop == ("\n",)
        and asked[-1].sampling.temperature == 0
    )
    with pytest.raises(UserError, match="give its text in `header`"):
        drive(Magpie(), [], reply, header=None)


def test_people_and_topics_give_prompts():
    pool, tally, asked = drive(
        Imagine(kinds=["math", "logic"], each=2),
        prompts("a baker", "a nurse."),
        lambda request, n: f"Problem {n % 7} of {n % 7} loaves",
    )
    assert (
        len(asked) == 8
        and len(pool) == 7
        and tally.dropped == {"like another one": 1}
        and "a nurse would meet" in said(asked[4])
    )
    pool, _, asked = drive(Imagine(of="topics"), prompts("tides"), lambda *_: '"Why are there tides?"')
    assert texts(pool) == [("Why are there tides?", None)] and "Topic: tides" in said(asked[0])


def test_texts_become_answers_to_requests_that_fit_them():
    scores = iter(["5", "score: 3", "none", "50"])

    def reply(request, n):
        return next(scores) if said(request).endswith("Digit:") else f"Tell me about {n}"

    pool, tally, _ = drive(Backtranslate(), prompts(*"abcd"), reply)
    assert (
        texts(pool) == [("Tell me about 0", "a")]
        and pool[0].writer == "corpus"
        and pool[0].meta["scores"] == {"fit": 5.0}
    )
    assert tally.dropped == {"score below 5": 1, "no score": 2}


def test_the_same_seed_gives_the_same_pool_and_another_another():
    step, listed = (
        SelfInstruct(count=3, requests=3, together=1),
        [f"Speak of thing {n} and thing {n + 7} now" for n in range(3)],
    )
    runs = [drive(step, SEEDS, Writer(listed), seed=seed) for seed in (0, 0, 1)]
    assert runs[0][0] == runs[1][0] and [r.key for r in runs[0][2]] == [r.key for r in runs[1][2]] != [
        r.key for r in runs[2][2]
    ]


# Seeds


@pytest.mark.parametrize("name", sorted(seed_files()))
def test_the_seeds_are_well_formed(name):
    lines = [json.loads(line) for line in seed_files()[name].read_text(encoding="utf-8").splitlines()]
    assert len(load_prompts(f"builtin/{name}")) == len(lines) == len({line["id"] for line in lines})


def test_our_seed_tasks_are_many_different_and_answered():
    seeds = load_prompts("builtin/instructions")
    assert len(seeds) >= 175 and len({seed.kind for seed in seeds}) >= 15
    assert sum(seed.kind == "classification" for seed in seeds) >= 30
    assert all(seed.answers and 0 < len(seed.answers[0].split()) <= 120 for seed in seeds)
    novelty = Novelty(0.7, [seed.text for seed in seeds])
    assert [seed.id for seed in seeds if not novelty.add(seed.text)] == []
