"""The command line of `limbeck new`: asks on a terminal for what no flag says, and writes a recipe for a user's job."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.commands import console, printing
from limbeck.commands.new.wishes import (
    EMBEDDED,
    KEY,
    SCALES,
    TASKS,
    THINKING,
    Wishes,
    check_folder,
    check_wishes,
    chosen,
    is_url,
    slug,
)
from limbeck.types import UserError, nearest

if TYPE_CHECKING:
    from limbeck.commands.new.data import Seen

LEARN_FROM = {"teacher": "what the teacher answers", "labels": "the answers in the data"}
MACHINES = {"auto": "gpu if there is one here, else laptop", "laptop": "this machine", "gpu": "a CUDA device"}


def _option(flag: str, words: str, metavar: str | None = None, shown: bool = True) -> Any:
    return typer.Option(flag, help=words, metavar=metavar, show_default=shown)


@dataclass
class Given:
    """The command's argument and options; None where nothing was given."""

    where: Annotated[
        str | None, typer.Argument(help="The new folder, which also names the recipe.", metavar="[DIR or NAME]")
    ] = None
    task: Annotated[str | None, _option("--task", f"{', '.join(TASKS)}.", "TASK")] = None
    data: Annotated[
        str | None, _option("--data", "Your texts: CSV, JSON lines, JSON, Parquet or text, one row each.", "FILE")
    ] = None
    test: Annotated[
        str | None, _option("--test", "More rows like them, only to measure on; without, a part is held out.", "FILE")
    ] = None
    columns: Annotated[
        list[str],
        _option("--columns", "Which column is what, as in text=message,label=category.", "ROLE=COLUMN", False),
    ] = field(default_factory=list)
    teacher: Annotated[
        str | None,
        _option(
            "--teacher",
            f"A name of `limbeck models`, a folder, a hub id, or the URL of an OpenAI-compatible server (its key in"
            f" {KEY}). none: learn from the answers in the data. Default: {EMBEDDED}.",
            "MODEL",
        ),
    ] = None
    teacher_model: Annotated[str | None, _option("--teacher-model", "The model's name on that server.", "NAME")] = None
    teacher_kind: Annotated[
        str | None,
        _option(
            "--teacher-kind",
            "What that server is: vllm, sglang, llama.cpp, ollama ... Default: as its address says.",
            "KIND",
        ),
    ] = None
    thinking: Annotated[
        str | None,
        _option(
            "--thinking",
            "Of a teacher behind a server. off: ask for answers without thinking. keep: leave room for it.",
            "HOW",
        ),
    ] = None
    student: Annotated[str | None, _option("--student", f"The model to train. Default: {EMBEDDED}.", "MODEL")] = None
    lora: Annotated[bool, _option("--lora", "Train adapters instead of all weights.")] = False
    learn_from: Annotated[
        str | None, _option("--learn-from", "teacher, or labels: the answers in the data.", "WHAT")
    ] = None
    run_on: Annotated[
        str | None,
        _option(
            "--run-on",
            "laptop, gpu, or hardware such as h100-80gb. Default: auto, which is gpu if there is one here.",
            "MACHINE",
        ),
    ] = None
    scale: Annotated[
        str | None, _option("--scale", "quick: a few texts, to see that all works. Default: full.", "SCALE")
    ] = None
    schema: Annotated[Path | None, _option("--schema", "Of --task extract: a JSON schema.", "FILE.json")] = None
    instruction: Annotated[
        str | None, _option("--instruction", "What the teacher is told to do with each text.", "TEXT")
    ] = None
    yes: Annotated[bool, _option("--yes", "Ask nothing; take the defaults.")] = False
    json_: Annotated[bool, _option("--json", "Print JSON, and ask nothing.")] = False

    @property
    def asks(self) -> bool:
        return not self.yes and not self.json_ and is_terminal()


def is_terminal() -> bool:
    return sys.stdin.isatty()


def as_command(section: type[Given], run: Callable[[Given], None]) -> Callable[..., None]:
    """A command whose options are the fields of `section`."""

    def command(**given: Any) -> None:
        run(section(**given))

    parameters = []
    for parameter in inspect.signature(section, eval_str=True).parameters.values():
        default = [] if parameter.name == "columns" else parameter.default
        parameters.append(parameter.replace(default=default, kind=inspect.Parameter.KEYWORD_ONLY))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _new(given: Given) -> None:
    """Write a commented recipe for your own job: from a file of texts to a folder with recipe, prompts and task."""
    from limbeck.commands.new.data import find_file

    if given.where is not None:
        check_folder(Path(given.where))
    file = find_file(_ask(given, given.data, "--data", "Which file holds your texts (CSV, JSON lines, Parquet ...)?"))
    if given.schema is not None and given.task is None:
        given.task = "extract"
    columns = _columns(given, file)
    task = _task(given, file, columns)
    from limbeck.commands.new.data import look, with_tests
    from limbeck.commands.new.jobs import draft_of
    from limbeck.commands.new.write import write

    seen = look(file, columns, task)
    if given.test is not None:
        seen = with_tests(seen, look(find_file(given.test, "--test"), columns, task))
    if not given.json_:
        for note in seen.notes:
            console.out.print(note, markup=False)
    told = len(seen.notes)
    wishes = _wishes(given, file, task, seen)
    check_folder(wishes.folder)
    check_wishes(wishes)
    draft = draft_of(wishes, seen)
    write(draft, wishes, file)
    if given.json_:
        facts = {"folder": str(wishes.folder), "recipe": str(wishes.folder / "recipe.yaml"), "notes": list(draft.notes)}
        printing.print_result(facts | {"next": _next(wishes)}, as_json=True)
        return
    for note in list(draft.notes)[told:]:
        console.out.print(note, markup=False)
    _print_next(wishes)


new = as_command(Given, _new)
new.__name__ = "new"


def _ask(given: Given, value: str | None, flag: str, words: str, *, default: str | None = None) -> str:
    """What a flag says; else what the user answers; else the default.

    Raises:
        UserError: nothing says it, and nobody can be asked.
    """
    if value is not None:
        return value
    if given.asks:
        return str(typer.prompt(words, default=default))
    if default is not None and (given.yes or given.json_):
        return default
    raise UserError(f"{flag} is missing: {words[0].lower()}{words[1:]} (on a terminal `limbeck new` asks)")


def _ask_choice(given: Given, value: str | None, flag: str, legal: Mapping[str, str], *, default: str) -> str:
    """One of some choices; asked again where the answer is none."""
    if value is not None or not given.asks:
        return chosen(flag, default if value is None else value, dict(legal))
    console.out.print("\n".join(f"  {name:<9} {words}" for name, words in legal.items()), markup=False)
    while True:
        answer = typer.prompt(flag.removeprefix("--").replace("-", " "), default=default).strip()
        if answer in legal:
            return str(answer)
        console.out.print(f"{answer!r} is none of them.", markup=False)


def _columns(given: Given, file: Path) -> Mapping[str, str | None]:
    """Which column is what, from the flag, from the names, or from the user."""
    from limbeck.commands.new.data import columns_of, named_columns
    from limbeck.elicit.shapes import UnclearError, form_of

    there = columns_of(file)
    stripped = {column.strip(): column for column in there}
    named = {role: stripped.get(column or "", column) for role, column in named_columns(given.columns).items()}
    try:
        form_of(frozenset(there), named)
        return named
    except UnclearError as error:
        if not there:
            raise UserError(f"{file} holds no rows; give a table of texts, better some hundreds") from error
        if len(there) == 1 and not named:
            return {"prompt": there[0]}
        if not given.asks:
            if absent := [column for column in named.values() if column and column not in there]:
                raise UserError(
                    f"--columns: {file} has no column {absent[0]!r}{nearest(absent[0], stripped)}"
                ) from error
            shown = ", ".join(there)
            example = f"text={there[0].strip()}" + (f",label={there[1].strip()}" if len(there) > 1 else "")
            example = shlex.quote(example)
            raise UserError(
                f"{file}: its columns ({shown}) don't tell which holds the text: say so with --columns, such as"
                f" --columns {example}"
            ) from error
    console.out.print(f"The columns of {file}: {', '.join(there)}", markup=False)
    asked: dict[str, str | None] = {}
    for role, words in (("prompt", "Which one holds the text?"), ("answer", "Which one the label or answer? (- none)")):
        column = None
        while column not in there and column != "-":
            column = typer.prompt(words).strip()
        asked |= {} if column == "-" else {role: column}
    return {**named, **asked}


def _task(given: Given, file: Path, columns: Mapping[str, str | None]) -> str:
    """The task: given, asked for, or what the data look like where nothing is to be asked."""
    if given.task is not None:
        return chosen("--task", given.task, TASKS)
    if not given.asks and not given.yes:
        raise UserError(f"--task is missing: one of {', '.join(TASKS)} (with --yes it is what the data look like)")
    from limbeck.commands.new.data import look

    examples = look(file, columns, "").examples
    answers = Counter(example.answer for example in examples if example.answer)
    guess = "chat"
    if any("tools" in example.row for example in examples):
        guess = "tools"
    elif answers and not any(example.is_conversation for example in examples):
        guess = "classify" if len(answers) <= max(2, len(examples) // 5) else "answer"
    task = _ask_choice(given, None, "--task", TASKS, default=guess)
    if not given.asks and not given.json_:
        console.out.print(f"task: {task} ({TASKS[task]}), as the data look; --task says otherwise", markup=False)
    return task


def _learn_from(given: Given, task: str, seen: Seen) -> str | None:
    """Whose answers are learnt: as the flags say, or asked for; of chats, the data's own where no teacher is named."""
    if given.teacher == "none":
        return "labels"
    if given.learn_from is not None or task == "compress":
        return given.learn_from
    answered = bool(seen.examples) and seen.answered == len(seen.examples)
    if task != "chat":
        return _ask_choice(given, None, "--learn-from", LEARN_FROM, default="teacher") if given.asks else None
    if given.teacher is not None or not answered:
        return None
    if given.asks:
        return _ask_choice(given, None, "--learn-from", LEARN_FROM, default="labels")
    if not given.json_:
        console.out.print("no --teacher is named, so the student learns the data's own answers", markup=False)
    return "labels"


def _wishes(given: Given, file: Path, task: str, seen: Seen) -> Wishes:
    """All other questions."""
    name = slug(file.name.split(".")[0])
    folder = Path(_ask(given, given.where, "DIR", "What shall the new folder be called?", default=name))
    check_folder(folder)
    learn_from = chosen("--learn-from", _learn_from(given, task, seen) or "teacher", LEARN_FROM)
    teacher, teacher_model = EMBEDDED, ""
    if learn_from == "teacher":
        words = "Which teacher: a model, a folder, or a server's address (http://.../v1)?"
        teacher = given.teacher or (_ask(given, None, "--teacher", words, default=EMBEDDED) if given.asks else EMBEDDED)
        teacher_model = given.teacher_model or ""
        if is_url(teacher) and not teacher_model:
            teacher_model = _ask(given, None, "--teacher-model", "Which of the server's models?")
    elif given.teacher not in (None, "none") or given.teacher_model:
        raise UserError("--learn-from labels asks no teacher; leave --teacher out")
    student = given.student
    if student is None and task != "compress" and given.asks:
        student = _ask(given, None, "--student", "Which model shall be trained?", default=EMBEDDED)
    if student is not None and task == "compress":
        raise UserError("--task compress makes the student of the teacher; leave --student out")
    run_on = _machine(given)
    return Wishes(
        folder=folder,
        task=task,
        learn_from=learn_from,
        teacher=teacher,
        teacher_model=teacher_model,
        teacher_kind=_server_kind(given),
        thinking="" if given.thinking is None else chosen("--thinking", given.thinking, THINKING),
        student=student or EMBEDDED,
        scale="quick" if _ask_choice(given, given.scale, "--scale", SCALES, default="full") == "quick" else "full",
        run_on=run_on,
        instruction=given.instruction or "",
        schema=given.schema,
        lora=given.lora,
    )


def _server_kind(given: Given) -> str:
    """The server's kind as the flag says; empty without one."""
    if given.teacher_kind is None:
        return ""
    from limbeck.models.engines import ENGINES

    return chosen("--teacher-kind", given.teacher_kind, dict.fromkeys(ENGINES, ""))


def _machine(given: Given) -> str:
    """laptop, gpu, or a device that `limbeck check --device-like` knows."""
    run_on = (given.run_on or "auto").lower()
    if given.run_on is None and given.asks:
        run_on = _ask_choice(given, None, "--run-on", MACHINES, default="auto")
    if run_on == "auto":
        run_on = "gpu" if _has_gpu() else "laptop"
        if run_on == "gpu" and not given.json_:
            console.out.print("machine: gpu, as there is one here; --run-on laptop says otherwise", markup=False)
    if run_on in MACHINES:
        return run_on
    from limbeck.runs.hardware import LISTED

    return chosen("--run-on", run_on, dict.fromkeys((*MACHINES, *LISTED), ""))


def _has_gpu() -> bool:
    """Whether there is a CUDA device that has bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _next(wishes: Wishes) -> list[str]:
    recipe = wishes.folder / "recipe.yaml"
    like = "" if wishes.run_on in MACHINES else f" --device-like {wishes.run_on}"
    return [
        f"limbeck check {recipe}{like}",
        f"limbeck run {recipe}",
        f"limbeck chat runs/{wishes.name}",
        f"limbeck export runs/{wishes.name} --to gguf",
    ]


def _print_next(wishes: Wishes) -> None:
    words = (
        "what it will cost",
        f"all of it; the results: runs/{wishes.name}/report.html",
        "try it",
        "for llama.cpp, Ollama",
    )
    if wishes.has_teacher and wishes.teacher == EMBEDDED and wishes.task not in ("chat", "compress"):
        console.out.print(
            "the built-in teacher has 135 million parameters and often gives no usable answer: it is for trying out;"
            " for a student to be used, name a larger --teacher, or learn the data's own answers with --teacher none",
            markup=False,
        )
    console.out.print(f"wrote {wishes.folder}/ (its recipe.yaml says what each setting does). Next:", markup=False)
    if wishes.is_served:
        console.out.print(f"  export {KEY}=...   # (if it wants a key)", markup=False)
    width = max(map(len, _next(wishes)))
    for command, why in zip(_next(wishes), words, strict=True):
        console.out.print(f"  {command:<{width}}   # {why}", markup=False)
