"""Samples in another form: what each says is what it was made from."""

from __future__ import annotations

import re

import pytest

from limbeck.elicit.mosaic import FORMATS, MASKS, ORDERS, Mosaic
from limbeck.elicit.transform import Counterfactual, Equations, LabelOnly, Multitask, RemoveContext, Turns
from limbeck.types import Sample
from tests.flow_driver import answers, drive, prompts, texts


def test_reasons_and_label_become_two_tasks():
    pool = answers(("2 + 2?", "two twos are 4. The answer is 4."), rationale="two twos are 4.", final="4") + answers(
        ("x", "no reasons")
    )
    found, tally, asked = drive(Multitask(), pool)
    assert texts(found) == [
        ("2 + 2?", "The answer is 4."), ("2 + 2?\n\nExplain how to find the answer.", "two twos are 4."),
    ]  # fmt: skip
    assert [sample.meta["task"] for sample in found] == ["label", "rationale"] and not asked
    assert tally.dropped == {"no reasons with a final answer": 1} and found[0].parents == (pool[0].id,)
    assert len({sample.meta["prompt_id"] for sample in found}) == 2
    assert texts(drive(LabelOnly(), pool)[0]) == [("2 + 2?", "The answer is 4.")]


def test_a_model_s_text_is_never_a_template():
    pool = answers(("say {final} and {prompt}", "x"), rationale="{final} {prompt}", final="{prompt}")
    assert texts(drive(Multitask(), pool)[0]) == [
        ("say {final} and {prompt}", "The answer is {prompt}."),
        ("say {final} and {prompt}\n\nExplain how to find the answer.", "{final} {prompt}"),
    ]


@pytest.mark.parametrize(
    ("text", "equations"),
    [
        ("She had 3 + 4 = 7 apples, then 7 - 2 = 5.", ["3 + 4 = 7", "7 - 2 = 5"]),
        ("48/2 = 24 clips; 48+24=72", ["48/2 = 24", "48+24=72"]), ("9 x 12 = 108", ["9 x 12 = 108"]), ("2 * 3 * 4 = 24", ["2 * 3 * 4 = 24"]),
    ],
)  # fmt: skip
def test_of_a_solution_only_its_equations(text, equations):
    ((_, answer),) = texts(drive(Equations(), answers(("p", text)))[0])
    last = equations[-1].split("=")[1].strip()
    assert answer == "\n".join(equations) + f"\nThe answer is {last}."
    assert drive(Equations(), answers(("p", "seven apples")))[1].dropped == {"no equation": 1}


def test_a_student_follows_right_and_wrong_reasons():
    pool = answers(("q", "x"), rationale="because", final="blue") + answers(
        ("q", "y"), rationale="since", final="red", counterfactual=True
    )
    found, _, _ = drive(Counterfactual(), pool)
    assert texts(found) == [
        ("[factual] q", "because\n\nTherefore, the answer is blue."), ("[counterfactual] q\n\nsince", "Therefore, the answer is red."),
    ]  # fmt: skip
    assert [sample.meta["task"] for sample in found] == ["factual", "counterfactual"]


def test_context_is_taken_out():
    sample = Sample(
        (
            {"role": "system", "content": "rules"},
            {"role": "user", "content": "<doc>long text</doc>\nwhy?"},
            {"role": "assistant", "content": "so"},
        ),
        "w",
    )
    (found,), _, _ = drive(RemoveContext(begin="<doc>", end="</doc>"), [sample])
    assert found.messages == (
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so"},
    ) and found.parents == (sample.id,)
    bare, tally, _ = drive(RemoveContext(), answers(("p", "a")))
    assert len(bare) == 1 and tally.facts == {"without_context": 1}
    only = answers(("<doc>x</doc>", "a"))
    assert drive(RemoveContext(begin="<doc>", end="</doc>"), only)[1].dropped == {"nothing is left of the prompt": 1}


def test_a_conversation_is_a_sample_for_each_answer():
    messages = tuple({"role": role, "content": f"{role}{n}"} for n in range(3) for role in ("user", "assistant"))
    found, _, _ = drive(Turns(), [Sample(messages, "w", (1, 2), meta={"prompt_id": "p"})])
    assert [sample.messages for sample in found] == [messages[:2], messages[:4], messages] and found[
        -1
    ].response_ids == (1, 2)
    assert found[0].response_ids is None and len({sample.meta["prompt_id"] for sample in found}) == 3


def test_earlier_answers_are_whole_and_have_no_judgement_of_the_last():
    messages = tuple({"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant"))
    judged = {
        "scores": {"x": 1.0},
        "place": 1,
        "answers": ["a"],
        "check": {"type": "number"},
        "final": "1",
        "margin": 2.0,
    }
    meta = {"prompt_id": "p", "kind": "k", "finish": "length"} | judged
    (first, last), _, _ = drive(Turns(), [Sample(messages, "w", (1, 2), meta=meta)])
    assert first.meta == {"prompt_id": "p/1", "kind": "k", "finish": "ok"}
    assert last.meta == meta | {"prompt_id": "p/2"} and last.response_ids == (1, 2)


def test_answers_of_weight_0_and_calls_of_tools_are_no_samples():
    messages = [{"role": role, "content": f"{role}{n}"} for n in range(3) for role in ("user", "assistant")]
    messages[3] |= {"tool_calls": "[]"}
    sample = Sample(tuple(messages), "w", meta={"prompt_id": "p", "untrained": ["assistant0"]})
    (found,), tally, _ = drive(Turns(), [sample])
    assert found.messages == tuple(messages) and found.meta["prompt_id"] == "p/3"
    assert tally.dropped == {"an answer of weight 0": 1} and tally.facts == {"calls_of_tools": 1}


def test_a_conversation_that_waits_for_an_answer_stays():
    messages = tuple({"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant"))
    waiting = Sample(messages[:3], "corpus", meta={"prompt_id": "p", "answers": ["a"]})
    (first, found), _, _ = drive(Turns(), [waiting])
    assert first.messages == messages[:2] and "answers" not in first.meta and found == waiting
    assert found.meta["answers"] == ["a"]


# Mosaics: reading the instruction anew must give the answer


def read_again(prompt, by_task):
    """The answer that the instruction asks for, worked out from its words."""
    told, *rest = prompt.split("\n\n")
    tasks = [re.fullmatch(r"(\d+)\. (.*)", each).groups() for each in rest]
    assert [int(number) for number, _ in tasks] == list(range(1, len(tasks) + 1))
    names = [text for _, text in tasks]
    places, form = list(range(len(names))), "{a}"
    odd = [p for p in places if p % 2 == 0]
    even = [p for p in places if p % 2 == 1]
    if "from the last to the first" in told:
        places.reverse()
    elif "reverse alphabetical" in told:
        places.sort(key=lambda p: names[p], reverse=True)
    elif "alphabetical" in told:
        places.sort(key=lambda p: names[p])
    elif found := re.search(r"the one with the (fewest|most) (characters|words) to", told):
        size = len if found[2] == "characters" else (lambda text: len(text.split()))
        places.sort(key=lambda p: size(names[p]) * (1 if found[1] == "fewest" else -1))
    elif "odd numbers first" in told:
        places = odd + even
    elif "even numbers first" in told:
        places = even + odd
    elif found := re.search(r"in this order: ([\d, ]+)\.", told):
        places = [int(n) - 1 for n in found[1].split(", ")]
    elif found := re.search(r"Leave out these tasks: ([\d, ]+)\.", told):
        places = [p for p in places if p + 1 not in {int(n) for n in found[1].split(", ")}]
    elif found := re.search(r"Leave out the (\d+) tasks with the (most|fewest) characters", told):
        ranked = sorted(places, key=lambda p: len(names[p]) * (-1 if found[2] == "most" else 1))
        places = [p for p in places if p not in ranked[: int(found[1])]]
    elif "Leave out the tasks with odd" in told:
        places = even
    elif "Leave out the tasks with even" in told:
        places = odd
    for words, shape in FORMATS.values():
        if words in told:
            form = shape.replace("{number}", "{n}").replace("{answer}", "{a}")
    return "\n\n".join(form.replace("{n}", str(p + 1)).replace("{a}", by_task[names[p]]) for p in places)


def test_a_mosaic_says_what_its_instruction_asks_for():
    pairs = [(f"task {'very ' * (n % 4)}{chr(120 - n)} of {n * 37 % 50}", f"answer {n}") for n in range(24)]
    found, tally, asked = drive(Mosaic(passes=40, most=6), answers(*pairs))
    joined = [sample for sample in found if sample.meta.get("kind") == "mosaic"]
    told = {sample.messages[0]["content"].split("\n\n")[0] for sample in joined}
    for sample in joined:
        prompt, answer = (message["content"] for message in sample.messages)
        assert answer == read_again(prompt, dict(pairs)), prompt
        assert 2 <= len(sample.parents) <= 6
    shapes = [re.escape(words.split("{")[0].rstrip()) for words in (*ORDERS.values(), *MASKS.values())] + [
        re.escape(w) for w, _ in FORMATS.values()
    ]
    assert all(any(re.search(shape, words) for words in told) for shape in shapes) and not asked
    assert tally.facts["joined"] == len(joined)


def test_every_pass_holds_every_sample_once_and_mosaics_stay_short():
    pairs = [(f"task {n}", "word " * 30) for n in range(30)]
    pool = answers(*pairs)
    found, _, _ = drive(Mosaic(passes=1, most=10, words=100), pool)
    names = [name for sample in found for name in (sample.parents or (sample.id,))]
    assert sorted(names) == sorted(sample.id for sample in pool)
    assert all(len(sample.parents) <= 3 for sample in found)
    assert drive(Mosaic(), [*prompts("no answer")])[1].dropped == {"not one question with its answer": 1}
    assert drive(Mosaic(), pool)[0] == drive(Mosaic(), pool)[0] != drive(Mosaic(), pool, seed=1)[0]


def test_a_mosaic_has_no_answer_that_was_cut_off():
    found, tally, _ = drive(Mosaic(passes=1), [*answers(("a", "x")), *answers(("b", "y"), finish="length")])
    assert texts(found) == [("a", "x")] and tally.dropped == {"answer: length": 1}
