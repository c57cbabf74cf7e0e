"""Blocks of what rewards, judges and workers came to, from what their benchmarks wrote into docs/evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evidence import EVIDENCE
from .table import table

ONE_WORD, JUDGES, WORKERS, REWARDS, GRPO = (
    EVIDENCE / f"{name}.json" for name in ("one-word", "judges", "workers", "rewards", "grpo")
)

TRUST = ("swap_consistency", "first_position_share", "unparsable_share")


def one_word() -> str:
    """GRPO and RFT on an exact format, by seed."""
    if not ONE_WORD.is_file():
        return "Not measured yet: `make evidence-one-word`."
    found = json.loads(ONE_WORD.read_text(encoding="utf-8"))
    rows = [
        [
            method.upper(),
            seed,
            _interval(facts["passed"]["untouched"]),
            _interval(facts["passed"]["student"]),
            f"{facts['distinct']['untouched']} → {facts['distinct']['student']}",
            f"{facts['trained_tokens']:,}",
        ]
        for method, seeds in found["methods"].items()
        for seed, facts in sorted(seeds.items())
    ]
    titles = ["method", "seed", "passed before", "passed after", "different answers", "trained tokens"]
    size = found["size"]
    return (
        f"“{found['task']}”, for {size['questions']} kinds of things to learn from and {found['held_out']} held out:"
        f" {size['steps']} steps, {size['prompts']} questions with {size['group']} answers each, learning rate"
        f" {size['lr']:g}. Shares with 95 % bootstrap intervals over the held-out items"
        f" ({_link(ONE_WORD)}).\n\n{table(titles, rows)}"
    )


def grpo_speed() -> str:
    """A step of GRPO beside its parts, and beside TRL's."""
    if not (REWARDS.is_file() and GRPO.is_file()):
        return "Not measured yet: python benchmarks/rewards.py, and python benchmarks/grpo.py"
    parts, beside = (json.loads(file.read_text(encoding="utf-8")) for file in (REWARDS, GRPO))
    median = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in parts["seconds"].items()}
    rows = [
        [
            name,
            " ".join(f"{one['trained']:.0f}" for one in runs),
            " ".join(f"{one['peak_mib'] / 1024:.1f}" for one in runs),
        ]
        for name, runs in beside["results"].items()
    ]
    ours, theirs = (
        {key: sum(one[key] for one in runs) / len(runs) for key in ("trained", "peak_mib")}
        for runs in beside["results"].values()
    )
    titles = ["system", "trained tokens a second, by run", "peak memory, GiB"]
    return (
        f"A step of {parts['prompts']} prompts with {parts['group']} answers of at most {parts['tokens']} tokens took"
        f" {median['step']:.0f} s; writing as many answers {median['writing']:.0f} s and one training pass over the"
        f" same rows {median['training']:.0f} s, so {parts['over_its_parts']:.2f} times its parts ({_link(REWARDS)})."
        f" Beside TRL, in turns: {ours['trained'] / theirs['trained']:.1f} times its trained tokens a second at"
        f" {ours['peak_mib'] / theirs['peak_mib']:.0%} of its memory ({_link(GRPO)}).\n\n{table(titles, rows)}"
    )


def judges() -> str:
    """What answers that address their judge did to real judges."""
    if not JUDGES.is_file():
        return "Not measured yet: run python benchmarks/judges.py"
    found = json.loads(JUDGES.read_text(encoding="utf-8"))
    rows = [
        [
            name,
            attack,
            *(_share(facts[key]) or "it had not won" for key in ("flipped", "stolen", "flipped_in_one_order")),
        ]
        for name, judge in found["judges"].items()
        for attack, facts in judge["attacks"].items()
    ]
    titles = ["judge", "attack", "the right answer no longer wins", "the attacker wins", "one order alone: changed"]
    told = "; ".join(_alone(name, judge) for name, judge in found["judges"].items())
    return f"{table(titles, rows)}\n\n{found['pairs']} pairs ({_link(JUDGES)}). Without an attack: {told}."


def _alone(name: str, judge: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{key.replace('_', ' ')} {judge[key]:.2f}" for key in TRUST if judge.get(key) is not None)
    one, both = judge["right_in_one_order"], judge["right_in_both_orders"]
    return (
        f"{name} lets the right answer win {_share(judge['right_wins'])}; of its verdicts for one of the two,"
        f" {_share(one)}, are right in one order; {_share(both) or 'both orders never agree on one'}"
        f"{', where both orders agree' if both else ''} ({shares})"
    )


def workers() -> str:
    """Tokens a second of workers beside one process."""
    if not WORKERS.is_file():
        return "Not measured yet: run python benchmarks/workers.py"
    found = json.loads(WORKERS.read_text(encoding="utf-8"))
    rows = [["this process", f"{found['one_process']:,.0f}", ""]]
    for count, facts in found["workers"].items():
        words = "1 worker" if count == "1" else f"{count} workers"
        rows.append([words, f"{facts['tokens_a_second']:,.0f}", f"{facts['equal']:.1%}"])
    titles = ["written by", "tokens a second", "answers that are this process's"]
    about = f"{found['model']}, {found['requests']} requests of at most {found['max_tokens']} tokens"
    return f"{table(titles, rows)}\n\n{about}; {found['machine']} ({_link(WORKERS)})."


def _link(file: Path) -> str:
    return f"[{file.name}](evidence/{file.name})"


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def _share(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f}), of {value['n']}"
