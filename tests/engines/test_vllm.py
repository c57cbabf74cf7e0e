"""Against a real vLLM on this machine's processor: served teacher, scorer, the student's writer, the doctor, and a server that dies.

`make test-vllm` runs this file; `make test` does not. Without `make vllm` before it, it fails. It takes some six minutes, most of
which vLLM spends starting: one server for all, whose weights each test that changes them puts back.
"""

from __future__ import annotations

import json
import sqlite3

import pytest
import torch

from benchmarks.vllm_server import KEY, VllmServer
from limbeck.commands.doctor.run import examine
from limbeck.config.recipe import parse
from limbeck.config.teacher import Served
from limbeck.models.api import ApiTeacher
from limbeck.models.generate import Decoding, GenerationJob, write
from limbeck.models.load import load_model
from limbeck.models.model import head_of
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.vllm import VllmWriter
from limbeck.models.vllm_protocol import Patience, StudentTokens
from limbeck.progress import Silent
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.runs.servers import examine_servers
from limbeck.storage.store import Store
from limbeck.training import student_writer
from limbeck.types import RecipeError, Sampling, UserError
from tests.conftest import make_net, make_tokenizer
from tests.engines.record_vllm import CALLS, record
from tests.models.test_score import batch_of
from tests.recorded import recorded, shape

NAME = "toy"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny model with wider heads: vLLM's attention on a CPU takes none of 8."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tokenizer()
    make_net(vocab_size=len(tokenizer), head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    """Another model of the same shape, as a student: one that is its teacher has nothing to learn but rounding."""
    folder = tmp_path_factory.mktemp("other") / "model"
    tokenizer = make_tokenizer()
    make_net(seed=5, vocab_size=len(tokenizer), head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    """The tiny model, whose head is tied to its embedding: what vLLM on a CPU reloads only if the head is sent, too."""
    with VllmServer(tiny_folder, NAME, tmp_path_factory.mktemp("vllm") / "log.txt") as made:
        yield made


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", KEY)
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture
def writer(server, tiny, tiny_folder, tmp_path):
    """The writer of the tiny model; afterwards the server has the tiny model's weights again."""
    tokens = StudentTokens(tiny.eos_ids, tiny.vocab_size, head_of(tiny.net).vocab_size)
    made = VllmWriter(server.url, tmp_path / "weights", tokens)
    yield made
    VllmWriter(server.url, tmp_path / "weights", tokens).sync(load_model(str(tiny_folder)).net, tiny.tokenizer)


def api(server, **settings):
    return ApiTeacher(Served(url=server.url, name=NAME, **settings))


def served(recipe_data, server, tiny_folder, teacher=None, **changes):
    """A recipe whose teacher is known from the server alone, and whose student starts as that teacher."""
    return parse(
        {
            **recipe_data,
            "teacher": {"server": {"url": server.url, "name": NAME, "concurrency": 2, "retries": 1}, **(teacher or {})},
            "student": {"start": {"pretrained": str(tiny_folder)}},
            "evaluate": {**recipe_data["evaluate"], "metrics": ["fidelity"], "limit": 2, "controls": ["untouched"]},
            **changes,
        }
    )


def through(recipe_data, server, other_folder, **changes):
    """A recipe whose student writes on the server, and whose teacher, the tiny model, is here."""
    return parse(
        {
            **recipe_data,
            "student": {"start": {"pretrained": str(other_folder)}},
            "writer": [{"by": "student", "max_tokens": 8}],
            "loss": ["reverse_kl"],
            "rollout": {"through": {"vllm": server.url}},
            "train": {**recipe_data["train"], "steps": 3, "lr": 3e-3, "save_seconds": 0.001},
            "evaluate": {**recipe_data["evaluate"], "metrics": ["fidelity"], "limit": 2, "controls": ["untouched"]},
            **changes,
        }
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def answers(folder):
    """What is stored, by its request's key."""
    with sqlite3.connect(folder / "store.sqlite") as db:
        names = [row[1] for row in db.execute("pragma table_info(answers)")]
        return {row[0]: row[1:] for row in db.execute(f"select {', '.join(names)} from answers")}


def test_a_run_with_its_text(server, recipe_data, tiny_folder, tmp_path):
    recipe = served(recipe_data, server, tiny_folder, loss=["cross_entropy"])
    (found,) = examine_servers(resolve(recipe))
    assert found.fault == "" and found.seen.startswith(f"served:{NAME}-")
    folder = run(recipe, tmp_path / "run")
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert summary["bill"]["answers"] == len(answers(folder)) >= 18 + 2
    assert summary["bill"]["tokens_written"] > 20 and summary["bill"]["tokens_read"] > 100
    assert len(metrics(folder)) == 6


def test_its_scores_are_those_of_the_weights(server, tiny):
    batch = batch_of(tiny)
    signal = ServerScorer(api(server), 20, tiny.tokenizer, written=True).view(batch).signal
    log_NV = InProcessTeacher(tiny).signal(batch).chunk(slice(None)).logits_CV.log_softmax(-1)
    assert torch.allclose(signal.log_prob_NK, log_NV.gather(-1, signal.ids_NK), atol=1e-3)
    assert torch.allclose(signal.log_prob_NK, log_NV.topk(20).values, atol=1e-3)
    row_N, position_N = batch.response_positions()
    written_N = log_NV.gather(-1, batch.tokens_BT[row_N, position_N + 1][:, None])[:, 0]
    assert torch.allclose(signal.target_log_prob_N, written_N, atol=1e-3), "the written token's, whatever its rank"
    assert ServerScorer(api(server), 20, tiny.tokenizer).room() == 256
    with pytest.raises(UserError, match=r"status 400.*greater than max allowed: 20"):
        ServerScorer(api(server), 21, tiny.tokenizer).view(batch)


def test_a_cache_made_of_its_scores(server, recipe_data, tiny_folder, tmp_path):
    kept = {"cache": {"top_k": {"k": 20, "bits": 16}}}
    recipe = served(recipe_data, server, tiny_folder, kept, loss=["forward_kl"])
    folder = run(recipe, tmp_path / "run", stages=("elicit", "train"))
    first, *_, last = metrics(folder)
    assert abs(first["terms"]["forward_kl"]) < 1e-4, "the student is the teacher"
    assert list((folder / "signals").glob("*")) and last["step"] == 6


def test_it_scores_what_the_student_writes(server, recipe_data, tiny_folder, other_folder, tmp_path):
    changes = {"writer": [{"by": "student", "max_tokens": 8}], "loss": ["on_policy_distillation"]}
    changes["student"] = {"start": {"pretrained": str(other_folder)}}
    changes["train"] = {**recipe_data["train"], "steps": 3}
    teacher = {"server": {"url": server.url, "name": NAME, "names": 20}}
    one = run(served(recipe_data, server, tiny_folder, teacher, **changes), tmp_path / "served", stages=("train",))
    here = parse(
        {**served(recipe_data, server, tiny_folder, teacher, **changes).resolved(), "teacher": str(tiny_folder)}
    )
    two = run(here, tmp_path / "here", stages=("train",))
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=2e-3, abs=1e-4)


def test_other_weights_in_the_middle_are_noticed(server, writer, tiny):
    scorer, batch = ServerScorer(api(server), 20, tiny.tokenizer), batch_of(tiny)
    scorer.view(batch)
    scorer.view(batch)
    writer.sync(make_net(seed=1, vocab_size=len(tiny.tokenizer), head_dim=32), tiny.tokenizer)
    with pytest.raises(UserError, match="its weights changed"):
        scorer.view(batch)


def test_the_probe_and_what_is_written(writer, tiny):
    prompts = [tiny.prompt_ids(({"role": "user", "content": f"count {word}"},)) for word in ("one", "two", "three")]
    writer.sync(tiny.net, tiny.tokenizer)
    found = writer.probe(tiny.net, prompts[0])
    assert (found.model, found.context, found.version, found.log_probs) == (NAME, 256, "0.32.0", "raw")
    assert found.difference < 1e-3
    jobs = [GenerationJob(tuple(prompt), Sampling(0.0, 1.0, 12), 0) for prompt in prompts]
    jobs += [GenerationJob(tuple(prompt), Sampling(1.0, 1.0, 12), seed) for seed, prompt in enumerate(prompts * 4)]
    net = make_net(seed=2, vocab_size=len(tiny.tokenizer), head_dim=32)
    for weights in (tiny.net, net):
        writer.sync(weights, tiny.tokenizer)
        assert writer.holds_them()
        texts = writer.write(jobs)
        own = sorted(
            write(weights, jobs[:3], tiny.eos_ids, decoding=Decoding(record=True)), key=lambda text: text.index
        )
        assert [text.ids for text in texts[:3]] == [text.ids for text in own], "greedy text is the student's own"
        for job, text in zip(jobs, texts, strict=True):
            ids = torch.tensor([[*job.prompt_ids, *text.ids]])
            with torch.inference_mode():
                log_NV = weights(ids[:, :-1]).logits[0, len(job.prompt_ids) - 1 :].log_softmax(-1)
            want = log_NV.gather(-1, ids[0, len(job.prompt_ids) :, None])[:, 0].tolist()
            assert text.log_prob == pytest.approx(want, abs=1e-3)
    assert len({tuple(text.ids) for text in texts[3:]}) > 6, "seeds draw"


def test_a_training_writes_through_it(server, writer, recipe_data, other_folder, tmp_path, monkeypatch):
    synced = []
    sync = VllmWriter.sync
    monkeypatch.setattr(
        VllmWriter,
        "sync",
        lambda self, net, tokenizer: (
            synced.append(float(net.lm_head.weight.detach().sum())) or sync(self, net, tokenizer)
        ),
    )
    folder = run(through(recipe_data, server, other_folder), tmp_path / "run", stages=("elicit", "train"))
    assert len(synced) == 1 + 3 and len(set(synced)) == 3, "once to look at it, then the weights of every step"
    records = metrics(folder)
    assert all(record["rollout"]["written"] > 0 for record in records)
    assert all(record["response_tokens"] == record["rollout"]["tokens"] for record in records)


def test_the_doctor_finds_nothing(server, recipe_data, tiny_folder, tmp_path):
    teacher = {"model": str(tiny_folder)}
    findings = examine(served(recipe_data, server, tiny_folder, teacher), tmp_path / "run")
    assert not [finding for finding in findings if finding.verdict == "fault"]
    by_name = {finding.name: finding for finding in findings}
    assert by_name["server"].verdict == by_name["served weights"].verdict == "fine"
    assert "0.0000 nats apart" in by_name["served weights"].detail and "20.0 of 20" in by_name["served weights"].detail
    short = served(recipe_data, server, tiny_folder, teacher, writer=[{"by": "teacher", "max_tokens": 250}])
    faults = {finding.name: finding.detail for finding in examine(short, tmp_path / "run")}
    assert "more than the context of 256" in faults["recipe"]


def test_what_it_misses_is_said_before_anything_is_spent(
    server, recipe_data, tiny_folder, other_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "another-key-of-no-use")
    with pytest.raises(RecipeError, match=r"rollout.through.*401.*set the environment variable VLLM_API_KEY") as found:
        run(through(recipe_data, server, other_folder), tmp_path / "run")
    assert "another-key" not in str(found.value) and not (tmp_path / "run" / "store.sqlite").exists()
    monkeypatch.delenv("LIMBECK_API_KEY")
    with pytest.raises(UserError, match=r"401.*LIMBECK_API_KEY, which is not set"):
        run(served(recipe_data, server, tiny_folder, loss=["cross_entropy"]), tmp_path / "other")
    assert not (tmp_path / "other" / "store.sqlite").exists() or not answers(tmp_path / "other")


class Killing(Silent):
    """Kills the server when so many answers, or steps, are done."""

    def __init__(self, server, at, words=""):
        self.server, self.at, self.words = server, at, words

    def progress(self, done, total, detail=""):
        if done == self.at and self.words in detail and self.server.process is not None:
            self.server.kill()


def test_killed_while_the_teacher_writes(server, recipe_data, tiny_folder, tmp_path):
    recipe = served(recipe_data, server, tiny_folder, loss=["cross_entropy"])
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"failed \d+ times in a row.*run it again to go on|no answer from"):
        run(recipe, folder, Killing(server, 5), stages=("elicit",))
    kept = answers(folder)
    assert 5 <= len(kept) < 18
    server.start()
    run(recipe, folder, stages=("elicit",))
    now = answers(folder)
    assert Store.count(folder / "store.sqlite").keys() <= {"ok", "length", "empty", "malformed"}
    assert {key: now[key] for key in kept} == kept, "what was answered is not asked again"
    run(recipe, tmp_path / "undisturbed", stages=("elicit",))
    assert now.keys() == answers(tmp_path / "undisturbed").keys() and len(now) >= 20


def test_killed_and_started_again_while_the_student_writes(
    server, writer, recipe_data, other_folder, tmp_path, monkeypatch
):
    """The server comes back with the weights that it was started with: what it wrote with these is not trained on."""
    restarted, synced, ask = [], [], VllmWriter.write
    sync = VllmWriter.sync

    def write_after_a_crash(self, jobs, stop=lambda: False):
        if len(synced) == 3 and not restarted:  # the second step
            restarted.append(True)
            server.kill()
            server.launch()
        return ask(self, jobs, stop)

    monkeypatch.setattr(VllmWriter, "write", write_after_a_crash)
    monkeypatch.setattr(VllmWriter, "sync", lambda self, *weights: synced.append(True) or sync(self, *weights))
    folder = run(through(recipe_data, server, other_folder), tmp_path / "run", stages=("elicit", "train"))
    assert restarted and len(synced) == 1 + 3 + 1, "the step's weights are sent once more"
    assert len(metrics(folder)) == 3 and (folder / "student" / "config.json").exists()


def test_killed_for_good_while_the_student_writes(server, writer, recipe_data, other_folder, tmp_path, monkeypatch):
    make = student_writer._server

    def impatient(*given):
        made = make(*given)
        made.patience = Patience(tries=3)
        return made

    monkeypatch.setattr(student_writer, "_server", impatient)
    recipe = through(recipe_data, server, other_folder)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"the vLLM server .* failed \d+ times \(ConnectError"):
        run(recipe, folder, Killing(server, 2, "tokens per second"), stages=("elicit", "train"))
    before = metrics(folder)
    assert len(before) == 2
    with pytest.raises(RecipeError, match=r"rollout.through.*ConnectError"):
        run(recipe, folder, stages=("elicit", "train"))
    server.start()
    run(recipe, folder, stages=("elicit", "train"))
    after = metrics(folder)
    assert [record["loss"] for record in after[:2]] == [record["loss"] for record in before] and len(after) == 3


def test_the_recordings_are_what_it_says_today(server, writer):
    """The fast tests' servers speak in these shapes."""
    for name in CALLS:
        found = record(server, name)
        status, answer = recorded(name)
        assert found["status"] == status and shape(found["answer"]) == shape(answer), name
