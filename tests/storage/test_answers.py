"""Answers that runs share: paid once, for good ones only, by one of two runs at once, and whatever the disk does."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from limbeck.elicit.engine import elicit
from limbeck.elicit.sharing import Sharing
from limbeck.storage.answers import FILE, SharedAnswers, UnreadableAnswersError, answers_folder
from limbeck.storage.store import Store
from limbeck.types import TOLD, AnswerForm, Evidence, Generated, Request, Sample, Sampling, UserError

ROOT = Path(__file__).parent.parent.parent


def request(text="q", seed=0, **changes):
    return Request("served:toy-1", ({"role": "user", "content": text},), Sampling(0.5, 0.9, 10), seed, **changes)


ASKED = [request(str(number), meta={"prompt_id": f"p{number}"}) for number in range(6)]


class Counting:
    """A teacher that counts its bill."""

    identity = "served:toy-1"

    def __init__(self, end=lambda text: "ok"):
        self.bill, self.end = Counter(), end

    def answers(self, requests, stop=lambda: False):
        for asked in requests:
            if stop():
                return
            text = asked.messages[-1]["content"]
            self.bill[asked.key] += 1
            yield asked, Generated(None, f"to {text}", self.end(text), usage=(5, 3), told=[[1, 2.5]])


def run(folder, shared, teacher, asked=ASKED, **options):
    """One run's elicitation; returns its samples and what it told of other runs' answers."""
    told = []
    with Store(folder / "store.sqlite") as store:
        sharing = Sharing(lambda: shared, told.append, sleep=lambda seconds: None)
        samples = elicit(asked, store, lambda: teacher, sharing=sharing, **options)
    return samples, told


@pytest.fixture
def shared(tmp_path):
    opened = []

    def opening(origin="http://a/v1", folder=tmp_path / "answers", **options):
        opened.append(SharedAnswers(folder, origin, **options))
        return opened[-1]

    yield opening
    for each in opened:
        each.close()


def test_a_second_run_takes_what_the_first_paid_for(tmp_path, shared):
    first, second = Counting(), Counting()
    whole, told = run(tmp_path / "a", shared(), first)
    assert told == [] and sum(first.bill.values()) == 6
    more = [*ASKED, request("new")]
    again, told = run(tmp_path / "b", shared(), second, more)
    assert again[:6] == whole and again[0].meta == {"prompt_id": "p0", "finish": "ok"}
    assert list(second.bill) == [more[-1].key], "only the new question is paid for"
    assert [vars(each) for each in told] == [{"answers": 6, "needed": 7, "read": 30, "written": 18}]
    with Store(tmp_path / "b" / "store.sqlite") as store:
        assert store.bill("served:toy-1") == (1, 5, 3) and store.reused("served:toy-1") == (6, 30, 18)
        assert store.evidence_of(again[0].id, TOLD, "served:toy-1") == [[1, 2.5]]
    shutil.rmtree(tmp_path / "answers")  # the folder stands alone
    assert run(tmp_path / "b", None, None, more)[0] == again


def test_a_finished_run_does_not_look_for_the_shared_answers(tmp_path, shared):
    run(tmp_path / "a", shared(), Counting())
    with Store(tmp_path / "a" / "store.sqlite") as store:
        elicit(ASKED, store, lambda: pytest.fail("asked"), sharing=Sharing(lambda: pytest.fail("opened")))


@pytest.mark.parametrize("end", ["error", "malformed", "refused", "filtered", "empty"])
def test_only_good_answers_are_shared(tmp_path, shared, end):
    poor = Counting(lambda text: end if text == "3" else "length" if text == "2" else "ok")
    try:
        run(tmp_path / "a", shared(), poor, tolerate=0.5)
    finally:
        second = Counting()
        assert len(run(tmp_path / "b", shared(), second)[0]) == 6
        assert list(second.bill) == [ASKED[3].key]


def test_another_teacher_of_the_same_name_is_asked_itself(tmp_path, shared):
    run(tmp_path / "a", shared(), Counting())
    for number, options in enumerate([{"origin": "http://b/v1"}, {"shown": lambda messages: (*messages, *messages)}]):
        other = Counting()
        run(tmp_path / f"b{number}", shared(**options), other)
        assert len(other.bill) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"raw": "x"},
        {"against": ({"role": "user", "content": "y"},), "contrast": 0.5},
        {"contrast": 0.0, "seed": 4},
        {"form": AnswerForm(labels=("a", "b"))},
        {"form": AnswerForm(schema='{"type": "object"}')},
        {"form": AnswerForm(pattern="a+")},
        {"shown": ({"role": "user", "content": "a hint"},)},
    ],
)
def test_every_kind_of_request_is_found_again_from_a_runs_own_store(tmp_path, shared, changes):
    """A run of an older version, or one that was killed between its own store and the shared one, is added as it is."""
    asked = replace(request("old", meta={"prompt_id": "p"}), sampling=Sampling(0.5, 0.9, 9, ("\n",), 0.5), **changes)
    sample = Sample((*asked.messages, {"role": "assistant", "content": "yes"}), asked.model, (1, 2))
    with Store(tmp_path / "old.sqlite") as store:
        store.record(asked, sample, "ok", usage=(7, 2), evidence=[Evidence(sample.id, TOLD, asked.model, [3])])
        store.record(request("bad"), sample, "refused")
        store.record(replace(request("other's"), model="untouched@1"), replace(sample, writer="untouched@1"), "ok")
        assert shared().add_from(store, asked.model) == 1 and shared().add_from(store, asked.model) == 0
    ((found, answer),) = shared().take([asked, request("bad"), replace(request("other's"), model="untouched@1")])
    assert found is asked and answer == Generated((1, 2), "yes", "ok", usage=(7, 2), told=[3])


@pytest.mark.promise("R7")
def test_two_runs_at_once_pay_for_each_answer_once(tmp_path):
    """Two threads with stores of their own, each answer slow: what one asks for, the other waits for."""
    barrier, waited, lock = threading.Barrier(2), [], threading.Lock()
    bill = Counter()

    class Slow(Counting):
        def answers(self, requests, stop=lambda: False):
            for asked, answer in super().answers(requests, stop):
                with lock:
                    bill[asked.key] += 1
                threading.Event().wait(0.01)
                yield asked, answer

    def work(name, asked):
        answers = SharedAnswers(tmp_path / "answers", "http://a/v1")
        sharing = Sharing(lambda: answers, wait=waited.append, sleep=lambda seconds: threading.Event().wait(0.02))
        with Store(tmp_path / name / "store.sqlite") as store:
            barrier.wait()
            assert len(elicit(asked, store, Slow, sharing=sharing)) == 6
        answers.close()

    threads = [
        threading.Thread(target=work, args=each) for each in (("a", ASKED), ("b", [*reversed(ASKED[1:]), request("z")]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(bill.values()) == {1} and len(bill) == 7 and waited
    assert not list((tmp_path / "answers" / "askers").iterdir())


def test_what_a_killed_run_was_asking_for_is_asked_for_by_the_next(tmp_path, shared):
    killed, alive = shared(), shared()
    assert killed.reserve(ASKED[:3]) == ASKED[:3] and alive.reserve(ASKED) == ASKED[3:]
    killed._lock.release()  # as the kernel does it
    assert alive.reserve(ASKED) == ASKED


def test_what_failed_for_one_run_is_asked_for_by_the_one_that_waits(tmp_path, shared):
    first, second = shared(), shared()
    first.reserve(ASKED)
    pauses = []

    def fail(seconds):
        pauses.append(seconds)
        first.release()  # its server was gone

    teacher = Counting()
    with Store(tmp_path / "b.sqlite") as store:
        assert len(elicit(ASKED, store, lambda: teacher, sharing=Sharing(lambda: second, sleep=fail))) == 6
    assert len(pauses) == 1 and len(teacher.bill) == 6


def test_a_run_that_waits_can_be_stopped(tmp_path, shared):
    first, second, pauses = shared(), shared(), []
    first.reserve(ASKED)
    with Store(tmp_path / "b.sqlite") as store:
        sharing = Sharing(lambda: second, sleep=pauses.append)
        assert elicit(ASKED, store, Counting, stop=lambda: len(pauses) > 2, sharing=sharing) == []


CHILD = """
import sys
from pathlib import Path
from limbeck.elicit.engine import elicit
from limbeck.elicit.sharing import Sharing
from limbeck.storage.answers import SharedAnswers
from limbeck.storage.store import Store
from tests.storage.test_answers import ASKED, Counting

class Told(Counting):
    def answers(self, requests, stop=lambda: False):
        for asked, answer in super().answers(requests, stop):
            with open(sys.argv[2], "a") as bill:
                bill.write(asked.key + "\\n")
            yield asked, answer

shared = SharedAnswers(Path(sys.argv[3]), "http://a/v1")
with Store(Path(sys.argv[1])) as store:
    elicit(ASKED, store, Told, sharing=Sharing(lambda: (shared.add_from(store, "served:toy-1"), shared)[1]))
"""


@pytest.mark.parametrize("place", ["elicit.before_record:3", "answers.before_put:3", "answers.after_put:3"])
@pytest.mark.promise("R7")
def test_killed_between_its_stores_a_run_loses_at_most_what_is_under_way(tmp_path, place):
    """The killed run itself pays again for nothing that it stored; another run for one answer at most."""
    bill = tmp_path / "bill"
    paid = 2 if place.startswith("elicit") else 3

    def child(store, crash_at=""):
        arguments = [sys.executable, "-c", CHILD, str(tmp_path / store), str(bill), str(tmp_path / "answers")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LIMBECK_CRASH_AT": crash_at}
        return subprocess.run(arguments, env=environment, check=False, capture_output=True, text=True)

    assert child("a", place).returncode == 137
    assert len(bill.read_text().split()) == 3
    done = child("a")
    assert done.returncode == 0, done.stderr
    assert len(bill.read_text().split()) == 3 + 6 - paid
    assert child("b").returncode == 0
    assert len(bill.read_text().split()) == 3 + 6 - paid, "all of them are shared by now"


def test_a_full_disk_costs_the_run_nothing(tmp_path, shared):
    told = []
    small = shared(tell=told.append)
    small._db.execute("pragma max_page_count = 40")
    many = [request(f"{number} " + "x" * 2000) for number in range(40)]
    teacher = Counting()
    assert len(run(tmp_path / "a", small, teacher, many)[0]) == 40 and len(teacher.bill) == 40
    (line,) = told
    assert "full" in line and "can't be kept for other runs" in line and "machine.answers" in line
    kept = len(list(shared().take(many)))
    assert 0 < kept < 40
    with closing(sqlite3.connect(tmp_path / "answers" / FILE)) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="takes another user's place")
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_store_that_is_not_ours_to_write(mode):
    """It is read where that is allowed; what can't be read is not silently paid for again."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        whole = SharedAnswers(folder / "answers", "http://a/v1")
        whole.put_all([(asked, Generated(None, "x", "ok")) for asked in ASKED[:4]])
        whole.close()
        (folder / "answers").chmod(0o755)
        (folder / "answers" / FILE).chmod(mode)
        told = []
        os.seteuid(65534)
        try:
            if mode == 0:
                with pytest.raises(UnreadableAnswersError, match="can't be read"):
                    SharedAnswers(folder / "answers", "http://a/v1", tell=told.append)
                return
            answers = SharedAnswers(folder / "answers", "http://a/v1", tell=told.append)
            assert len(list(answers.take(ASKED))) == 4 and answers.reserve(ASKED[4:]) == ASKED[4:]
            answers.put(ASKED[4], Generated(None, "x", "ok"))
            answers.close()
            nowhere = SharedAnswers(folder / "new" / "answers", "http://a/v1", tell=told.append)
            assert list(nowhere.take(ASKED)) == [] and nowhere.reserve(ASKED) == ASKED
            nowhere.close()
        finally:
            os.seteuid(0)
        assert len(told) == 2 and all("can't be kept for other runs" in line for line in told)
    finally:
        shutil.rmtree(folder)


def test_a_file_of_a_newer_version_and_a_damaged_one_are_left_alone(tmp_path, shared):
    shared().put_all([(asked, Generated(None, "x" * 4000, "ok")) for asked in ASKED])
    file = tmp_path / "answers" / FILE
    with closing(sqlite3.connect(file)) as db:
        db.execute("update about set version = 2")
        db.commit()
    with pytest.raises(UnreadableAnswersError, match="newer version of Limbeck"):
        shared()
    for content in (b"something else entirely" * 300, file.read_bytes()[:100] + b"\xff" * 5000):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"answers\.sqlite"):
            list(shared().take(ASKED))
        assert file.read_bytes() == content


def test_an_empty_file_is_a_new_store(tmp_path, shared):
    """What a kill while the file was being made leaves."""
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / FILE).touch()
    shared().put(ASKED[0], Generated(None, "x", "ok"))
    assert len(list(shared().take(ASKED))) == 1
    assert (tmp_path / "answers" / FILE).stat().st_size


def test_where_the_answers_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("LIMBECK_STORE")
    assert answers_folder() == tmp_path / ".local" / "share" / "limbeck" / "answers"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert answers_folder() == Path("/data/limbeck/answers")
    monkeypatch.setenv("LIMBECK_STORE", "~/here")
    assert answers_folder() == tmp_path / "here" and answers_folder("there") == Path("there")
    assert answers_folder("none") is None
    monkeypatch.setenv("LIMBECK_STORE", "none")
    assert answers_folder() is None


def test_the_folder_is_the_users_alone(tmp_path, shared):
    shared()
    assert (tmp_path / "answers").stat().st_mode & 0o077 == 0


def test_a_damaged_row_is_asked_for_again(tmp_path, shared):
    shared().put_all([(asked, Generated((1, 2), "x", "ok")) for asked in ASKED[:2]])
    with closing(sqlite3.connect(tmp_path / "answers" / FILE)) as db:
        db.execute("update answers set ids = '[1,' where request like ?", ('%"content":"0"%',))
        db.commit()
    assert [asked for asked, _ in shared().take(ASKED)] == [ASKED[1]]


@pytest.mark.parametrize("column", ["text", "finish", "told", "ids"])
def test_an_answer_that_is_not_what_was_stored_is_asked_for_again(tmp_path, shared, column):
    first, second, third = Counting(), Counting(), Counting()
    run(tmp_path / "a", shared(), first)
    values = {"text": "replace(text, 'to 2', 'no 2')", "finish": "'length'", "told": "replace(told, '2.5', '3.5')"}
    with closing(sqlite3.connect(tmp_path / "answers" / FILE)) as db:
        value = values.get(column, "'[1,'")
        db.execute(f"update answers set {column} = {value} where text = 'to 2'")
        db.commit()
    samples, _ = run(tmp_path / "b", shared(), second)
    assert [sample.messages[-1]["content"] for sample in samples] == [f"to {number}" for number in range(6)]
    assert sum(second.bill.values()) == 1
    run(tmp_path / "c", shared(), third)
    assert third.bill == Counter()


def test_a_file_of_an_older_version_gets_its_hashes_from_now_on(tmp_path, shared):
    first, second = Counting(), Counting()
    run(tmp_path / "a", shared(), first, ASKED[:3])
    with closing(sqlite3.connect(tmp_path / "answers" / FILE)) as db:
        db.execute("drop table sums")
        db.commit()
    run(tmp_path / "b", shared(), second)
    assert sum(second.bill.values()) == 3
    with closing(sqlite3.connect(tmp_path / "answers" / FILE)) as db:
        assert db.execute("select count(*) from sums").fetchone() == (3,)
