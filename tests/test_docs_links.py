"""Every link of the docs leads somewhere, in the repository and on the site that `make docs` builds from it."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import yaml

from tests.docs_text import DOCS, PAGES, ROOT, anchors, name_of, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose one tag names a function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(page: Path, root: Path) -> list[str]:
    """The links of a page that lead to no file under the root, or to no heading."""
    found = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        there = file.exists() and file.is_relative_to(root) and not target.startswith("/")
        if not there or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page):
    assert broken(page, ROOT) == []


def test_every_link_of_the_site_leads_to_one_of_its_files(site, tmp_path):
    site.main(tmp_path / "docs")
    pages = sorted((tmp_path / "docs").rglob("*.md"))
    assert {page.relative_to(tmp_path / "docs").as_posix() for page in pages} == set(site.pages())
    assert {page.name: wrong for page in pages if (wrong := broken(page, tmp_path / "docs"))} == {}
    assert not list((tmp_path / "docs").rglob("*.py"))


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "here.md").write_text(
        "# Ä `b` c!\n[a](there.md) [b](#ä-b-c) [c](here.md#no) [d](../x.md) `[e](f.md)`\n"
    )
    assert broken(tmp_path / "here.md", tmp_path) == ["there.md", "here.md#no", "../x.md"]


def files_of(nav):
    return [nav] if isinstance(nav, str) else [file for part in nav for file in files_of(_inner(part))]


def _inner(part):
    return next(iter(part.values())) if isinstance(part, dict) else part


def test_every_page_is_in_the_navigation_once(site):
    nav = files_of(SITE["nav"])
    recipes = {page for page in site.pages() if page.startswith("all-recipes/")}
    assert sorted(nav) == sorted(set(site.pages()) - recipes) and len(recipes) >= 70


def test_the_site_asks_no_other_server():
    assert SITE["theme"]["font"] is False and "extra_javascript" not in SITE and "extra" not in SITE
    assert not re.search(r"https?://|@import", (DOCS / "site" / "extra.css").read_text())
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(img|script|iframe)\b", prose(page.read_text(encoding="utf-8"))), (
            page
        )


def test_lists_and_tables_become_those_of_the_builder(site):
    ours = (
        "Text:\n- one\n  more\n  - inner\n\n  still one\n- two\n\n  | a |\n  |---|\nEnd of two\n\nAfter\n| a |\n|---|\n"
    )
    theirs = (
        "Text:\n\n- one\n    more\n    - inner\n\n    still one\n- two\n\n    | a |\n    |---|\n    End of two\n\n"
        "After\n\n| a |\n|---|\n"
    )
    assert site.python_markdown(ours) == theirs
    code = "1. first:\n\n   ```sh\n   - no item\n   ```\n"
    assert site.python_markdown(code) == "1. first:\n\n    ```sh\n    - no item\n    ```\n"


@pytest.mark.parametrize(
    ("target", "here", "there"),
    [
        ("docs/choose.md#x", "index.md", "choose.md#x"),
        ("../recipes/gkd.yaml", "writers.md", "all-recipes/gkd.md"),
        ("../../recipes/gkd.yaml", "tutorial/index.md", "../all-recipes/gkd.md"),
        ("../../README.md#use-it", "tutorial/index.md", "../index.md#use-it"),
        ("../examples/distill_minimal.py", "choose.md", "examples.md#distill_minimalpy"),
        ("examples/", "index.md", "examples.md"),
        ("#use-it", "index.md", "#use-it"),
        ("https://example.org/a.md", "index.md", "https://example.org/a.md"),
    ],
)
def test_links_to_what_stands_beside_the_docs(site, target, here, there):
    assert site.moved(target, here) == there


def test_a_test_is_named_where_the_site_has_no_page_of_it(site):
    text = "Proved by: [it holds](../tests/models/test_api.py); [so it is](writers.md)."
    assert site.site_text(text, "reliability.md") == (
        "Proved by: it holds (`tests/models/test_api.py`); [so it is](writers.md)."
    )
