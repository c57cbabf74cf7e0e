"""The steps of a recipe's `elicit:` in order, from the given prompts to the samples that the student is trained on.

A run folder gets `elicited.jsonl` (the samples, one a line) and `elicitation.json` (what each step took, gave and left
out, and why). Both are a function of the recipe, the prompts and the answers in the store, whoever answered first; a
finished elicitation is read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.config.recipe import Recipe
from limbeck.elicit.engine import Engine
from limbeck.elicit.flow import Pool, StepContext, Tally, answer_of, prompt_messages, prompt_of
from limbeck.elicit.prompts import Prompt
from limbeck.runs import build
from limbeck.storage.files import read_jsonl, write_json, write_text
from limbeck.types import Sample, UserError, canonical_json, content_hash

POOL = "elicited.jsonl"
ACCOUNT = "elicitation.json"
HELD_OUT = "held-out"  # what the last look, for held-out prompts among the samples, is called in the account


@dataclass(frozen=True)
class Elicitation:
    """What has to be done, and where it is kept.

    Args:
        held_out: prompts that must not be trained on.
        header: the text before a user's message in the writer's own format, asked for only where a step needs it.
    """

    recipe: Recipe
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    folder: Path
    identity: str
    header: Callable[[], str | None]

    @property
    def key(self) -> str:
        """What the result depends on beside the answers."""
        steps = [step.model_dump(mode="json") for step in self.recipe.elicit or ()]
        parts = [[prompt.facts for prompt in part] for part in (self.prompts, self.held_out)]
        return content_hash([steps, parts, self.recipe.text_seed, self.identity])

    def known(self) -> Pool | None:
        """The samples of a finished elicitation."""
        account = self.folder / ACCOUNT
        if not account.exists() or json.loads(account.read_text()).get("key") != self.key:
            return None
        return [_sample(record) for record in read_jsonl(self.folder / POOL)]

    def run(
        self,
        engine: Engine,
        begin: Callable[[str], None] = lambda step: None,
        told: Callable[[str], None] = lambda text: None,
    ) -> Pool:
        """All steps, unless they are done.

        Args:
            begin, told: hear each step's name before it starts, and what it did.

        Raises:
            UserError: nothing is left to train on.
        """
        if (known := self.known()) is not None:
            return known
        pool = [_prompt_sample(prompt) for prompt in self.prompts]
        tallies = []
        for index, (name, step) in enumerate(build.steps(self.recipe)):
            begin(name)
            tally = Tally(name, taken=len(pool))
            before = engine.finishes.copy()
            header = self.header() if "raw" in step.needs else None
            pool = engine.run(
                step.run(pool, StepContext(self.identity, self.recipe.text_seed, f"{index}/{name}", header), tally)
            )
            tally.given = len(pool)
            tallies.append((step.kind, tally, engine.finishes - before))
            told(_in_words(tally))
        pool, last = self._without_held_out(pool)
        if last.dropped:
            tallies.append(("select", last, engine.finishes - engine.finishes))
        steps = [
            {**_facts(tally), "kind": kind, "answers": dict(sorted(finishes.items()))}
            for kind, tally, finishes in tallies
        ]
        write_text(self.folder / POOL, "".join(canonical_json(_record(sample)) + "\n" for sample in pool))
        write_json(self.folder / ACCOUNT, {"key": self.key, "writer": self.identity, "steps": steps})
        if not pool:
            lost = [
                f"{tally.step}: {reason} ({count})"
                for _, tally, _ in tallies
                for reason, count in tally.dropped.most_common(2)
            ]
            raise UserError(
                f"the steps under elicit left no sample ({'; '.join(lost)}); see {self.folder / ACCOUNT} for what each"
                " one left out"
            )
        return pool

    def _without_held_out(self, pool: Pool) -> tuple[Pool, Tally]:
        """The pool without samples that ask a held-out prompt's very words."""
        asked = {_plain(prompt.text) for prompt in self.held_out}
        tally = Tally(HELD_OUT, taken=len(pool))
        kept = []
        for sample in pool:
            if _plain(prompt_of(sample)) in asked:
                tally.drop("asks a held-out prompt", prompt_of(sample))
            else:
                kept.append(sample)
        tally.given = len(kept)
        return kept, tally


def prompts_of(pool: Pool) -> tuple[list[Prompt], dict[str, list[Sample]]]:
    """(the prompts of a pool, each once, and the answered samples of each by its id). Where samples of one `prompt_id`
    ask different things, they are different prompts."""
    prompts: dict[str, Prompt] = {}
    answers: dict[str, list[Sample]] = {}
    names: dict[str, str] = {}
    for sample in pool:
        asked = content_hash(list(prompt_messages(sample)))
        if asked not in names:
            wanted = str(sample.meta.get("prompt_id", asked[:16]))
            names[asked] = wanted if wanted not in prompts else f"{wanted}/{asked[:8]}"
            meta = sample.meta
            before = prompt_messages(sample)[:-1]
            prompts[names[asked]] = Prompt(
                names[asked],
                prompt_of(sample),
                str(meta.get("kind", "")),
                (),
                meta.get("check"),
                str(meta.get("task", "")),
                float(meta.get("weight", 1.0)),
                before=before,
            )
        if answer_of(sample) is not None:
            answers.setdefault(names[asked], []).append(sample)
    return list(prompts.values()), answers


def _in_words(tally: Tally) -> str:
    lost = "; ".join(f"{count:,} {reason}" for reason, count in tally.dropped.most_common(3))
    more = ", and others" if len(tally.dropped) > 3 else ""
    return f"{tally.step}: {tally.taken:,} in, {tally.given:,} out" + (f" (left out: {lost}{more})" if lost else "")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _prompt_sample(prompt: Prompt) -> Sample:
    facts = {
        "kind": prompt.kind,
        "task": prompt.task,
        "weight": prompt.weight,
        "check": prompt.check,
        "answers": list(prompt.answers),
    }
    return Sample(
        prompt.messages,
        "corpus",
        meta={"prompt_id": prompt.id} | {name: value for name, value in facts.items() if value},
    )


def _facts(tally: Tally) -> dict[str, Any]:
    facts = asdict(tally)
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
    return Sample(messages, record["writer"], None if ids is None else tuple(ids), parents, record["meta"])
