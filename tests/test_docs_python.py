"""docs/python.md: its blocks are Python, and name what is public."""

from __future__ import annotations

import ast
import re

import pytest

import limbeck
from tests.docs_text import DOCS, blocks

PAGE = (DOCS / "python.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks(PAGE, "python"))
def test_a_block_is_python_and_takes_public_names_alone(block):
    tree = ast.parse(block)
    named = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "limbeck"
    }
    assert named <= set(limbeck.__all__)


def test_every_public_name_is_described():
    assert set(limbeck.__all__) <= set(re.findall(r"\w+", PAGE))
