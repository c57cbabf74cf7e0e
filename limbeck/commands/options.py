"""The options that change a recipe as it is read, the same for every command that reads one."""

from __future__ import annotations

from typing import Annotated

import typer

SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Override a setting of the recipe, as in train.lr=1e-4. Can be repeated.",
        metavar="A.B=C",
        default_factory=list,
        show_default=False,
    ),
]
ScaleOption = Annotated[
    str | None,
    typer.Option("--scale", help="full: the sizes of the recipe's paper. Default: those of the file.", metavar="full"),
]
