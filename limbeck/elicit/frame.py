"""A transform without a model: what a template says of a sample becomes its prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from limbeck.elicit.ask import TEMPLATE_CHARS
from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, prompt_messages, prompt_of, unjudged
from limbeck.elicit.rendering import render
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.elicit.template_fields import fault_of, fields_of, own_names, refuse_templates, with_prompt
from limbeck.types import NAME, Sample

OF_ANSWERS = ("finish", "final", "rationale", "by")  # what other steps note of an answer


@register("frame")
class NewPrompt(LocalStep):
    """Makes what `prompt` says of a sample its prompt: a jinja template that sees what that of `ask` sees, such as a
    request for another question like this one. Unlike the template of `ask`, it is what the student learns to answer.
    What was known of the old prompt (its check, its right answers) is left out. The sample's answer is left out too,
    unless `keep_answer`. With `add`, the old samples stay, before the new ones; `task` names the new ones, for `only`
    of a loss or for a later step."""

    kind = "transform"
    prompt: Annotated[str, Field(min_length=1, max_length=TEMPLATE_CHARS)]
    keep_answer: bool = False
    add: bool = False
    task: Annotated[str, Field(pattern=NAME.pattern)] | None = None

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        rendered = render({"prompt": self.prompt}, [fields_of(sample) for sample in pool], context.step)
        framed: Pool = []
        for sample, texts in zip(pool, rendered.rows, strict=True):
            if isinstance(texts, str) or fault_of(texts):
                tally.drop(f"the template: {fault_of(texts)}", prompt_of(sample))
            elif self.keep_answer and answer_of(sample) is None:
                tally.drop("no answer", prompt_of(sample))
            else:
                new = with_prompt(sample, texts["prompt"])
                new = new if self.keep_answer else _waiting(new)
                framed.append(new if self.task is None else replace(new, meta=new.meta | {"task": self.task}))
        return [*pool, *framed] if self.add else framed

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=samples * (2 if self.add else 1))

    def reads(self, place: str) -> frozenset[str]:
        return own_names({"prompt": self.prompt}, place)

    def refuse(self, place: str, known: frozenset[str], pool: Pool | None) -> None:
        refuse_templates({"prompt": self.prompt}, [fields_of(sample) for sample in pool or ()], place, known)


def _waiting(sample: Sample) -> Sample:
    """The sample without its answer, and without what was said of that."""
    return replace(unjudged(sample, *OF_ANSWERS), messages=prompt_messages(sample), response_ids=None)
