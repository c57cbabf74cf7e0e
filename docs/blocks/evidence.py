"""Blocks that are made from what the benchmarks and comparisons wrote into docs/evidence."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.models.to_gguf.types import TYPES
from limbeck.report.verdict import compare_verdict

from .table import table

EVIDENCE = Path(__file__).parents[1] / "evidence"
METHODS, ON_POLICY_METHODS = (EVIDENCE / f"{name}.json" for name in ("methods", "on-policy-methods"))
ELICITED, REASONING = (EVIDENCE / f"{name}.json" for name in ("elicitation", "reasoning"))
HEAD, ON_POLICY, KEPT, BRIDGES, MEASURED = (
    EVIDENCE / f"{name}.json" for name in ("head", "on-policy", "cache", "bridges", "engines")
)
LLAMA, PRECISION, EXPORTED = (EVIDENCE / f"{name}.json" for name in ("engines-llama", "precision", "export"))
WIRE = EVIDENCE / "wire.json"
SHOWN = {
    "forward_kl": "forward KL",
    "own_reverse_kl": "reverse KL on own text",
    "top1_agreement": "same first choice",
    "perplexity": "perplexity",
    "ece": "calibration error",
}
SHOWN_ON_POLICY = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "own_reverse_kl": "reverse KL on own text",
    "entropy": "entropy",
    "own_tokens": "length of own text",
}


def head() -> str:
    """The measured cost of each divergence, from what benchmarks/head.py wrote."""
    if not HEAD.is_file():
        return "Not measured yet: run python benchmarks/head.py"
    found = json.loads(HEAD.read_text(encoding="utf-8"))
    floor = found["results"]["floor"]
    sizes = sorted(found["results"]["floor"], key=int)
    titles = [
        "loss",
        *(f"{int(size):,} positions: {what}" for size in sizes for what in ("times the floor", "extra MiB")),
    ]
    rows = [
        [name, *(cell for s in sizes for cell in _cost(of.get(s)))]
        for name, of in found["results"].items()
        if name != "floor"
    ]
    floors = [
        f"{floor[s]['seconds']:g} s at {int(s):,} positions ({floor[s]['gflop_per_second']:g} GFLOP/s)" for s in sizes
    ]
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return table(titles, rows) + f"\n\nThe floor itself: {'; '.join(floors)}. Machine: {machine}."


def _cost(facts: Mapping[str, float] | None) -> tuple[str, str]:
    if facts is None:
        return "", ""
    extra = f"{facts['peak_extra_mib']:,}" if "peak_extra_mib" in facts else ""
    return f"{facts['times_the_floor']:.2f} ({facts['lowest']:.2f} to {facts['highest']:.2f})", extra


def on_policy() -> str:
    """On-policy training beside other libraries, from what benchmarks/on_policy.py wrote: each figure the median of its
    runs."""
    if not ON_POLICY.is_file():
        return "Not measured yet: run python benchmarks/on_policy.py"
    found = json.loads(ON_POLICY.read_text(encoding="utf-8"))
    rows = []
    for name, runs in found["results"].items():
        trained, real, writing, memory = (
            sorted(run[key] for run in runs) for key in ("trained", "real", "writing", "peak_mib")
        )
        share = f"{100 * statistics.median(writing):.0f} %" if any(writing) else ""
        spread = f"{statistics.median(trained):.0f} ({trained[0]:.0f} to {trained[-1]:.0f})"
        rows.append([name, spread, f"{statistics.median(real):.0f}", share, f"{statistics.median(memory):,.0f}"])
    about = ", ".join(f"{key} {value}" for key, value in found["about"].items())
    titles = ["system", "trained tokens a second", "real tokens a second", "time writing", "peak memory, MiB"]
    return table(titles, rows) + f"\n\n{about}."


def methods() -> str:
    """The comparison in short: values with intervals, and what may be said of the differences."""
    return _compared(METHODS, SHOWN) if METHODS.is_file() else "Not measured yet: run make evidence"


def on_policy_methods() -> str:
    """The same for methods in which the student writes."""
    return (
        _compared(ON_POLICY_METHODS, SHOWN_ON_POLICY)
        if ON_POLICY_METHODS.is_file()
        else "Not measured yet: run make evidence-on-policy"
    )


def _compared(file: Path, shown: Mapping[str, str]) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    facts = found["held_out"]
    about = (
        f"{facts['answers']} held-out answers, seeds {', '.join(map(str, found['seeds']))}; 95 % intervals over seeds"
        " and answers; divergences in nats per token over the full vocabulary."
    )
    return f"{_rows(found, shown)}\n\n{compare_verdict(found)}\n\n{about}"


def _rows(found: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    """Every system's values with their intervals, and how many tokens it was trained on."""
    rows = []
    for name, values in found["systems"].items():
        known = [values.get(key) for key in shown]
        cells = [f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})" if each else "" for each in known]
        rows.append([name, *cells, f"{found['cost'][name]['trained_tokens']:,.0f}" if name in found["cost"] else ""])
    return table(["system", *shown.values(), "trained tokens"], rows)


def elicited() -> str:
    """What the steps of every eliciting recipe took, gave and left out, against a served model."""
    if not ELICITED.is_file():
        return "Not measured yet: run python benchmarks/elicitation.py"
    rows = []
    for name, facts in json.loads(ELICITED.read_text(encoding="utf-8")).items():
        for step in facts.get("steps", ()):
            ranked = sorted(step["dropped"].items(), key=lambda entry: (-entry[1], entry[0]))
            lost = ", ".join(f"{count:,} {reason}" for reason, count in ranked[:4]) + (
                ", and others" if len(ranked) > 4 else ""
            )
            asked = f"{sum(step['answers'].values()):,}" if step["answers"] else ""
            rows.append(
                [
                    f"[{name}](../recipes/{name}.yaml)",
                    step["step"],
                    f"{step['taken']:,}",
                    asked,
                    f"{step['given']:,}",
                    lost,
                ]
            )
    return table(["recipe", "step", "in", "answers asked", "out", "left out"], rows)


def reasoning() -> str:
    """Verified reasons and labels against labels alone: right answers on held-out problems, and the difference."""
    if not REASONING.is_file():
        return "Not measured yet: run python benchmarks/reasoning.py"
    found = json.loads(REASONING.read_text(encoding="utf-8"))
    shown = {
        "sums/pass_rate": "right number",
        "sums/finished": "finished",
        "sums/tokens": "tokens of an answer",
        "perplexity": "perplexity",
    }
    ((pair, differences),) = found["paired"].items()
    difference = differences["sums/pass_rate"]
    value, low, high = (f"{100 * difference[key]:+.1f}" for key in ("value", "low", "high"))
    told = (
        f"Right numbers, {pair}: {value} points ({low} to {high}; p = {difference['p']:.2g}), {difference['n']}"
        " held-out problems."
    )
    seeds = (
        f"Seeds {', '.join(map(str, found['seeds']))}; 95 % intervals over seeds and problems; perplexity of the"
        " teacher's held-out text."
    )
    return f"{_rows(found, shown)}\n\n{told}\n\n{seeds}"


def kept() -> str:
    """What each form of a kept teacher takes, how wrong it is, and what it saves."""
    if not KEPT.is_file():
        return "Not measured yet: run python benchmarks/cache.py"
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    rows = []
    for facts in found["forms"]:
        ((form, settings),) = facts["form"].items()
        size = "" if facts["bytes_per_token"] is None else f"{facts['bytes_per_token']:,.0f}"
        about = ", ".join(f"{key} {value}" for key, value in settings.items())
        bias = f"{facts['kl_bias']:+.4f} ± {1.96 * facts['kl_bias_se']:.4f}"
        rows.append([f"`{form}`, {about}", size, f"{facts['kl']:.4f}", bias, f"{100 * facts['gradient_error']:.2g} %"])
    lines = [table(["form", "bytes a token", "forward KL", "its bias, nats", "error of the gradient"], rows)]
    for facts in (facts for facts in found["forms"] if "rounds" in facts):
        errors = ", ".join(f"{100 * error:.1f} % ({2**power})" for power, error in enumerate(facts["rounds"]))
        lines.append(
            f"The gradient of {facts['form']['sampled']['draws']} draws, averaged over so many caches, is off by"
            f" {errors}."
        )
    speed = found["speed"]
    times = ", ".join(f"{name} {ratio:.2f} times" for name, ratio in speed["times_faster_than_live"].items())
    reading = ", ".join(
        f"{name} {speed['seconds'][name] / speed['seconds']['reading ' + name]:.0f} times"
        for name in speed["times_faster_than_live"]
    )
    lines.append(f"Forward and backward over {speed['tokens']:,} tokens, as fast as with the live teacher: {times}.")
    lines.append(f"Reading what was kept alone is faster than that training: {reading}.")
    return "\n\n".join(lines)


def wire() -> str:
    """What each signal takes over a wire: bytes and seconds for a micro-batch."""
    if not WIRE.is_file():
        return "Not measured yet: run python benchmarks/wire.py"
    found = json.loads(WIRE.read_text(encoding="utf-8"))
    rows = [
        [name, f"{facts['sent']:,.1f}", f"{facts['received']:,.0f}", f"{facts['seconds']:.2f}"]
        for name, facts in found["signals"].items()
    ]
    lines = [table(["signal", "bytes sent a token", "bytes received a token", "seconds a micro-batch"], rows)]
    sizes = []
    for facts in found["forms"]:
        ((form, settings),) = facts["form"].items()
        about = ", ".join(f"{key} {value}" for key, value in settings.items())
        sizes.append(f"`{form}`, {about}: {facts['bytes']:,.0f}")
    lines.append(f"In a cache the same text takes, bytes a token: {'; '.join(sizes)}.")
    killed, machine = found["killed"], found["machine"]
    head = f"{found['head_bytes'] / 2**20:,.0f} MiB"
    same = "the same states, to the bit" if killed["same_states_after"] else "OTHER states"
    lines.append(
        f"{found['model']}, {found['response_tokens']} response tokens of {found['tokens']} in a micro-batch, width"
        f" {found['width']}; its head once, {head}. Largest difference from the states of the model in process:"
        f" {found['largest_difference_from_local']:.2g}. The server was killed (SIGKILL) and started"
        f" again while a micro-batch was asked for: {same}, after {killed['seconds_until_answered']:.0f} s. One"
        f" thread of {machine['cores']} cores, torch {machine['torch']}, load {machine['load']:.1f}."
    )
    return "\n\n".join(lines)


def bridges() -> str:
    """What each bridge of the real pair shares, and what training over it did to the held-out text."""
    if not BRIDGES.is_file():
        return "Not measured yet: run python benchmarks/bridges.py"
    found = json.loads(BRIDGES.read_text(encoding="utf-8"))
    rows = []
    for name, facts in found["ways"].items():
        losses = " + ".join(f"{weight:g} {loss}" for loss, weight in facts["losses"])
        moved = [
            f"{facts['before'][key]:.{digits}f} → {facts['after'][key]:.{digits}f}"
            for key, digits in (("loss", 3), ("nats_per_byte", 4), ("common_kl", 3))
        ]
        rows.append([name, f"`{losses}`", *moved, f"{facts['seconds_per_step']:.0f}"])
    shared = next(iter(found["ways"].values()))["shared"]
    told = (
        f"{shared['common_tokens']:,} of the student's {shared['student_tokens']:,} tokens are among the teacher's"
        f" {shared['teacher_tokens']:,}; of the training text's tokens {shared['aligned_share']:.1%} begin where one of"
        f" the teacher's does, and {shared['single_share']:.1%} are one in both. {found['steps']} steps of"
        f" {found['tokens_per_step']} tokens at {found['lr']:g}; losses are those of {found['held_out']} held-out"
        " answers, before and after; a step was timed beside other work."
    )
    titles = [
        "over",
        "trained on",
        "own loss",
        "nats a byte of the text",
        "forward KL over common tokens",
        "seconds a step",
    ]
    return f"{told}\n\n{table(titles, rows)}"


def engines_llama() -> str:
    """The packaged llama.cpp server as a teacher, from what benchmarks/engines_llama.py wrote."""
    if not LLAMA.is_file():
        return "Not measured yet: run python benchmarks/engines_llama.py"
    found = json.loads(LLAMA.read_text(encoding="utf-8"))
    rows = [
        ["tokens a second, writing", f"{found['tokens_per_second']:.0f} ({found['at_once']} at once)"],
        ["tokens a second, scoring given text", f"{found['scored_tokens_per_second']:.0f}"],
        ["share of tokens taught", f"{found['taught_share']:.1%} of {found['tokens']:,}"],
        ["probability that the likeliest name", f"{found['named_probability']:.1%} ({found['named']} tokens)"],
        ["nats apart, with its own text", f"{found['nats_apart']:.4f}"],
        [
            "of these, before any other split of the text",
            f"{found['same_tokens_nats_apart']:.4f}, at most {found['same_tokens_nats_apart_at_most']:.3f}"
            f" ({found['same_tokens']:,} tokens)",
        ],
        ["nats apart, scoring given text", f"{found['scored_nats_apart']:.4f}"],
    ]
    about = f"{found['engine']} ({found['version']}) with {found['model']}; {found['machine']}."
    return f"{table(['', 'measured'], rows)}\n\n{about}"


def precisions() -> str:
    """What shorter weights cost a small teacher, from what benchmarks/precision.py wrote."""
    if not PRECISION.is_file():
        return "Not measured yet: run python benchmarks/precision.py"
    found = json.loads(PRECISION.read_text(encoding="utf-8"))
    rows = [
        [
            name,
            f"{facts['bytes'] / 2**20:.0f}",
            f"{facts['mean_kl']:.2g}",
            f"{facts['largest_kl']:.2g}",
            f"{facts['same_likeliest']:.1%}",
        ]
        for name, facts in found["kept"].items()
        if name != "float32"
    ]
    titles = ["kept in", "MiB", "mean KL, nats", "largest", "same likeliest token"]
    told = f"{found['model']} against itself in float32, over {found['positions']:,} positions of questions:"
    return f"{told}\n\n{table(titles, rows)}"


def measured_engines() -> str:
    """Real servers as teacher and scorer: their speed, and how near their numbers are to the same weights here."""
    shown = {
        "written_per_second": ("writes, tokens a second", "{:.0f}"),
        "written_here_per_second": ("in process", "{:.0f}"),
        "scored_per_second": ("scores, tokens a second", "{:.0f}"),
        "kl": ("forward KL from the weights here, nats", "{:.2g}"),
        "largest_kl": ("the largest", "{:.2g}"),
        "shared": ("likeliest tokens shared", "{:.1f}"),
    }
    return _engines(shown)


def writing_engines() -> str:
    """Real servers that write the student's text."""
    shown = {
        "student_written_per_second": ("writes, tokens a second", "{:.0f}"),
        "weights_seconds": ("new weights, seconds", "{:.1f}"),
        "log_prob_gap": ("log-probabilities off by, nats", "{:.2g}"),
        "largest_log_prob_gap": ("at most", "{:.2g}"),
    }
    return _engines(shown)


def _engines(shown: Mapping[str, tuple[str, str]]) -> str:
    """A row for each engine that has the first of these figures."""
    if not MEASURED.is_file():
        return "Not measured yet: run python benchmarks/engines.py"
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    first = next(iter(shown))
    rows = [
        [facts["version"], *(form.format(facts[key]) if key in facts else "" for key, (_, form) in shown.items())]
        for facts in found["engines"].values()
        if first in facts
    ]
    about = ", ".join(f"{key} {value}" for key, value in found["about"].items())
    return table(["server", *(title for title, _ in shown.values())], rows) + f"\n\nMeasured with: {about}."


def exports() -> str:
    """What the types of a GGUF file cost, from what benchmarks/export.py wrote."""
    if not EXPORTED.is_file():
        return "Not measured yet: run python benchmarks/export.py"
    found = json.loads(EXPORTED.read_text(encoding="utf-8"))
    rows = [
        [
            f"`{name}`",
            f"{facts['bytes'] / 1e6:.0f}",
            f"{facts['kl_nats_per_token']:.2g}",
            f"{facts['largest_kl_nats']:.2g}",
            f"{facts['same_first_choice']:.1%}",
            f"{facts['same_greedy_answers']} of {facts['prompts']}",
            f"{TYPES[name].most_kl:g}",
        ]
        for name, facts in found["types"].items()
    ]
    titles = [
        "type",
        "MB",
        "KL (nats a token)",
        "largest KL",
        "same first choice",
        "same greedy answers",
        "refused above",
    ]
    tokens = sorted({facts["tokens"] for facts in found["types"].values()})
    measured = f"{found['model']} under {found['engine']}, {tokens[0]} to {tokens[-1]} tokens each."
    return f"{table(titles, rows)}\n\n{measured}"
