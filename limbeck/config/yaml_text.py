"""YAML as Limbeck reads and writes it: plain data with YAML 1.2's scalars, keys that are text and stand once, bounded
in depth, in what aliases expand to, and in the digits of a number.

In YAML 1.1, which PyYAML reads, `1:40` is a hundred, `012` is ten, `no` is false and a date is no text.
Source: YAML 1.2.2, 10.3 (core schema).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from limbeck.types import UserError

MAX_NODES = 100_000
MAX_DEPTH = 100
MAX_DIGITS = 100
FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
INT = re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"(~|null|Null|NULL|)$")
DIGITS = "0123456789"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep=deep)

    def _int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
            )
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `load_yaml`, or a reader of YAML 1.1, would take for something else."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._int)
for _tag, _pattern, _first in (
    ("null", NULL, "~nN"),
    ("bool", BOOL, "tTfF"),
    ("int", INT, f"-+{DIGITS}"),
    ("float", FLOAT, f"-+.{DIGITS}"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first, *([""] if _tag == "null" else [])])


def load_yaml(text: str) -> Any:
    """The plain data of a YAML text; None of an empty one.

    Raises:
        ValueError: it is no YAML, or passes a bound; the message says where.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_yaml(file: Path) -> Any:
    """The plain data of a YAML file.

    Raises:
        UserError: it can't be read as one; the message names the file and the place.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is no file (but a folder, a pipe or a device): put it right")
    try:
        return load_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no UTF-8, too
        raise UserError(f"{file} is not valid YAML: {error}") from error


def dump_yaml(data: Any) -> str:
    """Plain data as a text that `load_yaml` reads."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _check_size(root: yaml.Node) -> None:
    """Refuse what is too deep, or too large once its aliases are expanded, before any of it is expanded.

    Raises:
        ValueError: it is.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        parts = _parts(node)
        if done:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > MAX_NODES:
                raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
            continue
        if id(node) in sizes:
            continue
        if id(node) in open_nodes:
            raise ValueError(f"an alias stands for what it is part of, line {node.start_mark.line + 1}")
        open_nodes.add(id(node))
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep, line {node.start_mark.line + 1}")
        stack.append((node, True))
        stack += [(part, False) for part in parts]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
