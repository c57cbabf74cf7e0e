"""Runs the steps of a recipe's `elicit:` in order, from the prompts to the samples that the student is trained on.

Writes `elicited.jsonl` (the samples, one a line) and `elicitation.json` (samples in and out of each step, and why some
were dropped) into the run folder. Both depend only on the recipe, the prompts and the answers in the store; a finished
elicitation is read back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe
from limbeck.elicit.engine import Engine
from limbeck.elicit.flow import Pool, Reader, Show, StepContext, Tally, answer_of, prompt_messages, prompt_of
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.step import ElicitStep
from limbeck.elicit.step_prompt import StepPrompt
from limbeck.storage.files import read_from, read_jsonl, read_object, write_json, write_text
from limbeck.types import STUDENTS, AnswerForm, Message, NothingLeftError, Sample, canonical_json, content_hash

POOL = "elicited.jsonl"
ACCOUNT = "elicitation.json"
HELD_OUT = "held-out"  # the name, in the account, of the last step: dropping held-out prompts


@dataclass(frozen=True)
class TextSource:
    """What a recipe's text is made from: prompts, and the steps of elicitation by name.

    Args:
        show: turns a conversation into the one that the teacher's server is sent, where that is another.
        step_prompt: what a step shows the teacher, and held-out text and measurements show it, too.
        holds_out_answers: whether the held-out text is the prompts' own answers, and not the teacher's.
    """

    recipe: Recipe
    steps: Sequence[tuple[str, ElicitStep]]
    training_prompts: Sequence[Prompt]
    held_out_prompts: Sequence[Prompt]
    show: Show | None = None
    step_prompt: StepPrompt | None = None
    holds_out_answers: bool = False

    def shown(self, messages: tuple[Message, ...], with_step: bool) -> tuple[Message, ...] | None:
        """What the teacher is sent for this conversation, `with_step` as the step shows it; None if it is the same."""
        shown = messages
        if with_step and self.step_prompt is not None:
            shown = self.step_prompt(shown)
        if self.show is not None:
            shown = self.show(shown)
        return None if shown == messages else shown


@dataclass(frozen=True)
class Elicitation:
    """The steps of elicitation of one recipe over its prompts.

    Args:
        folder: receives the samples and the account of what each step did.
        identity: of the teacher.
        header: returns the text before a user's message in that model's own format; called only if a step needs it.
        unheld: says why that model can't be held to a form of answers, and nothing if it can.
        named: returns the identity of another model that the recipe names.
        reader: returns what is known of a model as a reader, by its name.
    """

    source: TextSource
    folder: Path
    identity: str
    header: Callable[[], str | None]
    unheld: Callable[[AnswerForm], str] = lambda form: "nothing is known of its forms"
    named: Callable[[str], str] = str
    reader: Callable[[str], Reader] = lambda by: Reader()

    @property
    def others(self) -> dict[str, str]:
        """The identities of the models that the steps ask beside the teacher, by name."""
        names = {name for _, step in self.source.steps for name in step.asks()} - {TEACHER}
        return {name: self.named(name) for name in sorted(names) if name not in STUDENTS}

    @property
    def key(self) -> str:
        """A hash of all that the result depends on, except the answers and the held-out prompts: with others, finished
        samples stay what the student is trained on, and the evaluation leaves out what they give away."""
        return self._key([self.source.training_prompts])

    def _key(self, parts: Sequence[Sequence[Prompt]]) -> str:
        steps = [step.model_dump(mode="json") for step in self.source.recipe.elicit or ()]
        facts = [[prompt.facts for prompt in part] for part in parts]
        others = [self.others] if self.others else []
        return content_hash([steps, facts, self.source.recipe.text_seed, self.identity, *others])

    def finished(self) -> Pool | None:
        """The samples of a finished elicitation; None if there is none in the folder."""
        account = self.folder / ACCOUNT
        if not account.exists():
            return None
        older = self._key([self.source.training_prompts, self.source.held_out_prompts])
        with read_from(self.folder):
            if read_object(account).get("key") not in (self.key, older):
                return None
            return [_sample(record) for record in read_jsonl(self.folder / POOL)]

    def run(
        self,
        engine: Engine,
        on_start: Callable[[str], None] = lambda step: None,
        on_done: Callable[[str], None] = lambda text: None,
    ) -> Pool:
        """Run all steps, unless they are finished. Returns the samples.

        Args:
            on_start: called with the name of each step before it starts.
            on_done: called with a summary of each step after it.

        Raises:
            NothingLeftError: nothing is left to train on.
        """
        if (finished := self.finished()) is not None:
            if not finished:
                raise self._nothing_left(read_object(self.folder / ACCOUNT)["steps"])
            return finished
        pool = given = [prompt_sample(prompt) for prompt in self.source.training_prompts]
        tallies = []
        for index, (name, step) in enumerate(self.source.steps):
            on_start(name)
            tally = Tally(name, taken=len(pool))
            finishes_before = engine.finishes.copy()
            header = self.header() if "raw" in step.needs else None
            context = StepContext(
                self.identity,
                self.source.recipe.text_seed,
                f"{index}/{name}",
                header,
                unheld=self.unheld,
                show=self.source.show,
                named=self.named,
                reader=self.reader,
                given=given,
            )
            pool = engine.run(step.run(pool, context, tally))
            tally.given = len(pool)
            tallies.append((step.kind, tally, engine.finishes - finishes_before))
            on_done(_summary(tally))
        pool, last = self._without_held_out(pool)
        if last.dropped:
            tallies.append(("select", last, engine.finishes - engine.finishes))
        steps = [
            {**_facts(tally), "kind": kind, "answers": dict(sorted(finishes.items()))}
            for kind, tally, finishes in tallies
        ]
        write_text(self.folder / POOL, "".join(canonical_json(_record(sample)) + "\n" for sample in pool))
        account = {"key": self.key, "writer": self.identity, "steps": steps}
        write_json(self.folder / ACCOUNT, account | ({"models": self.others} if self.others else {}))
        if not pool:
            raise self._nothing_left(steps)
        return pool

    def _nothing_left(self, steps: Sequence[dict[str, Any]]) -> NothingLeftError:
        """The error that says what each step left out."""
        dropped = [
            f"{step['step']}: {reason} ({count})"
            for step in steps
            for reason, count in Counter(step["dropped"]).most_common(2)
        ]
        return NothingLeftError(
            f"the steps under elicit left no sample ({'; '.join(dropped)}); see {self.folder / ACCOUNT} for what each"
            " one left out"
        )

    def _without_held_out(self, pool: Pool) -> tuple[Pool, Tally]:
        """The pool without samples whose prompt is a held-out one, up to case and white space; and the tally."""
        held_out = {_plain(prompt.spoken) for prompt in self.source.held_out_prompts}
        tally = Tally(HELD_OUT, taken=len(pool))
        remaining = []
        for sample in pool:
            if not held_out.isdisjoint({_plain(prompt_of(sample)), _plain(_spoken(sample))}):
                tally.drop("asks a held-out prompt", prompt_of(sample))
            else:
                remaining.append(sample)
        tally.given = len(remaining)
        return remaining, tally


def prompts_of(pool: Pool) -> tuple[list[Prompt], dict[str, list[Sample]]]:
    """(the prompts of a pool, each once; the samples with an answer by prompt id). Samples with one `prompt_id` but
    different messages are different prompts."""
    prompts: dict[str, Prompt] = {}
    answers: dict[str, list[Sample]] = {}
    ids: dict[str, str] = {}  # by the hash of the messages
    for sample in pool:
        messages_hash = content_hash(list(prompt_messages(sample)))
        if messages_hash not in ids:
            meta = sample.meta
            prompt_id = str(meta.get("prompt_id", messages_hash[:16]))
            prompt_id = prompt_id if prompt_id not in prompts else f"{prompt_id}/{messages_hash[:8]}"
            ids[messages_hash] = prompt_id
            messages = prompt_messages(sample)
            last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
            prompts[prompt_id] = Prompt(
                prompt_id,
                prompt_of(sample),
                kind=str(meta.get("kind", "")),
                check=meta.get("check"),
                task=str(meta.get("task", "")),
                weight=float(meta.get("weight", 1.0)),
                before=messages[:last],
                after=messages[last + 1 :],
            )
        if answer_of(sample) is not None:
            answers.setdefault(ids[messages_hash], []).append(sample)
    return list(prompts.values()), answers


def _summary(tally: Tally) -> str:
    dropped = "; ".join(f"{count:,} {reason}" for reason, count in tally.dropped.most_common(3))
    more = ", and others" if len(tally.dropped) > 3 else ""
    return (
        f"{tally.step}: {tally.taken:,} in, {tally.given:,} out"
        + (f" (left out: {dropped}{more})" if dropped else "")
        + "".join(f"; {note}" for note in tally.notes)
    )


def _spoken(sample: Sample) -> str:
    """All that is said before the answer, as in `Prompt.spoken`."""
    messages = prompt_messages(sample)
    return "\n\n".join(message["content"] for message in messages if message["role"] not in ("system", "tools"))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def prompt_sample(prompt: Prompt) -> Sample:
    """The prompt as the first step gets it."""
    facts = {
        "kind": prompt.kind,
        "task": prompt.task,
        "weight": prompt.weight,
        "check": prompt.check,
        "answers": list(prompt.answers),
        "cut": list(prompt.cut),
        "untrained": [prompt.messages[place]["content"] for place in prompt.untrained],
        "row": dict(prompt.row),
    }
    return Sample(
        prompt.messages,
        "corpus",
        meta={"prompt_id": prompt.id} | {name: value for name, value in facts.items() if value},
    )


def corpus_sample(prompt: Prompt, rank: int) -> Sample:
    """A prompt with its own answer of this rank."""
    message = {"role": "assistant", "content": prompt.answers[rank]}
    finish = "length" if rank in prompt.cut else "ok"
    return Sample((*prompt.messages, message), "corpus", meta={"finish": finish, **dict(prompt.labels)})


def _facts(tally: Tally) -> dict[str, Any]:
    facts = asdict(tally)
    if not tally.notes:
        del facts["notes"]  # as in older files
    return facts | {"dropped": dict(sorted(tally.dropped.items())), "facts": dict(sorted(tally.facts.items()))}


def _record(sample: Sample) -> dict[str, Any]:
    ids = None if sample.response_ids is None else list(sample.response_ids)
    return {
        "id": sample.id,
        "messages": list(sample.messages),
        "writer": sample.writer,
        "parents": list(sample.parents),
        "meta": sample.meta,
        "response_ids": ids,
    }


def _sample(record: dict[str, Any]) -> Sample:
    ids = record["response_ids"]
    messages = tuple(record["messages"])
    parents = tuple(record["parents"])
    return Sample(
        messages,
        record["writer"],
        response_ids=None if ids is None else tuple(ids),
        parents=parents,
        meta=record["meta"],
    )
