"""`limbeck check RECIPE`: whether a recipe can run, what its servers say, and what it will cost."""

from __future__ import annotations

from pathlib import Path

from limbeck.commands.printing import print_plan, print_result
from limbeck.config.recipe import Recipe


def check(recipe: Recipe, device_like: str | None, out: Path | None, *, as_json: bool) -> bool:
    """Print the plan. Returns whether the recipe's servers are there, and it fits the device.

    Args:
        device_like: hardware that is not here, to estimate for.
        out: the run folder, whose answers tell how long answers are.

    Raises:
        UserError: the recipe can't run.
    """
    # here and not above: a mistake in the recipe shows before torch is loaded
    from limbeck.runs.claim import run_folder
    from limbeck.runs.preflight import check_method
    from limbeck.runs.resolve import resolve
    from limbeck.runs.servers import examine_servers

    method = resolve(recipe)
    plan = check_method(method, device_like, run_folder(recipe, out))
    servers = examine_servers(method)
    if as_json:
        facts = {"recipe": recipe.hash, "plan": plan.as_dict(), "servers": [vars(server) for server in servers]}
        print_result(facts, as_json)
    else:
        print_plan(recipe, plan, servers)
    return plan.fits and not any(server.fault for server in servers)
