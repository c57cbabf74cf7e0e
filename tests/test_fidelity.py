"""Fidelity against the definitions, computed the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.data import Row
from limbeck.evaluate.fidelity import fidelity, summarise
from limbeck.models.load import Model
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher

ROWS = [Row(f"s{i}", tuple(range(5, 9 + i)), (*range(20 + 3 * i, 24 + 4 * i), 0)) for i in range(11)]


def slow(teacher, student, row):
    tokens = torch.tensor([row.prompt_ids + row.response_ids])
    with torch.inference_mode():
        p, q = (net(tokens).logits[0, len(row.prompt_ids) - 1 : -1].double().log_softmax(-1) for net in (teacher, student))
    m = torch.logaddexp(p, q) - math.log(2)
    kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
    targets = torch.tensor(row.response_ids)
    return {
        "forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.5 * kl(p, m) + 0.5 * kl(q, m),
        "nll": -q[torch.arange(len(targets)), targets].sum(), "top1": (p.argmax(-1) == q.argmax(-1)).sum().double(),
    }  # fmt: skip


def test_sums_per_item_and_summary_equal_the_definitions(tiny):
    student = Model(drop_layers(tiny.net, [0, 2]), tiny.tokenizer, "s")
    found = fidelity({"student": student, "teacher": tiny}, InProcessTeacher(tiny), ROWS)
    assert [item.sample_id for item in found["student"]] == [row.sample_id for row in ROWS]
    totals = dict.fromkeys(("forward_kl", "reverse_kl", "jsd", "nll", "top1"), 0.0)
    for item, row in zip(found["student"], ROWS, strict=True):
        want = slow(tiny.net, student.net, row)
        assert item.tokens == len(row.response_ids) == len(item.lens)
        assert [token for token, *_ in item.lens] == list(row.response_ids)
        for name, value in want.items():
            assert item.sums[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5)
            totals[name] += float(value)
    tokens = sum(len(row.response_ids) for row in ROWS)
    summary = summarise(found["student"])
    assert summary["forward_kl"]["value"] == pytest.approx(totals["forward_kl"] / tokens, rel=1e-4)
    assert summary["perplexity"]["value"] == pytest.approx(math.exp(totals["nll"] / tokens), rel=1e-4)
    assert summary["top1_agreement"]["value"] == pytest.approx(totals["top1"] / tokens)
    itself = summarise(found["teacher"])
    assert itself["forward_kl"]["value"] == pytest.approx(0, abs=1e-6) and itself["top1_agreement"]["value"] == 1
