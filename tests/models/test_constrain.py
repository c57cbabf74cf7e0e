"""Answers that are held to a form: by masks in process, in the words of every kind of server, and refused where neither can."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from limbeck.config.server import Served
from limbeck.elicit.flow import StepContext, user
from limbeck.elicit.parse import Parsing
from limbeck.models import constrain
from limbeck.models.answer_forms import clash, is_strict
from limbeck.models.api import ApiTeacher
from limbeck.models.constrain import Forms, unheld
from limbeck.models.dialects import merged
from limbeck.models.engines import ENGINES, form_words
from limbeck.models.generate import Decoding, GenerationJob, write
from limbeck.models.teacher import InProcessTeacher
from limbeck.types import AnswerForm, Request, Sampling, UserError
from tests.conftest import PROMPTS
from tests.models.test_engines import Engine, said
from tests.scripted_server import MODEL

STRICT = {
    "type": "object",
    "properties": {"z": {"enum": ["cat", "dog"]}, "a": {"type": "boolean"}},
    "required": ["z", "a"],
    "additionalProperties": False,
}
LOOSE = {"type": "object", "properties": {"z": {"type": "string", "maxLength": 9}}}
LABELS = AnswerForm(labels=("cat", 'a "dog"', "back\\slash"))
PATTERN = AnswerForm(pattern=r"(\d) of 5")
SCHEMA = AnswerForm(schema=json.dumps(STRICT))


def schema(data):
    return AnswerForm(schema=json.dumps(data))


# A request with a form


def test_a_form_is_part_of_the_key_only_where_there_is_one():
    plain = Request("m", (user("q"),), Sampling(), 1)
    assert "form" not in plain.asked
    swapped = STRICT | {"properties": dict(reversed(STRICT["properties"].items()))}
    keys = {Request("m", (user("q"),), Sampling(), 1, form=form).key for form in (None, SCHEMA, schema(swapped), LABELS, PATTERN)}  # fmt: skip
    assert len(keys) == 5, "the order of properties matters, too"
    assert Request("m", (user("q"),), Sampling(), 1, form=LABELS).asked["form"] == {"labels": list(LABELS.labels)}


# Servers

WORDS = {  # what each kind is sent, as its reference has it
    "vllm": ({"structured_outputs": {"choice": list(LABELS.labels)}}, {"structured_outputs": {"regex": PATTERN.pattern}}),
    "sglang": ({"regex": r'(cat)|(a\ "dog")|(back\\slash)'}, {"regex": PATTERN.pattern}),
    "llama.cpp": ({"grammar": r'root ::= "cat" | "a \"dog\"" | "back\\slash"'}, None),
    "gemini": (
        {"generationConfig": {"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": list(LABELS.labels)}}},
        None,
    ),
}  # fmt: skip
GEMINI_SCHEMA = {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": STRICT}}
OPENAI_SCHEMA = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": STRICT, "strict": True}}
}
ANTHROPIC_SCHEMA = {"output_config": {"format": {"type": "json_schema", "schema": STRICT}}}


def test_a_states_server_holds_answers_to_nothing():
    server = Served(url="http://x/v1", name="m", kind="states")
    assert all(isinstance(form_words(server, form), str) for form in (SCHEMA, LABELS, PATTERN))


@pytest.mark.parametrize("kind", sorted(ENGINES.keys() - {"states"}))
def test_every_kind_of_server_is_told_in_its_own_words(kind):
    server = Served(url="http://x/v1", name="m", kind=kind)
    labels, pattern = WORDS.get(kind, (None, None))
    assert (form_words(server, LABELS), form_words(server, PATTERN)) == (
        labels or f"{ENGINES[kind].title} can't be held to one of some labels",
        pattern or f"{ENGINES[kind].title} can't be held to a pattern",
    )
    told = {"gemini": GEMINI_SCHEMA, "anthropic": ANTHROPIC_SCHEMA}.get(kind, OPENAI_SCHEMA)
    assert form_words(server, SCHEMA) == told
    with Engine(kind, lambda number, body: said(kind)) as running:
        teacher = ApiTeacher(Served(url=running.url, name=MODEL, kind=kind))
        scene = StepContext("served:toy", 7, "0/x")
        asked = [scene.request((user("q"),), Sampling(max_tokens=16), n, form=[SCHEMA, None][n]) for n in range(2)]
        answers = {request.form: found for request, found in teacher.answers(asked)}
        assert {found.finish for found in answers.values()} == {"ok"}
        free, held = sorted((body for _, body, _ in running.seen), key=lambda body: len(json.dumps(body)))
    for body in (free, held):
        body.get("generationConfig", body).pop("seed", None)
    assert held == merged(free, told) and held != free


def test_the_schema_goes_out_in_its_own_order():
    words = json.dumps(form_words(Served(url="http://x/v1", name="m"), SCHEMA))
    assert words.index('"z"') < words.index('"a"')


@pytest.mark.parametrize(
    ("data", "strict"),
    [
        (STRICT, True), (LOOSE, False), (STRICT | {"additionalProperties": True}, False), (STRICT | {"required": ["z"]}, False),
        (STRICT | {"properties": STRICT["properties"] | {"b": {"type": "string", "format": "date"}}, "required": ["z", "a", "b"]}, False),
        (STRICT | {"properties": {"z": LOOSE}, "required": ["z"]}, False), ({"type": "array", "items": STRICT}, False), ({}, False), ({"type": "string"}, False),
        (STRICT | {"properties": {"z": {"type": "array", "items": STRICT}, "a": {"type": ["null", "string"]}}}, True),
        (STRICT | {"properties": {"z": {"$ref": "#/$defs/x"}, "a": {"anyOf": [STRICT, {"type": "null"}]}}, "$defs": {"x": STRICT}}, True),
        (STRICT | {"$defs": {"x": LOOSE}}, False), (STRICT | {"properties": {"z": True, "a": {}}}, False),
    ],
)  # fmt: skip
def test_strict_is_said_only_of_schemas_that_qualify(data, strict):
    assert is_strict(data) == strict
    words = form_words(Served(url="http://x/v1", name="m", kind="openai"), schema(data))
    assert ("strict" in words["response_format"]["json_schema"]) == strict
    claude = form_words(Served(url="http://x/v1", name="m", kind="anthropic"), schema(data))
    assert isinstance(claude, dict) == strict
    assert strict or claude == "Anthropic (/v1/messages) can't be held to a schema that is not strict"


def test_a_form_in_the_options_is_left_alone():
    own = {"response_format": {"type": "json_object"}}
    assert form_words(Served(url="http://x/v1", name="m", options=own), SCHEMA) == (
        "teacher.server.options.response_format.type says the form already"
    )
    effort = Served(url="http://x/v1", name="m", kind="anthropic", options={"output_config": {"effort": "low"}})
    assert form_words(effort, SCHEMA) == ANTHROPIC_SCHEMA
    assert clash({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}) is None
    with pytest.raises(UserError, match="constrain: false"):
        list(ApiTeacher(Served(url="http://127.0.0.1:9/v1", name="m", options=own)).answers([Request("m", (user("q"),), Sampling(), 1, form=SCHEMA)]))  # fmt: skip


def test_a_server_that_refuses_the_form_ends_the_run_with_the_remedy():
    refusal = {"error": {"code": "unsupported_parameter", "param": "response_format", "message": "no such thing"}}
    with Engine("openai", lambda number, body: ("status", 400, {}, json.dumps(refusal).encode())) as running:
        teacher = ApiTeacher(Served(url=running.url, name=MODEL, kind="openai"))
        with pytest.raises(UserError, match="refuses response_format: change the step that asks: constrain: false"):
            list(teacher.answers([Request("m", (user("q"),), Sampling(), 1, form=SCHEMA)]))


# In process


def test_without_the_library_it_is_refused_with_the_command(monkeypatch, tiny):
    monkeypatch.setattr(constrain, "find_spec", lambda name: None)
    assert unheld(SCHEMA, None).endswith("pip install 'limbeck[constrain]'")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[constrain\]'"):
        list(InProcessTeacher(tiny).answers([Request("m", (user("q"),), Sampling(), 1, form=SCHEMA)]))


@pytest.fixture
def library():
    return pytest.importorskip("llguidance")


def test_what_the_library_does_not_know_is_said(library):
    assert unheld(SCHEMA, None) == unheld(LABELS, None) == unheld(PATTERN, None) == ""
    assert "uniqueItems" in unheld(schema({"type": "array", "uniqueItems": True}), None)
    assert "llguidance can't" in unheld(AnswerForm(pattern="a(?=b)(c)"), None)


def answers(tiny, parsing, sampling, count=6, form=True):
    teacher = InProcessTeacher(tiny)
    asked = [
        Request(tiny.identity, (user(text),), sampling, 3, form=parsing.form if form else None)
        for text in PROMPTS[:count]
    ]
    return [found for _, found in sorted(teacher.answers(asked), key=lambda pair: asked.index(pair[0]))]


@pytest.mark.parametrize("sampling", [Sampling(0.0, 1.0, 60), Sampling(1.0, 1.0, 60), Sampling(1.5, 0.9, 60)])
@pytest.mark.parametrize(
    "form",
    [{"json": STRICT}, {"label": ["cat", "cat on", "mat"]}, {"pattern": r"(why|count) (\d{1,3})"}],
    ids=["schema", "labels", "pattern"],
)
def test_every_answer_keeps_to_its_form_and_ends(tiny, library, form, sampling):
    parsing = Parsing.model_validate(form)
    found = answers(tiny, parsing, sampling)
    assert all(answer.finish == "ok" and parsing.keeps_to_form(answer.text) for answer in found), found
    assert all(answer.ids[-1] in tiny.eos_ids for answer in found)
    assert not any(parsing.keeps_to_form(answer.text) for answer in answers(tiny, parsing, sampling, form=False))
    if "json" in form:
        assert all(parsing.written(parsing.read(answer.text)) == answer.text for answer in found), (
            "its tokens are taught"
        )


def test_a_cut_off_answer_is_cut_off(tiny, library):
    parsing = Parsing.model_validate({"json": STRICT})
    for answer in answers(tiny, parsing, Sampling(0.0, 1.0, 4)):
        assert answer.finish == "length" and STRICT and not parsing.keeps_to_form(answer.text)


def test_rows_without_a_form_stay_bit_for_bit_and_held_ones_do_not_depend_on_their_batch(tiny, library):
    forms = Forms(tiny)
    prompts = [tiny.prompt_ids((user(text),)) for text in PROMPTS[:8]]
    hold = [None if n % 2 else (lambda ids=ids: forms.begin(SCHEMA, ids)) for n, ids in enumerate(prompts)]
    jobs = [GenerationJob(ids, Sampling(1.0, [1.0, 0.8][n // 4], 40), n, hold=hold[n]) for n, ids in enumerate(prompts)]
    free = [GenerationJob(ids, Sampling(1.0, [1.0, 0.8][n // 4], 40), n) for n, ids in enumerate(prompts)]

    def written(jobs, rows, numbers):
        done = write(tiny.net, [jobs[n] for n in numbers], tiny.eos_ids, tiny.vocab_size, decoding=Decoding(rows, record=True))  # fmt: skip
        return {numbers[one.index]: one for one in done}

    mixed, alone = written(jobs, 8, range(8)), written(free, 8, range(8))
    for n in range(1, 8, 2):
        assert (mixed[n].ids, mixed[n].log_prob) == (alone[n].ids, alone[n].log_prob)
    for rows in (1, 3):
        assert {n: one.ids for n, one in written(jobs, rows, range(8)).items()} == {n: one.ids for n, one in mixed.items()}  # fmt: skip
    held = mixed[0]
    ids, logits = prompts[0], []
    for token in held.ids:
        with torch.no_grad():
            logits.append(float(tiny.net(torch.tensor([ids])).logits[0, -1, : tiny.vocab_size].log_softmax(-1)[token]))
        ids = [*ids, token]
    assert held.log_prob == pytest.approx(logits, abs=1e-4), "under the model, whatever the form forbids"
    assert all(own >= free - 1e-5 for own, free in zip(held.sampler_log_prob, held.log_prob, strict=True))
    assert pytest.approx(held.sampler_log_prob[-1], abs=1e-5) == 0, "the end was all that could follow"


def test_the_form_begins_where_thinking_ends(tiny, library):
    matcher = library.LLMatcher(Forms(tiny)._tokenizer, constrain._grammar(SCHEMA))
    row = constrain.HeldRow(matcher, b"", lambda ids: 7 not in ids)
    for token in (3, 4, 7):
        assert row.allowed() is None
        row.take(token)
    bits = row.allowed()
    first = [n for n in range(tiny.vocab_size) if bits[n // 8] >> n % 8 & 1]
    assert first and all(tiny.decode([n]).startswith("{") for n in first)


def test_a_matcher_that_can_t_go_on_ends_the_answer(tiny, library):
    row = Forms(tiny).begin(SCHEMA, tiny.prompt_ids((user("q"),)))
    row.take(tiny.text_ids("why")[0])
    bits = row.allowed()
    assert {n for n in range(tiny.vocab_size) if bits[n // 8] >> n % 8 & 1} == tiny.eos_ids


def test_a_form_is_refused_for_a_slow_tokenizer(tiny, library, monkeypatch):
    monkeypatch.setattr(type(tiny.tokenizer), "backend_tokenizer", None)
    with pytest.raises(UserError, match="slow tokenizer"):
        Forms(tiny).begin(SCHEMA, [1])
    assert re.match("llguidance can't", constrain._said("at 1(8): no\nmore"))
