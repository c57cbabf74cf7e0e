"""Feedback: a judge compares the answers to each prompt two by two, each pair in both orders (see `two_orders`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.fence import conversation_text
from limbeck.elicit.flow import (
    Pool,
    Questions,
    Reader,
    StepContext,
    Tally,
    ask,
    by_conversation,
    ending,
    prompt_messages,
    said_by,
    with_scores,
)
from limbeck.elicit.merit import answered_only, tell_own_answers
from limbeck.elicit.step import AskingStep, By, Estimate, TokenCount, register
from limbeck.elicit.two_orders import (
    AT_ONCE,
    PREFER,
    REASONED,
    VERDICT_ALONE,
    PairVerdict,
    Ruling,
    question,
    read_verdict,
    trust,
)
from limbeck.types import Message, Sample, Sampling

POINTS: dict[Ruling, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the first one
SEEN: dict[Ruling, str] = {"first": "won", "second": "lost", "tie": "tied"}  # by the first one; else as it is


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, by their places in the pool, and the judge's conversation in both orders."""

    first: int
    second: int
    forward: tuple[Message, ...]
    backward: tuple[Message, ...]


@dataclass(frozen=True)
class Comparisons:
    """Every two answers to a prompt, compared: the verdict on each pair, and the replies in both orders by the places
    of its answers, where it was asked about."""

    pairs: Sequence[Pair]
    verdicts: Sequence[PairVerdict]
    said: Mapping[tuple[int, int], Sequence[Sample]]


@register("compare")
class Compare(AskingStep):
    """The model `by` compares the answers to each prompt two by two, each pair in both orders; a verdict that changes
    with the order is a tie. `prefer` says by what; of several texts one is drawn for each pair. Each answer gets the
    score `wins`: its share of won comparisons among those that could be read, a tie counted half; without any it gets
    none. Of the judge it tells how often it kept its verdict when the answers were swapped, and how often it chose the
    one that stood first."""

    kind = "feedback"
    paper = "both orders: Zheng et al., arXiv:2306.05685"
    scores = frozenset({"wins"})
    by: By = TEACHER
    prefer: str | Annotated[list[str], Field(min_length=1)] = PREFER
    reasons: bool = True
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        tell_own_answers(samples, context.identity(self.by), tally)
        compared = yield from self.comparisons(samples, context, tally)
        judged = _judged(samples, compared.pairs, compared.verdicts, by=self.by)
        return _with_parents(judged, compared.said)

    def comparisons(self, samples: Pool, context: StepContext, tally: Tally) -> Questions[Comparisons]:
        """Compare every two answers to a prompt in both orders, and tell how far the judge can be trusted."""
        reader = context.reader(self.by)
        pairs = self._pairs(samples, context, reader)
        fit = [pair for pair in pairs if self._fits(pair, reader)]
        form = None if self.reasons or reader.unheld(VERDICT_ALONE) else VERDICT_ALONE
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        replies = yield from ask(
            [
                context.request(messages, sampling, form=form, by=self.by)
                for pair in fit
                for messages in (pair.forward, pair.backward)
            ]
        )
        said = {(pair.first, pair.second): both for pair, *both in zip(fit, replies[0::2], replies[1::2], strict=True)}
        verdicts = [_verdict(pair, samples, said.get((pair.first, pair.second))) for pair in pairs]
        account(verdicts, tally)
        return Comparisons(pairs, verdicts, said)

    def _pairs(self, samples: Pool, context: StepContext, reader: Reader) -> list[Pair]:
        places = {id(sample): place for place, sample in enumerate(samples)}
        pairs = []
        for group in by_conversation(samples):
            prompt = conversation_text(prompt_messages(group[0]))
            rng = context.rng("prefer", group[0].id)
            for one, other in combinations(group, 2):
                prefer = self.prefer if isinstance(self.prefer, str) else rng.choice(self.prefer)
                forward, backward = (
                    question(
                        prompt,
                        said_by(a),
                        said_by(b),
                        reader.control,
                        prefer=prefer,
                        ending=REASONED if self.reasons else AT_ONCE,
                    )
                    for a, b in ((one, other), (other, one))
                )
                pairs.append(Pair(places[id(one)], places[id(other)], forward, backward))
        return pairs

    def _fits(self, pair: Pair, reader: Reader) -> bool:
        return all(reader.fits(messages, self.max_tokens) for messages in (pair.forward, pair.backward))

    def estimate(self, samples: int) -> Estimate:
        return self.estimate_of(samples, max(1, samples // 2))

    def estimate_of(self, samples: int, prompts: int) -> Estimate:
        each = samples / max(1, prompts)
        return replace(Estimate.of_answers(round(samples * max(0.0, each - 1)), self.max_tokens), samples=samples)

    def answer_tokens(self) -> float | None:
        return None

    def writes(self) -> frozenset[str]:
        return frozenset({"compared", "compared_by"})


def _verdict(pair: Pair, samples: Pool, replies: Sequence[Sample] | None) -> PairVerdict:
    """What the two replies to a pair say; without replies the pair was too long to be asked."""
    forward: Ruling = "too_long"
    backward: Ruling = "too_long"
    if replies is not None:
        forward, backward = _ruling(replies[0], "ab"), _ruling(replies[1], "ba")
    first, second = samples[pair.first], samples[pair.second]
    return PairVerdict(
        str(first.meta.get("prompt_id", "")),
        forward,
        backward,
        first_length=len(said_by(first)),
        second_length=len(said_by(second)),
        replies=("", "") if replies is None else (said_by(replies[0]), said_by(replies[1])),
    )


def _ruling(reply: Sample, order: Literal["ab", "ba"]) -> Ruling:
    """What a reply says; nothing can be read of one that was cut off, refused, or failed."""
    return read_verdict(said_by(reply), order) if ending(reply) == "ok" else "unparsable"


def _with_parents(judged: Pool, said: Mapping[tuple[int, int], Sequence[Sample]]) -> Pool:
    """The samples, each made also from the replies about it."""
    replies: dict[int, list[str]] = {}
    for places, both in said.items():
        for place in places:
            replies.setdefault(place, []).extend(reply.id for reply in both)
    return [
        replace(sample, parents=tuple(dict.fromkeys((*sample.parents, *replies.get(place, ())))))
        for place, sample in enumerate(judged)
    ]


def account(verdicts: Sequence[PairVerdict], tally: Tally) -> None:
    """Tell how the pairs ended, and how far the judge can be trusted."""
    found = trust(verdicts)
    outcomes = found.pop("outcomes")
    tally.facts["pairs"] = len(verdicts)
    tally.facts |= {
        name: count for name, count in outcomes.items() if count and name in ("tie", "unparsable", "too_long")
    }
    tally.facts |= {name: value for name, value in found.items() if value is not None}
    if verdicts and not any(verdict.parsed for verdict in verdicts):
        tally.notes.append(
            f"no verdict on {len(verdicts):,} pairs could be read: this model can't judge so; see store.sqlite"
        )


def _judged(samples: Pool, pairs: Sequence[Pair], verdicts: Sequence[PairVerdict], *, by: str) -> Pool:
    """The samples with what each comparison said of them, and their share of wins."""
    points: dict[int, list[float]] = {}
    compared: dict[int, list[dict[str, str]]] = {}
    for pair, verdict in zip(pairs, verdicts, strict=True):
        sides: tuple[tuple[int, int, Ruling], ...] = (
            (pair.first, pair.second, verdict.outcome),
            (pair.second, pair.first, _swapped(verdict.outcome)),
        )
        for place, other, outcome in sides:
            seen = SEEN.get(outcome, outcome.replace("_", " "))
            compared.setdefault(place, []).append({"with": samples[other].id, "outcome": seen})
            if outcome in POINTS:
                points.setdefault(place, []).append(POINTS[outcome])
    judged = []
    for place, sample in enumerate(samples):
        meta = sample.meta | {"compared": compared.get(place, []), "compared_by": by}
        wins = {"wins": sum(points[place]) / len(points[place])} if place in points else {}
        judged.append(with_scores(replace(sample, meta=meta), **wins))
    return judged


def _swapped(ruling: Ruling) -> Ruling:
    return "second" if ruling == "first" else "first" if ruling == "second" else ruling
