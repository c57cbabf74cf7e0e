"""Steps from outside the package: one class each, registered by its decorator, found by recipes, run by the engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from limbeck.config.sections import Elicit
from limbeck.elicit import steps
from limbeck.elicit.engine import Engine
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    drop_if,
    prompt_messages,
    prompt_of,
    with_answer,
    with_scores,
)
from limbeck.elicit.step import AskingStep, Estimate, LocalStep, register
from limbeck.runs.build import methods
from limbeck.storage.store import Store
from limbeck.types import Generated, RecipeError, Sample, Sampling


@pytest.fixture(autouse=True)
def registry():
    """The two steps are registered for one test at a time: other tests list all steps."""
    before = dict(steps.STEPS)
    register("pirate")(Pirate)
    register("short")(Short)
    yield
    steps.STEPS.clear()
    steps.STEPS.update(before)


class Pirate(AskingStep):
    """Has every prompt answered by a pirate."""

    max_tokens: Annotated[int, Field(ge=1)] = 10

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        system = {"role": "system", "content": "You are a pirate."}
        sampling = Sampling(max_tokens=self.max_tokens)
        replies = yield from ask([context.request((system, *prompt_messages(sample)), sampling) for sample in pool])
        return [with_answer(sample, reply) for sample, reply in complete_replies(pool, replies, tally)]


class Short(LocalStep):
    """Keeps answers of at most `most` letters."""

    most: Annotated[int, Field(ge=1)] = 5

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        short = drop_if(self._reject, pool, tally)
        return [with_scores(sample, letters=len(answer_of(sample))) for sample in short]

    def _reject(self, sample):
        return ("too many letters", answer_of(sample)) if len(answer_of(sample)) > self.most else None


class Writer:
    identity = "scripted@1"

    def answers(self, requests, stop=lambda: False):
        for request in requests:
            prompt = request.messages[-1]["content"]
            yield request, Generated(None, f"arr {prompt}", "length" if prompt == "long" else "ok")


def pool_of(*texts):
    return [Sample(({"role": "user", "content": text},), "corpus", meta={"prompt_id": text}) for text in texts]


def run(entries, pool, folder):
    """(the last pool, the tally of each step)"""
    tallies = []
    with Store(folder / "store.sqlite") as store:
        engine = Engine(store, Writer, scorer=None, scorer_identity=None)
        for name, step in steps.steps_of(entries):
            tallies.append(Tally(name))
            pool = engine.run(step.run(pool, StepContext("scripted@1", 7, name), tallies[-1]))
    return pool, tallies


def test_a_new_step_that_asks_and_a_new_filter_run_from_a_recipe(tmp_path):
    entries = [Elicit(name="pirate", params={"max_tokens": 4}), Elicit(name="short", params={"most": 6})]
    pool, (asked, filtered) = run(entries, pool_of("a", "bc", "long", "def"), tmp_path)
    assert [(prompt_of(sample), answer_of(sample)) for sample in pool] == [("a", "arr a"), ("bc", "arr bc")]
    assert pool[0].meta["scores"] == {"letters": 5}
    assert asked.dropped == {"answer: length": 1} and filtered.dropped == {"too many letters": 1}


def test_defaults_stand_in_for_what_a_step_does_not_say():
    assert (Pirate.kind, Pirate.paper, Pirate.needs) == ("label", "", {"text"})
    assert (Short.kind, Short.paper, Short.needs) == ("select", "", frozenset())
    assert Pirate().estimate(100) == Estimate(100, 650, samples=100)
    assert Short().estimate(100) == Estimate(samples=100)


def test_a_new_step_is_listed_with_its_docstring_and_settings():
    listed = methods()["steps"]["short"]
    assert listed["what"] == "Keeps answers of at most `most` letters." and listed["settings"] == {"most": 5}


def test_wrong_entries_are_refused_with_their_place():
    with pytest.raises(RecipeError, match=r"elicit\[0\]: there is no step 'shor'; did you mean 'short'"):
        steps.steps_of([Elicit(name="shor")])
    with pytest.raises(RecipeError, match=r"elicit\[1\].short.most: "):
        steps.steps_of([Elicit(name="pirate"), Elicit(name="short", params={"most": 0})])


def test_a_name_is_given_once_and_a_step_says_what_it_does():
    with pytest.raises(ValueError, match="two steps 'short'"):
        register("short")(Pirate)
    with pytest.raises(ValueError, match="needs a docstring"):

        @register("silent")
        class Silent(LocalStep):
            def apply(self, pool, context, tally):
                return pool


def test_the_examples_of_the_documentation_run(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "elicitation.md"
    for name in ("pirate", "short"):
        del steps.STEPS[name]
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})
    entries = [Elicit(name="pirate"), Elicit(name="short", params={"most": 6})]
    pool, _ = run(entries, pool_of("a", "def"), tmp_path)
    assert [answer_of(sample) for sample in pool] == ["arr a"]
