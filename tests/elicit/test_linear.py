"""What reads text that models wrote takes time in proportion to it, whatever it holds."""

import contextlib
import time

import pytest

from limbeck.elicit.calls import tool_calls
from limbeck.elicit.citing import citations
from limbeck.elicit.expand import _input_output_pairs, _instruction_blocks, unfit
from limbeck.elicit.json_in import fenced, values_in
from limbeck.elicit.lengthen import _pieces
from limbeck.elicit.numbers import final_number, numbers_in
from limbeck.elicit.parse import UnparsedError, _json, _label
from limbeck.elicit.ratings import read_ratings
from limbeck.elicit.rationale import final_of
from limbeck.elicit.sandbox import program_in
from limbeck.elicit.thinking import after_thinking, boxed
from limbeck.elicit.transform import equations_of
from limbeck.elicit.two_orders import read_verdict
from limbeck.elicit.wording import ends_well, items, parts
from limbeck.models.around_answer import without_thinking_marks

LENGTH = 30_000
SECONDS = 3.0  # of the processor; what grows with the square takes from ten seconds to hours
UNITS = (
    " ", "\n", "\t", "0", "1,", "a ", "`", "```", "``` ", "```\n", "(", "[", "{", "<", "<a", "=", "1=", "1 + ", "1+1=2 ",
    " \n", "> ", "- \n", "1. ", '"', "\\", "a:", "Answer: ", "<think>", "</think>", "\\boxed{", "* ", "#", "~~~", '{"a":',
    "[1] ", "Input: ", "<tool_call>", "<think", "。", "Task 1: ", "```json {",
)  # fmt: skip
BEGINS = ("", "```json\n", "<think>", "```", "1")


def or_unparsed(read, text, form):
    with contextlib.suppress(UnparsedError):
        read(text, form)


READERS = {
    "tool_calls": tool_calls,
    "citations": lambda text: citations({"type": "citations", "passages": ["a"], "cited": [1], "quotes": []}, text),
    "unfit": lambda text: unfit(text, ()),
    "input_output_pairs": lambda text: _input_output_pairs(text, label_first=False),
    "instruction_blocks": _instruction_blocks,
    "fenced": fenced,
    "values_in": values_in,
    "pieces": _pieces,
    "final_number": final_number,
    "numbers_in": numbers_in,
    "final_of": final_of,
    "program_in": program_in,
    "after_thinking": after_thinking,
    "boxed": boxed,
    "equations_of": equations_of,
    "ends_well": ends_well,
    "items": items,
    "parts": lambda text: parts(text, ("Input", "Output")),
    "read_verdict": lambda text: read_verdict(text, "ab"),
    "read_ratings": lambda text: read_ratings(text, 3, (1, 10)),
    "read_label": lambda text: or_unparsed(_label, text, ("yes", "no")),
    "read_json": lambda text: or_unparsed(_json, text, {"type": "object"}),
    "without_thinking_marks": lambda text: without_thinking_marks(text.removesuffix("\x00")),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.promise("S14")
def test_reading_is_linear(name):
    for begin in BEGINS:
        for unit in UNITS:
            text = begin + unit * (LENGTH // len(unit)) + "\x00"
            began = time.thread_time()
            READERS[name](text)
            took = time.thread_time() - began
            assert took < SECONDS, f"{took:.1f} s on {LENGTH:,} characters of {begin!r} and {unit!r}"


def test_what_was_read_still_is():
    assert equations_of("Each has 3 + 4 = 7, and (3 + 4) x 2 = 14.") == ["3+4=7", "3+4)*2=14"]
    assert fenced("```json\n{}\n```") == [("json", "{}")]
    assert fenced('Here: ```json {"a": 1} ``` so') == [("json", '{"a": 1}')]
    assert items("**1.** one\n## Task 2: two") == [(1, "one"), (2, "two")]
    assert (
        without_thinking_marks("a  \n <think>\n")
        == without_thinking_marks("a  ")
        == without_thinking_marks("a</think>[THINK]")
        == "a"
    )
