"""The training and held-out text of a run: has each prompt answered once by its writers, then reads the store.

The prompts are the recipe's, or made from those by the steps under `elicit`, which may answer them too. Every prompt
goes to one writer (by their shares) or, if all shares are 1, to all of them; then the order of the writers is the order
of preference that ranking losses read. A corpus may have several answers, the best first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe
from limbeck.config.sections import Writer
from limbeck.elicit.bills import Bills
from limbeck.elicit.engine import (
    TEACHERS_PLACE,
    Engine,
    Speaker,
    StoppedEarlyError,
    elicit,
    in_its_place,
)
from limbeck.elicit.flow import Pool, StepContext, Tally
from limbeck.elicit.label import label
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.run import Elicitation, TextSource, corpus_sample, prompts_of
from limbeck.elicit.sharing import Reuse, Sharing
from limbeck.elicit.step import AskingStep, ElicitStep
from limbeck.elicit.text_models import TextModels
from limbeck.progress import Reporter, StoppedError
from limbeck.storage.answers import SharedAnswers
from limbeck.storage.store import Store
from limbeck.types import (
    MARGIN,
    PROBABILITY,
    STUDENTS,
    Message,
    Request,
    Sample,
    Sampling,
    UserError,
    content_hash,
)

OWN_FACTS = ("kind", "task", "weight", "finish", PROBABILITY, MARGIN)  # of a sample that a step wrote


@dataclass
class TrainingText:
    """Reads and fills `store.sqlite` in `folder`; steps of elicitation write their files to `home`. The answers of the
    teacher, and of models by their names, may be `shared` with other runs."""

    source: TextSource
    folder: Path
    home: Path
    models: TextModels
    reporter: Reporter
    stop: Callable[[], bool]
    shared: Callable[[str, Store], SharedAnswers | None] = lambda by, store: None

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    @property
    def given_prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """(the recipe's training prompts before elicitation, held-out prompts)."""
        return self.source.training_prompts, self.source.held_out_prompts

    @property
    def prompts(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """(training prompts, held-out prompts); the former as the steps of elicitation left them, if there are any."""
        training = self._elicited[0] if self.source.steps else self.source.training_prompts
        return training, self.source.held_out_prompts

    @property
    def elicitation(self) -> Elicitation:
        """The steps under `elicit`, over the training prompts."""
        models = self.models
        return Elicitation(
            self.source,
            self.home,
            models.writer_identity(TEACHER),
            models.header,
            unheld=models.unheld,
            named=models.writer_identity,
            reader=models.as_reader,
        )

    @cached_property
    def _elicited(self) -> tuple[list[Prompt], dict[str, list[Sample]]]:
        """The prompts that the steps under `elicit` left, and the answers to each by its id."""
        with Store(self.folder / "store.sqlite") as store:
            engine = self._engine(store, [step for _, step in self.source.steps], self._report_progress)
            try:
                return prompts_of(self.elicitation.run(engine, self.reporter.stage, self.reporter.note))
            except StoppedEarlyError as error:
                raise self._stopped(error.done, error.total) from None

    def judge(self, step: AskingStep, pool: Pool) -> Pool:
        """What a step of feedback makes of these samples, which the student wrote in its training; whom it asks is
        stored and billed as under `elicit`."""
        models = self.models
        context = StepContext(
            models.writer_identity(TEACHER),
            self.recipe.text_seed,
            "reward",
            named=models.writer_identity,
            reader=models.as_reader,
        )
        with Store(self.folder / "store.sqlite") as store:
            engine = self._engine(store, [step], lambda *_: None)
            try:
                return engine.run(step.run(pool, context, Tally("reward", len(pool))))
            except StoppedEarlyError as error:
                raise self._stopped(error.done, error.total) from None

    def _engine(self, store: Store, steps: Sequence[ElicitStep], report: Callable[..., None]) -> Engine:
        """What answers the questions of these steps; `report` is called with whom it asks, since when, and progress."""
        began = time.monotonic()

        def other(identity: str) -> Speaker | None:
            if identity == self.models.writer_identity(TEACHER):
                return None
            names = dict.fromkeys(name for step in steps for name in step.asks() if name != TEACHER)
            by = next(name for name in names if self.models.writer_identity(name) == identity)
            return Speaker(
                partial(self.models.writer, by),
                on_progress=partial(report, by, began),
                tolerate=self._tolerate(by),
                sharing=self._sharing(by, store),
                place=self._place(by),
            )

        return Engine(
            store,
            answerer=partial(self.models.writer, TEACHER),
            scorer=self.models.scorer,
            scorer_identity=self.models.scorer_identity,
            on_progress=partial(report, TEACHER, began),
            stop=self.stop,
            tolerate=self._tolerate(TEACHER),
            sharing=self._sharing(TEACHER, store),
            other=other,
        )

    def _tolerate(self, by: str) -> float:
        """The share of a model's answers that may fail or be malformed."""
        server = self.bills.server(by)
        return 0.0 if server is None else server.tolerate or 0.0

    def _without_untouched(self) -> list[Sample]:
        """The training text that does not come from the student; layers of a pruned student are chosen by it."""
        return self._samples([writer for writer in self.recipe.fixed_writers if writer.by not in STUDENTS])

    def training(self) -> list[Sample]:
        """All text written before the training, prompt by prompt, each prompt's answers in the order of preference."""
        self._without_untouched()  # first, since the initial student may depend on it
        return self._samples(self.recipe.fixed_writers)

    def questions(self, prompts: Sequence[Prompt]) -> list[Request]:
        """What the recipe's writers beside the student are asked for these prompts. Nothing is asked."""
        asked = [writer for writer in self.recipe.fixed_writers if writer.by not in ("corpus", "elicited", *STUDENTS)]
        turns = [(prompt, writer) for prompt in prompts for _, writer in self._turns(prompt) if writer in asked]
        return [self._request(prompt, writer.by, _sampling(writer)) for prompt, writer in turns]

    def by_others(self, limit: int | None = None) -> list[Sample]:
        """The text that is not the student's, for controls and for pruning. If only the student writes, the teacher's
        answers to the training prompts. Only the first `limit` samples or prompts."""
        if self.recipe.fixed_writers:
            return self._without_untouched()[:limit]
        writer = self.recipe.held_out_writer
        prompts = self.prompts[0][:limit]
        samples = self._ask([self._request(prompt, TEACHER, _sampling(writer)) for prompt in prompts], TEACHER)
        return [self._described(sample, prompt, TEACHER, 0) for prompt, sample in zip(prompts, samples, strict=True)]

    def held_out(self) -> list[Sample]:
        """The teacher's answers to the held-out prompts, asked and read as those of the training text are; without a
        teacher the data's own."""
        if self.source.holds_out_answers:
            return [corpus_sample(prompt, 0) for prompt in self.prompts[1]]
        requests = [self._shown(prompt, self.held_out_sampling()) for prompt in self.prompts[1]]
        step = self.source.step_prompt
        return [sample if step is None else step.reads(sample) for sample in self._ask(requests, TEACHER)]

    def held_out_pairs(self) -> list[Prompt]:
        """The held-out prompts, each with its answers, the preferred one first: the given ones, or where all writers
        answer every training prompt, those that they write to it. A prompt without its preferred answer has none."""
        prompts = self.prompts[1]
        if not self.recipe.all_answer:
            return list(prompts)
        answers: dict[str, list[Sample]] = {prompt.id: [] for prompt in prompts}
        for sample in self._samples(self.recipe.fixed_writers, prompts):
            if sample.teaches:
                answers[sample.meta["prompt_id"]].append(sample)
        found = []
        for prompt in prompts:
            said = answers[prompt.id] if any(sample.meta["place"] == 0 for sample in answers[prompt.id]) else []
            cut = (place for place, sample in enumerate(said) if sample.meta.get("finish") == "length")
            texts = tuple(sample.messages[-1]["content"] for sample in said)
            found.append(replace(prompt, answers=texts, cut=tuple(cut)))
        return found

    def said(self, prompts: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Sample]:
        """The teacher's answers to these (prompt, seed), in their order, for a measurement; the seed is added to the
        text's."""
        return self._ask(self._measured(prompts, sampling), TEACHER, measured=True)

    def usage_of_said(self, prompts: Sequence[tuple[Prompt, int]], sampling: Sampling) -> tuple[int, int, int]:
        """(answers, tokens read, tokens written) of what `said` returned, as far as the teacher's server counted."""
        return self.bills.usage_of([request.key for request in self._measured(prompts, sampling)])

    def _measured(self, prompts: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Request]:
        return [replace(request := self._shown(prompt, sampling), seed=request.seed + seed) for prompt, seed in prompts]

    def asked_of(self, by: str, conversations: Sequence[tuple[Message, ...]], sampling: Sampling) -> list[Sample]:
        """The replies of a named model to these conversations, in their order, for a measurement."""
        identity = self.models.writer_identity(by)
        return self._ask([Request(identity, messages, sampling, 0) for messages in conversations], by, measured=True)

    def held_out_sampling(self) -> Sampling:
        """The sampling of held-out text, that of the teacher's training text (see `Recipe.held_out_writer`)."""
        return _sampling(self.recipe.held_out_writer)

    @property
    def bills(self) -> Bills:
        """What servers were paid for so far."""
        return Bills(self.recipe, self.folder, self.models.writer_identity)

    def facts(self) -> dict[str, Any]:
        """Facts about the held-out text, for the evaluation."""
        samples = self.held_out()
        finishes = [str(sample.meta["finish"]) for sample in samples]
        counts = {"answers": sum(sample.teaches for sample in samples), "cut_off": finishes.count("length")}
        if self.source.holds_out_answers:
            return counts | {"writer": "corpus"}
        return counts | {"writer": TEACHER} | asdict(self.held_out_sampling())

    def _samples(self, writers: Sequence[Writer], prompts: Sequence[Prompt] | None = None) -> list[Sample]:
        """The answers of these writers to their prompts, by default those of the training; all requests to one model
        are sent together."""
        if not writers:
            return []
        turns = [
            (prompt, place, writer)
            for prompt in (self.prompts[0] if prompts is None else prompts)
            for place, writer in self._turns(prompt)
            if writer in writers
        ]
        by_key: dict[str, Sample] = {}
        for by in dict.fromkeys(writer.by for _, _, writer in turns if writer.by not in ("corpus", "elicited")):
            requests = [self._request(prompt, by, _sampling(writer)) for prompt, _, writer in turns if writer.by == by]
            by_key |= {request.key: sample for request, sample in zip(requests, self._ask(requests, by), strict=True)}
        samples: list[Sample] = []
        for prompt, place, writer in turns:
            if writer.by == "elicited":
                samples += [
                    self._elicited_sample(sample, prompt, place) for sample in self._elicited[1].get(prompt.id, ())
                ]
                continue
            if writer.by == "corpus":
                answers = [corpus_sample(prompt, rank) for rank in range(len(prompt.answers))]
            else:
                answers = [by_key[self._request(prompt, writer.by, _sampling(writer)).key]]
            samples += [self._described(sample, prompt, writer.by, place + rank) for rank, sample in enumerate(answers)]
        return samples

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
        """A sample of the pool with the facts of its prompt, and its own task and weight. Answers to one prompt are
        equally good, unless a step ranked them (`place`)."""
        own = {name: sample.meta[name] for name in OWN_FACTS if name in sample.meta}
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
        """(place in the order of preference, writer) of those that answer this prompt. By shares, the writer depends
        only on the seed and the prompt."""
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
        if by != TEACHER:
            return request
        return replace(request, shown=self.source.shown(request.messages, with_step=False))

    def _shown(self, prompt: Prompt, sampling: Sampling) -> Request:
        """A request to the teacher outside the training text, which shows it what a step showed it there, and holds it
        to the same form."""
        request = self._request(prompt, TEACHER, sampling)
        form = None if self.source.step_prompt is None else self.source.step_prompt.form
        if form is not None and self.models.unheld(form):
            form = None
        return replace(request, shown=self.source.shown(request.messages, with_step=True), form=form)

    def _ask(self, requests: Sequence[Request], by: str, measured: bool = False) -> list[Sample]:
        with Store(self.folder / "store.sqlite") as store:
            try:
                answers = elicit(
                    requests,
                    store,
                    partial(self.models.writer, by),
                    on_progress=partial(self._report_progress, by, time.monotonic()),
                    stop=self.stop,
                    tolerate=None if measured else self._tolerate(by),
                    sharing=self._sharing(by, store),
                )
            except UserError as error:
                raise in_its_place(error, self._place(by)) from error
        if len(answers) < len(requests):
            raise self._stopped(len(answers), len(requests))
        return answers

    def _place(self, by: str) -> str:
        """Where the recipe has the server of a model."""
        return f"models.{by}.server" if by in (self.recipe.models or {}) else TEACHERS_PLACE

    def _sharing(self, by: str, store: Store) -> Sharing | None:
        if by in STUDENTS:  # the student's text is its run's alone
            return None

        def wait(count: int) -> None:
            self.reporter.note(f"{count:,} answers are being asked for by another run: waiting for them")

        return Sharing(open=partial(self.shared, by, store), tell=partial(self._tell_reuse, by), wait=wait)

    def _tell_reuse(self, by: str, reuse: Reuse) -> None:
        cost = "written then"
        if self.bills.server(by) is not None:
            money = self.bills.price(reuse.read, reuse.written, by)
            cost = f"paid then: {reuse.read:,} tokens read, {reuse.written:,} written"
            cost += "" if money is None else f", {money:.4g} by today's price"
        self.reporter.note(f"{reuse.answers:,} of {reuse.needed:,} answers are taken from earlier runs ({cost})")

    def _report_progress(self, by: str, began: float, done: int, total: int, tokens: int) -> None:
        rate = tokens / max(1e-9, time.monotonic() - began)
        text = f"{by}: {tokens:,} tokens, {rate:.0f} a second" if tokens else ""
        money = None if by in STUDENTS else self.bills.money(by)
        self.reporter.progress(done, total, text if money is None or not text else f"{text}, {money:.4g} spent")

    def _stopped(self, done: int, total: int) -> StoppedError:
        return StoppedError(f"stopped; {done} of {total} answers are kept in {self.folder}, run it again to go on")


def _sampling(writer: Writer) -> Sampling:
    return Sampling(writer.temperature, writer.top_p, writer.max_tokens)
