"""The tries at a server that may have been billed without an answer: each is written down before it is sent.

They stand in the run's `store.sqlite`. A try of a request that has its bill there is accounted for; one that the server
certainly did not process is struck out. What is left failed on the way, or was under way when a process was killed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

SCHEMA = """
create table if not exists tries (
    number integer primary key, key text not null, writer text not null, tokens integer not null
) strict;
"""
UNANSWERED = """
select coalesce(sum(tries - billed), 0), coalesce(sum(tokens * (tries - billed) / tries), 0) from (
    select count(*) as tries, sum(tokens) as tokens, exists (select 1 from bills where bills.key = tries.key) as billed
    from tries where writer = ? group by key
)
"""


class Tries:
    """One model's tries, in a run's store.

    Args:
        path: of the store, which exists.
        writer: the model's identity, as in the keys of requests.
    """

    def __init__(self, path: Path, writer: str) -> None:
        self.writer = writer
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma synchronous=normal")  # is there after a kill; a power cut may take the newest
        self._db.executescript(SCHEMA)

    def begin(self, key: str, tokens: int) -> int:
        """Write down a try that costs so many tokens at most; returns its number."""
        row = "insert into tries (key, writer, tokens) values (?, ?, ?)"
        number = self._db.execute(row, (key, self.writer, tokens)).lastrowid
        assert number is not None
        return number

    def strike(self, number: int) -> None:
        """The server did not process this try."""
        self._db.execute("delete from tries where number = ?", (number,))

    def unanswered(self) -> tuple[int, int]:
        """(tries that may have been billed and have no answer, the tokens that they cost at most)."""
        count, tokens = self._db.execute(UNANSWERED, (self.writer,)).fetchone()
        return int(count), int(tokens)

    def close(self) -> None:
        self._db.close()
