"""A prompt: what a writer answers, with the conversation around it and all that is known about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from limbeck.elicit.conversation import answer_text, spoken_text
from limbeck.elicit.fence import conversation_text
from limbeck.types import Message, canonical_json


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `check` is None if no program can judge the answer; `before` is the conversation that comes before
    its text (a system message, earlier turns), `after` calls of tools and their results that come after it.

    `untrained` are the places of the assistant's turns that are never trained on, `cut` those of the answers whose end
    was cut off. `labels` are what is known of its two answers: the `probability` that the first is better, and the
    `margin`. `row` has the columns of its file that a step's template reads, as pairs of name and plain data. `file`,
    `unit` and `line` say where it stands (for error messages alone).
    """

    id: str
    text: str
    kind: str = ""
    answers: tuple[str, ...] = ()
    check: dict[str, Any] | None = None
    task: str = ""
    weight: float = 1.0
    feedback: str = ""
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()
    untrained: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    row: tuple[tuple[str, Any], ...] = ()
    labels: tuple[tuple[str, float], ...] = ()
    file: str = field(default="", compare=False)
    unit: str = field(default="line", compare=False)
    line: int = field(default=0, compare=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.before, {"role": "user", "content": self.text}, *self.after)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data, to be hashed and stored. What newer versions know is left out where there is none, so that old
        hashes stay valid."""
        facts: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "kind": self.kind,
            "answers": list(self.answers),
            "check": self.check,
            "task": self.task,
            "weight": self.weight,
            "feedback": self.feedback,
        }
        newer = {"before": self.before, "after": self.after, "untrained": self.untrained, "cut": self.cut}
        newer |= {"row": self.row, "labels": self.labels}
        return facts | {name: list(value) for name, value in newer.items() if value}

    @property
    def identity(self) -> str:
        """What makes it the same question as another: its text, and the conversation if there is one."""
        return canonical_json(list(self.messages)) if self.before or self.after else self.text

    @property
    def spoken(self) -> str:
        """All that user, assistant and tools say before the answer."""
        if not self.before and not self.after:
            return self.text
        return spoken_text(self.messages)

    @property
    def shown(self) -> str:
        """As a reader is shown it: the text, or the whole conversation with its speakers."""
        return conversation_text(self.messages)

    @property
    def place(self) -> str:
        """Where it stands, for error messages."""
        return f"{self.file}, {self.unit} {self.line}" if self.file else f"the prompt {self.id!r}"


def turns_of(prompt: Prompt) -> Iterator[Prompt]:
    """Every turn of the assistant in a conversation as a prompt of its own, with what was said before it and the turn
    as its answer; then the prompt itself."""
    messages = prompt.messages
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or "tool_calls" in message or place in prompt.untrained:
            continue
        last = max(number for number in range(place) if messages[number]["role"] == "user")
        yield replace(
            prompt,
            id=f"{prompt.id}/{place}",
            text=messages[last]["content"],
            answers=(answer_text(message, keep_reasoning=True),),
            check=None,
            feedback="",
            before=messages[:last],
            after=messages[last + 1 : place],
        )
    yield prompt
