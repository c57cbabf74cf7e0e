"""The answers of teachers that all runs share: one SQLite file, so that what one run has paid for no other asks again.

Of each answer only what is good is kept: complete ones and those that were cut off at their limit. Transactions are
short and the journal is a rollback journal, which other hosts may open over a network, too (a write-ahead log may
not). While a process asks for an answer it holds a reservation, and a lock that ends with it, so that two runs at once
don't both pay. Whatever fails in writing here is told once and costs the run nothing: its folder has its answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from limbeck.storage.files import crash_point, user_path
from limbeck.storage.store import Store
from limbeck.types import TAUGHT_FINISHES, Generated, Message, Request, UserError, canonical_json, content_hash

FILE = "answers.sqlite"
VERSION = 1
SCHEMA = (
    "create table about (version integer not null)",
    "create table answers (key text primary key, teacher text not null, origin text not null, request text not null,"
    " text text not null, ids text, finish text not null, read integer, written integer, told text, day text not null)"
    " strict",
    "create table reservations (key text primary key, asker text not null) strict",
    "insert into about values (1)",  # VERSION
)
SUMS = "create table if not exists sums (key text primary key, sha256 text not null) strict"  # files of old lack it
TOGETHER = 500  # keys in one query
PATIENCE = 30.0  # seconds to wait for another process's transaction
Messages = tuple[Message, ...]
T = TypeVar("T")


class UnreadableAnswersError(UserError):
    """The file is there, and what it holds can't be read."""


def answers_folder(setting: str | None = None) -> Path | None:
    """Where shared answers are: the setting, else $LIMBECK_STORE, else limbeck/answers in $XDG_DATA_HOME
    (~/.local/share); None for `none`."""
    chosen = setting or os.environ.get("LIMBECK_STORE")
    if chosen == "none":
        return None
    data = os.environ.get("XDG_DATA_HOME")
    return user_path(chosen or Path(data or "~/.local/share") / "limbeck" / "answers")


class SharedAnswers:
    """The answers of one teacher in the file of a folder, which is made if it does not exist.

    Args:
        origin: what distinguishes teachers of one name in request keys: a server's address, or a hash of the weights.
        shown: the conversation that the teacher is shown, where it is another than the request's.
        tell: called once if answers can't be kept.

    Raises:
        UnreadableAnswersError: the file is damaged, of a newer version, or not ours to read.
    """

    def __init__(
        self,
        folder: Path,
        origin: str,
        shown: Callable[[Messages], Messages] | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.file = folder / FILE
        self.origin = origin
        self._shown = shown
        self._tell = tell
        self._writes = True
        self._asker = uuid.uuid4().hex
        self._lock: FileLock | None = None
        self._db: sqlite3.Connection | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = open_answers(self.file)
        except OSError as error:
            self._stop_writing(error)
        except sqlite3.OperationalError as error:
            if not _has_answers(self.file):
                self._stop_writing(error)
            else:
                self._db = _open_read_only(self.file)
                self._stop_writing(error)

    def close(self) -> None:
        self.release()
        if self._db is not None:
            self._db.close()

    def take(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Generated]]:
        """The requests that are answered already, with their answers.

        Raises:
            UnreadableAnswersError: the file is damaged.
        """
        by_key = {self._key(request): request for request in requests}
        sums = dict(self._rows("key, sha256", "sums", list(by_key))) if self._has_sums() else {}
        damaged = []
        for key, text, ids, finish, read, written, told in self._rows(
            "key, text, ids, finish, read, written, told", "answers", list(by_key)
        ):
            if sums.get(key) not in (None, content_hash([text, ids, finish, told])):
                damaged.append((key,))
                continue
            try:
                token_ids = None if ids is None else tuple(map(int, json.loads(ids)))
                evidence = None if told is None else json.loads(told)
            except (ValueError, TypeError, RecursionError):
                damaged.append((key,))
                continue
            usage = None if read is None or written is None else (read, written)
            yield by_key[key], Generated(token_ids, text, finish, usage=usage, told=evidence)
        if damaged:  # asked again
            self._write(lambda: self._execute_many("delete from answers where key = ?", damaged))

    def _has_sums(self) -> bool:
        with contextlib.suppress(sqlite3.DatabaseError):  # a damaged file is told of by what is read next
            query = "select count(*) from sqlite_master where name = 'sums'"
            return self._db is not None and self._db.execute(query).fetchone() == (1,)
        return False

    def reserve(self, requests: Sequence[Request]) -> list[Request]:
        """Those of the requests that this process is to ask for: neither answered by now nor being asked for by
        another."""
        by_key = {self._key(request): request for request in requests}
        keys = list(by_key)
        ours = keys

        def reserve() -> None:
            nonlocal ours
            askers = dict(self._rows("key, asker", "reservations", keys))
            gone = {asker for asker in set(askers.values()) if asker != self._asker and not self._is_asking(asker)}
            answered = {key for (key,) in self._rows("key", "answers", keys)}
            taken = {key for key, asker in askers.items() if asker != self._asker and asker not in gone}
            ours = [key for key in keys if key not in answered and key not in taken]
            self._execute_many("insert or replace into reservations values (?, ?)", [(k, self._asker) for k in ours])

        if self._hold_lock():
            self._write(reserve)
        return [by_key[key] for key in ours]

    def put(self, request: Request, answer: Generated) -> None:
        """Keep an answer, if it is a good one; the reservation for it ends."""
        crash_point("answers.before_put")
        self.put_all([(request, answer)])
        crash_point("answers.after_put")

    def put_all(self, answers: Sequence[tuple[Request, Generated]]) -> int:
        """Keep those of the answers that are good and new. Returns how many."""
        rows = [self._row(request, answer) for request, answer in answers if answer.finish in TAUGHT_FINISHES]
        keys = [row[0] for row in rows]
        new = 0

        def put() -> None:
            nonlocal new
            there = {key for (key,) in self._rows("key", "answers", keys)}
            new = len(set(keys) - there)
            self._execute_many("insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            sums = [(row[0], content_hash([row[4], row[5], row[6], row[9]])) for row in rows if row[0] not in there]
            self._execute_many("insert or replace into sums values (?, ?)", sums)
            self._execute_many("delete from reservations where key = ?", [(key,) for key in keys])

        return new if rows and self._write(put) else 0

    def add_from(self, store: Store, teacher: str) -> int:
        """Keep the good answers of this teacher that a run's store has and this one has not. Returns how many."""
        if not self._writes:
            return 0
        added = 0
        for part in _parts(store.answers_of(teacher)):
            added += self.put_all([pair for pair in part if pair[1].finish in TAUGHT_FINISHES])
        return added

    def release(self) -> None:
        """Give up what is still reserved, so that others may ask for it."""
        if self._lock is None:
            return
        self._write(lambda: self._execute_many("delete from reservations where asker = ?", [(self._asker,)]))
        self._lock.release()
        with contextlib.suppress(OSError):
            self._asker_file(self._asker).unlink(missing_ok=True)
        self._lock = None

    # Keys and rows

    def _key(self, request: Request) -> str:
        shown = None
        if self._shown is not None and request.raw is None:
            views = [request.messages] if request.against is None else [request.messages, request.against]
            shown = [list(self._shown(view)) for view in views]
        return content_hash([request.key, self.origin, shown])

    def _row(self, request: Request, answer: Generated) -> tuple[Any, ...]:
        read, written = (None, None) if answer.usage is None else answer.usage
        return (
            self._key(request),
            request.model,
            self.origin,
            canonical_json(request.asked),
            answer.text,
            None if answer.ids is None else canonical_json(list(answer.ids)),
            answer.finish,
            read,
            written,
            None if answer.told is None else canonical_json(answer.told),
            time.strftime("%Y-%m-%d"),
        )

    def _rows(self, columns: str, table: str, keys: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        if self._db is None:
            return
        for part in _parts(keys):
            marks = ", ".join("?" * len(part))
            query = f"select {columns} from {table} where key in ({marks})"  # noqa: S608 (our own words)
            try:
                rows = self._db.execute(query, part).fetchall()
            except sqlite3.DatabaseError as error:
                raise UnreadableAnswersError(f"the shared answers in {self.file} can't be read ({error})") from error
            yield from rows

    def _execute_many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        assert self._db is not None
        self._db.executemany(statement, rows)

    def _write(self, action: Callable[[], None]) -> bool:
        """Run one transaction. False if the file can't be written; from then on, no more is tried."""
        if not self._writes or self._db is None:
            return False
        try:
            self._db.execute("begin immediate")
            action()
            self._db.execute("commit")
        except (sqlite3.DatabaseError, UnreadableAnswersError) as error:
            self._roll_back()
            self._stop_writing(error)
            return False
        except BaseException:
            self._roll_back()
            raise
        return True

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.DatabaseError):
            if self._db is not None and self._db.in_transaction:
                self._db.execute("rollback")

    def _stop_writing(self, error: Exception) -> None:
        if self._writes:
            self._writes = False
            self._tell(
                f"this run's answers can't be kept for other runs ({self.file}: {error}); its folder has them. Make it"
                " writable, or name another place in machine.answers"
            )

    # Who is asking

    def _asker_file(self, asker: str) -> Path:
        return self.file.parent / "askers" / f"{asker}.lock"

    def _hold_lock(self) -> bool:
        """Hold the lock that shows that this process lives; False where reservations can't be made."""
        if self._lock is not None or not self._writes:
            return self._lock is not None
        lock = FileLock(self._asker_file(self._asker))
        try:
            self._asker_file(self._asker).parent.mkdir(exist_ok=True)
            lock.acquire(blocking=False)
        except (OSError, NotImplementedError, Timeout):
            return False  # both runs may pay, and both have their answers
        self._lock = lock
        return True

    def _is_asking(self, asker: str) -> bool:
        """Whether the process that holds this lock lives."""
        lock = FileLock(self._asker_file(asker))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            return False
        lock.release()
        with contextlib.suppress(OSError):
            self._asker_file(asker).unlink(missing_ok=True)
        return False


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    """The values, TOGETHER at a time."""
    rest = iter(values)
    while part := list(islice(rest, TOGETHER)):
        yield part


def open_answers(file: Path) -> sqlite3.Connection:
    """Open the file to read and write, and make what is missing in it.

    Raises:
        UnreadableAnswersError: no file of ours, a damaged one, or one of a newer version.
        sqlite3.OperationalError: it can't be written.
    """
    db = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)
    try:
        if not _version(db, file):
            db.execute("begin immediate")
            if not _version(db, file):  # nobody else has made it meanwhile
                for statement in SCHEMA:
                    db.execute(statement)
            db.execute("commit")
        db.execute("begin immediate")  # refused here rather than after an answer was paid for
        db.execute(SUMS)
        db.execute("commit")
    except BaseException:
        db.close()
        raise
    return db


def _version(db: sqlite3.Connection, file: Path) -> int:
    """The version of the file; 0 for an empty one."""
    try:
        if db.execute("select count(*) from sqlite_master").fetchone() == (0,):
            return 0
        (version,) = db.execute("select max(version) from about").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
            raise
        raise UnreadableAnswersError(f"{file} does not hold shared answers, or is damaged ({error})") from error
    if not isinstance(version, int) or version > VERSION:
        raise UnreadableAnswersError(f"{file} was written by a newer version of Limbeck ({version}, not {VERSION})")
    return version


def _has_answers(file: Path) -> bool:
    """Whether the file is there and not empty."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _open_read_only(file: Path) -> sqlite3.Connection:
    """Open a file that can't be written.

    Raises:
        UnreadableAnswersError: it can't be read either.
    """
    try:
        db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE, isolation_level=None)
        _version(db, file)
    except sqlite3.OperationalError as error:
        raise UnreadableAnswersError(f"the shared answers in {file} can't be read ({error})") from error
    return db
