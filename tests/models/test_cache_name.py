"""Caches go by the name that the installed transformers has for them, and no family is told that it is an old one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from limbeck.models.cache_name import NAMES, cache_name
from limbeck.models.generate import Decoding, GenerationJob, generate
from limbeck.models.load import load_model
from limbeck.models.slots import row_bytes
from limbeck.models.states import shared_states
from limbeck.types import Sampling
from tests.conftest import make_tokenizer
from tests.families import make_model

FORWARDS = {
    "cache": lambda input_ids=None, cache=None, **kwargs: None,
    "past_key_values": lambda input_ids=None, past_key_values=None, use_cache=None: None,
    "cache_params": lambda input_ids=None, cache_params=None, use_cache=None: None,
}
FAMILIES = ("llama", "gpt2", "bloom", "qwen2-moe", "mamba", "mamba2", "lfm2", "qwen3-next", "gemma3, with images")


def net_with(forward):
    net = nn.Module()
    net.forward = forward
    return net


def test_every_name_is_known():
    assert {name: cache_name(net_with(forward)) for name, forward in FORWARDS.items()} == {name: name for name in NAMES}
    with pytest.raises(AssertionError, match="takes no cache"):
        cache_name(net_with(lambda input_ids: None))


@pytest.fixture
def told():
    """What transformers says, also what it says once a process; it calls warnings by its own logger."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    logging.Logger.warning_once.cache_clear()
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_given_its_cache_by_an_old_name(family, told, tmp_path, recwarn):
    make_model(family, tmp_path / "model", 0, make_tokenizer())
    model = load_model(str(tmp_path / "model"))
    prompt = model.prompt_ids(({"role": "user", "content": "why is the sky blue"},))
    jobs = [GenerationJob(ids, Sampling(max_tokens=4), 0) for ids in (prompt, prompt[:-2])]
    assert len(list(generate(model.net, jobs, model.eos_ids, decoding=Decoding(2)))) == 2
    assert row_bytes(model.net, 8) > 1
    with torch.no_grad():
        shared_states(model.net, torch.tensor([[*prompt, 1], [*prompt, 2]]))
    assert not [text for text in told if "deprecated" in text]
    assert not [one for one in recwarn if "cache" in str(one.message) or "past_key_values" in str(one.message)]
