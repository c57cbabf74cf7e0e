"""One row of a file as a prompt: its conversation, its answers and its facts, by the roles of its columns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.data.records import Record
from limbeck.elicit.conversation import (
    READ_KEYS,
    FormError,
    LeftOutError,
    answer_text,
    check_turns,
    is_blank,
    listed,
    messages_of,
    plain_json,
    text_of,
    tools_message,
)
from limbeck.elicit.prompt import Prompt
from limbeck.elicit.shapes import LABELS_OF_PAIRS
from limbeck.elicit.thinking import without_thinking
from limbeck.elicit.verify import parse_check
from limbeck.types import PROBABILITY, Message

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")

EXACT = 2.0**53  # floats below it hold every whole number


@dataclass
class PromptRow:
    """A row's values by their role; `names` are their columns."""

    values: dict[str, Any]
    names: Mapping[str, str]
    dropped_reasoning: bool = False
    ignored: list[str] = field(default_factory=list)

    def prompt(self, record: Record, place: str, *, prefix: str, keep_reasoning: bool) -> Prompt:
        asked, answers = self._preference() if "chosen" in self.values else self._conversation()
        system = self._text("system") if self._text("system").strip() else ""
        if system and asked[0]["role"] == "system":
            raise FormError(f'"{self.names["system"]}" and the conversation both have a system message; name one')
        if not keep_reasoning:
            self._drop_reasoning([*asked, *answers])
        asked = [{"role": "system", "content": system}, *asked] if system else asked
        tools = tools_message(self.values.get("tools"), self.names.get("tools", "tools"))
        asked = [*tools, *asked]
        if len(asked) > 1 or asked[0]["role"] != "user" or not asked[0]["content"].strip():
            for answer in answers:
                check_turns([*asked, answer])
            check_turns(asked)
        last = max(number for number, message in enumerate(asked) if message["role"] == "user")
        texts = tuple(answer_text(answer, keep_reasoning) for answer in answers)
        if any(not text.strip() for text in texts):
            raise LeftOutError("its answer is empty")
        before = [_kept(message, keep_reasoning) for message in asked]
        return Prompt(
            id=prefix + self._name("id", f"line-{record.number}"),
            text=asked[last]["content"],
            answers=texts,
            before=tuple(before[:last]),
            after=tuple(before[last + 1 :]),
            untrained=tuple(n for n, message in enumerate(asked) if message.get("weight") == "0"),
            file=place.removesuffix(f", {record.place}"),
            unit=record.unit,
            line=record.number,
            labels=self._labels(len(texts)),
            **self._facts(place),
        )

    def _facts(self, place: str) -> dict[str, Any]:
        """Kind, task, weight, check and feedback."""
        check = self.values.get("check")
        if check is not None:
            check = listed(check, "check")
            plain_json(check, "check")
            parse_check(check, place)
        feedback = self._text("feedback")
        return {
            "kind": self._name("kind", ""),
            "task": self._name("task", ""),
            "weight": self._weight(),
            "check": check,
            "feedback": feedback,
        }

    def _labels(self, answers: int) -> tuple[tuple[str, float], ...]:
        """What is known of the two answers: the probability that the first is better, and by how much."""
        labels = []
        for role in LABELS_OF_PAIRS:
            if role not in self.values or answers < 2:
                continue
            value, name = self.values[role], self.names[role]
            if answers > 2:
                raise FormError(f'"{name}" speaks of two answers, and here are {answers}; leave it out')
            try:
                number = float(value) if not isinstance(value, bool) else math.nan
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            most = 1.0 if role == PROBABILITY else math.inf
            if not (0 <= number <= most and number < math.inf):
                legal = "from 0 to 1" if role == PROBABILITY else "of 0 or more"
                raise FormError(f'"{name}" must be a number {legal}, not {ascii(value)[:60]}')
            labels.append((role, number))
        return tuple(labels)

    def _name(self, role: str, otherwise: str) -> str:
        return text_of(_in_words(self.values[role]), role) if role in self.values else otherwise

    def _text(self, role: str) -> str:
        return text_of(self.values[role], self.names[role]) if role in self.values else ""

    def _weight(self) -> float:
        weight = self.values.get("weight", 1.0)
        if isinstance(weight, str):
            try:
                weight = float(weight)
            except ValueError:
                weight = None
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
            raise FormError('"weight" must be a number above 0')
        return float(weight)

    def _conversation(self) -> tuple[list[Message], list[Message]]:
        """(the messages up to the answers, the answers)"""
        if "messages" in self.values:
            return self._split(self._messages("messages"))
        asked = self._asked()
        if "answers" in self.values:
            value = listed(self.values["answers"], self.names["answers"])
            if not isinstance(value, list) or not value:
                raise FormError(f'"{self.names["answers"]}" must be a list of texts that are not empty')
            return asked, [self._answer(entry, "answers") for entry in value]
        if "answer" not in self.values:
            return self._split(asked)
        value = self.values["answer"]
        if not isinstance(value, list):
            return asked, [self._answer(value, "answer")]
        return self._split([*asked, *self._messages("answer")])

    def _split(self, messages: list[Message]) -> tuple[list[Message], list[Message]]:
        """The messages up to the last answer, and that, if the assistant speaks last."""
        last = messages[-1]
        if last["role"] != "assistant":
            return messages, []
        if "tool_calls" in last:
            raise LeftOutError("it ends with a call of a tool, without the tool's answer")
        if last.get("weight") == "0":
            raise LeftOutError("its last answer has the weight 0")
        return messages[:-1], [last]

    def _messages(self, role: str) -> list[Message]:
        value = listed(self.values[role], self.names[role])
        self.ignored += [
            f"{self.names[role]}.{key}"
            for entry in (value if isinstance(value, list) else [])
            if isinstance(entry, dict)
            for key in entry
            if key not in READ_KEYS and not is_blank(entry[key])
        ]
        return messages_of(value, self.names[role])

    def _asked(self) -> list[Message]:
        value = self.values["prompt"]
        if isinstance(value, list):
            return self._messages("prompt")
        if not isinstance(value, str):
            raise FormError(f'needs a non-empty text under "{self.names["prompt"]}", or a list of messages')
        text = text_of(value, self.names["prompt"])
        if more := self._text("input"):
            text = f"{text}\n\n{more}"
        if not text.strip():
            raise LeftOutError("its prompt is empty")
        return [{"role": "user", "content": text}]

    def _answer(self, value: Any, role: str) -> Message:
        """One answer: text, a number, or the text of an object with `content`."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = _in_words(value)
        if not isinstance(value, str):
            raise FormError(f'"{self.names[role]}" must be text or a number; got {ascii(value)[:60]}')
        text = text_of(value, self.names[role])
        if not text.strip():
            raise LeftOutError("its answer is empty")
        message = {"role": "assistant", "content": text}
        if "reasoning" in self.values and (thought := self._text("reasoning")).strip():
            message["reasoning_content"] = thought
        return message

    def _preference(self) -> tuple[list[Message], list[Message]]:
        """(the messages up to the answers, the chosen and the rejected answer)"""
        if "rejected" not in self.values:
            raise FormError('"chosen" and "rejected" must be text that is not empty, or messages')
        sides = [self._side(role) for role in ("chosen", "rejected")]
        asked, answers = zip(*sides, strict=True)
        if asked[0] != asked[1]:
            raise LeftOutError("the chosen and the rejected answer follow different conversations")
        return asked[0], list(answers)

    def _side(self, role: str) -> tuple[list[Message], Message]:
        value = self.values[role]
        asked = self._asked() if "prompt" in self.values else []
        if isinstance(value, str):
            if asked:
                return asked, self._answer(value, role)
            return _last(_transcript(value, self.names[role]))
        if not isinstance(value, list):
            return asked, self._answer(value, role)
        messages = self._messages(role)
        starts = [dict(message) for message in messages[: len(asked)]] == asked
        return _last(messages if starts or messages[0]["role"] != "assistant" else [*asked, *messages])

    def _drop_reasoning(self, messages: Sequence[Message]) -> None:
        self.dropped_reasoning = any(
            "reasoning_content" in message
            or (message["role"] == "assistant" and without_thinking(message["content"]) != message["content"])
            for message in messages
        )


def _in_words(value: Any) -> str:
    """A value as text. Tables write whole numbers as 1.0 where a column has a cell without one."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < EXACT
    return str(int(value)) if is_whole else str(value)


def _last(messages: list[Message]) -> tuple[list[Message], Message]:
    if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        raise LeftOutError("it doesn't end with an answer")
    if len(messages) < 2:
        raise FormError("its answers have no prompt: give one, or whole conversations")
    return messages[:-1], messages[-1]


def _transcript(text: str, name: str) -> list[Message]:
    """The messages of a text such as "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH)."""
    parts = TRANSCRIPT.split(text_of(text, name))
    if parts[0].strip() or len(parts) < 5:
        raise FormError(f'"{name}" has no prompt beside it; give a "prompt", or messages')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def _kept(message: Message, keep_reasoning: bool) -> Message:
    """A message as it is shown: without marks of ours, and without reasoning where that is dropped."""
    kept = {key: value for key, value in message.items() if key != "weight"}
    if not keep_reasoning and message["role"] == "assistant":
        kept.pop("reasoning_content", None)
        is_call = "tool_calls" in message  # which may have nothing but reasoning beside it
        kept["content"] = without_thinking(kept["content"]) or "" if is_call else answer_text(message, False)
    return kept
