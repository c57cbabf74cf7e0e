"""Fidelity against the definitions, computed the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.data.batches import Row
from limbeck.evaluate.fidelity import LENGTHS, EvaluationText, TokenClasses, by_class, exposure, fidelity
from limbeck.evaluate.records import ItemFidelity, SystemRecords
from limbeck.evaluate.summary import summarise
from limbeck.models.model import Model
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher

ROWS = [Row(f"s{i}", tuple(range(5, 9 + i)), (*range(20 + 3 * i, 24 + 4 * i), 0)) for i in range(11)]


def slow(teacher, student, row):
    tokens = torch.tensor([row.prompt_ids + row.response_ids])
    with torch.inference_mode():
        p, q = (
            net(tokens).logits[0, len(row.prompt_ids) - 1 : -1].double().log_softmax(-1) for net in (teacher, student)
        )
    m = torch.logaddexp(p, q) - math.log(2)
    kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
    targets = torch.tensor(row.response_ids)
    picks = torch.arange(len(targets))
    first_p, first_q = p.argmax(-1), q.argmax(-1)
    overlap = [
        len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(p.topk(5).indices, q.topk(5).indices, strict=True)
    ]
    return {
        "forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.5 * kl(p, m) + 0.5 * kl(q, m), "tvd": 0.5 * (p.exp() - q.exp()).abs().sum(),
        "nll": -q[picks, targets].sum(), "teacher_nll": -p[picks, targets].sum(), "entropy": -(q.exp() * q).sum(),
        "top1": (first_p == first_q).sum().double(), "top5": torch.tensor(sum(overlap)), "wrong": (first_q != targets).sum().double(),
        "same_wrong": ((first_q != targets) & (first_q == first_p)).sum().double(),
    }  # fmt: skip


@pytest.fixture
def student(tiny):
    return Model(drop_layers(tiny.net, [0, 2]), tiny.tokenizer, "s")


def values(items):
    """The metrics of a system with these records on held-out text, by name."""
    records = SystemRecords("s", items, [], [], [], [], {}, {})
    return {name: facts["value"] for name, facts in summarise({"s": [records]}, [], [])["systems"]["s"].items()}


def test_sums_per_item_and_summary_equal_the_definitions(tiny, student):
    items = fidelity(student, EvaluationText(ROWS, InProcessTeacher(tiny)), {"s3"})
    assert [item.sample_id for item in items] == [row.sample_id for row in ROWS]
    totals = {}
    for item, row in zip(items, ROWS, strict=True):
        want = slow(tiny.net, student.net, row)
        assert item.tokens == len(row.response_ids) and item.sums.keys() == want.keys()
        for name, value in want.items():
            assert item.sums[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
            totals[name] = totals.get(name, 0.0) + float(value)
        for table in (item.lengths, item.classes):
            assert sum(count for _, count in table.values()) == item.tokens
            assert sum(nats for nats, _ in table.values()) == pytest.approx(item.sums["forward_kl"])
        assert sum(item.reliability.count) == item.tokens
        assert sum(item.reliability.correct) == pytest.approx(item.tokens - item.sums["wrong"])
    tokens = sum(len(row.response_ids) for row in ROWS)
    summary = values(items)
    assert summary["forward_kl"] == pytest.approx(totals["forward_kl"] / tokens, rel=1e-4)
    assert summary["perplexity"] == pytest.approx(math.exp(totals["nll"] / tokens), rel=1e-4)
    assert summary["top1_agreement"] == pytest.approx(totals["top1"] / tokens)
    assert summary["agree_when_wrong"] == pytest.approx(totals["same_wrong"] / totals["wrong"])


def test_single_tokens_are_kept_of_the_shown_answers_only(tiny, student):
    items = fidelity(student, EvaluationText(ROWS, InProcessTeacher(tiny)), {"s3"})
    assert [bool(item.lens) for item in items] == [item.sample_id == "s3" for item in items]
    (item,) = (item for item in items if item.lens)
    assert [token for token, *_ in item.lens] == list(ROWS[3].response_ids)
    assert sum(nats for _, nats, _, _ in item.lens) == pytest.approx(item.sums["forward_kl"], abs=1e-3)
    for _, _, teachers, students in item.lens:
        for choices in (teachers, students):
            shares = [share for _, share in choices]
            assert (
                len(choices) == 3 and shares == sorted(shares, reverse=True) and all(0 < share <= 1 for share in shares)
            )


def test_a_teacher_is_no_distance_from_itself_and_is_run_once(tiny, monkeypatch):
    teacher = InProcessTeacher(tiny)
    text = EvaluationText(ROWS, teacher)
    passes = []
    view = InProcessTeacher.view
    monkeypatch.setattr(InProcessTeacher, "view", lambda self, *args, **kw: passes.append(1) or view(self, *args, **kw))
    summary = values(fidelity(tiny, text))
    assert summary["forward_kl"] == pytest.approx(0, abs=1e-6) and summary["top1_agreement"] == 1
    fidelity(Model(drop_layers(tiny.net, [0, 2]), tiny.tokenizer, "s"), text)
    assert len(passes) == len(text.picks) == 2, "the second system reads the teacher's kept states"


def test_how_rows_are_batched_changes_nothing(tiny, student, monkeypatch):
    whole = fidelity(student, EvaluationText(ROWS, InProcessTeacher(tiny)))
    monkeypatch.setattr("limbeck.evaluate.fidelity.ROWS_TOGETHER", 1)
    monkeypatch.setattr("limbeck.evaluate.fidelity.KEPT_BYTES", 0)
    single = fidelity(student, EvaluationText(ROWS, InProcessTeacher(tiny)))
    for a, b in zip(whole, single, strict=True):
        assert a.sums == pytest.approx(b.sums, rel=1e-4, abs=1e-4)


def item(values, sample_id="x"):
    """A record with these nats at its positions."""
    made = ItemFidelity(sample_id, len(values))
    for position, value in enumerate(values):
        key = str(next((length for length in LENGTHS if position < length), "longer"))
        total, count = made.lengths.get(key, (0.0, 0))
        made.lengths[key] = (total + value, count + 1)
    return made


def test_exposure_bias_is_the_excess_over_the_same_length_of_given_text():
    given, own = [item([0.5] * 33)], [item([0.5] * 8 + [1.0] * 30)]
    found = exposure(own, given)
    assert [point["upto"] for point in found] == [8, 16, 32], "the bucket up to 64 is not full"
    assert found[0]["value"] == pytest.approx(0)
    assert found[1]["value"] == pytest.approx(100 * (12 - 8) / 8)
    assert all(point["value"] == 0 for point in exposure(given, given))
    # Answers of unequal length: each position's mean is over the answers that reach it.
    assert exposure([item([1.0] * 8), item([1.0] * 16)], [item([0.5] * 16)])[1]["value"] == pytest.approx(100)
    assert exposure([item([1.0] * 8)], [item([0.0] * 8)]) == [], "no error to exceed: undefined, not infinite"
    assert exposure([], given) == []


def test_token_classes(tiny):
    classes = TokenClasses(tiny.tokenizer)
    (word,), (inside,), (number,), (mark,), (space,) = (
        tiny.tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in (" the", "q", "7", "?", "\n")
    )
    found = [classes.of(token) for token in (word, inside, number, mark, space, tiny.tokenizer.eos_token_id)]
    assert found[1:] == ["inside a word", "number", "punctuation", "white space", "end of answer"]
    table = by_class([ItemFidelity("a", 3, classes={"number": (3.0, 1), "punctuation": (1.0, 2)})])
    assert list(table) == ["number", "punctuation"] and table["number"] == {
        "tokens": 1,
        "forward_kl": 3.0,
        "share_of_loss": 0.75,
    }
