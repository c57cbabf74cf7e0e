"""What a run says and keeps before its training: what its folder is bound to, the devices that it takes, what it read
from the files of prompts, and how the answers that it has ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe
from limbeck.evaluate.efficiency import system_load
from limbeck.models.fingerprint import NAMING
from limbeck.models.load import is_ready, model_contents, model_identity
from limbeck.models.scores import scorer_identity
from limbeck.models.template_names import template_suffix
from limbeck.objectives.sizes import SIZES
from limbeck.progress import Reporter
from limbeck.runs.answers import keep_for_others
from limbeck.runs.claim import HELD_OUT, START, WHOLE, claim
from limbeck.runs.fit import fitted
from limbeck.runs.models import RunModels
from limbeck.runs.named import input_name
from limbeck.runs.resolve import Method, resolve
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import read_json
from limbeck.types import ANSWER_ENDS, TAUGHT_FINISHES, NothingLeftError, Sample, content_hash


def inputs_of(method: Method, models: RunModels) -> dict[str, str]:
    """What a run is made from beside its recipe, by name: identities of models and hashes of prompts."""
    recipe = method.recipe
    facts = {"teacher": models.teacher_identity, "prompts": method.training_prompts_key}
    facts[HELD_OUT] = method.held_out_prompts_key
    if recipe.student.template is not None:
        facts["student's template"] = template_suffix(recipe.student.template)
    start = recipe.student.start.pretrained
    if start is not None and is_ready(start):
        facts[START] = model_identity(start, template=recipe.student.template)
    if method.rewards is not None and method.rewards.models:
        facts["reward models"] = " ".join(map(scorer_identity, method.rewards.models))
    if recipe.teacher.server is not None:
        facts["server"] = models.server_identity
    judges = () if method.rewards is None else method.rewards.judges
    steps = [step for _, step in (*method.steps, *judges)]
    asked = {name for step in steps for name in step.asks() if name in models.named}
    facts |= {input_name(name): models.named.identity(name) for name in sorted(asked)}
    if NAMING.by_edges:
        named = [models.named.settings(name).model for name in sorted(asked)]
        sources = [recipe.teacher.model, *named]
        facts[WHOLE] = content_hash([model_contents(str(source)) for source in sources if source is not None])
    return facts


def bind(folder: Path, method: Method, models: RunModels, reporter: Reporter) -> None:
    """Bind the folder of a run to its recipe, prompts and teacher, or refuse that of another run."""
    recipe = method.recipe

    def older(earlier: Recipe) -> tuple[str, str]:
        before = fitted(resolve(earlier))
        return before.prompts_key, before.training_prompts_key

    kept = partial(keep_for_others, folder, now=recipe)
    claim(folder, recipe, partial(inputs_of, method, models), models.probe_server, older=older, kept=kept)
    settle(folder, recipe.machine, models.devices.facts(), reporter)


def tell_prompts(folder: Path, notes: Sequence[str], reporter: Reporter) -> None:
    """Say what was read from each file of prompts, and keep it for the page."""
    record = {"notes": list(notes)}
    if notes and read_json(folder / "prompts.json") != record:
        write_json(folder / "prompts.json", record)
    for note in notes:
        reporter.note(note)


def tell_answers(folder: Path, parts: Mapping[str, Sequence[Sample]], reporter: Reporter) -> None:
    """Say how many answers of each part of the text teach nothing, and keep how all of them ended for the page.

    Raises:
        NothingLeftError: no answer of a part can be used.
    """
    record = {}
    for part, samples in parts.items():
        ends = Counter(sample.meta.get("finish", "ok") for sample in samples)
        record[part] = {finish: ends[finish] for finish in ANSWER_ENDS if ends[finish]}
        if useless := {ANSWER_ENDS[end]: count for end, count in record[part].items() if end not in TAUGHT_FINISHES}:
            counts = ", ".join(f"{count:,} {words}" for words, count in useless.items())
            reporter.note(f"{part}: {sum(useless.values()):,} of {len(samples):,} answers are left out ({counts})")
        if 2 * (cut := ends["length"]) > len(samples):
            reporter.note(
                f"{part}: {cut:,} of {len(samples):,} answers were cut off by max_tokens, so few show how an answer"
                " ends: raise max_tokens of the writer (or step), or ask for shorter ones"
            )
    if record and read_json(folder / "answers.json") != record:
        write_json(folder / "answers.json", record)
    for part, samples in parts.items():
        if samples and not any(sample.teaches for sample in samples):
            counts = ", ".join(f"{count:,} {ANSWER_ENDS[end]}" for end, count in record[part].items())
            raise NothingLeftError(f"{part}: of {len(samples):,} answers none can be used ({counts}); see store.sqlite")


def settle(folder: Path, machine: Machine, facts: Mapping[str, str], reporter: Reporter) -> None:
    """Take the devices and sizes of the recipe's `machine`, say so, and record them."""
    take_sizes(machine)
    if machine.device == "auto" or len(set(facts.values())) > 1:
        teacher = "" if facts["teacher_device"] == facts["device"] else f", teachers on {facts['teacher_device']}"
        reporter.note(f"running on {facts['device']}{teacher}")
    record = {**facts, "settings": machine.model_dump(exclude_none=True)}
    if read_json(folder / "machine.json") != record:
        write_json(folder / "machine.json", record)


def take_sizes(machine: Machine) -> None:
    """Take the sizes of the recipe's `machine`."""
    SIZES.head_bytes = None if machine.head_mib is None else int(machine.head_mib * 2**20)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    SIZES.cache_bytes = None if machine.cache_gib is None else int(machine.cache_gib * 2**30)


def crowd_advice(threads: int, running: float | None, cores: int) -> str:
    """What to do where others keep all cores busy and as many threads of ours would wait for each other; empty if
    nothing is."""
    if running is None or running <= cores or threads < max(2, cores):
        return ""
    return (
        f"the machine is busy: a load of {running:.1f} on {cores} cores, where {threads} threads that wait for each"
        " other can take many times as long as one; --set machine.threads=1 (or OMP_NUM_THREADS=1) is often faster"
    )


def begin(folder: Path, estimate: Mapping[str, Any], device: str, reporter: Reporter) -> None:
    """Keep what the run was estimated to cost, once, to be held against what it did cost; advise on threads before any
    work of our own adds to the load."""
    if not (folder / "plan.json").exists():
        write_json(folder / "plan.json", dict(estimate))
    if device == "cpu" and (advice := crowd_advice(torch.get_num_threads(), system_load(), os.cpu_count() or 1)):
        reporter.note(advice)
