"""Jobs whose teacher answers prompts as they are: calling tools, chatting, and being copied with fewer layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.commands.new.data import Example, Seen
from limbeck.commands.new.draft import (
    Draft,
    TaskDraft,
    corpus,
    from_corpus,
    pretrained,
)
from limbeck.commands.new.gold import calls_of
from limbeck.commands.new.parts import both_parts, mean_answer, room_for
from limbeck.commands.new.wishes import Wishes
from limbeck.types import UserError

GIVEN = ("answer", "answers")
KEPT_LAYERS = 0.8  # of the teacher's, in `compress`


def tools(wishes: Wishes, seen: Seen) -> Draft:
    """Calls of tools: the teacher's, those that the data say are wrong left out.

    Raises:
        UserError: no row offers tools.
    """
    if not any("tools" in example.row for example in seen.examples):
        raise UserError(
            f"{seen.file}: --task tools needs a column `tools` (a JSON list); --columns tools=COLUMN names it"
        )
    parts, notes = both_parts(wishes, seen)
    room = room_for(wishes, seen.examples)
    checked = {example.plain: calls_of(example.answer) for example in seen.examples}
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
        f"  - answer: {{temperature: 0.0, top_p: 1.0, max_tokens: {room}}}   # its chat template shows the tools\n"
        + ("  - verify: {unchecked: keep}   # other calls than the data's are left out\n" if found else "")
        + f"writer: [{{by: elicited, max_tokens: {room}}}]\nloss: [cross_entropy]\n"
    )
    return Draft(
        title="Calling tools",
        about=["Calls of tools: the teacher's, for the conversations and tools of the data."],
        training=rows(parts.training, "text"),
        held_out=rows(parts.held_out, "held-out"),
        text=from_corpus(room) if corpus(wishes) else text,
        answer_tokens=mean_answer(seen.examples, room),
        max_tokens=room,
        start=pretrained(wishes),
        notes=[*notes, f"{found:,} of {len(checked):,} answers hold calls that the teacher's are compared with"],
    )


def _row(example: Example, *, answers: bool) -> Mapping[str, Any]:
    return example.row if answers else {name: value for name, value in example.row.items() if name not in GIVEN}


def _talk(wishes: Wishes, seen: Seen, *, title: str, about: list[str], start: str, lr: str) -> Draft:
    """The teacher's own answers; its distributions, where the student has its tokens."""
    parts, notes = both_parts(wishes, seen)
    room = room_for(wishes, [])
    loss = (
        "loss: [forward_kl]   # the teacher's distribution at every token; recipes/gkd: on the student's own text\n"
        if wishes.has_the_teachers_tokens
        else "loss: [cross_entropy]   # the teacher's text; where both have the same tokens: forward_kl\n"
    )
    writer = f"writer: [{{by: teacher, temperature: 0.7, top_p: 0.95, max_tokens: {room}}}]\n"
    distance = "forward_kl; a task of your own says more (docs/evaluation.md)"
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
        text=from_corpus(room) if corpus(wishes) else writer + loss,
        answer_tokens=mean_answer(seen.examples if corpus(wishes) else [], room),
        max_tokens=room,
        start=start,
        lr=lr,
        tasks={"task": _given_answers(parts.held_out)} if corpus(wishes) else {},
        headline="task/bits_per_byte" if corpus(wishes) else distance,
        notes=notes,
    )


def _given_answers(examples: Sequence[Example]) -> TaskDraft:
    """How likely the held-out answers of the data are."""
    return TaskDraft(
        kind="perplexity",
        description="How likely the data's own answers are, in bits per byte: lower is better.",
        items=[_answered(example) for example in examples],
        metrics=["bits_per_byte", "word_perplexity"],
        settings={},
    )


def _answered(example: Example) -> dict[str, Any]:
    tools = [json.loads(message["content"]) for message in example.messages if message["role"] == "tools"]
    said = [message for message in example.messages if message["role"] != "tools"]
    return {"messages": said, "text": example.answer} | ({"tools": tools[0]} if tools else {})


def chat(wishes: Wishes, seen: Seen) -> Draft:
    """Conversations whose last turn the teacher answers."""
    about = ["The teacher answers each prompt (of a conversation, its last turn); the student learns its answers."]
    if corpus(wishes):
        about = ["Conversations, trained on the data's own answers; no teacher is asked."]
    return _talk(wishes, seen, title="Chat", about=about, start=pretrained(wishes), lr="5.0e-5")


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
