"""The forms in which a cache can hold a teacher's distributions, one class for each.

A new form is a section of `CacheSettings` (config/teacher.py) and a class here, listed in FORMS: its name in the
recipe, what it can be filled from, what it packs and unpacks, and which divergences it supports. From outside the
package, `register_form` adds both.

Shapes: N response positions, E width of the teacher, V vocabulary, C positions of a chunk, K tokens of a position, S
draws, M ids of all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from limbeck.config.section import Section
from limbeck.config.teacher import MORE_FORMS, CachedHidden, CachedSamples, CachedTop, CacheSettings
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence import Divergence
from limbeck.objectives.head import Head, TeacherSignal, TopTokens, chunk_elements, chunks
from limbeck.signals.dense import DenseSignal
from limbeck.signals.pack import id_bits, pack_bits, unpack_bits
from limbeck.signals.sparse import Sampled, TopK

# a text's tensors by name: numbers per position, per token, or (`ids`) packed bits; one-dimensional except `hidden`.
# All have `target` [N], log p of the written tokens, which shows rows that have moved.
Packed = dict[str, Tensor]
LEVELS = {8: torch.uint8, 16: torch.uint16}
LEAST = -1000.0  # what servers say of an impossible token (-9999, -inf) would take all levels of its position
MIN_REST = 1e-6  # least probability of the bucket beside a server's tokens, whose numbers are rounded


class KeptForm(Protocol):
    """One form of a cache, made from its section of `teacher.cache`.

    `name` is that section's key. `keeps_head` tells whether the cache also stores the teacher's head, once.
    """

    name: ClassVar[str]
    keeps_head: ClassVar[bool] = False

    @property
    def server_tokens(self) -> int | None:
        """How many of its likeliest tokens a server must name to fill it; None where it needs the teacher's weights."""
        return None

    def refusal(self, divergence: Divergence, softened: bool) -> str | None:
        """Why a divergence (`softened`: at another temperature than 1) can't be computed from it; None where it can."""
        return None

    def disk_bytes(self, tokens: int, width: int, head_parameters: int) -> float:
        """The most that it takes for so many response tokens of a teacher with such a head."""

    def pack(self, signal: TeacherSignal, targets_N: Tensor, seed: int, vocab_size: int) -> Packed:
        """One text's tensors.

        Args:
            seed: for random draws; one text has the same draws wherever it is packed.

        Raises:
            UserError: the signal does not hold what this form stores.
        """

    def unpack(self, texts: Sequence[Mapping[str, Tensor]], vocab_size: int, head: Head | None) -> TeacherSignal:
        """The signal of several texts' positions, one text after the other."""


AnyForm = TypeVar("AnyForm", bound=KeptForm)


@dataclass(frozen=True)
class HiddenForm(KeptForm):
    """The last hidden states, and the head once: the whole distribution."""

    name: ClassVar[str] = "hidden"
    keeps_head: ClassVar[bool] = True

    settings: CachedHidden

    def disk_bytes(self, tokens: int, width: int, head_parameters: int) -> float:
        return (2.0 if self.settings.dtype == "bfloat16" else 4.0) * width * tokens + 4.0 * head_parameters

    def pack(self, signal: TeacherSignal, targets_N: Tensor, seed: int, vocab_size: int) -> Packed:
        hidden_NE, _ = signal.hidden_states()
        targets = [
            p.log.gather(-1, targets_N[part, None])[:, 0].half().cpu()
            for part, p in _distributions(signal, len(targets_N), vocab_size)
        ]
        dtype = getattr(torch, self.settings.dtype)
        return {"hidden": hidden_NE.to("cpu", dtype).contiguous(), "target": torch.cat(targets)}

    def unpack(self, texts: Sequence[Mapping[str, Tensor]], vocab_size: int, head: Head | None) -> DenseSignal:
        assert head is not None, "a form that keeps the head gets it back"
        weight_VE = head.weight_VD
        hidden_NE = torch.cat([text["hidden"] for text in texts])
        return DenseSignal(hidden_NE.to(weight_VE.device, weight_VE.dtype), head)


@dataclass(frozen=True)
class TopKForm(KeptForm):
    """The likeliest tokens, and the probability of all others in one number."""

    name: ClassVar[str] = "top_k"

    settings: CachedTop

    @property
    def server_tokens(self) -> int:
        return self.settings.k

    def refusal(self, divergence: Divergence, softened: bool) -> str | None:
        if divergence.buckets and not softened:
            return None
        return (
            f"{divergence.name} (or its temperature) needs whole distributions, and top tokens are not: keep"
            " {hidden: {}}"
        )

    def disk_bytes(self, tokens: int, width: int, head_parameters: int) -> float:
        return (self.settings.k * (_id_bits(width, head_parameters) + self.settings.bits) / 8 + 8) * tokens

    def pack(self, signal: TeacherSignal, targets_N: Tensor, seed: int, vocab_size: int) -> Packed:
        if signal.whole:
            return _pack_whole(signal, targets_N, vocab_size, columns=self._likeliest)
        return _with_packed_ids(self._named(signal.to("cpu").top_tokens(), targets_N.cpu()), vocab_size)

    def _likeliest(self, p: Distribution) -> Packed:
        log_CK, ids_CK = p.log.topk(min(self.settings.k, p.log.shape[-1]))
        count_C, chosen_CK = self._enough(log_CK)
        others_CV = p.log.scatter(-1, torch.where(chosen_CK, ids_CK, ids_CK[:, :1]), -math.inf)
        log_rest_C = others_CV.logsumexp(-1)  # -inf where all tokens are chosen
        return self._levels(TopTokens(ids_CK, log_CK, count_C), chosen_CK, log_rest_C)

    def _named(self, named: TopTokens, targets_N: Tensor) -> Packed:
        """A server's tokens, the likeliest first. The bucket gets what is left of 1; `target` is NaN where the written
        token is not named."""
        log_NK, order_NK = named.log_prob_NK.float().sort(-1, descending=True)
        count_N, chosen_NK = self._enough(log_NK)
        rest_N = 1 - log_NK.double().exp().masked_fill(~chosen_NK, 0).sum(-1)
        log_rest_N = rest_N.clamp_min(MIN_REST).log().float()
        chosen = TopTokens(named.ids_NK.gather(-1, order_NK), log_NK, count_N)
        return self._levels(chosen, chosen_NK, log_rest_N) | {"target": named.log_prob(targets_N).half()}

    def _enough(self, log_CK: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the tokens [C], the likeliest first, are kept, and which [C, K]: all that are possible, or as few
        as have the mass."""
        count_C = (log_CK > LEAST).sum(-1).clamp_min(1)
        if self.settings.mass is not None:
            count_C = ((log_CK.exp().cumsum(-1) < self.settings.mass).sum(-1) + 1).minimum(count_C)
        return count_C, torch.arange(log_CK.shape[-1], device=log_CK.device) < count_C[:, None]

    def _levels(self, tokens: TopTokens, chosen_CK: Tensor, log_rest_C: Tensor) -> Packed:
        """Log-probabilities as whole levels between 0 and the smallest of their position."""
        ids_CK, log_CK, count_C = tokens.ids_NK, tokens.log_prob_NK.clamp_min(LEAST), tokens.count_N
        # a little below the smallest, so that no value exceeds the last level
        lowest_C1 = log_CK.gather(-1, count_C[:, None] - 1).mul(1 + 2**-10).half()
        last = 2**self.settings.bits - 1
        level_CK = (log_CK / lowest_C1.float().clamp_max(-1e-6) * last).round().clamp(0, last)
        return {
            "count": count_C.to(torch.uint16),
            "ids": ids_CK[chosen_CK],
            "level": level_CK[chosen_CK].to(torch.int32).to(LEVELS[self.settings.bits]),
            "lowest": lowest_C1[:, 0],
            "rest": log_rest_C.half(),
        }

    def unpack(self, texts: Sequence[Mapping[str, Tensor]], vocab_size: int, head: Head | None) -> TopK:
        columns = _joined_columns(texts)
        ids_NK, used_NK, count_N = _unpack_ids(texts, columns["count"], vocab_size)
        lowest_N = columns["lowest"].float().clamp_max(-1e-6)
        level_NK = torch.zeros(used_NK.shape).masked_scatter_(used_NK, columns["level"].to(torch.int32).float())
        last = 2**self.settings.bits - 1
        log_NK = (level_NK / last * lowest_N[:, None]).masked_fill(~used_NK, -math.inf)
        log_rest_N = columns["rest"].float()
        total_N = torch.cat([log_NK, log_rest_N[:, None]], -1).logsumexp(-1)  # near 0; rounding moved it
        even = bool(used_NK.all())
        return TopK(
            ids_NK,
            log_NK - total_N[:, None],
            rest_N=(log_rest_N - total_N).exp(),
            count_N=None if even else count_N,
        )


@dataclass(frozen=True)
class SampledForm(KeptForm):
    """Tokens drawn from the distribution, with their weights, and its entropy."""

    name: ClassVar[str] = "sampled"

    settings: CachedSamples

    def refusal(self, divergence: Divergence, softened: bool) -> str | None:
        if divergence.sampled and not softened:
            return None
        return "sampled tokens carry forward_kl at temperature 1 alone: use it, or keep {hidden: {}}"

    def disk_bytes(self, tokens: int, width: int, head_parameters: int) -> float:
        return (self.settings.draws * (_id_bits(width, head_parameters) / 8 + 4) + 8) * tokens

    def pack(self, signal: TeacherSignal, targets_N: Tensor, seed: int, vocab_size: int) -> Packed:
        generator = torch.Generator().manual_seed(seed)
        return _pack_whole(signal, targets_N, vocab_size, columns=lambda p: self._draws(p, generator))

    def _draws(self, p: Distribution, generator: torch.Generator) -> Packed:
        """The tokens drawn, each once, with weight: its draws / all draws x p / proposal."""
        proposal = p.at(self.settings.temperature)
        counts = []
        ids = []
        weights = []
        log_ratio_CV = (p.log - proposal.log).cpu()
        draws = self.settings.draws
        drawn_CS = torch.multinomial(proposal.prob.cpu(), draws, replacement=True, generator=generator)
        for row, drawn_S in enumerate(drawn_CS):
            row_ids, times = drawn_S.unique(return_counts=True)
            counts.append(len(row_ids))
            ids.append(row_ids)
            weights.append(times / draws * log_ratio_CV[row, row_ids].exp())
        return {
            "count": torch.tensor(counts).to(torch.uint16),
            "ids": torch.cat(ids),
            "weight": torch.cat(weights).float(),
            "entropy": -(p.prob * p.log).sum(-1).half(),
        }

    def unpack(self, texts: Sequence[Mapping[str, Tensor]], vocab_size: int, head: Head | None) -> Sampled:
        columns = _joined_columns(texts)
        ids_NK, used_NK, _ = _unpack_ids(texts, columns["count"], vocab_size)
        weight_NK = torch.zeros(used_NK.shape).masked_scatter_(used_NK, columns["weight"])
        return Sampled(ids_NK, weight_NK, columns["entropy"].float())


FORMS: dict[str, Callable[[Any], KeptForm]] = {form.name: form for form in (HiddenForm, TopKForm, SampledForm)}


def register_form(section: type[Section]) -> Callable[[type[AnyForm]], type[AnyForm]]:
    """Make the decorated class a form that `teacher.cache` can name, with `section` as its settings."""

    def add(form: type[AnyForm]) -> type[AnyForm]:
        assert form.name not in FORMS, f"two forms are named {form.name}"
        FORMS[form.name] = form
        MORE_FORMS[form.name] = section
        return form

    return add


def form_of(settings: CacheSettings) -> KeptForm:
    """The form that a recipe's `teacher.cache` names."""
    name, section = settings.chosen
    return FORMS[name](section)


def _distributions(signal: TeacherSignal, positions: int, vocab_size: int) -> Iterator[tuple[slice, Distribution]]:
    """The signal's whole distributions, one chunk at a time."""
    for part in chunks(positions, vocab_size, chunk_elements(signal.device)):
        yield part, signal.chunk(part).rows(slice(0, part.stop - part.start)).p


def _pack_whole(
    signal: TeacherSignal, targets_N: Tensor, vocab_size: int, columns: Callable[[Distribution], Packed]
) -> Packed:
    """Pack whole distributions: `columns` gives the tensors of a chunk, with unpacked ids and without `target`."""
    parts = []
    for part, p in _distributions(signal, len(targets_N), vocab_size):
        target_C = p.log.gather(-1, targets_N[part, None])[:, 0].half()
        parts.append({name: column.cpu() for name, column in (columns(p) | {"target": target_C}).items()})
    return _with_packed_ids({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, vocab_size)


def _with_packed_ids(packed: Packed, vocab_size: int) -> Packed:
    return packed | {"ids": pack_bits(packed["ids"], id_bits(vocab_size))}


def _joined_columns(texts: Sequence[Mapping[str, Tensor]]) -> Packed:
    """Each tensor of all texts, one after the other; but ids, whose bits don't end at a byte."""
    return {name: torch.cat([text[name] for text in texts]) for name in texts[0] if name != "ids"}


def _unpack_ids(
    texts: Sequence[Mapping[str, Tensor]], count_N: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K], which of them are used [N, K], how many [N])."""
    count_N = count_N.to(torch.int64)
    bits = id_bits(vocab_size)
    amounts = [int(text["count"].to(torch.int64).sum()) for text in texts]
    ids_M = torch.cat([unpack_bits(text["ids"], bits, amount) for text, amount in zip(texts, amounts, strict=True)])
    used_NK = torch.arange(int(count_N.max())) < count_N[:, None]
    return torch.zeros(used_NK.shape, dtype=torch.int64).masked_scatter_(used_NK, ids_M), used_NK, count_N


def _id_bits(width: int, head_parameters: int) -> float:
    """About how many bits a token id takes, by the size of the head."""
    return math.log2(max(2, head_parameters // max(1, width)))
