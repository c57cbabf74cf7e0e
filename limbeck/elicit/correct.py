"""Feedback: the teacher mends what the student got wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from limbeck.config.named_models import TEACHER
from limbeck.elicit import sandbox
from limbeck.elicit.fence import DATA, conversation_text, fill_fenced
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    inherited,
    new_prompt,
    prompt_messages,
    said_by,
    unjudged,
    user,
    with_answer,
)
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.verified import AnswerType, verdict_of
from limbeck.elicit.wording import fill
from limbeck.types import Sample, Sampling

MEND = (
    f"Below stand a task, an attempt at it, and what is wrong with that. {DATA}\n\nTask:\n{{prompt}}\n\nAttempt:\n"
    "{attempt}\n\nWhat is wrong:\n{fault}\n\nMend the attempt: keep what is right in it, and change what is wrong. Give"
    " the whole mended answer alone."
)
TASK = "{prompt}\n\nAn attempt at it:\n{attempt}\n\nWhat is wrong with it: {fault}\n\nMend the attempt."
INHERITED = ("kind", "task", "check", "answers", "weight")
Taught = Literal["answer", "mending", "both"]


@register("correct")
class Correct(AskingStep):
    """The model `by` mends the attempts that fail their prompt's check (or, with `against`, differ from the corpus's
    answer), shown the attempt and what is wrong, such as a test's error; a mended answer is kept if it passes
    (PERsD). Let the student attempt first: `answer: {by: untouched}`. Attempts that pass are dropped, or kept with
    `passed: keep`; those without a check are dropped, or with `unchecked: correct` mended and kept as they come.
    `teach` the mended `answer` to the task (PERsD), the `mending` of the attempt (PERsD-refine), or `both`
    (PERsD-combined)."""

    kind = "feedback"
    paper = "Chen et al., arXiv:2310.18628"
    by: By = TEACHER
    against: AnswerType | None = None
    passed: Literal["drop", "keep"] = "drop"
    unchecked: Literal["drop", "correct"] = "drop"
    teach: Taught = "answer"
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: TokenCount = 512

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        reader = context.reader(self.by)
        kept: dict[int, Pool] = {}
        turns = []
        for place, sample in enumerate(pool):
            verdict, how = verdict_of(sample, self.against)
            if answer_of(sample) is None:
                tally.drop("no attempt", sample.messages[-1]["content"])
            elif verdict is None and self.unchecked == "drop":
                tally.drop("nothing to check it by", answer_of(sample) or "")
            elif verdict:
                tally.add("passed_at_once")
                if self.passed == "keep":
                    kept[place] = [sample]
                else:
                    tally.drop("the attempt passes", answer_of(sample) or "")
            else:
                fault = fault_of(sample, how) if verdict is False else "It may not be right, complete or clear."
                prompt = conversation_text(prompt_messages(sample))
                text = fill_fenced(MEND, reader.control, prompt=prompt, attempt=said_by(sample), fault=fault)
                if reader.fits((user(text),), self.max_tokens):
                    turns.append((place, sample, fault, user(text)))
                else:
                    tally.drop("too long to be shown", answer_of(sample) or "")
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request((message,), sampling, by=self.by) for *_, message in turns])
        for (place, sample, fault, _), reply in complete_replies(turns, replies, tally):
            text = said_by(reply).strip()
            whole = None if text == reply.messages[-1]["content"].strip() else text
            mended = with_answer(unjudged(sample, "by"), reply, whole)
            if verdict_of(mended, self.against)[0] is False:
                tally.drop("mended, and still wrong", text)
                continue
            kept[place] = self._taught(sample, mended, fault)
        tally.facts["mended"] = sum(1 for place in kept if place in {turn[0] for turn in turns})
        return [sample for place in sorted(kept) for sample in kept[place]]

    def _taught(self, sample: Sample, mended: Sample, fault: str) -> Pool:
        """The samples that a mended answer becomes."""
        samples = [mended] if self.teach in ("answer", "both") else []
        if self.teach in ("mending", "both"):
            task = conversation_text(prompt_messages(sample))
            text = fill(TASK, prompt=task, attempt=said_by(sample), fault=fault)
            prompt = new_prompt(text, [sample], sample.writer, **inherited(sample, *INHERITED))
            samples.append(replace(with_answer(prompt, mended), parents=(prompt.id, *mended.parents)))
        return samples

    def estimate(self, samples: int) -> Estimate:
        asked = Estimate.of_answers(samples, self.max_tokens)
        return replace(asked, samples=samples * (2 if self.teach == "both" else 1))

    def shows(self) -> StepPrompt | None:
        return VARIES if self.by == TEACHER else None


def fault_of(sample: Sample, how: str) -> str:
    """What is wrong with an attempt, as far as its check can say: a test's error, or that it fails."""
    check = sample.meta.get("check") or {}
    if sample.meta.get("finish") == "length":
        return "It was cut off before its end."
    if check.get("type") == "unit_tests":
        outcome = sandbox.run_tests(sandbox.program_in(said_by(sample)), check["tests"])
        return f"Its tests fail: {outcome.why}"
    return f"It is not right (checked by: {how})."
