"""Consistency: where answers to one prompt end alike, their endings should be predicted alike, whatever precedes them.

Chen et al., arXiv:2310.14747 (MCC-KD) add to cross-entropy on several rationales the Kullback-Leibler divergence
between the predictions of the answer after two of them. Here the answer is the common end of two responses, token for
token, so it needs no marking. Both directions count (recalled, not confirmed), for every pair of a group's responses.

Shapes: N response positions, G groups, S tokens of a common end, U positions in some common end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.head import Head, chunk_elements, project
from limbeck.objectives.loss import Loss, LossAtStep, LossSettings
from limbeck.objectives.parameters import Range, defaults_of
from limbeck.objectives.precision import full_precision
from limbeck.objectives.registry import register
from limbeck.types import Batch, RecipeError

LONGEST = 16  # tokens of a common end that are compared
Ends = Sequence[Sequence[tuple[range, range]]]


def common_ends(batch: Batch) -> Ends:
    """For every group, and every pair of its responses that end alike: the common end in both, as indices of the N
    response positions."""
    responses = [batch.tokens_BT[row][mask].tolist() for row, mask in enumerate(batch.mask_BT)]
    ends = torch.tensor([len(response) for response in responses]).cumsum(0).tolist()
    groups = []
    for group in batch.groups:
        pairs = []
        for one, other in combinations(group, 2):
            same = zip(reversed(responses[one][-LONGEST:]), reversed(responses[other][-LONGEST:]), strict=False)
            size = next(
                (number for number, (a, b) in enumerate(same) if a != b),
                min(len(responses[one]), len(responses[other]), LONGEST),
            )
            if size:
                pairs.append((range(ends[one] - size, ends[one]), range(ends[other] - size, ends[other])))
        groups.append(pairs)
    return groups


def consistency(hidden_ND: Tensor, head: Head, ends: Ends, *, temperature: float = 1.0) -> Tensor:
    """How differently each group's responses predict their common ends: nats [G], differentiable, in fp32 or better.

    0 for a group without a pair. Logits are held for the groups of one chunk at a time, and computed again in the
    backward pass.

    Args:
        hidden_ND: the student's hidden states at the response positions.
        ends: see `common_ends`.
    """
    values = []
    for chunk in _chunks(ends, max(1, chunk_elements(hidden_ND.device) // head.vocab_size)):
        part_G = checkpoint(
            _values, hidden_ND, head, chunk, temperature=temperature, use_reentrant=False, preserve_rng_state=False
        )
        values.append(part_G)
    return torch.cat(values)


def _chunks(ends: Ends, most: int) -> Iterator[Ends]:
    """Consecutive groups with at most so many positions together, but one group at least."""
    chunk: list[Sequence[tuple[range, range]]] = []
    positions = 0
    for pairs in ends:
        size = len(_places([pairs]))
        if chunk and positions + size > most:
            yield chunk
            chunk, positions = [], 0
        chunk.append(pairs)
        positions += size
    yield chunk


def _places(ends: Ends) -> list[int]:
    """The positions that are in some common end."""
    return sorted({place for pairs in ends for pair in pairs for part in pair for place in part})


def _values(hidden_ND: Tensor, head: Head, ends: Ends, *, temperature: float) -> Tensor:
    """`consistency` of the groups of one chunk."""
    places = _places(ends)
    if not places:
        return full_precision((hidden_ND * 0).sum()).expand(len(ends))
    logits_UV = project(head.products(hidden_ND[torch.tensor(places, device=hidden_ND.device)]), None)
    if head.softcap is not None:  # not in place as in the chunked head: here the gradient flows through it
        logits_UV = head.softcap * torch.tanh(logits_UV / head.softcap)
    log_UV = (logits_UV / temperature).log_softmax(-1)
    row = {place: number for number, place in enumerate(places)}
    values = []
    for pairs in ends:
        apart = [_apart(*(log_UV[[row[place] for place in part]] for part in pair)) for pair in pairs]
        values.append(torch.stack(apart).sum() / len(apart) if apart else log_UV.new_zeros(()))
    return torch.stack(values)


def _apart(one_SV: Tensor, other_SV: Tensor) -> Tensor:
    """(KL(q_i || q_j) + KL(q_j || q_i)) / 2, the mean over the tokens."""
    return 0.5 * ((one_SV.exp() - other_SV.exp()) * (one_SV - other_SV)).sum() / len(one_SV)


@dataclass(frozen=True, kw_only=True)
class Consistency(Loss):
    """`consistency` of the answers to each prompt."""

    unlimited: ClassVar[str] = "compares all answers to a prompt, so it can't be limited to one kind"

    @property
    def defaults(self) -> Mapping[str, float]:
        return defaults_of(consistency)

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        if not facts.several_answers:
            raise RecipeError(
                settings.path,
                f"{self.name} compares answers to one prompt, and here every prompt has one: elicit several of them",
            )

    def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
        ends = common_ends(data.batch)
        values_G = consistency(data.hidden_ND, data.head, ends, temperature=at_step.params["temperature"])
        total = (values_G * data.batch.group_weights().to(values_G)).sum()
        return TermSum(at_step.scale * total, float(total.detach()))


register(
    Consistency(
        name="consistency",
        formula="mean over pairs and their common last tokens of (KL(q_i || q_j) + KL(q_j || q_i)) / 2",
        paper="Chen et al., arXiv:2310.14747",
        reads=frozenset({"answers"}),
        unit="group",
        ranges={"temperature": Range(0, float("inf"), open_low=True, open_high=True)},
    )
)
