"""The writer behind a vLLM server, against a server on this machine that speaks as vLLM 0.32 does.

Every answer has the shape of one that the real program gave (tests/fixtures/vllm-0.32, written by tests/engines/record_vllm.py). The
text is a tiny model's, drawn by our own `write`. The program itself is tested in tests/engines/test_vllm.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from copy import deepcopy
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.config.recipe import parse
from limbeck.models import vllm
from limbeck.models.generate import Decoding, GenerationJob, write
from limbeck.models.model import Model
from limbeck.models.vllm import RESET, VllmWriter, look
from limbeck.models.vllm_protocol import Patience, StudentTokens
from limbeck.training.student_writer import _ask_server
from limbeck.types import Sampling, UserError
from tests.conftest import make_net, make_tokenizer
from tests.recorded import recorded

NAME, SECRET = "student", "sk-very-secret-9"
FREE = Sampling(1.0, 1.0, 12)
QUICK = Patience(connect=5.0, answer=20.0, budget=30.0, tries=3, pause=0.01)  # the machine may be busy


def error(status, message):
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def refused(name, told, instead):
    status, answer = recorded(name)
    assert told in answer["error"]["message"]
    return status, {"error": answer["error"] | {"message": answer["error"]["message"].replace(told, instead)}}


known = {}


def drawn(net, job, ends):
    """What these weights write, and the log-probability of their likeliest first token; remembered, as most tests ask for the same."""
    key = tuple(float(tensor.detach().double().square().sum()) for tensor in net.parameters()), job, ends
    if key not in known:
        (text,) = write(net, [job], ends, decoding=Decoding(record=True))
        with torch.inference_mode():
            best = net(torch.tensor([job.prompt_ids])).logits[0, -1].log_softmax(-1).max()
        known[key] = text, float(best)
    return deepcopy(known[key])


class Vllm(ThreadingHTTPServer):
    """`seen` logs the requests; `bend(path, body, answer)` may change an answer (status, content, headers...) or return None;
    `failures` are the handlers' own exceptions."""

    daemon_threads = True

    def __init__(self, net):
        super().__init__(("127.0.0.1", 0), Handler)
        self.net, self.seen, self.lock = net, [], threading.Lock()
        self.bend = lambda path, body, answer: answer
        self.failures = []
        self.stale, self.version = False, "default"
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no news; anything else would look like a broken connection, and be asked for again."""
        if not isinstance(error := sys.exception(), ConnectionError):
            self.failures.append(error)

    def answer(self, path, body):
        if path == "/v1/models":
            status, models = recorded("models")
            models["data"][0] |= {"id": NAME, "max_model_len": 256}
            return status, models
        plain = {"/version": "version", "/pause?mode=wait": "pause", "/resume": "resume", RESET: "reset"}
        if path in plain:
            return recorded(plain[path])
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, recorded("weight-version")[1] | {"new_version": self.version}
        if path == "/weight_info":
            return 200, recorded("weight-info")[1] | {"weight_version": self.version}
        if path == "/collective_rpc":
            if "method" not in body:
                return recorded("reload-without-method")
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            if not self.stale:
                self.net.load_state_dict(weights, strict=False)
            return recorded("reload")
        return self.completion(body) if path == "/v1/completions" else (404, {"detail": "Not Found"})

    def completion(self, body):
        rows = self.net.config.vocab_size
        if wrong := [int(token) for token in body["logit_bias"] or {} if int(token) >= rows]:
            return refused("out-of-vocabulary", "[300]", str(wrong))
        if body["temperature"] > 2:
            return recorded("too-hot")
        sampling = Sampling(body["temperature"], body["top_p"], body["max_tokens"])
        job = GenerationJob(tuple(body["prompt"]), sampling, body["seed"])
        with self.lock:
            text, best = drawn(self.net, job, frozenset(body["stop_token_ids"]))
        stopped = text.ids[-1] in body["stop_token_ids"]
        names = [f"token_id:{token}" for token in text.ids]
        top = [{names[0]: text.log_prob[0], "likeliest": best}] if body["logprobs"] else [{} for _ in names]
        status, answer = recorded("completion-ended" if stopped else "completion")
        answer["model"], choice = NAME, answer["choices"][0]
        choice |= {"token_ids": text.ids, "prompt_token_ids": body["prompt"]}
        choice["stop_reason"] = text.ids[-1] if stopped else None
        choice["logprobs"] |= {"text_offset": [0] * len(names), "token_logprobs": text.log_prob, "tokens": names}
        choice["logprobs"]["top_logprobs"] = top
        answer["usage"] |= {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(names)}
        return status, answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms for each answer otherwise

    def log_message(self, *_):
        pass

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.command, self.path, body, dict(self.headers)))
        status, content, *headers = self.server.bend(self.path, body, self.server.answer(self.path, body))
        if status is None:  # hang up without a word
            self.close_connection = True
            return
        raw = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers[0] if headers else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET


@pytest.fixture(scope="module")
def tiny():
    tokenizer = make_tokenizer()
    return Model(make_net(layers=1, vocab_size=len(tokenizer)), tokenizer, "student")


@pytest.fixture
def server(tiny):
    made = Vllm(make_net(layers=1, vocab_size=len(tiny.tokenizer)))
    yield made
    made.shutdown()
    made.server_close()
    assert not made.failures


@pytest.fixture
def writer(server, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    return VllmWriter(
        server.url + "/v1/", tmp_path / "weights", StudentTokens(tiny.eos_ids, tiny.vocab_size), patience=QUICK
    )


def prompt(tiny, text="why is the sky blue"):
    return tiny.prompt_ids(({"role": "user", "content": text},))


def jobs_of(tiny, count=1, sampling=FREE):
    return [GenerationJob(prompt(tiny, f"why is the sky {number}"), sampling, number) for number in range(count)]


def completions(change):
    """Changes the answers to completions: `change` gets the answer and its one choice, and may return another answer."""

    def bend(path, body, answer):
        if path == "/v1/completions" and answer[0] == 200:
            other = change(answer[1], answer[1]["choices"][0])
            return answer if other is None or not isinstance(other, tuple) else other
        return answer

    return bend


def paths(server):
    return [path for _, path, _, _ in server.seen]


def test_answers_come_back_exact_and_in_order(server, writer, tiny):
    jobs = jobs_of(tiny, 12) + jobs_of(tiny, 2, Sampling(0.0, 0.5, 9))
    server.bend = completions(lambda answer, choice: time.sleep(0.001 * (len(choice["prompt_token_ids"]) * 7 % 5)))
    want = sorted(write(tiny.net, jobs, tiny.eos_ids, decoding=Decoding(record=True)), key=lambda text: text.index)
    got = writer.write(jobs)
    assert [text.index for text in got] == list(range(14))
    assert [text.ids for text in got] == [text.ids for text in want] and len({len(text.ids) for text in got}) > 1
    for ours, theirs in zip(got, want, strict=True):
        assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
        assert ours.sampler_log_prob == pytest.approx(theirs.sampler_log_prob, abs=1e-4)
        assert ours.own_tokens == theirs.own_tokens == len(ours.ids)
    assert writer.write([]) == []


def test_what_is_asked_leaves_nothing_to_the_servers_defaults(server, writer, tiny):
    job = GenerationJob(prompt(tiny), FREE, 2**60)
    writer.write([job])
    assert server.seen[-1][2] == {
        "model": NAME, "prompt": job.prompt_ids, "max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 2**60, "n": 1,
        "stream": False, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True,
        "stop_token_ids": [0], "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "min_tokens": 0, "logit_bias": None,
    }  # fmt: skip


def test_padding_of_the_head_is_never_drawn(server, writer, tiny):
    server.net = make_net(layers=1, vocab_size=tiny.vocab_size + 3)
    writer.tokens = replace(writer.tokens, head_rows=tiny.vocab_size + 3)
    server.bend = lambda path, body, answer: answer
    with pytest.raises(UserError, match="the tokenizer has"):  # our server does not know biases
        for seed in range(200):
            writer.write([GenerationJob(prompt(tiny), Sampling(1.0, 1.0, 64), seed)])
    assert server.seen[-1][2]["logit_bias"] == {str(tiny.vocab_size + number): -100.0 for number in range(3)}


def given(choice, ids, finish, reason, log_probs):
    choice |= {"token_ids": ids, "finish_reason": finish, "stop_reason": reason}
    every = [*ids, 0] if log_probs > len(ids) else ids
    choice["logprobs"] |= {"token_logprobs": [-1.0] * log_probs, "tokens": [f"token_id:{token}" for token in every]}


@pytest.mark.parametrize(
    ("ids", "finish", "reason", "log_probs", "want"),
    [
        ([5, 6, 0], "stop", None, 3, [5, 6, 0]),  # as an end-of-sequence token is told
        ([5, 6, 0], "stop", 0, 3, [5, 6, 0]),  # as a stop token is told
        ([5, 6], "stop", None, 3, [5, 6, 0]),  # left out of the ids, with its log-probability beside them
        ([5, 6], "stop", 0, 3, [5, 6, 0]),
        ([], "stop", 0, 1, [0]),
        ([5, 6, 7, 8], "length", None, 4, [5, 6, 7, 8]),
        ([5, 6, 7, 0], "stop", 0, 4, [5, 6, 7, 0]),
        ([5, 6], "stop", 0, 2, "log-probabilities"),  # left out of both
        ([5, 6, 9], "stop", 9, 3, "no end token of the student"),
        ([5, 6], "stop", "word", 2, "no end token of the student"),
        ([5, 6, 0], "stop", "word", 3, "not its end"),
        ([5, 0, 6, 0], "stop", 0, 4, "past the end"),
        ([5, 0, 6, 7], "length", None, 4, "past the end"),
        ([5, 6, 7, 8, 9], "length", None, 5, "past the end"),
        ([5, 6, 7, 8], "stop", 0, 5, "past the end"),
        ([5, 6], "length", None, 2, "--max-model-len"),
        ([5, 6], "abort", None, 2, "gave up"),
        ([5, 6], None, None, 2, "gave up"),
    ],
)  # fmt: skip
def test_the_end_token_stands_at_the_end(server, writer, tiny, ids, finish, reason, log_probs, want):
    server.bend = completions(lambda answer, choice: given(choice, ids, finish, reason, log_probs))
    jobs = jobs_of(tiny, 1, Sampling(1.0, 1.0, 4))
    if isinstance(want, list):
        (text,) = writer.write(jobs)
        assert text.ids == want and text.log_prob == text.sampler_log_prob == [-1.0] * len(want)
    else:
        with pytest.raises(UserError, match=want):
            writer.write(jobs)


def test_of_several_end_tokens_the_one_left_out_must_be_named(server, writer, tiny):
    writer.tokens = replace(writer.tokens, eos_ids=frozenset({0, 3}))
    server.bend = completions(lambda answer, choice: given(choice, [5], "stop", None, 2))
    with pytest.raises(UserError, match="no end token"):
        writer.write(jobs_of(tiny))
    server.bend = completions(lambda answer, choice: given(choice, [5, 3], "stop", 3, 2))
    assert writer.write(jobs_of(tiny))[0].ids == [5, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer, choice: choice.pop("token_ids"), "sends no token_ids.*0.10.2"),
        (lambda answer, choice: choice.update(token_ids=["5"]), "sends no token_ids"),
        (lambda answer, choice: choice.update(prompt_token_ids=None), "sends no prompt_token_ids"),
        (lambda answer, choice: choice["prompt_token_ids"].pop(), "another prompt"),
        (lambda answer, choice: choice.update(logprobs=None), "0 log-probabilities"),
        (lambda answer, choice: choice["logprobs"]["token_logprobs"].pop(), "log-probabilities came with"),
        (lambda answer, choice: choice["logprobs"].update(tokens=["a"]), "other tokens"),
        (lambda answer, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None), "raw_logprobs"),
        (lambda answer, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, 3.5), "raw_logprobs"),
        (lambda answer, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan")), "raw_logprobs"),
        (lambda answer, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, -9999.0), "raw_logprobs"),
        (lambda answer, choice: choice["token_ids"].__setitem__(0, 300), "wrote token"),
        (lambda answer, choice: choice["token_ids"].__setitem__(0, -1), "wrote token"),
        (lambda answer, choice: answer.update(model="other"), "answered as other"),
        (lambda answer, choice: answer.update(choices=[]), "0 answers for one"),
        (lambda answer, choice: answer.update(choices=[choice, choice]), "2 answers for one"),
        (lambda answer, choice: (200, [1]), "answered as None"),
        (lambda answer, choice: (200, b"<html>"), "not JSON"),
        (lambda answer, choice: (200, b"[" * 100_000), "not JSON"),
        (lambda answer, choice: (200, b" " * 2**21), "bytes"),
        (lambda answer, choice: (500, b""), "status 500"),
        (lambda answer, choice: (401, {"error": f"Unauthorized {SECRET}"}), "VLLM_API_KEY"),
        (lambda answer, choice: error(400, "Token id 9 is out\nof \x1b[1mvocabulary"), r"status 400: Token id 9 is out of"),
    ],
)  # fmt: skip
def test_answers_that_are_not_what_was_asked_are_refused(server, writer, tiny, change, words):
    server.bend = completions(change)
    with pytest.raises(UserError, match=words) as found:
        writer.write(jobs_of(tiny, 1, Sampling(1.0, 1.0, 4)))
    assert (
        server.url in str(found.value)
        and ";" in str(found.value)
        and SECRET not in str(found.value)
        and "\x1b" not in str(found.value)
    )


@pytest.mark.parametrize(
    ("busy", "least"),
    [
        ([(503, {"error": {"message": "busy"}})], [0.0]),
        ([(429, None, {"Retry-After": "7"}), (503, None)], [7.0, 0.0]),
        ([(503, None, {"Retry-After": 20})], [9.0]),  # as a date
        ([(503, None, {"Retry-After": -9})], [0.0]),
        ([(503, None, {"Retry-After": "soon"})], [0.0]),
        ([(None, None)], [0.0]),
    ],
)
def test_a_busy_server_is_asked_again(server, writer, tiny, busy, least):
    for _, _, *headers in busy:
        for header in headers:
            if isinstance(header["Retry-After"], int):
                header["Retry-After"] = formatdate(time.time() + header["Retry-After"], usegmt=True)
    answers, waits = iter(busy), []

    async def noted(seconds):
        waits.append(seconds)

    writer.write(jobs_of(tiny))  # it knows the model's name now
    server.bend = completions(lambda answer, choice: next(answers, None))
    writer.sleep = noted
    server.seen.clear()
    assert len(writer.write(jobs_of(tiny))) == 1
    assert paths(server) == ["/v1/completions"] * (len(busy) + 1)
    assert all(low <= wait <= low + 20 and wait > 0 for low, wait in zip(least, waits, strict=True))


@pytest.mark.parametrize(
    ("always", "tries", "words"),
    [
        ((503, None), 3, "3 times .status 503"),
        ((None, None), 3, "3 times .RemoteProtocolError"),
        ((503, None, {"Retry-After": "3600"}), 1, "longer than the 30 s of its budget .status 503"),
        ((307, None, {"Location": "http://127.0.0.1:9/v1/completions"}), 1, "redirects are not followed"),
    ],
)
def test_patience_ends(server, writer, tiny, always, tries, words):
    server.bend = completions(lambda answer, choice: always)
    with pytest.raises(UserError, match=words):
        writer.write(jobs_of(tiny))
    assert paths(server).count("/v1/completions") == tries


@pytest.mark.parametrize("slow", ["silent", "dripping"])
@pytest.mark.promise("R10")
def test_a_server_that_hangs_is_left(server, writer, tiny, slow):
    over = threading.Event()

    def hang(path, body, answer):
        if path == "/v1/completions":
            over.wait(3)
        return answer

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")

    writer.write(jobs_of(tiny))  # it knows the model's name now
    server.bend, writer.patience = hang, replace(QUICK, answer=0.2)
    if slow == "dripping":
        server.RequestHandlerClass = type("Dripping", (Handler,), {"do_POST": drip})
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer to /v1/completions in time"):
        writer.write(jobs_of(tiny, 3))
    over.set()
    assert time.monotonic() - began < 2.5


def test_no_server_at_all(server, writer, tiny):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"3 times .ConnectError.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        writer.write(jobs_of(tiny))


def test_requests_under_way_are_limited_and_end_when_asked_to(server, writer, tiny):
    now, most, both, over, asked = [], [], threading.Barrier(2), threading.Event(), []

    def hold(answer, choice):
        now.append(1)
        most.append(len(now))
        both.wait(5)
        now.pop()

    server.bend, writer.concurrency = completions(hold), 2
    assert len(writer.write(jobs_of(tiny, 8))) == 8 and max(most) == 2
    server.bend = completions(lambda answer, choice: over.wait(5) if len(choice["prompt_token_ids"]) > 60 else None)
    long = GenerationJob(prompt(tiny, "a cat " * 30), FREE, 0)
    finished = writer.write([long, *jobs_of(tiny, 2)], stop=lambda: asked.append(1) or len(asked) == 4)
    over.set()
    assert [text.index for text in finished] == [1, 2]


def test_the_key_goes_to_the_server_and_nowhere_else(server, writer, tiny, monkeypatch):
    writer.sync(tiny.net, tiny.tokenizer)
    writer.write(jobs_of(tiny, 2))
    assert {headers["Authorization"] for _, _, _, headers in server.seen} == {f"Bearer {SECRET}"}
    bare = [
        (path, body, {k: v for k, v in headers.items() if k != "Authorization"})
        for _, path, body, headers in server.seen
    ]
    assert SECRET not in str(bare) and SECRET not in repr(writer) + str(vars(writer))
    assert not [file for file in writer.folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    monkeypatch.setenv("VLLM_API_KEY", f"{SECRET}\n")
    with pytest.raises(UserError, match="VLLM_API_KEY") as found:
        writer.write(jobs_of(tiny))
    assert SECRET not in str(found.value)
    monkeypatch.delenv("VLLM_API_KEY")
    writer.write(jobs_of(tiny))
    assert "Authorization" not in server.seen[-1][3]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://me:word@host", "http://host?key=1"])
def test_addresses(url, tmp_path):
    with pytest.raises(UserError, match="http://localhost:8000") as found:
        VllmWriter(url, tmp_path, StudentTokens(frozenset({0}), 10))
    assert "word@" not in str(found.value)


def test_draws_that_it_cannot_account_for(writer, tiny):
    for sampling in (Sampling(0.7, 1.0, 4), Sampling(1.0, 0.9, 4)):
        with pytest.raises(UserError, match="temperature 1 and top_p 1"):
            writer.write(jobs_of(tiny, 1, sampling))
    with pytest.raises(UserError, match="in process only"):
        writer.write([GenerationJob([1], FREE, 0, [2])])
    with pytest.raises(UserError, match="tokens of its 256"):
        writer.write(jobs_of(tiny, 1, Sampling(1.0, 1.0, 250)))


def test_it_writes_where_a_loop_runs_already(writer, tiny):
    async def notebook():
        return writer.write(jobs_of(tiny, 2))

    assert len(asyncio.run(notebook())) == 2


# Weights


def trained(tiny):
    """The student some way on: far enough that its log-probabilities tell."""
    net = make_net(layers=1, vocab_size=tiny.vocab_size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return net


ORDER = ["/pause?mode=wait", "/collective_rpc", RESET, "/update_weight_version", "/resume"]


def test_sync_gives_the_server_the_students_weights(server, writer, tiny, monkeypatch):
    net, jobs = trained(tiny), jobs_of(tiny, 4)
    seen = []
    monkeypatch.setattr(
        server, "bend", lambda path, body, answer: seen.append(sorted(writer.folder.iterdir())) or answer
    )
    writer.sync(net, tiny.tokenizer)
    assert paths(server) == ORDER
    call = server.seen[1][2]
    (folder,) = seen[1]
    assert call == {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    want = {text.index: text.ids for text in write(net, jobs, tiny.eos_ids)}
    assert [text.ids for text in writer.write(jobs)] == [want[index] for index in range(4)]
    sent, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"]) and not config["tie_word_embeddings"]
    writer.sync(tiny.net, tiny.tokenizer)
    assert len(list(writer.folder.iterdir())) == 1 and folder not in writer.folder.iterdir()


def test_the_server_may_know_the_folder_by_another_name(server, writer, tiny, tmp_path):
    (tmp_path / "there").symlink_to(tmp_path / "weights")
    writer.server_folder = str(tmp_path / "there") + "/"
    writer.sync(tiny.net, tiny.tokenizer)
    assert server.seen[1][2]["kwargs"]["weights_path"].startswith(str(tmp_path / "there/weights-"))


@pytest.mark.parametrize(
    ("broken", "status", "left", "words"),
    [
        ("/pause?mode=wait", 404, ORDER[:4], None),  # older servers
        ("/update_weight_version", 404, ORDER, None),
        ("/pause?mode=wait", 500, ORDER[:1], "/pause.* status 500"),
        ("/collective_rpc", 404, [*ORDER[:2], ORDER[4]], "can't be reloaded.*VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", 500, ORDER[:2], "status 500.*recent vLLM"),  # it stays paused: its weights may be mixed
        (RESET, 404, ORDER[:3], "status 404"),
        (RESET, 200, ORDER[:3], "did not drop what it computed"),
    ],
)
def test_a_server_that_does_not_take_weights(server, writer, tiny, broken, status, left, words):
    said = {"success": False} if status == 200 else {"detail": "Not Found"}
    server.bend = lambda path, body, answer: (status, said) if path == broken else answer
    if words is None:
        writer.sync(tiny.net, tiny.tokenizer)
    else:
        with pytest.raises(UserError, match=words):
            writer.sync(tiny.net, tiny.tokenizer)
    assert paths(server) == left


def test_a_server_that_keeps_its_old_weights_is_found_out(server, writer, tiny):
    writer.probe(tiny.net, prompt(tiny))
    writer.sync(trained(tiny), tiny.tokenizer)
    server.stale = True
    with pytest.raises(UserError, match="nats off the student's"):
        writer.sync(tiny.net, tiny.tokenizer)


def test_a_server_that_lost_the_weights_is_noticed(server, writer, tiny):
    writer.sync(tiny.net, tiny.tokenizer)
    assert writer.holds_them() and server.version.startswith("weights-")
    server.version = "default"  # it was started again
    assert not writer.holds_them()
    server.bend = lambda path, body, answer: (404, None) if "weight_" in path else answer  # before 0.32
    writer.sync(tiny.net, tiny.tokenizer)
    assert writer.holds_them()


def test_what_a_server_wrote_with_lost_weights_is_written_again(server, writer, tiny):
    def forget(path, body, answer):
        if path == "/v1/completions" and lost:
            lost.pop()
            server.version = "default"
        return answer

    lost, server.bend = [1], forget
    texts = _ask_server(tiny, writer, lambda: False, jobs_of(tiny, 2))
    assert len(texts) == 2 and paths(server).count("/collective_rpc") == 2
    lost = [1] * 99
    with pytest.raises(UserError, match=r"lost the student's weights 3 times while it wrote.*run it again"):
        _ask_server(tiny, writer, lambda: False, jobs_of(tiny, 2))


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (lambda path, body, answer: recorded("unauthorized"), r"401.*set the environment variable VLLM_API_KEY"),
        (lambda path, body, answer: (404, None) if path == "/collective_rpc" else answer, "VLLM_SERVER_DEV_MODE=1"),
        (lambda path, body, answer: (200, {"data": []}), "it serves"),
        (lambda path, body, answer: (None, None), "RemoteProtocolError"),
    ],
)  # fmt: skip
def test_a_look_at_the_server_finds_what_would_stop_it_later(server, bend, words):
    assert look(server.url + "/v1", None) == look(server.url, NAME) == NAME
    assert set(paths(server)) == {"/v1/models", "/collective_rpc"} and server.version == "default"
    server.bend = bend
    with pytest.raises(UserError, match=words):
        look(server.url, None)


def test_a_run_looks_at_its_writer_before_the_teacher_writes(server, recipe_data, tmp_path, monkeypatch):
    recipe_data |= {
        "writer": [{"by": "student", "max_tokens": 8}],
        "loss": ["reverse_kl"],
        "rollout": {"through": {"vllm": server.url}},
    }
    recipe_data["train"] |= {"steps": 3}
    server.bend = lambda path, body, answer: recorded("unauthorized")
    with pytest.raises(limbeck.RecipeError, match=r"rollout.through: .*VLLM_API_KEY") as found:
        limbeck.run(parse(recipe_data), tmp_path / "out")
    assert found.value.path == "rollout.through" and not (tmp_path / "out" / "store.sqlite").exists()
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_data))
    told = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml")])
    assert told.exit_code == 2 and "can't run yet" in told.stdout and "VLLM_API_KEY" in told.stdout
    server.bend = lambda path, body, answer: answer
    told = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml"), "--json"])
    (seen,) = json.loads(told.stdout)["servers"]
    assert told.exit_code == 0 and seen == {
        "place": "rollout.through",
        "seen": f"{NAME}, which takes weights",
        "fault": "",
    }


def test_later_weights_are_held_to_what_was_seen_first(server, writer, tiny):
    """In float32 a few hundredths of a nat are other weights: the head of some steps ago, which 0.3 nats would let pass."""
    writer.sync(tiny.net, tiny.tokenizer)
    assert writer.probe(tiny.net, prompt(tiny)).difference < 1e-3
    server.stale, near = True, make_net(layers=1, vocab_size=tiny.vocab_size)
    with torch.no_grad():
        near.lm_head.weight *= 1.02
    with pytest.raises(UserError, match=r"its log-probabilities are 0\.0\d+ nats off"):
        writer.sync(near, tiny.tokenizer)


class Adapted(nn.Module):
    """What peft's LoRA layers look like from outside."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.merged, self.active_adapters = base, False, ["default"]
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def get_delta_weight(self, adapter):
        return self.lora_B.weight @ self.lora_A.weight

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


def test_adapters_are_folded_into_what_is_sent(server, writer, tiny):
    net = trained(tiny)
    net.model.layers[0].mlp.up_proj = Adapted(net.model.layers[0].mlp.up_proj)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    writer.sync(net, tiny.tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    ids = torch.tensor([prompt(tiny)])
    with torch.no_grad():
        assert torch.allclose(server.net(ids).logits, net(ids).logits, atol=1e-4)


# Looking at the server


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_probe_tells_what_the_server_is(server, writer, tiny, mode):
    def bend(answer, choice):
        if mode == "processed" and choice["logprobs"]["top_logprobs"][0]:
            choice["logprobs"]["top_logprobs"] = [{"likeliest": -5.6}]  # a hot, flat distribution

    server.bend = completions(bend)
    found = writer.probe(tiny.net, prompt(tiny))
    assert (found.model, found.context, found.version, found.log_probs) == (
        NAME,
        256,
        "0.32.0",
        mode,
    ) and found.difference < 1e-3


def seeds(server, seed):
    """The server as if it were asked with another seed and temperature."""
    asked = server.completion
    server.completion = lambda body: asked(body | seed(body))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda server, tiny: seeds(server, lambda body: {"seed": len(server.seen)}), "one seed gave two texts"),
        (lambda server, tiny: seeds(server, lambda body: {"temperature": 0.0}), "the same text for every seed"),
        (lambda server, tiny: setattr(server, "net", make_net(vocab_size=400)), "more than the student's"),
        (lambda server, tiny: setattr(server, "net", make_net(vocab_size=100)), "out-of-vocab"),
        (lambda server, tiny: setattr(server, "net", trained(tiny)), "nats off"),
        (lambda server, tiny: setattr(server, "bend", lambda path, body, answer: (200, {"data": []})), "it serves"),
        (lambda server, tiny: setattr(server, "bend", lambda path, body, answer: (200, {"data": 7})), "it serves"),
    ],
)
def test_probe_refuses(server, writer, tiny, spoil, words):
    spoil(server, tiny)
    with pytest.raises(UserError, match=words):
        writer.probe(tiny.net, prompt(tiny))


def test_of_several_models_one_is_named(server, writer, tiny):
    cards = [{"id": NAME}, {"id": "other"}, {"id": "adapter", "parent": NAME}]
    server.bend = lambda path, body, answer: (200, {"data": cards}) if path == "/v1/models" else answer
    with pytest.raises(UserError, match=r"it serves .*other.*served-model-name"):
        writer.write(jobs_of(tiny))
    writer.model = NAME
    assert len(writer.write(jobs_of(tiny))) == 1


def test_nothing_about_it_needs_vllm_here():
    assert "import vllm" not in Path(vllm.__file__).read_text()


def test_a_training_writes_through_the_server(server, recipe_data, tmp_path, monkeypatch):
    """The loop knows no difference: at each step the server gets the weights, then the prompts; what comes back is trained."""
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    recipe_data |= {
        "writer": [{"by": "student", "max_tokens": 8}],
        "loss": ["reverse_kl"],
        "rollout": {"through": {"vllm": server.url}},
    }
    recipe_data["student"] = {"start": {"prune": {"layers": 1, "keep": "uniform"}}}
    recipe_data["evaluate"] |= {"controls": ["untouched"]}
    recipe_data["train"] |= {"steps": 3}
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out, stages=("elicit", "train"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    asked = [path for _, path, *_ in server.seen]
    assert asked[:2] == ["/v1/models", "/collective_rpc"], "a look before anything is spent"
    assert asked.count("/collective_rpc") == 1 + 1 + 3, "once to probe the server, then before each writing"
    answers = sum(record["rollout"]["written"] for record in records)
    assert asked.count("/v1/completions") >= answers > 0
    assert all(record["response_tokens"] == record["rollout"]["tokens"] for record in records)
    recipe_data["writer"][0]["temperature"] = 0.7
    with pytest.raises(limbeck.RecipeError, match="plain draws only"):
        limbeck.check(parse(recipe_data))
