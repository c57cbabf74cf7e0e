"""Every answer in the tables of `verifier_tables` passes or fails, in many languages and forms; each has 40 of both."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest

from limbeck.elicit.verify import parse_check, verify

TABLES = {
    file.stem: importlib.import_module(f"tests.elicit.verifier_tables.{file.stem}").TABLE
    for file in sorted((Path(__file__).parent / "verifier_tables").glob("[a-z]*.py"))
}
LEAST = 40
SLOW = [
    "1",
    "1 ",
    "A ",
    "{",
    "[",
    '{"a":',
    "```\n",
    "not ",
    "<think>",
    "</think>",
    "\\boxed{",
    "answer is ",
    "(",
    "-",
    "是",
    "f(x=1), ",
    "1,",
    "<tool_call>",
    "'",
]


@pytest.mark.parametrize("name", TABLES)
def test_answers_of_the_table_pass_or_fail(name):
    wrong = []
    for check, passes, fails in TABLES[name]:
        parse_check(json.loads(json.dumps(check)), "here")
        wrong += [(check, text, "should pass") for text in passes if verify(check, text) is not True]
        wrong += [(check, text, "should fail") for text in fails if verify(check, text) is not False]
    assert wrong == []


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_enough_different_answers(name):
    for place in (1, 2):
        answers = {(json.dumps(row[0]), text) for row in TABLES[name] for text in row[place]}
        assert len(answers) == sum(len(row[place]) for row in TABLES[name]) >= LEAST


@pytest.mark.parametrize("name", TABLES)
def test_a_long_answer_that_repeats_itself_is_read_in_seconds(name):
    check = TABLES[name][0][0]
    for piece in SLOW:
        began = time.process_time()
        assert verify(check, piece * (100_000 // len(piece))) in (True, False)
        assert time.process_time() - began < 10, piece
