"""Conversations as files have them, in one form: OpenAI's messages and ShareGPT's turns, with tools and reasoning.

A message is a role and texts. What isn't text is kept as canonical JSON: the tools that are offered, as the content of
a first message of the role `tools`, and the calls that an assistant makes, under `tool_calls`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from limbeck.elicit.thinking import without_thinking
from limbeck.types import Message, canonical_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
READ_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name", "weight", *REASONING}
)
OPEN, CLOSE = "<think>", "</think>"


class FormError(ValueError):
    """What is wrong with a row, in words that go after its place."""


class LeftOutError(Exception):
    """Why a row that is well formed can't be used; such rows are counted."""


def is_blank(value: Any) -> bool:
    """Whether a value stands for none, as tables write it: null, or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any, name: str) -> str:
    """Text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise FormError(f'"{name}" must be text; got {_short(value)}')
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise FormError(
            f'"{name}" holds half a character, {value[error.start]!a}, that no UTF-8 can hold; remove it'
        ) from error
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def plain_json(value: Any, name: str) -> str:
    """Canonical JSON of a value."""
    try:
        return text_of(canonical_json(value), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, FormError) else FormError(f'"{name}" is no plain JSON ({error})') from error


def listed(value: Any, name: str) -> Any:
    """A value that may be a list as JSON text, as tables write it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FormError(f'"{name}" must be a list, or a list as JSON text; got {_short(value)}') from error


def messages_of(value: Any, name: str) -> list[Message]:
    """The messages of a list, each with its role and text, without a system message that says nothing.

    Raises:
        FormError: it is no list of messages, or has what isn't text (an image, ...).
        LeftOutError: it can't be used: it's empty, or the turns don't alternate.
    """
    value = listed(value, name)
    if not isinstance(value, list | tuple):
        raise FormError(f'"{name}" must be a list of messages; got {_short(value)}')
    messages = [_message(entry, f"{name}[{number}]") for number, entry in enumerate(value)]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if not messages:
        raise LeftOutError("it has no message")
    return messages


def _message(entry: Any, name: str) -> Message:
    if not isinstance(entry, dict):
        raise FormError(f'"{name}" must be a message, such as {{"role": "user", "content": "Hello"}}')
    entry = {key: value for key, value in entry.items() if not is_blank(value)}
    key = "role" if "role" in entry else "from"
    spoken = entry.get(key)
    role = ROLES.get(spoken.strip().lower()) if isinstance(spoken, str) else None
    if role is None:
        raise FormError(
            f'"{name}.{key}" is {_short(spoken)}; legal: system, user, assistant, tool (or human, gpt, ...)'
        )
    text = _content(entry.get("content", entry.get("value", "")), name)
    message = {"role": role, "content": text}
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(text, name)}
    if role == "assistant":
        calls = entry.get("tool_calls") or ([entry["function_call"]] if entry.get("function_call") else None)
        if calls:
            message["tool_calls"] = _calls(calls, f"{name}.tool_calls")
        thought = next((entry[key] for key in REASONING if entry.get(key)), "")
        if text_of(thought, f"{name}.reasoning_content").strip():
            message["reasoning_content"] = thought
        if entry.get("weight") in (0, "0") and entry.get("weight") is not False:
            message["weight"] = "0"
    if role == "tool":
        message |= {key: text_of(entry[key], f"{name}.{key}") for key in ("tool_call_id", "name") if key in entry}
    return message


def _content(value: Any, name: str) -> str:
    """The text of a message; parts of text are joined."""
    if isinstance(value, list | tuple):
        for part in value:
            if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
                raise FormError(f'"{name}.content" has a part that is no text ({_short(part)}); only text is trained')
        return "".join(text_of(part["text"], f"{name}.content") for part in value)
    return text_of(value, f"{name}.content")


def _calls(value: Any, name: str) -> str:
    """Calls of tools as JSON, with their arguments as an object."""
    value = listed(value, name)
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FormError(f'"{name}" has a call without the name of a function: {_short(call)}')
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = listed(arguments, f"{name}.arguments")
        if not isinstance(arguments, dict):
            raise FormError(f'"{name}.arguments" must be an object; got {_short(arguments)}')
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return plain_json(calls, name)


def tools_message(value: Any, name: str) -> list[Message]:
    """The tools that a conversation offers, as its first message; none for none."""
    value = listed(value, name)
    if not value:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(tool, dict) for tool in value):
        raise FormError(f'"{name}" must be a list of tools, each a JSON object; got {_short(value)}')
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        raise FormError(f'"{name}" has a tool without a name')
    return [{"role": "tools", "content": plain_json(tools, name)}]


def spoken_text(messages: Sequence[Message]) -> str:
    """All that user, assistant and tools say in these messages."""
    return "\n\n".join(message["content"] for message in messages if message["role"] not in ("system", "tools"))


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse an order of turns that chat templates don't have.

    Raises:
        LeftOutError: says what is out of order.
    """
    before = "start"
    for message in messages:
        role = message["role"]
        if role == "system" and before != "start":
            raise LeftOutError("a system message stands in the middle")
        if role == "assistant" and before in ("start", "system"):
            raise LeftOutError("it begins with the assistant")
        if role == before and role in ("user", "assistant") and "tool_calls" not in message:
            raise LeftOutError(f"the {role} speaks twice in a row")
        if role == "tool" and before not in ("tool", "assistant"):
            raise LeftOutError("a tool answers without having been called")
        if role != "tools" and not message["content"].strip() and "tool_calls" not in message and role != "tool":
            raise LeftOutError(f"a turn of the {role} is empty")
        before = role if role != "tools" else before
    if not any(message["role"] == "user" for message in messages):
        raise LeftOutError("no user speaks")


def answer_text(message: Message, keep_reasoning: bool) -> str:
    """The text of an assistant's turn, its reasoning first, between the marks that reasoning models write; or without
    any reasoning.

    Raises:
        LeftOutError: nothing is left without the reasoning.
    """
    text = message["content"]
    thought = message.get("reasoning_content", "")
    if keep_reasoning:
        return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{text}" if thought and CLOSE not in text else text
    answer = without_thinking(text)
    if answer is None or (text.strip() and not answer.strip()):
        raise LeftOutError("nothing follows its reasoning, which is dropped")
    return answer
