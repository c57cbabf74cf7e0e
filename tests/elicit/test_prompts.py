"""The built-in prompts are what they claim; a user's file is read strictly; verifiers judge as they say."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from limbeck.elicit.prompts import load_prompts
from limbeck.elicit.verify import parse_check, verify
from limbeck.types import UserError


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(a, b):
    """F1 of the longest common subsequence of words."""
    row = [0] * (len(b) + 1)
    for word in a:
        last = 0
        for index, other in enumerate(b):
            kept = row[index + 1]
            row[index + 1] = last + 1 if word == other else max(row[index + 1], row[index])
            last = kept
    return 2 * row[-1] / (len(a) + len(b))


def test_built_in_prompts_are_many_of_many_kinds_and_partly_checkable():
    train, test = load_prompts("builtin/everyday"), load_prompts("builtin/everyday", part="test")
    assert len(train) >= 240 and len(test) >= 60
    assert len({prompt.kind for prompt in train}) >= 10 and {p.kind for p in train} == {p.kind for p in test}
    assert (
        sum(prompt.check is not None for prompt in train) >= 100
        and sum(prompt.check is not None for prompt in test) >= 25
    )
    prefix = Counter(prompt.kind for prompt in train[:240])
    assert max(prefix.values()) == min(prefix.values())


def test_no_held_out_prompt_resembles_a_training_prompt():
    train, test = load_prompts("builtin/everyday"), load_prompts("builtin/everyday", part="test")
    assert max(rouge_l(words(a.text), words(b.text)) for a in test for b in train) < 0.6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompt"), ("\n \n", "has no prompt"), ("not json", "line 1: not JSON"), ('{"text": "x"}', 'line 1: needs a non-empty text under "prompt"'),
        ('{"prompt": "  "}', "its prompt is empty (line 1)"), ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "is used twice"),
        ('{"prompt": "a", "check": {"type": "numbr", "answer": 1}}', "number"), ('{"prompt": "a", "check": {"type": "number"}}', "needs 'answer'"),
        ('{"prompt": "a", "check": {"type": "choice", "labels": ["x"], "answer": "y"}}', "not among the labels"),
        ('{"prompt": "a", "check": {"type": "contains", "all": [3]}}', "must be text"), ('{"prompt": "a", "check": {"type": "number", "answer": true}}', "a number"),
        ('{"prompt": "a", "answer": true}', '"answer" must be text or a number'), ("[1]", "line 1"),
    ],
)  # fmt: skip
def test_malformed_prompt_files_name_the_line(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load_prompts(str(file))


def test_line_separators_inside_text_do_not_split_a_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(str(file))] == ["one\u2028two\u0085three"]


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("check", "passes", "fails"),
    [
        (
            {"type": "number", "answer": 12},
            ["12", "5 + 7 = 12.", "It costs 1,000, no: 12", "12.0"],
            ["", "twelve", "12 or 13", "112"],
        ),
        ({"type": "number", "answer": -3}, ["-3"], ["3"]),
        ({"type": "number", "answer": 1200}, ["1,200"], ["1,20"]),
        (
            {"type": "choice", "labels": ["spam", "genuine"], "answer": "spam"},
            ["Spam.", "This is SPAM"],
            ["genuine", "spam or genuine", "spammy", ""],
        ),
        (
            {"type": "json", "equals": {"name": "Ana", "age": 31}},
            ['{"name": " ana", "age": 31}', 'Sure: {"age": 31, "name": "Ana", "x": 1} ok'],
            ['{"name": "Ana", "age": "31"}', '{"name": "Ana"}', "{name: Ana}", "[1]", "{" * 5000],
        ),
        (
            {"type": "order", "items": ["ant", "bee"]},
            ["ant, bee", "Ant\nBee"],
            ["bee, ant", "ant", "pant bee", "giant bees"],
        ),
        ({"type": "order", "items": [2, 10]}, ["2, 10"], ["10, 2", "12 10"]),
        ({"type": "contains", "all": ["def add", "return"]}, ["Def add(a): RETURN a"], ["def add"]),
    ],
)
def test_verifiers(check, passes, fails):
    parse_check(check, "here")
    assert all(verify(check, answer) is True for answer in passes)
    assert [answer[:20] for answer in fails if verify(check, answer) is not False] == []
    assert verify(None, "anything") is None
