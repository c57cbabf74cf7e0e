"""Feedback: answers judged by criteria, each met or not, which a model writes for the prompt or the recipe gives.

A verdict that can't be read stays what it is, "unreadable", and is never a number (see `rate`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, field_validator

from limbeck.config.named_models import TEACHER
from limbeck.elicit.decision import decision
from limbeck.elicit.fence import DATA, conversation_text, fill_fenced
from limbeck.elicit.flow import (
    RETRIED,
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
    user,
    warmed,
    with_scores,
)
from limbeck.elicit.merit import answered_only, tell_own_answers
from limbeck.elicit.ratings import TOO_LONG, UNREADABLE
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, By, Estimate, Temperature, TokenCount, register
from limbeck.elicit.wording import items
from limbeck.types import AnswerForm, Message, Request, Sample, Sampling

MET, NOT_MET = "met", "not met"  # verdicts; the others are UNREADABLE and TOO_LONG
WRITE = (
    f"Below stands a request. {DATA} Write {{count}} criteria by which an answer to it can be judged. Each must be a"
    " statement that is either true of an answer or not, can be told from the answer alone, and asks for one thing;"
    " together they should say what a good answer has and what it avoids. Don't answer the request. Write a numbered"
    " list, one criterion on each line, and nothing else.\n\nRequest:\n{prompt}\n\nCriteria:"
)
JUDGE = (
    f"You judge an answer to a request by one criterion alone. Below stand all three. {DATA}\n\nRequest:\n{{prompt}}"
    "\n\nAnswer:\n{answer}\n\nCriterion:\n{criterion}\n\nDoes the answer meet the criterion? If it does so in part, it"
    " does not. {ending}\nMET: YES\nor\nMET: NO"
)
REASONED = "Say why in one or two sentences. Then end with one line that holds nothing but your verdict:"
AT_ONCE = "Answer with one line that holds nothing but your verdict:"
VERDICT_ALONE = AnswerForm(labels=("MET: YES", "MET: NO"))


@dataclass
class CriterionQuestion:
    """Whether the answer at `place` of the pool meets a criterion; `reply` is the id of the reply that says so."""

    place: int
    criterion: str
    messages: tuple[Message, ...]
    verdict: str = UNREADABLE
    reply: str = ""


@register("rubric")
class Rubric(AskingStep):
    """The model `by` judges each answer by criteria, one at a time: met or not. The `criteria` are the recipe's; where
    it gives none, the model `author` (by default `by`) first writes `count` for each prompt, which the answers to it
    share. Each answer gets the score `rubric`: the share of its criteria that are met. A verdict that can't be read is
    asked for again up to `retries` times; then the answer has no score, as half of a rubric is not the rubric. With
    `reasons`, the judge gives them first; without, one that is here is held to its verdict. Criteria and verdicts are
    kept in `criteria` and `rubric`. In the paper criteria have weights, and most are made from a reference answer; here
    all count alike, and the author sees the request alone."""

    kind = "feedback"
    paper = "Gunjal et al., arXiv:2507.17746"
    scores = frozenset({"rubric"})
    by: By = TEACHER
    author: By | None = None
    criteria: Annotated[list[str], Field(min_length=1)] | None = None
    count: Annotated[int, Field(ge=1, le=20)] = 5
    reasons: bool = False
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    max_tokens: TokenCount = 256
    author_temperature: Temperature = 0.0

    @field_validator("criteria")
    @classmethod
    def _differ(cls, criteria: list[str] | None) -> list[str] | None:
        given = [criterion.strip() for criterion in criteria or ()]
        if not all(given) or len(set(given)) < len(given):
            raise ValueError("a criterion is empty or stands twice; remove it")
        return given or None

    def asks(self) -> tuple[str, ...]:
        writes = () if self.criteria is not None or self.author in (None, self.by) else (str(self.author),)
        return (self.by, *writes)

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        groups = by_conversation(samples)
        criteria = yield from self._criteria(groups, context, tally)
        questions = self._questions(samples, groups, criteria, context)
        yield from self._judge(questions, context, tally)
        tell_own_answers(samples, context.identity(self.by), tally)
        of_place: dict[int, list[CriterionQuestion]] = {}
        for question in questions:
            of_place.setdefault(question.place, []).append(question)
        judged = [self._judged(sample, of_place.get(place, [])) for place, sample in enumerate(samples)]
        _account(questions, judged, tally)
        return judged

    def _criteria(
        self, groups: Sequence[Pool], context: StepContext, tally: Tally
    ) -> Questions[list[tuple[list[str], str]]]:
        """(the criteria, the id of the reply that wrote them) for each group; none where they can't be read."""
        if self.criteria is not None:
            return [(self.criteria, "") for _ in groups]
        author = self.author or self.by
        reader = context.reader(author)
        texts = [_asked_to_write(group, self.count, reader.control) for group in groups]
        fit = [place for place, text in enumerate(texts) if reader.fits((user(text),), self.max_tokens)]
        found: list[tuple[list[str], str]] = [([], "")] * len(groups)
        waiting = fit
        for attempt in range(self.retries + 1):
            sampling = Sampling(warmed(self.author_temperature, attempt), 1.0, self.max_tokens)
            replies = yield from ask(
                [context.request((user(texts[place]),), sampling, RETRIED * attempt, by=author) for place in waiting]
            )
            for place, reply in zip(waiting, replies, strict=True):
                if read := read_criteria(reply, self.count):
                    found[place] = read, reply.id
            waiting = [place for place in waiting if not found[place][0]]
        tally.facts["prompts_without_criteria"] = sum(not read for read, _ in found)
        return found

    def _questions(
        self,
        samples: Pool,
        groups: Sequence[Pool],
        criteria: Sequence[tuple[list[str], str]],
        context: StepContext,
    ) -> list[CriterionQuestion]:
        """What is asked of the judge, answer by answer."""
        places = {id(sample): place for place, sample in enumerate(samples)}
        control = context.reader(self.by).control
        questions = []
        for group, (of_prompt, reply) in zip(groups, criteria, strict=True):
            for sample in group:
                place = places[id(sample)]
                parents = dict.fromkeys((*sample.parents, *([reply] if reply else [])))
                samples[place] = replace(
                    sample, parents=tuple(parents), meta=sample.meta | {"criteria": list(of_prompt)}
                )
                questions += [
                    CriterionQuestion(place, criterion, (user(self._asked(sample, criterion, control)),))
                    for criterion in of_prompt
                ]
        return questions

    def _asked(self, sample: Sample, criterion: str, control: Collection[str]) -> str:
        return fill_fenced(
            JUDGE.replace("{ending}", REASONED if self.reasons else AT_ONCE),
            control,
            prompt=conversation_text(prompt_messages(sample)),
            answer=said_by(sample),
            criterion=criterion,
        )

    def _judge(self, questions: Sequence[CriterionQuestion], context: StepContext, tally: Tally) -> Questions[None]:
        """Ask, and write each verdict into its question."""
        reader = context.reader(self.by)
        waiting = []
        for question in questions:
            if reader.fits(question.messages, self.max_tokens):
                waiting.append(question)
            else:
                question.verdict = TOO_LONG
        for attempt in range(self.retries + 1):
            replies = yield from ask([self._request(question, context, reader, attempt) for question in waiting])
            for question, reply in zip(waiting, replies, strict=True):
                question.verdict, question.reply = read_met(reply), reply.id
            waiting = [question for question in waiting if question.verdict == UNREADABLE]
            if waiting and attempt < self.retries:
                tally.add("asked_again", len(waiting))

    def _request(self, question: CriterionQuestion, context: StepContext, reader: Reader, attempt: int) -> Request:
        form = None if self.reasons or reader.unheld(VERDICT_ALONE) else VERDICT_ALONE
        sampling = Sampling(warmed(0.0, attempt), 1.0, self.max_tokens)
        return context.request(question.messages, sampling, RETRIED * attempt, form=form, by=self.by)

    def _judged(self, sample: Sample, questions: Sequence[CriterionQuestion]) -> Sample:
        """The sample with the verdicts on it, and their share that says met if all can be read."""
        verdicts = {question.criterion: question.verdict for question in questions}
        replies = [question.reply for question in questions if question.reply]
        read = bool(verdicts) and set(verdicts.values()) <= {MET, NOT_MET}
        meta = sample.meta | {"rubric": verdicts, "rubric_by": self.by}
        parents = tuple(dict.fromkeys((*sample.parents, *replies)))
        share = {"rubric": list(verdicts.values()).count(MET) / len(verdicts)} if read else {}
        return with_scores(replace(sample, parents=parents, meta=meta), **share)

    def estimate(self, samples: int) -> Estimate:
        return self.estimate_of(samples, samples)

    def estimate_of(self, samples: int, prompts: int) -> Estimate:
        """Without further tries."""
        written = 0 if self.criteria is not None else min(samples, prompts)
        judged = samples * (self.count if self.criteria is None else len(self.criteria))
        verdict = self.max_tokens * ANSWER_SHARE if self.reasons else 5
        tokens = int(written * self.max_tokens * ANSWER_SHARE + judged * verdict)
        return Estimate(written + judged, tokens, samples=samples)

    def answer_tokens(self) -> float | None:
        return None

    def writes(self) -> frozenset[str]:
        return frozenset({"criteria", "rubric", "rubric_by"})


def read_met(reply: Sample) -> str:
    """What a reply says of a criterion. Without reasons, the word may be all that is said."""
    if ending(reply) != "ok":
        return UNREADABLE
    said = said_by(reply)
    alone = said.strip(" \t\n*_`").rstrip(".").lower()
    met = alone == "yes" if alone in ("yes", "no") else decision(said, "met")[1]
    return UNREADABLE if met is None else MET if met else NOT_MET


def read_criteria(reply: Sample, count: int) -> list[str]:
    """The first `count` different entries of a numbered list; none of a reply that did not come to its end."""
    if ending(reply) != "ok":
        return []
    listed = [" ".join(entry.split()) for _, entry in items(said_by(reply))]
    return list(dict.fromkeys(entry for entry in listed if entry))[:count]


def _asked_to_write(group: Pool, count: int, control: Collection[str]) -> str:
    prompt = conversation_text(prompt_messages(group[0]))
    return fill_fenced(WRITE.replace("{count}", str(count)), control, prompt=prompt)


def _account(questions: Sequence[CriterionQuestion], judged: Pool, tally: Tally) -> None:
    """Tell how the verdicts ended, and what shows that the rubric or its judge says nothing."""
    verdicts = [question.verdict for question in questions]
    shares = [sample.meta["scores"]["rubric"] for sample in judged if "rubric" in sample.meta["scores"]]
    tally.facts["verdicts"] = len(verdicts)
    for kind in (UNREADABLE, TOO_LONG):
        if count := verdicts.count(kind):
            tally.facts[kind.replace(" ", "_")] = count
    if shares:
        tally.facts["mean_share_met"] = sum(shares) / len(shares)
    if verdicts and not {MET, NOT_MET} & set(verdicts):
        tally.notes.append(
            f"none of {len(verdicts):,} verdicts could be read: this model can't judge so; see store.sqlite"
        )
    if judged and not verdicts:
        tally.notes.append("no criteria could be read for any prompt: name another author, or give criteria")
    if len(shares) > 1 and len(set(shares)) == 1:
        tally.notes.append(f"every answer meets {shares[0]:.0%} of its criteria: they tell no answer from another")
