"""Bridges between vocabularies: bytes and segments, each loss from its formula in float64, and the same-vocabulary loss as their limit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.commands.doctor.run import examine
from limbeck.config.recipe import parse
from limbeck.config.sections import Train
from limbeck.config.teacher import BridgeSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.bridge import TeacherOverBridge, Vocabularies
from limbeck.models.byte_alignment import segments, tokens_of
from limbeck.models.folder import save_model
from limbeck.models.model import Model, head_of, hidden_states
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.bound import ModelPair
from limbeck.objectives.distances import sorted_distance
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.objectives.dual import DualSpace
from limbeck.objectives.forward import Features, StudentForward, TeacherStates, TeacherView
from limbeck.objectives.head import Head, PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.objectives.total import total_loss
from limbeck.progress import Silent, StoppedError
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.signals.bridged import BridgedSignal, Pairs, Places
from limbeck.signals.dense import DenseSignal
from limbeck.training.job import Objective, TrainingJob
from limbeck.training.loop import _optimizer
from limbeck.training.setup import _bind
from limbeck.types import RecipeError, UserError
from tests.conftest import CORPUS, make_net, make_tokenizer

TEXTS = ["the cat sat on the mat", " two  spaces\n\nZürich 🙂 日本 naïve", "why is the sky blue?", "a", "🙂🙂"]
OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def other_tokenizer():
    """A SentencePiece-like one: spaces are letters, and what it does not know is written in bytes."""
    special = ["<pad>", "<eos>", "<unk>"]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *bytes_], show_progress=False)
    core.train_from_iterator([f"{text} the red cats and the blue houses" for text in CORPUS] * 3, trainer)
    data = json.loads(core.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def other():
    tokenizer = other_tokenizer()
    net = make_net(seed=3, vocab_size=len(tokenizer) + 5)
    net.generation_config.eos_token_id = net.config.eos_token_id = tokenizer.eos_token_id
    return Model(net, tokenizer, "other")


def vocabularies(ours, theirs, nearest=False):
    sizes = (len(ours), len(theirs))
    return Vocabularies(ours, theirs, frozenset({ours.eos_token_id}), theirs.eos_token_id, sizes, nearest)


# Bytes


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [make_tokenizer, other_tokenizer])
def test_the_bytes_of_a_texts_tokens_are_the_texts(make, text):
    tokenizer = make()
    known = tokens_of(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(known.bytes_of[token] for token in ids) == text.encode()
    assert known.bytes_of[tokenizer.eos_token_id] is None, "a control token says nothing"
    assert all(known.bytes_of[number] == value for value, number in known.ids.items())


def test_a_plain_token_goes_before_the_one_of_its_byte():
    tokenizer = other_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokens_of(tokenizer).ids[b"t"]) == "t"
    assert tokenizer.convert_ids_to_tokens(tokens_of(tokenizer).ids[b"\xf0"]) == "<0xF0>"


def test_an_unknown_kind_of_tokenizer_is_refused():
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="byte-level or a SentencePiece-like"):
        tokens_of(PreTrainedTokenizerFast(tokenizer_object=core))


def cut(data, places):
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(min_size=1, max_size=40),
    st.lists(st.integers(0, 99), max_size=20),
    st.lists(st.integers(0, 99), max_size=20),
)
def test_segments_cover_both_once_and_are_least(data, one, two):
    ours, theirs = cut(data, one), cut(data, two)
    found = segments(ours, theirs)
    assert [n for s in found for n in s.ours] == list(range(len(ours))) and [
        n for s in found for n in s.theirs
    ] == list(range(len(theirs)))
    for s in found:
        assert b"".join(ours[n] for n in s.ours) == b"".join(theirs[n] for n in s.theirs)
        ends = [
            {len(b"".join(side[n] for n in part[:k])) for k in range(1, len(part))}
            for side, part in ((ours, s.ours), (theirs, s.theirs))
        ]
        assert not ends[0] & ends[1], "no shorter one would do"


def test_segments_end_where_the_bytes_part():
    assert [(s.ours, s.theirs) for s in segments([b"ab", b"c", b"d"], [b"a", b"b", b"x", b"d"])] == [
        (range(1), range(2))
    ]
    assert segments([], []) == [] and segments([b"a"], []) == []


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_response_is_aligned_to_its_last_byte(text, ended):
    ours, theirs = make_tokenizer(), other_tokenizer()
    ids = tuple(ours(text, add_special_tokens=False)["input_ids"]) + ((ours.eos_token_id,) if ended else ())
    found = vocabularies(ours, theirs).align(ids, False)
    mine, other = tokens_of(ours), tokens_of(theirs)
    assert (
        theirs.decode(found.ids, skip_special_tokens=True) == text and (found.ids[-1] == theirs.eos_token_id) == ended
    )
    before = [b"".join(mine.bytes_of[token] for token in ids[:n]) for n in range(len(ids))]
    for n, (at, cover) in enumerate(zip(found.at, found.cover, strict=True)):
        there = [
            k
            for k in range(len(found.ids))
            if b"".join(other.bytes_of[token] or b"" for token in found.ids[:k]) == before[n]
        ]
        assert (at in there) if there else at == -1, "every place where both begin is found, and no other"
        if at >= 0 and not (ended and n == len(ids) - 1):
            covered = b"".join(other.bytes_of[token] for token in found.ids[at : at + cover])
            assert (
                covered.startswith(mine.bytes_of[ids[n]])
                or mine.bytes_of[ids[n]] == covered[: len(mine.bytes_of[ids[n]])]
            )
    equal = vocabularies(ours, theirs).align(ids, True)
    assert sum(at >= 0 for at in equal.at) == found.single == equal.single


def spaced_tokenizer():
    """One that puts a space before every text."""
    tokenizer = other_tokenizer()
    before = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), before])
    return tokenizer


@pytest.mark.parametrize("text", ["the cat sat", " the cat sat", "a cat sat on"])
@pytest.mark.parametrize("makes", [(make_tokenizer, spaced_tokenizer), (spaced_tokenizer, make_tokenizer)])
def test_where_one_puts_a_space_before_every_text_nothing_is_taught_of_its_first_token(text, makes):
    """The teacher's `▁red` beside the `▁the` that begins its text was taught as the student's ` red`, where it could
    write `red` alone."""
    ours, theirs = (make() for make in makes)
    found = vocabularies(ours, theirs).align(tuple(ours(text, add_special_tokens=False)["input_ids"]), False)
    assert found.at[0] == -1 and found.cover[0] == 0
    assert sum(at >= 0 for at in found.at[1:]) > len(found.at[1:]) / 2
    assert found.ids == tuple(theirs(text, add_special_tokens=False)["input_ids"]), "the text without that space"


def test_two_that_put_a_space_before_every_text_are_aligned_from_the_first_token():
    ours, theirs = spaced_tokenizer(), spaced_tokenizer()
    theirs.add_tokens("something else")
    ids = tuple(ours("the cat", add_special_tokens=False)["input_ids"])
    found = vocabularies(ours, theirs).align(ids, False)
    assert found.ids == ids and found.at == tuple(range(len(ids)))


def test_equal_tokens_with_other_ends_have_their_ends_paired():
    ours, theirs = make_tokenizer(), make_tokenizer()
    theirs.eos_token = "<|user|>"
    between = vocabularies(ours, theirs)
    ids = (*ours("the cat", add_special_tokens=False)["input_ids"], ours.eos_token_id)
    assert between.align(ids, False).ids == (*ids[:-1], theirs.eos_token_id)
    assert int(between.pairs.ours_W[theirs.eos_token_id]) == ours.eos_token_id


def test_text_cut_within_a_character_is_aligned_up_to_it():
    ours, theirs = make_tokenizer(), other_tokenizer()
    ids = ours("a🙂", add_special_tokens=False)["input_ids"]
    found = vocabularies(ours, theirs).align(tuple(ids[:-1]), False)
    assert found.at[0] == 0 and len(found.at) == len(ids) - 1 and found.at[-1] == -1


# The losses, from their formulas


W, V, E, N = 9, 7, 5, 6


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def played(rest="bucket", others="skip", nearest=None):
    """Student tokens 0 to 6, teacher tokens 0 to 8; common are 0-3, 1-4, 2-0, 4-7."""
    ours, theirs = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 4, 0, 7])
    ours_W = torch.full((W,), -1).index_copy_(0, theirs, ours)
    pairs = Pairs(ours, theirs, torch.tensor([3, 5, 6]), torch.tensor([1, 2, 5, 6, 8]), ours_W, nearest)
    hidden, head = noise(4, E, seed=1), Head(noise(W, E, seed=2))
    p = head.logits(hidden).log_softmax(-1)
    # a common token in both; one that two of theirs cover, common; the same, without counterpart; a part of theirs; unaligned; a part, alone
    first, written = torch.tensor([4, 3, 3, 7, 0, 1]), torch.tensor([1, 2, 5, 0, 6, 3])
    at = torch.tensor([0, 1, 1, 2, -1, 3])
    cover = torch.stack([p[0, 4], p[1, 3] - 0.7, p[1, 3] - 0.2, p[2, 7], torch.tensor(0.0).double(), p[3, 1]])
    return BridgedSignal(hidden, head, pairs, Places(at, first, cover, written), rest, others), p.exp()


def outcomes(p, first, written, amount):
    """The teacher's distribution over outcomes named by the student's tokens, ALONE for what has no counterpart."""
    student_of = {3: 0, 4: 1, 0: 2, 7: 4}
    found = dict.fromkeys((0, 1, 2, 4), 0.0) | {"ALONE": 0.0}
    for token in range(W):
        found[student_of.get(token, "ALONE")] += float(p[token])
    if student_of.get(first) != written:
        found[student_of.get(first, "ALONE")] -= amount
        found[written] = found.get(written, 0.0) + amount
    return found


def expected(name, n, signal, p, q):
    """The divergence over those outcomes, by its own registered formula on K + 1 numbers."""
    at, first, cover, written = (column[n] for column in vars(signal.places).values())
    table = outcomes(p[int(at)], int(first), int(written), math.exp(float(cover)))
    assert abs(sum(table.values()) - 1) < 1e-9, "all mass is somewhere, and once"
    names = [key for key in table if key != "ALONE"]
    rest = 1 - sum(q[key] for key in names)
    ours = torch.stack([*(q[key] for key in names), rest])
    theirs = torch.tensor([*(table[key] for key in names), table["ALONE"]]).double()
    if name == "forward_kl":
        return (theirs * (theirs.clamp_min(1e-300).log() - ours.log())).sum()
    if name == "tvd":
        return 0.5 * (theirs - ours).abs().sum()
    middle = 0.5 * (ours + theirs)
    return 0.5 * ((theirs * (theirs.clamp_min(1e-300) / middle).log()).sum() + (ours * (ours / middle).log()).sum())


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tvd"])
@pytest.mark.parametrize("rest", ["bucket", "sorted"])
def test_common_tokens_the_chain_rule_and_the_rest(name, rest):
    signal, p = played(rest)
    logits = noise(N, V, seed=4).requires_grad_()
    q = logits.softmax(-1)
    want = torch.stack([expected(name, n, signal, p, q[n]) if n != 4 else q[n].sum() * 0 for n in range(N)])
    if rest == "sorted":
        for n in range(N):
            if n != 4:
                alone = p[int(signal.places.at_N[n])].clone()
                if int(signal.places.first_N[n]) in (1,):
                    alone[int(signal.places.first_N[n])] -= signal.places.log_cover_N[n].exp()
                theirs, ours = (
                    alone[[1, 2, 5, 6, 8]].sort(descending=True).values,
                    q[n][[3, 5, 6]].sort(descending=True).values,
                )
                want[n] = want[n] + (theirs[:3] - ours).abs().sum() + theirs[3:].sum()
    rows = signal.chunk(slice(0, N)).rows(slice(0, N))
    known = DIVERGENCES[name]
    values, gradient = rows.compare(
        known, checked_params(name, {}, name), Distribution(logits.detach().clone()), torch.zeros(N).long()
    )
    assert torch.allclose(values, want.detach(), atol=1e-9)
    (slope,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(gradient, slope, atol=1e-9)
    assert bool((values[4] == 0) & (gradient[4] == 0).all()), "where nothing begins together, nothing is taught"
    with pytest.raises(UserError, match="other tokens"):
        _ = rows.p


def test_elsewhere_the_text_is_taught_where_that_is_asked():
    signal, _ = played(others="written")
    logits = noise(N, V, seed=4)
    rows = signal.chunk(slice(0, N)).rows(slice(0, N))
    values, gradient = rows.compare(
        DIVERGENCES["forward_kl"], {"temperature": 1.0}, Distribution(logits.clone()), torch.zeros(N).long()
    )
    q = logits.softmax(-1)
    assert torch.allclose(values[4], -q[4, 6].log(), atol=1e-9)
    assert torch.allclose(gradient[4], q[4] - torch.eye(V).double()[6], atol=1e-9)


def test_a_chunk_is_its_part_and_a_soft_loss_is_refused():
    signal, _ = played("sorted")
    logits, params = noise(N, V, seed=4), {"temperature": 1.0}
    whole = (
        signal.chunk(slice(0, N))
        .rows(slice(0, N))
        .compare(DIVERGENCES["forward_kl"], params, Distribution(logits.clone()), None)
    )
    part = (
        signal.chunk(slice(2, 6))
        .rows(slice(1, 4))
        .compare(DIVERGENCES["forward_kl"], params, Distribution(logits[3:6].clone()), None)
    )
    assert torch.allclose(whole[0][3:6], part[0], atol=1e-12) and torch.allclose(whole[1][3:6], part[1], atol=1e-12)
    for name, params in (("dkd", {}), ("forward_kl", {"temperature": 2.0})):
        with pytest.raises(UserError, match="whole vocabularies"):
            signal.chunk(slice(0, N)).rows(slice(0, N)).compare(
                DIVERGENCES[name],
                checked_params(name, params, name),
                Distribution(logits.clone()),
                torch.zeros(N).long(),
            )


def test_by_spelling_a_likely_token_counts_as_the_one_most_alike():
    signal, p = played(nearest={1: 3, 2: 3, 5: 0, 6: None, 8: 6}.get)
    logits = noise(N, V, seed=4).requires_grad_()
    theirs = torch.zeros(4, V).double()
    for token, ours in {3: 0, 4: 1, 0: 2, 7: 4, 1: 3, 2: 3, 5: 0, 8: 6}.items():
        shown = p[:, token] if token in (3, 4, 0, 7) else p[:, token] * (p[:, token] > 1e-3)
        theirs[:, ours] += shown
    theirs = theirs / theirs.sum(-1, keepdim=True)
    q, on = logits.softmax(-1), torch.tensor([0, 1, 2, 3, 5])
    at = signal.places.at_N[on]
    want = (theirs[at] * (theirs[at].clamp_min(1e-300).log() - q[on].log())).sum(-1)
    values, gradient = (
        signal.chunk(slice(0, N))
        .rows(slice(0, N))
        .compare(DIVERGENCES["forward_kl"], {"temperature": 1.0}, Distribution(logits.detach().clone()), None)
    )
    assert torch.allclose(values[on], want.detach(), atol=1e-9)
    assert torch.allclose(gradient, torch.autograd.grad(want.sum(), logits)[0], atol=1e-9)


@pytest.mark.parametrize("width", [4, 7, 11])
def test_uld_from_its_formula_for_vocabularies_of_any_size(width):
    logits, p = noise(N, V, seed=4).requires_grad_(), Distribution(noise(N, width, seed=5))
    most = max(width, V)
    padded = [
        torch.nn.functional.pad(x, (0, most - x.shape[-1])).sort(-1, descending=True).values
        for x in (p.prob, logits.softmax(-1))
    ]
    want = (padded[0] - padded[1]).abs().sum(-1)
    values, gradient = DIVERGENCES["uld"](p, Distribution(logits.detach().clone()), {"temperature": 1.0})
    assert torch.allclose(values, want.detach(), atol=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(want.sum(), logits)[0], atol=1e-12)


def test_uld_has_a_false_minimum_at_every_permutation():
    logits = noise(N, V, seed=4)
    p, q = Distribution(logits), Distribution(logits.flip(-1))
    assert float(DIVERGENCES["uld"](p, q, {"temperature": 1.0})[0].max()) < 1e-12
    assert float(DIVERGENCES["forward_kl"](p, q, {"temperature": 1.0})[0].min()) > 0.05
    assert float(sorted_distance(p.prob * 0, None, q)[0].max()) == pytest.approx(1.0)


# Whole teachers


def rows_of(student, teacher, texts=("blue cats on the mat", "why, naïve 🙂 the red house", "a dog")):
    asked = ({"role": "user", "content": "why is the sky"},)
    return [
        Row(
            str(n), tuple(student.prompt_ids(asked)), (*student.text_ids(text), student.tokenizer.eos_token_id),
            teacher_prompt_ids=tuple(teacher.prompt_ids(asked)),
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip


def compared(signal, name, logits):
    N = len(logits)
    rows = signal.chunk(slice(0, N)).rows(slice(0, N))
    return rows.compare(
        DIVERGENCES[name], checked_params(name, {}, name), Distribution(logits.clone()), torch.zeros(N).long()
    )


BRIDGES = [
    {}, {"rest": "sorted"}, {"spans": "equal"}, {"match": "edits", "spans": "equal"}, {"match": "edits", "spans": "equal", "others": "written"},
]  # fmt: skip


@pytest.mark.parametrize("bridge", BRIDGES, ids=str)
@pytest.mark.parametrize("name", sorted(name for name, known in DIVERGENCES.items() if known.buckets or known.sorts))
def test_with_equal_tokenizers_every_bridge_is_the_loss_in_one_vocabulary(bridge, name, tiny):
    teacher = InProcessTeacher(Model(make_net(seed=5, vocab_size=len(tiny.tokenizer)), make_tokenizer(), "twin"))
    batch = make_batch(rows_of(tiny, teacher.model))
    bridged = TeacherOverBridge(teacher, tiny, BridgeSettings(**bridge))
    logits = torch.randn(int(batch.mask_BT.sum()), len(tiny.tokenizer), generator=torch.Generator().manual_seed(1))
    values, gradient = compared(bridged.view(batch).signal, name, logits)
    want, slope = compared(DenseSignal(*vars_of(teacher.view(batch).signal, len(tiny.tokenizer))), name, logits)
    assert torch.allclose(values, want, rtol=1e-4, atol=1e-5) and torch.allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    facts = bridged.facts([row.response_ids for row in rows_of(tiny, teacher.model)])
    assert facts["aligned_share"] == facts["single_share"] == 1 and facts["common_tokens"] == len(tiny.tokenizer)


def vars_of(signal, vocab_size):
    return signal.hidden_NE, signal.head.cut(vocab_size)


def test_a_teacher_with_other_tokens_says_the_chain_rules_product(tiny, other):
    batch = make_batch(rows_of(tiny, other))
    bridged = TeacherOverBridge(InProcessTeacher(other), tiny, BridgeSettings())
    signal = bridged.view(batch).signal
    done = 0
    for row in rows_of(tiny, other):
        found = bridged.align(row.response_ids)
        tokens = torch.tensor([[*row.teacher_prompt_ids, *found.ids]])
        log_p = other.net(tokens).logits[0, :, : len(other.tokenizer)].detach().log_softmax(-1)
        start = len(row.teacher_prompt_ids)
        for n, (at, cover) in enumerate(zip(found.at, found.cover, strict=True)):
            place = int(signal.places.at_N[done + n])
            assert (place >= 0) == (at >= 0)
            if at < 0:
                continue
            here = signal.head.logits(signal.hidden_ME[place][None])[0].log_softmax(-1)
            assert torch.allclose(here, log_p[start + at - 1], atol=1e-4), "the position before predicts it"
            product = sum(float(log_p[start + k - 1, found.ids[k]]) for k in range(at, at + cover))
            moved = int(bridged.pairs.ours_W[found.ids[at]]) != row.response_ids[n]
            assert float(signal.places.log_cover_N[done + n]) == pytest.approx(product if moved else 0.0, abs=1e-3)
        done += len(found.at)
    facts = bridged.facts([row.response_ids for row in rows_of(tiny, other)])
    assert 0.3 < facts["single_share"] <= facts["aligned_share"] < 1 and 50 < facts["common_tokens"] < 300


@pytest.mark.parametrize("loss", [{"forward_kl": {}}, {"uld": {}}, {"dual_space": {}}], ids=str)
def test_no_split_into_micro_batches_changes_a_bridged_loss(loss, tiny, other):
    rows = rows_of(tiny, other)
    bridged = TeacherOverBridge(InProcessTeacher(other), tiny, BridgeSettings())
    (name,) = loss
    found = [
        whole_loss(name, [make_batch(part) for part in parts], tiny, bridged)
        for parts in ([rows], [rows[:1], rows[1:]], [[row] for row in rows])
    ]
    for value, slope in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-4) and torch.allclose(
            slope, found[0][1], rtol=1e-3, atol=1e-6
        )


def whole_loss(name, batches, student, bridged):
    term = make_term(name, {})
    matches = {term.label: _bind(term, student.net, bridged.model.net, 1)} if term.loss.binds else {}
    student.net.zero_grad()
    amount, value = sum(batch.amount("token") for batch in batches), 0.0
    for batch in batches:
        hidden = hidden_states(student.net, batch.tokens_BT)[batch.response_positions()]
        head = head_of(student.net).cut(len(student.tokenizer))
        loss, sums = total_loss(
            [term.at_step(0, {})],
            {term.label: amount},
            matches,
            StudentForward(batch, hidden, head, None, bridged.view(batch)),
        )
        loss.backward()
        value += sums.terms[term.label]
    return value / amount, student.net.model.layers[0].mlp.up_proj.weight.grad.clone()


# Two spaces


def dual_of(widths, seed=2):
    table = noise(V, widths[0], seed=8)
    models = ModelPair((1, 1), widths, seed, embed=lambda token_N: table[token_N], dense=DenseSignal)
    return DualSpace({"divergence": "forward_kl", "projection_rate": 2.0}, models).double(), table


@pytest.mark.parametrize("crossed", [False, True])
def test_dual_space_from_its_formula(crossed):
    D, M = 4, (N if not crossed else 8)
    dual, table = dual_of((D, E))
    batch = make_batch([Row("a", (1, 2), (3, 4, 0)), Row("b", (5,), (6, 1, 0))])
    said, before = torch.tensor([3, 4, 0, 6, 1, 0]), torch.tensor([2, 3, 4, 5, 6, 1])
    row_N = torch.tensor([0, 0, 0, 1, 1, 1])
    row_M = row_N if not crossed else torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    hidden, theirs = noise(N, D, seed=3).requires_grad_(), noise(M, E, seed=4)
    head, their_head = Head(noise(V, D, seed=5).requires_grad_()), Head(noise(W, E, seed=6))
    embedded = (noise(M, E, seed=7), noise(M, E, seed=9)) if crossed else None
    weight = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5]).double()
    states = TeacherStates(theirs, their_head, row_M, embedded)
    data = StudentForward(batch, hidden, head, Features(), TeacherView(states=states))
    part = dual.three_sums(data, states, weight, 0.25)
    loss, value = part.loss, part.total
    assert float(loss.detach()) == pytest.approx(0.25 * value)
    # from the formula
    if crossed:
        query = torch.cat([table[before], table[said]], -1) @ dual.query.weight.T
        key = torch.cat(embedded, -1)
        scores = (query @ key.T / math.sqrt(2 * E)).masked_fill(row_N[:, None] != row_M, -1e30)
        mixed = theirs / theirs.std(-1, keepdim=True) + embedded[1]
        t2s = scores.softmax(-1) @ (mixed @ dual.to_student.weight.T)
        s2t = scores.T.softmax(-1) @ (hidden @ dual.to_teacher.weight.T)
        spread = torch.where(row_M == 0, 3 / 5, 1.5 / 3)
    else:
        t2s, s2t, spread = theirs @ dual.to_student.weight.T, hidden @ dual.to_teacher.weight.T, weight
    under = (t2s @ head.weight_VD.detach().T).log_softmax(-1)
    ce = -(weight * under.gather(1, said[:, None])[:, 0]).sum()
    right = (under.argmax(-1) == said).double()
    fixed, q = under.detach(), (hidden @ head.weight_VD.T).log_softmax(-1)
    apart = (weight * right * (fixed.exp() * (fixed - q)).sum(-1)).sum()
    p, back_q = (theirs @ their_head.weight_VD.T).log_softmax(-1), (s2t @ their_head.weight_VD.T).log_softmax(-1)
    back = (spread.double() * (p.exp() * (p - back_q)).sum(-1)).sum()
    want = ce + apart + back
    assert value == pytest.approx(float(want.detach()), rel=1e-6)
    learned = [
        hidden,
        head.weight_VD,
        dual.to_student.weight,
        dual.to_teacher.weight,
        *([dual.query.weight] if crossed else []),
    ]
    got, slopes = torch.autograd.grad(loss, learned, retain_graph=True), torch.autograd.grad(0.25 * want, learned)
    for one, two in zip(got, slopes, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-8)


def test_projections_are_trained_at_a_rate_of_their_own(tiny, other):
    term = make_term("dual_space", {"projection_rate": 7})
    dual = _bind(term, tiny.net, other.net, 1)
    job = TrainingJob(Objective(tiny.net, [term], learned={"dual_space": dual}), [], Train(steps=1), Path(), "k")
    found = {
        id(p): group["times"]
        for group in _optimizer(job, job.objective.parameters()).param_groups
        for p in group["params"]
    }
    assert {found[id(p)] for p in dual.parameters()} == {7.0} and {found[id(p)] for p in tiny.net.parameters()} == {1.0}
    for params, words in (
        ({"projection_rate": 0}, "projection_rate"),
        ({"rate": 2}, "no such parameter"),
        ({"divergence": "kl"}, "no divergence"),
    ):
        with pytest.raises(RecipeError, match=words):
            make_term("dual_space", params)


# In recipes


@pytest.fixture
def pair(tiny, other, tmp_path, recipe_data, prompt_file):
    """A recipe with a teacher of other tokens, and a student that is there."""
    save_model(other.net, other.tokenizer, made := tmp_path / "other")
    save_model(tiny.net, tiny.tokenizer, own := tmp_path / "own")
    recipe_data["teacher"] = {"model": str(made), "bridge": {}}
    recipe_data["student"] = {"start": {"pretrained": str(own)}}
    recipe_data["evaluate"]["controls"] = []
    return recipe_data


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("other", "own"):
        (tmp_path / name).mkdir()


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("loss", ["forward_kl", "uld", "dual_space"])
def test_a_run_over_a_bridge_learns_and_says_how_much_is_shared(pair, tmp_path, loss):
    pair["loss"], pair["train"] = [loss], pair["train"] | {"steps": 25, "lr": 3e-3, "tokens_per_step": 200}
    told = Notes()
    folder = run(parse(pair), tmp_path / "run", told)
    assert sum("tokens are the teacher's, too" in note for note in told.notes) == 1
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(r["terms"][loss] for r in records[-3:]) < sum(r["terms"][loss] for r in records[:3])
    facts = json.loads((folder / "bridge.json").read_text())
    assert 0 < facts["aligned_share"] <= 1 and facts["student_tokens"] > facts["common_tokens"] > 50
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert any("other tokens" in warning for warning in summary["warnings"])
    assert "Bridge between the vocabularies" in (folder / "report.html").read_text()


def test_a_killed_run_over_two_spaces_goes_on_as_if_it_had_not_been(pair, tmp_path):
    pair["loss"], pair["train"] = ["cross_entropy", "dual_space"], pair["train"] | {"steps": 4, "save_seconds": 0}
    whole = run(parse(pair), tmp_path / "whole", stages=("elicit", "train"))
    asked = iter([False] * 2 + [True] * 99)
    run(parse(pair), tmp_path / "parts", stages=("elicit",))
    with pytest.raises(StoppedError):
        run(parse(pair), tmp_path / "parts", stop=lambda: next(asked), stages=("train",))
    again = run(parse(pair), tmp_path / "parts", stages=("train",))
    values = [
        [json.loads(line)["terms"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, again)
    ]
    assert values[0] == values[1]


def test_a_student_that_writes_is_read_over_the_bridge(pair, tmp_path):
    pair["writer"], pair["loss"] = [{"by": "student", "max_tokens": 8}], ["jsd"]
    pair["train"] |= {"steps": 2}
    folder = run(parse(pair), tmp_path / "run", stages=("train",))
    assert all(json.loads(line)["grad_norm"] > 0 for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_the_doctor_looks_at_the_bridge(pair, tmp_path):
    found = {one.name: one for one in examine(parse(pair), tmp_path / "run")}
    assert found["bridge"].verdict == "fine" and "tokens are the teacher's, too" in found["bridge"].detail
    assert not [one for one in found.values() if one.verdict == "fault"]
    assert found["zero at the teacher"].verdict == "not looked at"


def test_the_doctor_warns_of_tokenizers_with_little_in_common(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.commands.doctor.text.LEAST_ALIGNED", 1.0)
    found = {one.name: one for one in examine(parse(pair), tmp_path / "run")}
    assert found["bridge"].verdict == "fault" and "others: written" in found["bridge"].detail


def test_without_a_bridge_other_tokens_are_refused_with_the_cure(pair):
    pair["teacher"] = pair["teacher"]["model"]
    with pytest.raises(UserError, match=r"teacher.bridge: \{\}"):
        check(parse(pair))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": ["cross_entropy"]}, "no loss reads"),
        ({"loss": ["dkd"]}, "one vocabulary"),
        ({"loss": [{"forward_kl": {"temperature": 2}}]}, "one vocabulary"),
        ({"loss": ["hidden_match"]}, "token by token"),
        ({"loss": ["reverse_kl"], "teacher": {"bridge": {"others": "written"}}}, "text alone"),
        ({"loss": ["uld"], "teacher": {"bridge": {"others": "written"}}}, "text alone"),
        ({"teacher": {"cache": {"top_k": {}}}}, "at every step"),
        ({"student": {"start": {"prune": {"layers": 2, "keep": "uniform"}}}}, "needs no bridge"),
        ({"train": {"mixup": 0.4}, "loss": ["forward_kl"]}, "one vocabulary"),
    ],
)
def test_what_a_bridge_cant_do_is_refused(pair, change, words):
    for key, value in change.items():
        pair[key] = pair[key] | value if isinstance(value, dict) and key != "student" else value
    with pytest.raises(RecipeError, match=words):
        resolve(parse(pair))


def test_edits_leave_no_rest():
    with pytest.raises(ValueError, match="spans: equal"):
        BridgeSettings(match="edits")
    assert replace(vocabularies(make_tokenizer(), other_tokenizer(), nearest=True).pairs, nearest=None) is not None


def test_the_nearest_token_is_that_of_the_least_edit_distance():
    ours, theirs = make_tokenizer(), other_tokenizer()
    pairs, mine, other = vocabularies(ours, theirs, nearest=True).pairs, tokens_of(ours), tokens_of(theirs)

    def distance(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, before = [i, *row[1:]], row
            for j, y in enumerate(b, 1):
                row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
        return row[-1]

    for token in pairs.theirs_alone.tolist()[:200:9]:
        value = other.bytes_of[token]
        near = pairs.nearest(token)
        if not value:
            assert near is None
            continue
        every = [distance(value, spelled) for spelled in mine.bytes_of if spelled]
        assert distance(value, mine.bytes_of[near]) == min(every)


def test_a_fused_loss_over_a_bridge_is_the_sum_of_its_rows(tiny, other):
    batch = make_batch(rows_of(tiny, other))
    signal = TeacherOverBridge(InProcessTeacher(other), tiny, BridgeSettings()).view(batch).signal
    count, width = int(batch.mask_BT.sum()), 16
    hidden = torch.randn(count, width, generator=torch.Generator().manual_seed(3)).requires_grad_()
    head = Head(torch.randn(len(tiny.tokenizer), width, generator=torch.Generator().manual_seed(4)))
    term = make_term("forward_kl", {}).at_step(0, {})
    total = fused_loss(
        hidden, head, [term], [1.0], torch.ones(1, count), PositionEvidence(signal.places.target_N, signal)
    )
    values, gradient = compared(signal, "forward_kl", head.logits(hidden.detach()))
    assert total.sums["forward_kl"] == pytest.approx(float(values.sum()), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(total.loss, hidden)[0], gradient @ head.weight_VD, rtol=1e-3, atol=1e-4)
