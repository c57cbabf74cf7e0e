"""The initial weights of a student: a pretrained model, the teacher with layers dropped, or random; and adapters."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.config.sections import Lora, Scratch, Student
from limbeck.models.copy import cast
from limbeck.models.layers import is_per_layer
from limbeck.models.load import load_model
from limbeck.models.model import Model, gives_scores, head_of
from limbeck.models.placement import FULL, Placement, Precision, check_dtype, is_out_of_memory
from limbeck.models.prune import Calibration, LayerChoice, choose_layers, drop_layers
from limbeck.models.quantise import quantise
from limbeck.models.scores import with_score
from limbeck.models.weights import first_line, model_class, text_config
from limbeck.types import RecipeError, UserError, content_hash, nearest

SIZE = re.compile(r"num_\w+|\w+_(?:size|dim|rank|embeddings)")  # settings that count something
MOST_LAYERS = 1000


def begin(
    student: Student,
    teacher: Callable[[], Model],
    choice: LayerChoice | None,
    seed: int,
    placement: Placement | None = None,
    precision: Precision = FULL,
) -> Model:
    """The student before training, without adapters. `choice` holds the layers that a pruned student keeps. The
    teacher, in float32, is loaded only if the student is made from it. A `precision` other than float32 is for weights
    that stay frozen under adapters.

    Embeddings lose their `padding_idx`: if the padding token is the end-of-sequence token (SmolLM2, most Llamas), it
    would silently keep that token's input embedding from learning. Padding does not need it: no loss reads padding.
    """
    placement = placement or Placement()
    check_dtype(precision.dtype, placement.device, "student.lora.base")
    started = _begin(student, teacher, choice, seed)
    cast(started.net, precision.dtype)
    if precision.quantise is not None:
        quantise(started.net, precision.quantise, placement.device, student.start.pretrained or "the student")
    if student.scores:
        started = replace(started, net=with_score(started.net, seed), identity=f"{started.identity}/score-{seed}")
    placement.put(started.net)
    for module in started.net.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return replace(started, identity=started.identity + precision.suffix)


def _begin(student: Student, teacher: Callable[[], Model], choice: LayerChoice | None, seed: int) -> Model:
    start = student.start
    if start.pretrained is not None:
        return load_model(start.pretrained, template=student.template)
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
        net: PreTrainedModel = model_class(config).from_config(config, dtype=torch.float32)
    net.eval()
    try:
        with torch.no_grad():
            net(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        raise RecipeError(
            "student.start.scratch.config", f"these sizes don't go together ({first_line(error)})"
        ) from error
    return net


def scratch_config(scratch: Scratch, like: Any) -> Any:
    """The teacher's configuration with some settings replaced; lists with an entry per layer are left to the defaults.

    Raises:
        RecipeError: a setting that the configuration does not have, sizes that no model has, or the vocabulary, which
            is the teacher's.
    """
    text = text_config(like)
    settings = text.to_dict()
    settings.pop("quantization_config", None)  # random weights are numbers
    for key in scratch.config:
        if key not in settings:
            raise RecipeError(f"student.start.scratch.config.{key}", f"no such setting{nearest(key, settings)}")
        if key == "vocab_size":
            raise RecipeError(
                f"student.start.scratch.config.{key}", "the student speaks the teacher's vocabulary; leave it out"
            )
        most = MOST_LAYERS if key == "num_hidden_layers" else float("inf")
        if SIZE.fullmatch(key) and type(settings[key]) is int and settings[key] > 0:
            value = scratch.config[key]
            if type(value) is not int or not 1 <= value <= most:
                between = f"from 1 to {most:,}" if most == MOST_LAYERS else "of at least 1"
                raise RecipeError(
                    f"student.start.scratch.config.{key}", f"must be a whole number {between}; got {value!r}"
                )
    general = {key: value for key, value in settings.items() if not is_per_layer(key, value, text.num_hidden_layers)}
    try:
        made = type(text)(**(general | scratch.config))
    except Exception as error:  # each family's own code raises its own kinds
        raise RecipeError("student.start.scratch.config", first_line(error)) from error
    if text is like:
        return made
    whole = copy.deepcopy(like)  # a model that also reads images keeps that part, random
    for key, value in vars(like).items():
        if value is text:
            setattr(whole, key, made)
    return whole


def adapted_layers(net: PreTrainedModel) -> tuple[list[str], list[str]]:
    """(names of the decoder's layers that get adapters, names of those with weights that get none).

    None are for the weights of experts, which are one tensor for all of them and no linear layer each, and for
    Mamba's projections but the first, whose weights its kernels read past any adapter. Names are those in the decoder.
    """
    decoder: Any = net.get_decoder()
    head = net.get_output_embeddings()
    taken: list[str] = []
    left: list[str] = []
    for name, module in decoder.named_modules():
        parent = type(decoder.get_submodule(name.rpartition(".")[0])).__name__
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            bypassed = "mamba" in parent.lower() and not name.endswith("in_proj")
            (left if bypassed else taken).append(name)
        else:
            own = module.named_parameters(recurse=False)
            left += [f"{name}.{key}" for key, parameter in own if parameter.dim() == 3 and "conv" not in name]
    return taken, left


def adapters_told(net: PreTrainedModel) -> str:
    """What a model with adapters has, for people: how many matrices, and which kinds of weights have none."""
    from peft.tuners.lora import LoraLayer

    count = sum(isinstance(module, LoraLayer) for module in net.modules())
    kinds = sorted(
        {".".join(word for word in name.split(".") if not word.isdigit()) for name in adapted_layers(net)[1]}
    )
    rest = f"; without: {', '.join(kinds)} (adapters go into linear layers of their own)" if kinds else ""
    return f"adapters on {count} matrices{rest}"


def add_adapters(net: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Put low-rank adapters in float32 or better into the decoder's linear layers but the head, in place, and freeze
    the rest, but for a row that gives scores. B starts at 0.

    Raises:
        UserError: a decoder without such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 12 s of imports that only adapters need
    from peft.tuners.lora import LoraLayer

    targets = adapted_layers(net)[0]
    if not targets:
        raise UserError(f"{net.config.model_type}: it has no linear layers for adapters; leave student.lora out")
    # in a wrapper without a configuration, from which peft would take other layers than those that are named
    decoder = nn.ModuleDict({"decoder": net.get_decoder()})
    named = [f"decoder.{name}" for name in targets]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that Conv1D's weights are transposed, and takes care of it
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=named), decoder)
    short = (torch.bfloat16, torch.float16)
    for module in net.modules():
        if isinstance(module, LoraLayer):  # peft gives them the type of the layer
            for part in (module.lora_A, module.lora_B):
                if any(parameter.dtype in short for parameter in part.parameters()):
                    part.float()
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_("lora_" in name or (gives_scores(net) and name.startswith("score.")))


def merge_adapters(net: PreTrainedModel) -> None:
    """Fold the adapters into the weights and remove them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())
    net.requires_grad_(True)


@torch.no_grad()
def merge_into(original: PreTrainedModel, trained: PreTrainedModel, lora: Lora) -> None:
    """Fold the adapters of `trained` into the same model with weights that were never rounded, in place."""
    add_adapters(original, lora, seed=0)
    adapters = {name: parameter for name, parameter in trained.named_parameters() if "lora_" in name}
    for name, parameter in original.named_parameters():
        if "lora_" in name:
            parameter.copy_(adapters.pop(name))
    assert not adapters, f"adapters without a place: {list(adapters)}"
    if gives_scores(original):
        head_of(original).weight_VD.copy_(head_of(trained).weight_VD)
    merge_adapters(original)
