import time

import pytest
import yaml

from limbeck.config.yaml_text import dump_yaml, load_yaml, read_yaml
from limbeck.types import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:40", "1:40"),  # sexagesimal in YAML 1.1
        ("012", 12),
        ("0o17", 15),
        ("0x10", 16),
        ("2e-4", 2e-4),
        ("2.e-4", 2e-4),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("null", None),
        ("{a: }", {"a": None}),
        ("=", "="),
        ("'12'", "12"),
    ],
)
def test_scalars_are_those_of_the_core_schema(text, value):
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value", ["1:40", "012", "0o17", "2e-4", "no", "2024-01-01", "~", "", "1_000", "=", "a: b", "é"]
)
def test_what_is_written_is_read_as_it_was(value):
    data = {"a": value, "b": [value, 1, 2.5, True, None]}
    assert load_yaml(dump_yaml(data)) == data == yaml.safe_load(dump_yaml(data))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join(f'*{before}' for _ in range(9))}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "stand for more than"),
        ("a: &a [*a]", "part of, line 1"),
        ("[" * 150 + "]" * 150, "deep|recursion"),
        ("[" * 20_000, "recursion|deep"),
        ("9" * 5000, "more than 100 digits"),
        ("a: 1\na: 2", "'a' appears twice"),
        ("1: a", "1 is not text"),
        ("a: \x00", "special characters"),
        ("!!python/object/apply:os.system [id]", "constructor"),
        ("a: [", "expected"),
    ],
)
@pytest.mark.promise("S12")
def test_what_is_no_data_is_refused_at_once(text, why, tmp_path):
    began = time.thread_time()
    with pytest.raises(ValueError, match=why):
        load_yaml(text)
    assert time.thread_time() - began < 5
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UserError, match="is not valid YAML"):
        read_yaml(tmp_path / "file.yaml")


def test_an_alias_is_read_where_it_stands():
    assert load_yaml("a: &a {x: 1}\nb: [*a, *a]") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}]}
