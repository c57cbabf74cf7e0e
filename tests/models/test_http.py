"""The HTTP layer under every served model: addresses, keys, bounded answers, JSON that is not trusted, pauses."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from limbeck.models.http import (
    Backoff,
    Call,
    Endpoint,
    Reply,
    as_dict,
    as_dicts,
    check_address,
    read_json,
    read_key,
    send_with_retries,
    without_key,
)
from limbeck.types import UserError
from tests.scripted_server import Scripted, answer

SECRET = "sk-canary-4711"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)


def endpoint(server, timeout=5.0):
    return Endpoint(server.url, "SOME_KEY", timeout)


def send(server, call, **limits):
    return endpoint(server).run(lambda connection: connection.send(call, **limits))


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "http://", "http://me:word@host", "http://host?key=1", "http://host#x", "http://[", "http://host:port", ""],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_with_an_example(url):
    with pytest.raises(UserError, match=r"a.b must look like http://x/v1, .* SOME_KEY") as caught:
        check_address(url, "a.b", "http://x/v1", "SOME_KEY")
    assert "word@" not in str(caught.value)
    assert check_address("https://host:8080/v1/", "a.b", "http://x/v1", "SOME_KEY") == "https://host:8080/v1"


@pytest.mark.promise("S8")
def test_the_key_is_sent_and_taken_out_of_what_comes_back():
    with Scripted(lambda number, body: ("status", 400, {}, f"no: {SECRET}".encode())) as server:
        reply = send(server, Call("POST", "/x", {"a": 1}, headers={"X-Other": "b"}))
        path, body, headers = server.seen[0]
    assert (path, body, headers["X-Other"], headers["Authorization"]) == ("/v1/x", {"a": 1}, "b", f"Bearer {SECRET}")
    assert reply.text() == "no: [key]" and reply.quote() == "It says: 'no: [key]'" and SECRET not in repr(reply)
    assert reply.body == f"no: {SECRET}".encode(), "what is parsed is what was sent"
    assert SECRET not in repr(endpoint(server))


@pytest.mark.parametrize("key", ["k", "0", "tokens", "logprobs", "token_id:7", "prompt_logprobs", "null", ":"])
def test_no_key_changes_what_is_parsed(key, monkeypatch):
    monkeypatch.setenv("SOME_KEY", key)
    sent = {"tokens": [0, 10, 7], "logprobs": {"token_id:7": -0.5, "prompt_logprobs": None}, "text": "the key is k"}
    with Scripted(lambda number, body: sent) as server:
        assert send(server, Call("POST", "/x", {})).json() == sent


def test_a_key_is_hidden_where_a_limit_cuts_it_and_a_short_one_leaves_words_whole():
    body = b"x" * 290 + SECRET.encode() + b" and more"
    for limit in range(280, 320):
        assert SECRET[:8] not in Reply(500, body, key=SECRET).text(limit)
    assert SECRET[:8] not in Reply(500, body, key=SECRET).error_text()
    escaped = json.dumps({"error": {"message": "no: sk/canary/4711"}}).replace("/", "\\/").encode()
    assert Reply(401, escaped, key="sk/canary/4711").error_text() == "no: [key]"
    assert Reply(400, b'{"error": "the token is asked for"}', key="k").error_text() == "the token is asked for"


@pytest.mark.parametrize("key", [SECRET, "sk/canary+4711=", "a" * 12])
@pytest.mark.promise("S8")
def test_a_key_is_hidden_however_its_characters_are_spelt(key):
    spellings = [
        key,
        "".join(f"\\u{ord(character):04x}" for character in key),
        "".join(f"\\u{ord(character):04X}" for character in key),
        "".join(f"\\\\u{ord(character):04x}" for character in key),
        "".join(f"%{ord(character):02X}" for character in key),
        key[:3] + "".join(f"\\u{ord(character):04x}" for character in key[3:]),
        key.replace("/", "\\/"),
    ]
    for spelt in spellings:
        assert without_key(f"<{spelt}>", key) == "<[key]>"
        body = b"x" * 280 + spelt.encode() + b" and more"
        for limit in range(270, 360, 7):
            assert spelt[:9] not in Reply(500, body, key=key).text(limit), "a limit cuts no key"
    began = time.perf_counter()
    without_key("\\" * 64_000, key)
    assert time.perf_counter() - began < 1


@pytest.mark.promise("S10")
def test_no_key_is_sent_elsewhere_than_it_is_bound_to(monkeypatch):
    with Scripted() as server:
        monkeypatch.setenv("SOME_KEY_ORIGIN", "https://api.example")
        with pytest.raises(UserError, match=r"SOME_KEY is for https://api\.example"):
            send(server, Call("POST", "/x", {}))
        assert server.seen == []
        monkeypatch.setenv("SOME_KEY_ORIGIN", server.url)
        assert send(server, Call("POST", "/x", {})).status == 200


def test_an_error_of_ours_that_quotes_what_was_parsed_has_no_key():
    async def ask(connection):
        reply = await connection.send(Call("POST", "/x", {}))
        raise UserError(f"it answered as {reply.json()['model']}")

    with (
        Scripted(lambda number, body: answer(model=f"toy {SECRET}")) as server,
        pytest.raises(UserError, match=r"it answered as toy \[key\]") as caught,
    ):
        endpoint(server).run(ask)
    assert SECRET not in str(caught.value)


def test_a_call_at_the_root_leaves_the_version_out():
    with Scripted() as server:
        send(server, Call("POST", "/tokenize", {}, at_root=True))
        assert server.seen[0][0] == "/tokenize"


@pytest.mark.parametrize("key", ["two words", 'qu"ote', "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(UserError, match="SOME_KEY holds characters") as caught:
        read_key("SOME_KEY")
    assert key not in str(caught.value)


def test_an_answer_is_read_so_far_and_no_further():
    with Scripted(lambda number, body: ("flood", 4 * 2**20)) as server:
        reply = send(server, Call("POST", "/x", {}), max_bytes=1000)
    assert reply.status == 200 and reply.truncated and len(reply.body) < 2**20 and reply.json() is None


@pytest.mark.parametrize(
    ("script", "failure"), [(("hang", 2), "timeout"), (("cut", 20), "broken connection"), (None, "no connection")]
)
def test_a_failed_exchange_is_a_reply_too(script, failure):
    with Scripted(lambda number, body: script) as server:
        if script is None:
            server.shutdown()
            server.server_close()
        reply = send(server, Call("POST", "/x", {}), seconds=0.3)
    assert (reply.status, reply.failure, reply.outcome()) == (0, failure, failure) and reply.error


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": [1, null]}', {"a": [1, None]}), (b"null", None), (b"", None), (b"{", None), (b'{"a": NaN}', None),
        (b'{"a": 1, "a": 2}', None), (b'{"a": {"b": 1, "b": 1}}', None), (b"\xff", None), (b"[" * 100_000, None),
    ],
)  # fmt: skip
def test_json_is_whole_and_plain_or_none(body, value):
    assert read_json(body) == value


def test_shapes_are_never_trusted():
    assert as_dict([1]) == as_dict(None) == {} and as_dict({"a": 1}) == {"a": 1}
    assert as_dicts({"a": 1}) == as_dicts("x") == [] and as_dicts([1, {"a": 1}, None]) == [{"a": 1}]
    assert read_json(b"[NaN]", allow_nan=True) != [0] and read_json(b"[NaN]") is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "too long", "code": 400}}, "too long"), ({"error": "no"}, "no"), ({"message": "no"}, "no"),
        ({"detail": "Not Found"}, "Not Found"), ({"x": 1}, '{"x": 1}'), ({"error": {"message": "a\n\x1b[1mb"}}, "a  [1mb"),
    ],
)  # fmt: skip
def test_what_a_server_says_went_wrong_is_one_printable_line(body, text):
    assert Reply(400, json.dumps(body).encode()).error_text() == text
    assert len(Reply(500, b"x" * 10**6).error_text()) == 300 and Reply(500).quote() == ""


@pytest.mark.promise("R9")
def test_pauses_double_and_follow_the_server():
    backoff = Backoff(9, first=1.0, longest=10.0, longest_asked=60.0)
    pauses = [backoff.pause(attempt, Reply(503)) for attempt in range(9)]
    assert all(0.5 <= pause / min(10, 2**attempt) <= 1.5 for attempt, pause in enumerate(pauses))
    assert [backoff.pause(0, Reply(503, retry_after=asked)) for asked in (7.0, 900.0)] == [7.0, 60.0]
    assert backoff.pause(0, Reply(503, retry_after=0.0)) > 0, "a server that says now is not asked in a tight loop"


def test_tries_end_with_the_first_final_reply_or_with_the_last():
    pauses, sent = [], []

    async def pause(seconds):
        pauses.append(seconds)

    async def try_(attempt, replies):
        sent.append(attempt)
        return replies[attempt]

    def go(*statuses):
        replies = [Reply(status) for status in statuses]
        return asyncio.run(
            send_with_retries(lambda n: try_(n, replies), lambda reply: reply.status == 200, Backoff(3), pause)
        ).status

    assert go(503, 200, 500) == 200 and sent == [0, 1] and len(pauses) == 1
    assert go(503, 500, 502) == 502 and len(pauses) == 3, "no pause after the last try"


def test_it_runs_where_a_loop_runs_already():
    async def notebook(server):
        return send(server, Call("POST", "/x", {}))

    with Scripted(lambda number, body: answer()) as server:
        assert asyncio.run(notebook(server)).status == 200
