"""Feedback: a referee tells the prompts at which the student falls behind its teacher from the others (Lion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, model_validator

from limbeck.config.named_models import TEACHER, UNTOUCHED
from limbeck.elicit.flow import (
    RETRIED,
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    by_conversation,
    ending,
    prompt_of,
    said_by,
    user,
    warmed,
    with_scores,
)
from limbeck.elicit.merit import answered_only, tell_own_answers
from limbeck.elicit.ratings import TOO_LONG, UNREADABLE, AspectQuestion
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.types import Message, RecipeError, Sample, Sampling

ASPECT = "overall quality"
QUALITY = "Does it help whoever asked: is it to the point, right, and as detailed as the request needs?"
HARD, EASY = "hard", "easy"


@dataclass(frozen=True)
class Match:
    """The teacher's and the student's answer to one prompt, and the referee's conversation in both orders."""

    teacher: Sample
    student: Sample
    orders: tuple[tuple[Message, ...], tuple[Message, ...]]  # the teacher's first, the student's first


@dataclass(frozen=True)
class Points:
    """The points that a reply gives the teacher and the student, and its id."""

    teacher: float
    student: float
    reply: str


Found = Mapping[tuple[int, int], Points]  # by (place of the match, its order)


@register("referee")
class Referee(AskingStep):
    """The model `by` gives points on a `scale` to the answers of `teacher` and `student` to each prompt, shown
    together in both orders; the prompt is `hard` where the teacher leads by `threshold` or more on average, else
    `easy` (Lion). Let both answer first: `answer: {by: [teacher, untouched], all: true}`, where `all` keeps an answer
    that both give. Of each prompt the teacher's answer is left, with `level` (hard or easy), the score `lead`, and
    the student's answer as `attempt`; a prompt without points in both orders, after `retries` further tries, is
    neither, and is dropped (Lion's code calls it easy). `draw: {by: level}` balances the two. Of the referee it tells
    how often both orders put the same one ahead, and by how many points the one shown first leads. The wording of the
    question is ours."""

    kind = "feedback"
    paper = "Jiang et al., arXiv:2305.12870"
    scores = frozenset({"lead"})
    by: By = TEACHER
    teacher: By = TEACHER
    student: By = UNTOUCHED
    question: Annotated[str, Field(min_length=1)] = QUALITY
    scale: tuple[int, int] = (1, 10)
    threshold: Annotated[float, Field(gt=0)] = 1.0
    reasons: bool = True
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    temperature: Temperature = 0.2
    top_p: TopP = 1.0
    max_tokens: TokenCount = 256

    @model_validator(mode="after")
    def _agree(self) -> Referee:
        low, high = self.scale
        if not 0 <= low < high <= low + 100:
            raise ValueError(f"the scale {self.scale} must rise from 0 or more, by at most 100")
        if self.threshold > high - low:
            raise ValueError(f"nobody leads by {self.threshold:g} points on the scale {self.scale}; lower threshold")
        if self.teacher == self.student:
            raise ValueError(f"teacher and student are both {self.teacher!r}; name the models that answered")
        return self

    @property
    def _asked(self) -> AspectQuestion:
        return AspectQuestion(ASPECT, self.question, self.scale, "reasons" if self.reasons else "ratings")

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        matches = self._matches(answered_only(pool, tally), context, tally)
        found = yield from self._points(matches, context, tally)
        judged: Pool = []
        leads: list[tuple[float, float]] = []  # the teacher's in either order
        for place, match in enumerate(matches):
            both = [found[place, order] for order in (0, 1) if (place, order) in found]
            if len(both) < 2:
                tally.drop("its points can't be read", prompt_of(match.teacher))
                continue
            one, two = (read.teacher - read.student for read in both)
            leads.append((one, two))
            judged.append(self._tagged(match, (one + two) / 2, [read.reply for read in both]))
        self._account(matches, judged, leads, tally=tally, context=context)
        return judged

    def _matches(self, samples: Pool, context: StepContext, tally: Tally) -> list[Match]:
        """The prompts that both have answered; the first answer of each counts."""
        reader = context.reader(self.by)
        matches = []
        for group in by_conversation(samples):
            first: dict[str, Sample] = {}
            for sample in group:
                first.setdefault(str(sample.meta.get("by", TEACHER)), sample)
            missing = [name for name in (self.teacher, self.student) if name not in first]
            if missing:
                tally.drop(f"no answer of {missing[0]}", prompt_of(group[0]))
                continue
            teacher, student = first[self.teacher], first[self.student]
            one, two = (
                (user(self._asked.text(shown, reader.control)),) for shown in ((teacher, student), (student, teacher))
            )
            if all(reader.fits(messages, self.max_tokens) for messages in (one, two)):
                matches.append(Match(teacher, student, (one, two)))
            else:
                tally.drop(TOO_LONG, prompt_of(teacher))
        return matches

    def _points(self, matches: Sequence[Match], context: StepContext, tally: Tally) -> Questions[Found]:
        found: dict[tuple[int, int], Points] = {}
        reader = context.reader(self.by)
        form = self._asked.form(2)
        form = None if form is None or reader.unheld(form) else form
        waiting = [(place, order) for place in range(len(matches)) for order in (0, 1)]
        for attempt in range(self.retries + 1):
            sampling = Sampling(warmed(self.temperature, attempt), self.top_p, self.max_tokens)
            replies = yield from ask(
                [
                    context.request(matches[place].orders[order], sampling, RETRIED * attempt, form=form, by=self.by)
                    for place, order in waiting
                ]
            )
            for turn, reply in zip(waiting, replies, strict=True):
                points = self._asked.read(said_by(reply), 2) if ending(reply) == "ok" else [UNREADABLE] * 2
                numbers = [float(value) for value in points if not isinstance(value, str)]
                if len(numbers) == 2:
                    teacher, student = numbers if turn[1] == 0 else numbers[::-1]
                    found[turn] = Points(teacher, student, reply.id)
            waiting = [turn for turn in waiting if turn not in found]
            if waiting and attempt < self.retries:
                tally.add("asked_again", len(waiting))
        return found

    def _tagged(self, match: Match, lead: float, replies: Sequence[str]) -> Sample:
        level = HARD if lead >= self.threshold else EASY
        meta = match.teacher.meta | {"level": level, "attempt": said_by(match.student)}
        parents = tuple(dict.fromkeys((*match.teacher.parents, match.student.id, *replies)))
        return with_scores(replace(match.teacher, parents=parents, meta=meta), lead=lead)

    def _account(
        self,
        matches: Sequence[Match],
        judged: Pool,
        leads: Sequence[tuple[float, float]],
        *,
        tally: Tally,
        context: StepContext,
    ) -> None:
        """Tell how the prompts divide, and how far the referee can be trusted."""
        levels = [sample.meta["level"] for sample in judged]
        tally.facts |= {HARD: levels.count(HARD), EASY: levels.count(EASY), "unreadable": len(matches) - len(judged)}
        answers = [sample for match in matches for sample in (match.teacher, match.student)]
        tell_own_answers(answers, context.identity(self.by), tally)
        if leads:
            tally.facts["mean_lead"] = sum(one + two for one, two in leads) / (2 * len(leads))
            tally.facts["swap_consistency"] = sum(_sign(one) == _sign(two) for one, two in leads) / len(leads)
            tally.facts["lead_of_the_first"] = sum(one - two for one, two in leads) / (2 * len(leads))
        if len(levels) > 1 and len(set(levels)) == 1:
            tally.notes.append(
                f"every prompt is {levels[0]}: this referee divides nothing at {self.threshold:g} points"
            )
        if matches and not judged:
            tally.notes.append(
                f"no points on {len(matches):,} prompts could be read: this model can't judge so; see store.sqlite"
            )

    def refuse(self, place: str, known: frozenset[str], _: Pool | None) -> None:
        if "by" not in known:
            raise RecipeError(
                place,
                "no step before it says who answered: put"
                f" answer: {{by: [{self.teacher}, {self.student}], all: true}} before it",
            )

    def estimate(self, samples: int) -> Estimate:
        """Without further tries; two answers to each prompt."""
        prompts = max(1, samples // 2)
        return replace(Estimate.of_answers(2 * prompts, self.max_tokens), samples=prompts)

    def answer_tokens(self) -> float | None:
        return None

    def writes(self) -> frozenset[str]:
        return frozenset({"level", "attempt"})


def _sign(lead: float) -> int:
    return (lead > 0) - (lead < 0)
