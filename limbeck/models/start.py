"""The initial weights of a student: a pretrained model, the teacher with layers dropped, or random; and adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.config.sections import Lora, Scratch, Student
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.placement import Placement
from limbeck.models.prune import Calibration, LayerChoice, choose_layers, drop_layers
from limbeck.types import RecipeError, content_hash, nearest


def begin(
    student: Student,
    teacher: Callable[[], Model],
    choice: LayerChoice | None,
    seed: int,
    placement: Placement | None = None,
) -> Model:
    """The student before training, without adapters, in float32. `choice` holds the layers that a pruned student keeps.
    The teacher, in float32 too, is loaded only if the student is made from it.

    Embeddings lose their `padding_idx`: if the padding token is the end-of-sequence token (SmolLM2, most Llamas), it
    would silently keep that token's input embedding from learning. Padding does not need it: no loss reads padding.
    """
    started = _begin(student, teacher, choice, seed)
    (placement or Placement()).put(started.net)
    for module in started.net.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return started


def _begin(student: Student, teacher: Callable[[], Model], choice: LayerChoice | None, seed: int) -> Model:
    start = student.start
    if start.pretrained is not None:
        return load_model(start.pretrained)
    like = teacher().with_context(None)
    if start.prune is not None:
        assert choice is not None
        return Model(
            drop_layers(like.net, choice.kept),
            like.tokenizer,
            f"{like.identity}/layers-{content_hash(choice.kept)[:12]}",
        )
    assert start.scratch is not None
    net = _random(start.scratch, like.net, seed)
    return Model(net, like.tokenizer, f"{like.identity}/scratch-{content_hash([start.scratch.config, seed])[:12]}")


def choose(
    student: Student,
    teacher: Callable[[], Model],
    calibration: Callable[[], Calibration],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerChoice | None:
    """The layers that a pruned student keeps; None for the other starts."""
    prune = student.start.prune
    if prune is None:
        return None
    count = prune.layers if prune.layers is not None else len(prune.keep)
    return choose_layers(teacher().net, prune.keep, count, calibration, progress=progress)


def _random(scratch: Scratch, like: PreTrainedModel, seed: int) -> PreTrainedModel:
    config = scratch_config(scratch, like.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    net.eval()
    return net


def scratch_config(scratch: Scratch, like: Any) -> Any:
    """The teacher's configuration with some settings replaced; lists with an entry per layer are left to the defaults.

    Raises:
        RecipeError: a setting that the configuration does not have, or the vocabulary, which is the teacher's.
    """
    settings = like.to_dict() if hasattr(like, "to_dict") else dict(vars(like))
    for key in scratch.config:
        if key not in settings:
            raise RecipeError(f"student.start.scratch.config.{key}", f"no such setting{nearest(key, settings)}")
        if key == "vocab_size":
            raise RecipeError(
                f"student.start.scratch.config.{key}", "the student speaks the teacher's vocabulary; leave it out"
            )
    per_layer = [
        key for key, value in settings.items() if isinstance(value, list) and len(value) == like.num_hidden_layers
    ]
    general = {key: value for key, value in settings.items() if key not in per_layer}
    return type(like)(**(general | scratch.config))


def add_adapters(net: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Put low-rank adapters into every linear layer but the head, in place, and freeze the rest. B starts at 0."""
    from peft import LoraConfig, inject_adapter_in_model  # 12 s of imports that only adapters need

    head = net.get_output_embeddings()
    targets = [name for name, module in net.named_modules() if isinstance(module, nn.Linear) and module is not head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_adapters(net: PreTrainedModel) -> None:
    """Fold the adapters into the weights and remove them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())
    net.requires_grad_(True)
