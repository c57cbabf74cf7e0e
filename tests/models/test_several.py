"""Several teachers: each way of making them one, from its formula in float64, and what a recipe refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from limbeck.config.recipe import parse
from limbeck.data.batches import Row, make_batch
from limbeck.models.folder import save_model
from limbeck.models.model import Model
from limbeck.models.several import TeacherEnsemble
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.objectives.head import Head
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.signals.dense import DenseSignal
from limbeck.signals.several import GatedSignal, MixedSignal
from limbeck.types import RecipeError, UserError
from tests.conftest import make_net, make_tokenizer

N, V, E = 6, 19, 8


def dense(seed, sharpness=1.0):
    noise = torch.Generator().manual_seed(seed)
    return DenseSignal(
        torch.randn(N, E, generator=noise, dtype=torch.float64) * sharpness,
        Head(torch.randn(V, E, generator=noise, dtype=torch.float64)),
    )


def probs(signal):
    return signal.chunk(slice(0, N)).logits_CV.clone().softmax(-1)


def student(seed=9):
    return Distribution(torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_the_mean_is_of_probabilities():
    one, two, weight = dense(1), dense(2, 3.0), torch.tensor([0.25, 0.75]).double().expand(N, 2)
    mixed = MixedSignal([one, two], weight).chunk(slice(0, N)).logits_CV
    assert torch.allclose(mixed.exp(), 0.25 * probs(one) + 0.75 * probs(two), atol=1e-12)
    same = MixedSignal([one, one], weight).chunk(slice(2, 5)).logits_CV
    assert torch.allclose(same.exp(), probs(one)[2:5], atol=1e-12), (
        "a teacher twice is that teacher, and a chunk is its part"
    )


def test_a_teacher_with_all_the_weight_is_alone():
    one, broken = dense(1), DenseSignal(torch.full((N, E), torch.nan, dtype=torch.float64), dense(2).head)
    only = torch.tensor([1.0, 0.0]).double().expand(N, 2)
    assert torch.allclose(MixedSignal([one, broken], only).chunk(slice(0, N)).logits_CV.exp(), probs(one), atol=1e-12)
    some = only.clone()
    some[3:] = torch.tensor([0.0, 1.0]).double()
    two = dense(2, 3.0)
    mixed = MixedSignal([one, two], some).chunk(slice(0, N)).logits_CV.exp()
    assert torch.allclose(mixed[:3], probs(one)[:3], atol=1e-12) and torch.allclose(
        mixed[3:], probs(two)[3:], atol=1e-12
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_uncertainty_weighs_the_losses_by_the_students_entropy(name):
    small, large, logits = dense(1), dense(2, 3.0), student().logits_RV.clone().requires_grad_()
    known, params, targets = DIVERGENCES[name], checked_params(name, {}, name), torch.zeros(N, dtype=torch.long)
    rows = GatedSignal(small, large).chunk(slice(0, N)).rows(slice(0, N))
    values, gradient = rows.compare(known, params, Distribution(logits.detach().clone()), targets)
    q = logits.log_softmax(-1)
    share = (-(q.exp() * q).sum(-1) / math.log(V)).detach()
    assert bool(((share > 0) & (share < 1)).all())
    each = [
        known(Distribution(probs(signal).log()), Distribution(logits.detach().clone()), params, targets)
        for signal in (small, large)
    ]
    assert torch.allclose(values, share * each[0][0] + (1 - share) * each[1][0], atol=1e-12)
    assert torch.allclose(gradient, share[:, None] * each[0][1] + (1 - share)[:, None] * each[1][1], atol=1e-12)


def test_a_student_that_knows_nothing_follows_the_small_teacher_and_a_sure_one_the_large():
    small, large, known = dense(1), dense(2), DIVERGENCES["forward_kl"]
    rows, targets = GatedSignal(small, large).chunk(slice(0, N)).rows(slice(0, N)), torch.zeros(N, dtype=torch.long)
    unsure, sure = torch.zeros(N, V).double(), torch.zeros(N, V).double()
    sure[:, 4] = 60.0
    for logits, alone in ((unsure, small), (sure, large)):
        values, _ = rows.compare(known, {"temperature": 1.0}, Distribution(logits.clone()), targets)
        assert torch.allclose(
            values,
            known(Distribution(probs(alone).log()), Distribution(logits.clone()), {"temperature": 1.0}, targets)[0],
            atol=1e-9,
        )
    with pytest.raises(UserError, match="depends on the student"):
        _ = rows.p


def teacher_of(tiny, seed):
    return InProcessTeacher(Model(make_net(seed=seed, vocab_size=len(tiny.tokenizer)), tiny.tokenizer, f"toy-{seed}"))


@pytest.fixture
def batch(tiny):
    rows = [
        Row(str(n), tuple(tiny.text_ids("why is the sky")), tuple(tiny.text_ids(text)), frozenset(tags))
        for n, (text, tags) in enumerate([("blue cat", {"maths"}), ("the red house", {"code"}), ("a dog ran", set())])
    ]
    return make_batch(rows, (0, 1, 2))


def taught(signal):
    return signal.chunk(slice(None)).logits_CV.clone().softmax(-1)


def test_each_row_has_the_teachers_of_its_tag(tiny, batch):
    main, maths, other = (teacher_of(tiny, seed) for seed in (1, 2, 3))
    both = TeacherEnsemble([main, maths, other], [1.0, 1.0, 3.0], [None, "maths", None], "mean")
    found = taught(both.view(batch).signal)
    row_N = batch.response_positions()[0]
    own = [taught(teacher.signal(batch)) for teacher in (main, maths, other)]
    general = 0.25 * own[0] + 0.75 * own[2]
    assert torch.allclose(found, torch.where((row_N == 0)[:, None], own[1], general), atol=1e-6)
    assert (
        both.identity != TeacherEnsemble([main, maths, other], [1.0, 1.0, 2.0], [None, "maths", None], "mean").identity
    )


def test_the_likeliest_teacher_is_followed_and_a_bad_one_changes_nothing(tiny, batch):
    teachers = [teacher_of(tiny, seed) for seed in (1, 2, 3)]
    row_N, position_N = batch.response_positions()
    targets = batch.tokens_BT[row_N, position_N + 1]
    own = [taught(teacher.signal(batch)) for teacher in teachers]
    sums = torch.stack(
        [torch.zeros(3).index_add_(0, row_N, p.gather(-1, targets[:, None])[:, 0].log()) for p in own], 1
    )
    best = sums.argmax(1)
    assert len(set(best.tolist())) > 1, "the texts differ in who finds them likely"
    found = taught(TeacherEnsemble(teachers, [1.0] * 3, [None] * 3, "least_cross_entropy").view(batch).signal)
    assert torch.allclose(found, torch.stack([own[best[row]][n] for n, row in enumerate(row_N.tolist())]), atol=1e-6)
    worst = int(sums.sum(0).argmin())
    without = [teacher for n, teacher in enumerate(teachers) if n != worst]
    if worst not in best.tolist():
        again = taught(TeacherEnsemble(without, [1.0] * 2, [None] * 2, "least_cross_entropy").view(batch).signal)
        assert torch.allclose(again, found, atol=1e-6)
    alone = taught(TeacherEnsemble(teachers[:1], [2.0], [None], "least_cross_entropy").view(batch).signal)
    assert torch.allclose(alone, own[0], atol=1e-6), "one teacher is plain distillation"


def test_a_recipe_says_what_several_teachers_cannot(recipe_data, tiny_folder):
    base = {**recipe_data, "loss": ["forward_kl"]}
    model = str(tiny_folder)
    beside = [{"model": model}]
    for change, says in (
        ({"together": "uncertainty"}, "speak of several teachers"),
        ({"beside": beside, "cache": {"hidden": {}}}, "asked at every step"),
        ({"beside": [*beside, *beside], "together": "uncertainty"}, "between two teachers"),
        ({"beside": [{"model": model, "only": "techer"}]}, "did you mean 'teacher'"),
    ):
        with pytest.raises(RecipeError, match=says):
            resolve(parse({**base, "teacher": {"model": model, **change}}))
    with pytest.raises(RecipeError, match="no loss reads"):
        resolve(parse({**base, "loss": ["cross_entropy"], "teacher": {"model": model, "beside": beside}}))
    with pytest.raises(RecipeError, match=r"beside\[0\]"):
        check(parse({**base, "teacher": {"model": model, "beside": [{"model": "./nowhere"}]}}))
    one, two = (check(parse({**base, "teacher": {"model": model, "beside": beside * n}})) for n in (0, 1))
    assert (
        two.memory_bytes > one.memory_bytes
        and replace(two, memory_bytes=one.memory_bytes).trained_tokens == one.trained_tokens
    )


def test_an_adapted_student_of_several_teachers_has_them_all(recipe_data, tiny_folder, prompt_file, tmp_path):
    """Alone, a teacher whose weights are the student's start would be the student without its adapters."""
    student = {"start": {"pretrained": str(tiny_folder)}, "lora": {"rank": 2, "alpha": 4}}
    save_model(make_net(seed=6, vocab_size=len(make_tokenizer())), make_tokenizer(), tmp_path / "other")
    values = []
    for name, beside in (("alone", []), ("both", [{"model": str(tmp_path / "other")}])):
        teacher = {"model": str(tiny_folder), **({"beside": beside} if beside else {})}
        folder = run(
            parse({**recipe_data, "teacher": teacher, "student": student, "loss": ["forward_kl"]}),
            tmp_path / name,
            stages=("elicit", "train"),
        )
        values.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["terms"]["forward_kl"])
    assert abs(values[0]) < 1e-6 and values[1] > 0.01
