"""A folder of PEFT adapters (`adapter_config.json`) as a model: its base with the adapters folded in."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from limbeck.models.quantised import quantisation
from limbeck.models.weights import first_line
from limbeck.storage.files import user_path
from limbeck.types import UserError

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def has_adapters(folder: Path) -> bool:
    return (folder / SETTINGS).exists()


def check_adapters(folder: Path, source: str) -> None:
    """Refuse a folder of adapters that can't be read.

    Raises:
        UserError: it has whole weights as well, no adapter's weights, or a base that leads back to it.
    """
    if (folder / "config.json").exists():
        raise UserError(
            f"{source} holds a whole model (config.json) and an adapter ({SETTINGS}), so it is not clear which is"
            " meant: move one of them into a folder of its own"
        )
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{source} has {SETTINGS} and no {WEIGHTS}: save the adapter as safetensors")
    seen = {folder.resolve()}
    base = base_of(folder, source)
    while has_adapters(at := user_path(base)):
        if at.resolve() in seen:
            raise UserError(
                f"{source}: {SETTINGS} names {base} as base, which leads back to itself: write the model's folder as"
                " base_model_name_or_path"
            )
        seen.add(at.resolve())
        base = base_of(at, base)


def base_of(folder: Path, source: str) -> str:
    """Where the adapters' base is, in the user's words for a model.

    Raises:
        UserError: the settings can't be read, or name no base.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: {SETTINGS} can't be read ({first_line(error)})") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{source}: {SETTINGS} names no base: write the model's folder as base_model_name_or_path")
    if kind != "LORA":
        raise UserError(f"{source}: adapters of kind {kind} are not read, only LoRA: merge them into the base first")
    return base


def with_adapters(net: PreTrainedModel, folder: Path, source: str) -> PreTrainedModel:
    """The base with the adapters folded into its weights.

    Raises:
        UserError: adapters of another model, or a base of codes, which can't take them.
    """
    from peft import PeftModel  # 12 s of imports that only adapters need

    if quantisation(net.config) is not None:
        raise UserError(
            f"{source}: its base is quantised, so the adapter can't be folded in: name the base it was made of"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights it only warns
            whole: Any = PeftModel.from_pretrained(net, str(folder), is_trainable=False)
        missing = [name for name in _names(whole) if name not in _stored(folder)]
        if missing:
            raise UserError(
                f"{source}: {missing[0]} is missing in {WEIGHTS}: it is another model's adapter, or damaged"
            )
        merged: PreTrainedModel = whole.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds on files that it can't use; the user needs one
        raise UserError(f"{source}: its adapter doesn't fit {base_of(folder, source)}: {first_line(error)}") from error
    merged.requires_grad_(True)
    merged.eval()
    return merged


def _names(whole: Any) -> list[str]:
    from peft import get_peft_model_state_dict

    return sorted(get_peft_model_state_dict(whole))


def _stored(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        return set(tensors.keys())
