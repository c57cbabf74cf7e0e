"""A recipe in the making: its texts, its tasks, and the parts that differ from one kind of job to another."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.commands.new.data import Example
from limbeck.commands.new.wishes import Wishes

UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
MARK = re.compile(r"\{[{%#]")  # that begins something in a template
FIDELITY_ITEMS = 64
HOW_ASKED = "The teacher is asked with its question, the others with the text alone."
MODEST, LARGE = 4096, 16384  # most tokens of an update, on a laptop and on a GPU


@dataclass(frozen=True)
class TaskDraft:
    """A task's folder: what task.yaml says, and its items."""

    kind: str
    description: str
    items: Sequence[Mapping[str, Any]]
    metrics: Sequence[str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """What a kind of job makes of the texts.

    Args:
        title: in a few words. about: what happens, line by line, for the head of the recipe.
        training, held_out: rows of prompts.
        tasks: by the name of their folder.
        text: the sections `elicit`, `writer` and `loss` of the recipe.
        answer_tokens: of an answer in the training, about. max_tokens: of an answer, at most.
        start: the student's, in YAML.
        answers_each: of a training text, on average; more than one where every turn of a conversation is learnt.
        lr: the learning rate, where the student's size doesn't say it. batch: answers of an update; None where tokens
            are counted.
        measured: held-out texts on which fidelity is measured.
        headline: the figure to look at.
    """

    title: str
    about: Sequence[str]
    training: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    text: str
    answer_tokens: float
    max_tokens: int
    start: str
    tasks: Mapping[str, TaskDraft] = field(default_factory=dict)
    answers_each: float = 1.0
    lr: str | None = None
    batch: int | None = None
    measured: int = FIDELITY_ITEMS
    headline: str = "fidelity"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingLength:
    """How long the training is."""

    epochs: int
    tokens_per_step: int
    steps: int


def sizes(draft: Draft, wishes: Wishes, used: int) -> TrainingLength:
    """From the amount of text: some hundreds of updates where there is enough of it, and never fewer than ten a pass if
    they can be had."""
    used = round(used * draft.answers_each)
    if draft.batch is not None:
        batch = max(4, min(draft.batch, used // 10))
        tokens = max(16, round(batch * draft.answer_tokens))
        epochs = max(2, min(10, math.ceil(2400 / used)))
    else:
        total = used * draft.answer_tokens
        most = LARGE if wishes.on_gpu else MODEST
        tokens = 2 ** max(8, min(int(math.log2(most)), round(math.log2(max(1.0, total / 20)))))
        epochs = 3 if used < 5000 else 2
    if wishes.scale == "quick":
        epochs = min(epochs, 2)
    return TrainingLength(epochs, tokens, max(1, round(epochs * used * draft.answer_tokens / tokens)))


def token_count(text: str) -> float:
    """About how many tokens a text has, with the one that ends it: a quarter of its plain letters and spaces, one for
    each digit and mark, and half of the bytes of all others."""
    others = sum(len(letter.encode()) for letter in text if not letter.isascii())
    plain = sum(letter.isascii() and (letter.isalpha() or letter.isspace()) for letter in text)
    marks = sum(letter.isascii() for letter in text) - plain
    return plain / 4 + marks + others / 2 + 1


def mean_tokens(texts: Sequence[str]) -> float:
    return sum(map(token_count, texts)) / max(1, len(texts))


def inline(value: Any) -> str:
    """The value as YAML on one line; every text in quotes, so that none is read as something else."""
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def block(text: str, indent: int) -> str:
    """A text as a block in YAML (`|-`), or in quotes where a block can't hold it."""
    lines = text.split("\n")
    if UNPRINTABLE.search(text) or not all(line.isprintable() for line in lines) or lines[0][:1] in ("", " "):
        return inline(text)
    return "|-\n" + "\n".join(" " * indent + line if line else "" for line in lines)


def literal(text: str) -> str:
    """A text as it stands in a template of `ask`, where it must not begin anything."""
    return MARK.sub(lambda match: f"{{{{ '{match[0]}' }}}}", text)


def corpus(wishes: Wishes) -> bool:
    """Whether the student learns the data's own answers, and no teacher is asked."""
    return not wishes.has_teacher


def from_corpus(max_tokens: int) -> str:
    """The sections of a recipe that teaches the data's own answers."""
    return f"writer: [{{by: corpus, max_tokens: {max_tokens}}}]   # the data's own answers\nloss: [cross_entropy]\n"


def sampling(wishes: Wishes, temperature: float, top_p: float = 1.0) -> str:
    """How answers are drawn, in YAML. Anthropic's newer models take a temperature or `top_p`, and not both."""
    return f"temperature: {temperature}, top_p: {1.0 if wishes.server_kind == 'anthropic' else top_p}"


def elicited(drawn: str, max_tokens: int) -> str:
    """The writer of a recipe whose steps ask the teacher; held-out text is drawn as `drawn` says."""
    return f"writer: [{{by: elicited, {drawn}, max_tokens: {max_tokens}}}]"


def of_a_reply(wishes: Wishes) -> str:
    """What the limit of a reply is, for a comment."""
    return "of a reply" + (" and its thinking" if wishes.thought else "; raise it for a teacher that thinks first")


def prompt_rows(examples: Sequence[Example], *, answers: bool) -> list[dict[str, Any]]:
    """Rows with the text alone, or with their answers."""
    return [
        {"id": f"text-{number}", "prompt": example.text} | ({"answer": example.answer} if answers else {})
        for number, example in enumerate(examples, 1)
    ]


def pretrained(wishes: Wishes) -> str:
    return f"{{pretrained: {inline(wishes.student)}}}"
