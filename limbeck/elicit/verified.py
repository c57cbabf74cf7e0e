"""Steps that keep what can be checked: by a verifier, by a majority, by a score."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.elicit.checks import normalised
from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, prompt_of, said_by, with_scores
from limbeck.elicit.labels import decided
from limbeck.elicit.numbers import final_number
from limbeck.elicit.step import LocalStep, register
from limbeck.elicit.thinking import after_thinking, boxed, stated
from limbeck.elicit.verify import verify
from limbeck.types import Sample

AnswerType = Literal["number", "choice", "exact"]
LETTERS = tuple("ABCDEFGHIJ")


def final_answer(sample: Sample, answer_type: AnswerType) -> str | None:
    """The answer that a sample ends in, after its thinking: its last number (in plain form), the letter of a choice
    (the first in a box or after "the answer is", else the last), or its text without case and punctuation. Reads
    `final` in the meta if it is there, else the whole answer. One that was cut off ends in none."""
    if sample.meta.get("finish") == "length":
        return None
    text = str(sample.meta.get("final") or said_by(sample))
    if answer_type == "number":
        number = final_number(boxed(text) or text)
        return number.plain if number else None
    if answer_type == "choice":
        letters = decided(text, LETTERS)
        says_it = boxed(text) or stated(text)
        return letters[0 if says_it else -1] if letters else None
    return normalised(text) or None


def groups_by_prompt(pool: Pool) -> list[list[Sample]]:
    """The samples in groups that answer one prompt, in the order of the first of each."""
    groups: dict[Any, list[Sample]] = {}
    for sample in pool:
        groups.setdefault(sample.meta.get("prompt_id", prompt_of(sample)), []).append(sample)
    return list(groups.values())


def verdict_of(sample: Sample, against: AnswerType | None) -> tuple[bool | None, str]:
    """(whether the answer is right by its prompt's check, or None; how it was checked). With `against`, an answer whose
    prompt has no check is compared with the corpus's first answer. An answer that was cut off is not right."""
    check = sample.meta.get("check")
    answer = answer_of(sample)
    corpus_answers = sample.meta.get("answers")
    if answer is None:
        return None, ""
    whole = sample.meta.get("finish") != "length"
    if check is not None:
        return whole and verify(check, answer), str(check.get("type"))
    if against is None or not corpus_answers:
        return None, ""
    reference = Sample(({"role": "assistant", "content": str(corpus_answers[0])},), "")
    right = final_answer(reference, against)
    is_right = right is not None and final_answer(sample, against) == right
    return whole and is_right, f"given answer, by {against}"


@register("verify")
class Verify(LocalStep):
    """Keeps answers that pass their prompt's check. With `against`, an answer whose prompt has no check is compared
    with the corpus's first answer, as a `number`, a `choice` or `exact` text. Drops what can't be checked, unless
    `unchecked: keep`."""

    kind = "verify"
    scores = frozenset({"verified"})
    against: AnswerType | None = None
    unchecked: Literal["drop", "keep"] = "drop"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        passed: Pool = []
        for sample in pool:
            verdict, how = verdict_of(sample, self.against)
            if answer_of(sample) is None:
                tally.drop("no answer", prompt_of(sample))
            elif verdict is False and after_thinking(answer_of(sample) or "") is None:
                tally.drop("thinking without an end", answer_of(sample) or "")
            elif verdict is False and sample.meta.get("finish") == "length":
                tally.drop("answer: length", answer_of(sample) or "")
            elif verdict is None and self.unchecked == "drop":
                tally.drop("nothing to check it by", answer_of(sample) or "")
            elif verdict is False:
                tally.drop(f"check: {how}", answer_of(sample) or "")
            else:
                passed.append(with_scores(sample, verified=1.0) if verdict else sample)
        tally.facts["pass_rate"] = len(passed) / max(1, len(pool))
        return passed


@register("vote")
class Vote(LocalStep):
    """Self-consistency: among the answers to one prompt, keeps those that agree with the most frequent final answer (of
    equally frequent ones, the one that came first), `all` of them or only the `first`. Needs no right answer. One that
    was cut off has no final answer. Put `all: true` into an `answer` before it: else answers in the same words count
    once. Drops prompts on which fewer than a share `least` agree."""

    kind = "verify"
    paper = "Wang et al., arXiv:2203.11171; as labels: Huang et al., arXiv:2210.11610"
    scores = frozenset({"agreement"})
    by: AnswerType = "number"
    keep: Literal["all", "first"] = "all"
    least: Annotated[float, Field(ge=0, le=1)] = 0.0

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        agreed: Pool = []
        shares = []
        for group in groups_by_prompt(pool):
            finals = [final_answer(sample, self.by) for sample in group]
            counts = Counter(final for final in finals if final is not None)
            if not counts:
                _drop(group, "no final answer", tally)
                continue
            winner = max(counts, key=lambda final: counts[final])  # max takes the first of equals
            share = counts[winner] / len(group)
            shares.append(share)
            agreeing = [sample for sample, final in zip(group, finals, strict=True) if final == winner]
            for sample, final in zip(group, finals, strict=True):
                if final != winner:
                    tally.drop("outvoted" if final is not None else "no final answer", answer_of(sample) or "")
            if share < self.least:
                _drop(agreeing, "too little agreement", tally)
                continue
            winners = agreeing if self.keep == "all" else agreeing[:1]
            _drop(agreeing[len(winners) :], "agrees with one that is kept", tally)
            agreed += [with_scores(sample, agreement=share) for sample in winners]
        tally.facts["agreement"] = sum(shares) / max(1, len(shares))
        return agreed


def _drop(samples: Pool, reason: str, tally: Tally) -> None:
    for sample in samples:
        tally.drop(reason, answer_of(sample) or "")


@register("best_of")
class BestOf(LocalStep):
    """Keeps, among the answers to one prompt, the `n` with the highest `score` of that name (the lowest, with `lowest`;
    those in the middle of the order, with `median`, the lower one of two); of equal ones, the first."""

    score: str
    n: Annotated[int, Field(ge=1)] = 1
    lowest: bool = False
    median: bool = False

    @model_validator(mode="after")
    def _one_end(self) -> BestOf:
        if self.lowest and self.median:
            raise ValueError("give lowest or median, not both")
        return self

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        selected: Pool = []
        for group in groups_by_prompt(pool):
            best = {id(sample) for sample in self._best([sample for sample in group if self._has_score(sample)])}
            for sample in group:
                if id(sample) in best:
                    selected.append(sample)
                else:
                    reason = "not among the best" if self._has_score(sample) else f"no score {self.score}"
                    tally.drop(reason, answer_of(sample) or "")
        return selected

    def _has_score(self, sample: Sample) -> bool:
        return self.score in sample.meta.get("scores", {})

    def _best(self, rated: Pool) -> Pool:
        """Those of one prompt's samples that are kept; equal ones stay in their order."""
        sign = 1 if self.lowest or self.median else -1
        ranked = sorted(rated, key=lambda sample: sign * sample.meta["scores"][self.score])
        first = max(0, (len(ranked) - self.n) // 2) if self.median else 0
        return ranked[first : first + self.n]
