"""What a user's file holds: its rows as rows that recipes read, and what is worth knowing of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.elicit.conversation import is_blank
from limbeck.elicit.prompt import Prompt, turns_of
from limbeck.elicit.prompt_file import Account, PromptReader, find_files, is_pattern, rows_of
from limbeck.elicit.shapes import PASSAGES, ROLES, form_of_row
from limbeck.types import Message, RecipeError, UserError, nearest

LEAST = 10  # texts, below which nothing is left to learn from and to measure on
ENDS_WITH_CALLS = "it ends with a call of a tool, without the tool's answer"  # why `elicit.prompt_row` leaves a row out
UNREAD = ("id", "reasoning", "task", "weight", "kind", "feedback")


@dataclass(frozen=True)
class Example:
    """A row: its text (all that is said before the answer), its first answer, its place in the file, itself with roles
    as columns, as a recipe reads it without being told more, and the conversation up to the answer. `is_test` is one of
    a file of tests, which is never trained; `earlier` are the texts before each earlier answer in the conversation."""

    text: str
    answer: str
    place: str
    row: Mapping[str, Any]
    is_conversation: bool = False
    messages: tuple[Message, ...] = ()
    is_test: bool = False
    earlier: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """The text up to case and spaces."""
        return _folded(self.text)

    @property
    def plain(self) -> str:
        """`said`, after the system message and the tools: two rows with one are the same question."""
        before = [message["content"] for message in self.messages if message["role"] in ("system", "tools")]
        return "\n".join([*map(_folded, before), self.said])


@dataclass
class Seen:
    """All usable rows of a file, each text once; `notes` are lines that say what was found."""

    file: Path
    examples: list[Example]
    notes: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(bool(example.answer) for example in self.examples)


def columns_of(file: Path) -> list[str]:
    """The names of the columns that have a value somewhere in the first rows."""
    names: dict[str, None] = {}
    for number, record in enumerate(rows_of(file, None)):
        names |= dict.fromkeys(record.values)
        if number >= 100:
            break
    return list(names)


def find_file(data: str, flag: str = "--data") -> Path:
    """The one file that a flag names.

    Raises:
        UserError: it isn't there, or several are named.
    """
    if data.startswith("builtin/") or is_pattern(data):
        raise UserError(f"{flag} {data}: give one file of your own (CSV, JSON lines, JSON, Parquet or text)")
    try:
        return find_files(data, flag)[0]
    except RecipeError as error:
        raise UserError(f"{flag}: there is no file {data!r}; give a CSV, JSON lines, JSON, Parquet or text file") from (
            error
        )


def named_columns(pairs: Sequence[str]) -> dict[str, str | None]:
    """`prompt=frage` and the like as a mapping of roles to columns; `text` and `label` are other words for `prompt` and
    `answer`.

    Raises:
        UserError: not of that form, or nothing that a column can be.
    """
    named: dict[str, str | None] = {}
    for pair in (part for given in pairs for part in given.split(",")):
        role, equals, column = (part.strip() for part in pair.partition("="))
        role = {"text": "prompt", "label": "answer"}.get(role, role)
        if not equals or not column:
            raise UserError(f"--columns {pair!r} is not of the form ROLE=COLUMN, such as text=message,label=category")
        if role not in ROLES:
            raise UserError(
                f"--columns: {role!r} is nothing that a column can be{nearest(role, ('text', 'label', *ROLES))}"
            )
        named[role] = None if column == "null" else column
    return named


def with_tests(seen: Seen, tests: Seen) -> Seen:
    """Both files' texts. Those of `tests` stand first: where one text is in both, it is a test and not trained.

    Raises:
        UserError: too few texts are left to learn from.
    """
    held = [replace(example, is_test=True) for example in tests.examples]
    said = {example.said for example in held}
    left = [example for example in seen.examples if example.said not in said]
    refuse_few(seen.file, len({example.plain for example in left}))
    notes = [*seen.notes, *tests.notes]
    if len(left) < len(seen.examples):
        both = _many(len(seen.examples) - len(left), "text is", "texts are")
        notes.append(f"{both} in {tests.file.name} too, and not trained")
    return Seen(seen.file, [*held, *left], notes)


def look(file: Path, columns: Mapping[str, str | None], task: str) -> Seen:
    """Read a file whole.

    Raises:
        UserError: a row is malformed, or too few can be used.
    """
    raw = {record.number: record.values for record in rows_of(file, columns)}
    if not raw:
        raise UserError(f"{file} holds no rows; give one with at least {LEAST}")
    reader = PromptReader(columns, keep_reasoning=False)
    examples: list[Example] = []
    passages: Counter[str] = Counter()
    for prompt in _prompts(reader, file, task):
        values = {name: value for name, value in raw[prompt.line].items() if not is_blank(value)}
        form = form_of_row(frozenset(values), frozenset(raw[prompt.line]), columns)
        roles = {role: values[column] for role, column in form.roles.items()}
        row = {role: value for role, value in roles.items() if role not in UNREAD}
        text = prompt.spoken
        if task == "answer" and "prompt" in row:
            free = {name: value for name, value in values.items() if name not in form.roles.values()}
            column, passage = _passage(free, prompt.place)
            if column:
                text = row["prompt"] = f"{passage}\n\nQuestion: {text}"
                passages[column] += 1
        if "input" in row:
            row = {"instruction" if role == "prompt" else role: value for role, value in row.items()}
        is_conversation = bool(prompt.before or prompt.after)
        answer = prompt.answers[0] if prompt.answers else ""
        examples.append(
            Example(
                text,
                answer,
                prompt.place,
                row,
                is_conversation=is_conversation,
                messages=prompt.messages,
                earlier=tuple(turn.spoken for turn in list(turns_of(prompt))[:-1]),
            )
        )
    refuse_few(file, len({example.plain for example in examples}))
    seen = Seen(file, examples, [_what(reader.accounts[0], set(passages))])
    seen.notes += [f"{column} stands before the question, in one text" for column in passages]
    return seen


def _passage(values: Mapping[str, Any], place: str) -> tuple[str, str]:
    """(column, text) of the passages that a question is about, several of them one after the other; empty where there
    are none.

    Raises:
        UserError: they are neither a text nor a list of texts.
    """
    unread = ""
    for column in PASSAGES:
        parts = values[column] if isinstance(values.get(column), list) else [values.get(column)]
        texts = [part for part in parts if isinstance(part, str) and part.strip()]
        if any(not isinstance(part, str) and not is_blank(part) for part in parts):
            unread = unread or column
        elif texts:
            return column, "\n\n".join(texts)
    if unread:
        raise UserError(
            f'{place}: "{unread}" must be a text or a list of texts for --task answer: write the passages so, or give'
            " the column another name, and it is not used"
        )
    return "", ""


def _prompts(reader: PromptReader, file: Path, task: str) -> Iterator[Prompt]:
    """The prompts of a file.

    Raises:
        UserError: a row is malformed, or most conversations for `tools` end with the calls of a message's own field.
    """
    error = None
    try:
        yield from reader.read([file])
    except UserError as raised:
        error = raised
    account = reader.accounts[0]
    calls, first = account.left_out.get(ENDS_WITH_CALLS, (0, ""))
    if task == "tools" and calls > account.taken.total():
        raise UserError(
            f"{file}: {calls:,} conversations end with a message that has `tool_calls` (first: {first}), which can't be"
            " read as an answer; write the calls as its content, such as"
            ' {"name": "add", "arguments": {"a": 1}}, or leave that message out, and the teacher makes the calls'
        ) from error
    if error is not None:
        raise error


def _what(account: Account, passages: set[str]) -> str:
    """The account's line, without a word that a column is not used which is."""
    for name in passages:
        account.ignored.pop(name, None)
    return account.line


def unique(seen: Seen, *, by_label: bool) -> Seen:
    """Each text once. With labels, a text that stands under two of them is left out, since nothing says which is right.

    Raises:
        UserError: fewer than LEAST texts are left.
    """
    first: dict[str, Example] = {}
    unclear: dict[str, Example] = {}
    repeated = 0
    for example in seen.examples:
        other = first.setdefault(example.plain, example)
        if other is example:
            continue
        repeated += 1
        if by_label and other.answer != example.answer:
            unclear.setdefault(example.plain, example)
    kept = [example for plain, example in first.items() if plain not in unclear]
    notes = list(seen.notes)
    if repeated:
        notes.append(f"{_many(repeated, 'row repeats', 'rows repeat')} a text up to case and spaces: each stands once")
    if unclear:
        other = next(iter(unclear.values()))
        notes.append(
            f"{_many(len(unclear), 'text has', 'texts have')} two different labels, left out"
            f" (such as {shown(other.text)!r}, {other.place})"
        )
    refuse_few(seen.file, len(kept))
    return Seen(seen.file, kept, notes)


def refuse_few(file: Path, texts: int) -> None:
    if texts < LEAST:
        raise UserError(
            f"{file} has {texts} different texts that can be used, too few to learn from and to measure on;"
            f" give at least {LEAST}, better some hundreds"
        )


def lengths(texts: Sequence[str]) -> str:
    """How long texts are, in characters: the shortest, the middle one, the longest."""
    sizes = sorted(map(len, texts))
    return f"{sizes[0]:,} to {sizes[-1]:,} characters, half of them up to {sizes[len(sizes) // 2]:,}"


def shown(text: str, most: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _many(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"
