"""An Ollama Modelfile for an exported GGUF file: where it is, its chat template, its stop words, its sampling.

Ollama's templates are Go's and not Jinja. So the student's template is asked how it frames a system message, a
question, and an answer, and the Go template puts the same pieces around them. Whether that is all that the template
does is tried on several conversations; where it is not, that is said. Tools are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.template import render
from limbeck.models.to_gguf.vocabulary import begins_with_bos
from limbeck.types import Message, UserError

MARKS = ("zqlimbeckonezq", "zqlimbecktwozq", "zqlimbeckthreezq", "zqlimbeckfourzq")
SETTINGS = {  # of generation_config.json, and Ollama's names
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
CONTEXT = 4096  # tokens, or the student's own limit where that is less


@dataclass(frozen=True)
class Frames:
    """The pieces around the messages of a conversation. `begins` stands first where there is no system message."""

    begins: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]

    def framed(self, messages: Sequence[Message]) -> str:
        """The conversation as the Go template writes it."""
        text = "" if messages[0]["role"] == "system" else self.begins
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.answer}
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text

    def go(self) -> str:
        """The Go template."""
        system = ""
        if self.system is not None:
            system = f'{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}{{{{ end }}}}'
        return (
            f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.begins}{{{{ end }}}}'
            f"{{{{ range .Messages }}}}{system}"
            f'{{{{ if eq .Role "user" }}}}{self.user[0]}{{{{ .Content }}}}{self.user[1]}{{{{ end }}}}'
            f'{{{{ if eq .Role "assistant" }}}}{self.answer[0]}{{{{ .Content }}}}{self.answer[1]}{{{{ end }}}}'
            "{{ end }}"
        )


def frames_of(tokenizer: Tokenizer) -> tuple[Frames | None, str]:
    """How the student's template frames messages, and what is not covered by that (empty if all is)."""
    one, two, three, four = MARKS
    question: Message = {"role": "user", "content": one}
    try:
        header, asks = _framed(tokenizer, (question,)).split(one)
        talk = (question, {"role": "assistant", "content": two}, {"role": "user", "content": three})
        text = _framed(tokenizer, talk)
        answers, between = text.partition(one)[2].partition(two)[0], text.partition(two)[2].partition(three)[0]
    except (UserError, ValueError):
        return None, "the template takes no conversation of several turns"
    system = _around_system(tokenizer, four, question)
    user = _common_end([header, between, *(system or ())[1:]])
    if system is not None:
        system = (system[0], system[1].removesuffix(user))
    answer = answers.removeprefix(asks), between.removesuffix(user)
    frames = Frames(header.removesuffix(user), system, (user, asks), answer)
    return frames, _differs(tokenizer, frames)


def _around_system(tokenizer: Tokenizer, mark: str, question: Message) -> tuple[str, str] | None:
    """What stands before a system message, and between it and the question; None where the template takes none."""
    try:
        text = _framed(tokenizer, ({"role": "system", "content": mark}, question))
    except UserError:
        return None
    before, found, rest = text.partition(mark)
    return (before, rest.partition(question["content"])[0]) if found else None


def _framed(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The conversation in the student's template, without the first token where llama.cpp puts it there itself."""
    text = render(tokenizer, messages)
    return text.removeprefix(str(tokenizer.bos_token)) if begins_with_bos(tokenizer) else text


def modelfile(tokenizer: Tokenizer, file: str, ends: Sequence[int], settings: Any, context: int) -> tuple[str, str]:
    """The text of a Modelfile for `file`, and what it does not cover of the student's template (empty if all is).

    Raises:
        UserError: the template has quotation marks or braces that a Modelfile can't hold.
    """
    frames, differs = frames_of(tokenizer)
    lines = [f"FROM ./{file}"]
    if frames is not None:
        pieces = (frames.begins, *(frames.system or ()), *frames.user, *frames.answer)
        if any('"""' in piece or "{{" in piece for piece in pieces):
            raise UserError(
                "the chat template has braces or quotation marks that a Modelfile can't hold: use --to gguf"
            )
        lines.append(f'TEMPLATE """{frames.go()}"""')
    for number in ends:
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(number)}"')
    lines.append(f"PARAMETER num_ctx {min(context, CONTEXT)}")
    if not getattr(settings, "do_sample", False):
        lines.append("PARAMETER temperature 0")
    for ours, theirs in SETTINGS.items():
        value = getattr(settings, ours, None)
        if value is not None and (getattr(settings, "do_sample", False) or ours == "repetition_penalty"):
            lines.append(f"PARAMETER {theirs} {value:g}")
    return "\n".join(lines) + "\n", differs


def _common_end(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len)
    for begin in range(len(shortest) + 1):
        if all(text.endswith(shortest[begin:]) for text in texts):
            return shortest[begin:]
    return ""


def _differs(tokenizer: Tokenizer, frames: Frames) -> str:
    """The first of several conversations that the frames write otherwise than the template; empty if none."""
    system, user, answer = ({"role": role, "content": role.upper()} for role in ("system", "user", "assistant"))
    talks: list[tuple[Message, ...]] = [(user,), (user, answer, user), (user, answer, user, answer, user)]
    if frames.system is not None:
        talks += [(system, user), (system, user, answer, user)]
    for talk in talks:
        try:
            right = _framed(tokenizer, talk)
        except UserError:
            continue
        if right != frames.framed(talk):
            return f"a conversation of {', '.join(message['role'] for message in talk)}"
    return "" if frames.system is not None else "system messages, which the student's template doesn't take"
