"""Losses on attention and on relations between positions.

A loss function gives one value per response position (`row_N`, `position_N`: the states that predict a response token).
Rows are padded on the right and attention is causal: the query at position i sees the keys 0..i of its own row. Teacher
tensors are detached here; everything is computed in fp32 (fp64 stays).

Not covered: attention windows narrower than the row (every key up to i counts), and models with different tokenizers.

Shapes: B rows, T positions, N response positions, Q those of one row, S keys that its last query sees, H query heads, G
key-value heads, A head width, R relation heads, W their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import BoundLoss, ModelSizes
from limbeck.objectives.forward import Attention, Features, Positions
from limbeck.objectives.layers import Pair, mean_over_pairs
from limbeck.objectives.parameters import Anything, Number, Range, Setting, Words
from limbeck.objectives.precision import full_precision
from limbeck.types import RecipeError, UserError

PARTS = ("query", "key", "value")
AttentionLoss = Callable[[Attention, Attention, Tensor, Tensor], Tensor]
USE_RELATIONS = "use the relations loss, which compares any two numbers of heads"


def attention_match(student: Attention, teacher: Attention, row_N: Tensor, position_N: Tensor) -> Tensor:
    """sum over heads and visible keys of (score_s - score_t)^2 / (heads x visible keys), score = q k / sqrt(A): [N].

    The scores are those before the softmax, as in the paper. So shifting all scores of a query by the same amount is
    penalised, although it does not change the attention; `attention_kl` ignores such a shift. Key heads that several
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
    """`attention_kl` with values in place of queries and keys, head by head: softmax(v v / sqrt(A)): [N], in nats.

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

    The heads of x (queries, keys or values) are joined to one vector per position and split again into R relation
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
    ours, theirs = (_split_again(x, relation_heads) for x in (student_BHTA, teacher_BHTA))
    return _attention_divergence((ours, ours), (theirs, theirs), row_N, position_N)


def _split_again(x_BHTA: Tensor, heads: int) -> Tensor:
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
    """[N] KL between causal softmaxes of (query, key), teacher first, summed over heads and divided by their number."""
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
    """q k / sqrt(A), [H, Q, S]: the queries at these positions, and the keys up to the last of them."""
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


@register_bound("attention_match", "(score_q - score_p)^2 over heads and visible keys", "TinyBERT, arXiv:1909.10351")
class AttentionMatch(BoundLoss):
    """`attention_match` over pairs of layers."""

    settings: ClassVar[Mapping[str, Setting]] = {"layers": Anything("uniform")}
    tapped = "attention"
    same_heads = True

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        return _over_pairs(self.pairs, attention_match, student, teacher, at=positions)


@register_bound("attention_kl", "KL(attention_p || attention_q) over heads", "MiniLM, arXiv:2002.10957")
class AttentionKl(BoundLoss):
    """`attention_kl` over pairs of layers."""

    settings: ClassVar[Mapping[str, Setting]] = {"layers": Anything("last")}
    tapped = "attention"
    same_heads = True

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        return _over_pairs(self.pairs, attention_kl, student, teacher, at=positions)


@register_bound("value_relation", "KL(softmax(v v)_p || softmax(v v)_q) over heads", "MiniLM, arXiv:2002.10957")
class ValueRelation(BoundLoss):
    """`value_relation` over pairs of layers."""

    settings: ClassVar[Mapping[str, Setting]] = {"layers": Anything("last")}
    tapped = "attention"
    same_heads = True

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        return _over_pairs(self.pairs, value_relation, student, teacher, at=positions)


def _over_pairs(
    pairs: Sequence[Pair], fn: AttentionLoss, student: Features, teacher: Features, *, at: Positions
) -> Tensor:
    return mean_over_pairs(
        [fn(student.attention[pair[0]], teacher.attention[pair[1]], at.row_N, at.position_N) for pair in pairs]
    )


@register_bound(
    "relations",
    "KL of softmax(x x) for queries, keys and values, cut into relation heads",
    "MiniLMv2, arXiv:2012.15828",
)
class Relations(BoundLoss):
    """`relations` over pairs of layers, averaged over queries, keys and values (`of`)."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "layers": Anything("last"),
        "relation_heads": Number(1, Range(1, 4096)),
        "of": Words(PARTS),
    }
    tapped = "attention"

    @classmethod
    def check_sizes(cls, values: Mapping[str, Any], student: ModelSizes, teacher: ModelSizes, path: str) -> None:
        super().check_sizes(values, student, teacher, path)
        heads = values["relation_heads"]
        widths = [
            model.query_width if part == "query" else model.key_value_width
            for model in (student, teacher)
            for part in values["of"]
        ]
        if wrong := [width for width in widths if width % heads]:
            raise RecipeError(
                f"{path}.relation_heads", f"{heads} does not divide {wrong[0]}; take a divisor of {math.gcd(*widths)}"
            )

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        return _over_pairs(self.pairs, self._of_layer, student, teacher, at=positions)

    def _of_layer(self, student: Attention, teacher: Attention, row_N: Tensor, position_N: Tensor) -> Tensor:
        heads = self.values["relation_heads"]
        parts = [PARTS.index(part) for part in self.values["of"]]
        return mean_over_pairs(
            [relations(student[part], teacher[part], heads, row_N=row_N, position_N=position_N) for part in parts]
        )
