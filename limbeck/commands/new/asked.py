"""Jobs whose teacher is asked about each text: extracting, answering, rewriting, and solving problems."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.commands.new.data import Example, Seen
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
    literal,
    of_a_reply,
    pretrained,
    prompt_rows,
    sampling,
)
from limbeck.commands.new.gold import checks_of_answers, checks_of_results, object_of
from limbeck.commands.new.parts import both_parts, mean_answer, refuse_conversations, room_for
from limbeck.commands.new.wishes import Wishes
from limbeck.elicit.schema import check_schema, is_valid
from limbeck.types import UserError

REWRITE = "Summarise the text in one or two sentences."
ANSWER = "Answer the question in one or two sentences. If passages are given, go by them alone."
EXTRACT = "Fill in a form from the text. Reply with JSON alone, of this schema:"


def _asking(wishes: Wishes, question: str, parse: str, max_tokens: int) -> str:
    """The sections of a recipe whose teacher is asked about each text."""
    return (
        "elicit:\n"
        "  - ask:\n"
        f"      prompt: {block(question, 8)}\n"
        f"      parse: {parse}\n"
        "      temperature: 0.0   # the likeliest answer\n"
        "      retries: 2   # where a reply can't be read\n"
        f"      max_tokens: {max_tokens}   # {of_a_reply(wishes)}\n"
        f"{elicited(sampling(wishes, 0.0), max_tokens)}\n"
        "loss: [cross_entropy]\n"
    )


def _asked_draft(
    wishes: Wishes,
    seen: Seen,
    *,
    title: str,
    question: str,
    parse: str,
    check: Callable[[Example], dict[str, Any] | None],
) -> Draft:
    """A job whose teacher is asked about each text, while the student sees the text alone.

    Args:
        question: the template, with {{ prompt }} for the text.
        check: what a held-out answer is judged by.
    """
    refuse_conversations(wishes, seen)
    parts, notes = both_parts(wishes, seen)
    room, tight = room_for(wishes, seen.examples)
    limit = room + wishes.thought
    gold = corpus(wishes) or (wishes.scale == "full" and all(example.answer for example in parts.training))
    tasks, more = _checked_tasks(parts.held_out, check, limit, asked=not corpus(wishes))
    about = (
        [f"{title}, trained on the data's own answers; no teacher is asked."]
        if corpus(wishes)
        else [
            f"{title}: the teacher is asked about every text with the question below;",
            "the student sees the text alone.",
        ]
    )
    return Draft(
        title=title,
        about=about,
        training=prompt_rows(parts.training, answers=gold),
        held_out=prompt_rows(parts.held_out, answers=corpus(wishes))[:FIDELITY_ITEMS],
        tasks=tasks,
        text=from_corpus(limit) if corpus(wishes) else _asking(wishes, question, parse, limit),
        answer_tokens=mean_answer(wishes, seen.examples, room),
        max_tokens=limit,
        start=pretrained(wishes),
        headline=f"task/{tasks['task'].metrics[0]}" if tasks else "fidelity",
        notes=[*notes, *tight, *more],
    )


def _checked_tasks(
    held_out: Sequence[Example], check: Callable[[Example], dict[str, Any] | None], limit: int, *, asked: bool
) -> tuple[dict[str, TaskDraft], list[str]]:
    """(`task`: the texts alone, which a teacher that is `asked` sees in its question; what there is to say of it)"""
    compares = importlib.util.find_spec("rouge_score") is not None
    items: list[dict[str, Any]] = []
    for example in held_out:
        judged = check(example)
        item: dict[str, Any] = {"prompt": example.text} | ({} if judged is None else {"check": judged})
        if judged is None and example.answer and compares:
            item["references"] = [example.answer]
        if len(item) > 1:
            items.append(item)
    if not items:
        how = "; pip install rouge-score to compare with the data's (ROUGE-L)" if held_out[0].answer else ""
        return {}, [f"no program can judge the answers: fidelity alone is measured{how}; see evaluate.judge"]
    metrics = ["pass_rate"] if any("check" in item for item in items) else []
    metrics += ["rouge_l"] if any("references" in item for item in items) else []
    task = TaskDraft(
        kind="generation",
        description="Answers to held-out texts." + (f" {HOW_ASKED}" if asked else ""),
        items=items,
        metrics=[*metrics, "finished", "tokens"],
        settings={"max_tokens": limit},
    )
    return {"task": task}, []


def _by_text(examples: Sequence[Example], checks: Sequence[dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
    """The check of each text: of one that stands twice that of the first, which is kept."""
    found: dict[str, dict[str, Any] | None] = {}
    for example, check in zip(examples, checks, strict=True):
        found.setdefault(example.plain, check)
    return found


def extract(wishes: Wishes, seen: Seen) -> Draft:
    """Texts to JSON of a schema.

    Raises:
        UserError: no schema, or none that can be used.
    """
    if wishes.schema is None:
        raise UserError("--task extract needs --schema FILE.json, a JSON schema of what is to be extracted")
    schema = read_schema(wishes.schema)
    form = literal(json.dumps(schema, ensure_ascii=False))
    question = f"{literal(wishes.instruction) or EXTRACT}\n{form}\n\nText: {{{{ prompt }}}}"

    def check(example: Example) -> dict[str, Any]:
        right = object_of(example.answer) if example.answer else None
        return {"type": "json_schema", "schema": schema} if right is None else {"type": "json", "equals": right}

    for example in seen.examples:
        right = object_of(example.answer) if example.answer else {}
        cure = "mend it, or leave the answers out (--columns answer=null)"
        if right is None:
            raise UserError(f"{example.place}: its answer is no JSON object; {cure}")
        if example.answer and not is_valid(schema, right):
            raise UserError(f"{example.place}: --schema {wishes.schema} refuses its answer; {cure}")
    parse = f"{{json: {inline(schema)}}}"
    return _asked_draft(wishes, seen, title="Extraction to JSON", question=question, parse=parse, check=check)


def read_schema(file: Path) -> dict[str, Any]:
    """A JSON schema.

    Raises:
        UserError: no file, no JSON, or no schema.
    """
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--schema: can't read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--schema: {file} is not JSON ({error})") from error
    if not isinstance(schema, dict):
        raise UserError(f'--schema: {file} must be an object, such as {{"type": "object", "properties": {{...}}}}')
    check_schema({"schema": schema}, f"--schema {file}")
    return schema


def rewrite(wishes: Wishes, seen: Seen) -> Draft:
    """Texts to other texts, as an instruction says that only the teacher sees."""
    question = f"{literal(wishes.instruction or REWRITE)}\n\nText: {{{{ prompt }}}}"
    return _asked_draft(
        wishes, seen, title="Rewriting texts", question=question, parse="text", check=lambda example: None
    )


def answer(wishes: Wishes, seen: Seen) -> Draft:
    """Questions, with passages or without."""
    question = f"{literal(wishes.instruction or ANSWER)}\n\n{{{{ prompt }}}}"
    checks = _by_text(seen.examples, checks_of_answers(seen.examples))
    return _asked_draft(
        wishes,
        seen,
        title="Answering questions",
        question=question,
        parse="text",
        check=lambda example: checks[example.plain],
    )


def reason(wishes: Wishes, seen: Seen) -> Draft:
    """Problems with results: worked solutions of the teacher's that come to the right one.

    Raises:
        UserError: no results.
    """
    refuse_conversations(wishes, seen)
    if not seen.answered:
        raise UserError(
            f"{seen.file}: --task reason needs the results: a column such as answer (--columns answer=COLUMN)"
        )
    parts, notes = both_parts(wishes, seen)
    room, tight = room_for(wishes, seen.examples)
    limit = room + wishes.thought
    checks = _by_text(seen.examples, checks_of_results(seen.examples))
    gold = corpus(wishes) or (wishes.scale == "full" and all(example.answer for example in parts.training))
    rows = [
        row | {"check": checks[example.plain]}
        for row, example in zip(prompt_rows(parts.training, answers=gold), parts.training, strict=True)
        if checks[example.plain] is not None
    ]
    if not rows:
        raise UserError(f"{seen.file}: none of the texts to train on has a result; give more rows with one")
    draws = 2 if wishes.scale == "quick" else 4
    text = (
        "elicit:\n"
        f"  - rationale: {{n: {draws}, calls: 1, max_tokens: {limit}}}   # {draws} worked solutions of each\n"
        "  - verify   # those that come to the right result stay\n"
        "  - deduplicate: {of: answer}\n"
        f"{elicited(sampling(wishes, 0.7), limit)}\n"
        "loss: [cross_entropy]\n"
    )
    tasks, more = _checked_tasks(parts.held_out, lambda example: checks[example.plain], limit, asked=False)
    kinds = sorted({str(row["check"]["type"]) for row in rows})
    return Draft(
        title="Solving problems step by step",
        about=[
            "Worked solutions: the teacher solves each problem several times; the student learns those",
            "that are right.",
        ]
        if not corpus(wishes)
        else ["Worked solutions, trained on the data's own answers; no teacher is asked."],
        training=rows,
        held_out=prompt_rows(parts.held_out, answers=corpus(wishes))[:FIDELITY_ITEMS],
        tasks=tasks,
        text=from_corpus(limit) if corpus(wishes) else text,
        answer_tokens=mean_answer(wishes, seen.examples if corpus(wishes) else [], room),
        max_tokens=limit,
        start=pretrained(wishes),
        headline="task/pass_rate" if tasks else "fidelity",
        notes=[*notes, *tight, *more, f"results are checked as {' or '.join(kinds)}"],
    )
