"""A server's scores of given text: what the model says, in both protocols; and every way in which a server can be wrong is found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.commands.serve import serve
from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.models.api import ApiTeacher
from limbeck.models.folder import save_model
from limbeck.models.load import load_model
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.head import PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.signals.sparse import TopK
from limbeck.types import RecipeError, UserError
from tests.conftest import make_net
from tests.recorded import recorded
from tests.scoring_server import ScoringServer

PROTOCOLS = ("llama.cpp", "vLLM")
TEXTS = [("why is the sky blue", "the sky is blue"), ("count", "one two three"), ("a dog", "ran")]


def batch_of(model):
    rows = [
        Row(str(n), tuple(model.prompt_ids(({"role": "user", "content": asked},))), (*model.text_ids(said), model.tokenizer.eos_token_id), frozenset())
        for n, (asked, said) in enumerate(TEXTS)
    ]  # fmt: skip
    return make_batch(rows, tuple(range(len(rows))))


def scorer(server, model, k=8, **settings):
    return ServerScorer(ApiTeacher(Served(url=server.url, name="toy", retries=0, **settings)), k, model.tokenizer)


def test_an_impossible_token_has_a_number_that_can_be_counted_with(tiny):
    told = ServerScorer(ApiTeacher(Served(url="http://127.0.0.1:1/v1", name="toy")), 3, tiny.tokenizer)
    assert told._check([(1, -0.1), (2, -math.inf), (3, -3.4e38)], 2) == ([1, 2, 3], [-0.1, -1000.0, -1000.0], -1000.0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_servers_top_tokens_are_the_models_own(protocol, tiny):
    batch = batch_of(tiny)
    with ScoringServer(tiny, protocol) as server:
        signal = scorer(server, tiny).view(batch).signal
        asked = [path for path, _, _ in server.seen]
    dense = InProcessTeacher(tiny).signal(batch)
    log_NV = dense.chunk(slice(None)).logits_CV.log_softmax(-1)
    assert signal.ids_NK.shape == (int(batch.mask_BT.sum()), 8)
    assert torch.equal(signal.ids_NK, log_NV.topk(8).indices)
    assert torch.allclose(signal.log_prob_NK, log_NV.topk(8).values, atol=1e-5)
    scored = asked.count("/completion") + asked.count("/v1/completions")
    assert scored == 1 + (len(signal.ids_NK) if protocol == "llama.cpp" else len(TEXTS)), (
        "the probe, and no request too many"
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_tokens_of_a_server_give_the_loss_of_the_dense_signal(protocol, tiny):
    batch, whole = batch_of(tiny), len(tiny.tokenizer)
    with ScoringServer(tiny, protocol) as server:
        signal = scorer(server, tiny, whole).view(batch).signal
    dense, student = InProcessTeacher(tiny).signal(batch), make_net(seed=3, vocab_size=whole).lm_head.weight
    hidden_ND = torch.randn(len(signal.ids_NK), student.shape[1], generator=torch.Generator().manual_seed(1))
    row_N, position_N = batch.response_positions()
    targets_N = batch.tokens_BT[row_N, position_N + 1]
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        found = []
        for teacher in (dense, signal):
            states = hidden_ND.clone().requires_grad_()
            term = make_term(name, {}).at_step(0, {})
            loss = fused_loss(
                states,
                type(dense.head)(student.detach()),
                [term],
                [1.0],
                torch.ones(1, len(hidden_ND)),
                PositionEvidence(targets_N, teacher),
            ).loss
            loss.backward()
            found.append((float(loss.detach()), states.grad))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert torch.allclose(found[0][1], found[1][1], atol=2e-5), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_reads_what_a_server_says_of_its_text(protocol, tiny, tiny_folder, recipe_data, tmp_path):
    """Text and distributions of a teacher without weights here; asked once, kept, and read by the next run from a shared folder."""
    with ScoringServer(tiny, protocol) as server:
        cache = {"top_k": {"k": 8}, "folder": str(tmp_path / "kept")}
        teacher = {"server": {"url": server.url, "name": "toy"}, "cache": cache}
        evaluate = {**recipe_data["evaluate"], "metrics": ["fidelity"], "limit": 2}
        data = {
            **recipe_data,
            "teacher": teacher,
            "student": {"start": {"pretrained": str(tiny_folder)}},
            "loss": ["forward_kl"],
            "evaluate": evaluate,
        }
        assert check(parse(data)).requests > 0
        folder = run(parse(data), tmp_path / "run", stages=("elicit",))
        assert list((tmp_path / "kept").glob("shard-*")), "eliciting keeps what is to be kept"
        asked = len(server.seen)
        run(parse(data), folder, stages=("train",))
        assert len(server.seen) == asked, "and the training asks for none of it again"
        scored = len([path for path, _, _ in server.seen if path in ("/completion", "/v1/completions")])
        again = run(parse({**data, "name": "again", "loss": ["jsd"]}), tmp_path / "again", stages=("elicit", "train"))
        later = len([path for path, _, _ in server.seen if path in ("/completion", "/v1/completions")])
    assert later == scored + 1, "the second run probes, and finds the rest in the folder"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["terms"]["forward_kl"]) < 5e-3, (
        "the student is the teacher: what is left is the rounding of what is kept"
    )
    assert (again / "student" / "config.json").exists() and list((tmp_path / "kept").glob("shard-*"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_server_reads_to_score_counts_against_the_ceilings(protocol, tiny):
    with ScoringServer(tiny, protocol) as server:
        made = scorer(server, tiny)
        made.score([([5, 6, 7], [8, 9])])
        spent = made.api.spending
        assert (spent.estimated > 0, spent.read > 0) == (protocol == "llama.cpp", protocol == "vLLM")
        with pytest.raises(UserError, match="ceiling of 8 tokens"):
            scorer(server, tiny, limits={"tokens": 8}).score([([5, 6, 7], [8, 9])] * 9)


def test_a_long_text_s_log_probabilities_are_read_to_their_end(tiny, monkeypatch):
    """The bound grows with what is asked for."""
    monkeypatch.setattr("limbeck.models.score.MAX_BYTES", 100)
    with ScoringServer(tiny, "vLLM") as server:
        made = scorer(server, tiny, 40)
        ((*_, last),) = made.score([(list(range(5, 40)), [8, 9])])
        assert len(last[0]) == 40
        monkeypatch.setattr("limbeck.models.score.NAMED_BYTES", 1)
        with pytest.raises(UserError, match=r"bytes about a text of .* lower teacher\.cache\.top_k\.k"):
            made.score([(list(range(5, 40)), [8, 9])])


def first_of(reply):
    return reply["completion_probabilities"][0]["top_logprobs"] if "completion_probabilities" in reply else None


def spoiled(change):
    """The change made to every position's named tokens, as a list of [id, log-probability]."""

    def spoil(path, reply):
        if path == "/completion":
            pairs = change([[one["id"], one["logprob"]] for one in first_of(reply)])
            reply["completion_probabilities"][0]["top_logprobs"] = [{"id": n, "logprob": x} for n, x in pairs]
        if path == "/v1/completions":
            rows = reply["choices"][0]["prompt_logprobs"]
            changed = [
                row
                and {str(n): {"logprob": x} for n, x in change([[int(n), one["logprob"]] for n, one in row.items()])}
                for row in rows
            ]
            reply["choices"][0]["prompt_logprobs"] = changed
        return reply

    return spoil


def on(paths, change):
    return lambda path, reply: change(reply) if path in paths else reply


def without(reply, *names):
    return {name: value for name, value in reply.items() if name not in names}


SCORED = ("/completion", "/v1/completions")
FAULTS = {
    "fewer than asked": (spoiled(lambda pairs: pairs[:3]), "names . tokens at a position|rows are not those"),
    "no tokens": (spoiled(lambda pairs: [[n + 10**6, x] for n, x in pairs]), "none of the student's|rows are not those"),
    "ids as text": (spoiled(lambda pairs: [[f"x{n}", x] for n, x in pairs]), "none of the student's|rows are not those"),
    "no numbers": (spoiled(lambda pairs: [[n, None] for n, x in pairs]), "no log-probability"),
    "probabilities in place of logarithms": (spoiled(lambda pairs: [[n, math.exp(x)] for n, x in pairs]), "above 1"),
    "no softmax": (spoiled(lambda pairs: [[n, x / 4] for n, x in pairs]), "add up to"),
    "no log-probabilities": (on(SCORED, lambda reply: without(reply, "completion_probabilities", "choices")), "no log-probabilities"),
    "another model": (on(SCORED, lambda reply: {**reply, "model": "other"}), "of the model 'other'"),
    "no JSON": (on(SCORED, lambda reply: ("bytes", b"{")), "does not score"),
    "too long": (on(SCORED, lambda reply: ("status", 400)), "does not score"),
    "no such thing": (on(("/props", "/version"), lambda reply: ("status", 404)), "can't score text"),
    "another tokenizer": (on(("/tokenize",), lambda reply: {"tokens": [n + 1 for n in reply["tokens"]]}), "tokens are not the student's"),
    "tokens not told": (on(("/tokenize",), lambda reply: ("status", 404)), "does not say what its tokens are"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_wrong_with_a_server_is_named_and_nothing_is_trained(fault, protocol, tiny):
    spoil, says = FAULTS[fault]
    with ScoringServer(tiny, protocol, spoil) as server, pytest.raises(UserError, match=says):
        scorer(server, tiny).view(batch_of(tiny))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_with_another_template_is_refused(protocol, tiny, tiny_folder):
    other = load_model(str(tiny_folder))
    other.tokenizer.chat_template = other.tokenizer.chat_template.replace("<|assistant|>", "<|system|>")
    with ScoringServer(other, protocol) as server, pytest.raises(UserError, match="frames a conversation otherwise"):
        scorer(server, tiny).probe()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_whose_weights_change_is_left(protocol, tiny, tiny_folder):
    served, batch = load_model(str(tiny_folder)), batch_of(tiny)
    with ScoringServer(served, protocol) as server:
        scoring = scorer(server, tiny)
        first = scoring.view(batch).signal
        assert torch.equal(scoring.view(batch).signal.ids_NK, first.ids_NK)
        served.net.load_state_dict(make_net(seed=5, vocab_size=len(tiny.tokenizer)).state_dict())
        with pytest.raises(UserError, match="its weights changed; serve the first model again"):
            scoring.view(batch)


@pytest.mark.parametrize("fault", ["", "key", "scores", "away"])
def test_a_check_tells_what_is_wrong_with_the_server(fault, tiny, tiny_folder, recipe_data, tmp_path):
    spoils = {
        "key": lambda path, reply: ("status", *recorded("unauthorized")[:1]) if path == "/v1/models" else reply,
        "scores": FAULTS["no such thing"][0],
    }
    with ScoringServer(tiny, "vLLM", spoils.get(fault, lambda path, reply: reply)) as server:
        if fault == "away":
            server.shutdown()
            server.server_close()
        data = {
            **recipe_data,
            "teacher": {"server": {"url": server.url, "name": "toy", "retries": 0}, "cache": {"top_k": {"k": 8}}},
            "student": {"start": {"pretrained": str(tiny_folder)}},
        }
        (tmp_path / "r.yaml").write_text(json.dumps(data))
        told = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml"), "--json"])
        (seen,) = json.loads(told.stdout)["servers"]
        if fault:
            with pytest.raises(UserError):
                run(parse(data), tmp_path / "run")
            assert "/v1/chat/completions" not in [path for path, _, _ in server.seen], "nothing was asked for"
    words = {"key": "LIMBECK_API_KEY", "scores": "can't score text", "away": "is the server running", "": ""}
    assert told.exit_code == (2 if fault else 0) and seen["place"] == "teacher.server"
    assert words[fault] in seen["fault"] and bool(seen["fault"]) == bool(fault)
    assert fault or seen["seen"].endswith("names 8 tokens at every position")


def test_a_twice_named_token_and_rows_that_moved_are_found(tiny):
    twice = spoiled(lambda pairs: [pairs[0], *pairs[:-1]])
    with ScoringServer(tiny, "llama.cpp", twice) as server, pytest.raises(UserError, match="names a token twice"):
        scorer(server, tiny).view(batch_of(tiny))

    def moved(path, reply):
        if path == "/v1/completions":
            rows = reply["choices"][0]["prompt_logprobs"]
            reply["choices"][0]["prompt_logprobs"] = [None, *rows[2:], rows[1]]
        return reply

    with ScoringServer(tiny, "vLLM", moved) as server, pytest.raises(UserError, match="not those of the tokens"):
        scorer(server, tiny, 1).view(batch_of(tiny))

    def short(path, reply):
        return {**reply, "tokens_evaluated": 3} if path == "/completion" else reply

    with ScoringServer(tiny, "llama.cpp", short) as server, pytest.raises(UserError, match="read 3 of"):
        scorer(server, tiny).view(batch_of(tiny))


def test_the_real_server_agrees_with_the_weights_it_was_made_from(monkeypatch):
    """llama.cpp computes with the file's 4-bit weights and 8-bit states, we with the same weights in fp32: near, not equal."""
    model = load_model("smollm2-135m-instruct")
    serving = serve("smollm2-135m-instruct", context=256, slots=2, threads=1)
    api = ApiTeacher(Served(url=serving.url, name=serving.name, concurrency=2))
    monkeypatch.setenv("LIMBECK_API_KEY", serving.key)
    batch = batch_of(model)
    signal = ServerScorer(api, 20, model.tokenizer).view(batch).signal
    log_NV = InProcessTeacher(model).signal(batch).chunk(slice(None)).logits_CV.log_softmax(-1)
    own = TopK(signal.ids_NK, log_NV.gather(-1, signal.ids_NK))
    kl_N = bucketed_kl(own, signal)
    assert float(kl_N.mean()) < 0.02 and float(kl_N.max()) < 0.1
    shared = [
        len(set(a) & set(b)) for a, b in zip(log_NV.topk(20).indices.tolist(), signal.ids_NK.tolist(), strict=True)
    ]
    assert sum(shared) / len(shared) > 17
    whole = ServerScorer(api, len(model.tokenizer), model.tokenizer)
    ((named,),) = whole.score([(model.prompt_ids(({"role": "user", "content": "Hi"},)), [1])])
    assert sorted(named[0]) == list(range(len(model.tokenizer))) and sum(map(math.exp, named[1])) == pytest.approx(
        1, abs=1e-3
    )


def bucketed_kl(p, q):
    """KL over the named tokens and what is left of 1, per position."""
    both = [
        torch.cat([x.log_prob_NK.exp(), (1 - x.log_prob_NK.exp().sum(-1, keepdim=True)).clamp_min(1e-9)], -1)
        for x in (p, q)
    ]
    return (both[0] * (both[0] / both[1]).log()).sum(-1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cache": {"hidden": {}}}, "likeliest tokens at most"),
        ({"cache": {"sampled": {}}}, "likeliest tokens at most"),
        ({}, "keep what it says of the text"),
    ],
)
def test_a_recipe_asks_a_server_for_what_it_can_give(change, says, recipe_data, tiny_folder):
    teacher = {"server": {"url": "http://127.0.0.1:1/v1", "name": "toy"}, **change}
    data = {
        **recipe_data,
        "teacher": teacher,
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "loss": ["forward_kl"],
    }
    with pytest.raises(RecipeError, match=says):
        resolve(parse(data))


def test_a_server_that_only_wrote_the_text_is_not_asked_again(tiny, tiny_folder, recipe_data, tmp_path):
    """Its weights are here too, so once the text is there the training needs no server."""
    with ScoringServer(tiny) as server:
        teacher = {"model": str(tiny_folder), "server": {"url": server.url, "name": "toy", "retries": 0}}
        evaluate = {**recipe_data["evaluate"], "metrics": ["fidelity"], "limit": 2}
        recipe = parse({**recipe_data, "teacher": teacher, "loss": ["forward_kl"], "evaluate": evaluate})
        folder = run(recipe, tmp_path / "run", stages=("elicit",))
        asked = [path for path, _, _ in server.seen]
    assert set(asked) == {"/v1/chat/completions"}
    run(recipe, folder, stages=("train",))
    assert (folder / "student" / "config.json").exists()


def on_its_own_text(server, names, loss="minillm_long"):
    """A student that writes, and a teacher behind a server that says how likely that is."""
    return {
        "teacher": {"server": {"url": server.url, "name": "toy", "retries": 0, "names": names}},
        "writer": [{"by": "student", "max_tokens": 8}],
        "loss": [{"reverse_kl": {"by": "importance_weight"}}, loss] if loss == "minillm_long" else [loss],
    }


@pytest.mark.parametrize("loss", ["minillm_long", "on_policy_distillation"])
def test_a_vllm_server_teaches_the_students_own_text_as_the_model_in_process_does(
    loss, tiny_folder, recipe_data, tmp_path
):
    model = load_model(str(tiny_folder))
    model.net.load_state_dict(make_net(seed=5, vocab_size=len(model.tokenizer)).state_dict())
    (made := tmp_path / "teacher").mkdir()
    save_model(model.net, model.tokenizer, made)
    recipe_data |= {
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "evaluate": {**recipe_data["evaluate"], "controls": []},
    }
    with ScoringServer(model, "vLLM") as server:
        served = recipe_data | on_its_own_text(server, len(model.tokenizer), loss)
        recipe_data |= {"train": served["train"] | {"steps": 3}}
        served |= {"train": recipe_data["train"]}
        one = run(parse(served), tmp_path / "served", stages=("train",))
    here = parse(served | {"teacher": str(made)})
    two = run(here, tmp_path / "here", stages=("train",))
    records = [
        [json.loads(line)["terms"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert len(records[0]) == 3
    for ours, theirs in zip(*records, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)


def test_a_llama_cpp_server_is_refused_where_every_written_token_is_read(tiny, tiny_folder, recipe_data, tmp_path):
    recipe_data |= {
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "evaluate": {**recipe_data["evaluate"], "controls": []},
    }
    with ScoringServer(tiny) as server:
        with pytest.raises(UserError, match="need a vLLM server"):
            run(parse(recipe_data | on_its_own_text(server, 16)), tmp_path / "run", stages=("train",))
        folder = run(parse(recipe_data | on_its_own_text(server, 16, "jsd")), tmp_path / "bucket", stages=("train",))
    assert (folder / "student").exists(), "a bucket needs no more than the likeliest"


def test_what_a_server_names_at_every_step_is_not_kept_too(tiny, tiny_folder, recipe_data):
    recipe_data |= {"student": {"start": {"pretrained": str(tiny_folder)}}, "loss": ["jsd"]}
    server = {"url": "http://127.0.0.1:1/v1", "name": "toy", "names": 4}
    with pytest.raises(RecipeError, match=r"leave server\.names or the cache out"):
        resolve(parse(recipe_data | {"teacher": {"server": server, "cache": {"top_k": {}}}}))
    with pytest.raises(RecipeError, match=r"teacher.server.names: 20"):
        resolve(parse(recipe_data | {"teacher": {"server": server | {"names": None}}}))
