"""What a step showed the model that wrote the training answers, and the student is not shown: a system message, or a
template around the prompt. So the teacher is measured, and writes its held-out text, with what it taught with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from limbeck.elicit.flow import said_by, user, with_answer
from limbeck.elicit.parse import Parsing, UnparsedError
from limbeck.elicit.rendering import render
from limbeck.types import AnswerForm, Message, Sample, content_hash

STAND_IN = "\ue000limbeck-prompt\ue000"  # where the prompt stands in a template that is filled in once


@dataclass(frozen=True)
class StepPrompt:
    """How a step shows a conversation to the model that answers it.

    Args:
        system: a system message, in place of the conversation's own.
        pieces: the texts around the user's last message, which is then all that is left of the conversation.
        parse: how the reply is read before it is taught.
        form: what the reply is held to, where the model can be.
        varies: every sample is shown something else (a drawn system message, its own fields), so that nothing can be
            said of other prompts.
    """

    system: str | None = None
    pieces: tuple[str, ...] | None = None
    parse: Parsing | None = None
    form: AnswerForm | None = None
    varies: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the model is shown just what the student is."""
        return self.system is None and self.pieces is None and not self.varies

    @property
    def name(self) -> str:
        """A short hash: a model that is shown something else is another teacher."""
        return content_hash([self.system, None if self.pieces is None else list(self.pieces)])[:12]

    def __call__(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.pieces is not None:
            last = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
            messages = (user(last.join(self.pieces).strip()),)
        return with_system(messages, self.system)

    def reads(self, reply: Sample) -> Sample:
        """The reply as the step would teach it; malformed where the step can't read it."""
        if self.parse is None or not reply.teaches:
            return reply
        try:
            text = self.parse.written(self.parse.read(said_by(reply)))
        except UnparsedError:
            return replace(reply, meta=reply.meta | {"finish": "malformed"})
        same = text == reply.messages[-1]["content"].strip()
        return reply if same else replace(with_answer(reply, reply, text), parents=(reply.id,))


PLAIN = StepPrompt()
VARIES = StepPrompt(varies=True)


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The conversation with this system message, in place of its own if it has one, before all else."""
    if system is None:
        return messages
    at = int(bool(messages) and messages[0]["role"] == "tools")
    has_own = bool(messages[at:]) and messages[at]["role"] == "system"
    return ({"role": "system", "content": system}, *messages[:at], *messages[at + has_own :])


def of_templates(
    prompt: str, system: str | None, labels: Sequence[str], parse: Parsing, *, form: AnswerForm | None = None
) -> StepPrompt:
    """What two jinja templates show. Where they read more than the prompt and the labels, or do more with the prompt
    than print it, they show every sample something else."""
    templates = {"prompt": prompt} | ({} if system is None else {"system": system})
    rendered = render(templates, [{"prompt": STAND_IN, "labels": list(labels)}], "elicit")
    (texts,) = rendered.rows
    if isinstance(texts, str) or any(names - {"prompt", "labels"} for names in rendered.names.values()):
        return VARIES
    if "prompt" not in rendered.printing or "prompt" in rendered.names.get("system", ()):
        return VARIES
    return StepPrompt(texts.get("system") or None, tuple(texts["prompt"].split(STAND_IN)), parse, form)
