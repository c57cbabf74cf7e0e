"""Every recipe: the sizes of its paper, and what it did on real weights, from what `make evidence-recipes` wrote."""

from __future__ import annotations

import json

from limbeck.config.builtin import evidence_file, recipe_files
from limbeck.config.recipe_file import full_sizes as sizes_of

from .table import table


def full_sizes() -> str:
    """What `--scale full` sets in each recipe, and the recipes that have none."""
    found = {name: sizes_of(path) for name, path in recipe_files().items()}
    rows = [
        [f"`{name}`", ", ".join(f"`{path}={json.dumps(value)}`" for path, value in sizes.items())]
        for name, sizes in found.items()
        if sizes
    ]
    others = ", ".join(f"`{name}`" for name, sizes in found.items() if not sizes)
    return f"{table(['recipe', 'what `--scale full` sets'], rows)}\n\nNot known: {others}."


def recipes_run() -> str:
    """A row for each that ran, and why the others did not."""
    file = evidence_file()
    if not file.is_file():
        return "Not measured yet: run make evidence-recipes"
    found = json.loads(file.read_text(encoding="utf-8"))
    size = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["size"].items())
    rows = [
        [
            f"`{name}`",
            f"{row['trained_tokens']:,}",
            _change(row.get("training_loss")),
            *(_change(row["held_out"].get(metric)) for metric in ("forward_kl", "perplexity")),
            f"{row['seconds']:,}",
        ]
        for name, row in found["rows"].items()
        if "steps" in row
    ]
    others = [
        f"- `{name}`: {row.get('not_run') or row['failed']}"
        for name, row in found["rows"].items()
        if "steps" not in row
    ]
    missing = sorted(set(recipe_files()) - found["rows"].keys())
    others += [f"- No row yet: {', '.join(f'`{name}`' for name in missing)}."] if missing else []
    titles = ["recipe", "tokens", "training loss", "forward KL", "perplexity", "seconds"]
    return "\n\n".join(
        [f"Size: {size}. Machine: {found['machine']}.", table(titles, rows), *(["\n".join(others)] if others else [])]
    )


def _change(values: list[float] | None) -> str:
    """From the start to the end."""
    return " → ".join(f"{value:.3g}" for value in values) if values else ""
