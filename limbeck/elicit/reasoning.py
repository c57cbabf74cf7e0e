"""Steps over reasoning traces: made of reasons, how often a prompt is solved, how long the traces are, whether their
marks are sound, how they reason, and a draw that is balanced over kinds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from limbeck.elicit.flow import (
    Pool,
    StepContext,
    Tally,
    answer_of,
    drop_if,
    prompt_of,
    with_new_answer,
    with_scores,
)
from limbeck.elicit.select import ScriptName, has_script, score_of
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.elicit.trace import Trace, only_in_thinking, trace_of
from limbeck.elicit.verified import AnswerType, groups_by_prompt, verdict_of
from limbeck.elicit.verify import verify
from limbeck.elicit.wording import PLACEHOLDER, fill, words
from limbeck.types import RecipeError, Sample, nearest

TAGS = frozenset({"kind", "task"})  # of every sample
# the words of LIMO's rules, by their share of the score; 30 % are for length
MARKERS = {("check", "verify"): 0.20, ("perhaps", "might"): 0.25, ("therefore", "since"): 0.25}
LENGTH_SHARE = 0.30


@register("as_thinking")
class AsThinking(LocalStep):
    """Makes reasons into thinking: what `rationale` wrote stands between <think> and </think>, and `label` follows. For
    a teacher that does not think by itself. Drops answers without reasons."""

    kind = "transform"
    label: str = "The answer is {final}."

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        thinking: Pool = []
        for sample in pool:
            reasons, final = (str(sample.meta.get(name, "")).strip() for name in ("rationale", "final"))
            if not reasons or not final:
                tally.drop("no reasons", answer_of(sample) or "")
                continue
            text = f"<think>\n{reasons}\n</think>\n\n{fill(self.label, final=final)}"
            thinking.append(with_new_answer(sample, text, sample.writer))
        return thinking

    @field_validator("label")
    @classmethod
    def _names_final(cls, label: str) -> str:
        if PLACEHOLDER.findall(label) != ["final"]:
            raise ValueError("label must hold {final} once, and nothing else in braces")
        return label


@register("pass_rate")
class PassRate(LocalStep):
    """Scores how often a prompt is solved: `pass_rate`, the share of its answers that pass its check, the same for all
    (`against` as in `verify`). Thinking without an end and an answer that was cut off count as wrong; `answer`
    keeps them, and repeated answers, with `all`. `top` and `bins` can then select by difficulty. Drops what can't be
    checked, unless `unchecked: keep`."""

    kind = "verify"
    paper = "as a filter: Ye et al., arXiv:2502.03387"
    scores = frozenset({"pass_rate"})
    against: AnswerType | None = None
    unchecked: Literal["drop", "keep"] = "drop"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        rated: Pool = []
        rates = []
        for group in groups_by_prompt(pool):
            verdicts = [verdict_of(sample, self.against)[0] for sample in group]
            checked = [verdict for verdict in verdicts if verdict is not None]
            rate = sum(checked) / max(1, len(checked))
            rates += [rate] if checked else []
            for sample, verdict in zip(group, verdicts, strict=True):
                if answer_of(sample) is None:
                    tally.drop("no answer", prompt_of(sample))
                elif verdict is not None:
                    rated.append(with_scores(sample, pass_rate=rate))
                elif self.unchecked == "keep":
                    rated.append(sample)
                else:
                    tally.drop("nothing to check it by", answer_of(sample) or "")
        if rates:
            tally.facts |= {
                "prompts": len(rates),
                "pass_rate": sum(rates) / len(rates),
                "always_solved": sum(rate == 1 for rate in rates),
                "never_solved": sum(rate == 0 for rate in rates),
            }
        return rated


@register("trace_lengths")
class TraceLengths(LocalStep):
    """Scores the lengths of an answer in words: `thinking_length` (0 without thinking) and `answer_length` (of what
    follows it; 0 if it never ends). `best_of` then selects the shortest, longest or middle one per prompt, `top` and
    `draw` among all. Texts in scripts without spaces have few words: compare them only with each other."""

    scores = frozenset({"answer_length", "thinking_length"})

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        rated: Pool = []
        for sample in pool:
            answer = answer_of(sample)
            if answer is None:
                tally.drop("no answer", prompt_of(sample))
                continue
            trace = trace_of(answer)
            lengths = {name: len((text or "").split()) for name, text in _parts(trace).items()}
            rated.append(with_scores(sample, **lengths))
        return rated


def _parts(trace: Trace) -> dict[str, str | None]:
    return {"thinking_length": trace.thinking, "answer_length": trace.answer}


@register("require_thinking")
class RequireThinking(LocalStep):
    """Keeps answers that think once, first, to an end, and then answer. Drops answers without thinking, or with
    thinking that is empty, never ends, comes twice or after other text; those that say nothing after it; and those
    whose right answer stands in the thinking alone: it passes the prompt's check and the answer doesn't or, without a
    check, ends in a box that the answer doesn't repeat. With `script`, a `share` of the thinking's letters must belong
    to it, which tells mixed languages apart if their scripts differ (see the step `script`)."""

    script: ScriptName | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.9

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        return drop_if(self._reject, pool, tally)

    def _reject(self, sample: Sample) -> tuple[str, str] | None:
        text = answer_of(sample)
        if text is None:
            return "no answer", prompt_of(sample)
        trace = trace_of(text)
        if trace.thinking is None:
            return "no thinking", text
        if trace.fault:
            return trace.fault, text
        check = sample.meta.get("check")
        missed = (
            only_in_thinking(trace)
            if check is None
            else verify(check, text) is False and bool(verify(check | {"thinking": True}, trace.thinking))
        )
        if missed:
            return "the answer stands in the thinking alone", text
        mixed = self.script is not None and not has_script(trace.thinking, self.script, self.share)
        return ("thinking in another script", text) if mixed else None


@register("reasoning_quality")
class ReasoningQuality(LocalStep):
    """LIMO's rules for how a solution reasons, as the score `reasoning_quality`: 30 % its length in words, 20 % how
    often it says check or verify, 25 % perhaps or might, 25 % therefore or since, as shares of its words. How the paper
    puts the four on one scale is not known; here each is standardised over the pool (mean 0, deviation 1). English
    only. `best_of` then keeps the best answer to each prompt, `top` the best of those."""

    paper = "Ye et al., arXiv:2502.03387 (the rules after others' descriptions of it)"
    scores = frozenset({"reasoning_quality"})

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        answered = [sample for sample in pool if (answer_of(sample) or "").strip()]
        for sample in pool:
            if not (answer_of(sample) or "").strip():
                tally.drop("no answer", prompt_of(sample))
        texts = [words(answer_of(sample) or "") for sample in answered]
        scores = [LENGTH_SHARE * value for value in standardised([len(text) for text in texts])]
        for markers, share in MARKERS.items():
            shares = [sum(word in markers for word in text) / max(1, len(text)) for text in texts]
            scores = [score + share * value for score, value in zip(scores, standardised(shares), strict=True)]
        return [with_scores(sample, reasoning_quality=score) for sample, score in zip(answered, scores, strict=True)]


def standardised(values: Sequence[float]) -> list[float]:
    """The values less their mean, in standard deviations; all 0 if they are equal."""
    if len(values) < 2 or (spread := statistics.pstdev(values)) == 0:
        return [0.0] * len(values)
    mean = statistics.fmean(values)
    return [(value - mean) / spread for value in values]


@register("draw")
class BalancedDraw(LocalStep):
    """Draws `count` samples, balanced over kinds (s1): again and again a value of `by` is drawn (the prompt's `kind`,
    its `task`, or a field that an `ask` wrote), each as likely as any other, then one of its samples. With `weight`,
    the samples of a value are ranked by the score of that name, the highest first, and each is `decay` times as likely
    as the one before it (1/2 in the paper, by the length of thinking); without, all are equally likely. Samples without
    the value are one kind of their own. Keeps the pool's order."""

    paper = "Muennighoff et al., arXiv:2501.19393"
    count: Annotated[int, Field(ge=1)]
    by: str = "kind"
    weight: str | None = None
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        groups: dict[str, list[int]] = {}  # places in the pool, the likeliest first
        for place in self._ranked(pool, tally):
            groups.setdefault(str(pool[place].meta.get(self.by, "")), []).append(place)
        tally.facts["kinds"] = len(groups)
        rng = context.rng("draw")
        drawn: set[int] = set()
        while groups and len(drawn) < self.count:
            value = rng.choice(sorted(groups))
            drawn.add(groups[value].pop(self._rank(rng, len(groups[value]))))
            if not groups[value]:
                del groups[value]
        for place in sorted(place for places in groups.values() for place in places):
            tally.drop("not drawn", prompt_of(pool[place]))
        return [pool[place] for place in sorted(drawn)]

    def _ranked(self, pool: Pool, tally: Tally) -> list[int]:
        """The places of the samples that can be drawn; by the score if one is named, the highest first."""
        if self.weight is None:
            return list(range(len(pool)))
        scores = {place: score_of(sample, self.weight) for place, sample in enumerate(pool)}
        for place, score in scores.items():
            if score is None:
                tally.drop(f"no score {self.weight}", prompt_of(pool[place]))
        rated = {place: score for place, score in scores.items() if score is not None}
        return sorted(rated, key=lambda place: (-rated[place], place))

    def _rank(self, rng: random.Random, count: int) -> int:
        """The rank that is drawn among so many."""
        if self.weight is None:
            return rng.randrange(count)
        return rng.choices(range(count), [self.decay**rank for rank in range(count)])[0]

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=min(samples, self.count))

    def refuse(self, place: str, known: frozenset[str], _: Pool | None) -> None:
        if self.by not in (legal := TAGS | known):
            raise RecipeError(
                f"{place}.by",
                f"no sample has a {self.by!r}{nearest(self.by, sorted(legal))}; name kind, task, or what a step"
                " before it writes",
            )
