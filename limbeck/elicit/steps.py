"""Every step of elicitation by the name that a recipe calls it."""

from __future__ import annotations

from limbeck.config.sections import Section
from limbeck.elicit import (
    answer,
    choices,
    curate,
    dialogue,
    document,
    evolve,
    expand,
    given,
    imagine,
    merit,
    mosaic,
    rationale,
    rewrite,
    select,
    transform,
    verified,
)

HOMES = (
    expand,
    evolve,
    imagine,
    curate,
    document,
    dialogue,
    rewrite,
    choices,
    answer,
    rationale,
    given,
    verified,
    select,
    merit,
    transform,
    mosaic,
)
STEPS: dict[str, type[Section]] = {name: step for home in HOMES for name, step in home.STEPS.items()}
