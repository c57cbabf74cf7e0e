"""`limbeck check` says whether a recipe can run here and what it costs, and its exit status says the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from limbeck.config.recipe import as_yaml, parse
from limbeck.runs import preflight
from limbeck.runs.hardware import GIB
from limbeck.runs.preflight import check
from tests.command_line import called
from tests.scripted_server import Scripted, answer


@pytest.fixture
def file(recipe_data, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(parse(recipe_data)))
    return file


def test_a_recipe_that_does_not_fit_the_device_is_refused(file, monkeypatch):
    assert called("check", file)[0] == 0  # no memory is known of a processor
    made = preflight.make_plan
    monkeypatch.setattr(
        preflight, "make_plan", lambda *a, **k: replace(made(*a, **k), memory_bytes=9 * GIB, device_memory=8 * GIB)
    )
    status, printed = called("check", file)
    words = " ".join(printed.split())
    assert status == 2 and "will not fit: peak memory, 9.0 GiB of 8 GiB: TOO MUCH; it needs teacher.dtype" in words
    assert "can run" not in words
    status, printed = called("check", file, "--json")
    assert status == 2 and json.loads(printed)["plan"]["fits"] is False


def test_how_many_texts_are_trained_and_held_out(recipe_data):
    whole, limited = (
        check(parse(recipe_data | {"prompts": recipe_data["prompts"] | more})) for more in ({}, {"limit": 9})
    )
    assert dict(whole.lines())["texts"] == "18 trained, 2 held out"
    assert dict(limited.lines())["texts"] == "9 trained (no more, by prompts.limit), 2 held out"


def asked(url, price, **step):
    """A recipe whose server is asked in a step that asks again for what can't be read."""
    server = {"url": url, "name": "toy"} | ({"price": price} if price else {})
    return {
        "teacher": {"server": server},
        "elicit": [{"ask": {"prompt": "Label {{ prompt }}", "parse": {"label": ["a", "b"]}, **step}}],
        "writer": [{"by": "elicited"}],
        "loss": ["cross_entropy"],
    }


def test_what_is_asked_again_is_counted_apart_and_the_text_has_its_price(recipe_data, tiny_folder):
    with Scripted(lambda number, body: answer()) as server:
        student = {"student": {"start": {"pretrained": str(tiny_folder)}}}
        price = {"input": 1e6, "output": 2e6}  # a token read costs 1, a written one 2
        plan = check(parse(recipe_data | student | asked(server.url, price)))
        never = check(parse(recipe_data | student | asked(server.url, price, retries=0)))
        free = check(parse(recipe_data | student | asked(server.url, None)))
    lines, cost = dict(plan.lines()), plan.text_cost
    measured = 2 + 8  # greedy answers to the held-out prompts, and the task's items
    assert plan.requests == never.requests == 18 + 2 + measured and plan.again[0] == 2 * 18 and never.again == (0, 0)
    assert lines["requests to the teacher"] == "30 (at most 66, if every answer is asked for again)"
    assert dict(never.lines())["requests to the teacher"] == "30"
    assert cost["about"] == cost["tokens_read"] + 2 * cost["tokens_written"] == never.text_cost["at_most"]
    assert cost["tokens_written"] == plan.teacher_tokens and cost["tokens_read"] > 0
    assert cost["at_most"] > 1.5 * cost["about"]
    assert f"about {cost['about']:,.2f} (at most {cost['at_most']:,.2f}, if" in lines["cost of the teacher's text"]
    assert "at most" not in dict(never.lines())["cost of the teacher's text"]
    assert free.text_cost is None and "cost of the teacher's text" not in dict(free.lines())


def test_what_the_teacher_is_shown_is_counted_as_it_is_asked(recipe_data, tiny_folder):
    """A question with forty labels, a system message, and the same question at the held-out texts."""
    labels = [f"label-{number:04d}" for number in range(100)]
    with Scripted(lambda number, body: answer()) as server:
        student = {"student": {"start": {"pretrained": str(tiny_folder)}}}
        data = recipe_data | student | asked(server.url, {"input": 1e6, "output": 2e6}, retries=0)
        data["teacher"]["server"]["tokens_per_minute"] = 1000
        more = data | {"teacher": data["teacher"] | {"context": {"system": "one two three " * 40}}}
        data["elicit"][0]["ask"]["parse"] = {"label": labels}
        wide = {
            "prompt": "Which of {{ labels | join(' ') }} fits {{ prompt }}",
            "parse": {"label": labels},
            "retries": 0,
        }
        varied = wide | {"prompt": wide["prompt"] + "{{ prompt | length }}"}
        plain, listed, row, told = (
            check(parse(each)) for each in (data, *(data | {"elicit": [{"ask": ask}]} for ask in (wide, varied)), more)
        )
    read = [plan.text_cost["tokens_read"] for plan in (plain, listed, row, told)]
    asked_for, measured = 18, plain.requests - 18
    assert read[1] > read[0] + 100 * (asked_for + measured)  # each question has every label
    assert read[0] + 100 * asked_for < read[2] < read[1]  # what is measured has not the template of one prompt alone
    assert read[3] > read[0] + 40 * (asked_for + measured)
    minutes = [float(plan.unknown["elicit"].split()[2]) for plan in (plain, listed)]
    assert minutes[1] > minutes[0] + 100 * (asked_for + 2) / 1000
