"""Rewrites the generated blocks of docs/objectives.md from the code, the recipes and docs/evidence/head.json.

    .venv/bin/python docs/generate.py            # rewrite them in place
    .venv/bin/python docs/generate.py --check    # exit status 1 when they are stale

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; whatever is written there by hand is lost.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.builtin import recipe_files
from limbeck.objectives.divergence import DIVERGENCES, TEMPERATURE
from limbeck.objectives.match import MATCHES, NUMBERS, WORDS
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.recipe import load_recipe

DOCS = Path(__file__).parent
PAGE = DOCS / "objectives.md"
HEAD = DOCS / "evidence" / "head.json"
BLOCK = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` is escaped, which holds inside code spans too."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def parameters(defaults: Mapping[str, Any], legal: Mapping[str, object]) -> str:
    """Each parameter with its default and, where it has one, its legal range."""
    cells = [f"`{key}` {_plain(value)}" + (f" in {legal[key]}" if key in legal else "") for key, value in defaults.items()]
    return ", ".join(cells) or "none"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value).replace('"', "")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def shown_by(name: str) -> str:
    """The built-in recipes that have the term."""
    having = [recipe for recipe, path in recipe_files().items() if any(loss.name == name for loss in load_recipe(path).loss)]
    return ", ".join(f"[{recipe}](../recipes/{recipe}.yaml)" for recipe in having)


def divergences() -> str:
    rows = []
    for name, known in sorted(DIVERGENCES.items()):
        own = {key: value for key, value in known.defaults.items() if key != "temperature"}
        carried = [known.buckets, name == "forward_kl", known.buckets and known.one_hot]  # top-k, sampled, text alone: signals/sparse.py
        yes_or_no = [_yes(carries) for carries in carried]
        rows.append([f"`{name}`", f"`{known.formula}`", parameters(own, known.ranges), *yes_or_no, known.paper, shown_by(name)])
    hard = ", ".join(f"`{name}`" for name, known in sorted(DIVERGENCES.items()) if not known.softens)
    note = f"Beside their own parameters all but {hard} take `temperature`, 1 in {TEMPERATURE}."
    return table(["name", "formula", "parameters", "top-k", "sampled", "text alone", "paper", "recipes"], rows) + f"\n\n{note}"


def ranking() -> str:
    rows = []
    for name, known in sorted(RANKINGS.items()):
        defaults = known.defaults | ({} if known.measures is None else {"baseline": "measured, or a number"})
        cells = [f"`{name}`", f"`{known.formula}`", parameters(defaults, known.ranges), known.reference, known.paper, shown_by(name)]
        rows.append(cells)
    return table(["name", "formula", "parameters", "reference", "paper", "recipes"], rows)


def features() -> str:
    legal: dict[str, object] = {**NUMBERS, **{key: f"{{{', '.join(words)}}}" for key, words in WORDS.items()}}
    rows = [
        [f"`{name}`", f"`{kind.formula}`", parameters(kind.defaults, legal), kind.reads, kind.unit, kind.paper, shown_by(name)]
        for name, kind in sorted(MATCHES.items())
    ]
    return table(["name", "formula", "parameters", "reads", "unit", "paper", "recipes"], rows)


def policy() -> str:
    rows = []
    for name, known in sorted(POLICIES.items()):
        reads = ", ".join([*(f"`{column}`" for column in known.reads), *(f"`{column}` (optional)" for column in known.optional)])
        rows.append([f"`{name}`", f"`{known.formula}`", parameters(known.defaults, known.ranges), reads, known.paper])
    return table(["name", "formula", "parameters", "reads", "paper"], rows)


def head() -> str:
    """The measured cost of each divergence, from what benchmarks/head.py wrote."""
    if not HEAD.is_file():
        return "Not measured yet: run python benchmarks/head.py"
    found = json.loads(HEAD.read_text())
    results, machine = dict(found["results"]), found["machine"]
    floor = results.pop("floor")
    sizes = sorted(floor, key=int)
    titles = ["loss", *(f"{int(size):,} positions: {what}" for size in sizes for what in ("times the floor", "extra MiB"))]
    rows = [[name, *(cell for size in sizes for cell in _cost(of.get(size)))] for name, of in results.items()]
    floors = [f"{floor[s]['seconds']:g} s at {int(s):,} positions ({floor[s]['gflop_per_second']:g} GFLOP/s)" for s in sizes]
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    return table(titles, rows) + f"\n\nThe floor itself: {'; '.join(floors)}. Machine: {facts}."


def _cost(facts: Mapping[str, float] | None) -> tuple[str, str]:
    if facts is None:
        return "", ""
    extra = f"{facts['peak_extra_mib']:,}" if "peak_extra_mib" in facts else ""
    return f"{facts['times_the_floor']:.2f} ({facts['lowest']:.2f} to {facts['highest']:.2f})", extra


BLOCKS: dict[str, Callable[[], str]] = {make.__name__: make for make in (divergences, ranking, features, policy, head)}


def generated(text: str) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda found: f"<!-- generated: {found[1]} -->\n{BLOCKS[found[1]]()}\n<!-- end -->", text)


def main(arguments: Sequence[str]) -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = generated(before)
    if "--check" in arguments:
        if before != after:
            print(f"{PAGE} is stale: run python docs/generate.py", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
