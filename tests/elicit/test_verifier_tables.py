"""Every answer in the tables of `verifier_tables` passes or fails, in many languages and forms; each has 40 of both.

The programs of `unit_tests` run in the sandbox, one process each; where it doesn't work, they are skipped.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest

from limbeck.elicit import sandbox
from limbeck.elicit.verify import VERIFIERS, parse_check, verify

TABLES = {
    file.stem: importlib.import_module(f"tests.elicit.verifier_tables.{file.stem}").TABLE
    for file in sorted((Path(__file__).parent / "verifier_tables").glob("[a-z]*.py"))
}
LISTS = {"set", "order", "contains"}  # are together in one table
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
    "\n",
    "“",
    "[1,",
    "* ",
    "...",
    "a. ",
    "½",
    "√",
]


@pytest.fixture(autouse=True)
def allowed(monkeypatch, request):
    monkeypatch.setenv(sandbox.ALLOW, "1")
    if request.node.callspec.params.get("name") == "unit_tests" and sandbox.refusal():
        pytest.skip("the sandbox refuses to work on this machine, and says so")


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_every_verifier_has_a_table(verifier):
    assert verifier in TABLES.keys() | LISTS


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


@pytest.mark.long
@pytest.mark.parametrize("name", TABLES)
def test_a_long_answer_that_repeats_itself_is_read_in_seconds(name):
    with_these_fields = {tuple(check): check for check, _, _ in reversed(TABLES[name])}
    for check in with_these_fields.values():
        for piece in SLOW:
            began = time.process_time()
            assert verify(check, piece * (100_000 // len(piece))) in (True, False)
            assert time.process_time() - began < 10, piece
