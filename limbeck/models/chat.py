"""Conversations as a chat template and as a server take them, with tools, calls and reasoning; and their token ids.

A template is rendered by the tokenizer's own sandbox. What stands in a message and looks like a control token is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.types import Message, UserError

TOOLS = "tools"  # the role of a first message whose content is the tools, as JSON
OPENED = re.compile(r"<think>(\s*)\Z")
OPEN, CLOSE = "<think>", "</think>"
MARK = "\ue000{}\ue001"  # from Unicode's private use area; stands for a control token's text while a template renders
MARKS = re.compile("\ue000([0-9]+)\ue001")


def for_template(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(the messages with calls of tools as objects, the tools)"""
    tools = [json.loads(message["content"]) for message in messages if message["role"] == TOOLS]
    shown: list[dict[str, Any]] = [dict(message) for message in messages if message["role"] != TOOLS]
    for message in shown:
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
    return shown, tools[0] if tools else None


def for_server(messages: Sequence[Message]) -> dict[str, Any]:
    """The fields `messages` and `tools` of a request, as OpenAI has them: arguments as text. Earlier turns' reasoning
    isn't sent: servers refuse it."""
    shown, tools = for_template(messages)
    for message in shown:
        message.pop("reasoning_content", None)
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {"messages": shown} if tools is None else {"messages": shown, "tools": tools}


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The conversation in the template's form, ready to be answered.

    Raises:
        UserError: the template refuses it; the message has the template's own words.
    """
    shown, tools = for_template(messages)
    return str(_applied(tokenizer, shown, tools, tokenize=False))


def _applied(tokenizer: Tokenizer, shown: list[dict[str, Any]], tools: list[Any] | None, **how: Any) -> Any:
    how |= {} if tools is None else {"tools": tools}
    try:
        return tokenizer.apply_chat_template(shown, add_generation_prompt=True, **how)
    except Exception as error:  # a template may raise anything
        roles = ", ".join(message["role"] for message in shown)
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation as token ids, ready to be answered."""
    shown, tools = for_template(messages)
    controls = [token for token in tokenizer.all_special_tokens if any(token in m["content"] for m in shown)]
    if not controls:
        return list(_applied(tokenizer, shown, tools, return_dict=True)["input_ids"])
    return _without_controls(tokenizer, shown, tools, sorted(controls, key=len, reverse=True))


def _without_controls(
    tokenizer: Tokenizer, shown: list[dict[str, Any]], tools: list[Any] | None, controls: list[str]
) -> list[int]:
    """Token ids where messages name control tokens: these become text, those of the template stay."""
    pattern = re.compile("|".join(map(re.escape, controls)))
    for message in shown:
        if MARKS.search(message["content"]):
            raise UserError(
                "a message has characters of Unicode's private use area (U+E000) around a number; remove them"
            )
        message["content"] = pattern.sub(lambda found: MARK.format(controls.index(found[0])), message["content"])
    text = str(_applied(tokenizer, shown, tools, tokenize=False))
    ids: list[int] = []
    for number, part in enumerate(MARKS.split(text)):
        words = controls[int(part)] if number % 2 else part
        if words:
            plain = {"split_special_tokens": True} if number % 2 else {}
            ids += tokenizer(words, add_special_tokens=False, **plain)["input_ids"]
    return ids


def opened_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the template itself opens an answer's thinking, as those of R1 and QwQ do."""
    return OPENED.search(render(tokenizer, [{"role": "user", "content": "Why?"}])) is not None


def goes_on(text: str) -> str:
    """An answer that goes on from an opened thinking: its own opening mark, which stands there already, is taken away;
    an answer without thinking closes it first."""
    if text.lstrip().startswith(OPEN):
        return text.lstrip()[len(OPEN) :].lstrip("\n")
    return text if CLOSE in text else f"\n{CLOSE}\n\n{text}"


def check_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Refuse a template that leaves out a part of a conversation.

    Raises:
        UserError: says whose message, or which tool, is missing in the text.
    """
    text = render(tokenizer, messages)
    shown, tools = for_template(messages)
    for message in shown:
        said = message["content"].rpartition(CLOSE)[2].strip() if message["role"] == "assistant" else message["content"]
        if said.strip() not in text:
            raise UserError(f"the chat template leaves out what the {message['role']} says: {said.strip()[:60]!r}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise UserError(f"the chat template leaves out the call of {call['function']['name']!r}")
    for tool in tools or ():
        if tool["function"]["name"] not in text:
            raise UserError(f"the chat template has no place for tools, such as {tool['function']['name']!r}")
