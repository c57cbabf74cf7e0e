"""A source of models from outside the package: one class, and `load_model` and its kin know it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from limbeck.models import sources
from limbeck.models.load import is_ready, load_config, load_model, load_tokenizer, model_folder, model_identity
from limbeck.models.model import Model
from limbeck.models.placement import Precision
from limbeck.models.sources import ModelSource, register_source
from limbeck.types import UserError
from tests.conftest import make_net, make_tokenizer


class Shelf(ModelSource):
    """`shelf:NAME` is the folder NAME on a shelf."""

    def __init__(self, shelf):
        self.shelf = shelf

    def matches(self, name):
        return name.startswith("shelf:")

    def folder(self, name):
        return self.shelf / name.removeprefix("shelf:")


class Made(ModelSource):
    """`made:SEED` is made in memory: there is no folder."""

    def matches(self, name):
        return name.startswith("made:")

    def is_ready(self, name):
        return False

    def config(self, name):
        return SimpleNamespace(num_hidden_layers=2)

    def tokenizer(self, name):
        return make_tokenizer()

    def identity(self, name):
        return name

    def load(self, name, dtype):
        net = make_net(layers=2, seed=int(name.removeprefix("made:")))
        return Model(net.to(dtype), self.tokenizer(name), self.identity(name))


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", list(sources.SOURCES))


def test_a_source_that_ends_as_a_folder_says_what_it_matches_and_where(tiny, tiny_folder):
    register_source(Shelf(tiny_folder.parent))
    model = load_model("shelf:model")
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), tiny.net.parameters(), strict=True))
    assert model.identity == model_identity("shelf:model") == "shelf:model@" + tiny.identity.partition("@")[2]
    assert load_tokenizer("shelf:model").get_vocab() == tiny.tokenizer.get_vocab()
    assert load_config("shelf:model").num_hidden_layers == 4 and is_ready("shelf:model")
    assert model_folder("shelf:model") == tiny_folder
    assert load_model(str(tiny_folder)).identity == tiny.identity, "other sources are as they were"


def test_a_source_without_a_folder_does_it_all_itself():
    register_source(Made())
    short = Precision(torch.bfloat16)
    model = load_model("made:7", short)
    assert model.identity == model_identity("made:7", short) == "made:7+bfloat16" and model.net.dtype == torch.bfloat16
    assert load_model("made:7").identity == model_identity("made:7") == "made:7"
    assert load_config("made:7").num_hidden_layers == 2 and not is_ready("made:7")
    with pytest.raises(UserError, match="not available as a folder"):
        model_folder("made:7")
    with pytest.raises(UserError, match="no model 'maid:7'"):
        load_model("maid:7")
