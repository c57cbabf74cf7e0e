"""Load a model, or what is needed of it, from wherever it is (see `sources.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.model import Model, head_of, hidden_states, vocab_size_of
from limbeck.models.placement import FULL, Placement, Precision, check_dtype, is_out_of_memory
from limbeck.models.quantise import quantise
from limbeck.models.sources import source_of
from limbeck.models.template import frame_of
from limbeck.models.template_names import check_own, give_template, template_suffix
from limbeck.models.weights import first_line
from limbeck.types import UserError


def load_model(
    name: str, precision: Precision = FULL, placement: Placement | None = None, template: str | None = None
) -> Model:
    """Load a model for inference, in evaluation mode.

    Args:
        name: a name of `limbeck models`, a directory in Hugging Face form, a `.gguf` file, or a hub id `owner/name`.
        precision: of the weights; part of the model's identity.
        placement: the device; by default the CPU.
        template: a chat template for a model that has none or several; part of the model's identity.

    Raises:
        UserError: nothing there, or something that is not a causal language model; the message says what to do.
    """
    placement = placement or Placement()
    check_dtype(precision.dtype, placement.device, f"{name} in bfloat16")
    model = source_of(name).load(name, precision.dtype)
    frame_tokenizer(model.tokenizer, name, template)
    check_rows(model.net, model.tokenizer, name)
    if precision.quantise is not None:
        quantise(model.net, precision.quantise, placement.device, name)
    net = placement.put(model.net)
    try:
        _check_head(net, name)
    except RuntimeError as error:  # such as kernels of codes that don't take these sizes
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name}: transformers loads it, and can't run it here: {first_line(error)}") from error
    return replace(model, net=net, identity=model.identity + precision.suffix + template_suffix(template))


def load_tokenizer(name: str, template: str | None = None) -> Tokenizer:
    """The tokenizer alone, with a chat `template` for one that has none or several.

    Raises:
        UserError: no such model, or one without a usable tokenizer or chat template.
    """
    tokenizer = source_of(name).tokenizer(name)
    frame_tokenizer(tokenizer, name, template)
    return tokenizer


def frame_tokenizer(tokenizer: Tokenizer, name: str, template: str | None) -> None:
    """Give a tokenizer its template, and refuse one that can't be used."""
    try:
        if template is None:
            check_own(tokenizer, name)
            frame_of(tokenizer, f"the tokenizer of {name!r}")
        else:
            give_template(tokenizer, template, name)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds on settings that it can't use; the user needs one
        raise UserError(f"the tokenizer of {name!r} can't be used: {first_line(error)}") from error


def load_config(name: str) -> Any:
    """The sizes of a model, for plans and early refusals: no weights are read, and a named model is not fetched.

    Raises:
        UserError: no such model.
    """
    return source_of(name).config(name)


def check_source(name: str) -> None:
    """Refuse files that can't be loaded, without reading weights: missing, damaged or foreign tensors, pickles, codes
    whose library is not here.

    Raises:
        UserError: the message names the file or the tensor.
    """
    source_of(name).check(name)


def is_ready(name: str) -> bool:
    """False where the model still has to be fetched or converted.

    Raises:
        UserError: no such model.
    """
    return source_of(name).is_ready(name)


def model_identity(name: str, precision: Precision = FULL, template: str | None = None) -> str:
    """What the `identity` of `load_model` with the same precision and template will be, without loading the weights.

    Raises:
        UserError: no such model.
    """
    return source_of(name).identity(name) + precision.suffix + template_suffix(template)


def model_contents(name: str) -> str:
    """A hash of a model's files alone: its identity has its label, precision and template, too.

    Raises:
        UserError: no such model, or one that is not available as a folder.
    """
    return source_of(name).contents(name)


def model_folder(name: str) -> Path:
    """The model as a folder in Hugging Face form, fetched and converted where needed.

    Raises:
        UserError: no such model, or one that is not available as a folder.
    """
    return source_of(name).folder(name)


def check_rows(net: PreTrainedModel, tokenizer: Tokenizer, source: str) -> None:
    """Refuse a tokenizer with ids that the model has no row for.

    Raises:
        UserError: files of two models, or tokens that were added and not made room for.
    """
    layer: Any = net.get_input_embeddings()
    rows, ids = int(layer.weight.shape[0]), vocab_size_of(tokenizer)
    if ids > rows:
        raise UserError(
            f"{source}: its tokenizer has {ids} ids and the model {rows} rows, so they belong to different models, or"
            " tokens were added later: put the right tokenizer beside the weights, or resize_token_embeddings"
        )


@torch.no_grad()
def _check_head(net: PreTrainedModel, source: str) -> None:
    """Refuse a model whose logits are not those of `head_of`: families scale and cap them under many names, and a
    missed one would silently give the losses of another model."""
    tokens_BT = torch.arange(1, 5, device=net.device)[None] % head_of(net).vocab_size
    expected_TV = net(tokens_BT, use_cache=False).logits[0].float()
    if not bool(expected_TV.isfinite().all()):
        raise UserError(
            f"{source}: its logits are NaN or infinite: its weights are damaged, or overflow in {net.dtype}; fetch it"
            " again"
        )
    near = 1e-2 * float(expected_TV.abs().max())
    begun_TV = net(tokens_BT[:, :-1], use_cache=False).logits[0].float()
    if not torch.allclose(begun_TV, expected_TV[:-1], rtol=1e-2, atol=5 * near):
        raise UserError(
            f"{source}: a token's prediction depends on the tokens after it, so a model of type"
            f" {net.config.model_type!r} can't write text; choose a decoder"
        )
    logits_TV = head_of(net).logits(hidden_states(net, tokens_BT)[0]).float()
    if not torch.allclose(logits_TV, expected_TV, rtol=1e-2, atol=near):
        raise UserError(
            f"{source}: models of type {net.config.model_type!r} compute their logits in an unknown way; choose another"
        )
