"""A recipe's file before it is a `Recipe`: found, read, and changed by `--set a.b=c` and by the sizes under `full`.

`full` holds the sizes of the recipe's paper by their dotted paths, as `--set` takes them. It is no setting: it is taken
out of the data, and put in with `--scale full` alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.config.builtin import recipe_files
from limbeck.config.yaml_text import load_yaml, read_yaml
from limbeck.types import RecipeError, UserError, nearest

MAX_BYTES = 256 * 1024
FULL = "full"


def find(path: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a built-in one.

    Raises:
        RecipeError: there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    built_in = recipe_files()
    if str(path) in built_in:
        return built_in[str(path)]
    inside = sorted(file.glob("*.yaml")) if file.is_dir() else []
    if inside:
        raise RecipeError("", f"{str(path)!r} is a folder; did you mean {str(inside[0])!r}?")
    if file.suffix in {".yaml", ".yml"} or file.parent != Path():
        raise RecipeError("", f"there is no recipe file {str(path)!r} in {Path.cwd()}")
    raise RecipeError("", f"there is no recipe file {str(path)!r} and no built-in one{nearest(str(path), built_in)}")


def read(file: Path, cure: str = "start from a built-in recipe, such as recipes/quickstart.yaml") -> dict[str, Any]:
    """A YAML file of settings; of one that is empty, the error ends with `cure`.

    Raises:
        RecipeError: the file is missing, too large, malformed, empty or no mapping.
    """
    if not file.is_file():
        raise RecipeError("", f"there is no file {str(file)!r}")
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError("", f"{file} is larger than {MAX_BYTES} bytes, too large for a recipe")
    try:
        data = read_yaml(file)
    except UserError as error:
        raise RecipeError("", str(error)) from error
    if data is None:
        raise RecipeError("", f"{file} is empty; {cure}")
    if not isinstance(data, dict):
        raise RecipeError("", f"{file} must be a mapping of settings, not {type(data).__name__}")
    return data


def full_sizes(path: str | Path) -> dict[str, Any] | None:
    """The sizes of its paper that a recipe's file states, by dotted path: none ({}) where its own are the paper's, None
    where they are not known."""
    file = find(path)
    return take_full(read(file), file)


def take_full(data: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Take `full` out of a recipe's data, as `full_sizes` gives it; the data itself is changed."""
    if FULL not in data:
        return None
    sizes = data.pop(FULL)
    if not isinstance(sizes, dict):
        raise RecipeError(
            FULL,
            f"of {file} must be a mapping of settings as --set takes them, such as {{train.lr: 1e-5}}; got {sizes!r}",
        )
    return sizes


def scale_up(data: dict[str, Any], scale: str, sizes: Mapping[str, Any] | None, file: Path) -> None:
    """Put the sizes of a recipe's paper into its data.

    Raises:
        UserError: another scale than `full`, or a path at which nothing can be set.
        RecipeError: the recipe states none, or none that differ from its own.
    """
    if scale != FULL:
        raise UserError(f"there is no scale {scale!r}: give `full`, the paper's sizes, or none, the recipe's own")
    if sizes is None:
        raise RecipeError(
            "",
            f"--scale full: {file} has no `{FULL}`, since its paper's sizes are not known (or it has no paper): raise"
            " what docs/recipes.md lists, with --set",
        )
    if not sizes:
        raise RecipeError("", f"--scale full: the sizes of {file} are its paper's already; leave out --scale")
    for path, value in sizes.items():
        _put(data, path, copy.deepcopy(value), f"{file}: {FULL}: {path}")


def set_value(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`. List entries are given by number, as in `loss.0.weight=2`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form a.b=c, such as --set train.steps=20")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {path}: {text!r} is not a YAML value: {error}") from error
    _put(data, path, value, f"--set {path}")


def _put(data: dict[str, Any], path: str, value: Any, named: str) -> None:
    """Set the value at a dotted path; errors begin with `named`."""
    keys = path.split(".")
    node: Any = data
    for index, key in enumerate(keys):
        last = index == len(keys) - 1
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            if last:
                node[int(key)] = value
            node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            node = node.setdefault(key, {})
        else:
            raise UserError(f"{named}: {_no_such_part(node, key, keys[:index])}")


def _no_such_part(node: Any, key: str, parents: Sequence[str]) -> str:
    """Why nothing can be set under `key` of the value at `parents`, and what to write."""
    place = ".".join(parents)
    if isinstance(node, list) and node:
        return f"{place} has no entry {key!r}: its {len(node)} are counted from 0"
    if isinstance(node, list):
        return f"{place} is empty; replace it whole, as in --set '{place}=[...]'"
    return f"{place} is {node!r}, which has no {key!r}; replace it whole, as in --set '{place}={{{key}: ...}}'"


def blamed(error: RecipeError, sizes: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """Which of the sizes an error is about, unless an override is about the same."""
    place = error.path.replace("[", ".").replace("]", "")
    if any(_overlap(place, override.partition("=")[0]) for override in overrides):
        return None
    return next((path for path in sizes if _overlap(place, path)), None)


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
