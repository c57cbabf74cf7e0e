"""What ranks say to each other outside of collectives: turns, meetings, signs of life, and who tells the user."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import DistBackendError, HashStore

from limbeck.config import ranks
from limbeck.training.company import Company, LostRankError, lost_rank


@pytest.fixture
def pair():
    store = HashStore()
    companies = [Company(store, rank, 2, timeout=0.5) for rank in range(2)]
    yield companies
    for company in companies:
        company.leave()


def apart(work):
    """Do it in another thread; returns a function that waits for its result."""
    results = []

    def run():
        try:
            results.append(work())
        except LostRankError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(timeout=20)
        assert results, "it still waits"
        return results[0]

    return result


def test_a_rank_waits_longer_than_the_timeout_for_one_that_is_alive(pair):
    first, second = pair
    heard = apart(lambda: [second.hear(), second.hear()])
    begun = time.monotonic()
    while time.monotonic() - begun < 3 * first.timeout:  # rank 0 is busy
        pass
    first.tell({"train": "student"})
    first.tell({})
    assert heard() == [{"train": "student"}, {}]


def test_ranks_meet(pair):
    first, second = pair
    for _ in range(2):
        met = apart(second.meet)
        first.meet()
        assert met() is None


@pytest.mark.promise("R10")
def test_a_rank_without_a_sign_of_life_is_given_up(pair):
    first, second = pair
    first.leave()
    begun = time.monotonic()
    error = apart(second.hear)()
    assert isinstance(error, LostRankError) and error.is_silent and "rank 0 has not answered for 0.5 s" in str(error)
    assert "run it again" in str(error) and time.monotonic() - begun < 5


def test_a_rank_that_fails_ends_the_wait_of_all_and_one_tells_the_user(pair):
    first, second = pair
    waits = apart(second.hear)
    assert first.fail(ValueError("a bug"))
    error = waits()
    assert isinstance(error, LostRankError) and not error.is_silent
    assert not second.fail(error), "rank 0 has told it"


def test_a_lost_connection_is_told_where_no_rank_is_gone(pair, monkeypatch):
    """A fault of the network that reads like a death must not end without a word."""
    monkeypatch.setattr("limbeck.training.company.CONFIRM_SECONDS", 0.2)
    first, second = pair
    monkeypatch.setenv(ranks.BY_COMMAND, "2")
    error = lost_rank(RuntimeError("[gloo] Connection closed by peer [10.0.0.7]"), 5)
    assert "10.0.0.7" in str(error)
    assert first.fail(error) and not second.fail(error)
    assert lost_rank(DistBackendError("ncclSystemError: System call (e.g. socket, malloc) failed"), 5) is None


@pytest.fixture
def with_a_process():
    """Rank 0 of two, and a process that runs for ever, which rank 1 names as its own."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store = HashStore()
    rank = Company(store, 0, 2, timeout=60)
    for key, value in {"process/1": process.pid, "beat/1": "begun"}.items():
        store.set(key, str(value))
    yield rank, process
    rank.leave()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("is_reaped", [False, True])
@pytest.mark.promise("R10")
def test_a_rank_of_this_machine_that_dies_ends_the_wait_at_once(with_a_process, monkeypatch, is_reaped):
    rank, process = with_a_process
    monkeypatch.setenv(ranks.BY_COMMAND, "2")
    waits = apart(rank.meet)
    process.kill()
    if is_reaped:
        process.wait()
    begun = time.monotonic()
    error = waits()
    assert isinstance(error, LostRankError) and not error.is_silent and "rank 1 has died" in str(error)
    assert time.monotonic() - begun < 10, "far less than the timeout"


@pytest.mark.promise("R10")
def test_a_rank_that_is_ended_since_another_died_says_nothing(with_a_process, monkeypatch):
    """The launcher ends the others by a signal, which is a stop to them, and tells who has died."""
    rank, process = with_a_process

    def fails() -> bool:
        rank.store.set("told", "0")
        rank.store.delete_key("fault")
        return rank.fail(ValueError("a bug, or stopped"))

    assert fails(), "rank 1 lives"
    process.kill()
    process.wait()
    assert fails(), "under torchrun a rank tells"
    monkeypatch.setenv(ranks.BY_COMMAND, "2")
    assert not fails()
    rank.store.set("left/1", "done")
    assert fails(), "rank 1 has done its work"


@pytest.mark.parametrize(
    ("text", "is_silent"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", False),
        ("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True),
        ("The client socket has timed out after 5s while trying to connect to the TCPStore", True),
        ("Watchdog caught collective operation timeout: NCCL", True),
    ],
)
def test_what_a_collective_says_of_a_lost_rank(text, is_silent):
    found = lost_rank(RuntimeError(text), 5)
    assert found is not None and found.is_silent == is_silent


def test_other_errors_are_not_of_lost_ranks():
    for text in ("mat1 and mat2 shapes cannot be multiplied", "CUDA out of memory", "a timeout of a server"):
        assert lost_rank(RuntimeError(text), 5) is None or "server" in text
