"""Conversations as a chat template and as a server take them, with tools, calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from limbeck.types import Message

TOOLS = "tools"  # the role of a first message whose content is the tools, as JSON


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


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether tools are offered, called, or answer in a conversation."""
    return any(message["role"] in (TOOLS, "tool") or "tool_calls" in message for message in messages)
