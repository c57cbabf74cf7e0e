"""Tasks from texts and problems from code: drawn types and lines, every reason to go, exact counts."""

from __future__ import annotations

from limbeck.elicit.document import TASKS, DocumentTasks, OssInstruct
from limbeck.elicit.prompts import load_prompts
from tests.flow_driver import drive, prompts

TEXT = "The mill was built in 1820. It ground corn for a century."


def said(request):
    return request.messages[-1]["content"]


def test_tasks_of_drawn_types_about_every_text():
    pool, tally, asked = drive(
        DocumentTasks(each=3, types=("summary", "title", "simple", "term")),
        prompts(TEXT, "Bees make honey."),
        lambda r, n: f"Task: do {n} and {n}\nAnswer: so {n}",
    )
    assert len(pool) == len(asked) == 6 == DocumentTasks(each=3).estimate(2).requests and not tally.dropped
    assert all(said(request).startswith(("Text:\nThe mill", "Text:\nBees")) for request in asked)
    for text in (TEXT, "Bees make honey."):
        kinds = [sample.meta["kind"] for sample in pool if sample.messages[0]["content"].startswith(text)]
        assert len(set(kinds)) == 3 and set(kinds) <= set(TASKS)
    first = pool[0]
    assert (
        first.messages[0]["content"].endswith("\n\ndo 0 and 0")
        and first.messages[-1]["content"] == "so 0"
        and first.response_ids is None
    )
    again, _, _ = drive(
        DocumentTasks(each=3, types=("summary", "title", "simple", "term")),
        prompts(TEXT, "Bees make honey."),
        lambda r, n: f"Task: do {n} and {n}\nAnswer: so {n}",
    )
    assert [sample.id for sample in again] == [sample.id for sample in pool]


def test_a_task_goes_for_a_reason():
    replies = [
        "Task: when was it built?\nAnswer: In 1820.",
        "Task: when?\nAnswer: in 1920",
        "Answer: corn",
        "Task: what?",
        ("Task: a", "length"),
        "Task: When was it built?\nAnswer: in 1820",
    ]
    pool, tally, _ = drive(
        DocumentTasks(types=("question",)),
        prompts(*[TEXT] * 1, *[f"{TEXT} {n}" for n in range(4)]),
        lambda r, n: replies[n],
    )
    assert len(pool) == 1 and tally.dropped == {
        "the answer is not in the text": 1,
        "no task": 1,
        "no answer": 1,
        "answer: length": 1,
    }
    pool, tally, _ = drive(
        DocumentTasks(types=("gap", "a poem about it")), prompts(TEXT), lambda r, n: [replies[0], replies[5]][n]
    )
    assert len(pool) == 1 and tally.dropped == {"like another task on the text": 1}


def test_a_type_may_be_described_in_the_recipe():
    _, _, (request,) = drive(
        DocumentTasks(types=("the instruction to rhyme it, with a rhyme",)), prompts(TEXT), lambda r, n: ""
    )
    assert "Make the instruction to rhyme it, with a rhyme." in said(request)


def test_pieces_of_code_are_consecutive_lines_and_inspire_problems():
    program = "\n".join(f"line_{n} = {n}" for n in range(40))
    fine = "Problem: Print {n} numbers of kind {n}\nSolution: thus\n```python\nprint({n})\n```"
    pool, tally, asked = drive(OssInstruct(each=8), prompts(program), lambda r, n: fine.replace("{n}", str(n)))
    assert (
        len(pool) + tally.dropped["like another problem"] == len(asked) == 8 == OssInstruct(each=8).estimate(1).requests
    )
    sizes = set()
    for request in asked:
        lines = said(request).split("```")[1].strip().splitlines()
        numbers = [int(line.split()[-1]) for line in lines]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and 1 <= len(numbers) <= 15
        sizes.add(len(numbers))
    assert (
        len(sizes) > 2
        and pool[0].messages[0]["content"] == "Print 0 numbers of kind 0"
        and pool[0].messages[-1]["content"].startswith("thus")
    )


def test_a_problem_goes_for_a_reason():
    replies = [
        "Solution: x",
        "Problem: x",
        "Problem: x\nSolution: in words",
        "Problem: x\nSolution: ```\n```",
        ("", "empty"),
    ]
    pool, tally, _ = drive(OssInstruct(), prompts("a", "b", "c", "d", "e"), lambda r, n: replies[n])
    assert not pool and tally.dropped == {"no problem": 1, "no solution": 1, "no program": 2, "answer: empty": 1}


def test_the_seeds_are_there():
    assert len({prompt.text for prompt in load_prompts("builtin/code")}) == 16
