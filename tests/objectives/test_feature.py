"""Feature losses against plain Python written from the formulas, and what they must not depend on.

Shapes: B rows, T positions, N response positions, H and G heads, A head width, D and E widths.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import limbeck
from limbeck.objectives.attention import attention_kl, attention_match, relations, value_relation
from limbeck.objectives.contrast import Contrast, draw_negatives, pooled
from limbeck.objectives.hidden import TaskFilters, cka_distance, filtered_match, hidden_match
from limbeck.objectives.layers import layer_map, pair_name, projections
from limbeck.types import Batch, RecipeError

ROW_N = torch.tensor([0, 0, 0, 1, 1])
POSITION_N = torch.tensor([0, 2, 5, 1, 3])
PLACES = list(zip(ROW_N.tolist(), POSITION_N.tolist(), strict=True))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(seed: int, heads: int = 4, kv_heads: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one layer: 2 rows of 7 positions."""
    return (
        noise(seed, 2, heads, 7, width),
        noise(seed + 1, 2, kv_heads, 7, width),
        noise(seed + 2, 2, kv_heads, 7, width),
    )


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(noise(seed, size, size)).Q


# Every loss on attention, as one function of two layers' (query, key, value).
ON_ATTENTION = {
    "attention_match": attention_match,
    "attention_kl": attention_kl,
    "value_relation": value_relation,
    "query_relations": lambda s, t, row, position: relations(s[0], t[0], 3, row, position),
    "key_relations": lambda s, t, row, position: relations(s[1], t[1], 3, row, position),
    "value_relations": lambda s, t, row, position: relations(s[2], t[2], 3, row, position),
}
EACH_ON_ATTENTION = pytest.mark.parametrize("loss", ON_ATTENTION.values(), ids=ON_ATTENTION.keys())


# References in plain Python


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def head_scores(query: list, key: list, head: int, i: int) -> list[float]:
    """Scores of query i of one head with the keys 0..i, lists indexed [head][position][width]."""
    group = head * len(key) // len(query)
    return [dot(query[head][i], key[group][j]) / math.sqrt(len(query[head][i])) for j in range(i + 1)]


def attention_reference(name: str, student: tuple, teacher: tuple, row: int, i: int) -> float:
    (qs, ks, vs), (qt, kt, vt) = ([x[row].tolist() for x in model] for model in (student, teacher))
    total = 0.0
    for head in range(len(qs)):
        if name == "attention_match":
            ours, theirs = head_scores(qs, ks, head, i), head_scores(qt, kt, head, i)
            total += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / (i + 1)
        elif name == "attention_kl":
            total += kl(softmax(head_scores(qt, kt, head, i)), softmax(head_scores(qs, ks, head, i)))
        else:
            ours, theirs = (v[head * len(v) // len(qs)] for v in (vs, vt))
            total += kl(softmax(head_scores([theirs], [theirs], 0, i)), softmax(head_scores([ours], [ours], 0, i)))
    return total / len(qs)


def relation_reference(student_HTA: Tensor, teacher_HTA: Tensor, relation_heads: int, i: int) -> float:
    total = 0.0
    for r in range(relation_heads):
        distributions = []
        for x in (teacher_HTA.tolist(), student_HTA.tolist()):
            joined = [[number for head in x for number in head[j]] for j in range(i + 1)]
            width = len(joined[0]) // relation_heads
            cut = [vector[r * width : (r + 1) * width] for vector in joined]
            distributions.append(softmax([dot(cut[i], other) / math.sqrt(width) for other in cut]))
        total += kl(*distributions)
    return total / relation_heads


# Hidden states


def test_hidden_match_equals_the_definition():
    student, teacher, weight = noise(1, 5, 4), noise(2, 5, 6), noise(3, 6, 4)
    squared = hidden_match(student, teacher, lambda x: x @ weight.T)
    cosine = hidden_match(student, teacher, lambda x: x @ weight.T, distance="cosine")
    for n in range(5):
        s, t = [dot(row, student[n].tolist()) for row in weight.tolist()], teacher[n].tolist()
        assert squared[n].item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 6, rel=1e-9)
        assert cosine[n].item() == pytest.approx(1 - dot(s, t) / math.sqrt(dot(s, s) * dot(t, t)), rel=1e-9)


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_equal_hidden_states_give_zero_loss_and_gradient(distance):
    student = noise(1, 5, 4).requires_grad_()
    value = hidden_match(student, student.detach(), distance=distance)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_no_gradient_reaches_the_teachers_hidden_states(distance):
    student, teacher = noise(1, 5, 4).requires_grad_(), noise(2, 5, 4).requires_grad_()
    hidden_match(student, teacher, distance=distance).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_cosine_is_blind_to_lengths_and_squared_is_not():
    student, teacher = noise(1, 5, 4), noise(2, 5, 4)
    torch.testing.assert_close(
        hidden_match(3 * student, teacher / 7, distance="cosine"), hidden_match(student, teacher, distance="cosine")
    )
    torch.testing.assert_close(
        hidden_match(-student, student, distance="cosine"), torch.full((5,), 2.0, dtype=torch.float64)
    )
    torch.testing.assert_close(hidden_match(3 * student, 3 * teacher), 9 * hidden_match(student, teacher))


def test_half_precision_is_computed_in_fp32():
    student, teacher = ((300 * noise(seed, 5, 64)).bfloat16() for seed in (1, 2))
    value = hidden_match(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, hidden_match(student.float(), teacher.float()), rtol=0, atol=0)
    half = tuple(x.half() for x in attention(1))
    for loss in ON_ATTENTION.values():
        assert loss(half, tuple(x.half() for x in attention(5)), ROW_N, POSITION_N).dtype == torch.float32


@pytest.mark.parametrize(
    ("distance", "width", "words"), [("squared", 5, "projection: learned"), ("cosin", 4, "did you mean 'cosine'")]
)
def test_hidden_match_refuses_with_the_remedy(distance, width, words):
    with pytest.raises(limbeck.UserError, match=words):
        hidden_match(noise(1, 3, 4), noise(2, 3, width), distance=distance)


# Attention and relations


@pytest.mark.parametrize("name", ["attention_match", "attention_kl", "value_relation"])
@pytest.mark.parametrize(("kv_heads", "teacher_kv_heads"), [(4, 4), (2, 2), (1, 2), (4, 2)])
def test_attention_losses_equal_their_definitions(name, kv_heads, teacher_kv_heads):
    student, teacher = attention(1, kv_heads=kv_heads), attention(5, kv_heads=teacher_kv_heads, width=5)
    got = ON_ATTENTION[name](student, teacher, ROW_N, POSITION_N)
    for value, (row, i) in zip(got.tolist(), PLACES, strict=True):
        assert value == pytest.approx(attention_reference(name, student, teacher, row, i), rel=1e-9, abs=1e-14)
    assert got[1] > 0.01


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("relation_heads", [1, 2, 6])
def test_relations_equal_their_definition_for_any_heads_and_widths(part, relation_heads):
    student, teacher = attention(1, heads=2, kv_heads=1)[part], attention(5, heads=6, kv_heads=3, width=8)[part]
    got = relations(student, teacher, relation_heads, ROW_N, POSITION_N)
    for value, (row, i) in zip(got.tolist(), PLACES, strict=True):
        assert value == pytest.approx(
            relation_reference(student[row], teacher[row], relation_heads, i), rel=1e-9, abs=1e-14
        )
    assert got[1] > 0.01


def test_relations_with_one_relation_head_per_head_are_the_value_relation():
    student, teacher = attention(1, kv_heads=4), attention(5, kv_heads=4)
    want = value_relation(student, teacher, ROW_N, POSITION_N)
    torch.testing.assert_close(relations(student[2], teacher[2], 4, ROW_N, POSITION_N), want, rtol=1e-12, atol=1e-14)


@EACH_ON_ATTENTION
def test_the_same_model_gives_zero_loss_and_gradient(loss):
    student = tuple(x.requires_grad_() for x in attention(1))
    value = loss(student, tuple(x.detach() for x in student), ROW_N, POSITION_N)
    gradients = torch.autograd.grad(value.sum(), student, allow_unused=True)
    assert value.abs().max() < 1e-14
    assert any(g is not None for g in gradients) and all(g is None or g.abs().max() < 1e-14 for g in gradients)


@EACH_ON_ATTENTION
def test_no_gradient_reaches_the_teacher_and_the_students_is_right(loss):
    student, teacher = (tuple(x.requires_grad_() for x in attention(seed)) for seed in (1, 5))
    loss(student, teacher, ROW_N, POSITION_N).sum().backward()
    assert all(x.grad is None for x in teacher)
    part = next(number for number, x in enumerate(student) if x.grad is not None)
    step = 1e-6
    for place in ((0, 0, 1, 2), (0, 1, 5, 0), (1, 0, 0, 3), (1, 1, 6, 1)):
        moved = []
        for sign in (1, -1):
            nudged = [x.detach().clone() for x in student]
            nudged[part][place] += sign * step
            moved.append(loss(tuple(nudged), teacher, ROW_N, POSITION_N).sum().item())
        assert student[part].grad[place].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5, abs=1e-8)


@EACH_ON_ATTENTION
def test_what_comes_after_a_position_does_not_matter_and_what_comes_before_does(loss):
    student, teacher = attention(1), attention(5)
    row, position = torch.tensor([0]), torch.tensor([4])
    want = loss(student, teacher, row, position)
    for changed, same in (((slice(5, None), 1e6), True), ((slice(3, 4), 5.0), False), ((slice(4, 5), 5.0), False)):
        later = tuple(x.clone() for x in student)
        for x in later:
            x[0, :, changed[0]] = changed[1] * noise(9, *x[0, :, changed[0]].shape)
        # The last position of the row is asked for too, so the keys after position 4 really are in the computation.
        got = loss(later, teacher, torch.tensor([0, 0]), torch.tensor([4, 6]))[:1]
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14) is same, changed


@EACH_ON_ATTENTION
@pytest.mark.parametrize("content", [0.0, 1e4, math.nan])
def test_a_row_alone_equals_the_row_in_a_padded_batch(loss, content):
    student, teacher = attention(1), attention(5)
    for x in (*student, *teacher):
        x[1, :, 4:] = content
    student = tuple(x.requires_grad_() for x in student)
    batch = loss(student, teacher, ROW_N, POSITION_N)
    gradients = torch.autograd.grad(batch.sum(), student, allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    parts = []
    for row, length in ((0, 7), (1, 4)):
        cut = (tuple(x[row : row + 1, :, :length] for x in model) for model in (student, teacher))
        position = POSITION_N[row == ROW_N]
        parts.append(loss(*cut, torch.zeros_like(position), position))
    torch.testing.assert_close(batch, torch.cat(parts), rtol=1e-12, atol=1e-14)


@EACH_ON_ATTENTION
def test_values_follow_the_order_of_the_positions(loss):
    student, teacher = attention(1), attention(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    want = loss(student, teacher, ROW_N, POSITION_N)[order]
    torch.testing.assert_close(loss(student, teacher, ROW_N[order], POSITION_N[order]), want, rtol=1e-12, atol=1e-14)
    assert loss(student, teacher, ROW_N[:0], POSITION_N[:0]).shape == (0,)


def test_positions_come_from_a_batch():
    mask = torch.tensor([[0, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]])
    batch = Batch(torch.zeros_like(mask), mask, mask.float(), ("a", "b"))
    got = attention_kl(attention(1), attention(5), *batch.response_positions())
    torch.testing.assert_close(got, attention_kl(attention(1), attention(5), ROW_N, POSITION_N), rtol=0, atol=0)


@pytest.mark.parametrize("part", [0, 2])
def test_relations_do_not_change_under_a_rotation_of_each_relation_head(part):
    student, teacher = attention(1)[part], attention(5)[part]
    width = student.shape[1] * student.shape[3] // 3
    want = relations(student, teacher, 3, ROW_N, POSITION_N)

    def turned(x_BHTA: Tensor, whole: Tensor) -> Tensor:
        joined = x_BHTA.transpose(1, 2).flatten(2) @ whole
        return joined.unflatten(2, (x_BHTA.shape[1], -1)).transpose(1, 2)

    per_head = torch.block_diag(*(rotation(seed, width) for seed in (7, 8, 9)))
    torch.testing.assert_close(
        relations(turned(student, per_head), teacher, 3, ROW_N, POSITION_N), want, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        relations(student, turned(teacher, per_head), 3, ROW_N, POSITION_N), want, rtol=1e-9, atol=1e-12
    )
    across = relations(turned(student, rotation(7, 3 * width)), teacher, 3, ROW_N, POSITION_N)
    assert (across - want).abs().max() > 1e-3


def test_a_shift_of_the_scores_costs_in_attention_match_only():
    student, teacher = attention(1, kv_heads=4), attention(1, kv_heads=4)
    student = (student[0], student[1] + noise(9, 1, 4, 1, 6), student[2])
    assert (attention_match(student, teacher, ROW_N, POSITION_N) > 1e-3).all()
    assert attention_kl(student, teacher, ROW_N, POSITION_N).abs().max() < 1e-12


def test_huge_scores_cost_no_infinity():
    student = tuple(100 * x.float().requires_grad_() for x in attention(1))
    teacher = tuple(100 * x.float() for x in attention(5))
    for name, loss in ON_ATTENTION.items():
        value = loss(student, teacher, ROW_N, POSITION_N)
        gradients = torch.autograd.grad(value.sum(), student, allow_unused=True)
        assert torch.isfinite(value).all() and all(g is None or torch.isfinite(g).all() for g in gradients), name


@pytest.mark.parametrize("loss", [attention_match, attention_kl, value_relation])
def test_different_numbers_of_heads_are_refused_with_the_remedy(loss):
    with pytest.raises(limbeck.UserError, match=r"4 attention heads.* teacher 2; use the relations"):
        loss(attention(1), attention(5, heads=2), ROW_N, POSITION_N)


@pytest.mark.parametrize("relation_heads", [0, 4, 5, -3])
def test_relation_heads_that_do_not_divide_are_refused_and_the_legal_ones_named(relation_heads):
    with pytest.raises(limbeck.UserError, match=r"legal: \[1, 2, 3, 6\]"):
        relations(attention(1, width=6)[0], attention(5, heads=3, width=10)[0], relation_heads, ROW_N, POSITION_N)


# Filters


def test_filtered_match_equals_the_definition():
    student, teacher, ours, theirs = noise(1, 5, 4), noise(2, 5, 6), noise(3, 3, 4), noise(4, 3, 6)
    got = filtered_match(student, teacher, lambda x: x @ ours.T, lambda x: x @ theirs.T)
    for n in range(5):
        s = [dot(row, student[n].tolist()) for row in ours.tolist()]
        t = [dot(row, teacher[n].tolist()) for row in theirs.tolist()]
        assert got[n].item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 3, rel=1e-9)


def test_identity_filters_are_hidden_match():
    student, teacher = noise(1, 5, 4).float(), noise(2, 5, 4).float()
    filters = TaskFilters([(1, 2)], 4, 4)
    torch.testing.assert_close(filters((1, 2), student, teacher), hidden_match(student, teacher), rtol=1e-6, atol=1e-7)


def test_only_the_students_filter_learns():
    filters = TaskFilters([(1, 2), (2, 4)], 4, 6, width=3)
    filters((2, 4), noise(1, 5, 4).float(), noise(2, 5, 6).float()).sum().backward()
    learning = {name for name, weight in filters.named_parameters() if weight.grad is not None}
    assert learning == {"student.2-4.weight"}
    assert not any(weight.requires_grad for weight in filters.teacher.parameters())
    filters.teacher.requires_grad_()
    filters((2, 4), noise(1, 5, 4).float(), noise(2, 5, 6).float()).sum().backward()
    assert all(weight.grad is None for weight in filters.teacher.parameters())


# Contrast


def test_pooled_is_the_mean_over_a_rows_response_positions():
    layers = [noise(1, 3, 7, 4), noise(2, 3, 7, 2)]
    got = pooled(layers, ROW_N, POSITION_N)
    for row in range(2):
        places = [i for r, i in PLACES if r == row]
        want = [
            sum(layer[row, i, d].item() for i in places) / len(places)
            for layer in layers
            for d in range(layer.shape[2])
        ]
        assert got[row].tolist() == pytest.approx(want, rel=1e-12)
    assert torch.equal(got[2], torch.zeros(6, dtype=torch.float64))
    elsewhere = [layer.clone() for layer in layers]
    elsewhere[0][0, 1] = 99
    assert torch.equal(pooled(elsewhere, ROW_N, POSITION_N), got)


@pytest.mark.parametrize("drawn", [False, True])
def test_contrast_equals_the_definition(drawn):
    contrast = Contrast(4, 6, dim=5, temperature=0.3).double()
    student, teacher, bank = noise(1, 3, 4), noise(2, 3, 6), noise(3, 8, 6)
    negatives = torch.tensor([[0, 5], [7, 7], [2, 3]]) if drawn else None
    got = contrast(student, teacher, bank, negatives)

    def embed(weight: Tensor, x: Tensor) -> list[float]:
        y = [dot(row, x.tolist()) for row in weight.tolist()]
        return [value / math.sqrt(dot(y, y)) for value in y]

    for b in range(3):
        s = embed(contrast.student.weight, student[b])
        others = negatives[b].tolist() if drawn else range(8)
        match = math.exp(dot(s, embed(contrast.teacher.weight, teacher[b])) / 0.3)
        rest = sum(math.exp(dot(s, embed(contrast.teacher.weight, bank[k])) / 0.3) for k in others)
        assert got[b].item() == pytest.approx(-math.log(match / (match + rest)), rel=1e-9)


def test_contrast_starts_near_chance_and_falls_as_pairs_match():
    negatives = 255
    contrast = Contrast(32, 48, seed=1)
    teacher, mixing = noise(1, 64, 48).float(), noise(2, 48, 32).float()
    bank, student = noise(3, negatives, 48).float(), teacher @ mixing
    start = contrast(noise(4, 64, 32).float(), teacher, bank).sum().item() / 64
    assert abs(start - math.log(negatives + 1)) < 1
    optimizer = torch.optim.Adam(contrast.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        contrast(student, teacher, bank).sum().backward()
        optimizer.step()
    matched, shuffled = (contrast(x, teacher, bank).sum().item() / 64 for x in (student, student.roll(1, 0)))
    assert matched < 0.5 * math.log(negatives + 1) < shuffled


def test_contrast_limits_rows_and_gradients():
    contrast = Contrast(4, 4, dim=4, temperature=0.5).double()
    assert torch.equal(contrast.student.weight, torch.eye(4, dtype=torch.float64))
    one = normalize(noise(1, 1, 4), dim=-1)
    assert contrast(one, one, -one.expand(6, 4)).item() == pytest.approx(math.log(1 + 6 * math.exp(-2 / 0.5)), rel=1e-9)
    assert contrast(one, one, one.expand(6, 4)).item() == pytest.approx(math.log(7), rel=1e-9)
    student, teacher, bank = (
        noise(1, 3, 4).requires_grad_(),
        noise(2, 3, 4).requires_grad_(),
        noise(3, 8, 4).requires_grad_(),
    )
    together = contrast(student, teacher, bank)
    torch.testing.assert_close(contrast(student[1:2], teacher[1:2], bank), together[1:2], rtol=1e-12, atol=1e-14)
    together.sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and bank.grad is None


def test_drawn_negatives_are_never_the_row_itself_and_reach_all_others():
    own = torch.tensor([0, 3, 6])
    drawn = draw_negatives(own, 7, 400, torch.Generator().manual_seed(0))
    for row, place in enumerate(own.tolist()):
        assert set(drawn[row].tolist()) == set(range(7)) - {place}
    assert torch.equal(drawn, draw_negatives(own, 7, 400, torch.Generator().manual_seed(0)))
    with pytest.raises(limbeck.UserError, match="at least 2"):
        draw_negatives(own, 1, 4, torch.Generator())


def test_contrast_refuses_with_the_remedy():
    with pytest.raises(limbeck.UserError, match="above 0"):
        Contrast(4, 4, temperature=0)
    with pytest.raises(limbeck.UserError, match="fill the bank"):
        Contrast(4, 4)(torch.ones(1, 4), torch.ones(1, 4), torch.ones(0, 4))


# CKA

STATES_ROW_N = torch.tensor([0] * 9 + [1] * 6 + [2])


def cka_reference(x: list[list[float]], y: list[list[float]]) -> float:
    n = len(x)

    def centred(rows: list[list[float]]) -> list[list[float]]:
        means = [sum(column) / n for column in zip(*rows, strict=True)]
        return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]

    def cross(a: list[list[float]], b: list[list[float]]) -> float:
        columns_a, columns_b = list(zip(*a, strict=True)), list(zip(*b, strict=True))
        return sum(dot(u, v) ** 2 for u in columns_a for v in columns_b)

    x, y = centred(x), centred(y)
    return 1 - cross(y, x) / math.sqrt(cross(x, x) * cross(y, y))


def test_cka_distance_equals_the_definition():
    student, teacher = noise(1, 16, 4), noise(2, 16, 6)
    got = cka_distance(student, teacher, STATES_ROW_N, 4)
    for row in (0, 1):
        chosen = row == STATES_ROW_N
        assert got[row].item() == pytest.approx(
            cka_reference(student[chosen].tolist(), teacher[chosen].tolist()), rel=1e-9
        )
    assert got.shape == (4,) and got[2] == 0 and got[3] == 0 and 0.05 < got[0] < 1


def test_cka_distance_does_not_change_under_rotation_shift_and_scale():
    student, teacher = noise(1, 16, 4), noise(2, 16, 6)
    want = cka_distance(student, teacher, STATES_ROW_N, 3)
    turned = cka_distance(1e-3 * student @ rotation(3, 4) + 5, 1e3 * teacher @ rotation(4, 6) - 2, STATES_ROW_N, 3)
    torch.testing.assert_close(turned, want, rtol=1e-8, atol=1e-10)
    assert (cka_distance(student * torch.tensor([9.0, 1, 1, 1]), teacher, STATES_ROW_N, 3) - want).abs().max() > 1e-3
    small = cka_distance(1e-12 * student.float(), 1e9 * teacher.float(), STATES_ROW_N, 3)
    torch.testing.assert_close(small.double(), want, rtol=1e-4, atol=1e-6)
    alone = cka_distance(student[9:15], teacher[9:15], torch.zeros(6, dtype=torch.long), 1)
    torch.testing.assert_close(alone, want[1:2], rtol=1e-12, atol=1e-14)


def test_equal_states_up_to_rotation_give_zero_distance_and_gradient():
    teacher = noise(2, 16, 6)
    student = (teacher @ rotation(3, 6)).requires_grad_()
    value = cka_distance(student, teacher, STATES_ROW_N, 3)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_cka_distance_has_a_right_and_finite_gradient_at_the_edges():
    student, teacher = noise(1, 16, 4).requires_grad_(), noise(2, 16, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cka_distance(x, teacher, STATES_ROW_N, 3), (student,))
    cka_distance(student, teacher, STATES_ROW_N, 3).sum().backward()
    assert teacher.grad is None and torch.equal(student.grad[15], torch.zeros(4, dtype=torch.float64))
    constant = torch.ones(16, 4, requires_grad=True)
    value = cka_distance(constant, noise(2, 16, 6).float(), STATES_ROW_N, 3)
    (gradient,) = torch.autograd.grad(value.sum(), constant)
    assert value.tolist() == [1, 1, 0] and torch.isfinite(gradient).all()
    short = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(cka_distance(short, torch.ones(1, 6), torch.tensor([1]), 2).sum(), short)
    assert torch.equal(gradient, torch.zeros(1, 4))


# Layer maps and projections


@pytest.mark.parametrize(
    ("spec", "layers", "embeddings", "want"),
    [
        ("uniform", (2, 6), False, ((1, 3), (2, 6))), ("uniform", (2, 6), True, ((0, 0), (1, 3), (2, 6))),
        ("uniform", (4, 6), False, ((1, 2), (2, 3), (3, 5), (4, 6))), ("uniform", (3, 3), False, ((1, 1), (2, 2), (3, 3))),
        ("uniform", (5, 2), False, ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2))), ("last", (4, 30), False, ((4, 30),)),
        ("last", (4, 30), True, ((0, 0), (4, 30))), ([[4, 8], (2, 4)], (4, 8), False, ((4, 8), (2, 4))),
        ([[0, 0], [1, 8]], (4, 8), True, ((0, 0), (1, 8))), ([[1, 8]], (4, 8), True, ((1, 8),)),
    ],
)  # fmt: skip
def test_layer_map(spec, layers, embeddings, want):
    assert layer_map(spec, *layers, embeddings=embeddings) == want


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("unifrom", "at", "did you mean 'uniform'"), ([], "at", "is no layer map"), (3, "at", "is no layer map"), (None, "at", "give uniform"),
        ([[1, 2], [3]], r"at\[1\]", "not a pair"), ([[1, 2.0]], r"at\[0\]", "not a pair"), ([[True, 2]], r"at\[0\]", "not a pair"),
        (["12"], r"at\[0\]", "not a pair"), ([[5, 2]], r"at\[0\]", "student layer 5 is outside 1 to 4"),
        ([[1, 9]], r"at\[0\]", "teacher layer 9 is outside 1 to 8"), ([[0, 0]], r"at\[0\]", "needs embeddings: true"),
        ([[1, -1]], r"at\[0\]", "teacher layer -1"), ([[1, 2], [2, 4], [1, 2]], "at", "twice"),
    ],
)  # fmt: skip
def test_layer_maps_that_cannot_be_are_refused_with_their_place(spec, path, words):
    with pytest.raises(RecipeError, match=f"^{path}: .*{words}"):
        layer_map(spec, 4, 8, path="at")


@pytest.mark.parametrize(("student", "teacher"), [(4, 6), (6, 4)])
def test_learned_projections_start_orthonormal_from_their_seed(student, teacher):
    pairs = ((1, 2), (2, 4))
    state = torch.get_rng_state()
    made = projections(pairs, student, teacher, "learned", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(made) == {"1-2", "2-4"} == {pair_name(pair) for pair in pairs}
    for layer in made.values():
        weight = layer.weight if teacher < student else layer.weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=1e-5, atol=1e-6)
        assert layer.bias is None and layer(torch.ones(2, student)).shape == (2, teacher) and layer.weight.requires_grad
    again, other = (
        projections(pairs, student, teacher, "learned", seed=3),
        projections(pairs, student, teacher, "learned", seed=4),
    )
    assert torch.equal(made["1-2"].weight, again["1-2"].weight) and not torch.equal(
        made["1-2"].weight, made["2-4"].weight
    )
    assert not torch.equal(made["1-2"].weight, other["1-2"].weight)


def test_projections_between_equal_widths_start_as_the_identity():
    states = noise(1, 3, 5).float()
    for kind in ("learned", "none"):
        made = projections(((1, 1),), 5, 5, kind)
        assert torch.equal(made["1-1"](states), states)
        assert len(list(made.parameters())) == (kind == "learned")


@pytest.mark.parametrize(("kind", "words"), [("none", "set projection: learned"), ("lerned", "did you mean 'learned'")])
def test_projections_refuse_with_the_remedy(kind, words):
    with pytest.raises(limbeck.UserError, match=words):
        projections(((1, 1),), 4, 5, kind)
