"""Keeping what can be checked: by a verifier, by a majority, by a score."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answer_of, prompt_of, scored
from limbeck.elicit.verify import NUMBER, verify
from limbeck.types import Sample

Rule = Literal["number", "choice", "exact"]
LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])(?:\)|\.|:|\b)(?![A-Za-z'’])")


def final_answer(sample: Sample, rule: Rule) -> str | None:
    """What a sample's answer comes to: its last number (in plain form), its last letter of a choice, or its text
    without case and outer signs. Where the labeling noted a `final` answer, that is read instead of the whole text."""
    text = str(sample.meta.get("final") or answer_of(sample) or "")
    if rule == "number":
        found = NUMBER.findall(text)
        return f"{float(found[-1].replace(',', '')):g}" if found else None
    if rule == "choice":
        letters = LETTER.findall(text)
        return str(letters[-1]) if letters else None
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split()) or None


class Verify(Section):
    """Keeps answers that pass their prompt's check. With `against`, a prompt without a check is held against its first
    given answer, by that rule. What can't be checked goes, unless `unchecked: keep`."""

    kind: ClassVar[Kind] = "verify"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    against: Rule | None = None
    unchecked: Literal["drop", "keep"] = "drop"

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()  # nothing is asked
        found: Pool = []
        for sample in pool:
            verdict, how = self._verdict(sample)
            if answer_of(sample) is None:
                tally.drop("no answer", prompt_of(sample))
            elif verdict is None and self.unchecked == "drop":
                tally.drop("nothing to check it by", answer_of(sample) or "")
            elif verdict is False:
                tally.drop(f"check: {how}", answer_of(sample) or "")
            else:
                found.append(scored(sample, verified=1.0) if verdict else sample)
        tally.facts["pass_rate"] = len(found) / max(1, len(pool))
        return found

    def _verdict(self, sample: Sample) -> tuple[bool | None, str]:
        check = sample.meta.get("check")
        answer = answer_of(sample)
        given = sample.meta.get("answers")
        if answer is None:
            return None, ""
        if check is not None:
            return verify(check, answer), str(check.get("type"))
        if self.against is None or not given:
            return None, ""
        wanted = final_answer(Sample(({"role": "assistant", "content": str(given[0])},), ""), self.against)
        return wanted is not None and final_answer(sample, self.against) == wanted, f"given answer, by {self.against}"

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Vote(Section):
    """Self-consistency: of the answers to one prompt those that agree with the most frequent final answer (of equally
    frequent ones the first seen) are kept, all of them or the `first`. No right answer need be known."""

    kind: ClassVar[Kind] = "verify"
    paper: ClassVar[str] = "Wang et al., arXiv:2203.11171; as labels: Huang et al., arXiv:2210.11610"
    needs: ClassVar[frozenset[str]] = frozenset()
    by: Rule = "number"
    keep: Literal["all", "first"] = "all"
    least: Annotated[float, Field(ge=0, le=1)] = 0.0

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        shares = []
        for group in grouped(pool):
            finals = [final_answer(sample, self.by) for sample in group]
            counts = Counter(final for final in finals if final is not None)
            if not counts:
                for sample in group:
                    tally.drop("no final answer", answer_of(sample) or "")
                continue
            winner = max(counts, key=lambda final: counts[final])  # the first seen of the most frequent
            share = counts[winner] / len(group)
            shares.append(share)
            agreeing = [sample for sample, final in zip(group, finals, strict=True) if final == winner]
            for sample, final in zip(group, finals, strict=True):
                if final != winner:
                    tally.drop("outvoted" if final is not None else "no final answer", answer_of(sample) or "")
            if share < self.least:
                for sample in agreeing:
                    tally.drop("too little agreement", answer_of(sample) or "")
                continue
            chosen = agreeing if self.keep == "all" else agreeing[:1]
            for sample in agreeing[len(chosen) :]:
                tally.drop("agrees with one that is kept", answer_of(sample) or "")
            found += [scored(sample, agreement=share) for sample in chosen]
        tally.facts["agreement"] = sum(shares) / max(1, len(shares))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class BestOf(Section):
    """Of the answers to one prompt the `n` with the highest score of that name; of equal ones the first."""

    kind: ClassVar[Kind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    score: str
    n: Annotated[int, Field(ge=1)] = 1

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for group in grouped(pool):
            having = [sample for sample in group if self.score in sample.meta.get("scores", {})]
            ranked = sorted(having, key=lambda sample: -sample.meta["scores"][self.score])
            kept = {id(sample) for sample in ranked[: self.n]}
            for sample in group:
                if id(sample) in kept:
                    found.append(sample)
                else:
                    reason = (
                        "not among the best" if any(sample is other for other in having) else f"no score {self.score}"
                    )
                    tally.drop(reason, answer_of(sample) or "")
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


def grouped(pool: Pool) -> list[list[Sample]]:
    """The samples that answer one prompt together, in the order of their first."""
    groups: dict[Any, list[Sample]] = {}
    for sample in pool:
        groups.setdefault(sample.meta.get("prompt_id", prompt_of(sample)), []).append(sample)
    return list(groups.values())


STEPS: dict[str, type[Section]] = {"verify": Verify, "vote": Vote, "best_of": BestOf}
