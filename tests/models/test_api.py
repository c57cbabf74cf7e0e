"""A served teacher against a server with planted faults: exact counts and bills, every fault typed, every wait ended, no key anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from limbeck.config.server import Served
from limbeck.elicit.engine import elicit
from limbeck.elicit.flow import StepContext, user
from limbeck.models import identity
from limbeck.models.api import ApiTeacher
from limbeck.models.http import MAX_BYTES, Backoff, Reply, parse_retry_after
from limbeck.models.replies import read_answer
from limbeck.storage.store import Store
from limbeck.storage.tries import Tries
from limbeck.types import Sampling, UserError
from tests.scripted_server import MODEL, Scripted, answer

SECRET = "sk-canary-4711"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", SECRET)


class Waits:
    """Time that passes only by waiting."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def clock(self):
        return self.now


def teacher(server, **settings):
    waits = Waits()
    return ApiTeacher(Served(url=server.url, name=MODEL, **settings), waits.sleep, waits.clock), waits


SHORT = Sampling(max_tokens=16)


def requests(count=3, sampling=SHORT, raw=None):
    scene = StepContext("served:toy", 7, "0/x")
    return [scene.request((user(f"question {n}"),), sampling, raw=raw) for n in range(count)]


def ask(server, count=1, stop=lambda: False, **settings):
    made, _ = teacher(server, **settings)
    return [found for _, found in made.answers(requests(count), stop)], made


def test_without_faults_every_request_is_sent_and_billed_once(tmp_path):
    with Scripted(lambda number, body: answer(f"to {body['messages'][0]['content']}")) as server:
        made, _ = teacher(server, price={"input": 1.0, "output": 2.0})
        with Store(tmp_path / "s.sqlite") as store:
            samples = elicit(requests(20), store, lambda: made)
            assert elicit(requests(20), store, lambda: pytest.fail("asked again")) == samples
        assert [sample.messages[-1]["content"] for sample in samples] == [f"to question {n}" for n in range(20)]
        assert (
            len(server.seen) == 20 == made.spending.sent
            and set(server.bills.values()) == {1}
            and made.spending.repeated == 0
        )
        assert (made.spending.read, made.spending.written) == (100, 60) and made.spending.money == pytest.approx(
            (100 + 120) / 1e6
        )
        path, body, headers = server.seen[0]
        assert (
            path == "/v1/chat/completions"
            and headers["Authorization"] == f"Bearer {SECRET}"
            and body["max_tokens"] == 16
        )
        assert SECRET.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir()) and SECRET not in repr(
            made
        )


def test_settings_of_a_draw_go_along_and_raw_texts_go_elsewhere():
    with Scripted() as server:
        made, _ = teacher(server)
        list(made.answers(requests(1, Sampling(0.5, 0.9, 8, ("\n",), 2.0), raw="<|user|>")))
        path, body, _ = server.seen[0]
        assert path == "/v1/completions" and body["prompt"] == "<|user|>" and "messages" not in body
        assert (body["temperature"], body["top_p"], body["stop"], body["presence_penalty"], body["stream"]) == (
            0.5,
            0.9,
            ["\n"],
            2.0,
            False,
        )


@pytest.mark.promise("R17")
def test_no_more_are_under_way_than_allowed_also_while_trying_again():
    with Scripted(lambda number, body: ("status", 503) if number % 3 == 0 else ("slow", 0.01)) as server:
        found, made = ask(server, 60, concurrency=4)
        assert (
            len(found) == 60 and server.most <= 4 and made.spending.repeated > 0 and set(server.bills.values()) == {1}
        )


@pytest.mark.promise("R9")
def test_a_storm_of_429_is_weathered_as_the_server_asks():
    with Scripted(lambda number, body: ("status", 429, {"Retry-After": "7"}) if number < 4 else answer()) as server:
        made, waits = teacher(server, concurrency=1)
        ((_, found),) = made.answers(requests(1))
        assert (
            found.finish == "ok"
            and waits.pauses == [7.0] * 4
            and made.spending.maybe_billed == 0
            and made.spending.sent == 5
        )
    assert parse_retry_after("3.5") == 3.5 and parse_retry_after(None) is parse_retry_after("soon") is None
    assert 1 <= parse_retry_after(formatdate(time.time() + 5, usegmt=True)) <= 5
    assert parse_retry_after(formatdate(0, usegmt=True)) == 0.0
    assert Backoff(2).pause(0, Reply(retry_after=9999.0)) == 60.0


@pytest.mark.promise("R8", "R9")
def test_tries_end_and_grow_apart():
    with Scripted(lambda number, body: ("status", 500)) as server:
        made, waits = teacher(server, retries=3, concurrency=1)
        ((_, found),) = made.answers(requests(1))
        assert (
            found.finish == "error" and len(server.seen) == 4 == made.spending.maybe_billed and len(waits.pauses) == 3
        )
        assert all(low * 0.5 <= pause <= low * 1.5 for low, pause in zip((0.5, 1, 2), waits.pauses, strict=True))


def test_a_server_that_fails_on_and_on_is_given_up():
    with (
        Scripted(lambda number, body: ("status", 503)) as server,
        pytest.raises(UserError, match="failed 12 times in a row"),
    ):
        ask(server, 50, concurrency=1)
    with pytest.raises(UserError, match=r"no connection"):
        ask(server, 50)  # it is gone


@pytest.mark.parametrize(
    ("status", "words"), [(401, "the key"), (403, "rights"), (404, "model's name"), (302, "redirects elsewhere")]
)
@pytest.mark.promise("S10")
def test_what_every_request_would_meet_ends_the_run_at_once(status, words):
    headers = {"Location": "http://169.254.169.254/"} if status == 302 else {}
    with Scripted(lambda number, body: ("status", status, headers, f"no: {SECRET}".encode())) as server:
        with pytest.raises(UserError, match=words) as caught:
            ask(server, 9, concurrency=1)
        assert len(server.seen) == 1 and SECRET not in str(caught.value) and "[key]" in str(caught.value)


@pytest.mark.promise("S8")
def test_a_key_that_a_server_writes_into_its_answers_is_not_stored(tmp_path):
    bodies = [answer(f"it is {SECRET}"), answer(f"it is {SECRET}", "content_filter")]
    with Scripted(lambda number, body: bodies[number]) as server, Store(tmp_path / "s.sqlite") as store:
        samples = elicit(requests(2), store, lambda: teacher(server, concurrency=1)[0])
    assert [sample.messages[-1]["content"] for sample in samples] == ["it is [key]"] * 2
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("key", ["o", "stop", "assistant", "choices"])
def test_no_key_makes_an_answer_another_one(key, monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", key)
    with Scripted(lambda number, body: answer("to be or not")) as server:
        (found,), _ = ask(server)
    assert (found.text, found.finish, found.usage) == ("to be or not", "ok", (5, 3))


@pytest.mark.parametrize(("set_", "words"), [(True, "which is set"), (False, "which is not set")])
def test_a_server_that_wants_a_key_says_which_variable_to_set(set_, words, monkeypatch):
    if not set_:
        monkeypatch.delenv("LIMBECK_API_KEY")
    with Scripted(lambda number, body: ("status", 401)) as server, pytest.raises(UserError) as caught:
        ask(server)
    assert f"check the key, from the environment variable LIMBECK_API_KEY, {words}" in str(caught.value)


@pytest.mark.promise("R10")
def test_a_server_that_never_lists_its_models_is_left_before_the_timeout(monkeypatch):
    monkeypatch.setattr(identity, "LOOK_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        began = time.monotonic()
        made, _ = teacher(SimpleNamespace(url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1"), timeout=300)
        with pytest.raises(UserError, match="is the server running"):
            made.identity  # noqa: B018
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("returns", ["the same", "another"])
@pytest.mark.promise("R12")
def test_a_server_that_was_away_must_come_back_with_its_model(returns, tmp_path):
    """Nothing that another model says under the same name is stored."""
    facts = {"id": MODEL, "root": "/models/one"}
    with Scripted(models=[facts]) as server, Store(tmp_path / "s.sqlite") as store:
        made, waits = teacher(server, concurrency=1)
        assert made.identity.startswith("served:toy-")
        elicit(requests(2), store, lambda: made)
        address = server.server_address
        server.shutdown()
        server.server_close()
        back = []

        async def come_back(seconds):
            if not back:
                models = [facts | ({} if returns == "the same" else {"root": "/models/two"})]
                back.append(Scripted(models=models, port=address[1]))

        made.sleep = made.budget.sleep = come_back
        if returns == "the same":
            assert len(elicit(requests(4), store, lambda: made)) == 4
        else:
            with pytest.raises(UserError, match="came back with another model"):
                elicit(requests(4), store, lambda: made)
            assert Store.count(tmp_path / "s.sqlite") == {"ok": 2}
        with back[0]:
            pass


def test_one_request_s_own_fault_is_its_own():
    with Scripted(
        lambda number, body: (
            ("status", 400, {}, b"context is too long") if "1" in body["messages"][0]["content"] else answer()
        )
    ) as server:
        found, made = ask(server, 3)
        assert sorted(one.finish for one in found) == ["error", "ok", "ok"] and made.spending.repeated == 0
        assert "too long" in next(one.raw for one in found if one.finish == "error")


@pytest.mark.parametrize(
    ("owner", "key"), [("vllm", "repetition_penalty"), ("llamacpp", "repeat_penalty"), ("me", None)]
)
def test_a_program_that_names_itself_draws_the_model_s_own_text(owner, key):
    """Without `kind`, too: its own cuts and penalties stay out of the text, and the answers are others than with them."""
    with Scripted(models=[{"id": MODEL, "owned_by": owner}]) as server, Scripted(models=[{"id": MODEL}]) as plain:
        made, _ = teacher(server)
        assert (made.identity == teacher(plain)[0].identity) == (key is None)
        list(made.answers(requests(1)))
        _, body, _ = server.seen[-1]
        assert body.get(key or "top_k") == (1.0 if key else None) and ("min_p" in body) == (key is not None)


WAITING = {"hang": ("hang", 3), "drip": ("drip", 3), "cut": ("cut", 40)}


@pytest.mark.parametrize("fault", WAITING)
@pytest.mark.promise("R8", "R10")
def test_every_wait_ends_and_may_have_been_billed(fault):
    with Scripted(lambda number, body: WAITING[fault] if number == 0 else answer()) as server:
        began = time.monotonic()
        found, made = ask(server, 1, timeout=0.4)
        assert found[0].finish == "ok" and made.spending.maybe_billed == 1 and time.monotonic() - began < 2.5


BODIES = {
    "whole": (answer(), "ok"), "cut off": (answer("text", "length"), "length"), "full, though it says stop": (answer(tokens=16), "length"),
    "empty": (answer("  "), "empty"), "null": (answer(None), "empty"), "filtered": (answer("x", "content_filter"), "filtered"),
    "refused": (answer(None, refusal="I can't"), "refused"), 
    "a dated model": (answer(model=f"{MODEL}-2026-01-01"), "ok"), "number": (answer(7), "malformed"), "list": (answer(["a"]), "malformed"),
    "tool call": (answer("x", "tool_calls"), "malformed"), "beside a call": (answer(tool_calls=[{"id": "1"}]), "malformed"), "no width": (answer("\u200b \u2060"), "empty"), "control token": (answer("a<|im_end|>b"), "malformed"),
    "no choices": ({"model": MODEL, "choices": []}, "malformed"), "two": ({"choices": answer()["choices"] * 2}, "malformed"),
    "no message": ({"choices": [{"finish_reason": "stop"}]}, "malformed"), "a text": ({"choices": "x"}, "malformed"),
    "no JSON": (b"<html>", "malformed"), "half": (json.dumps(answer()).encode()[:-9], "malformed"), "nothing": (b"", "malformed"),
    "NaN": (json.dumps(answer()).replace("5", "NaN").encode(), "malformed"), "null body": (b"null", "malformed"),
    "twice": (b'{"choices": 1, "choices": 2}', "malformed"), "latin 1": ('{"a": "\u00e9"}'.encode("latin-1"), "malformed"),
    "deep": (b"[" * 100_000, "malformed"), "big numbers": (json.dumps(answer(tokens=2**50)).encode(), "ok"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.promise("R11")
def test_what_became_of_an_answer_is_told_by_its_body(name):
    body, finish = BODIES[name]
    with Scripted(lambda number, _: ("bytes", body) if isinstance(body, bytes) else body) as server:
        (found,), _ = ask(server)
        assert found.finish == finish and (found.raw is None) == (finish == "ok") and found.ids is None


@pytest.mark.promise("R11")
def test_every_cut_of_a_body_is_malformed_or_whole():
    whole = json.dumps(answer()).encode()
    with Scripted(lambda number, body: ("bytes", whole[: int(body["messages"][0]["content"].split()[1])])) as server:
        made, _ = teacher(server, concurrency=len(whole))
        found = {request.messages[0]["content"]: one.finish for request, one in made.answers(requests(len(whole) + 1))}
    assert (
        found.pop(f"question {len(whole)}") == "ok"
        and set(found.values()) == {"malformed"}
        and len(found) == len(whole)
    )


@pytest.mark.promise("R11")
def test_a_flood_is_not_read_to_its_end():
    from limbeck.training.memory import peak_mib

    with Scripted(lambda number, body: ("flood", 100 * 2**20)) as server:
        before = peak_mib() or 0
        with pytest.raises(UserError, match=r"more than 16,777,216 bytes.*check the server"):
            ask(server)
        assert len(server.seen) == 1 and (peak_mib() or 0) - before < 4 * MAX_BYTES / 2**20


def test_a_long_answer_with_its_log_probabilities_is_read_to_its_end():
    """What is asked for is read: the bound is that of the tokens that the server is to name."""
    likely = [{"token": f"{n:03}" + "x" * 60, "logprob": -9.0, "bytes": [120] * 63} for n in range(20)]
    said = answer("a" * 4096)
    said["choices"][0]["logprobs"] = {
        "content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": likely}] * 2048
    }
    body = json.dumps(said)
    assert len(body) > MAX_BYTES
    long = requests(1, Sampling(1.0, 1.0, 4096))
    with Scripted(lambda number, _: ("bytes", body.encode())) as server:
        ((_, found),) = teacher(server, logprobs=20)[0].answers(long)
        assert found.finish == "ok" and len(found.told) == 2048 and found.usage == (5, 3)
        with pytest.raises(UserError, match="more than 16,777,216 bytes"):
            list(teacher(server)[0].answers(long))


@pytest.mark.parametrize(
    ("settings", "most", "words"),
    [
        ({"limits": {"requests": 5}}, 5, "5 requests"), ({"limits": {"tokens": 120}}, 13, "120 tokens"),
        ({"limits": {"money": 1e-4}, "price": {"input": 1.0, "output": 2.0}}, 9, "money"),
    ],
)  # fmt: skip
@pytest.mark.promise("R9")
def test_a_ceiling_is_never_passed_and_what_was_answered_is_kept(settings, most, words, tmp_path):
    with Scripted() as server, Store(tmp_path / "s.sqlite") as store:
        made, _ = teacher(server, concurrency=3, **settings)
        with pytest.raises(UserError, match=words):
            elicit(requests(50), store, lambda: made)
        kept = Store.count(tmp_path / "s.sqlite")["ok"]
        assert 1 <= kept == len(server.seen) <= most
        spent = made.spending
        limits = settings["limits"]
        assert spent.sent <= limits.get("requests", 99) and spent.read + spent.written <= limits.get("tokens", 9999)
        assert spent.money <= limits.get("money", 1)


def unmetered(text="", finish="stop"):
    return {key: value for key, value in answer(text, finish).items() if key != "usage"}


@pytest.mark.parametrize(
    ("limits", "most"),
    [({"tokens": 6000}, 5), ({"money": 0.012}, 5)],  # some 1,300 tokens an answer, where 2,000 could be
)
@pytest.mark.promise("R9")
def test_ceilings_hold_where_a_server_counts_no_tokens(limits, most, tmp_path):
    """In one process and in several; an answer that was not whole counts as the most that it can be."""
    settings = {"limits": limits, "price": {"input": 1.0, "output": 2.0}, "concurrency": 1}
    with Scripted(lambda number, body: unmetered("word " * 800)) as server, Store(tmp_path / "s.sqlite") as store:
        spent = []
        for count in (2, 50, 50):
            made, _ = teacher(server, **settings)
            made.begin_with(*store.bill("served:toy")[1:], tries=Tries(store.path, "served:toy"))
            spent.append(made.spending.estimated)
            with pytest.raises(UserError, match="are estimated") if count > 2 else contextlib.nullcontext():
                elicit(requests(count, Sampling(max_tokens=2000)), store, lambda made=made: made)
            assert made.spending.estimated == sum(
                1334 + len(f"question {n}") // 3 for n in range(len(server.seen))
            ) and (made.spending.read, made.spending.written, made.spending.money) == (0, 0, 0)
        assert spent[:2] == [0, 2 * (1334 + 10 // 3)] and spent[2] == made.spending.estimated
        assert 3 <= len(server.seen) <= most and store.unmetered("served:toy") == len(server.seen)


@pytest.mark.parametrize(
    ("said", "settings", "tokens"),
    [
        (unmetered("fine"), {}, 2), (unmetered("fine", "length"), {}, 16), (unmetered("x" * 999), {}, 16),
        (unmetered(7), {}, 16), (unmetered("fine"), {"reasoning": "drop"}, 16), (answer(), {}, None),
    ],
)  # fmt: skip
def test_an_answer_is_estimated_by_its_text_where_it_is_whole(said, settings, tokens, tmp_path):
    with Scripted(lambda number, body: said) as server, Store(tmp_path / "s.sqlite") as store:
        made, _ = teacher(server, **settings)
        elicit(requests(1), store, lambda: made, tolerate=0.9)
        estimated = 0 if tokens is None else tokens + len("question 0") // 3
        again, _ = teacher(server, **settings)
        again.begin_with(*store.bill("served:toy")[1:], tries=Tries(store.path, "served:toy"))
        assert made.spending.estimated == estimated == again.spending.estimated


def test_a_server_that_refuses_several_settings_loses_no_request():
    """Each is found out by a reply of its own, of the requests that are under way at the same time, too."""

    def say(number, body):
        for name in ("max_tokens", "seed"):
            if name in body:
                return (
                    "status",
                    400,
                    {},
                    json.dumps({"error": {"message": f"Unsupported parameter: '{name}'"}}).encode(),
                )
        return answer()

    with Scripted(say) as server:
        found, made = ask(server, 9, concurrency=4)
        assert [one.finish for one in found] == ["ok"] * 9 and len(server.seen) <= 9 + 2 * 4
        keys = [headers["Idempotency-Key"] for _, _, headers in server.seen]
        assert len(set(keys)) == len(keys), "another body is another request"


@pytest.mark.promise("R9")
def test_tries_count_against_the_ceiling():
    with (
        Scripted(lambda number, body: ("status", 503)) as server,
        pytest.raises(UserError, match="ceiling of 3 requests"),
    ):
        ask(server, 1, limits={"requests": 3})
    assert len(server.seen) == 3


def test_rates_per_minute_are_kept():
    with Scripted() as server:
        made, waits = teacher(server, requests_per_minute=30, concurrency=1)
        list(made.answers(requests(6)))
        assert waits.now == pytest.approx(10)
        made, waits = teacher(server, tokens_per_minute=40, concurrency=1)  # some 19 a request
        list(made.answers(requests(6)))
        assert waits.now == pytest.approx(120)


@pytest.mark.promise("R14")
def test_after_a_stop_what_is_under_way_is_answered_and_nothing_more_is_sent():
    with Scripted(lambda number, body: ("slow", 0.2 if number % 2 else 0.02)) as server:
        made, _ = teacher(server, concurrency=4)
        taken = []
        for found in made.answers(requests(40), lambda: len(taken) >= 3):
            taken.append(found)
        assert 3 <= len(taken) == len(server.seen) == sum(server.bills.values()) <= 7


def test_after_a_stop_nothing_is_tried_again():
    """Neither what failed while it was under way nor what waits for its next try."""
    with Scripted(lambda number, body: ("status", 503, {"Retry-After": "30"}) if number else ("hang", 0.5)) as server:
        api = ApiTeacher(Served(url=server.url, name=MODEL, concurrency=2, timeout=0.3))
        began = time.monotonic()
        assert not list(api.answers(requests(9), lambda: len(server.seen) >= 2))
        assert len(server.seen) == 2 and time.monotonic() - began < 5
        assert api.spending.maybe_billed == 1  # the one that hung


def test_a_second_signal_ends_at_once_what_the_first_waits_for():
    """It is raised in the middle of the loop's waiting."""

    def second(*_):
        raise UserError("stopped at once")

    with Scripted(lambda number, body: ("hang", 3)) as server:
        api = ApiTeacher(Served(url=server.url, name=MODEL, concurrency=3, timeout=30))
        before = signal.signal(signal.SIGALRM, second)
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(UserError, match="stopped at once"):
                list(api.answers(requests(9), lambda: len(server.seen) >= 3))
        finally:
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - began < 2 and len(server.seen) == 3 == api.spending.maybe_billed


@pytest.mark.promise("R8")
def test_an_answer_that_is_asked_for_again_is_counted_as_the_two_that_it_cost(tmp_path):
    said = (answer(7), answer())
    with Scripted(lambda number, body: said[number]) as server, Store(tmp_path / "s.sqlite") as store:
        tries = Tries(store.path, "served:toy")
        for number in range(2):
            made, _ = teacher(server)
            made.begin_with(*store.bill("served:toy")[1:], tries=tries)
            with pytest.raises(UserError, match="can't be used") if not number else contextlib.nullcontext():
                elicit(requests(1), store, lambda made=made: made)
        assert tries.unanswered() == (0, 0) and tries.all() == 2 == len(server.seen)
        assert store.bill("served:toy")[1:] == (10, 6)  # of both


@pytest.mark.promise("R9")
def test_what_a_server_refused_counts_among_the_requests_of_a_run(tmp_path):
    with Scripted(lambda number, body: ("status", 503, {}, b"busy")) as server, Store(tmp_path / "s.sqlite") as store:
        for retries, words in ((3, "can't be used"), (9, "ceiling of 5 requests")):
            made, _ = teacher(server, retries=retries, limits={"requests": 5})
            made.begin_with(*store.bill("served:toy")[1:], tries=Tries(store.path, "served:toy"))
            with pytest.raises(UserError, match=words):
                elicit(requests(1), store, lambda made=made: made)
        assert len(server.seen) == 5


PAID_FOR_NOTHING = {"hang": 1, "cut": 1, "reset": 1, "500": 1, "429": 0, "503": 0, "400": 0, "whole": 0}


@pytest.mark.parametrize("fault", PAID_FOR_NOTHING)
@pytest.mark.promise("R8", "R9")
def test_what_may_be_billed_without_an_answer_is_kept_and_counts_against_ceilings(fault, tmp_path):
    faults = {"hang": ("hang", 1), "cut": ("cut", 40), "reset": ("cut", 0), "whole": answer()}

    def say(number, body):
        return answer() if number else faults.get(fault) or ("status", int(fault), {}, b"no")

    def again(**limits):
        made = teacher(server, timeout=0.3, limits=limits)[0]
        made.begin_with(*store.bill("served:toy")[1:], tries=Tries(store.path, "served:toy"))
        return made

    with Scripted(say) as server, Store(tmp_path / "s.sqlite") as store:
        made = again()
        elicit(requests(1), store, lambda: made, tolerate=1.0)
        tries, tokens = Tries(store.path, "served:toy").unanswered()
        assert tries == PAID_FOR_NOTHING[fault] == made.spending.maybe_billed == again().spending.maybe_billed
        assert tokens == tries * (16 + len("question 0") // 3) == made.spending.maybe_tokens
        used = sum(store.bill("served:toy")[1:]) + tokens
        with pytest.raises(UserError, match=f"ceiling of {used + 18} tokens"):
            elicit(requests(2), store, lambda: again(tokens=used + 18), tolerate=1.0)
        elicit(requests(2), store, lambda: again(tokens=used + 19), tolerate=1.0)


def test_who_a_server_is_depends_on_what_it_serves():
    facts = {"id": MODEL, "meta": {"n_params": 5, "size": 7, "n_ctx": 1}, "created": 1}
    with (
        Scripted(models=[facts]) as one,
        Scripted(models=[facts | {"created": 2}]) as other,
        Scripted(models=[facts | {"meta": {}}]) as third,
    ):
        names = [teacher(server)[0].identity for server in (one, other, third)]
    assert names[0] == names[1] != names[2] and names[0].startswith("served:toy-") and "127" not in names[0]
    with (
        Scripted(models=[{"id": "a"}, {"id": "b"}]) as server,
        pytest.raises(UserError, match="serves a, b, not 'toy'"),
    ):
        _ = teacher(server)[0].identity
    with pytest.raises(UserError, match=r"ConnectError: .*; is the server running"):
        _ = teacher(server)[0].identity
    with pytest.raises(UserError, match=r"ConnectError: .*; is there a network, and is the address right"):
        _ = ApiTeacher(Served(url="https://limbeck.invalid/v1", name="x")).identity
    with pytest.raises(UserError, match="without a password"):
        ApiTeacher(Served(url="http://me:secret@host/v1", name="x"))


def test_a_text_is_read_by_its_kind():
    assert (
        read_answer(answer("x"), MODEL, raw=True, max_tokens=9, usage=None)
        == ("x", "ok")
        == read_answer(answer("x"), MODEL, raw=False, max_tokens=9, usage=None)
    )
    assert read_answer(answer(model="org/toy"), "toy", raw=False, max_tokens=9, usage=None)[1] == "ok" and read_answer(
        None, "toy", raw=False, max_tokens=9, usage=None
    ) == (
        "",
        "malformed",
    )


CHILD = """
import sys
from pathlib import Path
from limbeck.elicit.engine import elicit
from limbeck.elicit.flow import StepContext, user
from limbeck.models import identity
from limbeck.models.api import ApiTeacher
from limbeck.config.server import Served
from limbeck.storage.store import Store
from limbeck.storage.tries import Tries
from limbeck.types import Sampling

url, folder = sys.argv[1:]
requests = [StepContext("served:toy", 7, "0/x").request((user(f"question {n}"),), Sampling(max_tokens=16)) for n in range(150)]
said = Path(folder, "acknowledged").open("a")
with Store(Path(folder) / "s.sqlite") as store:
    def told(done, total, tokens):
        said.write(f"{done}\\n")
        said.flush()
    made = ApiTeacher(Served(url=url, name="toy", concurrency=4))
    made.begin_with(*store.bill("served:toy")[1:], tries=Tries(store.path, "served:toy"))
    elicit(requests, store, lambda: made, told)
"""


@pytest.mark.long
@pytest.mark.promise("R7", "R8")
def test_killed_again_and_again_nothing_acknowledged_is_lost_or_paid_twice(tmp_path):
    kills, limit = 12, 4
    with Scripted(lambda number, body: ("slow", 0.01)) as server:
        child = tmp_path / "child.py"
        child.write_text(textwrap.dedent(CHILD))
        command = [sys.executable, str(child), server.url, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}  # noqa: PTH109
        for number in range(kills):
            process = subprocess.Popen(command, env=environment)
            while process.poll() is None and len(server.seen) < 10 * (number + 1):
                time.sleep(0.002)
            time.sleep(0.001 * (number * 7 % 11))
            process.send_signal(signal.SIGKILL)
            process.wait()
            lines = (tmp_path / "acknowledged").read_text().splitlines()
            if (tmp_path / "s.sqlite").exists():
                assert Store.count(tmp_path / "s.sqlite").get("ok", 0) >= max(
                    [int(line) for line in lines if line], default=0
                )
        assert subprocess.run(command, env=environment, check=False).returncode == 0
        time.sleep(0.05)
        bills = sum(server.bills.values())
        assert len(server.bills) == 150 <= bills <= 150 + kills * limit
        maybe = Tries(tmp_path / "s.sqlite", "served:toy").unanswered()[0]
        assert bills - 150 <= maybe <= kills * limit  # a try that was killed before it was sent counts, too
    assert Store.count(tmp_path / "s.sqlite") == {"ok": 150}
