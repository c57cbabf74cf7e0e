"""The packaged llama.cpp server with the real model, in a process of its own: text, options, log-probabilities of its own text against the
same weights here, the doctor, and a kill in the middle. `make test-llama`; some three minutes on two cores."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx2
import pytest
import torch

from limbeck.commands.doctor.run import examine
from limbeck.commands.export.run import export
from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.elicit.flow import user
from limbeck.elicit.parse import Parsing
from limbeck.models.api import ApiTeacher
from limbeck.models.engines import ENGINES, find_engine
from limbeck.models.load import load_model
from limbeck.models.own_text import Aligner, OwnTextTeacher, probe
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.progress import Silent
from limbeck.runs.pipeline import run
from limbeck.storage.store import Store
from limbeck.types import Request, Sampling, UserError
from tests.conftest import PROMPTS

MODEL = "smollm2-135m-instruct"
KEY = "sk-canary-4711"
QUESTIONS = ("Why is the sky blue?", "Name three fruits.", "Answer with three emoji: sun, moon, star.")


class Llama:
    """A server that can be killed and started again at the same port."""

    def __init__(self, model=MODEL):
        self.model = model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "limbeck", "serve", self.model, "--port", str(self.port), "--context", "512", "--slots", "2", "--threads", "1"]  # fmt: skip
        environment = os.environ | {"LIMBECK_API_KEY": KEY}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            time.sleep(0.2)
            try:
                if (
                    httpx2.get(
                        f"{self.url}/models", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False
                    ).status_code
                    == 200
                ):
                    return
            except httpx2.HTTPError:
                continue
        raise AssertionError("the server does not start")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def llama():
    server = Llama()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", KEY)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def api(llama, **settings):
    return ApiTeacher(Served(url=llama.url, name=MODEL, kind="llama.cpp", concurrency=2, **settings))


def ask(llama, questions, sampling, seed=1, **settings):
    made = api(llama, **settings)
    asked = [Request(made.identity, ({"role": "user", "content": text},), sampling, seed) for text in questions]
    found = {request.key: answer for request, answer in made.answers(asked)}
    return [found[request.key] for request in asked]


def test_it_is_told_from_other_programs(llama):
    assert api(llama).endpoint.run(find_engine) == "llama.cpp"
    with pytest.raises(UserError, match=r"is not vLLM .* correct teacher\.server\.kind"):
        _ = ApiTeacher(Served(url=llama.url, name=MODEL, kind="vllm")).identity


def test_a_draw_is_repeated_by_its_seed(llama):
    drawn = Sampling(1.0, 1.0, 24)
    first, again, other = (ask(llama, QUESTIONS[:1], drawn, seed)[0].text for seed in (1, 1, 2))
    assert first == again != other and first.strip()


def test_an_option_for_a_schema_holds(llama):
    schema = ENGINES["llama.cpp"].schema
    (found,) = ask(llama, ("Name a fruit.",), Sampling(0.0, 1.0, 120), options=dict(schema))
    assert found.finish == "ok" and isinstance(json.loads(found.text)["answer"], str)
    (plain,) = ask(llama, ("Name a fruit.",), Sampling(0.0, 1.0, 120))
    assert not plain.text.lstrip().startswith("{")


# Answers that are held to a form

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "price": {"type": "integer", "minimum": 1, "maximum": 999},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "price", "colour"],
    "additionalProperties": False,
}
THINGS = "lamp chair bag cup hat pen book bike clock coat table shoe ring box bed desk fork bowl rug vase".split()
FORMS = {
    "schema": ({"json": SCHEMA}, "Invent a {} for a shop and give its name, its price and its colour as JSON."),
    "labels": ({"label": ["kitchen", "living room", "none of them"]}, "Where does a {} belong?"),
}


def kept(found, parsing):
    return sum(answer.finish == "ok" and parsing.keeps_to_form(answer.text) for answer in found)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("where", ["server", "process"])
def test_every_answer_keeps_to_its_form_where_it_is_held(llama, model, kind, where):
    form, template = FORMS[kind]
    parsing = Parsing.model_validate(form)
    teacher = api(llama) if where == "server" else InProcessTeacher(model)
    held = {}
    for held_to in (parsing.form, None):
        asked = [
            Request(teacher.identity, (user(template.format(thing)),), Sampling(0.7, 0.95, 64), number, form=held_to)
            for number, thing in enumerate(THINGS)
        ]
        held[held_to] = [answer for _, answer in teacher.answers(asked)]
    print(f"\n{kind} {where}: {kept(held[parsing.form], parsing)} of 20 held, {kept(held[None], parsing)} free")
    assert kept(held[parsing.form], parsing) == 20, [answer.text for answer in held[parsing.form]]
    assert kept(held[None], parsing) < 10
    if kind == "schema":
        assert all(list(json.loads(answer.text)) == list(SCHEMA["properties"]) for answer in held[parsing.form])


def rows_and_told(llama, model, logprobs=20):
    """Answers as rows in the student's tokens, the teacher of their text, and its marked rows."""
    found = ask(llama, QUESTIONS, Sampling(1.0, 1.0, 60), logprobs=logprobs)
    rows, told = [], {}
    for number, (question, answer) in enumerate(zip(QUESTIONS, found, strict=True)):
        ids = [*model.text_ids(answer.text), *([model.tokenizer.eos_token_id] if answer.finish == "ok" else [])]
        rows.append(Row(str(number), tuple(model.prompt_ids(({"role": "user", "content": question},))), tuple(ids)))
        told[str(number)] = answer.told
    teacher = OwnTextTeacher(
        "x",
        lambda ids: [told[sample_id] for sample_id in ids],
        Aligner(model.tokenizer, model.eos_ids),
        model.vocab_size,
    )
    return rows, teacher, teacher.mark(rows, lambda *_: None)


def test_a_student_that_is_the_teacher_has_next_to_no_loss(llama, model):
    rows, teacher, marked = rows_and_told(llama, model)
    assert teacher.facts["taught_share"] > 0.8, teacher.reasons
    batch = make_batch(marked)
    ours = teacher.view(batch).signal
    dense = InProcessTeacher(model).signal(batch)
    q = Distribution(dense.head.logits(dense.hidden_NE))
    row_N, position_N = batch.response_positions()
    targets_N = batch.tokens_BT[row_N, position_N + 1]
    kl_N, _ = ours.compare(DIVERGENCES["forward_kl"], {}, q, targets_N)
    known_N = kl_N[ours.known_N]
    print(
        f"\nforward KL of the student that is the teacher: {float(known_N.mean()):.4f} nats, at most {float(known_N.max()):.4f}, over {len(known_N)} tokens; {teacher.reasons}"
    )
    assert float(known_N.mean()) < 0.02 and float(known_N.max()) < 0.3
    assert (kl_N[~ours.known_N] == 0).all()
    written = ours.top_tokens().log_prob(targets_N)[ours.known_N]
    assert (written - q.log.gather(-1, targets_N[:, None])[:, 0][ours.known_N]).abs().mean() < 0.1

    scorer = ServerScorer(api(llama), 20, model.tokenizer)
    theirs = scorer.view(make_batch(rows)).signal
    q = Distribution(torch.zeros_like(q.log))
    one, _ = ours.compare(DIVERGENCES["forward_kl"], {}, q, targets_N)
    two, _ = theirs.compare(DIVERGENCES["forward_kl"], {}, q, targets_N)
    both = ours.known_N & theirs.top_tokens().log_prob(targets_N).isfinite()
    assert both.sum() > 30 and (one - two)[both].abs().max() < 0.1, "the same server asked the other way"


def test_letters_of_several_tokens_are_gaps_and_not_taught_wrongly(llama, model):
    """llama.cpp shows such a letter as one token, with the numbers of its last piece."""
    found = ask(llama, ("Say hello and one emoji.",), Sampling(0.0, 1.0, 20), logprobs=5)[0]
    assert any(ord(letter) > 0xFFFF for letter in found.text), "it still answers with emoji"
    ids = model.text_ids(found.text)
    aligned = Aligner(model.tokenizer, model.eos_ids).align(found.told, ids)
    assert aligned.gaps["split"] > 0
    for number, named in zip(ids, aligned.named, strict=True):
        assert named is None or number in named


def recipe_of(llama, prompt_file, **more):
    return {
        "name": "llama", "teacher": {"server": {"url": llama.url, "name": MODEL, "kind": "llama.cpp", "retries": 0, "concurrency": 2, **more}},
        "student": {"start": {"pretrained": MODEL}}, "prompts": {"from": str(prompt_file), "limit": 8},
        "writer": [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 24}], "loss": ["forward_kl" if "logprobs" in more else "cross_entropy"],
        "train": {"steps": 1, "tokens_per_step": 256, "lr": 1e-9}, "evaluate": {"metrics": ["fidelity"], "controls": [], "limit": 2},
    }  # fmt: skip


def test_a_recipe_trains_on_what_came_with_the_text(llama, prompt_file, tmp_path):
    folder = run(parse(recipe_of(llama, prompt_file, logprobs=20)), tmp_path / "run", stages=("elicit", "train"))
    (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "logprobs.json").read_text())
    print(f"\nloss of the student that is the teacher: {record['terms']['forward_kl']:.4f} nats; {facts}")
    assert 0 <= record["terms"]["forward_kl"] < 0.02 and facts["taught_share"] > 0.8
    assert record["taught_tokens"] <= record["response_tokens"]


def test_the_doctor_finds_nothing(llama, prompt_file, tmp_path):
    for more in ({"logprobs": 5}, {}):
        findings = examine(parse(recipe_of(llama, prompt_file, **more)), tmp_path / "none")
        assert not [finding for finding in findings if finding.verdict == "fault"], findings
        (server,) = [finding.detail for finding in findings if finding.name == "server"]
        assert "(llama.cpp) answers" in server and ("names 5 tokens" in server) == bool(more)


def test_a_kill_costs_what_was_under_way_and_nothing_more(llama, prompt_file, tmp_path):
    data = recipe_of(llama, prompt_file, logprobs=5)
    folder = tmp_path / "run"
    store = folder / "store.sqlite"
    wanted = parse(data)

    def kill_after_two():
        if store.exists() and sum(Store.count(store).values()) >= 2 and llama.process.poll() is None:
            llama.kill()
        return False

    # without retries, each request that is left ends as an error, and none is stored
    with contextlib.suppress(UserError):
        run(wanted, folder, stop=kill_after_two, stages=("elicit",))
    assert llama.process.poll() is not None, "it was killed in the middle"
    before = Store.count(store)
    assert 2 <= sum(before.values()) < 8 and "error" not in before
    llama.start()
    run(wanted, folder, stages=("elicit",))
    after = Store.count(store)
    assert sum(after.values()) >= 8 and set(after) <= {"ok", "length"}
    with Store(store) as kept:
        told = list(kept.evidence("told"))
    assert told and all(piece.judge.startswith("served:") for piece in told)
    assert probe(api(llama, logprobs=5)) == 5


def test_another_key_is_refused(llama, monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", "sk-other-4711")
    with pytest.raises(UserError, match="the key"):
        _ = replace(api(llama)).identity


# Exports of a student that was trained here


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run whose student is the teacher without its last six layers, trained for two steps."""
    folder = tmp_path_factory.mktemp("export")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in PROMPTS))
    data = {
        "name": "exported", "teacher": MODEL, "student": {"start": {"prune": {"layers": 24, "keep": "first"}}},
        "prompts": {"from": str(prompts)}, "writer": [{"by": "teacher", "max_tokens": 24}], "loss": ["forward_kl"],
        "train": {"steps": 2, "tokens_per_step": 64, "lr": 1e-4}, "evaluate": {"metrics": ["fidelity"], "controls": [], "limit": 2},
    }  # fmt: skip
    return run(parse(data), folder / "run", stages=("elicit", "train"))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"])
def test_an_exported_student_is_the_student(student, kind, tmp_path):
    began = time.monotonic()
    record = export(student, "gguf", kind, tmp_path / "out", Silent())
    agreement = record["agreement"]
    print(f"\n{kind}: {record['bytes'] / 1e6:.1f} MB, {time.monotonic() - began:.0f} s, {agreement}")
    assert agreement["same_prompt_tokens"] and agreement["kl_nats_per_token"] < agreement["most_kl_nats_per_token"]
    if kind in ("f32", "f16"):
        assert agreement["kl_nats_per_token"] < 0.001 and agreement["same_first_choice"] > 0.95
    if kind == "f32":  # a student of two steps has near ties, which 16 bits break the other way
        assert agreement["same_greedy_answers"] == agreement["prompts"]


def test_a_run_is_served_by_its_folder(student):
    server = Llama(str(student))
    try:
        (file,) = student.glob("exports/served-*/*.gguf")
        written = file.stat().st_mtime_ns
        asked = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 8, "temperature": 0}
        url = f"{server.url}/chat/completions"
        reply = httpx2.post(url, json=asked, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60)
        ours = load_model(str(student / "student"))
        assert reply.json()["usage"]["prompt_tokens"] == len(ours.prompt_ids((asked["messages"][0],)))
        assert httpx2.post(url, json=asked, trust_env=False).status_code == 401
        server.kill()
        server.start()
        assert file.stat().st_mtime_ns == written, "exported once"
    finally:
        server.kill()
