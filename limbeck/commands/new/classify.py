"""A classifier: the teacher is asked for a label, or the data's own are taken; the student sees the text alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from limbeck.commands.new.data import Example, Seen, lengths, unique
from limbeck.commands.new.draft import (
    FIDELITY_ITEMS,
    HOW_ASKED,
    Draft,
    TaskDraft,
    block,
    corpus,
    elicited,
    from_corpus,
    inline,
    mean_tokens,
    of_a_reply,
    pretrained,
    prompt_rows,
    sampling,
    token_count,
)
from limbeck.commands.new.labels import label_notes, labels_of, nested, with_labels
from limbeck.commands.new.parts import split_notes
from limbeck.commands.new.server import holds_labels
from limbeck.commands.new.split import MOST_HELD_OUT, split
from limbeck.commands.new.wishes import Wishes
from limbeck.elicit.step import ANSWER_SHARE
from limbeck.types import UserError

MOST_SHOWN = 40  # examples in the question
LONGEST_SHOWN = 160  # characters of one
BATCH = 32
ENOUGH = 2  # held-out texts, without which nothing is measured


def classify(wishes: Wishes, seen: Seen) -> Draft:
    """Texts with labels as a classifier.

    Raises:
        UserError: no labels, or such as can't be.
    """
    seen = with_labels(seen)
    labels_of(seen.examples, str(seen.file))
    seen = unique(seen, by_label=True)
    labels = labels_of(seen.examples, str(seen.file))
    parts = split(seen.examples, labels, most=max(len(labels), MOST_HELD_OUT))
    trained = {example.answer for example in parts.training}
    if unknown := [example for example in parts.held_out if example.answer not in trained]:
        raise UserError(
            f"{unknown[0].place}: no text to train on has the label {unknown[0].answer!r}; give some, or leave it out"
        )
    if len(parts.held_out) < ENOUGH:
        raise UserError(f"{seen.file}: almost every label has one text only, so none can be held out; give more")
    order = sorted(labels)
    question = _question(parts.training, order)
    with_gold = corpus(wishes) or wishes.scale == "full"
    longest = max(map(token_count, labels))
    return Draft(
        title=f"A classifier of {len(labels)} labels",
        about=_about(wishes),
        training=prompt_rows(parts.training, answers=with_gold),
        held_out=prompt_rows(parts.held_out, answers=corpus(wishes))[:FIDELITY_ITEMS],
        tasks={"task": _task(wishes, parts.held_out, order)},
        text=_text(wishes, order, question, int(longest)),
        answer_tokens=mean_tokens([example.answer for example in seen.examples]),
        max_tokens=_room(int(longest)) + wishes.thought,
        start=pretrained(wishes),
        batch=BATCH,
        headline="task/pass_rate",
        notes=[
            *seen.notes,
            *label_notes(seen.examples, labels),
            f"texts: {lengths([example.text for example in seen.examples])}",
            *split_notes(parts),
        ],
    )


def _about(wishes: Wishes) -> list[str]:
    if corpus(wishes):
        return [
            "A classifier that is trained on the data's own labels; no teacher is asked.",
            "The student sees the text and answers with the label.",
        ]
    return [
        "A classifier: the teacher is asked for the label of every training text, with the question",
        "below; the student learns to give that label when it sees the text alone.",
        "The data's own labels are not taught. They measure teacher and student (task/)"
        + (",\nand train the gold_control." if wishes.scale == "full" else "."),
    ]


def _text(wishes: Wishes, labels: Sequence[str], question: str, longest: int) -> str:
    if corpus(wishes):
        return from_corpus(_text_tokens(longest))
    limit = _room(longest) + wishes.thought
    held = "      constrain: auto   # the server writes a label and nothing else\n" if holds_labels(wishes) else ""
    return (
        "elicit:\n"
        "  - ask:\n"
        f"      prompt: {block(question, 8)}\n"
        f"      parse: {{label: {inline(labels)}}}   # a reply with none of them, or two, is asked for again\n"
        + held
        + "      temperature: 0.0   # n: 3, vote: true, temperature: 0.7 asks three times, and most votes win\n"
        "      retries: 2\n"
        f"      max_tokens: {limit}   # {of_a_reply(wishes)}\n"
        f"{elicited(sampling(wishes, 0.0), limit)}   # whoever answered above\n"
        "loss: [cross_entropy]\n"
    )


def _room(longest: int) -> int:
    """Tokens of a reply: the label, and a few words around it."""
    return 16 + 2 * longest


def _text_tokens(longest: int) -> int:
    """Tokens of a text that is only measured: a label, and the share of a limit that plans take answers to fill."""
    return max(4, math.ceil(longest / ANSWER_SHARE))


def _question(examples: Sequence[Example], labels: Sequence[str]) -> str:
    """The template that the teacher is asked with: the labels, an example of some, the text."""
    shown = _shown(examples, labels)
    lines = ["Which of these labels fits the text best? Answer with the label alone.", "- {{ labels | join('\\n- ') }}"]
    if shown:
        lines += ["", "Examples:"]
        lines += [line for example in shown for line in (f"Text: {example.text}", f"Label: {example.answer}")]
    return "\n".join([*lines, "", "Text: {{ prompt }}", "Label:"])


def _shown(examples: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """Of every label the first short text on one line; none at all where some label has no such text."""
    fit: dict[str, Example] = {}
    for example in examples:
        whole = example.text + example.answer
        plain = whole.isprintable() and not {"{", "}"} & set(whole)
        if plain and len(example.text) <= LONGEST_SHOWN:
            fit.setdefault(example.answer, example)
    return [fit[label] for label in labels] if len(fit) == len(labels) <= MOST_SHOWN else []


def _task(wishes: Wishes, held_out: Sequence[Example], labels: Sequence[str]) -> TaskDraft:
    """The label that is written: by the student after the text alone, by the teacher after its question."""
    check = {"type": "exact", "normalise": False} if nested(labels) else {"type": "choice", "labels": list(labels)}
    return TaskDraft(
        kind="generation",
        description=f"The label of a text; {len(labels)} labels." + ("" if corpus(wishes) else f" {HOW_ASKED}"),
        items=[{"prompt": example.text, "check": check | {"answer": example.answer}} for example in held_out],
        metrics=["pass_rate", "tokens"],
        settings={"max_tokens": _room(int(max(map(token_count, labels)))) + wishes.thought},
    )
