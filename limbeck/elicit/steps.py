"""Every step of elicitation by the name that a recipe calls it."""

from __future__ import annotations

from limbeck.elicit import given
from limbeck.settings import Section

STEPS: dict[str, type[Section]] = {**given.STEPS}
