"""The text of a run: who answers which prompt, asked for once, read back ever after.

The prompts are given, or made of given ones by the steps under `elicit`, which may answer them, too. Every prompt goes
to one writer (by their shares) or, where all shares are 1, to all of them; then the order of the writers is the order
of preference that ranking losses read. A corpus may bring several answers, the best first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from limbeck.config.recipe import Recipe
from limbeck.config.sections import Writer
from limbeck.elicit.engine import Answerer, Engine, LikelihoodScorer, StoppedEarlyError, elicit
from limbeck.elicit.label import label
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.run import Elicitation, TextSource, prompts_of
from limbeck.progress import Reporter, StoppedError
from limbeck.storage.store import Store
from limbeck.types import Request, Sample, Sampling, content_hash


class TextModels(Protocol):
    """The models of a run, by the names that writers and steps give them; each is loaded when first called for."""

    def writer(self, name: str, /) -> Answerer:
        """Who writes as `teacher` or `untouched`."""

    def writer_identity(self, name: str, /) -> str:
        """What request keys call that writer."""

    def scorer(self, by: str, /) -> LikelihoodScorer:
        """Who says how likely a text is: the teacher (""), `untouched`, or a model by its source."""

    def scorer_identity(self, by: str, /) -> str:
        """What stored scores call that scorer."""

    def header(self) -> str | None:
        """The text before a user's message in the teacher's own format."""


@dataclass
class TrainingText:
    """Reads and fills `store.sqlite` in `folder`; what steps of elicitation make of it goes to `home`."""

    source: TextSource
    folder: Path
    home: Path
    models: TextModels
    reporter: Reporter
    stop: Callable[[], bool]

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    @property
    def given_prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """(training prompts as they are given, held-out prompts)."""
        return self.source.training_prompts, self.source.held_out_prompts

    @property
    def prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """(training prompts, held-out prompts); where there are steps of elicitation, what they made of the training
        prompts."""
        training = self._elicited[0] if self.source.steps else self.source.training_prompts
        return training, self.source.held_out_prompts

    @cached_property
    def _elicited(self) -> tuple[list[Prompt], dict[str, list[Sample]]]:
        """The prompts that the steps under `elicit` left, and the answers to each by its id."""
        work = Elicitation(self.source, self.home, self.models.writer_identity("teacher"), self.models.header)
        began = time.monotonic()
        with Store(self.folder / "store.sqlite") as store:
            engine = Engine(
                store,
                answerer=partial(self.models.writer, "teacher"),
                scorer=self.models.scorer,
                scorer_identity=self.models.scorer_identity,
                on_progress=partial(self._tell, "teacher", began),
                stop=self.stop,
            )
            try:
                return prompts_of(work.run(engine, self.reporter.stage, self.reporter.note))
            except StoppedEarlyError as error:
                raise self._stopped(error.done, error.total) from None

    def given(self) -> list[Sample]:
        """The training text that does not come from the student: what a student's start may be chosen by."""
        return self._samples([writer for writer in self.recipe.fixed_writers if writer.by != "untouched"])

    def training(self) -> list[Sample]:
        """All text that is there before the training, prompt by prompt, each prompt's answers in the order of
        preference."""
        self.given()  # first, since the student's start may depend on it
        return self._samples(self.recipe.fixed_writers)

    def by_others(self, limit: int | None = None) -> list[Sample]:
        """The text of others, which the controls and a student's start are made from: where only the student writes,
        what the teacher answers to the training prompts (the first `limit` of them)."""
        if self.recipe.fixed_writers:
            return self.given()[:limit]
        writer = self.recipe.held_out_writer
        prompts = self.prompts[0][:limit]
        samples = self._ask([self._request(prompt, "teacher", _sampling(writer)) for prompt in prompts], "teacher")
        return [self._described(sample, prompt, "teacher", 0) for prompt, sample in zip(prompts, samples, strict=True)]

    def held_out(self) -> list[Sample]:
        """The teacher's answers to the held-out prompts."""
        return self.said([(prompt, 0) for prompt in self.prompts[1]], self.held_out_sampling())

    def said(self, asked: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Sample]:
        """What the teacher says to these (prompt, seed), in their order; seed 0 is the text's own."""
        requests = [
            replace(request := self._request(prompt, "teacher", sampling), seed=request.seed + seed)
            for prompt, seed in asked
        ]
        return self._ask(requests, "teacher")

    def held_out_sampling(self) -> Sampling:
        """How held-out text is drawn: as the teacher's training text (see `Recipe.held_out_writer`)."""
        return _sampling(self.recipe.held_out_writer)

    def bill(self) -> tuple[int, int, int]:
        """Answers that the teacher's server was paid for, and the tokens read and written for them."""
        with Store(self.folder / "store.sqlite") as store:
            return store.bill(self.models.writer_identity("teacher"))

    def money(self) -> float | None:
        """What the answers cost so far by the recipe's price; None without one."""
        server = self.recipe.teacher.server
        if server is None or server.price is None:
            return None
        _, read, written = self.bill()
        return (read * server.price.input + written * server.price.output) / 1e6

    def facts(self) -> dict[str, Any]:
        """How the held-out text came about, for the evaluation."""
        samples = self.held_out()
        finishes = [str(sample.meta["finish"]) for sample in samples]
        counts = {
            "answers": len(samples) - finishes.count("empty"),
            "writer": "teacher",
            "cut_off": finishes.count("length"),
        }
        return counts | asdict(self.held_out_sampling())

    def _samples(self, wanted: Sequence[Writer]) -> list[Sample]:
        """The answers of these writers to their training prompts; all requests to one model go out together."""
        if not wanted:
            return []
        turns = [
            (prompt, place, writer)
            for prompt in self.prompts[0]
            for place, writer in self._turns(prompt)
            if writer in wanted
        ]
        answered: dict[str, Sample] = {}
        for by in dict.fromkeys(writer.by for _, _, writer in turns if writer.by not in ("corpus", "elicited")):
            requests = [self._request(prompt, by, _sampling(writer)) for prompt, _, writer in turns if writer.by == by]
            answered |= {request.key: sample for request, sample in zip(requests, self._ask(requests, by), strict=True)}
        found = []
        for prompt, place, writer in turns:
            if writer.by == "elicited":
                found += [
                    self._elicited_sample(sample, prompt, place) for sample in self._elicited[1].get(prompt.id, ())
                ]
                continue
            if writer.by == "corpus":
                samples = [_corpus_sample(prompt, answer) for answer in prompt.answers]
            else:
                samples = [answered[self._request(prompt, writer.by, _sampling(writer)).key]]
            found += [self._described(sample, prompt, writer.by, place + rank) for rank, sample in enumerate(samples)]
        return found

    @staticmethod
    def _described(sample: Sample, prompt: Prompt, by: str, place: int) -> Sample:
        facts = {
            "prompt_id": prompt.id,
            "kind": prompt.kind,
            "writer": by,
            "task": prompt.task,
            "weight": prompt.weight,
        }
        return replace(sample, meta=sample.meta | facts | {"place": place})

    @staticmethod
    def _elicited_sample(sample: Sample, prompt: Prompt, place: int) -> Sample:
        """A sample of the pool with what is known of its prompt, and its own task and weight. Answers to one prompt are
        equals, unless a step said which is preferred (`place`)."""
        own = {name: sample.meta[name] for name in ("kind", "task", "weight", "finish") if name in sample.meta}
        facts = {
            "prompt_id": prompt.id,
            "kind": prompt.kind,
            "writer": "elicited",
            "task": "",
            "weight": 1.0,
            "finish": "ok",
        } | own
        return replace(sample, meta=facts | {"place": place + int(sample.meta.get("place", 0))})

    def _turns(self, prompt: Prompt) -> list[tuple[int, Writer]]:
        """(place in the order of preference, writer) of those that answer this prompt. A share's draw depends on seed
        and prompt alone."""
        writers = self.recipe.fixed_writers
        if self.recipe.all_answer:
            places = {writer: place for place, writer in enumerate(self.recipe.writer)}
            return [(places[writer] * len(prompt.answers or (1,)), writer) for writer in writers]
        point = int(content_hash([self.recipe.text_seed, prompt.id])[:13], 16) / 16**13
        for writer in writers:
            point -= writer.fixed_share
            if point < 0:
                break
        return [(0, writer)]

    def _request(self, prompt: Prompt, by: str, sampling: Sampling) -> Request:
        (request,) = label([prompt], self.models.writer_identity(by), sampling, self.recipe.text_seed)
        return request

    def _ask(self, requests: Sequence[Request], by: str) -> list[Sample]:
        with Store(self.folder / "store.sqlite") as store:
            answers = elicit(
                requests,
                store,
                partial(self.models.writer, by),
                on_progress=partial(self._tell, by, time.monotonic()),
                stop=self.stop,
            )
        if len(answers) < len(requests):
            raise self._stopped(len(answers), len(requests))
        return answers

    def _tell(self, by: str, began: float, done: int, total: int, tokens: int) -> None:
        rate = tokens / max(1e-9, time.monotonic() - began)
        told = f"{by}: {tokens:,} tokens, {rate:.0f} a second" if tokens else ""
        money = self.money() if by == "teacher" else None
        self.reporter.progress(done, total, told if money is None or not told else f"{told}, {money:.4g} spent")

    def _stopped(self, there: int, wanted: int) -> StoppedError:
        return StoppedError(f"stopped; {there} of {wanted} answers are kept in {self.folder}, run it again to go on")


def _sampling(writer: Writer) -> Sampling:
    return Sampling(writer.temperature, writer.top_p, writer.max_tokens)


def _corpus_sample(prompt: Prompt, answer: str) -> Sample:
    return Sample((*prompt.messages, {"role": "assistant", "content": answer}), "corpus", meta={"finish": "ok"})
