"""Hidden states over a wire: the local teacher's to the bit, through kills, and refused where they are not what was asked for."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from dataclasses import replace

import httpx2
import pytest
import torch
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.commands import serve_states
from limbeck.commands.doctor.run import examine
from limbeck.commands.serve_states import StatesServer, _Handler
from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.head import Head
from limbeck.objectives.term import make_term
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.signals.wire import head_from, opened, plain_head, sealed
from limbeck.training.job import Objective, TrainingJob
from limbeck.training.loop import backward
from limbeck.types import RecipeError, Sampling, UserError
from tests.conftest import make_net, make_tokenizer

KEY = "sk-canary-4711"
TEXTS = [("why is the sky blue", "the sky is blue"), ("count", "one two three"), ("a dog", "ran")]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", KEY)


class Serving:
    """A states server in this process; `spoil(path, body)` may change what it sends, or hang up by returning None."""

    def __init__(self, model, port=0, spoil=lambda path, body: body, name="toy", contents="c", **settings):
        class Handler(_Handler):
            def _send(self, status, content):
                serving.seen.append((self.path, status))
                serving.spoil_and_send(self, status, content, super()._send)

        self.seen, self.spoil, serving = [], spoil, self
        limits = {"context": 256, "slots": 4} | settings
        self.server = StatesServer(model, name, contents, KEY, address=("127.0.0.1", port), **limits)
        self.server.RequestHandlerClass = Handler
        self.url, self.port = self.server.url, self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def spoil_and_send(self, handler, status, content, send):
        changed = self.spoil(handler.path, content)
        if changed is None:
            handler.close_connection = True
        elif isinstance(changed, tuple):  # (bytes, how many of them are sent)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(changed[0])))
            handler.end_headers()
            handler.wfile.write(changed[0][: changed[1]])
        else:
            send(status, changed)

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def asked(self, path="/v1/states"):
        return len([one for one in self.seen if one[0] == path])


def rows_of(model):
    return [
        Row(str(n), tuple(model.prompt_ids(({"role": "user", "content": asked},))), (*model.text_ids(said), model.tokenizer.eos_token_id), frozenset())
        for n, (asked, said) in enumerate(TEXTS)
    ]  # fmt: skip


def api(url, **settings):
    return ApiTeacher(Served(**{"url": url, "name": "toy", "kind": "states", "retries": 0} | settings))


def remote(url, model, **settings):
    return StatesTeacher(api(url, **settings), model.tokenizer)


def losses(model, teacher, tmp_path):
    """Each divergence's loss and gradients for another student of these tokens."""
    batch, found = make_batch(rows_of(model)), {}
    for name in ("forward_kl", "reverse_kl", "jsd"):
        net = make_net(layers=2, seed=5, vocab_size=model.vocab_size)
        term = make_term(name, {})
        objective = Objective(net, [term], teacher=teacher.view)
        job = TrainingJob(objective, rows_of(model), None, tmp_path, key="x")
        sums = backward(job, batch, [term.at_step(0, {})], {term.label: batch.amount("token")})
        found[name] = sums.terms[term.label], {name: p.grad for name, p in net.named_parameters()}
    return found


def test_loss_and_gradient_are_the_local_teachers_to_the_bit(tiny, tmp_path):
    with Serving(tiny) as serving:
        teacher = remote(serving.url, tiny)
        teacher.probe()
        far = losses(tiny, teacher, tmp_path)
        assert serving.asked("/v1/states/head") == 1, "the head comes once"
        rounded = losses(tiny, remote(serving.url, tiny, wire="bfloat16"), tmp_path)
        identities = teacher.identity, remote(serving.url, tiny, wire="bfloat16").identity
    near = losses(tiny, InProcessTeacher(tiny), tmp_path)
    for name, (loss, gradients) in near.items():
        assert far[name][0] == loss and loss > 0.1
        assert all(torch.equal(far[name][1][parameter], gradient) for parameter, gradient in gradients.items())
        assert rounded[name][0] == pytest.approx(loss, rel=0.02) and rounded[name][0] != loss
    assert identities[1] == identities[0] + "+bfloat16"


def test_a_head_with_bias_scale_cap_and_adapter_survives_the_wire():
    head = Head(
        torch.randn(7, 5),
        bias_V=torch.randn(7),
        scale=0.5,
        softcap=30.0,
        low_rank=(torch.randn(2, 5), torch.randn(7, 2), 0.25),
    )
    tensors, numbers = plain_head(head)
    again = head_from(*opened(sealed(tensors, numbers)))
    hidden_ND = torch.randn(3, 5)
    assert torch.allclose(again.logits(hidden_ND), head.logits(hidden_ND), atol=1e-6)
    with pytest.raises(ValueError, match="no whole"):
        opened(sealed(tensors, numbers)[:-1])
    with pytest.raises(ValueError, match="SHA-256"):
        body = bytearray(sealed(tensors, numbers))
        body[-1] ^= 1
        opened(bytes(body))


def test_micro_batches_are_asked_for_ahead_and_each_once(tiny):
    batches = [make_batch(rows_of(tiny)[n:]) for n in range(3)]
    with Serving(tiny) as serving:
        teacher = remote(serving.url, tiny)
        teacher.expect(batches)
        first = teacher.view(batches[0])
        until = time.monotonic() + 5
        while serving.asked() < 3 and time.monotonic() < until:  # who it is, and two micro-batches
            time.sleep(0.01)
        assert serving.asked() == 3, "the second is under way before it is needed"
        later = [teacher.view(batch) for batch in batches[1:]]
        assert serving.asked() == 4
        again = teacher.view(batches[0])  # not expected: asked for now
    assert torch.equal(first.signal.hidden_NE, again.signal.hidden_NE)
    for batch, view in zip(batches[1:], later, strict=True):
        assert torch.equal(view.signal.hidden_NE, InProcessTeacher(tiny).signal(batch).hidden_NE)


def recipe_of(recipe_data, teacher, student, **changes):
    evaluate = {**recipe_data["evaluate"], "metrics": ["fidelity"], "limit": 2, "controls": ["untouched"]}
    return {**recipe_data, "teacher": teacher, "student": {"start": {"pretrained": str(student)}}, "evaluate": evaluate, **changes}  # fmt: skip


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    make_net(layers=2, seed=5, vocab_size=len(make_tokenizer())).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_its_server_was_killed_and_started_again(tiny, tiny_folder, recipe_data, student, tmp_path):
    prompts = tmp_path / "corpus.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": a, "answer": b}) + "\n" for a, b in TEXTS * 1 + [("the", "mat")]))
    corpus = {"prompts": {"from": str(prompts)}, "writer": [{"by": "corpus"}]}
    near = run(parse(recipe_of(recipe_data, str(tiny_folder), student, **corpus)), tmp_path / "near", stages=("elicit", "train"))  # fmt: skip
    killed = threading.Event()

    def kill(path, body):
        if path == "/v1/states" and serving.asked() == 5:
            killed.set()
            return None  # in the midst of an answer
        return body

    serving = Serving(tiny, spoil=kill)
    second = []

    def start_again():
        killed.wait(60)
        serving.stop()
        time.sleep(0.3)
        second.append(Serving(tiny, serving.port))

    thread = threading.Thread(target=start_again)
    thread.start()
    teacher = {"server": {"url": serving.url, "name": "toy", "kind": "states"}}
    far = run(parse(recipe_of(recipe_data, teacher, student, **corpus)), tmp_path / "far", stages=("elicit", "train"))
    thread.join()
    second[0].stop()
    assert second[0].asked() > 1 and serving.asked() >= 5
    losses = [[record["loss"] for record in trained(folder)] for folder in (near, far)]
    assert losses[0] == losses[1] and len(losses[0]) == 6 and losses[0][-1] < losses[0][0]


def test_a_whole_run_and_its_cache_with_a_teacher_elsewhere(tiny, recipe_data, student, tmp_path):
    with Serving(tiny) as serving:
        teacher = {"server": {"url": serving.url, "name": "toy", "kind": "states"}}
        data = recipe_of(recipe_data, teacher, student)
        assert check(parse(data)).requests > 0
        folder = run(parse(data), tmp_path / "run")
        kept = {**teacher, "cache": {"hidden": {"dtype": "float32"}}}
        cached = run(parse(recipe_of(recipe_data, kept, student)), tmp_path / "kept", stages=("elicit", "train"))
    assert (folder / "report.html").exists()
    assert json.loads((folder / "inputs.json").read_text())["server"].startswith("served:toy-")
    assert [r["loss"] for r in trained(folder)] == pytest.approx([r["loss"] for r in trained(cached)], rel=1e-5)


def other(tiny):
    return replace(tiny, net=make_net(seed=9, vocab_size=tiny.vocab_size), identity="other@1")


def test_another_model_behind_the_address_is_refused(tiny, recipe_data, student, tmp_path):
    serving = Serving(tiny)
    teacher = remote(serving.url, tiny, retries=3)
    batch = make_batch(rows_of(tiny))
    teacher.view(batch)
    serving.stop()
    with (
        Serving(other(tiny), serving.port),
        pytest.raises(UserError, match=r"another model than .*serve that one again"),
    ):
        teacher.view(batch)
    # in a run's folder, too
    with Serving(tiny) as serving:
        data = recipe_of(recipe_data, {"server": {"url": serving.url, "name": "toy", "kind": "states"}}, student)
        run(parse(data), tmp_path / "run", stages=("elicit",))
    with Serving(other(tiny), serving.port), pytest.raises(UserError, match="another --out"):
        run(parse(data), tmp_path / "run", stages=("train",))
    # and a head that is not the announced one
    foreign = sealed(*plain_head(InProcessTeacher(other(tiny)).signal(batch).head))
    spoil = lambda path, body: foreign if path.endswith("/head") else body  # noqa: E731
    with Serving(tiny, spoil=spoil) as serving, pytest.raises(UserError, match="another model"):
        remote(serving.url, tiny).view(batch)


def cut(path, body):
    return (body, len(body) // 2) if path == "/v1/states" and isinstance(body, bytes) else body


def changed(path, body):
    return body[:-1] + bytes([body[-1] ^ 1]) if path == "/v1/states" and isinstance(body, bytes) else body


def longer(path, body):
    return body + b"x" * 2**20 if path == "/v1/states" and isinstance(body, bytes) else body


def fewer(path, body):
    if path != "/v1/states" or not isinstance(body, bytes):
        return body
    tensors, facts = opened(body)
    return sealed({"hidden": tensors["hidden"][:-1]}, {"fingerprint": facts["fingerprint"]})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "no whole answer"),
        (changed, "damaged on its way"),
        (longer, "more than was asked"),
        (fewer, "other states"),
    ],
)
def test_a_damaged_answer_is_refused(spoil, words, tiny):
    with Serving(tiny, spoil=spoil) as serving, pytest.raises(UserError, match=words):
        remote(serving.url, tiny).view(make_batch(rows_of(tiny)))


def test_a_wrong_key_is_refused_everywhere(tiny, monkeypatch):
    with Serving(tiny) as serving:
        for path in ("/v1/states", "/v1/states/head", "/v1/models"):
            assert httpx2.get(serving.url.removesuffix("/v1") + path, trust_env=False).status_code == 401
        assert httpx2.post(f"{serving.url}/states", json={}, trust_env=False).status_code == 401
        monkeypatch.setenv("LIMBECK_API_KEY", "another-key")
        with pytest.raises(UserError, match="check the key, from the environment variable LIMBECK_API_KEY"):
            remote(serving.url, tiny).probe()


def announced(port, length):
    """The status of a request that says it will be so long, and sends nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/v1/states")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    with contextlib.closing(connection):
        return connection.getresponse().status


def test_requests_are_bounded(tiny):
    with Serving(tiny, context=64, slots=1) as serving:
        good = {"fingerprint": serving.server.facts["fingerprint"], "rows": [[1, 2, 3]], "from": [0]}

        def post(body, path="states", **more):
            headers = {"Authorization": f"Bearer {KEY}"}
            return httpx2.post(f"{serving.url}/{path}", headers=headers, trust_env=False, **({"json": body} | more))

        assert post(good).status_code == 200
        bad = {
            412: {"fingerprint": "x"},
            413: {"rows": [[1] * 65]},
            400: {"rows": [[1, 10**6]]},
        }
        for status, change in bad.items():
            assert post(good | change).status_code == status, change
        for change in (
            {"rows": [[1, True]]},
            {"from": [2]},
            {"from": [-1]},
            {"rows": []},
            {"rows": "x"},
            {"dtype": "int8"},
        ):
            assert post(good | change).status_code == 400, change
        assert post(good | {"rows": [[1] * 60] * 2, "from": [0, 0]}).status_code == 413
        assert announced(serving.port, serve_states.MAX_REQUEST_BYTES + 1) == 413
        assert post(None, content=b"[1]", json=None).status_code == 400
        chat = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
        assert post(chat, "chat/completions").status_code == 200
        for change in ({"logprobs": True}, {"max_tokens": 999}, {"temperature": "hot"}, {"messages": [{"role": 1}]}):
            assert post(chat | change, "chat/completions").status_code == 400, change
        for change in (
            {"max_tokens": 3.7},
            {"seed": 1.5},
            {"stop": [""]},
            {"max_tokens": 64.5},
            {"stop": [1, None]},
            {"stop": {"\n": 1}},
        ):
            assert post(chat | change, "chat/completions").status_code == 400, change
        for stop in (None, "", [], "\n", ["\n"]):
            assert post(chat | {"stop": stop}, "chat/completions").status_code == 200, stop
        plain = {"model": "toy", "prompt": "the cat", "max_tokens": 4}
        assert post(plain, "completions").status_code == 200
        for prompt in ([464, 11], ["the cat"], None, 7):
            told = post(plain | {"prompt": prompt}, "completions")
            assert told.status_code == 400 and "prompt must be a text" in told.text, prompt
        assert post(chat | {"model": "x"}, "chat/completions").status_code == 404
        assert serving.server.slots.acquire(blocking=False)  # somebody else waits
        assert post(good).status_code == 503 and post(good).headers["retry-after"] == "1"


def test_it_writes_the_models_own_text(tiny):
    scene = StepContext("toy", 7, "0/x")
    asked = [scene.request((user(text),), Sampling(max_tokens=9)) for text in ("count", "a dog")]
    raw = scene.request((), Sampling(max_tokens=5), raw="the cat")
    with Serving(tiny) as serving:
        far = {request.key: answer.text for request, answer in api(serving.url).answers([*asked, raw])}
    near = {request.key: answer.text for request, answer in InProcessTeacher(tiny).answers([*asked, raw])}
    assert far == near and any(near.values())


def test_other_tokens_and_templates_are_refused(tiny):
    more, framed = make_tokenizer(), make_tokenizer()
    more.add_tokens(["<extra>"])
    framed.chat_template = framed.chat_template.replace("<|user|>", "U")
    framed.chat_template = "User: " + framed.chat_template
    with Serving(tiny) as serving:
        for tokenizer, words in ((more, "vocabulary is not the student's"), (framed, "frames a conversation")):
            with pytest.raises(UserError, match=words):
                StatesTeacher(api(serving.url), tokenizer).probe()


def test_the_doctor_finds_the_served_model_to_be_the_one_here(tiny, tiny_folder, recipe_data, student, tmp_path):
    with Serving(tiny) as serving:
        server = {"url": serving.url, "name": "toy", "kind": "states"}
        both = recipe_of(recipe_data, {"model": str(tiny_folder), "server": server}, student)
        findings = {one.name: one for one in examine(parse(both), tmp_path / "run")}
        served = findings["served weights"]
        assert served.verdict == "fine" and "0.0000 nats apart" in served.detail and "20.0 of 20" in served.detail
        assert findings["server"].verdict == "fine" and "gives its hidden states" in findings["server"].detail
    with Serving(other(tiny), name="toy") as serving:
        both["teacher"]["server"]["url"] = serving.url
        findings = {one.name: one for one in examine(parse(both), tmp_path / "run")}
        assert findings["served weights"].verdict == "fault"


REFUSED = [
    ({"names": 5}, {}, "teacher.server.*leave batch, names and logprobs out"),
    ({"kind": "vllm", "wire": "bfloat16"}, {}, "set kind: states"),
    ({}, {"train": {"mixup": {"share": 1.0}}}, "train.mixup"),
    ({}, {"loss": [{"dual_space": {}}]}, "loss"),
]


@pytest.mark.parametrize(("server", "changes", "words"), REFUSED)
def test_what_states_cant_do_is_refused(server, changes, words, recipe_data, tiny_folder):
    teacher = {"server": {"url": "http://127.0.0.1:1/v1", "name": "toy", "kind": "states", **server}}
    changes = {
        key: {**recipe_data[key], **value} if isinstance(value, dict) else value for key, value in changes.items()
    }
    with pytest.raises(RecipeError, match=words):
        check(parse(recipe_of(recipe_data, teacher, tiny_folder, **changes)))


def test_the_command_says_how_a_recipe_names_it(tiny_folder, monkeypatch):
    monkeypatch.setattr(StatesServer, "serve_forever", lambda self: self.server_close())
    done = CliRunner().invoke(app, ["serve", str(tiny_folder), "--states", "--port", "0", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "teacher.server: {kind: states, url: http://127.0.0.1:" in done.output and "name: model}" in done.output
    assert KEY not in done.output
    monkeypatch.delenv("LIMBECK_API_KEY")
    assert "export LIMBECK_API_KEY=" in CliRunner().invoke(app, ["serve", str(tiny_folder), "--states"]).output
    refused = CliRunner().invoke(app, ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0"])
    assert "--states" in str(refused.exception)


def test_two_addresses_share_the_micro_batches_and_one_may_die(tiny):
    batches = [make_batch(rows_of(tiny)[n % 3 :]) for n in range(8)]
    with Serving(tiny) as a:
        b = Serving(tiny, spoil=lambda path, body: None if path == "/v1/states" and b.asked() > 1 else body)
        notes = []
        teacher = remote([a.url, b.url], tiny, retries=3)
        teacher.api.tell(notes.append)
        assert teacher.identity == remote(a.url, tiny).identity
        teacher.expect(batches)
        for batch in batches:
            found = teacher.view(batch).signal.hidden_NE
            assert torch.equal(found, InProcessTeacher(tiny).signal(batch).hidden_NE)
        assert a.asked() >= 4 and b.asked() >= 2 and len(notes) == 1 and b.url in notes[0]
        b.stop()
