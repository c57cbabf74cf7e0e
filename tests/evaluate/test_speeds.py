"""Speeds are taken in turns and keep their spread; a busy machine is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from limbeck.elicit.prompts import Prompt
from limbeck.evaluate import efficiency
from limbeck.evaluate.efficiency import SPEEDS, machine_facts, time_in_turns
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.protocol import EvaluationProtocol
from limbeck.evaluate.records import CheckedAnswer, SystemRecords
from limbeck.evaluate.tasks import load_task
from limbeck.models.context import PromptContext
from limbeck.models.model import Model
from limbeck.report.grids import efficiency_grid

MESSAGES = ({"role": "user", "content": "why is the sky blue"},)


def records(name: str, layers: int) -> SystemRecords:
    return SystemRecords(
        name=name, fidelity=[], own=[], own_text=[], free=[], answers=[], tasks={}, efficiency={"layers": layers}
    )  # fmt: skip


def test_two_systems_take_turns_and_stay_in_memory(tiny, monkeypatch):
    turns, loads = [], []
    whole = efficiency._one_round

    def seen(model, prompt):
        turns.append(model.identity)
        return whole(model, prompt)

    monkeypatch.setattr(efficiency, "_one_round", seen)
    monkeypatch.setattr(efficiency, "DECODED", 4)

    def load(name):
        def made() -> Model:
            loads.append(name)
            return tiny

        return made

    speeds, machine = time_in_turns({"teacher": load("teacher"), "student": load("student")}, MESSAGES, rounds=3)
    assert loads == ["teacher", "student"] and len(turns) == 6 and machine["rounds"] == 3
    for name in ("teacher", "student"):
        for speed in SPEEDS:
            low, high = speeds[name]["spread"][speed]
            assert 0 < low <= speeds[name][speed] <= high
    loads.clear()
    time_in_turns({name: load(name) for name in "abc"}, MESSAGES, rounds=2)
    assert loads == ["a", "b", "c", "a", "b", "c"]  # never more than one of three in memory


def test_the_rounds_alternate(monkeypatch):
    order = []

    class Named:
        def __init__(self, name):
            self.name = name

        def prompt_ids(self, messages):
            return [1]

    monkeypatch.setattr(efficiency, "_seconds", lambda model, prompt, tokens: 0.0)
    monkeypatch.setattr(
        efficiency, "_one_round", lambda model, prompt: order.append(model.name) or dict.fromkeys(SPEEDS, len(order))
    )
    speeds, _ = time_in_turns({name: lambda name=name: Named(name) for name in "ab"}, MESSAGES, rounds=3)
    assert order == list("ababab")
    assert speeds["a"]["first_token_ms"] == 3 and speeds["a"]["spread"]["first_token_ms"] == [1, 5]


@pytest.mark.parametrize(
    ("share", "load", "cores", "busy"),
    [
        (0.99, 2.0, 2, False),
        (0.99, None, 2, False),  # a system that tells no load
        (0.55, 2.0, 2, True),  # the share alone shows it: another container's work
        (0.99, 3.5, 2, True),
        (0.99, 3.5, 64, False),
    ],
)
def test_a_busy_machine_is_told(share, load, cores, busy):
    facts = machine_facts(share, load, cores)
    assert facts["busy"] is busy and bool(facts["note"]) is busy
    if busy:
        assert f"{share:.0%}" in facts["note"] and "busy" in facts["note"]
    grid = efficiency_grid({"efficiency": {"teacher": {"layers": 3}}, "speeds": facts}, {})
    assert grid is not None and grid.note == facts["note"]


def test_old_summaries_without_speeds_still_have_their_table():
    grid = efficiency_grid({"efficiency": {"teacher": {"layers": 3, "first_token_ms": 2.0}}}, {})
    assert grid is not None and grid.note == "" and grid.rows[0][1] == ["3", "2.0"]


def test_a_student_of_the_teachers_sizes_is_not_timed_with_the_teachers_prompt(tiny, tmp_path):
    protocol = EvaluationProtocol(rows=(), prompts=(Prompt("a", "why", ""),), tasks=(), max_tokens=8, own_prompts=1)
    names = ("teacher", "prompted", "untouched", "student")

    def shapes(reader):
        bench = Bench(tmp_path, None, reader, protocol)
        return [bench._shape(records(name, 3)) for name in names]

    assert len(set(shapes(tiny))) == 1
    teacher, prompted, untouched, student = shapes(tiny.with_context(PromptContext("Be brief.")))
    assert teacher == prompted != untouched == student


def test_answers_are_shared_with_a_task_for_the_same_text_and_check_alone(tiny, tmp_path):
    check = {"type": "exact", "answer": "blue"}
    held_out = [Prompt(ident, "why", "", check=check) for ident in ("same", "other text", "other check", "not asked")]
    items = (
        Prompt("same", "why", "", check=check),
        Prompt("other text", "why not", "", check=check),
        Prompt("other check", "why", "", check={"type": "exact", "answer": "red"}),
        Prompt("not held out", "why", "", check=check),
    )
    protocol = EvaluationProtocol(rows=(), prompts=held_out, tasks=(), max_tokens=8, own_prompts=1)
    answers = [CheckedAnswer(prompt.id, "", "blue", 1, True, True) for prompt in held_out]
    task = replace(load_task("everyday", 1), items=items)
    assert Bench(tmp_path, None, tiny, protocol)._shared(task, answers) == {"same": answers[0]}


def test_one_of_each_shape_is_timed_once_and_all_of_the_shape_get_it(tiny, tmp_path, monkeypatch):
    protocol = EvaluationProtocol(rows=(), prompts=(Prompt("a", "why", ""),), tasks=(), max_tokens=8, own_prompts=1)
    bench = Bench(tmp_path, None, tiny, protocol)
    timed = []

    def pretend(systems, messages):
        timed.append(list(systems))
        return {name: {"first_token_ms": float(number)} for number, name in enumerate(systems)}, {"busy": False}

    monkeypatch.setattr("limbeck.evaluate.measure.time_in_turns", pretend)
    bench.loads = dict.fromkeys(("teacher", "untouched", "student"), lambda: tiny)
    systems = {"served": [records("served", 9)]}  # was never loaded
    systems |= {name: [records(name, layers)] for name, layers in (("teacher", 4), ("untouched", 3), ("student", 3))}
    for _ in range(2):
        assert bench.timed(systems, measure=False) == systems and not (bench.folder / "speeds.json").exists()
    found = bench.timed(systems, measure=True)
    assert timed == [["teacher", "untouched"]]
    speeds = {name: seeds[0].efficiency.get("first_token_ms") for name, seeds in found.items()}
    assert speeds == {"served": None, "teacher": 0.0, "untouched": 1.0, "student": 1.0}
    assert bench.speeds() == {"busy": False} and json.loads((tmp_path / "speeds.json").read_text())["machine"]
