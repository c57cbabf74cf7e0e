"""The protocol of a teacher's signal: a signal of one's own trains, is scored and is stored; and every signal of ours
can be cut, joined and moved, or says why it can't be asked something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from limbeck import UserError
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.model import head_of
from limbeck.models.taps import features
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.objectives.forward import Features, StudentForward, TeacherView
from limbeck.objectives.head import Head, TeacherSignal
from limbeck.objectives.term import make_term
from limbeck.objectives.total import total_loss
from limbeck.signals.bridged import BridgedSignal, Pairs, Places
from limbeck.signals.cache import SignalCache
from limbeck.signals.dense import DenseSignal
from limbeck.signals.forms import FORMS, form_of
from limbeck.signals.gaps import GappedSignal
from limbeck.signals.several import GatedSignal, MixedSignal
from limbeck.signals.sparse import Sampled, TextSignal, TopK
from limbeck.training.prepare import Remembered, fill_cache
from limbeck.training.rollout_stats import teachers_view

ROWS = [Row(f"s{n}", (5, 6, 7 + n), (20 + n, 21, 0), frozenset({"student"})) for n in range(4)]


@dataclass(frozen=True)
class UnigramSignal(TeacherSignal):
    """A teacher that says the same at every position, whatever stands before it. No class of the package knows it."""

    whole: ClassVar[bool] = True

    logits_NV: Tensor

    @property
    def device(self) -> torch.device:
        return self.logits_NV.device

    def to(self, device):
        return UnigramSignal(self.logits_NV.to(device))

    def select(self, positions):
        return UnigramSignal(self.logits_NV[positions])

    chunk = rows = select

    def join(self, others: Sequence[UnigramSignal]):
        return UnigramSignal(torch.cat([signal.logits_NV for signal in (self, *others)]))

    @property
    def p(self) -> Distribution:
        return Distribution(self.logits_NV)

    def log_prob(self, targets_N):
        return self.p.log.gather(-1, targets_N[:, None])[:, 0]

    def compare(self, divergence, params, q, targets_R):
        return divergence(self.p, q, params, targets_R)


def unigram_view(batch) -> TeacherView:
    logits_V = torch.linspace(-2, 2, 300)
    return TeacherView(UnigramSignal(logits_V.expand(int(batch.mask_BT.sum()), -1)))


def forward(tiny, batch, teacher: TeacherView) -> StudentForward:
    hidden_BTD, _ = features(tiny.net, batch.tokens_BT)
    return StudentForward(batch, hidden_BTD[batch.response_positions()], head_of(tiny.net), Features(), teacher)


def test_a_signal_of_ones_own_trains(tiny):
    batch = make_batch(ROWS)
    terms = [make_term(name, {}).at_step(0.0, {}) for name in ("forward_kl", "jsd")]
    amounts = {term.label: batch.amount(term.term.unit, term.term.only) for term in terms}
    optimizer = torch.optim.SGD(tiny.net.parameters(), lr=0.5)
    values = []
    for _ in range(2):
        loss, sums = total_loss(terms, amounts, {}, forward(tiny, batch, unigram_view(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(sums.terms["forward_kl"])
    assert values[1] < values[0]


def test_a_signal_of_ones_own_is_scored_and_stored_as_any_other(tiny, tmp_path):
    remembered = Remembered(unigram_view)
    targets = torch.tensor([row.response_ids for row in ROWS])
    log_V = torch.linspace(-2, 2, 300).log_softmax(-1)
    torch.testing.assert_close(torch.stack(remembered.score(ROWS)), log_V[targets])
    batch = make_batch(ROWS, (2, 0))
    torch.testing.assert_close(remembered(batch).signal.p.log, log_V.expand(6, -1))
    seen = teachers_view(forward(tiny, batch, unigram_view(batch)))
    assert seen["teacher_log_prob"][0] == pytest.approx(float(log_V[targets[[2, 0]]].sum()), rel=1e-5)

    cache = SignalCache(tmp_path, "unigram", 300, CacheSettings(top_k={"k": 300, "bits": 16}))
    fill_cache(cache, unigram_view, ROWS, lambda done, total: None)
    stored = cache.view(batch).signal.top_tokens().log_prob(batch.tokens_BT[batch.mask_BT])
    torch.testing.assert_close(stored, log_V[targets[[2, 0]]].flatten(), rtol=0, atol=2e-3)
    cache = SignalCache(tmp_path / "states", "unigram", 300, CacheSettings(hidden={}))
    with pytest.raises(UserError, match="no hidden states"):
        fill_cache(cache, unigram_view, ROWS, lambda done, total: None)


# -- the package's own --------------------------------------------------------------------------------------------------

N, V, E = 6, 9, 5


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(seed=0) -> DenseSignal:
    return DenseSignal(random(N, E, seed=seed), Head(random(V, E, seed=seed + 1), random(V, seed=seed + 2)))


def top(count_N=None) -> TopK:
    log_NK, ids_NK = random(N, V, seed=4).log_softmax(-1).topk(4)
    return TopK(ids_NK, log_NK, count_N=count_N, target_log_prob_N=random(N, seed=5))


def sampled() -> Sampled:
    ids_NK = torch.arange(N * 3).reshape(N, 3) % V
    return Sampled(ids_NK, torch.full((N, 3), 1 / 3).double(), random(N, seed=6))


def bridged() -> BridgedSignal:
    common = torch.arange(5)
    alone = torch.arange(5, V)
    pairs = Pairs(common, common, alone, alone, ours_W=torch.cat([common, torch.full((4,), -1)]))
    at_N = torch.tensor([0, -1, 1, 3, -1, 2])
    places = Places(at_N, torch.arange(N) % 5, torch.full((N,), -3.0).double(), torch.arange(N) % V)
    return BridgedSignal(random(4, E, seed=7), Head(random(V, E, seed=8)), pairs, places, others="written")


SIGNALS = {
    "dense": dense(),
    "top": top(),
    "top, uneven": top(torch.tensor([1, 4, 2, 3, 4, 2])),
    "gapped": GappedSignal(
        replace(top(), target_log_prob_N=None), torch.tensor([True, False, True, True, False, True])
    ),
    "sampled": sampled(),
    "text": TextSignal(torch.arange(N) % V),
    "mixed": MixedSignal([dense(), dense(9)], torch.tensor([0.25, 0.75]).double().expand(N, 2)),
    "gated": GatedSignal(dense(), dense(9)),
    "bridged": bridged(),
}


def values(signal: TeacherSignal, positions: Tensor) -> Tensor:
    """The forward KL, and its gradient, at these positions of the student: [positions, 1 + V]."""
    q = Distribution(random(N, V, seed=20)[positions])
    rows = signal.chunk(slice(0, len(positions))).rows(slice(0, len(positions)))
    params = checked_params("forward_kl", {})
    values_N, gradient_NV = rows.compare(DIVERGENCES["forward_kl"], params, q, positions % V)
    return torch.cat([values_N[:, None], gradient_NV], 1)


@pytest.mark.parametrize("name", SIGNALS)
def test_what_was_cut_and_joined_in_another_order_says_the_same_at_each_position(name):
    signal = SIGNALS[name]
    whole = values(signal, torch.arange(N))
    pieces = [signal.select(slice(4, 6)), signal.select(torch.tensor([3, 0])), signal.select(slice(1, 3))]
    order = torch.tensor([4, 5, 3, 0, 1, 2])
    joined = pieces[0].join(pieces[1:]).to("cpu")
    torch.testing.assert_close(values(joined, order), whole[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values(signal.join([]), torch.arange(N)), whole, rtol=0, atol=0)
    assert joined.device == signal.device == torch.device("cpu")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_whole_signal_gives_the_probability_of_every_token_and_others_refuse(name):
    signal, targets_N = SIGNALS[name], torch.arange(N) % V
    if signal.whole:
        rows = signal.chunk(slice(0, N)).rows(slice(0, N))
        torch.testing.assert_close(signal.log_prob(targets_N), rows.p.log.gather(-1, targets_N[:, None])[:, 0])
    elif name.startswith("top"):
        torch.testing.assert_close(signal.log_prob(targets_N), signal.target_log_prob_N)
    else:
        with pytest.raises(UserError, match=r"use a divergence|measure with the teacher itself"):
            signal.log_prob(targets_N)
    if name != "dense":
        with pytest.raises(UserError, match="no hidden states"):
            signal.hidden_states()
    if not name.startswith(("top", "gapped")):
        with pytest.raises(UserError, match="names no tokens"):
            signal.top_tokens()


def test_at_a_gap_there_is_nothing():
    known_N = SIGNALS["gapped"].known_N
    with_gaps, without = values(SIGNALS["gapped"], torch.arange(N)), values(top(), torch.arange(N))
    assert (with_gaps[~known_N] == 0).all() and (without[~known_N] != 0).any()
    torch.testing.assert_close(with_gaps[known_N], without[known_N], rtol=0, atol=0)


def test_joined_rows_may_name_different_numbers_of_tokens():
    wide, narrow = top(), TopK(*(column[:, :2] for column in (top().ids_NK, top().log_prob_NK)))
    joined = wide.join([narrow])
    assert joined.top_tokens().count_N.tolist() == [4] * N + [2] * N and joined.target_log_prob_N is None
    both = torch.cat([values(wide, torch.arange(N)), values(narrow, torch.arange(N))])
    got = torch.cat([values(joined.select(slice(0, N)), torch.arange(N)), values(joined.select(slice(N, 2 * N)), torch.arange(N))])  # fmt: skip
    torch.testing.assert_close(got, both, rtol=1e-12, atol=1e-12)


def test_a_token_that_is_not_named_has_no_known_probability():
    tokens = top(torch.tensor([1, 4, 2, 3, 4, 2])).top_tokens()
    last_N = tokens.ids_NK[:, -1]  # beyond the count of most rows
    assert tokens.log_prob(last_N).isnan().tolist() == [True, False, True, True, False, True]
    torch.testing.assert_close(tokens.log_prob(tokens.ids_NK[:, 0]), tokens.log_prob_NK[:, 0])


def test_every_form_that_a_recipe_can_name_has_its_class():
    sections = set(CacheSettings.model_fields) - {"folder"}
    assert sections == set(FORMS)
    assert all(form_of(CacheSettings(**{name: {}})).name == name for name in sections)
