"""From scores to preferences: for each prompt a chosen and a rejected answer, or a list with the best first, which
every ranking loss reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, by_conversation, prompt_of
from limbeck.elicit.select import score_of
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.types import Sample


def ranked(group: Pool, score: str | None, tally: Tally) -> list[tuple[Sample, float]]:
    """(answer, score) of the answers to one prompt, the best first; without a `score`, in the order in which they
    stand. Answers without the score count as dropped, and so does a text that stands twice: the better one stays."""
    scored = []
    for place, sample in enumerate(group):
        value = -float(place) if score is None else score_of(sample, score)
        if answer_of(sample) is None:
            tally.drop("no answer", prompt_of(sample))
        elif value is None:
            tally.drop(f"no score {score}", answer_of(sample) or "")
        else:
            scored.append((sample, value))
    best: dict[str, tuple[Sample, float]] = {}
    for sample, value in sorted(scored, key=lambda entry: -entry[1]):  # stable: of equals the first
        text = (answer_of(sample) or "").strip()
        if text in best:
            tally.drop("the same answer again", text)
        best.setdefault(text, (sample, value))
    return list(best.values())


def placed(sample: Sample, place: int, margin: float) -> Sample:
    """An answer at this place of its prompt's ranking, and by how much the next better (of the best: the next worse)
    one differs."""
    return replace(sample, meta=sample.meta | {"place": place, "margin": margin})


@register("pairs")
class PreferencePairs(LocalStep):
    """Makes one preference of the answers to each prompt: chosen is the one with the highest `score` of that name,
    rejected the `worst`, the `next` best, or a `random` one (Zephyr) among those that lose to it by more than `margin`;
    so equal scores are a tie, and a prompt whose answers are all tied is dropped. Without a score (`score: null`) the
    answers are preferred in the order in which they stand. A prompt gives one pair; `lists` gives all its answers."""

    kind = "feedback"
    paper = "random: Tunstall et al., arXiv:2310.16944"
    ranks = True
    score: str | None = "rating"
    rejected: Literal["worst", "next", "random"] = "worst"
    margin: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _order_has_no_margin(self) -> PreferencePairs:
        if self.score is None and self.margin:
            raise ValueError("an order has no margins: name a score, or leave margin out")
        return self

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        pairs: Pool = []
        margins = []
        for group in by_conversation(pool):
            order = ranked(group, self.score, tally)
            if len(order) < 2:
                for sample, _ in order:
                    tally.drop("nothing to compare it with", answer_of(sample) or "")
                continue
            chosen, best = order[0]
            losers = [(sample, best - value) for sample, value in order[1:] if best - value > self.margin]
            if not losers:
                tally.drop("a tie", prompt_of(chosen))
                continue
            place = {"worst": len(losers) - 1, "next": 0}.get(self.rejected)
            if place is None:
                place = context.rng("rejected", chosen.id).randrange(len(losers))
            rejected, margin = losers[place]
            pairs += [placed(chosen, 0, margin), placed(rejected, 1, margin)]
            margins.append(margin)
        tally.facts["pairs"] = len(margins)
        if margins and self.score is not None:
            tally.facts["mean_margin"] = sum(margins) / len(margins)
        return pairs

    def estimate_of(self, samples: int, prompts: int) -> Estimate:
        return Estimate(samples=min(samples, 2 * prompts))

    def writes(self) -> frozenset[str]:
        return frozenset({"margin"})


@register("lists")
class RankedLists(LocalStep):
    """Ranks the answers to each prompt by the `score` of that name, the best first, for losses that read whole lists
    (`pro`, `rrhf`; pairwise ones take the first and the last). Each must lose to the one before it by more than
    `margin`: of tied answers the first stays. Keeps the best `most`; drops prompts with fewer than two. Without a score
    (`score: null`) the answers are ranked in the order in which they stand."""

    kind = "feedback"
    ranks = True
    score: str | None = "rating"
    margin: Annotated[float, Field(ge=0)] = 0.0
    most: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _order_has_no_margin(self) -> RankedLists:
        if self.score is None and self.margin:
            raise ValueError("an order has no margins: name a score, or leave margin out")
        return self

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        lists: Pool = []
        for group in by_conversation(pool):
            kept: list[tuple[Sample, float]] = []
            for sample, value in ranked(group, self.score, tally):
                if kept and kept[-1][1] - value <= self.margin:
                    tally.drop("a tie", answer_of(sample) or "")
                elif self.most is not None and len(kept) == self.most:
                    tally.drop("not among the best", answer_of(sample) or "")
                else:
                    kept.append((sample, value))
            if len(kept) < 2:
                for sample, _value in kept:
                    tally.drop("nothing to compare it with", answer_of(sample) or "")
                continue
            for place, (sample, value) in enumerate(kept):
                other = kept[place - 1 if place else 1][1]
                lists.append(placed(sample, place, abs(other - value)))
            tally.add("lists")
        return lists

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=samples)

    def writes(self) -> frozenset[str]:
        return frozenset({"margin"})
