"""Samples and evidence of a run in one SQLite file, by content; every answer is committed before it is acknowledged.

A request is identified by its key, so an answer in the store is never paid for again. After a crash at any moment, the
file has exactly the acknowledged answers (write-ahead log, synchronous=FULL). On a network file system it has a
rollback journal instead: a write-ahead log needs memory that all readers share, so it works on one machine only.

What is read is held against the hash that is its id, and against one of the whole row in `sums`, which stores of older
versions lack. Not covered: evidence and bills.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from limbeck.storage import tries
from limbeck.storage.files import on_network
from limbeck.types import (
    ANSWER_ENDS,
    TOLD,
    AnswerForm,
    Evidence,
    Finish,
    Generated,
    LogProb,
    Request,
    Sample,
    Sampling,
    UserError,
    canonical_json,
    content_hash,
)

SCHEMA = """
create table if not exists about (version integer not null);
create table if not exists samples (id text primary key, body text not null) strict;
create table if not exists answers (
    key text primary key, request text not null, finish text not null, sample_id text not null references samples (id)
) strict;
create table if not exists bills (
    key text primary key, writer text not null, read integer not null, written integer not null
) strict;
create table if not exists reused (
    key text primary key, writer text not null, read integer not null, written integer not null
) strict;
create table if not exists sums (id text primary key, sha256 text not null) strict;
create table if not exists names (writer text primary key, name text not null) strict;
create table if not exists bodies (key text primary key, raw text not null) strict;
create table if not exists scores (judge text not null, name text not null, nats real not null, tokens integer not null,
    primary key (judge, name)
) strict;
create table if not exists evidence (
    sample_id text not null references samples (id), kind text not null, judge text not null,
    value text not null, tensor_ref text, primary key (sample_id, kind, judge)
) strict;
"""
VERSION = 1


class Store:
    """The store in a file, created if it does not exist and is not `read_only`. Use it as a context manager."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        if read_only:
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute(f"pragma journal_mode={'delete' if on_network(path) else 'wal'}")
            self._db.execute("pragma synchronous=full")
            self._db.executescript(SCHEMA + tries.SCHEMA)
            version = self._db.execute("select version from about").fetchone()
            if version is None:
                self._db.execute("insert into about values (?)", (VERSION,))
        except sqlite3.OperationalError:
            raise  # no space or no permission: nothing is wrong with the file
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} is not a store of Limbeck ({error}); move it away or choose another --out"
            ) from error
        if version is not None and version[0] != VERSION:
            raise UserError(f"{path} was written by another version of the store ({version[0]}); choose another --out")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def record(
        self,
        request: Request,
        sample: Sample,
        finish: Finish,
        raw: str | None = None,
        usage: tuple[int, int] | None = None,
        evidence: Sequence[Evidence] = (),
        reused: bool = False,
    ) -> None:
        """Store an answer, in the place of an earlier one to the same request. When this returns, it is on disk.

        Args:
            raw: the body of the server's reply.
            usage: tokens billed for it, (read, written).
            evidence: what is known of the sample from the same reply.
            reused: an earlier run paid for it.
        """
        body = {
            "messages": list(sample.messages),
            "writer": sample.writer,
            "response_ids": None if sample.response_ids is None else list(sample.response_ids),
            "parents": list(sample.parents),
            "meta": sample.meta,
        }
        question = request.asked | {"meta": request.meta}
        with self._all_or_none():
            text, asked = canonical_json(body), canonical_json(question)
            if self._db.execute("insert or ignore into samples values (?, ?)", (sample.id, text)).rowcount:
                self._db.execute("insert or replace into sums values (?, ?)", (sample.id, content_hash(text)))
            self._db.execute(
                "insert or replace into answers values (?, ?, ?, ?)", (request.key, asked, finish, sample.id)
            )
            row_sum = content_hash([asked, finish, sample.id])
            self._db.execute("insert or replace into sums values (?, ?)", (request.key, row_sum))
            self._db.execute("delete from bodies where key = ?", (request.key,))
            if raw is not None:
                self._db.execute("insert into bodies values (?, ?)", (request.key, raw))
            if reused:
                self._db.execute(
                    "insert or replace into reused values (?, ?, ?, ?)",
                    (request.key, sample.writer, *(usage or (0, 0))),
                )
            elif usage is not None:
                self._db.execute(
                    "insert into bills values (?, ?, ?, ?) on conflict (key) do update"
                    " set read = read + excluded.read, written = written + excluded.written",
                    (request.key, sample.writer, *usage),
                )
                self._db.execute(tries.ANSWERED, (request.key,))
            self._db.executemany("insert or replace into evidence values (?, ?, ?, ?, ?)", _evidence_rows(evidence))

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
            self._db.execute("commit")
        except BaseException:
            if self._db.in_transaction:  # SQLite has rolled back by itself when the disk was full
                self._db.execute("rollback")
            raise

    def answered(self, request: Request) -> Sample | None:
        """The stored answer to this request, None if there is none.

        Raises:
            UserError: it is not what was stored.
        """
        row = self._db.execute(
            "select request, finish, sample_id, body, a.sha256, b.sha256 from answers"
            " left join samples on samples.id = sample_id left join sums a on a.id = key"
            " left join sums b on b.id = sample_id where key = ?",
            (request.key,),
        ).fetchone()
        if row is None:
            return None
        asked, finish, sample_id, body, row_sum, body_sum = row
        if row_sum in (None, content_hash([asked, finish, sample_id])):
            sample = _sample_of(sample_id, body, finish, body_sum)
            if sample is not None:
                return sample
        raise UserError(
            f"{self.path}: the answer to request {request.key[:16]} is not what was stored, so the file was damaged:"
            f" take a copy of it from before, or have this asked again: {_forget(self.path, request.key)}"
        )

    def write_evidence(self, *evidence: Evidence) -> None:
        """Store evidence, all of it or none."""
        with self._all_or_none():
            self._db.executemany("insert or replace into evidence values (?, ?, ?, ?, ?)", _evidence_rows(evidence))

    def evidence_of(self, sample_id: str, kind: str, judge: str) -> Any:
        """The value of one piece of evidence, None if there is none."""
        row = self._db.execute(
            "select value from evidence where sample_id = ? and kind = ? and judge = ?", (sample_id, kind, judge)
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def evidence(self, kind: str) -> Iterator[Evidence]:
        """All evidence of this kind, by sample and judge."""
        rows = self._db.execute(
            "select sample_id, kind, judge, value, tensor_ref from evidence where kind = ? order by sample_id, judge",
            (kind,),
        )
        for sample_id, kind_, judge, value, tensor_ref in rows:
            yield Evidence(sample_id, kind_, judge, json.loads(value), tensor_ref=tensor_ref)

    def write_scores(self, judge: str, scores: Mapping[str, LogProb]) -> None:
        """Store how likely a model finds answers, by the key of the `ScoreRequest`; all of them or none."""
        rows = [(judge, name, score.nats, score.tokens) for name, score in scores.items()]
        with self._all_or_none():
            self._db.executemany("insert or replace into scores values (?, ?, ?, ?)", rows)

    def scores(self, judge: str) -> dict[str, LogProb]:
        """How likely this model finds answers, by the key of the `ScoreRequest`."""
        rows = self._db.execute("select name, nats, tokens from scores where judge = ?", (judge,))
        return {name: LogProb(nats, tokens) for name, nats, tokens in rows}

    def name_of(self, writer: str, name: str) -> str:
        """The name under which a server's model answered first, which is this one if it did not yet."""
        self._db.execute("insert or ignore into names values (?, ?)", (writer, name))
        return str(self._db.execute("select name from names where writer = ?", (writer,)).fetchone()[0])

    def body(self, key: str) -> str | None:
        """The stored body of the server's reply, None if there is none."""
        row = self._db.execute("select raw from bodies where key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def bill(self, writer: str) -> tuple[int, int, int]:
        """The cost of this writer's answers: (how many, tokens read, tokens written), as the server billed them."""
        return self._sums("bills", writer)

    def reused(self, writer: str) -> tuple[int, int, int]:
        """What this writer's answers that were taken from earlier runs cost those: as in `bill`."""
        return self._sums("reused", writer)

    def unmetered(self, writer: str) -> int:
        """How many of the answers in `bill` came without a word on their tokens, so that their cost is unknown."""
        query = "select count(*) from bills where writer = ? and read = 0 and written = 0"
        return int(self._db.execute(query, (writer,)).fetchone()[0])

    def uncounted(self, writer: str) -> Iterator[tuple[Request, str, Finish, int]]:
        """(request, answer, how it ended, how often it was asked) of the answers that are `unmetered`."""
        rows = self._db.execute(
            "select request, body, finish, (select count(*) from tries where tries.key = bills.key"
            " and tries.state = 'answered') from bills join answers on answers.key = bills.key"
            " join samples on samples.id = sample_id where writer = ? and read = 0 and written = 0",
            (writer,),
        )
        for question, body, finish, times in rows:
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # damaged
                yield _request(json.loads(question)), json.loads(body)["messages"][-1]["content"], finish, times or 1

    def usage_of(self, keys: Sequence[str]) -> tuple[int, int, int]:
        """(answers, tokens read, tokens written) of the answers to these requests whose tokens the server counted, for
        this run or for an earlier one."""
        query = "select read, written from {} where key = ? and read + written > 0"
        asked = " union all ".join(query.format(table) for table in ("bills", "reused"))
        rows = [self._db.execute(asked, (key, key)).fetchone() for key in dict.fromkeys(keys)]
        found = [row for row in rows if row is not None]
        return len(found), sum(read for read, _ in found), sum(written for _, written in found)

    def _sums(self, table: str, writer: str) -> tuple[int, int, int]:
        sums = "count(*), coalesce(sum(read), 0), coalesce(sum(written), 0)"
        query = f"select {sums} from {table} where writer = ?"  # noqa: S608 (our own words)
        answers, read, written = self._db.execute(query, (writer,)).fetchone()
        return int(answers), int(read), int(written)

    def answers_of(self, writer: str) -> Iterator[tuple[Request, Generated]]:
        """All answers of this writer with their requests, without their bodies; damaged ones are left out."""
        rows = self._db.execute(
            "select answers.key, request, finish, samples.id, body, sha256, read, written, value from answers"
            " join samples on samples.id = answers.sample_id left join bills on bills.key = answers.key"
            " left join sums on sums.id = samples.id"
            " left join evidence on evidence.sample_id = samples.id and kind = ? and judge = ?"
            " where json_valid(request) and json_extract(request, '$.model') = ? order by answers.key",
            (TOLD, writer, writer),
        )
        for key, question, finish, sample_id, body, body_sum, read, written, told in rows:
            try:
                request = _request(json.loads(question))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            sample = _sample_of(sample_id, body, finish, body_sum)
            if request.key == key and sample is not None:
                text, ids = sample.messages[-1]["content"], sample.response_ids
                usage = None if read is None else (read, written)
                evidence = None if told is None else json.loads(told)
                yield request, Generated(ids, text, finish, usage=usage, told=evidence)

    @staticmethod
    def count(path: Path) -> dict[str, int]:
        """The number of answers by how they ended. Opens the file read-only, so that another process may be writing it.

        Raises:
            sqlite3.Error: the file is no store, or is just being made.
        """
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            return dict(db.execute("select finish, count(*) from answers group by finish order by finish"))

    @staticmethod
    def questions(path: Path) -> dict[str, tuple[dict[str, Any], str]]:
        """(what was asked, how its answer ended) by request key. Opens the file read-only.

        Raises:
            sqlite3.Error: the file is no store.
            ValueError: a question is damaged.
        """
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute("select key, request, finish from answers order by key").fetchall()
        return {
            key: ({name: value for name, value in json.loads(asked).items() if name != "meta"}, finish)
            for key, asked, finish in rows
        }

    @staticmethod
    def answer_lengths(path: Path) -> tuple[int, float]:
        """(how many answers are taught, their mean length in tokens); of text without tokens, four letters are one.

        Raises:
            sqlite3.Error: the file is no store.
        """
        query = (
            "select count(*), coalesce(avg(case json_type(body, '$.response_ids') when 'array'"
            " then json_array_length(body, '$.response_ids')"
            " else length(json_extract(body, '$.messages[#-1].content')) / 4.0 + 1 end), 0)"
            " from answers join samples on id = sample_id where finish in ('ok', 'length')"
        )
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            count, mean = db.execute(query).fetchone()
        return int(count), float(mean)


def _forget(path: Path, key: str) -> str:
    """The command that forgets a stored answer."""
    where = f"where key = '{key}'"
    sample = "delete from samples where id = (select sample_id from answers"
    return f"""sqlite3 {path} "{sample} {where}); delete from answers {where}\""""  # noqa: S608 (shown, not run)


def _evidence_rows(evidence: Sequence[Evidence]) -> list[tuple[str, str, str, str, str | None]]:
    return [(e.sample_id, e.kind, e.judge, canonical_json(e.value), e.tensor_ref) for e in evidence]


def _request(question: dict[str, Any]) -> Request:
    """A request from what `record` keeps of it."""
    sampling = question["sampling"]
    sampling = Sampling(**sampling | {"stop": tuple(sampling.get("stop", ()))})
    against, form, shown = (question.get(name) for name in ("against", "form", "shown"))
    return Request(
        question["model"],
        tuple(question["messages"]),
        sampling,
        question["seed"],
        meta=question.get("meta", {}),
        raw=question.get("raw"),
        against=None if against is None else tuple(against),
        contrast=question.get("contrast", 0.0),
        form=None if form is None else _form(form),
        shown=None if shown is None else tuple(shown),
    )


def _form(kept: Mapping[str, Any]) -> AnswerForm:
    labels = kept.get("labels")
    return AnswerForm(kept.get("schema"), None if labels is None else tuple(labels), kept.get("pattern"))


def _sample_of(sample_id: str, body: str | None, finish: Finish, body_sum: str | None) -> Sample | None:
    """A stored sample with how its answer ended; None for one that is not what was stored under this id."""
    try:
        if body is None or finish not in ANSWER_ENDS or body_sum not in (None, content_hash(body)):
            return None
        data = json.loads(body)
        ids = data["response_ids"]
        sample = Sample(
            messages=tuple(data["messages"]),
            writer=data["writer"],
            response_ids=None if ids is None else tuple(ids),
            parents=tuple(data["parents"]),
            meta=data["meta"] | {"finish": finish},
        )
        return sample if sample.id == sample_id else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
