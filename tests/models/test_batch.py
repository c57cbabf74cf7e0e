"""A provider's batch interface, played: every request answered and billed once, also by a run that starts again, and every fault told."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from limbeck import run
from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.models.batch import BatchTeacher
from limbeck.types import Request, Sampling, UserError
from tests.scripted_server import MODEL, Handler, Scripted, answer


class Provider(Scripted):
    """Files and batches. `serve(body)` answers one line of a batch; `ends` says after how many looks a batch ends, and as what."""

    def __init__(self, serve=lambda body: answer(), ends=(1, "completed"), expire=0):
        super().__init__()
        self.RequestHandlerClass = Desk
        self.serve, self.ends, self.expire = serve, ends, expire
        self.files, self.batches, self.looks, self.billed, self.busy, self.plain = {}, [], {}, [], 0, False

    def end(self, batch):
        """Answer a batch's lines, but for the last `expire` of the first batch."""
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        left = self.expire if batch is self.batches[0] else 0
        done, out, wrong = lines[: len(lines) - left], [], []
        for line in done:
            found = self.serve(line["body"])
            self.billed.append(line["custom_id"])
            status, body = found if isinstance(found, tuple) else (200, found)
            reply = {
                "id": "r",
                "custom_id": line["custom_id"],
                "response": {"status_code": status, "request_id": "x", "body": body},
                "error": None,
            }
            (out if status == 200 else wrong).append(reply)
        wrong += [
            {"id": "r", "custom_id": line["custom_id"], "response": None, "error": {"code": "batch_expired"}}
            for line in lines[len(done) :]
        ]
        for key, records in (("output_file_id", out), ("error_file_id", wrong)):
            if records:
                batch[key] = f"file-{len(self.files)}"
                self.files[batch[key]] = "".join(json.dumps(record) + "\n" for record in records).encode()


class Desk(Handler):
    def do_GET(self):
        server, path = self.server, self.path.removeprefix("/v1")
        if server.busy:
            server.busy -= 1
            return self.reply(429, b"{}")
        if path == "/models":
            return super().do_GET()
        if server.plain:
            return self.reply(404, b"{}")
        if found := re.fullmatch(r"/files/([^/]+)/content", path):
            return self.reply(200, server.files[found[1]])
        if path.startswith("/batches?"):
            newest = server.batches[::-1]
            names = [batch["id"] for batch in newest]
            after = re.search(r"after=([\w-]+)", path)
            start = names.index(after[1]) + 1 if after else 0
            page = newest[start : start + 2]
            return self.reply(
                200, json.dumps({"object": "list", "data": page, "has_more": start + 2 < len(newest)}).encode()
            )
        (batch,) = [batch for batch in server.batches if path == f"/batches/{batch['id']}"]
        server.looks[batch["id"]] = server.looks.get(batch["id"], 0) + 1
        looks, status = server.ends
        if batch["status"] == "in_progress" and server.looks[batch["id"]] > looks:
            batch["status"] = status
            if status != "failed":
                server.end(batch)
            else:
                batch["errors"] = {
                    "object": "list",
                    "data": [{"code": "invalid", "message": "line 1 is no good", "line": 1}],
                }
        return self.reply(200, json.dumps(batch).encode())

    def do_POST(self):
        server, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.seen.append((self.path, content, dict(self.headers)))
        if self.path == "/v1/files":
            assert b'name="purpose"' in content and b"batch" in content
            name = f"file-{len(server.files)}"
            server.files[name] = re.search(rb'name="file".*?\r\n\r\n(.*?)\r\n--', content, re.DOTALL)[1]
            return self.reply(200, json.dumps({"id": name, "object": "file", "purpose": "batch"}).encode())
        asked = json.loads(content)
        assert asked["completion_window"] == "24h" and asked["input_file_id"] in server.files
        batch = {
            "id": f"batch_{len(server.batches)}",
            "object": "batch",
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            **asked,
        }
        server.batches.append(batch)
        return self.reply(200, json.dumps(batch).encode())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def requests(*texts, **settings):
    return [Request("m", ({"role": "user", "content": text},), Sampling(max_tokens=8, **settings), 1) for text in texts]


@pytest.fixture
def teacher(monkeypatch):
    """A teacher whose waits take no time."""
    monkeypatch.setenv("LIMBECK_API_KEY", "sk-canary-4711")

    def made(server, **settings):
        now = [0.0]

        async def sleep(seconds):
            now[0] += seconds

        return BatchTeacher(
            Served(url=server.url, name=MODEL, batch=True, **settings), sleep=sleep, clock=lambda: now[0]
        )

    return made


def test_all_requests_go_into_one_batch_and_are_answered(teacher):
    def serve(body):
        text = body["messages"][-1]["content"]
        return (
            (400, {"error": "too long"})
            if text == "long"
            else answer(text.upper(), "length" if text == "cut" else "stop")
        )

    with Provider(serve, ends=(3, "completed")) as server:
        made = teacher(server, price={"input": 1.0, "output": 2.0})
        found = {
            request.messages[0]["content"]: one for request, one in made.answers(requests("a", "b", "cut", "long"))
        }
        assert (
            len(server.batches) == 1
            and len(server.billed) == 4
            and server.batches[0]["endpoint"] == "/v1/chat/completions"
        )
        sent = [json.loads(line) for line in server.files["file-0"].splitlines()]
    assert {name: one.finish for name, one in found.items()} == {"a": "ok", "b": "ok", "cut": "length", "long": "error"}
    assert found["a"].text == "A" and (made.spending.sent, made.spending.read, made.spending.written) == (4, 15, 9)
    assert made.spending.money == pytest.approx((15 + 18) / 1e6) and {line["method"] for line in sent} == {"POST"}
    assert all(
        line["body"]["model"] == MODEL and line["body"]["seed"] == int(line["custom_id"][:7], 16) for line in sent
    )
    assert b"sk-canary" not in server.files["file-0"]


@pytest.mark.promise("R7")
def test_a_run_that_starts_again_finds_its_batches(teacher):
    """Stopped while it waits, killed after some answers were taken, or after all: nothing is billed twice."""
    asked = requests("a", "b", "c")
    with Provider(ends=(2, "completed")) as server:
        looks = iter([False] * 3 + [True] * 9)
        assert list(teacher(server).answers(asked, lambda: next(looks))) == []
        assert len(server.batches) == 1 and not server.billed
        first = next(teacher(server).answers(asked))  # the first answer was acknowledged
        assert len(server.billed) == 3
        rest = [request for request in asked if request.key != first[0].key]
        again = teacher(server)
        assert {request.key for request, _ in again.answers(rest)} == {request.key for request in rest}
        assert again.spending.sent == 2 and again.spending.read == 10 and len(server.batches) == 1
        new = requests("d")
        assert len(list(teacher(server).answers([*rest, *new]))) == 3
    assert sorted(server.billed) == sorted(request.key for request in [*asked, *new]) and len(server.batches) == 2


def test_what_a_batch_left_is_asked_anew(teacher):
    with Provider(ends=(1, "expired"), expire=2) as server:
        found = list(teacher(server).answers(requests("a", "b", "c", "d")))
        assert len(found) == 4 and len(server.batches) == 2 and len(server.billed) == len(set(server.billed)) == 4
    with (
        Provider(lambda body: (500, {}), ends=(0, "completed")) as server,
        pytest.raises(UserError, match="2 requests were left unanswered by 3"),
    ):
        list(teacher(server, retries=2).answers(requests("a", "b")))


def test_batches_found_again_count_under_the_ceilings(teacher):
    """Those that an earlier process submitted; nothing new is submitted beyond, and what they answer is kept."""
    asked = requests("a", "b", "c")
    with Provider(ends=(2, "completed")) as server:
        looks = iter([False] * 3 + [True] * 9)
        assert list(teacher(server).answers(asked, lambda: next(looks))) == []
        found = []
        with pytest.raises(UserError, match="ceiling of 3 requests"):
            found.extend(teacher(server, limits={"requests": 3}).answers([*asked, *requests("d")]))
        assert {request.key for request, _ in found} == {request.key for request in asked} == set(server.billed)
        assert len(server.batches) == 1 and len(list(teacher(server, limits={"requests": 3}).answers(asked))) == 3
        again = teacher(server, limits={"tokens": 34})  # answers of 8 tokens, where 8 more were feared for each
        assert len(list(again.answers([*asked, *requests("d")]))) == 4 and len(server.batches) == 2


def test_nothing_is_uploaded_before_all_of_it_is_held_against_the_ceilings(teacher, monkeypatch):
    monkeypatch.setattr("limbeck.models.batch.MAX_REQUESTS", 2)
    with Provider() as server, pytest.raises(UserError, match="ceiling of 3 requests"):
        list(teacher(server, limits={"requests": 3}).answers(requests("a", "b", "c", "d")))
    assert not server.files and not server.batches


def test_a_batch_that_somebody_cancelled_is_not_submitted_again_at_once(teacher):
    asked = requests("a", "b", "c", "d")
    with Provider(ends=(1, "cancelled"), expire=2) as server:
        found = []
        with pytest.raises(UserError, match=r"was cancelled with 2 requests unanswered.*run it again"):
            found.extend(teacher(server).answers(asked))
        assert len(found) == 2 and len(server.batches) == 1
        server.ends = (1, "completed")
        assert len(list(teacher(server).answers(asked))) == 4 and len(server.batches) == 2, "a later run goes on"
        assert len(server.billed) == len(set(server.billed)) == 4


def test_a_batch_is_no_larger_than_what_is_read_of_it(teacher, monkeypatch):
    monkeypatch.setattr("limbeck.models.batch.MAX_OUTPUT_BYTES", 2 * 256 * 21 * 8)
    with Provider() as server:
        plain = Request("m", ({"role": "user", "content": "plain"},), Sampling(1.0, 1.0, 8), 1)
        asked = [replace(plain, seed=number) for number in range(5)]
        assert len(list(teacher(server, logprobs=20).answers(asked))) == 5 and len(server.batches) == 3


def test_faults_are_told(teacher):
    with Provider(ends=(0, "failed")) as server, pytest.raises(UserError, match="line 1 is no good"):
        list(teacher(server).answers(requests("a")))
    with Provider() as server:
        server.busy = 2
        assert len(list(teacher(server).answers(requests("a")))) == 1
        server.busy = 99
        with pytest.raises(UserError, match="busy"):
            list(teacher(server, retries=1).answers(requests("x")))
    with (
        Provider() as server,
        pytest.raises(UserError, match=r"answers 404: check .* leave teacher.server.batch out"),
    ):
        server.plain = True
        list(teacher(server).answers(requests("a")))
    with Provider() as server, pytest.raises(UserError, match="ceiling of 2 requests"):
        list(teacher(server, limits={"requests": 2}).answers(requests("a", "b", "c")))
    assert not server.batches


def test_other_peoples_batches_and_hostile_records_are_left_alone(teacher):
    with Provider() as server:
        (request,) = requests("a")
        line = json.dumps(
            {"custom_id": request.key, "response": {"status_code": 200, "body": answer("forged")}}
        ).encode()
        server.files |= {"file-x": line}
        theirs = {"object": "batch", "status": "completed", "input_file_id": "file-x", "output_file_id": "file-x"}
        ours = {"made_by": "limbeck", "model": MODEL}
        server.batches = [
            {"id": "batch_their", **theirs, "metadata": None}, {"id": "batch_path", **theirs, "metadata": ours, "input_file_id": "../../secret"},
            {"id": "batch_other", **theirs, "metadata": ours | {"model": "other"}},
        ]  # fmt: skip
        ((_, found),) = teacher(server).answers([request])
    assert found.text == "fine" and server.billed == [request.key]


def test_lines_that_are_no_records_or_stand_twice(teacher):
    with Provider(ends=(0, "completed")) as server:
        end = server.end

        def spoilt(batch):
            end(batch)
            lines = server.files[batch["output_file_id"]].splitlines()
            other = lines[0].replace(b"fine", b"other")
            server.files[batch["output_file_id"]] = b"\n".join(
                [b"{cut", b"[]", b'{"custom_id": "nobody"}', lines[0], other, *lines[1:], b""]
            )

        server.end = spoilt
        found = list(teacher(server).answers(requests("a", "b")))
    assert [one.text for _, one in found] == ["fine", "fine"] and len({request.key for request, _ in found}) == 2


def test_a_recipe_through_batches(recipe_data, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.models.batch.FIRST_WAIT", 0.01)
    with Provider(lambda body: answer("the cat sat"), ends=(0, "completed")) as server:
        settings = {
            "teacher": {"server": {"url": server.url, "name": MODEL, "batch": True}}, "student": {"start": {"pretrained": str(tiny_folder)}},
            "loss": ["cross_entropy"], "evaluate": {**recipe_data["evaluate"], "metrics": ["fidelity"]},
        }  # fmt: skip
        folder = run(parse({**recipe_data, **settings}), tmp_path / "run").folder
        assert len(server.billed) == len(set(server.billed)) and not [
            path for path, _, _ in server.seen if "completions" in path
        ]
    assert (folder / "report.html").exists()
