"""Transforms without a model: samples in another form. Each names the samples it was made from."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answer_of, asked_of, prompt_of, rewritten, user
from limbeck.elicit.wording import fill
from limbeck.types import Sample

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?%?"
EQUATION = re.compile(rf"{NUMBER}(?:\s*[-+*/x×÷]\s*\(?\s*{NUMBER}\s*\)?)+\s*=\s*{NUMBER}")


def asks_another(sample: Sample, text: str, answer: str, task: str, writer: str) -> Sample:
    """A sample with another question, its facts kept but for what was said of the old answer."""
    messages = (*asked_of(sample)[:-1], user(text), {"role": "assistant", "content": answer})
    kept = {name: value for name, value in sample.meta.items() if name not in ("prompt_id", "check", "scores")}
    prompt_id = f"{sample.meta.get('prompt_id', sample.id[:16])}/{task}"
    return Sample(messages, writer, None, (sample.id,), kept | {"prompt_id": prompt_id, "task": task})


class Multitask(Section):
    """Distilling step by step: of every answer with reasons two samples, the question with the final answer alone (task
    `label`) and the question with `wording` after it, answered by the reasons (task `rationale`). The recipe weighs
    them: two cross-entropies under `only`. The paper tells the tasks apart by a prefix to both; here the plain question
    is the label's, so that nothing need be put before it when the student is used."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = "Hsieh et al., arXiv:2305.02301"
    needs: ClassVar[frozenset[str]] = frozenset()
    wording: str = "{prompt}\n\nExplain how to find the answer."
    label: str = "The answer is {final}."

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            rationale = sample.meta.get("rationale")
            final = sample.meta.get("final")
            if not rationale or not final:
                tally.drop("no reasons with a final answer", answer_of(sample) or prompt_of(sample))
                continue
            prompt = prompt_of(sample)
            found.append(asks_another(sample, prompt, fill(self.label, final=str(final)), "label", sample.writer))
            found.append(
                asks_another(sample, fill(self.wording, prompt=prompt), str(rationale), "rationale", sample.writer)
            )
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=2 * taken)


class LabelOnly(Section):
    """The final answer without its reasons: what a student is trained on beside which reasons have to prove
    themselves."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    label: str = "The answer is {final}."

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            if not sample.meta.get("final"):
                tally.drop("no final answer", answer_of(sample) or prompt_of(sample))
            else:
                found.append(rewritten(sample, fill(self.label, final=str(sample.meta["final"])), sample.writer))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Equations(Section):
    """Of a worked solution only its equations, one a line, and the final answer. Answers without an equation go."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = "Kim et al., arXiv:2409.12393 (recalled, not confirmed)"
    needs: ClassVar[frozenset[str]] = frozenset()

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            text = str(sample.meta.get("rationale") or answer_of(sample) or "")
            equations = [" ".join(match[0].split()) for match in EQUATION.finditer(text)]
            if not equations:
                tally.drop("no equation", text)
                continue
            final = sample.meta.get("final") or equations[-1].rpartition("=")[2].strip()
            body = "\n".join(dict.fromkeys(equations))
            found.append(
                rewritten(sample, f"{body}\nThe answer is {final}.", sample.writer, rationale=body, final=str(final))
            )
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Counterfactual(Section):
    """The student's side of SCOTT: a prefix tells reasons for the right answer from reasons for a wrong one, so that
    the student learns to follow its reasons. Samples with `counterfactual` get the task `counterfactual`, the others
    `factual`. The paper takes the loss of a counterfactual sample on the answer alone; here its reasons stand in the
    prompt, which comes to the same."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = "Wang et al., arXiv:2305.01879"
    needs: ClassVar[frozenset[str]] = frozenset()

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            rationale = sample.meta.get("rationale")
            final = sample.meta.get("final")
            if not rationale or not final:
                tally.drop("no reasons with a final answer", answer_of(sample) or prompt_of(sample))
            elif sample.meta.get("counterfactual"):
                text = f"[counterfactual] {prompt_of(sample)}\n\n{rationale}"
                found.append(
                    asks_another(sample, text, f"Therefore, the answer is {final}.", "counterfactual", sample.writer)
                )
            else:
                text = f"[factual] {prompt_of(sample)}"
                answer = f"{rationale}\n\nTherefore, the answer is {final}."
                found.append(asks_another(sample, text, answer, "factual", sample.writer))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class RemoveContext(Section):
    """Takes out of the conversation what the student shall do without: its system message, and of the prompt everything
    from `begin` to `end` (both included), where it has them."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = "Snell et al., arXiv:2209.15189"
    needs: ClassVar[frozenset[str]] = frozenset()
    system: bool = True
    begin: str | None = None
    end: str | None = None

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            messages = [m for m in sample.messages if not (self.system and m["role"] == "system")]
            shorter = tuple(
                {**m, "content": self._without(m["content"])} if m["role"] == "user" else m for m in messages
            )
            if shorter == sample.messages:
                tally.add("without_context")
                found.append(sample)
            elif not all(m["content"].strip() for m in shorter):
                tally.drop("nothing is left of the prompt", prompt_of(sample))
            else:
                found.append(replace(sample, messages=shorter, parents=(sample.id,)))
        return found

    def _without(self, text: str) -> str:
        if self.begin is None or self.end is None or self.begin not in text:
            return text
        before, _, rest = text.partition(self.begin)
        inside, found, after = rest.partition(self.end)
        return f"{before.rstrip()}\n{after.lstrip()}".strip() if found and inside is not None else text

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


class Turns(Section):
    """A conversation of several answers becomes one sample for each of them, all that was said before it being its
    prompt."""

    kind: ClassVar[Kind] = "transform"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    expected: Annotated[int, Field(ge=1)] = 2

    def run(self, pool: Pool, _: Scene, __: Tally) -> Asking[Pool]:
        yield from ()
        found: Pool = []
        for sample in pool:
            places = [number for number, message in enumerate(sample.messages) if message["role"] == "assistant"]
            if len(places) < 2:
                found.append(sample)
                continue
            for turn, place in enumerate(places, 1):
                last = place == len(sample.messages) - 1
                ids = sample.response_ids if last else None
                meta = sample.meta | {"prompt_id": f"{sample.meta.get('prompt_id', sample.id[:16])}/{turn}"}
                found.append(Sample(sample.messages[: place + 1], sample.writer, ids, (sample.id,), meta))
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken * self.expected)


STEPS: dict[str, type[Section]] = {
    "multitask": Multitask,
    "label_only": LabelOnly,
    "equations": Equations,
    "counterfactual": Counterfactual,
    "remove_context": RemoveContext,
    "turns": Turns,
}
