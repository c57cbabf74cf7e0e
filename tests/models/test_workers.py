"""Requests that several workers answer: dealt out, each answered once, and again where a worker died."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest

from limbeck.models.placement import FULL
from limbeck.models.workers import DEATHS, FEWEST_AT_ONCE, LostWorkerError, ModelOnWorker, WorkerTeacher
from limbeck.types import Generated, Request, Sampling, UserError


def request_of(content, seed=0):
    return Request("model", ({"role": "user", "content": content},), Sampling(), seed=seed)


def requests(count):
    return [request_of(str(n), n) for n in range(count)]


def words(request):
    return f"answer {request.messages[0]['content']}"


@dataclass(eq=False)
class ScriptedCall:
    """Answers its requests from the last to the first; where `dies_at` is next, the worker dies."""

    pool: ScriptedPool
    worker: int
    left: list
    dies_at: str | None

    def next(self):
        if not self.left:
            return None
        number, request = self.left.pop()
        if self.worker in self.pool.dead:
            raise LostWorkerError("it was dead")
        if request.messages[0]["content"] == self.dies_at:
            self.pool.dead.add(self.worker)
            raise LostWorkerError("out of memory")
        return number, Generated(None, words(request), "ok")


@dataclass
class ScriptedPool:
    """Workers in this process. `kills` has the contents at which a worker dies, and how often."""

    kills: Counter = field(default_factory=Counter)
    dead: set = field(default_factory=set)
    running: set = field(default_factory=set)
    asked: list = field(default_factory=list)
    never: set = field(default_factory=set)  # workers for which the cluster has no room
    settled: int = 0
    numbers: itertools.count = field(default_factory=itertools.count)

    def start(self):
        worker = next(self.numbers)
        self.running.add(worker)
        return worker

    def ask(self, worker, given):
        assert worker in self.running and worker not in self.dead
        if given:
            self.asked.append((worker, len(given)))
        if not given and self.kills["load"] > 0:
            self.kills["load"] -= 1
            return ScriptedCall(self, worker, [(0, request_of("load"))], "load")
        fatal = next((r.messages[0]["content"] for r in given if self.kills[r.messages[0]["content"]] > 0), None)
        self.kills[fatal] -= 1
        return ScriptedCall(self, worker, list(enumerate(given)), fatal)

    def ready(self, calls, seconds):
        return [call for call in calls if call.worker not in self.never][:1]

    def stop(self, worker):
        self.running.remove(worker)

    def settle(self):
        self.settled += 1


def test_every_request_is_answered_once_and_workers_share_them():
    pool = ScriptedPool()
    teacher = WorkerTeacher(pool, "model", 3)
    asked = requests(2000)
    answered = list(teacher.answers(asked))
    assert Counter(request.key for request, _ in answered) == Counter(request.key for request in asked)
    assert all(answer.text == words(request) for request, answer in answered)
    assert {worker for worker, _ in pool.asked} == {0, 1, 2}
    sizes = [size for _, size in pool.asked]
    assert sizes[0] > sizes[-1] <= FEWEST_AT_ONCE  # so that all finish together
    assert len(list(teacher.answers(requests(10)))) == 10 and len(pool.running) == 3  # the same workers
    teacher.release()
    assert not pool.running and pool.settled == 1


def test_no_more_workers_are_started_than_there_is_work_for():
    pool = ScriptedPool()
    assert len(list(WorkerTeacher(pool, "model", 50).answers(requests(9)))) == 9
    assert len(pool.running) == 2
    assert list(WorkerTeacher(pool, "model", 50).answers([])) == [] and len(pool.running) == 2


def test_what_a_dead_worker_had_is_answered_by_others_and_is_told():
    pool, told = ScriptedPool(Counter({"100": 1, "1500": 1})), []
    asked = requests(2000)
    answered = list(WorkerTeacher(pool, "model", 3, told.append).answers(asked))
    assert Counter(request.key for request, _ in answered) == Counter(request.key for request in asked)
    assert len(told) == 2 and all("out of memory" in words for words in told)
    assert len(pool.running) == 3 and not pool.running & pool.dead


def test_a_request_that_kills_its_workers_ends_the_run():
    pool = ScriptedPool(Counter({"7": 99}))
    with pytest.raises(UserError, match=rf"{DEATHS} workers died over the same requests.*out of memory"):
        list(WorkerTeacher(pool, "model", 2).answers(requests(40)))
    assert not pool.running & pool.dead


def test_workers_that_never_start_leave_the_work_to_the_others():
    pool = ScriptedPool(never={1, 2})
    assert len(list(WorkerTeacher(pool, "model", 3).answers(requests(100)))) == 100
    assert {worker for worker, _ in pool.asked} == {0} and pool.running == {0}


def test_workers_that_die_while_they_load_are_tried_again_and_not_for_ever():
    pool, told = ScriptedPool(Counter({"load": DEATHS - 1})), []
    assert len(list(WorkerTeacher(pool, "model", 2, told.append).answers(requests(40)))) == 40 and len(told) == 2
    pool = ScriptedPool(Counter({"load": 99}))
    with pytest.raises(UserError, match=f"{DEATHS} workers died before they answered"):
        list(WorkerTeacher(pool, "model", 2).answers(requests(40)))
    assert not pool.running


def test_a_stop_drops_what_was_begun_and_stops_its_workers():
    pool = ScriptedPool()
    stops = itertools.chain([False] * 8, itertools.repeat(True))
    some = list(WorkerTeacher(pool, "model", 2).answers(requests(100), lambda: next(stops)))
    assert 0 < len(some) < 100 and not pool.running


def test_a_worker_with_another_model_is_refused(tiny_folder, tiny):
    model = ModelOnWorker(str(tiny_folder), FULL, None, None, tiny.identity)
    assert model.load(gpus=0).identity == tiny.identity
    with pytest.raises(UserError, match="put the same files at that place on all machines"):
        ModelOnWorker(str(tiny_folder), FULL, None, None, "another").load(gpus=0)
