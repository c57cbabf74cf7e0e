"""Rewrites the generated blocks of the docs from the code, the recipes and what the benchmarks wrote into
docs/evidence.

    .venv/bin/python docs/generate.py            # rewrite them in place
    .venv/bin/python docs/generate.py --check    # exit status 1 when they are stale

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; whatever is written there by hand is lost.
What stands in them: blocks/code.py, blocks/commands.py, blocks/api.py, blocks/evidence.py, blocks/recipe_rows.py,
blocks/cases.py, blocks/rewards.py and blocks/promises.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from blocks import api, cases, code, commands, evidence, promises, recipe_rows, rewards

DOCS = Path(__file__).parent
PAGES = (
    DOCS / "architecture.md",
    DOCS / "objectives.md",
    DOCS / "recipes.md",
    DOCS / "commands.md",
    DOCS / "python.md",
    DOCS / "writers.md",
    DOCS / "elicitation.md",
    DOCS / "signals.md",
    DOCS / "comparison.md",
    DOCS / "precision.md",
    DOCS / "evaluation.md",
    DOCS / "models.md",
    DOCS / "export.md",
    DOCS / "cases.md",
    DOCS / "launch.md",
    DOCS / "reliability.md",
    DOCS.parent / "README.md",
)
BLOCK = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
BLOCKS: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        code.house,
        code.shapes,
        code.families,
        evidence.exports,
        code.divergences,
        code.ranking,
        code.features,
        code.policy,
        code.rewards,
        evidence.head,
        evidence.on_policy,
        code.steps,
        evidence.elicited,
        evidence.reasoning,
        evidence.kept,
        evidence.wire,
        evidence.bridges,
        code.engines,
        code.server_ways,
        commands.commands,
        api.functions,
        api.results,
        evidence.engines_llama,
        evidence.measured_engines,
        evidence.writing_engines,
        evidence.precisions,
        evidence.methods,
        evidence.on_policy_methods,
        recipe_rows.full_sizes,
        recipe_rows.recipes_run,
        cases.case_intents,
        cases.case_names,
        cases.case_maths,
        rewards.one_word,
        rewards.grpo_speed,
        rewards.judges,
        rewards.workers,
        promises.how_many,
        promises.promises,
    )
}


def generated(text: str) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda found: f"<!-- generated: {found[1]} -->\n{BLOCKS[found[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = generated(before)
        if "--check" not in sys.argv[1:]:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{page} is stale: run python docs/generate.py")
