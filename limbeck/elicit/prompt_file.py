"""Prompts from users' files: rows of any shape in, prompts out, with an account of what was taken for what.

Malformed rows are refused by file and line. Rows that are well formed but can't be used (an empty answer, two turns of
one speaker) are left out and counted, with the line of the first.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.data.records import Record, records
from limbeck.elicit.conversation import FormError, LeftOutError, is_blank, plain_json
from limbeck.elicit.prompt import Prompt
from limbeck.elicit.prompt_row import PromptRow
from limbeck.elicit.shapes import CONTENT, LABELS, OF_ROWS, TEXTS, Form, UnclearError, form_of_row
from limbeck.storage.files import user_path
from limbeck.types import RecipeError, UserError

MOST_NAMED = 6


@dataclass
class Account:
    """What a file gave: rows by what was taken for what, columns that weren't used, and rows left out, by reason (how
    many, the place of the first)."""

    source: str
    taken: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    dropped_reasoning: int = 0

    def leave_out(self, reason: str, place: str) -> None:
        count, first = self.left_out.get(reason, (0, place))
        self.left_out[reason] = count + 1, first

    @property
    def line(self) -> str:
        """All of it in one line."""
        parts = [f"{count:,} rows with {words}" for words, count in self.taken.most_common(3)]
        text = f"{self.source}: {'; '.join(parts) or 'no row'}"
        names = list(self.ignored)
        unused = [name for name in names if name in CONTENT]
        if unused:
            text += f"; NOT USED though it looks like content: {_names(unused)} (prompts.columns can name it)"
        if others := [name for name in names if name not in CONTENT]:
            text += f"; ignored: {_names(others)}"
        if self.dropped_reasoning:
            text += f"; the reasoning of {self.dropped_reasoning:,} rows was dropped"
        for reason, (count, first) in self.left_out.items():
            text += f"; {count:,} left out: {reason} (first: {first})"
        return text


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(
        name if name.isprintable() and len(name) <= 40 else ascii(name)[:40] for name in names[:MOST_NAMED]
    )
    return f"{shown} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else shown


def is_pattern(source: str) -> bool:
    return any(mark in source for mark in "*?[") and not user_path(source).exists()


def find_files(sources: str | Sequence[str], path: str) -> list[Path]:
    """The files that a recipe names: one, several, or patterns such as `data/*.jsonl`, each in the order of names.

    Raises:
        RecipeError: a file isn't there, a pattern fits none, or a file is named twice.
    """
    files: list[Path] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if source.startswith("builtin/"):
            raise RecipeError(path, f"{source} can't stand in a list; give it alone, or list files only")
        place = user_path(source)
        if is_pattern(source):
            found = sorted(Path(name) for name in glob.glob(str(place), recursive=True))  # noqa: PTH207 (no root)
            if not found:
                raise RecipeError(path, f"no file fits {source!r}; give a file, a list, or another pattern")
            files += found
        elif place.is_file() or place.is_dir():
            files.append(place)
        else:
            folder = "" if place.is_absolute() else f" in {Path.cwd()}, where limbeck was called"
            raise RecipeError(path, f"there is no file {source!r}{folder}; give a file of prompts or builtin/everyday")
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise RecipeError(path, f"{repeated[0]} is named twice; leave one out")
    return files


def rows_of(file: Path, columns: Mapping[str, str | None] | None) -> Iterator[Record]:
    """The rows of a file of which `prompts.columns` names these columns."""
    return records(file, OF_ROWS | set(filter(None, (columns or {}).values())), _is_labelled)


def _is_labelled(columns: Set[str]) -> bool:
    """Whether there are a text and its label, as `shapes` knows them."""
    return not columns.isdisjoint(TEXTS) and not columns.isdisjoint(LABELS)


def columns_in(source: str, columns: Mapping[str, str | None], path: str) -> dict[str, str | None]:
    """Those of the named columns in which some row of these files has a value, and the roles that have no column."""
    missing = {column for column in columns.values() if column is not None}
    for file in find_files(source, path):
        for record in rows_of(file, columns) if missing else ():
            missing -= {name for name, value in record.values.items() if not is_blank(value)}
            if not missing:
                break
    return {role: column for role, column in columns.items() if column not in missing}


def _numbered_prefixes(files: Sequence[Path]) -> dict[Path, str]:
    """What goes before the numbers of the rows of each file: its name, after as many of its folders as tell it from
    others of that name; nothing where there is one file."""
    if len(files) == 1:
        return {files[0]: ""}
    prefixes: dict[Path, str] = {}
    for count in range(1, max(len(file.parts) for file in files) + 1):
        ends = Counter(file.parts[-count:] for file in files)
        for file in files:
            if ends[file.parts[-count:]] == 1:
                prefixes.setdefault(file, "/".join(file.parts[-count:]) + "/")
    return prefixes


@dataclass
class PromptReader:
    """Reads the prompts of files one by one.

    Args:
        columns: from `prompts.columns`, the column of each role.
        keep_reasoning: whether the thinking before answers is kept.
        prefix: goes before every id.
        keep: columns that are kept with the prompts as data, beside what is taken of them; `*` for all.
        seen: the names of all columns.
    """

    columns: Mapping[str, str | None] | None = None
    keep_reasoning: bool = True
    prefix: str = ""
    accounts: list[Account] = field(default_factory=list)
    keep: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)

    def read(self, files: Sequence[Path]) -> Iterator[Prompt]:
        """The prompts of all files.

        Raises:
            UserError: a row is malformed, an id occurs twice, or there is no prompt at all.
        """
        ids: set[str] = set()
        valued: set[str] = set()
        numbered = _numbered_prefixes(files)
        for file in files:
            account = Account(str(file))
            self.accounts.append(account)
            forms: dict[frozenset[str], Form] = {}
            prefixes = self.prefix + (f"{file.name}/" if len(files) > 1 else ""), self.prefix + numbered[file]
            for record in rows_of(file, self.columns):
                prompt = self._row(record, account, forms, prefixes)
                if prompt is None:
                    continue
                if prompt.id in ids:
                    raise UserError(
                        f"{file}, {record.place}: the id {prompt.id!r} is used twice; give each row its own, or write"
                        " prompts: {columns: {id: null}} to number them"
                    )
                ids.add(prompt.id)
                yield prompt
            valued |= {column for columns in forms for column in columns}
        self._refuse_nothing(files, ids, valued)

    def _refuse_nothing(self, files: Sequence[Path], ids: set[str], seen: set[str]) -> None:
        for role, column in (self.columns or {}).items():
            if column is not None and column not in seen:
                raise RecipeError(
                    f"prompts.columns.{role}",
                    f"no row has a value in a column {column!r}; there are {', '.join(sorted(seen)) or 'none'}",
                )
        if not ids:
            reasons = "; ".join(
                f"{reason} ({place})" for account in self.accounts for reason, (_, place) in account.left_out.items()
            )
            raise UserError(
                f"{files[0]} has no prompt{f' that can be used: {reasons}' if reasons else ''}; write one JSON object"
                ' per line, such as {"prompt": "Why is the sky blue?"}'
            )

    def _row(
        self, record: Record, account: Account, forms: dict[frozenset[str], Form], prefixes: tuple[str, str]
    ) -> Prompt | None:
        """The prompt of a row; None if it is left out. The prefixes are that of its own id, and that of its number."""
        place = f"{account.source}, {record.place}"
        self.seen.update(record.values)
        try:
            values = {name: value for name, value in record.values.items() if not is_blank(value)}
            columns = frozenset(values)
            if columns not in forms:
                forms[columns] = self._form(columns, record)
            form = forms[columns]
            row = PromptRow({role: values[column] for role, column in form.roles.items()}, form.roles)
            own, numbered = prefixes
            prefix = own if "id" in row.values else numbered
            prompt = row.prompt(record, place, prefix=prefix, keep_reasoning=self.keep_reasoning)
            if self.keep:
                prompt = replace(prompt, row=self._kept(record))
        except LeftOutError as reason:
            account.leave_out(str(reason), record.place)
            return None
        except (FormError, UnclearError) as error:
            raise UserError(f"{place}: {error}") from error
        account.taken[form.words] += 1
        account.dropped_reasoning += row.dropped_reasoning
        kept = {name for name, _ in prompt.row}
        account.ignored.update(name for name in form.ignored if name not in kept)
        account.ignored.update(row.ignored)
        return prompt

    def _kept(self, record: Record) -> tuple[tuple[str, Any], ...]:
        """The columns that are kept of a row; a cell without a value is an empty text."""
        kept = []
        for name, value in record.values.items():
            if name in self.keep or "*" in self.keep:
                plain_json(value := "" if is_blank(value) else value, name)
                kept.append((name, value))
        return tuple(kept)

    def _form(self, columns: frozenset[str], record: Record) -> Form:
        form = form_of_row(columns, frozenset(record.values), self.columns)
        if not {"prompt", "messages", "chosen"} & form.roles.keys():
            raise LeftOutError(f"it has no {'conversation' if 'messages' in form.expected else 'prompt'}")
        return form
