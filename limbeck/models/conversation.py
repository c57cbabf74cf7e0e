"""Whether a chat template has a place for all of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.chat import for_template
from limbeck.models.template import render
from limbeck.types import Message, UserError

CLOSE = "</think>"


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
