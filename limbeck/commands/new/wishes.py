"""What the user wants: the answers to the questions of `limbeck new`, checked before anything is read or written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from limbeck.types import UserError, nearest

TASKS = {
    "classify": "give a text one of some labels",
    "extract": "fill in a form (JSON) from a text",
    "answer": "answer questions, from passages if there are any",
    "rewrite": "rewrite or summarise texts",
    "chat": "talk as the teacher does",
    "reason": "solve problems step by step",
    "tools": "call tools",
    "compress": "be the teacher with fewer layers",
}
SCALES = {"quick": "a few texts, to see that all works", "full": "all texts"}
EMBEDDED = "smollm2-135m-instruct"
PROVIDERS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gemini",
}
KEY = "LIMBECK_API_KEY"
INSTRUCTED_APART = ("reason", "chat")  # the instruction is the teacher's system message
THINKING = {"off": "ask for answers without thinking", "keep": "leave room for it"}
THOUGHT = 4096  # tokens of the thinking before an answer, at most
Scale = Literal["quick", "full"]


@dataclass(frozen=True)
class Wishes:
    """What a recipe is made from.

    Args:
        folder: the new folder, as commands will name it.
        learn_from: teacher, or labels: the data's own answers.
        teacher: a model, or a server's address.
        teacher_model: the model's name on that server. teacher_kind: what the server is; empty: as its address says.
        thinking: of a served teacher, off or keep; empty where nothing is said.
        lora: train adapters in place of all weights.
        instruction: what the teacher is told to do with each text: a part of its question for rewrite, answer and
            extract; its system message, which the student doesn't see, for reason and chat.
        schema: of extract, a JSON schema as a file.
        run_on: laptop, gpu or hardware that is listed.
    """

    folder: Path
    task: str
    learn_from: str = "teacher"
    teacher: str = EMBEDDED
    teacher_model: str = ""
    teacher_kind: str = ""
    thinking: str = ""
    student: str = EMBEDDED
    scale: Scale = "full"
    run_on: str = "laptop"
    instruction: str = ""
    schema: Path | None = None
    lora: bool = False

    @property
    def is_served(self) -> bool:
        return is_url(self.teacher)

    @property
    def has_teacher(self) -> bool:
        return self.learn_from == "teacher"

    @property
    def name(self) -> str:
        """The recipe's: the folder's name in the letters that a name may have."""
        return slug(self.folder.name)

    @property
    def server_kind(self) -> str:
        return self.teacher_kind or PROVIDERS.get(urlsplit(self.teacher).hostname or "", "openai-compatible")

    @property
    def on_gpu(self) -> bool:
        return self.run_on != "laptop"

    @property
    def thought(self) -> int:
        """Tokens that the teacher may think before its answer, beside those of the answer."""
        return THOUGHT if self.thinking == "keep" else 0

    @property
    def drops_thinking(self) -> bool:
        """Whether the student learns the teacher's answers without the thinking before them."""
        return self.thinking == "off" or (self.thinking == "keep" and self.task not in ("reason", "chat"))


def is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def slug(text: str) -> str:
    """A name that a recipe can have."""
    letters = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return letters[:50].rstrip("-._") or "mine"


def check_folder(folder: Path) -> None:
    """Refuse a folder that is there, or whose name can't stand in a recipe.

    Raises:
        UserError: says which, and what to do.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already, and nothing is overwritten; give another name, or remove it")
    if "@" in str(folder) or any(mark in str(folder) for mark in "*?[") or not str(folder).isprintable():
        raise UserError(f"{folder}: a path with @, *, ?, [ or control characters can't stand in a recipe; give another")
    if folder.parts[:1] == ("builtin",):
        raise UserError("builtin/ is the name of Limbeck's own files; give another folder")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir():
        raise UserError(f"{parent} is a file, so {folder} can't be made; give another folder")


def chosen(flag: str, given: str, legal: dict[str, str]) -> str:
    """The choice that was given.

    Raises:
        UserError: it is none of the legal ones.
    """
    if given not in legal:
        raise UserError(f"{flag} {given!r} is not one of {', '.join(legal)}{nearest(given, legal)}")
    return given


def check_wishes(wishes: Wishes) -> None:
    """Refuse wishes that don't go together.

    Raises:
        UserError: names the flag and the cure.
    """
    if wishes.is_served and not wishes.teacher_model:
        raise UserError("--teacher is a server: say which of its models with --teacher-model")
    if wishes.teacher_model and not wishes.is_served:
        address = re.match(r"[\w-]+(\.[\w-]+)+(:\d+)?(/|$)|[\w-]+:\d+", wishes.teacher)
        cure = f": write https://{wishes.teacher}" if address else ": give the server's address with --teacher URL"
        raise UserError(f"--teacher-model names a model of a server, and --teacher has no address{cure}")
    if wishes.teacher_kind and not wishes.is_served:
        raise UserError("--teacher-kind says what a server is: give the server's address with --teacher URL")
    if wishes.thinking and not wishes.is_served:
        raise UserError("--thinking is for a teacher behind a server (--teacher URL); leave it out")
    if wishes.lora and wishes.task == "compress":
        raise UserError("--task compress trains all weights, since layers are missing; leave --lora out")
    if wishes.is_served and urlsplit(wishes.teacher).username:
        raise UserError(f"--teacher: leave user and password out of the address; a key stands in {KEY}")
    if wishes.schema is not None and wishes.task != "extract":
        raise UserError("--schema belongs to --task extract; leave it out")
    if wishes.instruction and wishes.task not in ("extract", "answer", "rewrite", *INSTRUCTED_APART):
        raise UserError("--instruction belongs to --task extract, answer, rewrite, reason or chat; leave it out")
    if wishes.instruction and not wishes.has_teacher:
        raise UserError("--instruction is for a teacher, and none is asked; leave it out")
    same = wishes.has_teacher and wishes.teacher == wishes.student and not wishes.instruction
    if wishes.task == "chat" and same:
        raise UserError(
            f"--task chat would ask {wishes.teacher} and train {wishes.student}: the student would learn to be itself."
            " Name a larger --teacher or another --student, or give the teacher an --instruction; --teacher none learns"
            " the answers in the data; --task compress drops layers"
        )
    if wishes.task == "compress" and (wishes.is_served or not wishes.has_teacher):
        raise UserError("--task compress drops layers of the teacher: --teacher must be a model whose weights are here")
    for name in {wishes.student, *([wishes.teacher] if wishes.has_teacher and not wishes.is_served else [])}:
        if name != EMBEDDED:
            from limbeck.models.sources import GgufSource, source_of  # imports torch

            if isinstance(source_of(name), GgufSource) and not Path(name).expanduser().is_file():
                raise UserError(f"there is no file {name!r} in {Path.cwd()}")
