"""An exported student: written so that `transformers` ends its answers where they were taught to end, and loaded again
by plain `transformers` before anyone calls it done.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from limbeck.models.folder import quiet, read_config, read_tokenizer, read_weights, save_model
from limbeck.models.model import Model
from limbeck.models.weights import check_folder, head_rows, text_config
from limbeck.types import UserError

MOST_KL = 1e-6  # nats a token, between the student in memory and the one that was loaded again
ROWS, COLUMNS = 3, 24
SAMPLE_TEXT = "The export is loaded again: 1, 2, 3.\n\tÀ bientôt!"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
SHARE_FREE = 0.7  # of free memory that a second copy may take; a larger model is compared tensor by tensor


def export(model: Model, folder: Path) -> None:
    """Save a trained student into `folder`, which must exist, and load it again.

    Raises:
        UserError: what was loaded is not what was saved.
    """
    with _ending(model):
        save_model(model.net, model.tokenizer, folder)
    check_export(model, folder)


@contextlib.contextmanager
def _ending(model: Model) -> Iterator[None]:
    """Let the settings of generation end answers with the model's `eos_ids`, the tokenizer's first, and sample only if
    they say so."""
    net = model.net
    parts = {id(part): part for part in (net.config, text_config(net.config))}.values()
    before = net.generation_config, [part.eos_token_id for part in parts if hasattr(part, "eos_token_id")]
    first = int(model.tokenizer.eos_token_id)
    ends = [first, *sorted(model.eos_ids - {first})]
    net.generation_config = _settings(net, ends)
    for part in parts:
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = ends if len(ends) > 1 else first
    try:
        yield
    finally:
        net.generation_config = before[0]
        for part, value in zip((part for part in parts if hasattr(part, "eos_token_id")), before[1], strict=True):
            part.eos_token_id = value


def _settings(net: PreTrainedModel, ends: list[int]) -> GenerationConfig:
    """The model's settings of generation with these ends; those that transformers refuses to save are left out."""
    settings: Any = copy.deepcopy(net.generation_config) or GenerationConfig()
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    if not settings.do_sample:
        for name in SAMPLING:
            if hasattr(settings, name):
                setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError:  # of several kinds, all about settings that nothing of ours reads
        kept = {name: getattr(settings, name, None) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
        settings = GenerationConfig(**kept)
    return settings  # type: ignore[no-any-return]


def check_export(model: Model, folder: Path) -> None:
    """Load a saved student again and compare: its tensors' names, its predictions, its tokenizer.

    Raises:
        UserError: a difference, by name.
    """
    name = f"the student saved in {folder.name}"
    with quiet():
        if _free_bytes(model.net.device) * SHARE_FREE > _weight_bytes(model.net):
            again = read_weights(folder, name, model.net.dtype)
            again.set_attn_implementation(model.net.config._attn_implementation)
            again.to(model.net.device)  # type: ignore[arg-type]  # transformers' own `to` is not typed
            _compare(model, again, name)
            del again
        else:
            check_folder(folder, read_config(folder, name), name)
            _compare_tensors(model.net, folder, name)
        tokenizer = read_tokenizer(folder, name)
    ours, theirs = (list(one(SAMPLE_TEXT)["input_ids"]) for one in (model.tokenizer, tokenizer))
    if ours != theirs or tokenizer.chat_template != model.tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer, loaded again, reads text in another way: nothing is exported")


@torch.inference_mode()
def _compare(model: Model, again: PreTrainedModel, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = min(model.vocab_size, head_rows(model.net))
    width = min(COLUMNS, model.max_length)
    tokens_BT = torch.randint(rows, (ROWS, width), generator=generator).to(model.net.device)
    training = model.net.training
    model.net.eval()
    log_p, log_q = (_log_probs(net, tokens_BT) for net in (model.net, again))
    model.net.train(training)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    if not kl <= MOST_KL:
        raise UserError(
            f"{name}, loaded again, predicts otherwise than in memory (KL {kl:.2g} nats a token): its configuration"
            f" (type {model.net.config.model_type}) doesn't describe it, and nothing is exported"
        )


def _log_probs(net: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = net(input_ids=tokens_BT, use_cache=False).logits
    return logits.double().log_softmax(-1) if logits.device.type != "mps" else logits.float().log_softmax(-1)


def _compare_tensors(net: PreTrainedModel, folder: Path, name: str) -> None:
    """Every saved tensor that has the name of one in memory must equal it; those that are saved in another layout
    (experts) are told by their sizes alone, which `check_folder` compared."""
    ours = net.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no dictionary)
                if key in ours and not torch.equal(tensors.get_tensor(key).to(ours[key].device), ours[key]):
                    raise UserError(f"{name}: {key} is not what it was in memory, and nothing is exported")


def _weight_bytes(net: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())


def _free_bytes(device: torch.device) -> int:
    """Free memory of the host, and of the device where that is another."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host
