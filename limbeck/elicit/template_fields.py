"""What the templates of a recipe's steps see of a sample, and a sample with a prompt that a template gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from limbeck.elicit.flow import answer_of, prompt_messages, prompt_of, said_by, user
from limbeck.elicit.rendering import names_read, render
from limbeck.types import RecipeError, Sample, content_hash, nearest

ALWAYS = frozenset({"prompt", "system", "messages", "kind", "task", "answers", "labels", "row"})
SOMETIMES = frozenset({"answer", "check", "scores", "weight"})  # if the sample has them
ROW = "row."  # before the name of a column of the prompt's file
OF_THE_OLD = ("scores", "check", "answers")  # what holds of a prompt, and not of another in its place


def fields_of(sample: Sample, labels: Sequence[str] = ()) -> dict[str, Any]:
    """What templates see of a sample; `labels` are those that its answer may have."""
    messages = prompt_messages(sample)
    answer = {} if answer_of(sample) is None else {"answer": said_by(sample)}
    return {
        "kind": "",
        "task": "",
        "answers": [],
        "row": {},
        **{name: value for name, value in sample.meta.get("row", {}).items() if name not in ALWAYS | SOMETIMES},
        **sample.meta,
        "prompt": prompt_of(sample),
        "system": messages[0]["content"] if messages[0]["role"] == "system" else "",
        "messages": list(messages),
        "labels": list(labels),
        **answer,
    }


def own_names(templates: Mapping[str, str], place: str) -> frozenset[str]:
    """The names that the templates read beside those that every sample has (see `AskingStep.reads`)."""
    names = frozenset().union(*names_read(templates, place).values())
    return names - ALWAYS - SOMETIMES | (names & {"row"})


def refuse_templates(
    templates: Mapping[str, str], rows: Sequence[Mapping[str, Any]], place: str, known: frozenset[str]
) -> None:
    """Render the templates for every sample that is there (its fields are a row), and look at the names that they read.

    Raises:
        RecipeError: a template that is none, reads a name that no sample has, or asks nothing of a sample.
    """
    rendered = render(templates, rows, place)
    names = ALWAYS | SOMETIMES | known
    for template, read in rendered.names.items():
        for name in sorted(read - names):
            raise RecipeError(f"{place}.{template}", _unknown(name, names))
    for row, texts in zip(rows, rendered.rows, strict=True):
        if fault := fault_of(texts):
            has = ", ".join(sorted(names.intersection(row)))
            at = place if len(templates) > 1 else f"{place}.prompt"
            raise RecipeError(at, f"{fault}, for the prompt {row['prompt'][:60]!r}; its fields: {has}")


def fault_of(texts: Mapping[str, str] | str) -> str:
    """Why a sample can't be asked about; empty if it can."""
    if isinstance(texts, str):
        return texts
    return "" if texts["prompt"] else "it asks nothing"


def _unknown(name: str, names: frozenset[str]) -> str:
    """That there is no such field or column, and what there is."""
    columns = sorted(other.removeprefix(ROW) for other in names if other.startswith(ROW))
    fields = {other for other in names if not other.startswith(ROW)}
    if not columns:
        return f"there is no field {name!r}{nearest(name, fields)}"
    if name.startswith(ROW):
        hint, what = nearest(name.removeprefix(ROW), columns), f"column {name.removeprefix(ROW)!r}"
    else:
        hint, what = nearest(name, fields), f"field or column {name!r}"
    hint = hint if hint.startswith("; did") else ""
    more = "" if name.startswith(ROW) else f"; fields: {', '.join(sorted(fields - set(columns)))}"
    return f"there is no {what}{hint}; the columns of the prompts: {', '.join(columns)}{more}"


def with_prompt(sample: Sample, text: str, reply: Sample | None = None) -> Sample:
    """The sample with another text in its user's last message, which `reply` gave where that is not a template's. An
    answer that it has stays."""
    messages = list(sample.messages)
    place = max(number for number, message in enumerate(messages) if message["role"] == "user")
    messages[place] = user(text)
    meta = {name: value for name, value in sample.meta.items() if name not in OF_THE_OLD}
    parents = (sample.id,) if reply is None else (sample.id, reply.id)
    new = replace(sample, messages=tuple(messages), parents=parents, meta=meta)
    prompt_id = content_hash(list(prompt_messages(new)))[:16]
    writer = sample.writer if reply is None or answer_of(sample) is not None else reply.writer
    return replace(new, writer=writer, meta=meta | {"prompt_id": prompt_id})
