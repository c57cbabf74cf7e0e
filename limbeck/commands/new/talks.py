"""Jobs whose teacher answers prompts as they are: calling tools, chatting, and being copied with fewer layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from limbeck.commands.new.data import Example, Seen
from limbeck.commands.new.draft import (
    FIDELITY_ITEMS,
    Draft,
    TaskDraft,
    corpus,
    elicited,
    from_corpus,
    pretrained,
    sampling,
)
from limbeck.commands.new.gold import calls_of
from limbeck.commands.new.parts import both_parts, mean_answer, room_for
from limbeck.commands.new.split import MOST_HELD_OUT, Split
from limbeck.commands.new.student import has_the_teachers_tokens
from limbeck.commands.new.wishes import Wishes
from limbeck.types import UserError

GIVEN = ("answer", "answers")
KEPT_LAYERS = 0.8  # of the teacher's, in `compress`
MEASURED = 300  # held-out texts on which the distance from a teacher is measured


def tools(wishes: Wishes, seen: Seen) -> Draft:
    """Calls of tools: the teacher's, those that the data say are wrong left out.

    Raises:
        UserError: no row offers tools.
    """
    if not any("tools" in example.row for example in seen.examples):
        raise UserError(
            f"{seen.file}: --task tools needs a column `tools` (a JSON list); --columns tools=COLUMN names it"
        )
    parts, each, notes = _parts(wishes, seen)
    room, tight = room_for(wishes, seen.examples)
    limit = room + wishes.thought
    checked = {example.plain: calls_of(example.answer) for example in reversed(seen.examples)}  # the first is kept
    found = sum(check is not None for check in checked.values())

    def rows(examples: Sequence[Example], number: str) -> list[dict[str, Any]]:
        judged = [checked[example.plain] for example in examples]
        return [
            {"id": f"{number}-{place}", **_row(example, answers=corpus(wishes))}
            | ({} if check is None else {"check": check})
            for place, (example, check) in enumerate(zip(examples, judged, strict=True), 1)
        ]

    text = (
        "elicit:\n"
        f"  - answer: {{{sampling(wishes, 0.0)}, max_tokens: {limit}}}   # its chat template shows the tools\n"
        + ("  - verify: {unchecked: keep}   # other calls than the data's are left out\n" if found else "")
        + f"{elicited(sampling(wishes, 0.0), limit)}\nloss: [cross_entropy]\n"
    )
    return Draft(
        title="Calling tools",
        about=["Calls of tools: the teacher's, for the conversations and tools of the data."],
        training=rows(parts.training, "text"),
        held_out=rows(parts.held_out, "held-out"),
        text=from_corpus(limit) if corpus(wishes) else text,
        answer_tokens=mean_answer(wishes, seen.examples, room),
        max_tokens=limit,
        start=pretrained(wishes),
        tasks=_given_answers(parts.held_out),
        headline=_headline(wishes),
        measured=_measured(wishes),
        answers_each=each,
        notes=[
            *notes,
            *tight,
            f"{found:,} of {len(checked):,} answers hold calls that the teacher's are compared with",
        ],
    )


def _row(example: Example, *, answers: bool) -> Mapping[str, Any]:
    return example.row if answers else {name: value for name, value in example.row.items() if name not in GIVEN}


def _talk(wishes: Wishes, seen: Seen, *, title: str, about: list[str], start: str, lr: str | None = None) -> Draft:
    """The teacher's own answers; its distributions, where the student has its tokens."""
    parts, each, notes = _parts(wishes, seen)
    room, tight = room_for(wishes, seen.examples)
    limit = room + wishes.thought
    rows = [
        [
            {"id": f"{part}-{number}", **_row(example, answers=corpus(wishes))}
            for number, example in enumerate(examples, 1)
        ]
        for part, examples in (("text", parts.training), ("held-out", parts.held_out))
    ]
    return Draft(
        title=title,
        about=about,
        training=rows[0],
        held_out=rows[1],
        text=from_corpus(limit) if corpus(wishes) else _of_teacher(wishes, limit),
        answer_tokens=mean_answer(wishes, seen.examples, room),
        max_tokens=limit,
        start=start,
        lr=lr,
        tasks={} if wishes.task == "compress" else _given_answers(parts.held_out),
        headline=_headline(wishes),
        measured=_measured(wishes),
        answers_each=each,
        notes=[*notes, *tight],
    )


def _of_teacher(wishes: Wishes, limit: int) -> str:
    """The sections of a recipe that teaches what the teacher answers to the prompts as they are."""
    drawn = sampling(wishes, 0.7, 0.95)
    if has_the_teachers_tokens(wishes):
        return (
            f"writer: [{{by: teacher, {drawn}, max_tokens: {limit}}}]\n"
            "loss: [forward_kl]   # the teacher's distribution at every token; recipes/gkd: on the student's own text\n"
        )
    return (
        f"elicit: [{{answer: {{{drawn}, max_tokens: {limit}}}}}]   # cut-off answers are left out\n"
        f"{elicited(drawn, limit)}\n"
        "loss: [cross_entropy]   # the teacher's text; where both have the same tokens: forward_kl\n"
    )


def _parts(wishes: Wishes, seen: Seen) -> tuple[Split, float, list[str]]:
    """(the two parts, how many answers a conversation teaches on average, what there is to say of both): all of the
    data's own, or one of the teacher's."""
    parts, notes = both_parts(wishes, seen, MEASURED if wishes.has_teacher else MOST_HELD_OUT)
    conversations = len(parts.training)
    answers = conversations + sum(len(example.earlier) for example in parts.training)
    if wishes.has_teacher or answers == conversations:
        return parts, 1.0, notes
    notes.append(f"{conversations:,} conversations hold {answers:,} answers")
    trained = {text for example in parts.training for text in example.earlier}
    held_out = [example for example in parts.held_out if example.text not in trained]
    if not held_out:
        raise UserError(
            f"{seen.file}: every text that could be held out begins a conversation that is trained on; give others to"
            " measure on with --test FILE"
        )
    if len(held_out) < len(parts.held_out):
        notes.append(f"{len(parts.held_out) - len(held_out):,} held-out texts begin trained conversations, left out")
    return replace(parts, held_out=held_out), answers / conversations, notes


def _measured(wishes: Wishes) -> int:
    return MEASURED if wishes.has_teacher else FIDELITY_ITEMS


def _headline(wishes: Wishes) -> str:
    if corpus(wishes):
        return "task/bits_per_byte"
    if has_the_teachers_tokens(wishes):
        return "forward_kl; a task of your own says more (docs/evaluation.md)"
    return "perplexity: how likely it finds the teacher's text"


def _given_answers(examples: Sequence[Example]) -> dict[str, TaskDraft]:
    """How likely the held-out answers of the data are, where they have any."""
    items = [_answered(example) for example in examples if example.answer]
    if not items:
        return {}
    task = TaskDraft(
        kind="perplexity",
        description="How likely the data's own answers are, in bits per byte: lower is better.",
        items=items,
        metrics=["bits_per_byte", "word_perplexity"],
        settings={},
    )
    return {"task": task}


def _answered(example: Example) -> dict[str, Any]:
    tools = [json.loads(message["content"]) for message in example.messages if message["role"] == "tools"]
    said = [message for message in example.messages if message["role"] != "tools"]
    return {"messages": said, "text": example.answer} | ({"tools": tools[0]} if tools else {})


def chat(wishes: Wishes, seen: Seen) -> Draft:
    """Conversations whose last turn the teacher answers."""
    about = ["The teacher answers each prompt (of a conversation, its last turn); the student learns its answers."]
    if corpus(wishes):
        about = ["Conversations, trained on the data's own answers; no teacher is asked."]
    return _talk(wishes, seen, title="Chat", about=about, start=pretrained(wishes))


def compress(wishes: Wishes, seen: Seen) -> Draft:
    """The teacher with fewer layers.

    Raises:
        UserError: no such teacher, or one whose layers can't be counted.
    """
    from limbeck.models.load import load_config
    from limbeck.models.weights import text_config

    layers = getattr(text_config(load_config(wishes.teacher)), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 2:
        raise UserError(
            f"--teacher {wishes.teacher}: its configuration names no number of layers, so none can be dropped"
        )
    kept = max(1, round(KEPT_LAYERS * layers))
    about = [f"The teacher with {kept} of its {layers} layers, trained until it speaks as the whole one does."]
    start = f"{{prune: {{layers: {kept}, keep: importance, calibration: {3 if wishes.scale == 'quick' else 6}}}}}"
    return _talk(wishes, seen, title=f"{kept} of {layers} layers", about=about, start=start, lr="2.0e-4")
