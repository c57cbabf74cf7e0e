"""`ask`: a template is asked as it stands in the recipe, replies are read or counted, and nothing is asked twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from limbeck import check
from limbeck.config.recipe import parse
from limbeck.config.sections import Elicit
from limbeck.elicit import rendering
from limbeck.elicit.engine import Engine, StoppedEarlyError
from limbeck.elicit.flow import StepContext, Tally, answer_of
from limbeck.elicit.parse import Parsing, UnparsedError
from limbeck.elicit.step import Estimate
from limbeck.elicit.steps import check_steps, steps_of
from limbeck.storage.store import Store
from limbeck.types import Generated, RecipeError, Sample
from tests.flow_driver import answers, drive, prompts, texts

COLOURS = {"label": ["red", "dark red", "blue"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "where": {"$ref": "#/$defs/place"},
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["name"],
    "$defs": {
        "place": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"town": {}, "land": {}}}]},
        "tag": {"type": "object", "properties": {"z": {}, "a": {}, "more": {"$ref": "#/$defs/tag"}}},
    },
}


def asking(**settings):
    ((_, step),) = steps_of([Elicit(name="ask", params={"prompt": "{{ prompt }}"} | settings)])
    return step


def refused(pool=(), **settings):
    with pytest.raises(RecipeError) as error:
        check_steps([("ask", asking(**settings))], list(pool))
    return str(error.value)


def said(*replies):
    """The n-th question gets the n-th reply."""
    return lambda request, number: replies[number]


# Templates


@pytest.mark.promise("S3")
def test_a_template_sees_the_sample_and_the_student_does_not_see_the_template():
    sample = Sample(
        ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "My {{ 7 * 7 }} cat {% raw %}"}),
        "corpus",
        meta={"prompt_id": "p", "kind": "pets", "answers": ["one", "two"], "facts": {"age": 3}},
    )
    template = (
        "{{ system }} {{ kind }}{{ task }} {{ labels | join('/') }} {{ answers[1] }} {{ facts.age + 1 }} {{ facts }}\n"
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    step = asking(prompt=template, system="You know {{ kind }}.", parse=COLOURS)
    (found,), _, (asked,) = drive(step, [sample], said("Blue."))
    assert [message["content"] for message in asked.messages] == [
        "You know pets.",
        'Be kind. pets red/dark red/blue two 4 {"age": 3}\nsystem: Be kind.\nuser: My {{ 7 * 7 }} cat {% raw %}',
    ]
    assert found.messages == (*sample.messages, {"role": "assistant", "content": "blue"})
    assert found.meta == sample.meta | {"finish": "ok"} and found.response_ids is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ ''['__cla' ~ 'ss__'].__mro__ }}", "is unsafe"), ("{{ labels.append('x') }}", "is unsafe, for the prompt 'a'; its fields: answers"),
        ("{{ messages.__init__.__globals__ }}", "is unsafe"), ("{{ ('%' ~ 'c') | format(prompt) | attr('__class__') }}", ""),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10 ** 7 }}", "more than 200,000 characters"),
        ("{% for i in range(90000) %}xyz{% endfor %}", "more than 200,000 characters"),
        ("{{ 'x' * 10 ** 10 }}", "1024 MiB for 2 samples"), ("{{ '%2000000000d' % 1 }}", "1024 MiB"),
        ("{% include 'x' %}", "no loader"), ("{{ lipsum() }}", "no field 'lipsum'"), ("{{ labels | random }}", "No filter named 'random'"),
        ("{{ labels | map('upper') }}", "a generator can't be printed"), ("{{ prompt + 1 }}", "can only concatenate"),
        ("{% for", "this is no template: line 1"), ("\n\n{{ prompt | shout }}", "line 3: No filter named 'shout'"),
        ("{# nothing #}", "it asks nothing"),
        ("{{ promt }}", "no field 'promt'; did you mean 'prompt'?"), ("{{ age }}", "legal: answer, answers, check, kind"),
        ("{{ answer }}", "'answer' is undefined, for the prompt 'a'; its fields: answers, kind, labels, messages, prompt"),
    ],
)  # fmt: skip
@pytest.mark.promise("S3")
def test_templates_that_can_t_be_used_are_refused_before_anything_is_asked(template, words):
    message = refused(prompts("a", "b"), prompt=template)
    assert message.startswith("elicit[0].ask") and words in message


@pytest.mark.promise("S3")
def test_a_template_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(rendering, "CPU_SECONDS", 1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "more than 1 seconds or 1024 MiB" in refused(prompts("a"), prompt=loops)
    monkeypatch.setattr(rendering, "SECONDS", 0.0)
    assert "take more than" in refused(prompts("a"))


def test_many_samples_are_rendered_in_parts(monkeypatch):
    monkeypatch.setattr(rendering, "TOGETHER", 50)
    rows = [{"x": "y" * number} for number in (1, 100, 2, 3, 60)]
    found = rendering.render({"a": "<{{ x }}>", "b": "{{ x | length }}"}, rows, "here")
    assert found.rows == [{"a": f"<{row['x']}>", "b": str(len(row["x"]))} for row in rows]
    assert found.names == {"a": {"x"}, "b": {"x"}}
    assert rendering.render({"a": "{{ x }}"}, [], "here").rows == []


def test_steps_know_what_earlier_ones_write():
    steps = [asking(into="topic"), asking(prompt="{{ topic }}", into="prompt"), asking(prompt="{{ final }}")]
    with pytest.raises(RecipeError, match=r"^elicit\[2\].ask.prompt: there is no field 'final'; .*topic"):
        check_steps([("ask", step) for step in steps], prompts("a"))
    ((_, rationale),) = steps_of([Elicit(name="rationale")])
    check_steps([("ask", steps[0]), ("rationale", rationale), ("ask", steps[2])], prompts("a"))
    pool = prompts("a", topic="tea") + prompts("b")
    found, tally, _ = drive(asking(prompt="{{ topic }}"), pool, said("x"))
    assert texts(found) == [("a", "x")] and tally.dropped == {"the template: 'topic' is undefined": 1}


def test_check_renders_it_for_every_prompt(recipe_data):
    elicit = [{"ask": {"prompt": "{{ prompt }} {{ answers[0] }}"}}]
    recipe = parse(recipe_data | {"elicit": elicit, "writer": [{"by": "elicited"}]})
    with pytest.raises(RecipeError, match=r"^elicit\[0\].ask.prompt: list object has no element 0, for the prompt"):
        check(recipe)


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "elicitation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(elicit:\n  - ask:.*?)```", page, re.DOTALL)
    steps = steps_of(
        [Elicit(name=name, params=entry[name]) for entry in yaml.safe_load(block)["elicit"] for name in entry]
    )
    pool = prompts("My lamp of 5 euros broke.")
    check_steps(steps, pool)
    pool, _, (asked,) = drive(steps[0][1], pool, said("A partial refund."))
    assert asked.messages[1]["content"].startswith(
        "Classify the message into one of: refund, partial refund, other.\nMess"
    )
    replies = [
        '{"price": 5, "item": "lamp"}',
        "?",
        '{"item": "lamp", "price": 5}',
        '{"item": "a lamp"}',
        "{}",
        "?",
        "?",
        "?",
        "?",
    ]
    (found,), tally, asked = drive(steps[1][1], pool, said(*replies))
    assert asked[0].messages[0]["content"].startswith("A customer wants a partial refund.\nTake the facts")
    assert answer_of(found) == '{"item": "lamp", "price": 5}' and found.meta["scores"] == {"agreement": 0.4}


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parse": "txt"}, ".parse: 'txt' is no way to read an answer; give text, {label: [A, B]}"),
        ({"parse": {"labl": ["a", "b"]}}, ".parse.labl: unknown key; did you mean 'label'?"),
        ({"parse": {}}, ".parse: give exactly one of"), ({"parse": COLOURS | {"pattern": "(a)"}}, ".parse: give exactly one of"),
        ({"parse": {"label": [True, False]}}, ".parse.label: YAML reads an unquoted yes or true as True; quote it"),
        ({"parse": {"label": ["sci-fi", "Sci Fi"]}}, ".parse.label: the label 'sci fi' is empty, or stands twice"),
        ({"parse": {"label": ["a"]}}, ".parse.label: "),
        ({"parse": {"json": {"type": "objct"}}}, ".parse.json: in it: this is not a JSON Schema"),
        ({"parse": {"json": {"$ref": "https://x.example/s"}}}, "nothing is fetched"),
        ({"parse": {"pattern": "abc"}}, ".parse.pattern: 'abc' has no group"), ({"parse": {"pattern": "(a"}}, "is not a regular expression"),
        ({"into": "check"}, ".into: 'check' can't be written"), ({"into": "My Field"}, ".into: "),
        ({"n": 3}, "3 draws at temperature 0 are all the same"), ({"vote": True}, "a vote needs several draws"),
        ({"n": 3, "temperature": 1, "into": "x"}, "'x' takes one value and n is 3"), ({"prompt": ""}, ".prompt: "),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_their_place(settings, words):
    assert words in refused(**settings)


def test_the_estimate_counts_every_retry():
    step = asking(n=3, vote=True, temperature=0.7, retries=1, max_tokens=100)
    assert step.estimate(10) == Estimate(60, 3900, samples=10)
    assert asking(n=3, temperature=0.7, retries=0).estimate(10).samples == 30


# Reading answers


@pytest.mark.parametrize(
    ("form", "reply", "value"),
    [
        ("text", " two words\n", "two words"),
        (COLOURS, "Dark red", "dark red"), (COLOURS, "It is dark red, I think.", "dark red"), (COLOURS, "**Red**", "red"),
        (COLOURS, "It's not blue. The answer is red.", "red"), (COLOURS, r"blue? dark red? \boxed{blue}", "blue"),
        ({"label": [1, 2, 3]}, "I rate it 2.", "2"), ({"label": ["yes", "no"]}, "No.", "no"), ({"label": ["是", "否"]}, "是", "是"),
        ({"pattern": r"Grade: (\d)"}, "Good. Grade: 4 of 5", "4"),
        ({"pattern": r"(?P<who>\w+) is (?P<what>\w+)(?P<why> since .*)?"}, "She: Ann is tall", {"who": "Ann", "what": "tall", "why": ""}),
        ({"json": {"type": "array"}}, "[1, 2]", [1, 2]), ({"json": {"type": "string"}}, '"x"', "x"),
        ({"json": SCHEMA}, 'Here: {"name": "A {brace}"} as asked.', {"name": "A {brace}"}),
        ({"json": SCHEMA}, 'So:\n```json\n{"name": "é"}\n```\nand not {"name": 1}', {"name": "é"}),
    ],
)  # fmt: skip
def test_what_is_read(form, reply, value):
    assert Parsing.model_validate(form).read(reply) == value


@pytest.mark.parametrize(
    ("form", "reply", "why"),
    [
        (COLOURS, "green", "no label"), (COLOURS, "reddish", "no label"), (COLOURS, "It is not red.", "no label"),
        (COLOURS, "red or blue", "several labels"), (COLOURS, "dark red, that is red", "several labels"),
        ({"pattern": r"Grade: (\d)"}, "Grade: A", "the pattern is not in it"), ({"pattern": "a(x*)"}, "a", "the pattern's group is empty"),
        ({"pattern": "((a|aa)+)$"}, "a" * 200 + "b", "the pattern takes too long"),
        ({"json": SCHEMA}, "none", "no JSON"), ({"json": SCHEMA}, '{"name": 1}', "JSON that the schema refuses"),
        ({"json": SCHEMA}, '{"name": "a"} or {"name": "b"}', "no JSON"), ({"json": {}}, '{"a": 1, "a": 2}', "no JSON"),
        ({"json": {}}, "NaN", "no JSON"), ({"json": {}}, "1e999", "no JSON"), ({"json": {}}, r'"\ud800"', "no JSON"),
        ({"json": {}}, "[" * 100_000, "no JSON"), ({"json": {}}, "1" * 5000, "no JSON"), ({"json": {}}, " " * 100_001, "too long to be read"),
    ],
)  # fmt: skip
def test_what_can_t_be_read_is_no_value(form, reply, why):
    with pytest.raises(UnparsedError, match=why):
        Parsing.model_validate(form).read(reply)


def test_json_is_taught_with_its_keys_in_the_schema_s_order():
    reply = {"zz": 1, "tags": [{"a": 1, "z": {"y": 1, "b": 2}, "more": {"a": 1, "z": 0}}], "b": [], "name": "é"}
    reply["where"] = {"land": "NO", "town": "Bø"}
    (found,), _, _ = drive(asking(parse={"json": SCHEMA}), prompts("p"), said(json.dumps(reply)))
    assert answer_of(found) == (
        '{"where": {"town": "Bø", "land": "NO"}, "name": "é",'
        ' "tags": [{"z": {"b": 2, "y": 1}, "a": 1, "more": {"z": 0, "a": 1}}], "b": [], "zz": 1}'
    )


def test_thinking_is_cut_off_and_the_writer_s_own_tokens_are_kept():
    thought = '<think>Maybe {"name": "B"}.</think>\n```json\n{"name": "A"}\n```'
    pool, tally, asked = drive(asking(parse={"json": SCHEMA}), prompts("p"), said(thought))
    assert texts(pool) == [("p", '{"name": "A"}')] and pool[0].response_ids is None
    unfinished = drive(asking(retries=0), prompts("p"), said("<think>and"))
    assert unfinished[0] == [] and unfinished[1].dropped == {"answer: nothing but thinking": 1}
    ((sample,), _, _) = drive(asking(), prompts("p"), said(" Just so.\n"))
    assert answer_of(sample) == " Just so.\n" and sample.response_ids == (1, 2)
    ((other,), _, _) = drive(asking(), prompts("p"), said("<think>x</think>Just so."))
    assert answer_of(other) == "Just so." and other.response_ids is None


# Where it goes


def test_into_a_prompt_into_a_field_and_into_an_answer():
    pool = answers(("old", "kept"), check={"type": "exact", "answer": "x"}, scores={"s": 1.0}, kind="k")
    ((new,), _, _) = drive(asking(into="prompt"), pool, said("new"))
    assert texts([new]) == [("new", "kept")] and new.writer == "writer" and new.parents[0] == pool[0].id
    assert new.meta.keys() == {"prompt_id", "kind"} and new.meta["prompt_id"] != pool[0].meta["prompt_id"]
    ((field,), _, _) = drive(asking(into="facts", parse={"json": SCHEMA}), pool, said('{"name": "A"}'))
    assert texts([field]) == texts(pool) and field.meta == pool[0].meta | {"facts": {"name": "A"}}
    ((task,), _, _) = drive(asking(into="task", parse={"json": {}}), pool, said("[1]"))
    assert task.meta["task"] == "[1]"
    ((again,), _, _) = drive(asking(prompt="{{ answer }}?"), pool, said("better"))
    assert texts([again]) == [("old", "better")] and "scores" not in again.meta and again.meta["check"]


def test_several_draws_give_several_samples_but_each_text_once():
    step = asking(n=3, temperature=1.0)
    pool, tally, asked = drive(step, prompts("p", "q"), said("a", "b", "a", "c", "c", "c"))
    assert texts(pool) == [("p", "a"), ("p", "b"), ("q", "c")] and tally.dropped == {"the same again": 3}
    assert len({request.key for request in asked}) == 6 and len({request.seed for request in asked[:3]}) == 3


def test_the_most_frequent_reading_wins_and_ties_are_dropped():
    step = asking(n=4, temperature=1.0, vote=True, parse=COLOURS, retries=0)
    replies = ["red", "It is blue.", "Blue!", "green", "red", "dark red", "Dark Red", "red.", *["?"] * 4]
    pool, tally, _ = drive(step, prompts("p", "q", "r"), said(*replies))
    assert texts(pool) == [("p", "blue")] and pool[0].meta["scores"] == {"agreement": 0.5}
    assert tally.dropped == {"a tie": 1, "answer: no label": 5} and tally.examples["a tie"] == ["red; dark red"]


# Asking again


def test_what_can_t_be_read_is_asked_again_with_another_seed():
    replies = ["green", "blue", "?", "purple", ("", "empty"), "pink", ("", "error")]
    step = asking(parse=COLOURS, retries=2)
    pool, tally, asked = drive(step, prompts("a", "b", "c"), said(*replies[:6], "?", "red"))
    assert [(request.messages[-1]["content"]) for request in asked] == ["a", "b", "c", "a", "c", "a", "c"]
    assert texts(pool) == [("b", "blue")] and tally.facts == {"asked_again": 4}
    assert tally.dropped == {"answer: no label": 2}
    of_a = [request for request in asked if request.messages[-1]["content"] == "a"]
    assert len({request.seed for request in of_a}) == 3
    assert [request.sampling.temperature for request in of_a] == [0.0, 0.7, 0.7]
    assert all(len(request.messages) == 1 for request in asked), "nobody is told what was wrong"
    warm = drive(asking(parse=COLOURS, temperature=0.3), prompts("a"), said("?", "?", "red"))[2]
    assert [request.sampling.temperature for request in warm] == [0.3] * 3


@pytest.mark.parametrize("finish", ["refused", "filtered", "error", "length"])
def test_what_was_refused_or_cut_off_is_not_asked_again(finish):
    pool, tally, asked = drive(asking(), prompts("a"), said(("blue", finish)))
    assert not pool and len(asked) == 1 and tally.dropped == {f"answer: {finish}": 1}


class Writer:
    """Says a colour the second time that it is asked about something."""

    identity = "scripted@1"

    def __init__(self, stop_after=10**9):
        self.asked = []
        self.stop_after = stop_after

    def answers(self, requests, stop=lambda: False):
        for request in requests:
            if len(self.asked) == self.stop_after:
                return
            self.asked.append(request.key)
            yield request, Generated(None, "blue" if request.sampling.temperature else "hm", "ok")


def run(writer, folder):
    step = asking(parse=COLOURS, retries=1)
    tally = Tally("ask")
    with Store(folder / "store.sqlite") as store:
        engine = Engine(store, lambda: writer, scorer=None, scorer_identity=None)
        return engine.run(step.run(prompts("a", "b", "c"), StepContext("scripted@1", 7, "0/ask"), tally)), tally


@pytest.mark.promise("R7")
def test_answers_and_retries_are_kept_and_a_killed_run_goes_on(tmp_path):
    whole = Writer()
    (tmp_path / "whole").mkdir()
    pool, tally = run(whole, tmp_path / "whole")
    assert [answer_of(sample) for sample in pool] == ["blue"] * 3 and len(set(whole.asked)) == 6
    again = Writer()
    assert run(again, tmp_path / "whole") == (pool, tally) and again.asked == []

    seen = []
    for stop_after in (2, 3):  # killed among the first answers, then among the retries
        killed = Writer(stop_after)
        with pytest.raises(StoppedEarlyError):
            run(killed, tmp_path)
        seen += killed.asked
    last = Writer()
    assert run(last, tmp_path) == (pool, tally)
    assert sorted([*seen, *last.asked]) == sorted(whole.asked), "each once"
