"""The shapes of rows that people have: which columns hold the question, the answers and the conversation.

A row's shape follows from the names of its columns alone. `SHAPES` has an example of each, which the tests read in
every kind of file, and from which the table in docs/recipes.md is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from limbeck.types import MARGIN, PROBABILITY, nearest

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "problem", "query")
ANSWERS = ("answers", "references", "answer", "completion", "response", "output", "solution")
TEXTS = ("text", "sentence", "utterance", "review", "message", "comment", "tweet", "headline")  # beside one of LABELS
LABELS = ("label", "category", "intent", "sentiment", "topic", "class", "emotion", "label_text")
PREFERENCES = ("chosen", "rejected")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
LABELS_OF_PAIRS = (PROBABILITY, MARGIN)
FACTS = ("id", "kind", "task", "weight", "check", "feedback", *LABELS_OF_PAIRS)
ROLES = ("prompt", "input", "answer", "answers", *PREFERENCES, "messages", "system", "tools", "reasoning", *FACTS)
PASSAGES = ("context", "contexts", "passage", "passages", "document", "documents")
ALSO_CONTENT = ("text", "input", "reasoning", "reasoning_content", "thinking", "target", "label")
OF_ROWS = frozenset(
    (*CONVERSATIONS, *QUESTIONS, *ANSWERS, *PREFERENCES, *SYSTEMS, *TOOLS, "context", *ALSO_CONTENT)
)  # an object with one of these is a row, and not the frame of a file's rows
CONTENT = OF_ROWS | frozenset(PASSAGES)  # columns that look like content
OURS = ("answers", "references", "answer")


@dataclass(frozen=True)
class Form:
    """Which column is taken for what, for rows with certain columns, and which are not used. `expected` are the roles
    of a row that lacks some, in a file whose columns tell more."""

    roles: Mapping[str, str]
    ignored: tuple[str, ...]
    expected: tuple[str, ...] = ()

    @property
    def unused_content(self) -> list[str]:
        return [name for name in self.ignored if name in CONTENT]

    @cached_property
    def words(self) -> str:
        """What was taken for what."""
        names = {"messages": "a conversation", "prompt": "the prompt", "answer": "the answer", "answers": "the answers"}
        taken = ((column, names.get(role, role)) for role, column in self.roles.items())
        return ", ".join(column if column == name else f"{column} as {name}" for column, name in taken)


class UnclearError(ValueError):
    """Columns that don't tell what to take; the message says what to write."""


def form_of(columns: frozenset[str], named: Mapping[str, str | None] | None = None) -> Form:
    """What each column is taken for.

    Args:
        columns: those that have a value.
        named: from `prompts.columns`: the column of a role, or None where it is not to be read.

    Raises:
        UnclearError: no column looks like a prompt, or two look like the answer.
    """
    free = columns - {column for column in (named or {}).values() if column}
    roles = {role: column for role, column in (named or {}).items() if column in columns}
    shut = set(named or {})

    def take(role: str, *names: str) -> None:
        nonlocal free
        column = next((name for name in names if name in free), None)
        if role not in shut and role not in roles and column is not None:
            roles[role] = column
            free -= {column}

    if not {"prompt", "messages", "chosen"} & roles.keys():
        if not {"prompt"} & columns or "prompt" in shut:
            take("messages", *CONVERSATIONS)
        if "messages" not in roles:
            take("prompt", *QUESTIONS)
        if not {"prompt", "messages"} & roles.keys() and not shut & {"prompt", "answer", "answers"}:
            _take_labelled(free, take)
    if "messages" not in roles and not {"answer", "answers", "chosen"} & roles.keys():
        _take_answers(free, take)
    if roles.get("prompt") == "instruction":
        take("input", "input", "context")
    for role, names in (("system", SYSTEMS), ("tools", TOOLS), *((fact, (fact,)) for fact in FACTS)):
        take(role, *names)
    if not {"prompt", "messages", "chosen"} & roles.keys():
        shown = ", ".join(sorted(columns)) or "none"
        raise UnclearError(
            f'needs a non-empty text under "prompt", or a conversation under "messages"; its columns are {shown}: name'
            " one, as in prompts: {columns: {prompt: COLUMN, answer: COLUMN}}"
        )
    order = {role: place for place, role in enumerate(ROLES)}
    roles = dict(sorted(roles.items(), key=lambda entry: order[entry[0]]))
    return Form(roles, tuple(sorted(columns - set(roles.values()))))


def form_of_row(columns: frozenset[str], every: frozenset[str], named: Mapping[str, str | None] | None = None) -> Form:
    """As `form_of`; where the columns with a value don't tell, those without one are looked at, too, so that a text
    whose label is empty is a text.

    Raises:
        UnclearError: nothing tells.
    """
    try:
        return form_of(columns, named)
    except UnclearError:
        blank = form_of(every, named)
        roles = {role: column for role, column in blank.roles.items() if column in columns}
        return Form(roles, tuple(sorted(columns - set(roles.values()))), expected=tuple(blank.roles))


def _take_labelled(free: frozenset[str], take: Any) -> None:
    """A text and its label, where one column of each kind is there and no other could be the answer; two of either
    leave it open."""
    texts, labels = ([name for name in names if name in free] for names in (TEXTS, LABELS))
    if not texts or not labels or free & {*ANSWERS, *PREFERENCES}:
        return
    for role, what, names in (("prompt", "text", texts), ("answer", "label", labels)):
        if len(names) > 1:
            raise UnclearError(
                f"{' and '.join(names)} both look like the {what}; say which, as in prompts: {{columns: {{prompt:"
                f" {texts[0]}, answer: {labels[0]}}}}} (here {names[0]} is the {role})"
            )
    take("prompt", *texts)
    take("answer", *labels)


def _take_answers(free: frozenset[str], take: Any) -> None:
    """The column of the answers. Our own names come before those of others; two of either leave it open."""
    own = [name for name in (*OURS, "chosen") if name in free or (name == "chosen" and "rejected" in free)]
    if len(own) > 1:
        raise UnclearError('give one of "answer", "answers" (or "references"), or "chosen" with "rejected"')
    if own and own[0] == "chosen":
        take("chosen", "chosen")
        take("rejected", "rejected")
    elif own:
        take("answer" if own[0] == "answer" else "answers", own[0])
    else:
        others = [name for name in ANSWERS if name in free]
        if len(others) > 1:
            raise UnclearError(
                f"{' and '.join(others)} both look like the answer; say which, as in prompts:"
                f" {{columns: {{answer: {others[0]}}}}}"
            )
        take("answer", *others)


def check_named(named: Mapping[str, str | None]) -> None:
    """Refuse roles that there aren't.

    Raises:
        ValueError: names the role, and the nearest legal one.
    """
    for role in named:
        if role not in ROLES:
            raise ValueError(f"{role!r} is nothing that a column can be{nearest(role, ROLES)}")


@dataclass(frozen=True)
class RowShape:
    """A shape of rows: its name, whence it is known, and rows of it."""

    name: str
    known_from: str
    rows: tuple[dict[str, Any], ...] = field(default=())


def _said(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(turns)]


Q, A, WRONG = "How high is tower {n}?", "Tower {n} is {n}0 m high.", "I don't know."
CALL = {"type": "function", "id": "c1", "function": {"name": "height", "arguments": '{"n": 7}'}}
TOOL = {
    "type": "function",
    "function": {"name": "height", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
SHAPES = (
    RowShape("prompts", "Limbeck", ({"id": "t{n}", "prompt": Q},)),
    RowShape("prompt and answer", "Limbeck", ({"prompt": Q, "answer": A},)),
    RowShape("prompt and answers", "Limbeck", ({"prompt": Q, "answers": [A, WRONG]},)),
    RowShape("prompt and completion", "TRL, OpenAI's older form", ({"prompt": Q, "completion": A},)),
    RowShape("prompt and response", "many", ({"prompt": Q, "response": A},)),
    RowShape("question and answer", "GSM8K and many", ({"question": Q, "answer": A},)),
    RowShape("instruction and response", "Dolly, Magpie", ({"instruction": Q, "response": A},)),
    RowShape("instruction, input and output", "Alpaca", ({"instruction": "Answer.", "input": Q, "output": A},)),
    RowShape("text and label", "sets for classification", ({"text": Q, "label": A},)),
    RowShape("utterance and intent", "sets for classification", ({"utterance": Q, "intent": A},)),
    RowShape(
        "messages",
        "OpenAI, TRL",
        ({"messages": [{"role": "system", "content": "Be short."}, *_said(Q, A, "Sure?", "Yes.")]},),
    ),
    RowShape(
        "messages with tools",
        "OpenAI",
        (
            {
                "messages": [
                    *_said(Q),
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "c1", "content": "70"},
                    {"role": "assistant", "content": A},
                ],
                "tools": [TOOL],
            },
        ),
    ),
    RowShape(
        "messages with reasoning",
        "DeepSeek, Qwen, vLLM",
        ({"messages": [*_said(Q), {"role": "assistant", "content": A, "reasoning_content": "Ten times {n}."}]},),
    ),
    RowShape(
        "conversations",
        "ShareGPT",
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "human", "value": Q},
                    {"from": "gpt", "value": A},
                ]
            },
        ),
    ),
    RowShape("prompt and completion as messages", "TRL", ({"prompt": _said(Q), "completion": _said(Q, A)[1:]},)),
    RowShape("preference", "TRL, DPO", ({"prompt": Q, "chosen": A, "rejected": WRONG},)),
    RowShape(
        "preference as messages",
        "TRL, UltraFeedback",
        ({"prompt": Q, "chosen": _said(Q, A), "rejected": _said(Q, WRONG)},),
    ),
    RowShape("preference without a prompt", "TRL", ({"chosen": _said(Q, A), "rejected": _said(Q, WRONG)},)),
)


def example_rows(shape: RowShape, count: int) -> list[dict[str, Any]]:
    """So many rows of a shape, told apart by their number."""
    return [_numbered(row, number) for number in range(count) for row in shape.rows]


def _numbered(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return value.replace("{n}", str(number))
    if isinstance(value, list):
        return [_numbered(entry, number) for entry in value]
    return {key: _numbered(entry, number) for key, entry in value.items()} if isinstance(value, dict) else value
