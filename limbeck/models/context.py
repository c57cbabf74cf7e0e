"""What a teacher is shown in addition to the prompt and the student is not: instructions, a demonstration, the
solution, feedback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from limbeck.elicit.step_prompt import StepPrompt
from limbeck.types import Message, canonical_json, content_hash

PLACEHOLDER = re.compile(r"\{(prompt|answer|feedback)\}")


def conversation_key(messages: Sequence[Message]) -> str:
    """The key of a conversation's own fields: the text of a prompt that stands alone, else all its messages."""
    return messages[0]["content"] if len(messages) == 1 else canonical_json(list(messages))


def _last_asked(messages: Sequence[Message]) -> str:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


@dataclass(frozen=True)
class PromptContext:
    """Turns a conversation into the one that the teacher sees.

    `system` is put before it. `user` replaces its last user message; `{prompt}`, `{answer}` and `{feedback}` in it are
    filled in once and literally from `fields`, which are stored by `conversation_key`. If a field is missing, the
    message is not replaced. Before all this, it is shown as the `step` of elicitation shows it, if one is given.
    """

    system: str | None = None
    user: str | None = None
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    step: StepPrompt | None = None

    @property
    def name(self) -> str:
        """A short hash: a model with another context is another teacher."""
        shown = [self.system, self.user]
        return content_hash(shown if self.step is None else [*shown, self.step.name])[:12]

    def __call__(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        asked = messages
        if self.step is not None:
            messages = self.step(messages)
        last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=None)
        shown = [*messages]
        if self.user is not None and last is not None:
            text = messages[last]["content"]
            own = self.fields.get(conversation_key(asked), self.fields.get(_last_asked(asked), {}))
            values = {"prompt": text, **own}
            if all(name in values for name in PLACEHOLDER.findall(self.user)):
                shown[last] = {"role": "user", "content": PLACEHOLDER.sub(lambda match: values[match[1]], self.user)}
        if self.system is not None:
            at = int(bool(shown) and shown[0]["role"] == "tools")
            own_system = f"\n\n{shown.pop(at)['content']}" if shown[at:] and shown[at]["role"] == "system" else ""
            shown.insert(at, {"role": "system", "content": self.system + own_system})
        return tuple(shown)
