"""The tries at a server, each written down before it is sent: one that has no answer may be billed all the same.

They stand in the run's `store.sqlite`. A try is `sent` at first; `refused` once the server certainly did not process
it, and `answered` once its answer is stored (`Store.record`). What stays `sent` failed on the way, or was under way
when a process was killed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
create table if not exists tries (
    number integer primary key, key text not null, writer text not null, tokens integer not null, state text not null
) strict;
create index if not exists tries_by_key on tries (key, state);
"""
ANSWERED = (
    "update tries set state = 'answered' where number ="
    " (select max(number) from tries where key = ? and state = 'sent')"
)
ALL = (
    "select (select count(*) from tries where writer = :writer) + (select count(*) from bills where writer = :writer"
    " and key not in (select key from tries))"  # those of versions that wrote no tries down
)
UNANSWERED = "select count(*), coalesce(sum(tokens), 0) from tries where writer = ? and state = 'sent'"


@dataclass(frozen=True)
class Tries:
    """One model's tries.

    Args:
        path: of the store, which exists.
        writer: the model's identity, as in the keys of requests.
    """

    path: Path
    writer: str

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("pragma synchronous=normal")  # what is written survives a kill; a power cut may take the newest
            yield db

    def begin(self, key: str, tokens: int) -> int:
        """Write down a try that costs so many tokens at most; returns its number."""
        row = "insert into tries (key, writer, tokens, state) values (?, ?, ?, 'sent')"
        with self._open() as db:
            number = db.execute(row, (key, self.writer, tokens)).lastrowid
        assert number is not None
        return number

    def refused(self, number: int) -> None:
        """The server did not process this try."""
        with self._open() as db:
            db.execute("update tries set state = 'refused' where number = ?", (number,))

    def answered(self, key: str) -> None:
        """The newest try of this request has an answer, which is not stored."""
        with self._open() as db:
            db.execute(ANSWERED, (key,))

    def all(self) -> int:
        """How many tries were sent, in all processes."""
        with self._open() as db:
            return int(db.execute(ALL, {"writer": self.writer}).fetchone()[0])

    def unanswered(self) -> tuple[int, int]:
        """(tries that may have been billed and have no answer, the tokens that they cost at most)."""
        with self._open() as db:
            count, tokens = db.execute(UNANSWERED, (self.writer,)).fetchone()
        return int(count), int(tokens)
