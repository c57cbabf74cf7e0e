"""A corpus's own answers, so that they can be scored and selected like those of a model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, rewritten


class Given(Section):
    """Every prompt is answered by what stands beside it in the corpus: its first `answers`, the best first; prompts
    without any go."""

    kind: ClassVar[Kind] = "label"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    answers: Annotated[int, Field(ge=1)] = 1

    def run(self, pool: Pool, _: Scene, tally: Tally) -> Asking[Pool]:
        yield from ()  # a plan is a generator; this one asks nothing
        found: Pool = []
        for sample in pool:
            known = sample.meta.get("answers") or ()
            if not known:
                tally.drop("no answer is given", sample.messages[-1]["content"])
            found += [rewritten(sample, answer, "corpus", finish="ok") for answer in known[: self.answers]]
        return found

    def bill(self, taken: int) -> Bill:
        return Bill(given=taken)


STEPS: dict[str, type[Section]] = {"given": Given}
