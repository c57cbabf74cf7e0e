"""The kept teacher: what its forms hold, against the formulas; files that were cut, changed or are another's; runs that read it."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from limbeck import RecipeError, UserError
from limbeck.config.recipe import parse
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.objectives.head import Head, PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.signals.cache import SignalCache, texts_of
from limbeck.signals.dense import DenseSignal
from limbeck.signals.forms import form_of
from limbeck.signals.pack import id_bits, pack_bits, unpack_bits
from limbeck.signals.sparse import Sampled, TopK
from limbeck.training.prepare import fill_cache

EMPTY = torch.empty(0, dtype=torch.long)
V, N, E = 40, 7, 16
FORMS = [
    {"hidden": {"dtype": "float32"}},
    {"hidden": {}},
    {"top_k": {"k": 300, "bits": 16}},
    {"top_k": {"k": 16}},
    {"top_k": {"mass": 0.9, "k": 200}},
    {"sampled": {"draws": 12}},
    {"sampled": {"draws": 12, "temperature": 0.8}},
]


def dense(seed: int = 0, sharpness: float = 1.0) -> DenseSignal:
    noise = torch.Generator().manual_seed(seed)
    return DenseSignal(torch.randn(N, E, generator=noise) * sharpness, Head(torch.randn(V, E, generator=noise)))


def log_p(signal: DenseSignal) -> Tensor:
    return torch.log_softmax(signal.chunk(slice(0, N)).logits_CV.double().clone(), -1)


def targets() -> Tensor:
    return torch.arange(N) * 3 % V


def kept(signal: DenseSignal, **form) -> TopK | Sampled:
    kept_form = form_of(CacheSettings(**form))
    return kept_form.unpack([kept_form.pack(signal, targets(), 1, V)], V, None)


# -- forms --------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 20).flatmap(
        lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    )
)
def test_bits_come_back_and_take_no_more_than_they_need(case):
    bits, numbers = case
    packed = pack_bits(torch.tensor(numbers), bits)
    assert unpack_bits(packed, bits, len(numbers)).tolist() == numbers
    assert len(packed) == math.ceil(len(numbers) * bits / 8)


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (256, 8), (257, 9), (49152, 16), (151936, 18), (65536, 16)])
def test_an_id_takes_the_bits_of_the_largest_one(vocab_size, bits):
    assert id_bits(vocab_size) == bits and 2**bits > vocab_size - 1


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_kept_log_probability_is_wrong_by_at_most_a_level_and_sums_to_one(bits, sharpness):
    signal = dense(3, sharpness)
    got, want = kept(signal, top_k={"k": 10, "bits": bits}), log_p(signal)
    want_NK = want.gather(-1, got.ids_NK)
    assert torch.equal(got.ids_NK, want.topk(10, -1).indices)
    bound_N = (
        want_NK.abs().amax(-1) * (1.002 / (2**bits - 1) / 2 + 2e-7) + 2**-10 + 2e-6
    )  # half a level; the rest's rounding moves the whole
    if bits == 8:
        bound_N = 2 * bound_N
    assert bool(((got.log_prob_NK - want_NK).abs() <= bound_N[:, None]).all())
    torch.testing.assert_close(got.log_prob_NK.exp().sum(-1) + got.rest_N, torch.ones(N), rtol=0, atol=2e-6)
    rest_N = 1 - want.topk(10, -1).values.exp().sum(-1)
    assert bool(((got.rest_N - rest_N).abs() <= 0.02 * rest_N + 1e-6).all())


@pytest.mark.parametrize("impossible", [-9999.0, -3.4e38, -math.inf])
def test_a_token_that_cannot_be_takes_no_level_of_its_position(impossible):
    """One such number among a server's likeliest made the others NaN, or as likely as each other."""
    some = torch.tensor([0.9, 0.09])
    told = TopK(torch.tensor([[5, 6, 7]]), torch.cat([some.log(), torch.tensor([impossible])])[None])
    form = form_of(CacheSettings(top_k={"k": 3}))
    found = form.unpack([form.pack(told, torch.tensor([5]), 1, V)], V, None)
    assert torch.allclose(found.log_prob_NK.exp(), some[None], atol=1e-2) and found.ids_NK.tolist() == [[5, 6]]
    assert float(found.rest_N) == pytest.approx(0.01, abs=1e-3)


def test_as_few_tokens_as_have_the_mass_are_kept():
    signal = dense(4)
    got, p = kept(signal, top_k={"mass": 0.8, "k": V}), log_p(signal).exp()
    for row in range(N):
        most = p[row].sort(descending=True).values.cumsum(0)
        assert got.count_N is not None and int(got.count_N[row]) == int((most < 0.8).sum()) + 1
    few = kept(signal, top_k={"mass": 0.8, "k": 2})
    assert few.count_N is None or int(few.count_N.max()) <= 2


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl"])
def test_rows_of_different_lengths_equal_each_row_alone(name):
    teacher = log_p(dense(5))
    student = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    values, ids = teacher.topk(9, -1)
    counts = torch.tensor([1, 9, 3, 4, 9, 2, 5])
    params = checked_params(name, {})
    got = TopK(ids, values, count_N=counts).compare(DIVERGENCES[name], params, Distribution(student), EMPTY)
    for row, count in enumerate(counts.tolist()):
        alone = TopK(ids[row : row + 1, :count], values[row : row + 1, :count])
        want = alone.compare(DIVERGENCES[name], params, Distribution(student[row : row + 1]), EMPTY)
        torch.testing.assert_close(got[0][row], want[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1][row], want[1][0], rtol=1e-12, atol=1e-12)


def test_all_tokens_in_sixteen_bits_are_the_dense_signal():
    signal, student = dense(6), torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    params, loss = checked_params("forward_kl", {}), DIVERGENCES["forward_kl"]
    got = kept(signal, top_k={"k": V, "bits": 16}).compare(loss, params, Distribution(student), EMPTY)
    want = loss(Distribution(log_p(signal).float()), Distribution(student), params)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_are_the_distribution_in_the_mean(temperature):
    signal, form, rounds = dense(7, 0.3), form_of(CacheSettings(sampled={"draws": 50, "temperature": temperature})), 400
    total = torch.zeros(N, V, dtype=torch.float64)
    for seed in range(rounds):
        got = form.unpack([form.pack(signal, targets(), seed, V)], V, None)
        total.scatter_add_(-1, got.ids_NK, got.weight_NK.double())
    p = log_p(signal).exp()
    proposal = torch.softmax(log_p(signal) / temperature, -1)
    z = (total / rounds - p) / (
        (p**2 / proposal - p**2) / (50 * rounds)
    ).sqrt()  # one draw's weight is p / proposal, or 0
    assert float(z.abs().max()) < 5 and 0.7 < float(z.std()) < 1.3
    torch.testing.assert_close(
        got.entropy_N.double(), -(log_p(signal).exp() * log_p(signal)).sum(-1), rtol=2e-3, atol=0
    )


def test_the_draws_of_a_text_are_its_own_wherever_it_is_packed():
    first, again, other = (
        form_of(CacheSettings(sampled={"draws": 5})).pack(dense(8), targets(), seed, V) for seed in (1, 1, 2)
    )
    assert torch.equal(first["ids"], again["ids"]) and not torch.equal(first["ids"], other["ids"])


# -- files --------------------------------------------------------------------------------------------------------------


def rows(count: int = 6) -> list[Row]:
    return [Row(f"s{i}", (5, 6, 7 + i), (*(20 + i, 21, 30 + i)[: 1 + i % 3], 0)) for i in range(count)]


def filled(folder, tiny, form, some=None, vocab_size=300) -> SignalCache:
    teacher = InProcessTeacher(tiny)
    cache = SignalCache(folder, teacher.identity, vocab_size, CacheSettings(**form))
    fill_cache(cache, partial(teacher.view, vocab_size=vocab_size), some or rows(), lambda done, total: None)
    return cache


def vocabulary_of(tiny) -> int:
    return len(tiny.tokenizer)


@pytest.mark.parametrize("form", FORMS, ids=json.dumps)
def test_what_is_read_again_is_what_was_kept_however_it_is_batched(form, tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, form, vocab_size=v)
    cache = SignalCache(tmp_path / "a", InProcessTeacher(tiny).identity, v, CacheSettings(**form))
    assert len(cache) == 6
    student = torch.randn(200, v, generator=torch.Generator().manual_seed(2))
    loss, params = DIVERGENCES["forward_kl"], checked_params("forward_kl", {})

    def values(some: list[Row]) -> Tensor:
        batch = make_batch(some)
        signal = cache.view(batch).signal
        amount = int(batch.mask_BT.sum())
        q = Distribution(student[:1].expand(amount, -1))
        return signal.chunk(slice(0, amount)).rows(slice(0, amount)).compare(loss, params, q, EMPTY)[0]

    together, alone = values(rows()), torch.cat([values([row]) for row in rows()])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    backwards = values(rows()[::-1])
    torch.testing.assert_close(backwards.sum(), together.sum(), rtol=1e-5, atol=1e-5)


def test_full_precision_states_give_the_live_loss(tiny, tmp_path):
    v = vocabulary_of(tiny)
    cache, batch = filled(tmp_path / "a", tiny, {"hidden": {"dtype": "float32"}}, vocab_size=v), make_batch(rows())
    live = InProcessTeacher(tiny).view(batch, vocab_size=v).signal
    hidden = torch.randn(int(batch.mask_BT.sum()), 32, generator=torch.Generator().manual_seed(0))
    term = make_term("forward_kl", {}).at_step(0.0, {})

    def loss(signal) -> float:
        weight = torch.ones(1, len(hidden))
        head = Head(torch.randn(v, 32, generator=torch.Generator().manual_seed(1)))
        return float(
            fused_loss(hidden, head, [term], [1.0], weight, PositionEvidence(EMPTY.new_zeros(len(hidden)), signal)).loss
        )

    assert loss(cache.view(batch).signal) == pytest.approx(loss(live), rel=1e-5)


def test_the_written_tokens_log_probability_stands_beside_every_row(tiny, tmp_path):
    v = vocabulary_of(tiny)
    cache, batch = filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=v), make_batch(rows())
    live = InProcessTeacher(tiny).view(batch, vocab_size=v).signal
    row_N, at_N = batch.response_positions()
    logits = live.chunk(slice(0, len(row_N))).logits_CV
    want = torch.log_softmax(logits, -1).gather(-1, batch.tokens_BT[row_N, at_N + 1, None])[:, 0]
    got = torch.cat([cache.text(key)["target"] for key, _ in texts_of(batch)])
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


def test_a_killed_filling_goes_on_with_what_is_missing(tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, rows(3), v)
    (tmp_path / "a" / f".shard-x.safetensors.{'0' * 32}.tmp").write_bytes(b"half")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").glob("shard-*")}
    asked = []
    teacher = InProcessTeacher(tiny)
    cache = SignalCache(tmp_path / "a", teacher.identity, v, CacheSettings(top_k={"k": 4}))

    def view(batch):
        asked.extend(batch.sample_ids)
        return teacher.view(batch, vocab_size=v)

    fill_cache(cache, view, rows(), lambda done, total: None)
    assert len(cache) == 6 and not list((tmp_path / "a").glob(".shard*"))
    assert all((tmp_path / "a" / name).read_bytes() == content for name, content in before.items())
    asked.clear()
    fill_cache(cache, view, rows(), lambda done, total: None)
    assert asked == []


def shard_of(folder):
    (shard,) = folder.glob("shard-*.safetensors")
    return shard


@pytest.mark.parametrize("damage", ["cut", "flipped", "exchanged"])
def test_a_damaged_shard_is_named_and_never_read(damage, tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=v)
    filled(tmp_path / "b", tiny, {"top_k": {"k": 5}}, vocab_size=v)
    shard, content = shard_of(tmp_path / "a"), bytearray(shard_of(tmp_path / "a").read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    if damage == "exchanged":
        content = bytearray(shard_of(tmp_path / "b").read_bytes())
    shard.write_bytes(content[:-7] if damage == "cut" else content)
    with pytest.raises(UserError, match=f"{shard.name} was cut short or has changed"):
        SignalCache(tmp_path / "a", InProcessTeacher(tiny).identity, v, CacheSettings(top_k={"k": 4}))
    shard.unlink()
    assert len(filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=v)) == 6


def test_a_damaged_head_is_named(tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, {"hidden": {}}, vocab_size=v)
    (head,) = (tmp_path / "a").glob("head-*")
    head.write_bytes(head.read_bytes()[:-1] + b"\x7f")
    cache = SignalCache(tmp_path / "a", InProcessTeacher(tiny).identity, v, CacheSettings(hidden={}))
    with pytest.raises(UserError, match="head-"):
        cache.view(make_batch(rows()))


@pytest.mark.parametrize(
    ("teacher", "vocab_size", "form", "word"),
    [
        ("another", 0, {"top_k": {"k": 4}}, "teacher"),
        (None, -1, {"top_k": {"k": 4}}, "vocabulary"),
        (None, 0, {"top_k": {"k": 5}}, "form"),
        (None, 0, {"sampled": {}}, "form"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_what_differs(teacher, vocab_size, form, word, tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=v)
    with pytest.raises(UserError, match=f"cache of another {word}"):
        SignalCache(tmp_path / "a", teacher or InProcessTeacher(tiny).identity, v + vocab_size, CacheSettings(**form))


@pytest.mark.parametrize(
    "other",
    [
        Row("s0", (5, 6, 8), (20, 0)),  # another prompt or template
        Row("s0", (5, 6, 7), (20, 1)),  # other tokens
        Row("s0", (5, 6), (7, 20, 0)),  # the same tokens with another prompt mask
    ],
)
def test_a_text_under_other_tokens_or_another_mask_is_not_taken_for_it(other, tiny, tmp_path):
    cache = filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=vocabulary_of(tiny))
    cache.view(make_batch(rows()[:1]))
    with pytest.raises(UserError, match="does not hold this text"):
        cache.view(make_batch([other]))


def test_a_shard_of_another_teacher_is_refused_even_without_its_description(tiny, tmp_path):
    v = vocabulary_of(tiny)
    filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, vocab_size=v)
    (tmp_path / "a" / "about.json").unlink()
    with pytest.raises(UserError, match="of another teacher"):
        SignalCache(tmp_path / "a", "another", v, CacheSettings(top_k={"k": 4}))


def test_a_missing_head_says_so(tiny, tmp_path):
    cache = filled(tmp_path / "a", tiny, {"hidden": {}}, vocab_size=vocabulary_of(tiny))
    next((tmp_path / "a").glob("head-*")).unlink()
    with pytest.raises(UserError, match="head is missing"):
        cache.view(make_batch(rows()))


def test_the_same_text_is_kept_once(tiny, tmp_path):
    cache = filled(tmp_path / "a", tiny, {"top_k": {"k": 4}}, [*rows(), *rows()], vocabulary_of(tiny))
    assert len(cache) == 6 and sum(len(cache.text(key)["target"]) for key, _ in texts_of(make_batch(rows()))) == sum(
        len(row.response_ids) for row in rows()
    )
    before = cache.bytes
    assert filled(tmp_path / "b", tiny, {"top_k": {"k": 4}}, rows(), vocabulary_of(tiny)).bytes == before


def test_a_teacher_that_is_shown_more_is_kept_as_it_sees_the_text(tiny, tmp_path):
    v, seen = vocabulary_of(tiny), [Row("s", (5, 6), (20, 21, 0), teacher_prompt_ids=(9, 9, 5, 6))]
    cache, live = filled(tmp_path / "a", tiny, {"hidden": {"dtype": "float32"}}, seen, v), InProcessTeacher(tiny)
    want = live.view(make_batch(seen), vocab_size=v).signal
    torch.testing.assert_close(cache.view(make_batch(seen)).signal.hidden_NE, want.hidden_NE)
    plain = live.view(make_batch([Row("s", (5, 6), (20, 21, 0))]), vocab_size=v).signal
    assert not torch.allclose(plain.hidden_NE, want.hidden_NE, atol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=json.dumps)
def test_a_recipe_with_a_cache_reads_back_as_itself(form, recipe_data):
    recipe = cached(recipe_data, form)
    assert parse(recipe.resolved()) == recipe and recipe.resolved()["teacher"]["cache"].keys() == form.keys()


def test_a_damaged_description_says_so(tmp_path):
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        SignalCache(tmp_path, "t", 9, CacheSettings(hidden={}))


# -- runs ---------------------------------------------------------------------------------------------------------------


def cached(recipe_data, form, **changes):
    teacher = {"model": recipe_data["teacher"], "cache": form}
    return parse({**recipe_data, "teacher": teacher, "evaluate": {"metrics": ["fidelity"], "controls": []}} | changes)


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_kept_states_is_the_live_run(recipe_data, tmp_path):
    evaluate = {"evaluate": {"metrics": ["fidelity"], "controls": []}}
    live = run(parse(recipe_data | evaluate), tmp_path / "live", stages=("elicit", "train"))
    kept_run = run(cached(recipe_data, {"hidden": {"dtype": "float32"}}), tmp_path / "kept", stages=("elicit", "train"))
    assert losses(kept_run) == pytest.approx(losses(live), rel=1e-4)
    a, b = (load_file(folder / "student" / "model.safetensors") for folder in (live, kept_run))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.long
@pytest.mark.parametrize(
    "form", [{"top_k": {"k": 32}}, {"top_k": {"mass": 0.9}}, {"sampled": {"draws": 20}}, {"hidden": {}}], ids=json.dumps
)
def test_every_form_trains_and_is_read_by_a_second_run(form, recipe_data, tmp_path):
    shared = form | {"folder": str(tmp_path / "shared")}
    first = run(cached(recipe_data, shared), tmp_path / "first", stages=("elicit", "train"))
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("*.safetensors")}
    second = run(cached(recipe_data, shared), tmp_path / "second", stages=("elicit", "train"))
    assert files == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("*.safetensors")}
    assert losses(first) == losses(second) and all(math.isfinite(loss) for loss in losses(first))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_what_was_kept(recipe_data, tmp_path):
    student = {"start": {"pretrained": recipe_data["teacher"]}}
    folder = run(
        cached(recipe_data, {"top_k": {"k": 300, "bits": 16}}, student=student),
        tmp_path / "run",
        stages=("elicit", "train"),
    )
    assert abs(losses(folder)[0]) < 1e-4


def test_the_plan_counts_the_teacher_once_and_what_is_kept(recipe_data):
    live = check(parse({**recipe_data, "evaluate": {"metrics": ["fidelity"], "controls": []}}))
    small, large = (check(cached(recipe_data, {"top_k": {"k": k}})) for k in (1, 300))
    states = check(cached(recipe_data, {"hidden": {}}))
    assert live.disk_bytes < small.disk_bytes < large.disk_bytes and live.disk_bytes < states.disk_bytes
    assert large.steps == live.steps and large.trained_tokens == live.trained_tokens


def test_a_damaged_cache_stops_the_run_before_a_step(recipe_data, tmp_path):
    recipe = cached(recipe_data, {"top_k": {"k": 8}})
    folder = run(recipe, tmp_path / "run", stages=("elicit", "train"))
    shard = shard_of(folder / "signals")
    shard.write_bytes(shard.read_bytes()[:-1])
    other = cached(recipe_data, {"top_k": {"k": 8}, "folder": str(folder / "signals")})
    with pytest.raises(UserError, match="cut short"):
        run(other, tmp_path / "other", stages=("elicit", "train"))
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("form", "changes", "path", "words"),
    [
        ({}, {}, "teacher.cache", "exactly one"),
        ({"top_k": {}, "hidden": {}}, {}, "teacher.cache", "exactly one"),
        ({"top_k": {"k": 0}}, {}, "teacher.cache.top_k.k", "greater than"),
        ({"sampled": {}}, {"loss": ["reverse_kl"]}, "loss[0].reverse_kl", "forward_kl"),
        ({"sampled": {}}, {"loss": [{"forward_kl": {"temperature": 2}}]}, "loss[0].forward_kl", "temperature"),
        ({"top_k": {}}, {"loss": [{"forward_kl": {"temperature": 2}}]}, "loss[0].forward_kl", "hidden"),
        ({"top_k": {}}, {"loss": ["dkd"]}, "loss[0].dkd", "hidden"),
        ({"hidden": {}}, {"loss": ["cross_entropy"]}, "teacher.cache", "no loss reads"),
        ({"hidden": {}}, {"loss": ["hidden_match"]}, "loss[0].hidden_match", "layers"),
        ({"hidden": {}}, {"writer": [{"by": "student", "max_tokens": 4}]}, "teacher.cache", "student writes"),
    ],
)
def test_what_a_form_does_not_hold_is_refused_before_anything_is_spent(form, changes, path, words, recipe_data):
    with pytest.raises(RecipeError) as error:
        check(cached(recipe_data, form, **changes))
    assert error.value.path == path and words in str(error.value)
