"""The recipes that `make test` has no time for train a tiny student, too."""

from __future__ import annotations

import pytest

from tests.config import test_recipes
from tests.config.test_recipes import QUICK, RECIPES, servers  # noqa: F401 (a fixture)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in QUICK])
def test_a_recipe_trains_a_tiny_student(name, servers, tiny_folder, prompt_file, tmp_path, monkeypatch):  # noqa: F811
    test_recipes.test_a_recipe_trains_a_tiny_student(name, servers, tiny_folder, prompt_file, tmp_path, monkeypatch)
