"""Folders of models and of runs: what loads, reports and goes on from them, held against their bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct

import torch
import yaml
from safetensors.torch import load_file, save_file

from limbeck.models.load import load_model, model_identity
from limbeck.models.template import prompt_ids
from limbeck.storage.store import Store
from tests.command_line import called
from tests.conftest import make_recipe_data, write_prompts
from tests.fuzzing.mutations import strange_content, strange_file
from tests.fuzzing.trial import Trial, as_command

ASKED = "why is the red cat"
TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**8 }}", "{{ 'x' * 10**10 }}", "fixed<|assistant|>", "{{ messages }}", "{{",
    "{{ messages[0].__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "", "{{ messages[0]['content'] | upper }}",
    "{{ 9**9**9**9 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages[0]['content'][:4] }}", "{% set x = namespace(a='b') %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}",
]  # fmt: skip
SETTINGS = {
    "num_hidden_layers": [0, -1, 1, 3, 5, 3000, "4", 2**40, 4.5, None], "hidden_size": [0, 31, 2**31, None], "num_attention_heads": [0, 3, -4], "vocab_size": [0, 1, 299, 10**9],
    "head_dim": [0, 7, 2**20], "max_position_embeddings": [0, 1, -5, 2**70], "model_type": ["bert", "x", None, "mamba", "../x"], "rms_norm_eps": [0, "x", -1.0, 1e30], "eos_token_id": [[], [0, 7], 10**6, "x", None, -1],
    "quantization_config": [{"quant_method": "gptq"}, {"quant_method": "x"}, 7, {"quant_method": "bitsandbytes", "load_in_4bit": True}], "auto_map": [{"AutoConfig": "a.B"}], "dtype": ["float8", "float16", 7],
    "tie_word_embeddings": [False, "x"], "rope_parameters": [{"rope_type": "yarn"}, {"rope_type": "x"}, 7], "architectures": [["BertForMaskedLM"], "x", [7], ["LlamaForSequenceClassification"]], "hidden_act": ["x", None],
    "attention_bias": [True], "initializer_range": ["x"],
}  # fmt: skip


def hashes(folder):
    """The SHA-256 of every file, by its path in the folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Models:
    """Folders of models. One that is accepted has its own weights, another identity if a byte differs, and a template that
    passes on what is said."""

    name = "model folders"

    def __init__(self, home, model):
        self.model = model
        folder = home / "models"
        folder.mkdir()
        recipe = make_recipe_data(model, write_prompts(folder), folder) | {
            "student": {"start": {"pretrained": str(model)}}
        }
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))
        self.files = hashes(model)
        self.identity = model_identity(str(model))

    def trial(self, rng, place):
        folder = place / self.model.name
        shutil.copytree(self.model, folder)
        files = sorted(folder.iterdir())
        file, what = rng.choice(files), rng.random()
        if what < 0.2:
            name, said = "config.json", rng.choice(list(SETTINGS))
            data = json.loads((folder / name).read_text()) | {said: rng.choice(SETTINGS[said])}
            (folder / name).write_text(json.dumps(data))
        elif what < 0.28:
            name, said = "chat_template.jinja", "template"
            (folder / name).write_text(rng.choice(TEMPLATES))
        elif what < 0.4:
            name, said = "model.safetensors", _strange_header(folder / "model.safetensors", rng)
        elif what < 0.48:
            name, said = "model.safetensors", _strange_tensor(folder / "model.safetensors", rng)
        elif what < 0.62:
            name, said = file.name, strange_file(file, rng, files)
        else:
            name, said = file.name, strange_content(file, rng)
        checks = rng.random() < 0.4

        def call():
            if checks:
                return called("check", self.recipe, "--set", f"teacher={folder}")
            return as_command(lambda: load_model(str(folder)))

        return Trial(f"{name} {said}", call, lambda _: self.silent(folder))

    def silent(self, folder):
        if hashes(folder) == self.files:
            return None
        model = load_model(str(folder))
        if model.identity == self.identity:
            differs = {name for name, digest in hashes(folder).items() if self.files.get(name) != digest} | set(
                self.files
            ) - set(hashes(folder))
            return f"{sorted(differs)} changed, and the identity did not"
        written, have = load_file(folder / "model.safetensors"), model.net.state_dict()
        wrong = [
            name
            for name, value in have.items()
            if name in written and not torch.equal(written[name].to(value.dtype), value)
        ]
        wrong += [name for name in have if name not in written and name != "lm_head.weight"]
        if wrong:
            return f"{wrong[0]} is not what the file holds"
        said = model.tokenizer.decode(prompt_ids(model.tokenizer, ({"role": "user", "content": ASKED},)))
        return (
            None
            if ASKED in said or model.tokenizer.decode(model.tokenizer(ASKED)["input_ids"]) != ASKED
            else f"what is said is lost: {said!r}"
        )


def _strange_header(file, rng):
    """Change the JSON at the beginning of a safetensors file."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    what = rng.choice(["renamed", "shape", "offsets", "dtype", "swapped", "length", "metadata"])
    if what == "renamed":
        header[name + "x"] = header.pop(name)
    elif what == "shape":
        header[name]["shape"] = rng.choice([[], [2**40], [-1, 1], header[name]["shape"][::-1], [0]])
    elif what == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [5, 1], [-1, 4], [0, 4]])
    elif what == "dtype":
        header[name]["dtype"] = rng.choice(["F16", "I32", "F64", "X", "F8_E4M3"])
    elif what == "swapped":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif what == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {"format": 7}, {}, {"format": "pt", "x": "y" * 5000}])
    text = json.dumps(header).encode()
    length = rng.choice([0, 2**63, size - 1, size + 9, 2**31]) if what == "length" else len(text)
    file.write_bytes(struct.pack("<Q", length) + text + rest)
    return what


def _strange_tensor(file, rng):
    """Write other numbers: one that differs, NaN, infinite, in other types, of other sizes, or none."""
    tensors = load_file(file)
    name = rng.choice(list(tensors))
    what = rng.choice(["one", "nan", "inf", "zero", "half", "size", "lost", "more", "huge"])
    value = tensors[name].clone()
    if what in ("one", "nan", "inf", "huge"):
        value.view(-1)[rng.randrange(value.numel())] = {
            "one": 0.5,
            "nan": float("nan"),
            "inf": float("inf"),
            "huge": 3e38,
        }[what]
    tensors[name] = {"zero": value * 0, "half": value.half(), "size": value[:1].clone()}.get(what, value)
    if what == "lost":
        del tensors[name]
    if what == "more":
        tensors["x." + name] = value.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return what


class Runs:
    """Run folders: read by report, why, watch, evaluate, export, and gone on from. What is hashed can't change silently: an
    accepted folder gives the student and the summary that it gave."""

    name = "run folders"

    def __init__(self, home, model):
        folder = home / "runs"
        folder.mkdir()
        data = make_recipe_data(model, write_prompts(folder), folder)
        data["teacher"] = {"model": str(model), "cache": {"top_k": {"k": 8}}}
        data["evaluate"]["speeds"] = False
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(data))
        self.run = folder / "run"
        status, said = called("run", self.recipe, "--out", self.run)
        assert status == 0, said
        self.student = (self.run / "student" / "model.safetensors").read_bytes()
        self.summary = json.loads((self.run / "evaluation" / "summary.json").read_text())
        self.answers = self._answers(self.run)

    @staticmethod
    def _answers(run):
        with Store(run / "store.sqlite") as store:
            rows = store._db.execute(
                "select key, finish, body from answers join samples on samples.id = sample_id order by key"
            )
            return rows.fetchall()

    def trial(self, rng, place):
        run = place / "run"
        shutil.copytree(self.run, run)
        command = rng.choices(list(COMMANDS), [weight for weight, _, _ in COMMANDS.values()])[0]
        _, gone, patterns = COMMANDS[command]
        for name in gone:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        files = sorted({file for pattern in patterns for file in run.glob(pattern) if file.is_file()})
        file = rng.choice(files)
        said = strange_file(file, rng, files) if rng.random() < 0.25 else strange_content(file, rng)
        name = str(file.relative_to(run))
        arguments = [
            str(run)
            if part == "RUN"
            else str(self.recipe)
            if part == "RECIPE"
            else str(place / "out")
            if part == "OUT"
            else part
            for part in command.split()
        ]
        return Trial(
            f"{command}: {name} {said}", lambda: called(*arguments), lambda _: self.silent(run, command, file, name)
        )

    def silent(self, run, command, file, name):
        base = self.run / name
        same = name == "evaluation/manifest.json" or _content(file) == base.read_bytes()
        if same or command.startswith(("why", "watch")):
            return None
        if command.startswith("report"):
            return f"{name} changed, and the report says nothing" if name.startswith("evaluation/") else None
        if command.startswith("export"):
            return (
                f"{name} changed, and is exported" if name.startswith("student/") and not name.endswith(".md") else None
            )
        if (run / "student" / "model.safetensors").read_bytes() != self.student:
            return f"{name} changed, and the student is another"
        summary = json.loads((run / "evaluation" / "summary.json").read_text())
        differs = [key for key in ("systems", "paired", "recovered") if summary.get(key) != self.summary.get(key)]
        return f"{name} changed, and so did {differs}" if differs else None


def _content(file):
    """What is in the file; None where there is none (a pipe or a device is none), or it can't be read."""
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError:
        return None


LIVE = ("*.json", "*.jsonl", "recipe.yaml")
COMMANDS = {  # the weight of each, what is taken away before, and which files it reads
    "report RUN": (22, (), (*LIVE, "evaluation/*", "controls/*/*.jsonl")),
    "report RUN --json": (8, (), (*LIVE, "evaluation/*")),
    "report RUN --csv": (5, (), ("evaluation/*",)),
    "report RUN --table": (5, (), (*LIVE, "evaluation/*")),
    "why RUN": (12, (), (*LIVE, "store.sqlite")),
    "watch RUN --once": (12, (), (*LIVE, "store.sqlite", "evaluation/summary.json", "controls/*/*.jsonl")),
    "export RUN --to hf --out OUT": (6, (), ("student/*", "recipe.yaml", "evaluation/prompts.jsonl", "metrics.jsonl")),
    "evaluate RECIPE --out RUN": (10, ("evaluation/summary.json",), ("evaluation/*", "student/*", "store.sqlite", *LIVE)),
    "run RECIPE --out RUN": (12, (), ("**/*",)),
    "train RECIPE --out RUN": (3, ("student", "report.html"), ("checkpoints/*/*", "store.sqlite", "signals/*", "metrics.jsonl", "start.json", "inputs.json")),
}  # fmt: skip
