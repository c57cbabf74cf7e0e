"""Log-probabilities that come with a server's own text: read, kept, aligned with the student's tokens by bytes, trained on with gaps, counted,
and refused where they are of no use. The reference for the loss is written in float64 from its definition.

Shapes: N response positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.commands.doctor.run import examine
from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.elicit.engine import elicit
from limbeck.models.api import ApiTeacher
from limbeck.models.dialects import GEMINI
from limbeck.models.model import head_of
from limbeck.models.own_text import MIN_REST, Aligner, OwnTextTeacher, probe
from limbeck.models.score import ServerScorer
from limbeck.models.taps import features
from limbeck.models.told import UNKNOWN, keep
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.forward import Features, StudentForward, TeacherView
from limbeck.objectives.term import make_term
from limbeck.objectives.total import total_loss
from limbeck.report.page import write_report
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.signals.gaps import GappedSignal
from limbeck.storage.store import Store
from limbeck.storage.tries import Tries
from limbeck.types import TAUGHT, TOLD, RecipeError, Request, Sampling, UserError
from tests.conftest import make_net
from tests.models.test_bridge import spaced_tokenizer
from tests.scoring_server import ScoringServer
from tests.scripted_server import Scripted, answer

SAY = "the cat sat on the mat"
NEARLY_ALL = 270  # of the tiny vocabulary, so that most written tokens are among them


def token(text, log_prob, number=None, **more):
    return {"token": text, "logprob": log_prob, **({} if number is None else {"id": number}), **more}


def written(text, log_prob, *likely, number=None, octets=None):
    """One position in OpenAI's shape; by default the written token is the likeliest."""
    first = token(text, log_prob, number, **({} if octets is None else {"bytes": list(octets)}))
    return {**first, "top_logprobs": [*likely] if likely else [dict(first)]}


@pytest.fixture
def aligner(tiny):
    return Aligner(tiny.tokenizer, tiny.eos_ids)


def ids_of(tiny, text, end=True):
    return [*tiny.text_ids(text), *([tiny.tokenizer.eos_token_id] if end else [])]


def pieces(tiny, ids):
    return [tiny.tokenizer.decode([number]) for number in ids]


# Reading


def test_positions_are_kept_as_the_server_said_them():
    kept = keep([written("Hi", -0.5, token("Hi", -0.5), token("Yo", -2.0), token("a", -3.0))], 2)
    assert kept == [["Hi", None, -0.5, [["Hi", None, -0.5], ["Yo", None, -2.0]]]]
    kept = keep([written("ü", -0.5, octets="ü".encode(), number=7)], 5)
    assert kept[0][:2] == ["Ã¼", 7] and kept[0][0].encode("latin-1").decode() == "ü"
    assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize("content", [None, [], {}, "x", [1], [{"token": 3}], [{"logprob": -1.0}]])
def test_what_is_no_list_of_tokens_is_nothing(content):
    assert keep(content, 5) is None


@pytest.mark.parametrize(
    "likely",
    [
        [token("a", 0.5)],  # a probability above 1
        [token("a", -0.1), token("b", -0.1)],  # that add up to more than 1
        [token("a", "-0.1")],
        [token("a", math.nan)],
        [token("a", True), token("b", None)],
        [token("\ufffd", -0.1), {"token": "\ufffd", "bytes": [239, 191, 189], "logprob": -0.2}],  # bytes that are not said
        [token("a", -9999.0)],
        [token("a", -0.1, bytes=[300])] and [{"logprob": -0.1}],
    ],
)  # fmt: skip
def test_impossible_numbers_name_nothing(likely):
    assert keep([{**token("a", -1.0), "top_logprobs": likely}], 5)[0][3] == []


def test_bytes_that_a_server_hides_end_what_can_be_aligned(tiny, aligner):
    kept = keep([written("t", -0.1), written("\ufffd", -0.1), written("e", -0.1)], 5)
    assert [entry[0] for entry in kept] == ["t", UNKNOWN, "e"]
    ids = [tiny.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    found = aligner.align(kept, ids)
    assert [named is not None for named in found.named] == [True, False, False] and found.gaps == {"other text": 2}


def test_googles_two_lists_are_read_as_one():
    result = {
        "chosenCandidates": [{"token": "Hi", "tokenId": 5, "logProbability": -0.2}],
        "topCandidates": [{"candidates": [{"token": "Hi", "logProbability": -0.2}, {"token": "Yo", "logProbability": -2.0}]}],
    }  # fmt: skip
    candidate = {"content": {"parts": [{"text": "Hi"}]}, "finishReason": "STOP", "logprobsResult": result}
    said = GEMINI.read({"candidates": [candidate]}, False)
    assert keep(said.logprobs, 5) == [["Hi", None, -0.2, [["Hi", None, -0.2], ["Yo", None, -2.0]]]]
    result["topCandidates"].append({})
    assert GEMINI.read({"candidates": [candidate]}, False).logprobs is None


# Alignment


def test_one_token_of_each_with_the_same_bytes_is_taught(tiny, aligner):
    ids = ids_of(tiny, SAY)
    kept = keep([written(piece, -0.7) for piece in pieces(tiny, ids[:-1])], 5)
    found = aligner.align(kept, ids)
    assert found.gaps == {"end": 1} and found.named[-1] is None
    assert [set(named) for named in found.named[:-1]] == [{number} for number in ids[:-1]]
    assert aligner.align(kept, ids[:-1]).gaps == Counter(), "an answer that was cut off has no end"


def test_what_is_split_differently_is_a_gap_and_the_rest_is_taught(tiny, aligner):
    ids = ids_of(tiny, SAY, end=False)
    parts = pieces(tiny, ids)
    place = next(place for place, piece in enumerate(parts) if len(piece) > 2)
    theirs = [*parts[:place], parts[place][:1], parts[place][1:], *parts[place + 1 :]]
    found = aligner.align(keep([written(piece, -0.7) for piece in theirs], 5), ids)
    assert found.gaps == {"split": 1}
    assert [named is None for named in found.named] == [number == place for number in range(len(ids))]
    joined = ["".join(parts[:2]), *parts[2:]]
    found = aligner.align(keep([written(piece, -0.7) for piece in joined], 5), ids)
    assert found.gaps == {"split": 2} and found.named[2] is not None


def test_another_text_is_never_taught(tiny, aligner):
    ids = ids_of(tiny, SAY)
    for theirs in (["a", " dog"], [" "], [*pieces(tiny, ids[:2]), "zzz"]):
        found = aligner.align(keep([written(piece, -0.7) for piece in theirs], 5), ids)
        same = 2 if theirs[-1] == "zzz" else 0
        assert (
            sum(named is not None for named in found.named) == same and found.gaps["other text"] == len(ids) - 1 - same
        )
        assert found.named[-1] is None
    longer = [*pieces(tiny, ids[:-1]), " and"]  # the text was cut: then its end is not the end that was foreseen
    assert (
        aligner.align(keep([written(piece, -0.7) for piece in longer] + [written("", -0.1)], 5), ids).named[-1] is None
    )


def test_the_end_is_taught_where_the_server_says_it(tiny, aligner):
    ids = ids_of(tiny, SAY)
    said = [written(piece, -0.7) for piece in pieces(tiny, ids[:-1])]
    end = tiny.tokenizer.eos_token_id
    for last in (written("", -1.5, octets=b""), written("<|end|>", -1.5)):
        found = aligner.align(keep([*said, last], 5), ids)
        assert found.gaps == Counter() and found.named[-1] == {end: -1.5}


def test_named_tokens_are_the_students_by_their_bytes_and_others_go_to_the_bucket(tiny, aligner):
    (number,) = tiny.text_ids("t")
    (other,) = tiny.text_ids("a")
    likely = [
        token("t", -0.7),
        token("a", -1.5),
        token(" a token of nobody", -2.0),
        token("<|end|>", -3.0),
        token("", -4.0),
    ]
    (named,) = aligner.align(keep([{**token("t", -0.7), "top_logprobs": likely}], 9), [number]).named
    assert named == {number: -0.7, other: -1.5, tiny.tokenizer.eos_token_id: -3.0}
    signal = OwnTextTeacher("x", lambda ids: [keep([{**token("t", -0.7), "top_logprobs": likely}], 9)], aligner, 300)
    signal.mark([Row("s", (1,), (number,))], lambda *_: None)
    view = signal.view(make_batch([Row("s", (1,), (number,))])).signal
    rest = 1 - math.exp(-0.7) - math.exp(-1.5) - math.exp(-3.0)
    assert float(view.top.rest_N) == pytest.approx(rest, abs=1e-6)


def test_likely_first_tokens_have_the_space_that_a_tokenizer_puts_before_every_text():
    """The server's `a` at the beginning was taught as the student's `a`, which never stands there, and not as `▁a`."""
    tokenizer = spaced_tokenizer()
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    likely = (token("the", -0.3), token("red", -2.0), token("a", -3.0))
    kept = keep([written("the", -0.3, *likely), written(" cat", -0.1)], 5)
    found = Aligner(tokenizer, frozenset({tokenizer.eos_token_id})).align(kept, ids)
    named = [{tokenizer.convert_ids_to_tokens(number) for number in each} for each in found.named]
    assert named == [{"▁the", "▁red"}, {"▁cat"}]


def test_ids_are_believed_only_if_they_are_the_students(tiny, aligner):
    (number,) = tiny.text_ids("t")
    end = tiny.tokenizer.eos_token_id
    likely = [token("t", -0.7, number), token("", -1.5, end, bytes=[])]
    (named,) = aligner.align(keep([{**likely[0], "top_logprobs": likely}], 9), [number]).named
    assert named == {number: -0.7, end: -1.5}
    likely = [token("t", -0.7, number + 1), token("", -1.5, end, bytes=[])]  # another vocabulary
    (named,) = aligner.align(keep([{**likely[0], "top_logprobs": likely}], 9), [number]).named
    assert named == {number: -0.7}


def test_a_written_token_below_the_likeliest_is_named_too(tiny, aligner):
    (number,) = tiny.text_ids("t")
    (other,) = tiny.text_ids("a")
    found = aligner.align(keep([written("t", -5.0, token("a", -0.1))], 5), [number])
    assert found.named == [{other: -0.1, number: -5.0}]
    assert aligner.align(keep([written("t", -9999.0, token("a", -0.1))], 5), [number]).named == [{other: -0.1}]


@pytest.mark.parametrize("number", [None, 9])
def test_numbers_of_another_token_than_the_written_one_are_a_gap(tiny, aligner, number):
    """llama.cpp shows a letter of several tokens as one, with what it knew before the last of them."""
    say = "t"
    (ours,) = tiny.text_ids(say)
    likely = [
        token("\ufffd", -0.3, number, bytes=[159]),
        token("\ufffd", -1.9, None if number is None else 8, bytes=[140]),
    ]
    found = aligner.align(keep([written(say, -0.3, *likely, number=number)], 5), [ours])
    assert found.named == [None] and found.gaps == {"unclear": 1}


def test_no_numbers_are_a_gap(tiny, aligner):
    ids = ids_of(tiny, SAY)
    assert aligner.align(None, ids).gaps == {"no log-probabilities": len(ids)}
    empty = [{**token(piece, -0.7), "top_logprobs": []} for piece in pieces(tiny, ids[:-1])]
    found = aligner.align(keep(empty, 5), ids)
    assert found.gaps == {"no log-probabilities": len(ids) - 1, "end": 1}
    assert aligner.align(keep(empty, 5), []).named == []


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 20), max_size=8),
    text=st.sampled_from([SAY, "Zürich naïve", "日本語 🙂 a", "a  b\n\tc"]),
)
def test_any_split_of_the_bytes_teaches_the_right_token_or_none(model, cuts, text):
    """Whatever the server's tokenizer: what is taught at a position names the token that stands there."""
    octets = text.encode()
    places = sorted({0, *(cut for cut in cuts if cut < len(octets)), len(octets)})
    theirs = [octets[start:stop] for start, stop in pairwise(places)]
    ids = ids_of(model, text)
    kept = keep(
        [
            {
                "token": "?",
                "bytes": list(part),
                "logprob": -0.7,
                "top_logprobs": [{"token": "?", "bytes": list(part), "logprob": -0.7}],
            }
            for part in theirs
        ],
        5,
    )
    found = Aligner(model.tokenizer, model.eos_ids).align(kept, ids)
    assert len(found.named) == len(ids) and sum(found.gaps.values()) == sum(named is None for named in found.named)
    tokens = Aligner(model.tokenizer, model.eos_ids).tokens.bytes_of
    starts, at = set(places), 0
    for number, named in zip(ids[:-1], found.named, strict=False):
        size = len(tokens[number])
        alone = at in starts and at + size in starts and not starts & set(range(at + 1, at + size))
        assert (named is not None) == alone and (named is None or set(named) == {number})
        at += size


@pytest.fixture(scope="module")
def model(tiny_folder):
    from limbeck.models.load import load_model

    return load_model(str(tiny_folder))


# The loss


def view_of(tiny, rows, told):
    teacher = OwnTextTeacher(
        "x", lambda ids: [told[sample_id] for sample_id in ids], Aligner(tiny.tokenizer, tiny.eos_ids), 300
    )
    return teacher, teacher.mark(rows, lambda *_: None)


def forward(tiny, batch, view):
    hidden_BTD, _ = features(tiny.net, batch.tokens_BT)
    return StudentForward(batch, hidden_BTD[batch.response_positions()], head_of(tiny.net), Features(), view)


def outcomes(log_q_V, named):
    """(p, q) over the named tokens and the bucket, in float64."""
    ids = list(named)
    p = torch.tensor([named[number] for number in ids]).double().exp()
    q = log_q_V[ids].double().exp()
    return torch.cat([p, (1 - p.sum()).clamp_min(1e-6)[None]]), torch.cat([q, (1 - q.sum())[None]])


DEFINED = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(),
    "jsd": lambda p, q: ((p * (2 * p / (p + q)).log()).sum() + (q * (2 * q / (p + q)).log()).sum()) / 2,
    "tvd": lambda p, q: (p - q).abs().sum() / 2,
}


@pytest.mark.parametrize("name", DEFINED)
def test_gaps_are_out_of_the_sum_and_of_what_it_is_divided_by(tiny, name):
    tiny.net.double()
    texts = {"a": "the cat sat", "b": "a dog ran to the red house"}
    rows = [
        Row(key, tuple(tiny.text_ids("why")), tuple(ids_of(tiny, text)), weight=1.0 + (key == "b"))
        for key, text in texts.items()
    ]
    told = {}
    for row in rows:  # every third token has no numbers, and the end none
        parts = pieces(tiny, row.response_ids[:-1])
        told[row.sample_id] = keep(
            [written(part, -1.1, token(part, -1.1), token("zq", -2.0), token("e", -2.5)) if n % 3 else {**token(part, -1.1), "top_logprobs": []} for n, part in enumerate(parts)], 5,
        )  # fmt: skip
    teacher, marked = view_of(tiny, rows, told)
    batch = make_batch(marked)
    term = make_term(name, {}).at_step(0.0, {})
    amount = batch.amount("token", None, term.term.column)
    data = forward(tiny, batch, teacher.view(batch))
    hidden_ND = data.hidden_ND.detach().requires_grad_()
    loss, sums = total_loss([term], {name: amount}, {}, replace(data, hidden_ND=hidden_ND))
    loss.backward()

    log_q_NV = head_of(tiny.net).detached().logits(data.hidden_ND.detach()).double().log_softmax(-1)
    aligner, total, weights, place = Aligner(tiny.tokenizer, tiny.eos_ids), 0.0, 0.0, 0
    for row in rows:
        for named in aligner.align(told[row.sample_id], row.response_ids).named:
            gone = hidden_ND.grad[place].abs().max()
            if named is None:
                assert gone == 0
            else:
                total += row.weight * float(DEFINED[name](*outcomes(log_q_NV[place], named)))
                weights += row.weight
                assert gone > 0
            place += 1
    gaps = place - sum(sum(row.columns[TAUGHT]) for row in marked)
    assert gaps >= 4 and weights < sum(row.weight * len(row.response_ids) for row in rows)
    assert amount == pytest.approx(weights)
    assert sums.terms[name] == pytest.approx(total, rel=1e-6) and float(loss.detach()) == pytest.approx(
        total / weights, rel=1e-6
    )


def test_text_losses_beside_it_still_read_every_token(tiny):
    rows = [Row("a", (5,), tuple(ids_of(tiny, SAY)))]
    _, marked = view_of(
        tiny, rows, {"a": keep([written(part, -1.0) for part in pieces(tiny, rows[0].response_ids[:-1])], 5)}
    )
    batch = make_batch(marked)
    tokens = len(rows[0].response_ids)
    for name, amount in (("cross_entropy", tokens), ("forward_kl", tokens - 1)):
        term = make_term(name, {})
        assert batch.amount(term.unit, None, term.column) == amount
    plain = make_batch(rows)
    assert plain.amount("token", None, make_term("forward_kl", {}).column) == tokens, "without gaps nothing changes"


def test_a_step_of_gaps_alone_teaches_nothing(tiny):
    row = Row("a", (5,), tuple(ids_of(tiny, SAY)), columns={TAUGHT: (0.0,) * len(ids_of(tiny, SAY))})
    batch = make_batch([row])
    term = make_term("forward_kl", {}).at_step(0.0, {})
    data = forward(tiny, batch, TeacherView())
    loss, sums = total_loss([term], {"forward_kl": batch.amount("token", None, term.term.column)}, {}, data)
    assert float(loss.detach()) == 0 and sums.terms == {}


def test_with_every_position_known_it_is_the_signal_of_a_scoring_server(tiny):
    """The same server, asked the other way: the divergences and their gradients agree as far as float32 lets them.

    The rest of the vocabulary is 1 minus a sum of some 300 probabilities: an error of 1e-7 in the sum is 3e-5 of a
    rest near 1/300, and its logarithm goes into the reverse divergences with the student's whole share of it.
    """
    other = make_net(seed=5, vocab_size=len(tiny.tokenizer))
    student = tiny.net
    teacher_model = replace(tiny, net=other)
    with ScoringServer(teacher_model, say=SAY) as server:
        api = ApiTeacher(Served(url=server.url, name="toy", kind="llama.cpp", logprobs=NEARLY_ALL))
        request = Request(api.identity, ({"role": "user", "content": "why"},), Sampling(0.0, 1.0, 64), 1)
        ((_, found),) = api.answers([request])
        scorer = ServerScorer(ApiTeacher(Served(url=server.url, name="toy")), NEARLY_ALL, tiny.tokenizer)
        row = Row("a", tuple(tiny.prompt_ids(request.messages)), tuple(ids_of(tiny, SAY)))
        own, (marked,) = view_of(tiny, [row], {"a": found.told})
        assert own.facts["taught_share"] == 1 and own.reasons == "no gaps"
        batch = make_batch([marked])
        theirs = scorer.view(make_batch([row])).signal
        ours = own.view(batch).signal
    log_q = torch.randn(len(row.response_ids), len(tiny.tokenizer), generator=torch.Generator().manual_seed(3)).double()
    targets_N = torch.tensor(row.response_ids)
    assert isinstance(ours, GappedSignal) and student is not other
    rest_N = (1 - theirs.log_prob_NK.double().exp().sum(-1)).clamp_min(MIN_REST)
    for name in DEFINED:
        params = DIVERGENCES[name].defaults
        one, two = (
            signal.compare(DIVERGENCES[name], params, Distribution(log_q.clone()), targets_N)
            for signal in (ours, replace(theirs, rest_N=rest_N.float()))
        )
        named = ours.top_tokens().log_prob(targets_N).isfinite() & theirs.top_tokens().log_prob(targets_N).isfinite()
        assert named.sum() >= 4  # where the written token is not among them, ours names it as one more
        torch.testing.assert_close(one[0][named], two[0][named], rtol=0, atol=1e-4)
        torch.testing.assert_close(one[1][named], two[1][named], rtol=0, atol=1e-4)


# The server


def test_they_are_asked_for_with_text_that_is_drawn_plainly_or_by_servers_with_plain_ones():
    def asked(kind, sampling, raw=None):
        with Scripted() as server:
            made = ApiTeacher(Served(url=server.url, name="toy", kind=kind, logprobs=5))
            list(made.answers([Request("x", ({"role": "user", "content": "q"},), sampling, 1, raw=raw)]))
            return server.seen[0][1]

    plain, greedy = Sampling(1.0, 1.0, 16), Sampling(0.0, 1.0, 16)
    for kind in ("openai", "openai-compatible", "sglang"):
        assert asked(kind, plain)["top_logprobs"] == 5 and asked(kind, plain)["logprobs"] is True
        assert "logprobs" not in asked(kind, greedy), "they may be of the distribution that is drawn from"
    assert asked("llama.cpp", greedy)["top_logprobs"] == asked("vllm", greedy)["top_logprobs"] == 5
    assert "logprobs" not in asked("llama.cpp", greedy, raw="<|user|>")


def test_they_are_stored_in_one_stroke_with_the_answer(tiny, tmp_path):
    with ScoringServer(tiny, say=SAY) as server, Store(tmp_path / "s.sqlite") as store:
        api = ApiTeacher(Served(url=server.url, name="toy", kind="llama.cpp", logprobs=3))
        request = Request(api.identity, ({"role": "user", "content": "q"},), Sampling(1.0, 1.0, 64), 1)
        (sample,) = elicit([request], store, lambda: api)
        kept = store.evidence_of(sample.id, TOLD, api.identity)
        assert "".join(entry[0] for entry in kept) == SAY and all(len(entry[3]) == 3 for entry in kept)
        assert store.evidence_of(sample.id, TOLD, "another") is None
        elicit([request], store, lambda: pytest.fail("asked again"))


def test_a_key_that_a_server_says_is_not_kept_in_pieces(tiny, monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", "sk-canary-4711")
    for say, is_kept in (("the key is sk-canary-4711", False), (SAY, True)):
        with ScoringServer(tiny, say=say) as server:
            made = ApiTeacher(Served(url=server.url, name="toy", logprobs=3))
            request = Request("x", ({"role": "user", "content": "q"},), Sampling(1.0, 1.0, 64), 1)
            ((_, found),) = made.answers([request])
            assert (found.told is not None) == is_kept and "4711" not in found.text


def test_a_server_without_them_is_found_at_the_start(tiny, tmp_path):
    with ScoringServer(tiny, say=SAY) as server, Store(tmp_path / "s.sqlite") as store:
        api = ApiTeacher(Served(url=server.url, name="toy", logprobs=3))
        api.begin_with(0, 0, tries := Tries(store.path, "toy"))
        assert probe(api) == 3 and tries.all() == 1 and tries.unanswered() == (0, 0)
    with Scripted() as server, pytest.raises(UserError, match="but without log-probabilities"):
        probe(ApiTeacher(Served(url=server.url, name="toy", logprobs=3)))
    refusal = ("status", 400, {}, b'{"error": {"message": "logprobs are not supported"}}')
    with Scripted(lambda number, body: refusal) as server, pytest.raises(UserError, match="logprobs are not supported"):
        probe(ApiTeacher(Served(url=server.url, name="toy", logprobs=3)))


# Whole runs


def recipe_of(recipe_data, server, folder, **more):
    served = {"url": server.url, "name": "toy", "logprobs": 6, **more}
    writer = [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 40}]
    return recipe_data | {
        "teacher": {"server": served},
        "student": {"start": {"pretrained": str(folder)}},
        "loss": ["forward_kl", {"cross_entropy": {"weight": 0.1}}],
        "writer": writer,
        "evaluate": {**recipe_data["evaluate"], "controls": []},
    }


def test_a_recipe_trains_on_them_goes_on_and_says_how_many_there_are(tiny, tiny_folder, recipe_data, tmp_path):
    teacher = replace(tiny, net=make_net(seed=5, vocab_size=len(tiny.tokenizer)))
    with ScoringServer(teacher, "vLLM", say=SAY) as server:  # as OpenAI: no ids, no end
        data = recipe_of(recipe_data, server, tiny_folder)
        folder = run(parse(data), tmp_path / "run")
        asked = len(server.seen)
        run(parse(data), tmp_path / "run")
        assert len(server.seen) == asked, "all of it is in the store"
    facts = json.loads((folder / "logprobs.json").read_text())
    tokens = len(ids_of(tiny, SAY))
    assert (
        facts["taught_share"] == pytest.approx((tokens - 1) / tokens) and facts["gaps: end"] == facts["tokens"] / tokens
    )
    assert 0 < facts["named_probability"] <= 1
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record["taught_tokens"] == record["response_tokens"] * (tokens - 1) / tokens
    values = [record["terms"]["forward_kl"] for record in records]
    assert values[-1] < values[0], "it learns"
    write_report(folder)
    assert "Log-probabilities that came with the server" in (folder / "report.html").read_text()


def test_too_many_gaps_are_refused_before_the_training(tiny, tiny_folder, recipe_data, tmp_path):
    def spoil(path, reply):
        told = reply["choices"][0].get("logprobs") if isinstance(reply, dict) and "chat" in path else None
        if told:  # text to be trained on
            told["content"][1] |= {"token": "?", "bytes": [63]}
        return reply

    with ScoringServer(tiny, "vLLM", say=SAY, spoil=spoil) as server:
        data = recipe_of(recipe_data, server, tiny_folder)
        with pytest.raises(UserError, match=r"stand at \d+% of the text's tokens.*other text.*half are needed"):
            run(parse(data), tmp_path / "run", stages=("elicit", "train"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_doctor_looks_whether_a_server_that_only_writes_answers(tiny, tiny_folder, recipe_data, tmp_path):
    def seen(server, **more):
        findings = examine(parse(recipe_of(recipe_data, server, tiny_folder, **more)), tmp_path / "none")
        return {finding.name: (finding.verdict, finding.detail) for finding in findings}

    with ScoringServer(tiny, say=SAY) as server:
        verdict, detail = seen(server)["server"]
        assert verdict == "fine" and "(llama.cpp) answers, and names 6 tokens" in detail
        assert seen(server)["served weights"][0] == "not looked at"
    with Scripted() as server:
        assert (
            seen(server)["server"] == ("fault", seen(server)["server"][1]) and "log-prob" in seen(server)["server"][1]
        )
        data = recipe_of(recipe_data, server, tiny_folder, logprobs=None) | {"loss": ["cross_entropy"]}
        findings = {finding.name: finding for finding in examine(parse(data), tmp_path / "none")}
        assert findings["server"].verdict == "fine" and findings["server"].detail.endswith(" answers")
        server.script = lambda number, body: {"choices": []}
        findings = {finding.name: finding for finding in examine(parse(data), tmp_path / "none")}
        assert findings["server"].verdict == "fault" and "malformed" in findings["server"].detail


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"server": {"kind": "anthropic"}}}, "Anthropic.* gives none"),
        ({"teacher": {"server": {"kind": "lm-studio"}}}, "LM Studio gives none"),
        ({"teacher": {"server": {"kind": "openai", "logprobs": 21}}}, "names 20 at most"),
        ({"teacher": {"server": {"names": 5}}}, "leave one of them out"),
        ({"teacher": {"cache": {"top_k": {"k": 5}}}}, "kept with the text"),
        ({"teacher": {"model": "smollm2-135m-instruct"}}, r"teacher\.server\.logprobs: weights that are here"),
        ({"loss": ["cross_entropy"]}, "nothing would be taught"),
        ({"loss": [{"forward_kl": {"temperature": 2.0}}]}, "needs more than the likeliest tokens"),
        ({"loss": [{"minillm": {}}]}, "minillm|student"),
        ({"writer": [{"by": "teacher", "temperature": 0.7}]}, r"writer\[0\]\.temperature: .*set temperature and top_p to 1"),
        ({"writer": [{"by": "teacher"}, {"by": "student"}], "train": {"steps": 2}}, "text that the student writes"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_refused_with_its_place(recipe_data, tiny_folder, changes, message):
    with Scripted(lambda number, body: answer()) as server:
        data = recipe_of(recipe_data, server, tiny_folder)
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    if "server" in changes.get("teacher", {}):
        data["teacher"]["server"] = {
            "url": "http://127.0.0.1:1/v1",
            "name": "toy",
            "logprobs": 6,
            **changes["teacher"]["server"],
        }
    with pytest.raises(RecipeError, match=message):
        resolve(parse(data))


def test_greedy_text_of_a_server_with_plain_ones_is_fine(recipe_data, tiny_folder):
    with Scripted() as server:
        data = recipe_of(recipe_data, server, tiny_folder, kind="llama.cpp")
    data["writer"] = [{"by": "teacher", "temperature": 0.0}]
    assert resolve(parse(data))
