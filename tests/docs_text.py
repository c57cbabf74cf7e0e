"""What the tests read out of the docs: pages, code blocks, commands, headings."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SHELL = {"", "sh", "bash", "console"}
MARK = "<!-- this is run by make test-long -->"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in any of these languages."""
    return [textwrap.dedent(body) for _, language, body in FENCED.findall(text) if language in languages]


def commands_of(shell: str) -> Iterator[list[str]]:
    """The arguments of each `limbeck` command among lines of shell, without its name, comments and pipes."""
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "limbeck" in words and all("=" in word for word in words[: words.index("limbeck")]):
            yield words[words.index("limbeck") + 1 :]


def commands(page: Path) -> list[list[str]]:
    """The commands in fenced blocks and in lines that four spaces make code."""
    text = page.read_text(encoding="utf-8")
    indented = re.findall(r"^    (limbeck .*)$", FENCED.sub("", text), re.MULTILINE)
    return [args for shell in (*blocks(text, *SHELL), "\n".join(indented)) for args in commands_of(shell)]


def marked_commands(page: Path) -> list[list[str]]:
    """The commands of the blocks that follow the mark."""
    parts = page.read_text(encoding="utf-8").split(MARK)[1:]
    return [args for part in parts for args in commands_of(textwrap.dedent(FENCED.search(part)[3]))]


def prose(text: str) -> str:
    """The text without its fenced code."""
    return FENCED.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose(page.read_text(encoding="utf-8")), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower().replace("`", "").replace("*", "")).strip().replace(" ", "-")
        found.add(next(each for n in range(99) if (each := f"{slug}-{n}" if n else slug) not in found))
    return found
