"""Lists of tokens and what is kept of them: caches of a teacher's distributions, packing, batches, alignment."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import torch
import yaml

from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import Row, make_batch, steps_of_epoch
from limbeck.models.byte_alignment import segments
from limbeck.objectives.head import Head
from limbeck.signals.cache import SignalCache, text_key
from limbeck.signals.dense import DenseSignal
from limbeck.signals.pack import id_bits, pack_bits, unpack_bits
from limbeck.signals.wire import opened, sealed
from limbeck.types import UserError
from tests.command_line import called
from tests.conftest import make_recipe_data, write_prompts
from tests.fuzzing.mutations import (
    MORE_STRANGE,
    STRANGE,
    as_json,
    strange_bytes,
    strange_content,
    strange_data,
    strange_file,
)
from tests.fuzzing.trial import Trial, as_command

V = 40
FORMS = {"hidden": {"hidden": {"dtype": "float32"}}, "top_k": {"top_k": {"k": 5}}, "sampled": {"sampled": {"draws": 6}}}


class Tokens:
    """What is read back is what was kept, or it is refused; every token of every list stands in one place."""

    name = "cache, packing, alignment"

    def __init__(self, home, model):
        self.home = home / "tokens"
        self.home.mkdir()
        noise = torch.Generator().manual_seed(1)
        self.rows = [Row(f"s{n}", tuple(range(1, 3 + n)), tuple(range(5, 9 + n)), group=f"g{n}") for n in range(5)]
        self.kept = {}
        for name, form in FORMS.items():
            cache = SignalCache(self.home / name, "toy", V, CacheSettings(**form))
            for row in self.rows:
                count = len(row.response_ids)
                signal = DenseSignal(
                    torch.randn(count, 8, generator=noise),
                    Head(torch.randn(V, 8, generator=torch.Generator().manual_seed(2))),
                )
                cache.add([text_key(row.prompt_ids, row.response_ids)], signal, torch.tensor(row.response_ids), [count])
            cache.flush()
            self.kept[name] = self.read(self.home / name, form)
        self.body = sealed({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}, {"x": "y"})
        self.imported = self._imported(home, model)

    def _imported(self, home, model):
        """A run that waits for its cache to be filled from a file, and a file that fills it."""
        folder = self.home / "import"
        folder.mkdir()
        data = make_recipe_data(model, write_prompts(folder), folder)
        lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()][:4]
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps(line | {"answer": f"a red dog {n}"}) + "\n" for n, line in enumerate(lines))
        )
        data |= {
            "writer": [{"by": "corpus"}],
            "student": {"start": {"pretrained": str(model)}},
            "teacher": {"model": str(model), "cache": {"top_k": {"k": 4}}},
        }
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(data))
        status, said = called("elicit", recipe, "--out", folder / "run")
        assert status == 0, said
        status, said = called("cache", recipe, "--out", folder / "run", "--export", folder / "lines.jsonl")
        assert status == 0, said
        shutil.rmtree(folder / "run" / "signals")
        return SimpleNamespace(recipe=recipe, run=folder / "run", lines=(folder / "lines.jsonl").read_bytes())

    def read(self, folder, form):
        cache = SignalCache(folder, "toy", V, CacheSettings(**form))
        signal = cache.view(make_batch(self.rows)).signal
        parts = (
            [signal.hidden_NE, signal.head.weight_VD]
            if isinstance(signal, DenseSignal)
            else list(vars(signal).values())
        )
        return [part.tolist() for part in parts if isinstance(part, torch.Tensor)]

    def trial(self, rng, place):
        what = rng.random()
        if what < 0.45:
            return self._cache(rng, place)
        if what < 0.6:
            return self._import(rng, place)
        if what < 0.7:
            return self._wire(rng)
        make = rng.choice([packed, batched, aligned])
        seed = rng.randrange(2**31)

        def call():
            make(type(rng)(seed))
            return 0, ""

        return Trial(f"{make.__name__} {seed}", call, lambda _: None)

    def _cache(self, rng, place):
        name = rng.choice(list(FORMS))
        folder = place / name
        shutil.copytree(self.home / name, folder)
        files = sorted(folder.iterdir())
        file = rng.choice(files)
        said = strange_file(file, rng, files) if rng.random() < 0.4 else strange_content(file, rng)
        found = []

        def call():
            return as_command(lambda: found.append(self.read(folder, FORMS[name])))

        return Trial(
            f"{name} {file.name} {said}",
            call,
            lambda _: None if found[0] == self.kept[name] else "other numbers are read than were kept",
        )

    def _import(self, rng, place):
        run, file = place / "run", place / "lines.jsonl"
        shutil.copytree(self.imported.run, run)
        lines = self.imported.lines.splitlines(keepends=True)
        number = rng.randrange(len(lines))
        if rng.random() < 0.7:
            lines[number] = as_json(strange_data(json.loads(lines[number]), rng, STRANGE + MORE_STRANGE), rng) + b"\n"
            file.write_bytes(b"".join(lines))
        else:
            file.write_bytes(strange_bytes(self.imported.lines, rng))
        said = strange_file(file, rng, [file]) if rng.random() < 0.1 else "content"

        def silent(printed):
            back = place / "back.jsonl"
            status, printed = called("cache", self.imported.recipe, "--out", run, "--export", back)
            if status:
                return f"what was imported can't be exported: {printed}"
            known = {line["input_ids"].__repr__(): line for line in map(json.loads, self.imported.lines.splitlines())}
            for line in map(json.loads, back.read_text().splitlines()):
                labels = known.get(repr(line["input_ids"]), {}).get("labels")
                if labels != line["labels"]:
                    return "a text that the run does not have"
            return None

        return Trial(
            f"import {said}", lambda: called("cache", self.imported.recipe, "--out", run, "--import", file), silent
        )

    def _wire(self, rng):
        body = strange_bytes(self.body, rng)
        whole = opened(self.body)

        def call():
            try:
                tensors, facts = opened(body)
            except ValueError as error:
                raise UserError(str(error)) from error
            assert {name: value.tolist() for name, value in tensors.items()} == {
                name: value.tolist() for name, value in whole[0].items()
            }
            return 0, ""

        return Trial("wire", call, lambda _: None)


def packed(rng):
    """Ids in as few bits as they need come back."""
    size = rng.choice([1, 2, 3, 255, 256, 257, 50_000, 151_936, 2**20, 2**31])
    ids = [rng.randrange(size) for _ in range(rng.choice([0, 1, 7, 8, 9, 300]))]
    bits = id_bits(size)
    assert unpack_bits(pack_bits(torch.tensor(ids, dtype=torch.long), bits), bits, len(ids)).tolist() == ids


def batched(rng):
    """Rows in batches: each row once in an epoch, each token at its place, its mask where it answers."""
    rows = []
    for n in range(rng.randint(1, 40)):
        prompt, response = (tuple(rng.randrange(300) for _ in range(rng.choice([1, 2, 9, 70, 400]))) for _ in range(2))
        rows.append(
            Row(f"s{n}", prompt, response, group=f"g{n // rng.randint(1, 3)}", weight=rng.choice([1.0, 0.0, 3.5]))
        )
    together = rng.random() < 0.5
    steps = steps_of_epoch(rows, rng.randrange(99), rng.randrange(3), rng.choice([1, 32, 500, 5000]), together)
    places = [place for step in steps for micro in step for place in micro]
    assert sorted(places) == list(range(len(rows)))
    for micro in (micro for step in steps for micro in step):
        batch = make_batch(rows, micro)
        for row, tokens, mask, weight in zip(
            (rows[n] for n in micro), batch.tokens_BT, batch.mask_BT, batch.weight_BT, strict=True
        ):
            assert tuple(tokens[: len(row)].tolist()) == row.prompt_ids + row.response_ids
            assert tuple(tokens[mask].tolist()) == row.response_ids and float(weight.sum()) == row.weight * len(
                row.response_ids
            )
        if together:
            assert all(
                {rows[n].group for n in micro}.isdisjoint({row.group for n, row in enumerate(rows) if n not in micro})
                for _ in "a"
            )


def aligned(rng):
    """Two divisions of a text: segments cover both up to where they differ, without gaps."""

    def divided(text):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    text = bytes(rng.choice(b"ab\xc3\xa9 ") for _ in range(rng.randrange(30)))
    other = text if rng.random() < 0.6 else strange_bytes(text, rng)[:60]
    ours, theirs = divided(text), divided(other)
    at, their_at = 0, 0
    for segment in segments(ours, theirs):
        assert (segment.ours.start, segment.theirs.start) == (at, their_at) and segment.ours and segment.theirs
        at, their_at = segment.ours.stop, segment.theirs.stop
        assert b"".join(ours[segment.ours.start : at]) == b"".join(theirs[segment.theirs.start : their_at])
    if text == other:
        assert b"".join(ours[at:]) == b"".join(theirs[their_at:]) == b""
