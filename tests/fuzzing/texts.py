"""Recipes and files of prompts: what `limbeck check` makes of them, held against what their files say by other readers."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re

import yaml

from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import load_recipe, parse
from limbeck.config.shorthand import expand
from limbeck.config.teacher import teacher_data
from limbeck.config.yaml_text import load_yaml
from limbeck.elicit.prompts import load_prompts
from limbeck.models.named import NAMED
from tests.command_line import called
from tests.conftest import PROMPTS, make_recipe_data, write_prompts
from tests.fuzzing.mutations import (
    BOMB,
    MORE_STRANGE,
    STRANGE,
    as_json,
    strange_bytes,
    strange_data,
    strange_file,
    strange_lines,
)
from tests.fuzzing.trial import Trial

BUILTIN = ["quickstart", "offline-top-k", "grpo", "gkd", "dpo", "evol-instruct", "self-instruct", "mixkd", "rest-em", "fine-tune-cot", "api-top-logprobs", "extract-to-a-schema"]  # fmt: skip
LEAVES = {"true": True, "false": False, "": None, "~": None, "null": None}


class Recipes:
    """Recipes as text and as data. One that is accepted has every value of its file, and no other reading of a scalar."""

    name = "recipes"

    def __init__(self, home, model):
        folder = home / "recipes"
        folder.mkdir()
        tiny = make_recipe_data(model, write_prompts(folder), folder)
        self.bases = [yaml.safe_dump(tiny)] * 4
        for name in BUILTIN:
            text = recipe_files()[name].read_text()
            for known in NAMED:
                text = text.replace(known, str(model))
            self.bases.append(re.sub("layers: 2[0-9]", "layers: 3", text))

    def trial(self, rng, place):
        text = rng.choice(self.bases)
        what = rng.random()
        file = place / "recipe.yaml"
        if what < 0.45:
            content = as_json(strange_data(yaml.safe_load(text), rng, STRANGE + MORE_STRANGE, changes=2), rng)
        elif what < 0.75:
            content = strange_lines(text.encode(), rng)
        elif what < 0.78:
            content = rng.choice(
                [BOMB + text, text + BOMB, text.replace("name:", "name: &a", 1) + "\ntitle: *a\n"]
            ).encode()
        else:
            content = strange_bytes(text.encode(), rng)
        file.write_bytes(content)
        said = strange_file(file, rng, [__file__ and file]) if what > 0.97 else "content"
        return Trial(said, lambda: called("check", file), lambda _: self.silent(file))

    def silent(self, file):
        text = file.read_text(encoding="utf-8")
        data = load_yaml(text)
        if complaint := _misread(yaml.compose(text, yaml.SafeLoader), data, "the file"):
            return complaint
        recipe = load_recipe(file)
        read = recipe.model_dump(mode="json", by_alias=True)
        read["teacher"] = recipe.teacher.model_dump(mode="json", by_alias=True)
        read["machine"] = recipe.machine.model_dump(mode="json", by_alias=True)
        if recipe.models:
            read["models"] = {
                name: model.model_dump(mode="json", by_alias=True) for name, model in recipe.models.items()
            }
        whole = expand(data)
        whole["teacher"] = teacher_data(whole["teacher"])
        if recipe.models:
            whole["models"] = {name: teacher_data(model) for name, model in whole["models"].items()}
        if "evaluate" in whole:
            whole["evaluate"] = _short_forms(whole["evaluate"])
        again = parse(recipe.resolved()).hash == recipe.hash
        whole.pop("full", None)  # which `--scale full` alone reads
        return _lost(whole, read, "") or (None if again else "its resolved form is another recipe")


def _short_forms(evaluate):
    """What `evaluate` says, with limits apart from the names of tasks, and without a default that is written out."""
    names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in evaluate.get("metrics", [])]
    limits = {
        name: entry[name]["limit"] for entry in evaluate.get("metrics", []) if isinstance(entry, dict) for name in entry
    }
    said = {"metrics": names} if "metrics" in evaluate else {}
    said |= {"limits": limits | (evaluate.get("limits") or {})} if limits else {}
    return {key: value for key, value in (evaluate | said).items() if (key, value) != ("speeds", True)}


def _misread(node, value, path):
    """Where data differs from the file's own scalars and keys, by the rules of YAML 1.2; None if nowhere."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) != len(keys) or not isinstance(value, dict) or set(keys) != set(value):
            return f"{path}: the keys {keys} are read as {value!r:.200}"
        return next(
            filter(None, (_misread(part, value[key.value], f"{path}.{key.value}") for key, part in node.value)), None
        )
    if isinstance(node, yaml.SequenceNode):
        if not isinstance(value, list) or len(value) != len(node.value):
            return f"{path}: a list of {len(node.value)} is read as {value!r:.200}"
        return next(filter(None, (_misread(*pair, path) for pair in zip(node.value, value, strict=True))), None)
    text = node.value
    if isinstance(value, str):
        return None if value == text else f"{path}: {text!r:.80} is read as {value!r:.80}"
    if node.style:
        return f"{path}: the text {text!r:.80} is read as {value!r:.80}"
    if text.lower() in LEAVES:
        same = LEAVES[text.lower()] is value
    elif isinstance(value, bool) or value is None:
        same = False
    else:
        same = (
            int(text, 0) if text[:2] in ("0x", "0o") else float(text) if isinstance(value, float) else int(text, 10)
        ) == value
    return None if same or value != value else f"{path}: {text!r:.80} is read as {value!r:.80}"


def _lost(data, read, path):
    """A value of the file that the recipe does not have; None if it has all."""
    if isinstance(data, dict) and isinstance(read, dict):
        lost = [f"{path}.{key}" for key in data if key not in read and data[key] is not None]
        return (
            f"not in the recipe: {lost[0]}"
            if lost
            else next(filter(None, (_lost(value, read.get(key), f"{path}.{key}") for key, value in data.items())), None)
        )
    if isinstance(data, list) and isinstance(read, list) and len(data) == len(read):
        return next(filter(None, (_lost(*pair, f"{path}[]") for pair in zip(data, read, strict=True))), None)
    is_quoted = isinstance(data, str) and type(read) is int and data == str(read)  # a number between quotes is one
    is_same = is_quoted or (
        data == read
        and isinstance(data, bool) == isinstance(read, bool)
        and isinstance(data, str) == isinstance(read, str)
    )
    return None if is_same or (data is None and not read) else f"{path}: {data!r:.80} became {read!r:.80}"


class Prompts:
    """Files of prompts in every form. One that is accepted gives each of its rows, or says how many it leaves out."""

    name = "prompt files"

    def __init__(self, home, model):
        import pyarrow
        from pyarrow import parquet

        self.home = home / "prompts"
        self.home.mkdir()
        recipe = make_recipe_data(model, write_prompts(self.home), self.home)
        recipe["student"] = {"start": {"pretrained": str(model)}}
        self.recipe = self.home / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))
        rows = [{"id": f"p{n}", "prompt": text, "answer": f"answer {n}, and more"} for n, text in enumerate(PROMPTS)]
        turns = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}], "kind": "a"}
            for text in PROMPTS
        ]
        pairs = [{"prompt": text, "chosen": "yes", "rejected": "no", "margin": 1.5} for text in PROMPTS]
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        packed = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
        lines = {
            name: "".join(json.dumps(row) + "\n" for row in these).encode()
            for name, these in (("a", rows), ("b", turns), ("c", pairs))
        }
        self.rows = {"a": rows, "b": turns, "c": pairs}
        self.files = {f"{name}.jsonl": content for name, content in lines.items()} | {
            "rows.json": json.dumps(rows, indent=1).encode(), "rows.csv": table.getvalue().encode(), "rows.tsv": table.getvalue().replace(",", "\t").encode(),
            "rows.txt": "\n".join(PROMPTS).encode(), "rows.parquet": packed.getvalue(), "rows.jsonl.gz": gzip.compress(lines["a"], mtime=0),
        }  # fmt: skip

    def trial(self, rng, place):
        name = rng.choice(list(self.files))
        content, what = self.files[name], rng.random()
        if name.endswith(".jsonl") and what < 0.5:
            rows = strange_data(self.rows[name[0]], rng, STRANGE + MORE_STRANGE)
            content = b"".join(as_json(row, rng) + b"\n" for row in rows)
        elif what < 0.75 and name not in ("rows.parquet", "rows.jsonl.gz"):
            content = strange_lines(content, rng)
        else:
            content = strange_bytes(content, rng)
        if what > 0.95:
            name = rng.choice(list(self.files))  # under the name of another form
        file = place / name
        file.write_bytes(content)
        said = strange_file(file, rng, list(self.home.iterdir())) if rng.random() < 0.04 else "content"
        return Trial(
            f"{name} {said}",
            lambda: called("check", self.recipe, "--set", f"prompts.from={file}"),
            lambda _: self.silent(file),
        )

    @staticmethod
    def silent(file):
        from limbeck.elicit.prompt_file import PromptReader

        reader = PromptReader()
        prompts = list(reader.read([file]))
        left_out = sum(count for account in reader.accounts for count, _ in account.left_out.values())
        rows = _rows(file)
        if rows is None:
            return None
        if len(prompts) + left_out != len(rows):
            return f"{len(rows)} rows gave {len(prompts)} prompts, and {left_out} were left out"
        texts = ["\n".join(_strings(row)) for row in rows]
        lost = [
            prompt.text
            for prompt in prompts
            if not any(prompt.text in text or prompt.text.strip() in text for text in texts)
        ]
        if lost:
            return f"a prompt that is in no row: {lost[0]!r:.100}"
        assert [prompt.text for prompt in load_prompts(str(file))] == [prompt.text for prompt in prompts]
        return None


def _rows(file):
    """The rows of a file by plain readers of its form; None where its form is for another test to tell."""
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:4] == b"PAR1":
        from pyarrow import parquet

        return parquet.read_table(io.BytesIO(content)).to_pylist()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16")
    if "\0" in text[:8]:
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and lines[0].startswith("{"):
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return None if len(values) == 1 else values
    if ".csv" in file.name or ".tsv" in file.name:
        head = lines[0]
        mark = "\t" if ".tsv" in file.name else max(",;\t|", key=lambda mark: (head.count(mark), mark == ","))
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
    if ".txt" in file.name:
        return [{"prompt": line} for line in lines]
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list) else None


def _strings(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
    elif value is not None:
        yield str(value)
        if isinstance(value, str) and value[:1] in "[{":
            with contextlib.suppress(ValueError, RecursionError):
                yield from _strings(json.loads(value))
