"""The prompts of a run: the built-in ones, or the user's own files, divided into those that are trained and those that
are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from limbeck.config.builtin import seed_files, task_folders
from limbeck.config.sections import Evaluate, Prompts
from limbeck.elicit.prompt import Prompt as Prompt
from limbeck.elicit.prompt import turns_of
from limbeck.elicit.prompt_file import Account, PromptReader, columns_in, find_files
from limbeck.elicit.shapes import check_named
from limbeck.types import RecipeError, content_hash, nearest

BUILTIN = "builtin/"
HELD_OUT_SHARE = 0.1  # of a user's own file


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are trained, those that are held out, what was read from which file, and the names of the
    columns that the training prompts' rows have."""

    training: list[Prompt]
    held_out: list[Prompt]
    accounts: list[Account] = field(default_factory=list)
    columns: frozenset[str] = frozenset()

    @property
    def notes(self) -> list[str]:
        """A line for every file of the user's."""
        return [account.line for account in self.accounts]


def load_prompts(source: str, part: str = "train", path: str = "prompts.from") -> list[Prompt]:
    """The prompts of `builtin/NAME` (seeds, or a task's training or test part) or of a file (see `prompt_file`).

    Args:
        path: where the recipe names the source, for error messages.

    Raises:
        UserError: the source does not exist or is empty, or a line, named by its number, is malformed.
    """
    return list(_read(source, PromptReader(), part=part, path=path))


def _read(source: str | list[str], reader: PromptReader, *, part: str, path: str) -> Iterator[Prompt]:
    if isinstance(source, str) and source.startswith(BUILTIN):
        built_in = PromptReader(prefix=f"{source.removeprefix(BUILTIN)}/", keep=reader.keep, seen=reader.seen)
        return built_in.read([_built_in(source, part, path)])
    return reader.read(find_files(source, path))


def split_prompts(
    settings: Prompts, evaluate: Evaluate, turns: str | None = None, keep: frozenset[str] = frozenset()
) -> PromptSet:
    """The training prompts and the held-out prompts, without a common text.

    Built-in prompts come with a held-out part. Of a user's own file about a tenth, and at least one, is held out (by a
    hash of the text, so that a prompt stays held out when lines are added), unless `evaluate.prompts` names another
    file, which is read with those of the named columns that it has. Memory holds no more prompts than the limits let
    through.

    Args:
        turns: `all` makes every turn of the assistant in a training conversation a prompt of its own.
        keep: columns that are kept with the training prompts.

    Raises:
        RecipeError: one of the two is empty, or a held-out prompt is among the training prompts.
    """
    try:
        check_named(settings.columns or {})
    except ValueError as error:
        raise RecipeError("prompts.columns", str(error)) from error
    keep_reasoning = settings.reasoning != "drop"
    reader = PromptReader(settings.columns, keep_reasoning, keep=keep)
    other = PromptReader(_held_out_columns(settings, evaluate), keep_reasoning)
    prompts = _read(settings.source, reader, part="train", path="prompts.from")
    if evaluate.prompts is not None:
        held_out = _first(_read(evaluate.prompts, other, part="test", path="evaluate.prompts"), evaluate.limit)
        training = _first(prompts, settings.limit)
    elif isinstance(settings.source, str) and settings.source.startswith(BUILTIN):
        held_out = _first(_read(settings.source, other, part="test", path="prompts.from"), evaluate.limit)
        training = _first(prompts, settings.limit)
    else:
        training, held_out = _divided(prompts, settings.limit, evaluate.limit)
    for prompt_list, path in ((training, "prompts"), (held_out, "evaluate.prompts")):
        if not prompt_list:
            raise RecipeError(
                path, "no prompt is left for this part; give more prompts, or a file under evaluate.prompts"
            )
    held = {prompt.identity for prompt in held_out}
    if both := held & {prompt.identity for prompt in training}:
        raise RecipeError(
            "evaluate.prompts", f"{len(both)} held-out prompts are training prompts too, such as {min(both)!r}"
        )
    accounts = [*reader.accounts, *other.accounts]
    if turns == "all":
        training = _turns(training, held, accounts)
    return PromptSet(training, held_out, accounts, frozenset(reader.seen))


def _held_out_columns(settings: Prompts, evaluate: Evaluate) -> dict[str, str | None] | None:
    """The columns of `prompts.columns` that the user's file of held-out prompts has, too."""
    source = evaluate.prompts
    if source is None or source.startswith(BUILTIN) or not settings.columns:
        return None
    return columns_in(source, settings.columns, "evaluate.prompts")


def _first(prompts: Iterable[Prompt], limit: int | None) -> list[Prompt]:
    """The first of them; the others are read, too, so that a malformed one is refused."""
    return [prompt for number, prompt in enumerate(prompts) if limit is None or number < limit]


def _divided(
    prompts: Iterable[Prompt], limit: int | None, held_out_limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for prompt in prompts:
        part, most = (held_out, held_out_limit) if _is_held_out(prompt) else (training, limit)
        if most is None or len(part) < most:
            part.append(prompt)
    if not held_out and len(training) > 1:  # few prompts: the one that would be held out first
        held_out.append(training.pop(training.index(min(training, key=_place))))
    return training, held_out


def _turns(training: list[Prompt], held_out: set[str], accounts: list[Account]) -> list[Prompt]:
    """The turns of all conversations, without those that ask just what is held out."""
    turns: list[Prompt] = []
    for prompt in training:
        for turn in turns_of(prompt):
            if turn.identity not in held_out:
                turns.append(turn)
            elif accounts:
                accounts[0].leave_out("a turn asks a held-out prompt", prompt.place)
    return turns


def _is_held_out(prompt: Prompt) -> bool:
    return _place(prompt) < HELD_OUT_SHARE


def _place(prompt: Prompt) -> float:
    """Where the hash of its text puts it between 0 and 1; the first are held out."""
    return int(content_hash(prompt.identity)[:8], 16) / 16**8


def _built_in(source: str, part: str, path: str) -> Path:
    tasks = task_folders()
    seeds = seed_files()
    name = source.removeprefix(BUILTIN)
    if name in seeds and part == "train":
        return seeds[name]
    if name in seeds:
        raise RecipeError(
            path,
            f"the seeds {name} have no held-out part; set evaluate.prompts: builtin/everyday, or another task's",
        )
    if name not in tasks:
        raise RecipeError(path, f"there are no built-in prompts {name!r}{nearest(name, (*tasks, *seeds))}")
    file = tasks[name] / f"{part}.jsonl"
    if part == "train" and not file.is_file():
        trainable = [task for task, folder in tasks.items() if (folder / "train.jsonl").is_file()]
        raise RecipeError(
            path, f"the task {name} has no training prompts, only test ones; take {' or '.join(trainable)}"
        )
    return file
