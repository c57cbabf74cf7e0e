"""The answer after the thinking, in the forms of many families of models; and where there is none."""

from __future__ import annotations

import time

import pytest

from limbeck.elicit.flow import Tally, are_complete, said_by
from limbeck.elicit.thinking import after_thinking, boxed, markers_of, opened_by, stated, without_thinking
from limbeck.elicit.verify import parse_check, verify
from limbeck.types import Sample

CHANNELS = "<|channel|>analysis<|message|>12? No.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
ANSWERED = [
    "<think>\n12?\n</think>\n\n{}", "<think></think>{}", "  <think>12</think> {}", "12? No.\n</think>\n\n{}", "<think>\n12</think>\n<think>13</think>{}", "<THINK>12</THINK>{}",
    "<thinking>12</thinking>\n{}", "<thought>12</thought>\n{}", "<reasoning>\n12\n</reasoning>\n{}", "<reflection>12</reflection>{}", "<scratchpad>12</scratchpad>{}", "<seed:think>12</seed:think>{}",
    "[THINK]12[/THINK]{}", "12[/THINK]{}", "◁think▷12◁/think▷{}", "<|START_THINKING|>12<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>", "<|channel>thought\n12<channel|>{}",
    "Here is my thought process: 12?\nHere is my response: {}", CHANNELS, "<|channel|>final<|message|>{}", "analysisIs it 12? No.assistantfinal{}", "<think>12</think><answer>{}</answer>", "<think>12</think>\n<answer>\n{}", "<think>12</think>\n<|begin_of_box|>{}<|end_of_box|>",
    "<think>The tag <think> opens it.</think>{}", "<think>12\n\n</think>\n{}\n<think>\nsure?\n</think>\n",
]  # fmt: skip


@pytest.mark.parametrize("form", ANSWERED)
def test_what_follows_the_thinking_is_the_answer(form):
    for answer in ("7", "It is 7.", "答えは7", "Paris\n\nIt lies on the Seine."):
        assert (after_thinking(form.format(answer)) or "").strip() == answer


@pytest.mark.parametrize(
    "text",
    [
        "<think>Perhaps 5, or 7", "<think>", "<thinking>7", "<reasoning>\n7\n", "[THINK]7", "◁think▷7", "<|START_THINKING|>7", "<|channel>thought\n7", "Here is my thought process: 7", "<|channel|>analysis<|message|>7",
        "<|channel|>analysis<|message|>7<|end|><|start|>assistant", "analysisWe need 7", "<think>5</think><think>7", "I see.\n<think>\n7", "<think>7</thinking>",
    ],
)  # fmt: skip
def test_thinking_without_an_end_is_no_answer(text):
    assert after_thinking(text) is None
    assert verify({"type": "number", "answer": 7}, text) is False and verify(None, text) is None
    assert verify({"type": "exact", "answer": text, "normalise": False, "thinking": True}, text) is True


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "I think it is 7.", "Models write `</think>` when they are done. 7", 'It ends with "</think>", I think: 7', "Use <think> for thinking", "<b>7</b>", "analysis of 7", "Analysis: 7", "The final answer is 7", "<answer>7</answer>",
        "```xml\n<think>\n```\n7", "thinking</ 7", "The tag </think> ends it. 7", "It ends with </think>.", "They write <think>so</think> before an answer.", "(</think> is the end)",
        "<item>\n<reasoning>\nso\n</reasoning>\n<score>5</score>\n</item>", "analysis of the final result", "```\n<p><thought>x</thought></p>\n```",
    ],
)  # fmt: skip
def test_a_text_without_thinking_is_the_answer_itself(text):
    assert after_thinking(text) == text


def test_without_its_thinking_an_answer_keeps_its_wrapping():
    text = "<think>\n12\n</think>\n\n<answer>7</answer>\n"
    assert without_thinking(text) == "<answer>7</answer>\n" and after_thinking(text) == "7"
    assert without_thinking(" 7\n") == " 7\n" and without_thinking("<think>7") is None


def test_a_check_may_ask_for_the_thinking():
    check = parse_check({"type": "pattern", "pattern": "<think>.*</think>", "thinking": True}, "here")
    assert (
        verify(check, "<think>so</think>7") is True
        and verify(check | {"thinking": False}, "<think>so</think>7") is False
    )


def test_a_prompt_that_begins_the_thinking_says_so():
    assert opened_by("<|im_start|>assistant\n<think>\n") == "<think>" and opened_by("<|Assistant|>[THINK]") == "[THINK]"
    assert opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "" and opened_by("What is <think>?\n") == ""
    assert after_thinking(opened_by("<think>\n") + "5, or 7") is None


def test_special_tokens_that_a_text_needs():
    assert markers_of({"[THINK]", "<s>", "<|end|>"}) == {"[THINK]"}
    assert markers_of({"<|channel|>", "<|end|>", "<|endoftext|>"}) == {"<|channel|>", "<|end|>"}


def test_where_a_text_states_its_answer():
    assert (
        stated("The answer is 3. No, the answer is 4") == " 4" and stated("答案：四") == "四" and stated("four") is None
    )
    assert (
        boxed("\\boxed{1} \\boxed{\\frac{1}{2}} x") == "\\frac{1}{2}"
        and boxed("\\boxed{1") is None
        and boxed("") is None
    )


def test_a_reply_of_nothing_but_thinking_is_dropped_and_counted():
    texts = ["<think>5</think>7", "<think>5</think> ", "<think>7"]
    replies = [
        Sample(({"role": "user", "content": "?"}, {"role": "assistant", "content": text}), "m") for text in texts
    ]
    tally = Tally("a step")
    assert are_complete(replies, tally) == [True, False, False] and [said_by(reply) for reply in replies] == [
        "7",
        "",
        "",
    ]
    assert tally.dropped == {"answer: nothing but thinking": 2}


@pytest.mark.parametrize(
    "piece",
    [
        "<think></think>",
        "</think>",
        "<think>",
        "\n<think>x</think>",
        "```\n<think>",
        "<|channel|>final<|message|>",
        "[THINK]",
        "answer is ",
        "\\boxed{",
        "`</think>",
        "<reasoning></reasoning>",
        "x<reasoning>",
        "</reasoning> a",
        "a </think> a",
    ],
)
def test_reading_is_linear(piece):
    began = time.process_time()
    text = piece * (200_000 // len(piece))
    after_thinking(text), stated(text), boxed(text), opened_by(text)
    assert time.process_time() - began < 5
