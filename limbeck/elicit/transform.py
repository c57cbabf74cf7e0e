"""Transforms without a model: samples in another form. Each names the sample that it was made from as its parent."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    StepContext,
    Tally,
    answer_of,
    prompt_messages,
    prompt_of,
    unjudged,
    user,
    with_new_answer,
)
from limbeck.elicit.step import Estimate, LocalStep, register
from limbeck.elicit.wording import fill
from limbeck.types import MARGIN, PROBABILITY, Sample

NUMBER = r"-?\$?\d[\d,]*+(?:\.\d++)?+%?+"
SIGNS = str.maketrans({"x": "*", "×": "*", "÷": "/"})
EQUATION = re.compile(
    rf"(?<!\d)(?<!\d[.,]){NUMBER}(?:\s*+[-+*/x×÷]\s*+\(?\s*+{NUMBER}\s*+\)?+){{1,30}}+\s*+=\s*+{NUMBER}"
)
# what meta says of the last answer alone
OF_THE_ANSWER = ("place", "answers", "check", "rationale", "final", PROBABILITY, MARGIN)


def with_new_question(sample: Sample, question: str, answer: str, task: str) -> Sample:
    """The sample with another question and answer, for this task. Its meta stays, except what judged the old answer."""
    messages = (*prompt_messages(sample)[:-1], user(question), {"role": "assistant", "content": answer})
    meta = {name: value for name, value in sample.meta.items() if name not in ("prompt_id", "check", "scores")}
    prompt_id = f"{sample.meta.get('prompt_id', sample.id[:16])}/{task}"
    return Sample(messages, sample.writer, parents=(sample.id,), meta=meta | {"prompt_id": prompt_id, "task": task})


def _reasons(sample: Sample, tally: Tally) -> tuple[str, str] | None:
    """(rationale, final answer) of a sample; None, and counted as dropped, if it lacks one of them."""
    rationale = sample.meta.get("rationale")
    final = sample.meta.get("final")
    if not rationale or not final:
        tally.drop("no reasons with a final answer", answer_of(sample) or prompt_of(sample))
        return None
    return str(rationale), str(final)


@register("multitask")
class Multitask(LocalStep):
    """Distilling step by step: makes two samples of every answer with reasons, the question with the final answer alone
    (task `label`) and the question in `wording` with the reasons (task `rationale`). The recipe weighs the tasks with
    two cross-entropies under `only`. The paper tells them apart by a prefix to each; here the label's question is
    unchanged, so that the student needs no prefix when it is used."""

    kind = "transform"
    paper = "Hsieh et al., arXiv:2305.02301"
    wording: str = "{prompt}\n\nExplain how to find the answer."
    label: str = "The answer is {final}."

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            if (reasons := _reasons(sample, tally)) is None:
                continue
            rationale, final = reasons
            prompt = prompt_of(sample)
            samples.append(with_new_question(sample, prompt, fill(self.label, final=final), "label"))
            samples.append(with_new_question(sample, fill(self.wording, prompt=prompt), rationale, "rationale"))
        return samples

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=2 * samples)


@register("label_only")
class LabelOnly(LocalStep):
    """Keeps the final answer without its reasons: the baseline that training on reasons has to beat."""

    kind = "transform"
    label: str = "The answer is {final}."

    def answer_tokens(self) -> float | None:
        return len(self.label) / 4 + 2

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            if not sample.meta.get("final"):
                tally.drop("no final answer", answer_of(sample) or prompt_of(sample))
            else:
                answer = fill(self.label, final=str(sample.meta["final"]))
                samples.append(with_new_answer(sample, answer, sample.writer))
        return samples


@register("equations")
class Equations(LocalStep):
    """Reduces a worked solution to its equations, one a line, and the final answer. Drops answers without an
    equation."""

    kind = "transform"
    paper = "Kim et al., arXiv:2409.12393 (recalled, not confirmed)"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            text = str(sample.meta.get("rationale") or answer_of(sample) or "")
            equations = [" ".join(match[0].split()) for match in EQUATION.finditer(text)]
            if not equations:
                tally.drop("no equation", text)
                continue
            final = str(sample.meta.get("final") or equations[-1].rpartition("=")[2].strip())
            body = "\n".join(dict.fromkeys(equations))
            answer = f"{body}\nThe answer is {final}."
            samples.append(with_new_answer(sample, answer, sample.writer, rationale=body, final=final))
        return samples

    def writes(self) -> frozenset[str]:
        return frozenset({"rationale", "final"})


@register("distinct_paths")
class DistinctPaths(LocalStep):
    """Keeps, of the answers to one prompt, the first with each list of equations (RFT): other words for the same sums
    are no other path. Answers without an equation have one list, the empty one."""

    kind = "select"
    paper = "Yuan et al., arXiv:2308.01825"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        paths: set[tuple[object, ...]] = set()
        kept: Pool = []
        for sample in pool:
            text = answer_of(sample) or ""
            path = (sample.meta.get("prompt_id", prompt_of(sample)), *equations_of(text))
            if path in paths:
                tally.drop("the same equations", text)
            else:
                paths.add(path)
                kept.append(sample)
        return kept


def equations_of(text: str) -> list[str]:
    """The equations in a text, each once, without spaces and with one sign for each operation."""
    found = (re.sub(r"[\s,$]", "", match[0]) for match in EQUATION.finditer(text))
    return list(dict.fromkeys(equation.translate(SIGNS) for equation in found))


@register("counterfactual")
class Counterfactual(LocalStep):
    """The student's part of SCOTT: a prefix marks whether the reasons are for the right answer or a wrong one, so that
    the student learns to follow its reasons. Samples with `counterfactual` get the task `counterfactual`, the others
    `factual`. The paper trains on the answer alone of a counterfactual sample; here its reasons are part of the prompt,
    which has the same effect."""

    kind = "transform"
    paper = "Wang et al., arXiv:2305.01879"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            if (reasons := _reasons(sample, tally)) is None:
                continue
            rationale, final = reasons
            answer = f"Therefore, the answer is {final}."
            if sample.meta.get("counterfactual"):
                question = f"[counterfactual] {prompt_of(sample)}\n\n{rationale}"
                samples.append(with_new_question(sample, question, answer, "counterfactual"))
            else:
                question = f"[factual] {prompt_of(sample)}"
                samples.append(with_new_question(sample, question, f"{rationale}\n\n{answer}", "factual"))
        return samples


@register("remove_context")
class RemoveContext(LocalStep):
    """Removes what the student should do without: the system message, and everything in the prompt from `begin` to
    `end` (both included), where it has them."""

    kind = "transform"
    paper = "Snell et al., arXiv:2209.15189"
    system: bool = True
    begin: str | None = None
    end: str | None = None

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            messages = [m for m in sample.messages if not (self.system and m["role"] == "system")]
            shorter = tuple(
                {**m, "content": self._without_context(m["content"])} if m["role"] == "user" else m for m in messages
            )
            if shorter == sample.messages:
                tally.add("without_context")
                samples.append(sample)
            elif not all(m["content"].strip() for m in shorter):
                tally.drop("nothing is left of the prompt", prompt_of(sample))
            else:
                samples.append(replace(sample, messages=shorter, parents=(sample.id,)))
        return samples

    def _without_context(self, text: str) -> str:
        if self.begin is None or self.end is None or self.begin not in text:
            return text
        before, _, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        return f"{before.rstrip()}\n{after.lstrip()}".strip() if end else text


@register("turns")
class Turns(LocalStep):
    """Splits a conversation with several answers into one sample for each of them, with everything before it as the
    prompt. Answers of weight 0 and calls of tools are left out. A conversation that waits for an answer stays, beside
    the answers in it."""

    kind = "transform"
    expected: Annotated[int, Field(ge=1)] = 2

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        samples: Pool = []
        for sample in pool:
            last = len(sample.messages) - 1
            places = [number for number, message in enumerate(sample.messages) if message["role"] == "assistant"]
            untrained = sample.meta.get("untrained") or ()
            for turn, place in enumerate(places, 1):
                if place == last:
                    continue
                if "tool_calls" in sample.messages[place]:
                    tally.add("calls_of_tools")
                elif sample.messages[place]["content"] in untrained:
                    tally.drop("an answer of weight 0", sample.messages[place]["content"])
                else:
                    samples.append(_earlier(sample, place, turn))
            samples.append(_last_turn(sample, len(places)) if len(places) > 1 and last in places else sample)
        return samples

    def estimate(self, samples: int) -> Estimate:
        return Estimate(samples=samples * self.expected)


def _earlier(sample: Sample, place: int, turn: int) -> Sample:
    """A conversation up to an earlier answer, without what is known of its last one."""
    whole = unjudged(sample, *OF_THE_ANSWER)
    meta = whole.meta | {"prompt_id": _turn_id(sample, turn), "finish": "ok"}
    return Sample(sample.messages[: place + 1], sample.writer, parents=(sample.id,), meta=meta)


def _last_turn(sample: Sample, turn: int) -> Sample:
    """The whole conversation as the last of its turns."""
    meta = sample.meta | {"prompt_id": _turn_id(sample, turn)}
    return replace(sample, parents=(sample.id,), meta=meta)


def _turn_id(sample: Sample, turn: int) -> str:
    return f"{sample.meta.get('prompt_id', sample.id[:16])}/{turn}"
