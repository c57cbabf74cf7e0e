"""Families of models down roads: a part of one table (`tests/families.py`); `tests/long` runs every cell."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from limbeck.config.recipe import parse
from limbeck.models.generate import Decoding, GenerationJob, generate
from limbeck.models.load import load_model
from limbeck.runs.pipeline import run
from limbeck.types import Sampling, UserError
from tests.conftest import PROMPTS, make_tokenizer
from tests.families import FAMILIES, REFUSED, cells, make_model, recipe_of


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    """Plans need this machine's speed; measuring it takes longer than the rest."""
    monkeypatch.setattr("limbeck.runs.hardware.matrix_rate", lambda *_, **__: 1e10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("family")
            for name, seed in (("teacher", 0), ("other", 1)):
                make_model(family, made[family] / name, seed, make_tokenizer())
        return made[family]

    return folder


@pytest.mark.parametrize(("family", "road"), cells(whole=False))
def test_a_family_takes_a_road(family, road, folders, prompt_file, tmp_path):
    take(road, family, folders(family), prompt_file, tmp_path)


def take(road, family, folder, prompt_file, tmp_path):
    """Elicit, train and export; then load the export as anyone would."""
    recipe = parse(recipe_of(road, folder, prompt_file))
    if (family, road) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family, road]):
            run(recipe, tmp_path / "run", stages=("elicit", "train"))
        return
    run(recipe, tmp_path / "run", stages=("elicit", "train"))
    student = tmp_path / "run" / "student"
    images = "vision_config" in json.loads((student / "config.json").read_text())
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    _, told = auto.from_pretrained(student, output_loading_info=True)
    assert not any(told.values()), told


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_the_librarys_own(family, folders):
    model = load_model(str(folders(family) / "teacher"))
    prompts = [model.prompt_ids(({"role": "user", "content": text * n},)) for n, text in enumerate(PROMPTS[:4], 1)]
    jobs = [GenerationJob(ids, Sampling(max_tokens=10), 0) for ids in [*prompts, prompts[0]]]
    got = dict(generate(model.net, jobs, model.eos_ids, decoding=Decoding(3)))
    for index, job in enumerate(jobs):
        tokens = torch.tensor([job.prompt_ids])
        want = model.net.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False)
        assert got[index] == want[0, tokens.shape[1] :].tolist()
