"""Loss and gradient depend on the text alone: not on micro-batches, padding, packing or the number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from limbeck.config.sections import Train
from limbeck.data.batches import CHOSEN, REJECTED, Row, make_batch, steps_of_epoch
from limbeck.models.load import load_model
from limbeck.models.model import head_of
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.bound import ModelPair, joined_taps
from limbeck.objectives.forward import Sums
from limbeck.objectives.head import PositionEvidence, fused_loss
from limbeck.objectives.rank import RANKINGS
from limbeck.objectives.term import make_term
from limbeck.signals.dense import DenseSignal
from limbeck.training import loop as train
from limbeck.training.job import Objective, TrainingJob
from limbeck.training.prepare import TextBeforeTraining


def row(number: int) -> Row:
    """Two rows answer each prompt: the first by the teacher, the second by the untouched student."""
    first = number % 2 == 0
    tags = frozenset({"teacher", CHOSEN} if first else {"untouched", REJECTED})
    prompt, response = tuple(range(5, 9 + number // 2 % 4)), (*range(20 + number, 24 + number + number % 3), 0)
    return Row(f"s{number}", prompt, response, tags, f"p{number // 2}", 1 + number % 3, (("start", -80.0 - number),))


ROWS = [row(number) for number in range(24)]
MIXES = {
    "vocabulary": [("forward_kl", {}), ("jsd", {"only": "teacher"}), ("cross_entropy", {"only": "chosen", "label_smoothing": 0.1})],
    "ranking": [("dpo", {}), ("orpo", {}), ("kto", {}), ("cross_entropy", {"only": "chosen"})],
    "match": [
        ("hidden_match", {"layers": "uniform", "embeddings": True}), ("attention_match", {"layers": "last"}), ("cka", {"only": "teacher"}),
        ("relations", {"relation_heads": 4}), ("filtered_match", {}), ("contrast", {"negatives": 5, "dim": 8}), ("forward_kl", {}),
    ],
}  # fmt: skip


def make_job(tiny, mix, folder=Path("unused"), **settings) -> TrainingJob:
    """A student of three layers; feature terms bound, banks filled."""
    teacher, net = InProcessTeacher(tiny), drop_layers(tiny.net, [0, 1, 3])
    terms = [make_term(name, params, 0.3 + 0.2 * i) for i, (name, params) in enumerate(MIXES[mix])]
    models = ModelPair((3, 4), (32, 32), seed=0, embed=net.get_input_embeddings(), dense=DenseSignal)
    matches = {term.label: term.bind(models).to(tiny.net.dtype) for term in terms if term.loss.binds}
    taps = [joined_taps(list(matches.values()), side) for side in (0, 1)]
    values = {"steps": 4, "tokens_per_step": 40, "lr": 1e-3, "save_seconds": 1e9, "seed": 1, **settings}
    bank_rows = {row.sample_id: number for number, row in enumerate(ROWS)}
    objective = Objective(
        net, terms, lambda batch: teacher.view(batch, taps[1]), learned=matches, taps=taps[0], bank_rows=bank_rows
    )
    if "contrast" in matches:
        text = TextBeforeTraining((net, tiny.net), ROWS, bank_rows, tokens_per_step=40, seed=1)
        matches["contrast"].prepare(text)
    return TrainingJob(objective, ROWS, Train(**values), folder, "key")


def with_terms(job, terms, rows=None):
    return replace(job, objective=replace(job.objective, terms=terms), rows=rows or job.rows)


def gradients(job: TrainingJob, split, pad_id: int = 0):
    terms, batches = (
        [term.at_step(0.0, {}) for term in job.terms],
        [make_batch(job.rows, micro, pad_id) for micro in split],
    )
    amounts = {t.label: sum(batch.amount(t.term.unit, t.term.only) for batch in batches) for t in terms}
    sums = Sums()
    for batch in batches:
        sums.add(train.backward(job, batch, terms, amounts))
    return {name: p.grad for name, p in job.objective.parameters().items() if p.grad is not None}, sums


def assert_same(got, want) -> None:
    """To 1e-6 of each gradient's size (the tiny model's norms run in fp32 even in a float64 model)."""
    for name, value in want.items():
        assert (got[name] - value).norm() <= 1e-6 * value.norm() + 1e-12, name


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.promise("R5")
def test_no_split_into_micro_batches_changes_anything(tiny, mix):
    tiny.net.double()
    whole, sums = gradients(make_job(tiny, mix), [tuple(range(12))])
    assert len(whole) > 20 and all(
        value.abs().max() > 0 for name, value in whole.items() if not name.startswith("match")
    )
    splits = [[(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)], [(10, 11, 0, 1), (4, 5, 2, 3, 6, 7), (8, 9)]]
    for split in splits if mix == "ranking" else [*splits, [(index,) for index in range(12)]]:
        parts, part_sums = gradients(make_job(tiny, mix), split, pad_id=len(split))
        for label, value in sums.terms.items():
            assert part_sums.terms[label] == pytest.approx(value, rel=1e-6)
        assert_same(parts, whole)


def test_terms_on_some_rows_are_divided_by_those_rows_alone(tiny):
    tiny.net.double()
    job = make_job(tiny, "vocabulary")
    batch = make_batch(ROWS, (0, 1, 2, 3))
    assert batch.amount("token", "teacher") == sum(len(ROWS[i].response_ids) * ROWS[i].weight for i in (0, 2))
    assert batch.amount("row", "untouched") == ROWS[1].weight + ROWS[3].weight == 3
    assert batch.amount("group") == ROWS[0].weight + ROWS[2].weight == 4
    job = with_terms(job, [make_term("forward_kl", {"only": "teacher"})])
    both, _ = gradients(job, [(0, 1, 2, 3)])
    alone_job = make_job(tiny, "vocabulary")
    alone_job = with_terms(alone_job, [make_term("forward_kl", {})])
    alone, _ = gradients(alone_job, [(0, 2)])
    assert_same(both, alone)


def test_weights_of_tokens_count(tiny):
    tiny.net.double()
    job = make_job(tiny, "vocabulary")
    terms = [make_term("cross_entropy", {})]
    job = with_terms(job, terms, [replace(ROWS[0], weight=3.0), replace(ROWS[2], weight=1.0)])
    heavy, _ = gradients(job, [(0, 1)])
    again = make_job(tiny, "vocabulary")
    again = with_terms(again, terms, [replace(ROWS[0], weight=1.0)] * 3 + [replace(ROWS[2], weight=1.0)])
    repeated, _ = gradients(again, [(0, 1, 2, 3)])
    assert_same(heavy, repeated)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "relations", "cka"])
def test_weights_of_pairs_and_rows_count(tiny, name):
    """A pair of weight 3 beside one of weight 1 is that pair three times; so is a row where rows are the unit."""
    tiny.net.double()
    mix = "ranking" if name in RANKINGS else "match"
    pairs = [[replace(ROWS[n], weight=1.0), replace(ROWS[n + 1], weight=1.0)] for n in (0, 2)]
    heavy = [replace(row, weight=3.0) for row in pairs[0]]
    copies = [[replace(row, group=f"{row.group}-{n}") for row in pairs[0]] for n in range(3)]
    got = []
    for parts in ([heavy, pairs[1]], [*copies, pairs[1]], [*pairs]):
        job = make_job(tiny, mix)
        rows = [row for part in parts for row in part]
        job = with_terms(job, [term for term in job.terms if term.name == name], rows)
        got.append(gradients(job, [tuple(range(len(rows)))])[0])
    if job.terms[0].unit != "row" or name == "relations":
        assert_same(got[0], got[1])
    assert any((got[0][key] - got[2][key]).norm() > 1e-4 * got[2][key].norm() for key in got[2])


@pytest.mark.promise("R5")
def test_neither_left_padding_nor_packing_changes_anything(tiny):
    net = tiny.net.double()
    rows = [ROWS[0], ROWS[3]]
    noise = torch.Generator().manual_seed(1)
    teacher_VD = torch.randn(net.config.vocab_size, 32, generator=noise, dtype=torch.float64)

    def loss_and_gradient(hidden_ND, targets_N):
        net.zero_grad()
        evidence = PositionEvidence(
            targets_N, DenseSignal(hidden_ND.detach(), replace(head_of(net), weight_VD=teacher_VD))
        )
        terms = [make_term("forward_kl", {}).at_step(0, {}), make_term("cross_entropy", {}).at_step(0, {})]
        total = fused_loss(
            hidden_ND, head_of(net), terms, [0.1, 0.2], torch.ones(2, len(targets_N), dtype=torch.float64), evidence
        )
        total.loss.backward()
        return total.loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}

    def states(tokens_BT, mask_BT, picked, **inputs):
        hidden_BTD = net.get_decoder()(input_ids=tokens_BT, use_cache=False, **inputs).last_hidden_state
        rows_N, targets = mask_BT.nonzero(as_tuple=True)
        return hidden_BTD[rows_N, targets - 1], tokens_BT[rows_N, targets]

    right = make_batch(rows, (0, 1))
    want = loss_and_gradient(*states(right.tokens_BT, right.mask_BT, rows))
    width = right.tokens_BT.shape[1]
    tokens_BT, mask_BT = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool)
    for number, one in enumerate(rows):
        tokens_BT[number, width - len(one) :] = torch.tensor(one.prompt_ids + one.response_ids)
        mask_BT[number, width - len(one.response_ids) :] = True
    attention = torch.tensor([[position >= width - len(one) for position in range(width)] for one in rows])
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    left = loss_and_gradient(*states(tokens_BT, mask_BT, rows, attention_mask=attention.long(), position_ids=positions))
    packed_BT = torch.tensor([[token for one in rows for token in one.prompt_ids + one.response_ids]])
    packed_mask = torch.tensor(
        [[flag for one in rows for flag in [False] * len(one.prompt_ids) + [True] * len(one.response_ids)]]
    )
    packed_positions = torch.tensor([[position for one in rows for position in range(len(one))]])
    packed = loss_and_gradient(*states(packed_BT, packed_mask, rows, position_ids=packed_positions))
    for other in (left, packed):
        torch.testing.assert_close(other[0], want[0], rtol=1e-9, atol=0)
        assert_same(other[1], want[1])


def test_answers_to_one_prompt_stay_together():
    for step in steps_of_epoch(ROWS, seed=3, epoch=0, tokens_per_step=40, together=True):
        for micro_batch in step:
            groups = make_batch(ROWS, micro_batch).groups
            assert all(len(group) == 2 and micro_batch[group[0]] % 2 == 0 for group in groups)


@pytest.mark.parametrize("mix", ["ranking", "match", "adaptive"])
@pytest.mark.promise("R3")
def test_a_stopped_run_of_any_family_goes_on_bit_for_bit(tiny, tmp_path, mix):
    """Measured baselines, adaptive schedules, learned maps, frozen filters and banks all come back from the checkpoint."""
    MIXES["adaptive"] = [
        ("taid", {"t": {"from": 0.2, "to": 1.0, "shape": "adaptive", "rate": 0.3}}),
        ("jsd", {"only": "teacher"}),
    ]

    def losses(folder, stops=()):
        for stop_after in (*stops, 99):
            folder.mkdir(exist_ok=True)
            job, done = make_job(tiny, mix, folder), []
            if (folder / "checkpoints").exists():
                for match in job.objective.learned.values():
                    if hasattr(match, "bank_ME"):
                        match.bank_ME = match.bank_ME[:0]
                    torch.nn.utils.vector_to_parameters(
                        torch.zeros(sum(p.numel() for p in match.parameters())), match.parameters()
                    )
            train.train(job, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= stop_after)  # noqa: B023
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(record["loss"].hex(), record.get("scheduled")) for record in records]

    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts", stops=(1, 2)) == whole and len(whole) == 4
    moved = [scheduled for _, scheduled in whole if scheduled]
    assert mix == "match" or len({str(scheduled) for scheduled in moved}) == 4


def _train_rank(rank: int, size: int, model: str, folder: str, mix: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    train.train(make_job(load_model(model), mix, Path(folder)))
    distributed.destroy_process_group()


@pytest.mark.parametrize("mix", ["vocabulary", "ranking"])
@pytest.mark.promise("R4")
def test_two_ranks_train_the_same_student(tiny, tiny_folder, tmp_path, mix):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    job = make_job(tiny, mix, alone)
    train.train(job)
    multiprocessing.spawn(_train_rank, (2, str(tiny_folder), str(together), mix), nprocs=2)
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, together)
    ]
    assert len(records[0]) == len(records[1]) == 4
    for one, two in zip(*records, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6) and two["grad_norm"] == pytest.approx(
            one["grad_norm"], rel=1e-5
        )
        assert two["response_tokens"] == one["response_tokens"]
