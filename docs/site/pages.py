"""Writes the pages of the site: the docs, the README as the first page, a page for each recipe, links among them.

    python docs/site/pages.py build/docs

The repository's Markdown is GitHub's. A builder of sites reads another dialect, and its links end at docs/: both
are mended here, so that the pages read well in both places and any builder will do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ALL_RECIPES = "all-recipes"
ITEM = re.compile(r"( *)((?:[-*]|\d+\.) +)\S")
FENCE = re.compile(r" *```")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
TO_A_TEST = re.compile(r"\[([^\]]*)\]\((?:\.\./)*(tests/[^)\s]+)\)")  # the site has no tests


def main(folder: Path) -> None:
    """Write every page of the site and the files that pages show into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.md", "blocks"))
    for there, text in pages().items():
        page = folder / there
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(site_text(text, there), encoding="utf-8")


def pages() -> dict[str, str]:
    """The Markdown of each page by its path on the site."""
    found = {file.relative_to(DOCS).as_posix(): file.read_text(encoding="utf-8") for file in sorted(DOCS.rglob("*.md"))}
    found |= {there: (ROOT / here).read_text(encoding="utf-8") for here, there in BESIDE.items()}
    recipes = {file.stem: file.read_text(encoding="utf-8") for file in sorted((ROOT / "recipes").glob("*.yaml"))}
    found |= {f"{ALL_RECIPES}/{name}.md": recipe_page(name, text) for name, text in recipes.items()}
    return found | {f"{ALL_RECIPES}.md": list_of_recipes(recipes), "examples.md": examples_page()}


def site_text(text: str, here: str) -> str:
    """A page's text with links that hold on the site, in the dialect that its builder reads."""
    named = outside_code(text, lambda line: TO_A_TEST.sub(r"\1 (`\2`)", line))
    linked = outside_code(named, lambda line: LINK.sub(lambda found: found[1] + moved(found[2], here) + found[3], line))
    return python_markdown(linked)


def recipe_page(name: str, text: str) -> str:
    title = yaml.safe_load(text).get("title", name)
    return f"# {name}\n\n{title}.\n\n```\nlimbeck run {name}\n```\n\n```yaml\n{text}```\n"


def list_of_recipes(recipes: dict[str, str]) -> str:
    rows = []
    for name, text in recipes.items():
        facts = yaml.safe_load(text)
        rows.append(
            f"| [{name}]({ALL_RECIPES}/{name}.md) | {facts.get('title', '')} | {facts.get('paper', '')} |".replace(
                "\n", " "
            )
        )
    told = f"# All recipes\n\n{len(rows)} recipes come with Limbeck. `limbeck run NAME` runs one."
    return "\n".join([f"{told} [Which one?](choose.md)", "", "| recipe | what it is | paper |", "|---|---|---|", *rows])


def examples_page() -> str:
    parts = ["# Examples", "", "To copy and to change: every step is in sight."]
    for script in sorted((ROOT / "examples").glob("*.py")):
        parts += ["", f"## {script.name}", "", "```python", script.read_text(encoding="utf-8").rstrip(), "```"]
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        parts += ["", f"## {notebook.name}"]
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            text = re.sub(r"^#+ ", "### ", "".join(cell["source"]))
            parts += ["", *(["```python", text, "```"] if cell["cell_type"] == "code" else [text])]
    return "\n".join(parts) + "\n"


def moved(target: str, here: str) -> str:
    """A link of the repository as a link of the site, from the page `here`."""
    path, mark, anchor = target.partition("#")
    if "://" in target or not path or here.startswith(ALL_RECIPES):
        return target
    source = next((file for file, page in BESIDE.items() if page == here), f"docs/{here}")
    file = os.path.normpath(os.path.join(os.path.dirname(source), path))  # noqa: PTH118, PTH120
    if file in BESIDE:
        there = BESIDE[file]
    elif file.startswith("recipes/") and file.endswith(".yaml"):
        there = f"{ALL_RECIPES}/{Path(file).stem}.md"
    elif file.split("/")[0] == "examples":
        there, anchor = "examples.md", re.sub(r"[^\w-]", "", Path(file).name.lower()) if "/" in file else ""
        mark = "#" if anchor else ""
    else:
        there = file.removeprefix("docs/")
    return os.path.relpath(there, os.path.dirname(here) or ".") + mark + anchor  # noqa: PTH120


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with every line outside fenced code changed."""
    lines, code = [], False
    for line in text.split("\n"):
        fence = bool(FENCE.match(line))
        lines.append(line if code or fence else change(line))
        code ^= fence
    return "\n".join(lines)


def python_markdown(text: str) -> str:
    """GitHub's lists and tables for Python-Markdown: a blank line before them, and four spaces for each level."""
    lines: list[str] = []
    depths: list[int] = []  # where the text of each open item begins
    code = False
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        item = None if code else ITEM.match(line)
        blank = not lines or not lines[-1].strip()
        if line.strip() and not code:
            while depths and indent < depths[-1] and (item or blank):
                depths.pop()
            starts_table = line.lstrip().startswith("|") and not blank and not lines[-1].lstrip().startswith("|")
            if (item and not depths and not blank and not ITEM.match(lines[-1])) or starts_table:
                inside_item = item and len(lines) > 1 and lines[-1].startswith("  ")
                lines += [] if inside_item else [""]
        begun = depths[-1] if depths else 0
        lines.append(" " * (4 * len(depths)) + line[min(indent, begun) :] if line.strip() else line)
        if item:
            depths.append(indent + len(item[2]))
        code ^= bool(FENCE.match(line))
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
