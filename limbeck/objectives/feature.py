"""Losses on what happens inside the models: hidden states, attention, and relations between positions.

A loss gives one value per response position (`row_N`, `position_N`: the hidden states that predict a response token),
or one per row where its docstring says so. Rows are padded on the right and attention is causal: the query at position
i sees the keys 0..i of its own row. Teacher tensors are detached here; everything is computed in fp32 (fp64 stays).

Not covered: windows narrower than the row (every key up to i counts), and models that cut the text into different
tokens.

Shapes: B rows, T positions, N response positions, Q those of one row, S keys that its last query sees, D width of the
student, E of the teacher, F of a filter, H query heads, G key-value heads, A head width, R relation heads, W their
width, M rows of a bank, K negatives, P projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, normalize

from limbeck.objectives.precision import full_precision
from limbeck.types import RecipeError, UserError, nearest

Attention = tuple[Tensor, Tensor, Tensor]
Pair = tuple[int, int]
Project = Callable[[Tensor], Tensor]

DISTANCES = ("squared", "cosine")
LAYER_MAPS = ("uniform", "last")
PROJECTIONS = ("learned", "none")
USE_RELATIONS = "use the relations loss, which compares any two numbers of heads"


@dataclass(frozen=True)
class Features:
    """What one forward pass of one model leaves for feature losses; only the layers asked for.

    `hidden[0]` are the embeddings, `hidden[i]` the output of layer i (from 1), the last one after the final norm: [B,
    T, D]. `attention[i]` is layer i's (query [B, H, T, A], key [B, G, T, A], value [B, G, T, A]) as its attention sees
    them.
    """

    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Attention] = field(default_factory=dict)


def hidden_match(
    student_ND: Tensor, teacher_NE: Tensor, project: Project | None = None, distance: str = "squared"
) -> Tensor:
    """sum_e (project(s)_e - t_e)^2 / E for `squared`, 1 - cos(project(s), t) for `cosine`: [N].

    Limits: `squared` is 0 iff the projected states are equal; `cosine` lies in [0, 2], is blind to both lengths, and is
    1 where a state is all zero.

    Raises:
        UserError: widths that differ after the projection, or an unknown distance.
    Source: hints, Romero et al., arXiv:1412.6550; per layer, Jiao et al., arXiv:1909.10351 (TinyBERT).
    """
    projected_NE = full_precision(student_ND)
    target_NE = full_precision(teacher_NE.detach())
    projected_NE = projected_NE if project is None else project(projected_NE)
    if projected_NE.shape != target_NE.shape:
        raise UserError(
            f"hidden states {tuple(projected_NE.shape)} and {tuple(target_NE.shape)} differ in shape; set projection:"
            " learned"
        )
    if distance == "cosine":
        return 1 - cosine_similarity(projected_NE, target_NE, dim=-1)
    if distance == "squared":
        return (projected_NE - target_NE).square().sum(-1) / target_NE.shape[-1]
    raise UserError(f"no distance is named {distance!r}{nearest(distance, DISTANCES)}")


def filtered_match(student_ND: Tensor, teacher_NE: Tensor, student_filter: Project, teacher_filter: Project) -> Tensor:
    """sum_f (g_s(s)_f - g_t(t)_f)^2 / F, with g_t as it stands (no gradient reaches it): [N]. See `TaskFilters`."""
    with torch.no_grad():
        target_NF = teacher_filter(full_precision(teacher_NE))
    return hidden_match(student_ND, target_NF, student_filter)


class TaskFilters(nn.Module):
    """A linear filter per pair of layers for the student and one for the teacher; the teacher's is frozen.

    Stage I of TED learns each filter on the task with its own model frozen; that is the caller's affair (unfreeze with
    `filters.teacher.requires_grad_()`). Stage II adds this loss. As made, without stage I, a filter is an identity or
    has orthonormal rows or columns. `hidden_match` without a projection is the case of two identities.

    Differs from the authors' code: their filters have a bias, and can have a hidden layer.
    Source: Liang et al., arXiv:2210.01351 (TED).
    """

    def __init__(
        self, pairs: Sequence[Pair], student_width: int, teacher_width: int, width: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        width = teacher_width if width is None else width
        self.student = projections(pairs, student_width, width, "learned", seed)
        self.teacher = projections(pairs, teacher_width, width, "learned", seed).requires_grad_(False)

    def forward(self, pair: Pair, student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
        return filtered_match(student_ND, teacher_NE, self.student[pair_name(pair)], self.teacher[pair_name(pair)])


# Attention and relations


def attention_match(student: Attention, teacher: Attention, row_N: Tensor, position_N: Tensor) -> Tensor:
    """sum over heads and visible keys of (score_s - score_t)^2 / (heads x visible keys), score = q k / sqrt(A): [N].

    The scores stand before the softmax, as in the paper. So a score shifted by the same amount for all keys of a query
    costs, although attention does not notice it; `attention_kl` is the loss that is blind to it. Key heads that several
    query heads share are repeated. Future keys are left out (the paper's models are bidirectional).

    Raises:
        UserError: different numbers of query heads.
    Source: Jiao et al., arXiv:1909.10351 (TinyBERT).
    """
    heads = _same_heads(student, teacher)

    def of_row(row: int, position_Q: Tensor) -> Tensor:
        student_HQS = _scores(student[0][row], student[1][row], position_Q)
        teacher_HQS = _scores(teacher[0][row].detach(), teacher[1][row].detach(), position_Q)
        future_QS = _future(position_Q, student_HQS.shape[-1])
        total_Q = (student_HQS - teacher_HQS).square().masked_fill(future_QS, 0).sum((0, 2))
        return total_Q / (heads * (position_Q + 1))

    return _row_by_row(row_N, position_N, of_row)


def attention_kl(student: Attention, teacher: Attention, row_N: Tensor, position_N: Tensor) -> Tensor:
    """sum over heads of KL(a_t || a_s) / heads, a = softmax over the visible keys of q k / sqrt(A): [N], in nats.

    Limits: 0 iff every head attends alike; 0 at position 0, which sees one key.

    Raises:
        UserError: different numbers of query heads.
    Source: Wang et al., arXiv:2002.10957 (MiniLM), there on the last layer only.
    """
    _same_heads(student, teacher)
    return _attention_divergence(student[:2], teacher[:2], row_N, position_N)


def value_relation(student: Attention, teacher: Attention, row_N: Tensor, position_N: Tensor) -> Tensor:
    """`attention_kl` with the values in the place of queries and keys, head by head: softmax(v v / sqrt(A)): [N], in
    nats.

    Where key-value heads are fewer than query heads, a value head counts once for each query head that uses it.

    Raises:
        UserError: different numbers of query heads.
    Source: Wang et al., arXiv:2002.10957 (MiniLM).
    """
    _same_heads(student, teacher)
    heads = math.lcm(student[2].shape[1], teacher[2].shape[1])
    ours, theirs = (value.repeat_interleave(heads // value.shape[1], dim=1) for value in (student[2], teacher[2]))
    return _attention_divergence((ours, ours), (theirs, theirs), row_N, position_N)


def relations(
    student_BHTA: Tensor, teacher_BHTA: Tensor, relation_heads: int, row_N: Tensor, position_N: Tensor
) -> Tensor:
    """sum_r KL(relation_t || relation_s) / R, relation = softmax over j <= i of x_i x_j / sqrt(W): [N], in nats.

    The heads of x (queries, or keys, or values) are joined to one vector per position and cut anew into R relation
    heads of width W, so the models may differ in heads and widths; keys and values have the width of their own heads.
    Limits: unchanged by a rotation inside each relation head, in either model; 0 at position 0.

    Raises:
        UserError: a number of relation heads that does not divide both widths.
    Source: Wang et al., arXiv:2012.15828 (MiniLMv2), there for queries, keys and values, without a causal mask.
    """
    width = math.gcd(*(x.shape[1] * x.shape[3] for x in (student_BHTA, teacher_BHTA)))
    if relation_heads < 1 or width % relation_heads:
        legal = [r for r in range(1, width + 1) if width % r == 0]
        raise UserError(
            f"{relation_heads} relation heads do not divide the widths of student and teacher; legal: {legal}"
        )
    ours, theirs = (_cut_anew(x, relation_heads) for x in (student_BHTA, teacher_BHTA))
    return _attention_divergence((ours, ours), (theirs, theirs), row_N, position_N)


def _cut_anew(x_BHTA: Tensor, heads: int) -> Tensor:
    rows, _, positions, _ = x_BHTA.shape
    return x_BHTA.transpose(1, 2).reshape(rows, positions, heads, -1).transpose(1, 2)


def _same_heads(student: Attention, teacher: Attention) -> int:
    ours = student[0].shape[1]
    theirs = teacher[0].shape[1]
    if ours != theirs:
        raise UserError(f"the student has {ours} attention heads in this layer, the teacher {theirs}; {USE_RELATIONS}")
    return ours


def _attention_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], row_N: Tensor, position_N: Tensor
) -> Tensor:
    """KL between causal softmaxes of (query, key), teacher first, summed over heads and divided by their number:
    [N]."""
    heads = student[0].shape[1]

    def of_row(row: int, position_Q: Tensor) -> Tensor:
        log_q_HQS = _log_attention(student[0][row], student[1][row], position_Q)
        log_p_HQS = _log_attention(teacher[0][row].detach(), teacher[1][row].detach(), position_Q)
        return kl_div(log_q_HQS, log_p_HQS, reduction="none", log_target=True).sum((0, 2)) / heads

    return _row_by_row(row_N, position_N, of_row)


def _log_attention(query_HTA: Tensor, key_GTA: Tensor, position_Q: Tensor) -> Tensor:
    """Log-probabilities [H, Q, S]. A future key gets a huge negative number, not -inf, so that 0 times it is 0."""
    scores_HQS = _scores(query_HTA, key_GTA, position_Q)
    future_QS = _future(position_Q, scores_HQS.shape[-1])
    return log_softmax(scores_HQS.masked_fill(future_QS, torch.finfo(scores_HQS.dtype).min / 2), dim=-1)


def _scores(query_HTA: Tensor, key_GTA: Tensor, position_Q: Tensor) -> Tensor:
    """q k / sqrt(A), [H, Q, S]: the queries asked for, the keys up to the last of them."""
    query_HQA = full_precision(query_HTA[:, position_Q]) / math.sqrt(query_HTA.shape[-1])
    key_GSA = full_precision(key_GTA[:, : int(position_Q.max()) + 1])
    key_HSA = key_GSA.repeat_interleave(len(query_HQA) // len(key_GSA), dim=0)
    return query_HQA @ key_HSA.transpose(1, 2)


def _future(position_Q: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=position_Q.device) > position_Q[:, None]


def _row_by_row(row_N: Tensor, position_N: Tensor, of_row: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`of_row(row, position_Q) -> [Q]` for every row that has positions, in the order of `row_N`.

    One row at a time keeps the scores at H x Q x S numbers.
    """
    values = [torch.zeros(0, device=row_N.device)]
    places = [torch.zeros_like(row_N[:0])]
    for row in row_N.unique().tolist():
        place_Q = (row_N == row).nonzero().squeeze(1)
        values.append(of_row(row, position_N[place_Q]))
        places.append(place_Q)
    return torch.cat(values)[torch.cat(places).argsort()]


def pooled(layers: Sequence[Tensor], row_N: Tensor, position_N: Tensor) -> Tensor:
    """Per row the sum of its response positions' states over their number, layers side by side: [B, sum of widths].

    A row without response positions is all zero.
    """
    states_NW = torch.cat([full_precision(hidden_BTD[row_N, position_N]) for hidden_BTD in layers], dim=-1)
    of_row_BN = (torch.arange(layers[0].shape[0], device=row_N.device)[:, None] == row_N).to(states_NW.dtype)
    return (of_row_BN @ states_NW) / of_row_BN.sum(1, keepdim=True).clamp_min(1)


class Contrast(nn.Module):
    """-log [ e^(s t / tau) / (e^(s t / tau) + sum_k e^(s n_k / tau)) ] per row; s, t, n_k projected to P, of length 1.

    s is the student's pooled state, t the teacher's of the same row, n_k the teacher's of other rows. Both projections
    learn. Limits: near log(K + 1) by chance (above it by up to 1 / (2 P tau^2) for random directions), and at least
    log(1 + K e^(-2 / tau)).

    Differs from the paper, which (like CRD, arXiv:1910.10699) uses noise-contrastive estimation: K + 1 yes-or-no
    questions with a fixed normaliser, here one softmax (InfoNCE, arXiv:1807.03748). Its authors' code also asks from
    the teacher's side over a bank of student states, and keeps banks of projected states with momentum; here the bank
    holds unprojected teacher states, which never grow stale.
    Source: Sun et al., arXiv:2009.14167 (CoDIR).
    """

    def __init__(
        self, student_width: int, teacher_width: int, dim: int = 128, temperature: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature} of contrast must be above 0; 0.1 is usual")
        noise = torch.Generator().manual_seed(seed)
        self.student, self.teacher = (_linear(width, dim, noise) for width in (student_width, teacher_width))
        self.temperature = temperature

    def forward(
        self, student_BD: Tensor, teacher_BE: Tensor, bank_ME: Tensor, negatives_BK: Tensor | None = None
    ) -> Tensor:
        """Values [B]. `negatives_BK` are rows of the bank; without them all M are used, so none may be a row of the
        batch."""
        if not len(bank_ME):
            raise UserError("contrast needs at least one negative; fill the bank with teacher states first")
        student_BP = normalize(self.student(full_precision(student_BD)), dim=-1)
        teacher_BP = normalize(self.teacher(full_precision(teacher_BE.detach())), dim=-1)
        drawn = bank_ME[None] if negatives_BK is None else bank_ME[negatives_BK]  # [1 or B, K, E]
        drawn_BKP = normalize(self.teacher(full_precision(drawn.detach())), dim=-1)
        match_B1 = (student_BP * teacher_BP).sum(-1, keepdim=True) / self.temperature
        others_BK = (drawn_BKP * student_BP[:, None]).sum(-1) / self.temperature
        return -log_softmax(torch.cat([match_B1, others_BK], dim=1), dim=1)[:, 0]


def draw_negatives(own_B: Tensor, bank: int, count: int, noise: torch.Generator) -> Tensor:
    """[B, count] rows of a bank, uniform with replacement over all but the row's own place `own_B`."""
    if bank < 2:
        raise UserError(f"a bank of {bank} rows holds no negatives; contrast needs at least 2 samples")
    steps_BK = torch.randint(1, bank, (len(own_B), count), generator=noise)
    return (own_B[:, None] + steps_BK.to(own_B.device)) % bank


def cka_distance(student_ND: Tensor, teacher_NE: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """1 - |X'Y|^2 / (|X'X| |Y'Y|) per row, X and Y its states centred over its response positions: [B].

    Limits: in [0, 1]; unchanged by rotations and by scaling of either side, for any two widths. Always 0 for 2
    positions, and biased towards 0 where positions are fewer than widths. Exactly 0 (with a gradient of 0) below 2
    positions; 1 where one side's states are all the same.
    Source: Kornblith et al., arXiv:1905.00414 (linear CKA, there a measure, not a loss).
    """
    student_ND, teacher_NE = full_precision(student_ND), full_precision(teacher_NE.detach())
    return torch.stack([_cka_distance(student_ND[row_N == row], teacher_NE[row_N == row]) for row in range(rows)])


def _cka_distance(student_QD: Tensor, teacher_QE: Tensor) -> Tensor:
    if len(student_QD) < 2:
        return student_QD.sum() * 0
    ours_QQ = _centred_gram(student_QD)
    theirs_QQ = _centred_gram(teacher_QE)
    scale = (ours_QQ.square().sum() * theirs_QQ.square().sum()).clamp_min(torch.finfo(ours_QQ.dtype).eps ** 4).sqrt()
    return 1 - (ours_QQ * theirs_QQ).sum() / scale


def _centred_gram(states_QD: Tensor) -> Tensor:
    """X X' of the centred states, brought to length 1 first so that small states keep their digits."""
    centred_QD = states_QD - states_QD.sum(0) / len(states_QD)
    unit_QD = normalize(centred_QD.flatten(), dim=0, eps=torch.finfo(states_QD.dtype).tiny).view_as(states_QD)
    return unit_QD @ unit_QD.T


# Which layers, and through what


def layer_map(
    spec: object, student_layers: int, teacher_layers: int, embeddings: bool = False, path: str = ""
) -> tuple[Pair, ...]:
    """Pairs (student layer, teacher layer), counted from 1; 0 is the embeddings.

    Args:
        spec: `uniform` (student i to teacher i M / N, halves up, at least 1), `last`, or pairs such as [[4, 8], [8,
            16]].
        embeddings: adds (0, 0) to a named map, and lets explicit pairs name 0.

    Raises:
        RecipeError: an unknown name, or pairs that are malformed, doubled or outside the models.
    Source: `uniform` is TinyBERT's map, arXiv:1909.10351, for any ratio; `last` MiniLM's, arXiv:2002.10957.
    """
    n = student_layers
    m = teacher_layers
    if isinstance(spec, str):
        if spec not in LAYER_MAPS:
            raise RecipeError(
                path, f"no layer map is named {spec!r}{nearest(spec, LAYER_MAPS)}; or give pairs [student, teacher]"
            )
        uniform = tuple((i, max(1, (2 * i * m + n) // (2 * n))) for i in range(1, n + 1))
        pairs = uniform if spec == "uniform" else ((n, m),)
        return ((0, 0), *pairs) if embeddings else pairs
    if not isinstance(spec, Sequence) or not spec:
        raise RecipeError(path, f"{spec!r} is no layer map; give uniform, last, or pairs such as [[4, 8], [8, 16]]")
    lowest = 0 if embeddings else 1
    pairs = tuple(
        _checked_pair(pair, ((n, "student"), (m, "teacher")), lowest, f"{path}[{i}]") for i, pair in enumerate(spec)
    )
    if len(set(pairs)) < len(pairs):
        raise RecipeError(path, "a pair of layers stands there twice; name each once")
    return pairs


def _checked_pair(pair: object, models: Sequence[tuple[int, str]], lowest: int, path: str) -> Pair:
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(type(index) is not int for index in pair):
        raise RecipeError(path, f"{pair!r} is not a pair [student layer, teacher layer]")
    for index, (layers, side) in zip(pair, models, strict=True):
        if not lowest <= index <= layers:
            hint = "" if lowest == 0 else " (0, the embeddings, needs embeddings: true)"
            raise RecipeError(path, f"{side} layer {index} is outside {lowest} to {layers}{hint}")
    return (pair[0], pair[1])


def pair_name(pair: Pair) -> str:
    """The key of a pair in `projections`, such as `4-8`."""
    return f"{pair[0]}-{pair[1]}"


def projections(
    pairs: Sequence[Pair], student_width: int, teacher_width: int, kind: str, seed: int = 0
) -> nn.ModuleDict:
    """One map from the student's width to the teacher's per pair, under `pair_name(pair)`, in fp32.

    `learned`: linear without bias; it starts as the identity where the widths agree, else with orthonormal rows or
    columns drawn from `seed` (torch's own random state is left alone). `none`: the states as they are.

    Raises:
        UserError: `none` between different widths, or an unknown kind.
    """
    if kind not in PROJECTIONS:
        raise UserError(f"no projection is named {kind!r}{nearest(kind, PROJECTIONS)}")
    if kind == "none" and student_width != teacher_width:
        raise UserError(
            f"the student's width {student_width} is not the teacher's {teacher_width}; set projection: learned"
        )
    noise = torch.Generator().manual_seed(seed)
    learned = kind == "learned"
    return nn.ModuleDict(
        {pair_name(pair): _linear(student_width, teacher_width, noise) if learned else nn.Identity() for pair in pairs}
    )


def _linear(inputs: int, outputs: int, noise: torch.Generator) -> nn.Linear:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    if inputs == outputs:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, generator=noise)
    return linear
