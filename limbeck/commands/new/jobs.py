"""The jobs that `limbeck new` knows, by the name of `--task`."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.commands.new.asked import answer, extract, reason, rewrite
from limbeck.commands.new.classify import classify
from limbeck.commands.new.data import Seen
from limbeck.commands.new.draft import Draft
from limbeck.commands.new.talks import chat, compress, tools
from limbeck.commands.new.wishes import Wishes

JOBS: dict[str, Callable[[Wishes, Seen], Draft]] = {
    "classify": classify,
    "extract": extract,
    "answer": answer,
    "rewrite": rewrite,
    "chat": chat,
    "reason": reason,
    "tools": tools,
    "compress": compress,
}


def draft_of(wishes: Wishes, seen: Seen) -> Draft:
    """The job's draft.

    Raises:
        UserError: the data don't suit the job.
    """
    return JOBS[wishes.task](wishes, seen)
