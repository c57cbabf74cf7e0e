"""What a teacher is shown beside the prompt, and the student is not: instructions, a demonstration, the solution,
feedback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from limbeck.types import Message, content_hash

PLACE = re.compile(r"\{(prompt|answer|feedback)\}")


@dataclass(frozen=True)
class PromptContext:
    """Turns a conversation into the one that the teacher sees.

    `system` stands before it; `user` takes the place of its last user message, `{prompt}`, `{answer}` and `{feedback}`
    filled in once and literally from `fields`, which are known by the text of the prompt. A message of which a field is
    not known stays.
    """

    system: str | None = None
    user: str | None = None
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A short hash: models that see different things are different teachers."""
        return content_hash([self.system, self.user])[:12]

    def __call__(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=None)
        seen = [*messages]
        if self.user is not None and last is not None:
            text = messages[last]["content"]
            known = {"prompt": text, **self.fields.get(text, {})}
            if all(name in known for name in PLACE.findall(self.user)):
                seen[last] = {"role": "user", "content": PLACE.sub(lambda found: known[found[1]], self.user)}
        if self.system is not None:
            before = f"\n\n{seen.pop(0)['content']}" if seen and seen[0]["role"] == "system" else ""
            seen.insert(0, {"role": "system", "content": self.system + before})
        return tuple(seen)
