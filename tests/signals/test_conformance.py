"""One set of cases over every back end of a teacher's signal. What a back end can't promise exactly has its tolerance in BACK_ENDS.

The oracle computes in float64, from the teacher's own logits and each divergence's definition, over the outcomes that a back end tells
apart: all tokens, or the likeliest and a bucket. The packaged llama.cpp server with the real model stands among them.

Shapes: N response positions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from limbeck.commands.serve import serve
from limbeck.commands.serve_states import StatesServer
from limbeck.config.server import Served
from limbeck.config.teacher import BridgeSettings, CacheSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.api import ApiTeacher
from limbeck.models.bridge import TeacherOverBridge
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.own_text import Aligner, OwnTextTeacher
from limbeck.models.score import ServerScorer
from limbeck.models.several import TeacherEnsemble
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.signals.cache import SignalCache
from limbeck.training.prepare import fill_cache
from limbeck.types import Batch, Request, Sampling
from tests.conftest import make_net
from tests.scoring_server import ScoringServer

Signal = Callable[[Batch], object]
NAMES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
TEXTS = [
    ("why is the sky blue", "the sky is blue"),
    ("count", "one two three four"),
    ("a dog", "ran"),
    ("the cat", "sat on the red mat"),
    ("Zürich", "日本語 🙂 naïve"),
]


@dataclass(frozen=True)
class BackEnd:
    """`open` gives the view of a teacher; a value may be `nats` off the oracle's; `kept` tokens are told apart (all where None)."""

    open: Callable[..., object]
    nats: float
    kept: int | None = None


@contextmanager
def live(teacher, folder):
    yield lambda batch: teacher.view(batch).signal


def cached(**form):
    @contextmanager
    def opened(teacher, folder):
        cache = SignalCache(folder, teacher.identity, teacher.model.vocab_size, CacheSettings(**form))

        def signal(batch):
            fill_cache(
                cache,
                lambda some: teacher.view(some, vocab_size=teacher.model.vocab_size),
                rows_of(teacher.model),
                lambda done, total: None,
            )
            return cache.view(batch).signal

        yield signal

    return opened


def served(protocol, k=10**6):
    @contextmanager
    def opened(teacher, folder):
        with ScoringServer(teacher.model, protocol) as server:
            scorer = ServerScorer(ApiTeacher(Served(url=server.url, name="toy")), k, teacher.model.tokenizer)
            yield lambda batch: scorer.view(batch).signal

    return opened


def served_and_kept(protocol):
    @contextmanager
    def opened(teacher, folder):
        with ScoringServer(teacher.model, protocol) as server:
            scorer = ServerScorer(ApiTeacher(Served(url=server.url, name="toy")), 10**6, teacher.model.tokenizer)
            cache = SignalCache(
                folder, scorer.identity, scorer.vocab_size, CacheSettings(top_k={"k": 65535, "bits": 16})
            )
            fill_cache(cache, scorer.view, rows_of(teacher.model), lambda done, total: None)
        yield lambda batch: cache.view(batch).signal  # the server is gone

    return opened


@contextmanager
def with_its_own_text(teacher, folder):
    """The server writes the texts itself, and says with them what it knew."""
    model, rows = teacher.model, rows_of(teacher.model)
    told = []
    for question, say in TEXTS:
        with ScoringServer(model, say=say) as server:
            api = ApiTeacher(Served(url=server.url, name="toy", kind="openai-compatible", logprobs=1024))
            request = Request("x", ({"role": "user", "content": question},), Sampling(1.0, 1.0, 99), 1)
            told += [answer.told for _, answer in api.answers([request])]
    aligner = Aligner(model.tokenizer, model.eos_ids)
    own = OwnTextTeacher("x", lambda ids: [told[int(number)] for number in ids], aligner, model.vocab_size)
    own.mark(rows, lambda *_: None)
    assert own.reasons == "no gaps"
    yield lambda batch: own.view(batch).signal


@contextmanager
def elsewhere(teacher, folder):
    """Hidden states over a wire."""
    address = ("127.0.0.1", 0)
    with (
        patch.dict(os.environ, {"LIMBECK_API_KEY": "sk-canary-4711"}),
        StatesServer(
            teacher.model, "toy", "contents", "sk-canary-4711", address=address, context=256, slots=4
        ) as server,
    ):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        api = ApiTeacher(Served(url=server.url, name="toy", kind="states"))
        far = StatesTeacher(api, teacher.model.tokenizer)
        yield lambda batch: far.view(batch).signal
        server.shutdown()


@contextmanager
def several(teacher, folder):
    yield lambda batch: TeacherEnsemble([teacher, teacher], [1.0, 2.0], [None, None], "mean").view(batch).signal


@contextmanager
def real_server(teacher, folder):
    """llama.cpp computes with the file's 4-bit weights and 8-bit states."""
    serving = serve("smollm2-135m-instruct", context=256, slots=2, threads=1)
    api = ApiTeacher(Served(url=serving.url, name=serving.name, concurrency=2))
    scorer = ServerScorer(api, 64, teacher.model.tokenizer)
    with patch.dict(os.environ, {api.settings.key: serving.key}):
        yield lambda batch: scorer.view(batch).signal


def bridged(**settings):
    @contextmanager
    def open_(teacher, _):
        bridge = TeacherOverBridge(teacher, teacher.model, BridgeSettings(**settings))
        yield lambda batch: bridge.view(batch).signal

    return open_


REAL = "the real llama.cpp server"
BACK_ENDS = {
    "in process": BackEnd(live, 2e-6),
    "hidden, float32": BackEnd(cached(hidden={"dtype": "float32"}), 2e-6),
    "hidden, over a wire": BackEnd(elsewhere, 2e-6),
    "hidden, bfloat16": BackEnd(cached(hidden={}), 0.02),
    "all tokens, 16 bits": BackEnd(cached(top_k={"k": 65535, "bits": 16}), 2e-3),
    "16 tokens, 16 bits": BackEnd(cached(top_k={"k": 16, "bits": 16}), 2e-3, 16),
    "16 tokens, 8 bits": BackEnd(cached(top_k={"k": 16}), 0.03, 16),
    "llama.cpp's protocol, all tokens": BackEnd(served("llama.cpp"), 2e-5),
    "vLLM's protocol, all tokens": BackEnd(served("vLLM"), 2e-5),
    "llama.cpp's protocol, 16 tokens": BackEnd(served("llama.cpp", 16), 2e-5, 16),
    "vLLM's protocol, 16 tokens": BackEnd(served("vLLM", 16), 2e-5, 16),
    "a server, kept": BackEnd(served_and_kept("vLLM"), 2e-3),
    "a server's own text, all tokens": BackEnd(with_its_own_text, 2e-4),
    "several that are one": BackEnd(several, 2e-6),
    "a bridge between equal tokens": BackEnd(bridged(), 2e-6),
    "a bridge, the rest sorted": BackEnd(bridged(rest="sorted"), 2e-6),
    "a bridge by edits": BackEnd(bridged(match="edits", spans="equal", others="written"), 2e-6),
    REAL: BackEnd(real_server, 0.1, 64),
}


def rows_of(model: Model) -> list[Row]:
    asked = [tuple(model.prompt_ids(({"role": "user", "content": question},))) for question, _ in TEXTS]
    return [
        Row(str(n), ids, (*model.text_ids(said), model.tokenizer.eos_token_id), frozenset())
        for n, (ids, (_, said)) in enumerate(zip(asked, TEXTS, strict=True))
    ]


@pytest.fixture(scope="module")
def model_of(tiny_folder):
    """The tiny model, or for the real server the real one; loaded once."""
    known: dict[str, Model] = {}

    def found(name: str) -> Model:
        source = "smollm2-135m-instruct" if name.startswith("the real") else str(tiny_folder)
        if source not in known:
            known[source] = load_model(source)
        return known[source]

    return found


@dataclass
class Case:
    back_end: BackEnd
    signal: Signal
    batch: Batch
    teacher_NV: Tensor  # its log-probabilities in float64
    student_NV: Tensor

    def values(self, name: str, batch: Batch | None = None, student_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values [N] and gradients [N, V] as a term would get them."""
        student_NV = self.student_NV if student_NV is None else student_NV
        rows = self.signal(batch or self.batch).chunk(slice(0, len(student_NV))).rows(slice(0, len(student_NV)))
        return rows.compare(
            DIVERGENCES[name],
            checked_params(name, {}),
            Distribution(student_NV.clone()),
            targets_of(batch or self.batch),
        )


def targets_of(batch: Batch) -> Tensor:
    row_N, position_N = batch.response_positions()
    return batch.tokens_BT[row_N, position_N + 1]


@pytest.fixture(params=[name for name in BACK_ENDS if name != REAL])  # which tests/long/test_conformance.py has
def case(request, model_of, tmp_path) -> Iterator[Case]:
    model, back_end = model_of(request.param), BACK_ENDS[request.param]
    teacher, rows = InProcessTeacher(model), rows_of(model)
    batch = make_batch(rows, tuple(range(len(rows))))
    with torch.no_grad():
        logits_NV = teacher.signal(batch).chunk(slice(None)).logits_CV.clone()
    noise = torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(3))
    with back_end.open(teacher, tmp_path / "kept") as signal:
        yield Case(back_end, signal, batch, logits_NV.double().log_softmax(-1), logits_NV + 0.7 * noise)


def outcomes(log_NV: Tensor, ids_NK: Tensor | None) -> Tensor:
    """log-probabilities over all tokens, or over those given and what is left."""
    if ids_NK is None:
        return log_NV
    kept_NK = log_NV.gather(-1, ids_NK)
    return torch.cat([kept_NK, (1 - kept_NK.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()], -1)


def oracle(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Each divergence by its definition, in float64."""
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if name == "jsd":
        middle = (0.5 * p + 0.5 * q).log()
        return 0.5 * kl(log_p, middle) + 0.5 * kl(log_q, middle)
    if name == "skew_kl":
        return kl(log_p, (0.1 * p + 0.9 * q).log())
    return {"forward_kl": kl(log_p, log_q), "reverse_kl": kl(log_q, log_p), "tvd": 0.5 * (p - q).abs().sum(-1)}[name]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_oracles(name, case):
    kept = case.back_end.kept
    ids_NK = None if kept is None else case.signal(case.batch).ids_NK
    if kept is not None:
        assert ids_NK.shape[1] == kept
    log_q = case.student_NV.double().log_softmax(-1)
    want_N = oracle(name, outcomes(case.teacher_NV, ids_NK), outcomes(log_q, ids_NK))
    got_N, _ = case.values(name)
    assert float((got_N.double() - want_N).abs().max()) <= case.back_end.nats
    assert float(want_N.min()) > 1e-3, "there is something to measure"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tvd"])  # whose kinks a difference may step over
def test_gradients_are_of_these_values(name, case):
    """Along a random direction, by central differences in float64 of the back end's own value."""
    direction = torch.randn(case.student_NV.shape, generator=torch.Generator().manual_seed(5)).double()
    student = case.student_NV.double()
    _, gradient_NV = case.values(name, student_NV=student)
    step = 1e-5
    above, below = (case.values(name, student_NV=student + sign * step * direction)[0] for sign in (1, -1))
    slope_N = (above - below) / (2 * step)
    assert torch.allclose((gradient_NV * direction).sum(-1), slope_N, rtol=1e-4, atol=1e-6)


def test_a_shift_of_the_students_logits_changes_nothing(case):
    for name in NAMES:
        shift_N1 = torch.linspace(-30, 30, len(case.student_NV))[:, None]
        plain, shifted = case.values(name), case.values(name, student_NV=case.student_NV + shift_N1)
        assert torch.allclose(plain[0], shifted[0], atol=2e-5) and torch.allclose(plain[1], shifted[1], atol=2e-5)


def test_texts_alone_and_together_have_the_same_values(case):
    """Micro-batches of any size, padded to any length: each position's value is its own."""
    real = case.back_end.open is real_server  # whose products depend a little on what is computed with them
    rows_N = case.batch.response_positions()[0]
    rows = rows_of_batch(case.batch)
    for name in ("forward_kl", "reverse_kl"):
        together, _ = case.values(name)
        alone = [case.values(name, make_batch(rows, (n,)), case.student_NV[rows_N == n])[0] for n in range(len(rows))]
        pairs = make_batch(rows, (3, 0))
        paired, _ = case.values(name, pairs, torch.cat([case.student_NV[rows_N == 3], case.student_NV[rows_N == 0]]))
        apart = (
            float((torch.cat(alone) - together).abs().max()),
            float((paired - torch.cat([alone[3], alone[0]])).abs().max()),
        )
        assert max(apart) < (0.1 if real else 5e-6)


def rows_of_batch(batch: Batch) -> list[Row]:
    rows = []
    for number, (tokens_T, mask_T) in enumerate(zip(batch.tokens_BT, batch.mask_BT, strict=True)):
        at = mask_T.nonzero()[:, 0].tolist()
        ids = tokens_T[: at[-1] + 1].tolist()
        rows.append(Row(str(number), tuple(ids[: at[0]]), tuple(ids[at[0] :]), frozenset()))
    return rows


def test_a_student_that_is_the_teacher_has_no_loss(case):
    limit = {"forward_kl": case.back_end.nats, "reverse_kl": case.back_end.nats}
    for name, nats in limit.items():
        values_N, _ = case.values(name, student_NV=case.teacher_NV.float())
        assert float(values_N.abs().max()) <= nats and float(values_N.min()) > -1e-5


def test_draws_are_unbiased_and_renormalised_tokens_are_not(model_of, tmp_path):
    """The mean gradient of many draws is the whole distribution's, within five standard errors of each entry."""
    model = model_of("in process")
    teacher, batch = InProcessTeacher(model), make_batch(rows_of(model), (0, 1, 2, 3, 4))
    dense = teacher.signal(batch).chunk(slice(None)).logits_CV.log_softmax(-1)
    student = Distribution(
        make_net(seed=2, vocab_size=model.vocab_size).lm_head.weight.detach()[: len(dense)]
        @ torch.randn(32, model.vocab_size)
    )
    draws = 20000
    cache = SignalCache(tmp_path / "kept", teacher.identity, model.vocab_size, CacheSettings(sampled={"draws": draws}))
    fill_cache(
        cache, lambda some: teacher.view(some, vocab_size=model.vocab_size), rows_of(model), lambda done, total: None
    )
    rows = cache.view(batch).signal.chunk(slice(0, len(dense))).rows(slice(0, len(dense)))
    params = checked_params("forward_kl", {})
    _, gradient_NV = rows.compare(
        DIVERGENCES["forward_kl"], params, Distribution(student.logits_RV.clone()), targets_of(batch)
    )
    want_NV = student.prob - dense.exp()
    error_NV = (dense.exp() * (1 - dense.exp()) / draws).sqrt()
    assert float(((gradient_NV - want_NV).abs() / (5 * error_NV + 1e-6)).max()) < 1
    values, ids = dense.topk(16)
    renormalised = student.prob.clone().scatter_add_(-1, ids, -(values - values.logsumexp(-1, keepdim=True)).exp())
    assert float((renormalised - want_NV).norm() / want_NV.norm()) > 5 * float(
        (gradient_NV - want_NV).norm() / want_NV.norm()
    )
