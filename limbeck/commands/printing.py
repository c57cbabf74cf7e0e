"""What the commands print when they are done: as text for people, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from limbeck.commands import console
from limbeck.types import UserError, nearest

if TYPE_CHECKING:
    from limbeck.commands.doctor.run import Finding
    from limbeck.config.recipe import Recipe
    from limbeck.runs.cost import Plan
    from limbeck.runs.servers import ServerFinding

METHOD_KINDS = ("divergences", "losses", "steps", "recipes")
VERDICT_COLOURS = {"fine": "green", "warning": "yellow", "fault": "red"}


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print a flat result as `name: value` lines, or as JSON."""
    if as_json:
        console.out.print_json(json.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        console.out.print(f"{name.replace('_', ' ')}: {value}", markup=False)


def print_plan(recipe: Recipe, plan: Plan, servers: Sequence[ServerFinding]) -> None:
    """Print whether a checked recipe can run, what it will cost, and what its servers say."""
    lines = plan.lines()
    verdict = "can't run yet: see its servers" if any(server.fault for server in servers) else "can run"
    if not plan.fits:
        verdict = f"will not fit: peak memory, {dict(lines)['peak memory']}"
    console.out.print(f"[bold]{recipe.name}[/bold] (hash {recipe.hash[:16]}) ", end="")
    console.out.print(f"{verdict}.", markup=False, soft_wrap=True)
    for title, value in [*lines, *((server.place, server.fault or server.seen) for server in servers)]:
        console.out.print(f"  {title:<26} {value}", markup=False, soft_wrap=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line per check of the doctor."""
    for finding in findings:
        colour = VERDICT_COLOURS.get(finding.verdict, "dim")
        console.out.print(f"[{colour}]{finding.verdict:<13}[/{colour}]", end=" ")
        console.out.print(f"{finding.name}: {finding.detail}", markup=False, soft_wrap=True)


def print_methods(methods: dict[str, Any], name: str | None, as_json: bool) -> None:
    """Print all methods, or everything about the one called `name`.

    Raises:
        UserError: there is no method of this name.
    """
    if name is not None:
        entries = {kind: methods[kind][name] for kind in METHOD_KINDS if name in methods[kind]}
        if not entries:
            names = [entry for kind in METHOD_KINDS for entry in methods[kind]]
            raise UserError(f"there is no method named {name!r}{nearest(name, names)}")
        print_result(entries, as_json=True)
        return
    if as_json:
        print_result(methods, as_json=True)
        return
    for kind in METHOD_KINDS:
        console.out.print(f"[bold]{kind}[/bold]")
        for entry, facts in methods[kind].items():
            summary = facts.get("formula") or facts.get("title") or facts.get("kind")
            console.out.print(f"  {entry:<16} {summary}", markup=False)
    console.out.print("[bold]tasks[/bold]\n  " + ", ".join(methods["tasks"]))


def print_models(models: Sequence[dict[str, Any]]) -> None:
    """Print the models known by name, with licence, terms and whether they are downloaded."""
    for model in models:
        state = "downloaded" if model["cached"] else f"not downloaded yet ({model['download_mb']} MB)"
        console.out.print(
            f"[bold]{model['name']}[/bold]  {model['title']}\n  licence {model['licence']}; {model['terms']}; {state}"
        )


def print_task_results(results: dict[str, Any]) -> None:
    """Print a line per metric of every harness task."""
    for name, task in results["tasks"].items():
        for metric, result in task["results"].items():
            value = "not a number" if result["value"] is None else f"{result['value']:.4f}"
            error = "" if result["stderr"] is None else f" +- {result['stderr']:.4f}"
            console.out.print(f"{name} {metric}: {value}{error}", markup=False)
    console.out.print(f"results: {results['file']}", markup=False)
