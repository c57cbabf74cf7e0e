"""Verifiers: what passes, what doesn't, what is refused as a check, and patterns that would run for ever."""

from __future__ import annotations

import json
import time

import pytest

from limbeck.elicit import equivalence
from limbeck.elicit.checks import normalised, tool_calls
from limbeck.elicit.instructions import RULES
from limbeck.elicit.verify import parse_check, verify
from limbeck.types import UserError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}},
    "patternProperties": {"^x_": {"type": "boolean"}},
    "additionalProperties": False,
    "required": ["name"],
}
PASSAGES = ["The mill was built in 1820.", "It ground corn for a century.", "Bees live there now."]
CALL = {"name": "weather", "arguments": {"city": ["Oslo", "oslo, norway"], "days": [1, 2, None]}}


@pytest.mark.parametrize(
    ("check", "passes", "fails"),
    [
        ({"type": "number", "answer": 12}, ["It is 12.", "3 x 4 = 12"], ["12 or 13", "none"]),
        ({"type": "number", "answer": 12, "strict": True}, ["so #### 12", "The answer is 12 of 30"], ["it is 12", "The answer is 30, not 12"]),
        ({"type": "math", "answer": "\\frac{1}{2}"}, ["The answer is 0.5.", "So it is $\\frac{2}{4}$", "\\boxed{1/2}"], ["The answer is 2.", "", "half of it"]),
        ({"type": "math", "answer": "x^2+2x+1"}, ["$(x+1)^2$", "\\boxed{(1 + x)(x + 1)}"], ["$(x+1)^3$", "x"]),
        ({"type": "math", "answer": "12"}, ["First 3, then 12", "\\boxed{12.0}"], ["12 and then 13", "__import__('os')._exit(0)"]),
        (
            {"type": "json_schema", "schema": SCHEMA},
            ['{"name": "Ada", "age": 36}', 'Here:\n```json\n{"name": "Ada", "x_b": true}\n```'],
            ['{"name": "ada"}', '{"name": "Ada", "age": -1}', '{"name": "Ada", "x_b": 1}', '{"name": "Ada", "more": 1}', '{"age": 3}', '{"name": "Ada"', "Ada", '{"name": "Ada", "age": NaN}'],
        ),
        ({"type": "json_schema", "schema": {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}}}, ["[1, 2]", "[]"], ["[1.5]", "{}", "[" * 5000]),
        ({"type": "exact", "answer": ["The Nile", "Nile river"]}, ["the  nile.", "A Nile River!"], ["The Nile river in Egypt", ""]),
        ({"type": "exact", "answer": "No", "normalise": False}, [" No\n"], ["no", "No."]),
        ({"type": "set", "items": ["red", "Blue"]}, ["blue, red", "- Red\n- blue", "red and blue"], ["red", "red, blue, green", "red, blue, red", ""]),
        ({"type": "pattern", "pattern": r"\d{5}"}, ["in 12345 Town"], ["1234"]),
        ({"type": "pattern", "pattern": r"\d{5}", "whole": True}, [" 12345 "], ["in 12345"]),
        (
            {"type": "tool_call", "calls": [CALL]},
            ['{"name": "weather", "arguments": {"city": "OSLO"}}', '<tool_call>{"name": "weather", "arguments": {"city": "oslo", "days": 2}}</tool_call>'],
            [
                '{"name": "weather", "arguments": {"city": "Rome"}}', '{"name": "weather", "arguments": {}}', "call weather", '{"name": "news", "arguments": {"city": "Oslo"}}',
                '{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}', '{"name": "weather", "arguments": {"city": "Oslo", "days": true}}',
                '[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": {"city": "Oslo"}}]', '{"name": "weather", "argum',
            ],
        ),
        (
            {"type": "citations", "passages": PASSAGES, "gold": [1, 2]},
            ["In 1820 [1].", 'It "ground corn" [2], built in 1820 [1].'],
            ["In 1820.", "In 1820 [3].", "In 1820 [1][7].", 'It "burned down" [1].'],
        ),
        ({"type": "citations", "passages": PASSAGES, "gold": [1, 2], "all": True}, ["So [1] and [2]."], ["So [1]."]),
        ({"type": "citations", "passages": PASSAGES, "answerable": False}, ["The passages do not say."], ["They do not say [1].", "In 1820."]),
    ],
)  # fmt: skip
def test_answers_pass_or_fail(check, passes, fails):
    parse_check(json.loads(json.dumps(check)), "here")
    assert [verify(check, answer) for answer in passes] == [True] * len(passes)
    assert [verify(check, answer) for answer in fails] == [False] * len(fails)


def test_calls_in_any_order_and_in_theirs():
    one, two = {"name": "a", "arguments": {"x": [1]}}, {"name": "b"}
    answer = '[{"name": "b"}, {"name": "a", "arguments": {"x": 1}}]'
    assert not verify({"type": "tool_call", "calls": [one, two]}, answer)
    assert verify({"type": "tool_call", "calls": [one, two], "any_order": True}, answer)
    assert tool_calls("no call") is None and tool_calls("[1]") is None and tool_calls("{" * 9999) is None


FOLLOWED = {
    "words": ({"least": 2, "most": 3}, "two words", "one"), "sentences": (2, "One. Two!", "One."), "paragraphs": (2, "a\n\nb", "a\nb"),
    "bullets": (2, "- a\n* b", "- a"), "numbered": ({"least": 2}, "1. a\n2) b", "1. a"), "with": (["red"], "a Red car", "a reddish car"),
    "without": (["red"], "a reddish car", "RED!"), "letter": ({"letter": "e", "least": 2}, "Eel", "egg"), "word": ({"word": "so", "most": 1}, "so also", "so so"),
    "capitals": (1, "the BBC I", "none"), "case": ("lower", "all low 1", "All low"), "commas": (0, "none here", "one, here"), "begins": ("Dear", "dear all", "Hi"),
    "ends": ("Yours.", "Bye. yours.", "Yours. Bye"), "quoted": (True, '"so"', "so"), "json": (True, '```json\n{"a": 1}\n```', "{a}"),
    "title": (True, "<<A title>>\ntext", "A title"), "highlighted": ({"least": 2}, "*a* and **b**", "*a*"), "placeholders": (1, "Dear [name]", "Dear name"),
    "postscript": ("P.S.", "text\nP.S. more", "text P.S."), "sections": ({"named": "Part", "least": 2}, "Part 1\nx\nPart 2", "Part 1"),
    "parts": (2, "a ****** b", "a"), "repeats": ("Say it", "Say it: done", "done: Say it"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_followed_or_not(name):
    rule, good, bad = FOLLOWED[name]
    check = parse_check({"type": "instructions", "rules": {name: rule}}, "here")
    assert verify(check, good) is True and verify(check, bad) is False and verify(check, "  ") is False


@pytest.mark.parametrize("name", RULES)
@pytest.mark.promise("S14")
def test_every_rule_reads_a_long_answer_in_seconds(name):
    check = {"type": "instructions", "rules": {name: FOLLOWED[name][0]}}
    for piece in ("\n", " ", "...", "a. ", "* ", "[a", "A", "<<", "1.\n", '"'):
        began = time.process_time()
        assert verify(check, piece * (100_000 // len(piece)) + "x") in (True, False)
        assert time.process_time() - began < 10, piece


def test_a_loose_reading_forgives_first_and_last_lines_and_asterisks():
    check = {"type": "instructions", "rules": {"begins": "Dear", "commas": 0}}
    answer = "Sure, here it is:\n**Dear all** hello\nHope that helps, bye"
    assert verify(check, answer) is False and verify(check | {"loose": True}, answer) is True
    assert verify(check | {"loose": True}, "Sure, no\nDear, x\nbye") is False


@pytest.mark.promise("S14")
def test_a_pattern_that_would_run_for_ever_has_not_passed():
    began = time.process_time()
    assert verify({"type": "pattern", "pattern": r"^(a+)+$"}, "a" * 60 + "b") is False
    assert verify({"type": "pattern", "pattern": r"^(a|aa)+$"}, "a" * 5000 + "b") is False
    assert time.process_time() - began < 3


@pytest.mark.promise("S14")
def test_a_schemas_pattern_that_would_run_for_ever_has_not_passed():
    check = {"type": "json_schema", "schema": {"type": "string", "pattern": "(a+)+$"}}
    began = time.monotonic()
    assert verify(check, json.dumps("a" * 40 + "b")) is False
    assert time.monotonic() - began < 5


@pytest.mark.promise("S14")
def test_algebra_without_an_end_is_ended_and_the_next_question_answered(monkeypatch):
    """The process that does the algebra is replaced, and no part of an answer is run as a program."""
    monkeypatch.setattr(equivalence, "SECONDS", 3.0)
    assert verify({"type": "math", "answer": "10"}, "The answer is 9^9^9^9^9^9") is False
    monkeypatch.undo()
    assert verify({"type": "math", "answer": "10"}, "The answer is 10") is True


def test_without_its_library_a_mathematical_check_says_what_to_install(monkeypatch):
    monkeypatch.setattr(equivalence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="limbeck\\[math\\]"):
        parse_check({"type": "math", "answer": "1"}, "here")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"type": "pattern", "pattern": "("}, "not a regular expression"), ({"type": "pattern", "pattern": "a" * 501}, "make it shorter"),
        ({"type": "tool_call", "calls": [{"arguments": {}}]}, "a call needs a name"), ({"type": "tool_call", "calls": [{"name": "f", "arguments": {"x": 1}}]}, "list of values"),
        ({"type": "instructions", "rules": {"wrods": 3}}, "did you mean 'words'"), ({"type": "instructions", "rules": {"with": 3}}, "can't be 3"),
        ({"type": "instructions", "rules": {"words": {"at_least": 3}}}, "knows no 'at_least'"),
        ({"type": "instructions", "rules": {"with": "red"}}, "list of words"), ({"type": "instructions", "rules": {"case": "Upper"}}, "can't be 'Upper'"),
        ({"type": "json_schema", "schema": {"type": "thing"}}, "not a JSON Schema"), ({"type": "json_schema", "schema": {"pattern": "("}}, "is not a 'regex'"),
        ({"type": "json_schema", "schema": {"$ref": "https://example.org/schema"}}, "nothing is fetched"), ({"type": "math", "answer": "\\frac{"}, "can't be parsed"),
        ({"type": "number", "answer": 10**400}, "too large"), ({"type": "set", "items": [1]}, "must be text"), ({"type": "exact"}, "needs 'answer'"), ({"type": ["exact"]}, "no verifier \\['exact'\\]"), ({"type": {}}, "no verifier {}"), (["exact"], "no verifier"), ({"type": "citations", "passages": [1]}, "must be text"),
    ],
)  # fmt: skip
def test_a_malformed_check_is_refused_with_its_place(check, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_check(check, "items.jsonl, line 3")
    assert str(caught.value).startswith("items.jsonl, line 3: ")


def test_one_number_written_twice_leaves_no_choice():
    assert verify({"type": "number", "answer": 0.5}, "1/2 (or 50%)") is True
    assert verify({"type": "number", "answer": 0.5}, "1/2 or 5%") is False


def test_answers_are_compared_as_squad_does():
    assert normalised(" The  U.S.'s  an apple! ") == "u s s apple"
