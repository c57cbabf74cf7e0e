"""Workers on a real Ray cluster: the answers of one process, with one of the workers killed, and through the command."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest

from limbeck.config.machine import Workers
from limbeck.models.placement import FULL
from limbeck.models.ray_pool import RayPool
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.workers import ModelOnWorker, WorkerTeacher
from limbeck.storage.store import Store
from limbeck.types import Request, Sampling, UserError
from tests.runs.test_pipeline import command, recipe_file  # noqa: F401 (a fixture)

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster():
    yield
    ray.shutdown()


def workers_of() -> list[psutil.Process]:
    found = []
    for child in psutil.process_iter(["cmdline"]):
        if any(word.startswith("ray::ModelWorker") for word in child.info["cmdline"] or ()):
            found.append(child)
    return found


def pool_of(folder, identity, count=3):
    model = ModelOnWorker(str(folder), FULL, None, None, identity)
    return RayPool(model, Workers(count=count))


def test_2000_samples_with_a_worker_killed_are_those_of_one_process(tiny_folder, tiny, cluster):
    asked = [
        Request(tiny.identity, ({"role": "user", "content": f"count {n}"},), Sampling(max_tokens=8), seed=n)
        for n in range(2000)
    ]
    told = []
    teacher = WorkerTeacher(pool_of(tiny_folder, tiny.identity), tiny.identity, 3, told.append)
    found = {}
    for request, answer in teacher.answers(asked):
        assert request.key not in found
        found[request.key] = answer
        if len(found) == 300:
            workers_of()[0].send_signal(signal.SIGKILL)
    assert len([words for words in told if "a worker died" in words]) == 1
    alone = {request.key: answer for request, answer in InProcessTeacher(tiny).answers(asked)}
    assert found == alone


def test_what_a_worker_refuses_is_said_in_its_words(tiny_folder, tiny, cluster):
    teacher = WorkerTeacher(pool_of(tiny_folder, "another"), "another", 2)
    one = Request("another", ({"role": "user", "content": "why"},), Sampling(max_tokens=4), seed=0)
    with pytest.raises(UserError, match="put the same files at that place on all machines"):
        list(teacher.answers([one]))
    long = Request(tiny.identity, one.messages, Sampling(max_tokens=10_000), seed=0)
    teacher = WorkerTeacher(pool_of(tiny_folder, tiny.identity), tiny.identity, 1)
    with pytest.raises(UserError, match="leaves no room for"):
        list(teacher.answers([long]))


def test_a_cluster_that_is_too_small_or_not_there_is_refused(tiny_folder, tiny, cluster):
    one = Request(tiny.identity, ({"role": "user", "content": "why"},), Sampling(max_tokens=4), seed=0)
    model = ModelOnWorker(str(tiny_folder), FULL, None, None, tiny.identity)
    for settings, words in (
        (Workers(count=1, gpus=1), "room for 0 workers"),
        (Workers(count=1, cluster="127.0.0.1:9"), "can't be reached"),
    ):
        with pytest.raises(UserError, match=words):
            list(WorkerTeacher(RayPool(model, settings), tiny.identity, 1).answers([one]))
        ray.shutdown()


def test_a_run_with_workers_has_the_text_of_one_process_and_leaves_none(recipe_file, tmp_path):  # noqa: F811
    texts = {}
    for name, more in (("alone", ()), ("shared", ("--set", "machine.workers={count: 2}"))):
        folder = tmp_path / name
        done = command("elicit", recipe_file, "--out", folder, "--set", "machine.answers=none", *more)
        assert done.returncode == 0, done.stderr
        with Store(folder / "store.sqlite") as store:
            (identity,) = {
                json.loads(question)["model"] for (question,) in store._db.execute("select request from answers")
            }
            texts[name] = {request.key: answer.ids for request, answer in store.answers_of(identity)}
    assert texts["alone"] == texts["shared"] != {}
    ends = time.monotonic() + 30
    while workers_of():
        assert time.monotonic() < ends
        time.sleep(0.1)
