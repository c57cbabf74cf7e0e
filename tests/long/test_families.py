"""The whole table of families and roads (`tests/families.py`): every cell that docs/models.md shows."""

from __future__ import annotations

import pytest

from tests.families import cells
from tests.models.test_families import folders, rate, take  # noqa: F401 (fixtures)


@pytest.mark.parametrize(("family", "road"), cells(whole=True))
def test_a_family_takes_a_road(family, road, folders, prompt_file, tmp_path):  # noqa: F811
    take(road, family, folders(family), prompt_file, tmp_path)
