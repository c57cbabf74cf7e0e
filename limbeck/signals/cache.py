"""A teacher's distributions over the training text, computed once and stored in files that check themselves.

A shard's name holds the SHA-256 of its bytes, so a shard that was cut short or changed is found before anything is
trained on it. A shard appears whole or not at all, so a run that was killed continues with the texts that no shard
holds. A text is identified by its exact tokens, prompt and response as the teacher reads them: under another tokenizer,
template or prompt it is another text.

Shapes: N response positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from limbeck.config.teacher import CacheSettings
from limbeck.objectives.forward import TeacherView
from limbeck.objectives.head import Head, TeacherSignal
from limbeck.signals.forms import Packed, form_of
from limbeck.signals.wire import head_from, plain_head
from limbeck.storage.files import file_sha256, full_disk_as_os_error, read_object, sweep, write_bytes, write_json
from limbeck.types import Batch, UserError, content_hash

VERSION = 1
SHARD_TOKENS = 16384  # response positions after which a shard is written: the most that a kill can cost


class SignalCache:
    """One teacher's distributions in one form, in a folder of their own.

    Args:
        folder: where the shards are; made if it does not exist.
        teacher: the teacher's identity, which covers its weights, tokenizer, template and what it is shown.
        vocab_size: how many tokens its distributions are over.
        settings: the form in which they are stored.
        device: where signals are put.

    Raises:
        UserError: the folder holds another teacher, form or version, or a file that has changed.
    """

    def __init__(
        self, folder: Path, teacher: str, vocab_size: int, settings: CacheSettings, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.form = form_of(settings)
        self.device = device
        self._about = {"version": VERSION, "teacher": teacher, "vocabulary": vocab_size, "form": settings.form}
        self._check_folder()
        self._ranges: dict[
            str, tuple[Path, dict[str, tuple[int, int]]]
        ] = {}  # by text: its shard, start and stop there
        self._shards: dict[Path, Any] = {}
        self._pending: dict[str, Packed] = {}  # texts that no shard holds yet
        self._head: Head | None = None
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._add_shard(shard)

    def _check_folder(self) -> None:
        file = self.folder / "about.json"
        if not file.exists():
            write_json(file, self._about)
        sweep(self.folder)
        about = read_object(file, f"remove {self.folder} to compute its content again")
        for name, value in self._about.items():
            there = about.get(name)
            if there != value:
                raise UserError(
                    f"{self.folder} is a cache of another {name}: it holds {there!r}, and this run needs {value!r}; "
                    "name another teacher.cache.folder, or remove it"
                )

    def _add_shard(self, shard: Path) -> None:
        """Make a shard's texts available."""
        opened = _open_checked(shard, shard)
        if json.loads(opened.metadata()["about"]) != self._about:
            raise UserError(f"{shard} is of another teacher, vocabulary or form than its folder says; remove it")
        self._shards[shard] = opened
        for key, ranges in json.loads(opened.metadata()["texts"]).items():
            self._ranges[key] = shard, {name: (start, stop) for name, (start, stop) in ranges.items()}

    def __len__(self) -> int:
        """How many texts it holds."""
        return len(self._ranges) + len(self._pending)

    def __contains__(self, key: object) -> bool:
        return key in self._ranges or key in self._pending

    @property
    def bytes(self) -> int:
        """The size of its shards on the disk, without a head."""
        return sum(shard.stat().st_size for shard in self._shards)

    def add(self, keys: Sequence[str], signal: TeacherSignal, targets_N: Tensor, lengths: Sequence[int]) -> None:
        """Store the distributions of some texts, whose positions follow one another in `signal`.

        A shard is written once enough texts have come together; a server's answers, which can't be computed again for
        free, are written at once.

        Raises:
            UserError: the signal does not hold what this cache's form stores.
        """
        if self.form.keeps_head and not list(self.folder.glob("head-*.safetensors")):
            _, head = signal.hidden_states()
            self._write("head", *plain_head(head))
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            part = slice(start, start + length)
            seed = int(key[:15], 16)
            self._pending[key] = self.form.pack(signal.select(part), targets_N[part], seed, self.vocab_size)
            start += length
        if not signal.whole or sum(len(text["target"]) for text in self._pending.values()) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the texts that no shard holds yet as one."""
        if not self._pending:
            return
        texts: dict[str, dict[str, tuple[int, int]]] = {}
        ends = dict.fromkeys(next(iter(self._pending.values())), 0)
        for key, text in self._pending.items():
            texts[key] = {name: (ends[name], ends[name] + len(tensor)) for name, tensor in text.items()}
            ends = {name: stop for name, (_, stop) in texts[key].items()}
        tensors = {name: torch.cat([text[name] for text in self._pending.values()]) for name in ends}
        self._add_shard(self._write("shard", tensors, {"texts": json.dumps(texts), "about": json.dumps(self._about)}))
        self._pending = {}

    def _write(self, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
        content = save(tensors, metadata)
        path = self.folder / f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with full_disk_as_os_error():
            write_bytes(path, content)
        return path

    def text(self, key: str) -> Packed:
        """The packed tensors of one text; no other text is read."""
        if key in self._pending:
            return self._pending[key]
        shard, ranges = self._ranges[key]
        return {name: self._shards[shard].get_slice(name)[start:stop] for name, (start, stop) in ranges.items()}

    def view(self, batch: Batch) -> TeacherView:
        """The teacher's distributions at the batch's response positions.

        Raises:
            UserError: a text that the cache does not hold, or whose rows are not as many as its tokens.
        """
        texts = []
        for key, length in texts_of(batch):
            if key not in self:
                raise UserError(
                    f"{self.folder} does not hold this text under these tokens, template and prompt; run the recipe to"
                    " fill it"
                )
            texts.append(self.text(key))
            if len(texts[-1]["target"]) != length:
                raise UserError(
                    f"{self.folder} holds {len(texts[-1]['target'])} rows for a text of {length} tokens; remove it"
                )
        signal = self.form.unpack(texts, self.vocab_size, head=self.head if self.form.keeps_head else None)
        return TeacherView(signal.to(self.device))

    @property
    def head(self) -> Head:
        """The teacher's head, where the form keeps it.

        Raises:
            UserError: its file is missing or has changed.
        """
        if self._head is None:
            file = next(self.folder.glob("head-*.safetensors"), None)
            if file is None:
                raise UserError(
                    f"the teacher's head is missing in {self.folder}; remove the folder to compute its content again"
                )
            opened = _open_checked(file, self.folder)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
            self._head = head_from(tensors, opened.metadata(), self.device)
        return self._head


def _open_checked(file: Path, to_remove: Path) -> Any:
    """Open a file whose bytes are what its name says. `to_remove` is what the user must remove if they are not."""
    if file_sha256(file)[:32] != file.stem.partition("-")[2]:
        raise UserError(
            f"{file} was cut short or has changed since it was written; remove {to_remove} to compute its content again"
        )
    return safe_open(str(file), framework="pt")


def texts_of(batch: Batch) -> Iterator[tuple[str, int]]:
    """(key, number of response tokens) of each row."""
    for prompt_ids, response_ids in ids_of(batch):
        yield text_key(prompt_ids, response_ids), len(response_ids)


def ids_of(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, response) of each row in token ids, as the teacher reads them."""
    seen = batch.seen_by_teacher()
    for tokens_T, mask_T in zip(seen.tokens_BT, seen.mask_BT, strict=True):
        answer = mask_T.nonzero()[:, 0].tolist()
        ids = tokens_T[: answer[-1] + 1].tolist()
        yield ids[: answer[0]], ids[answer[0] :]


def text_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """The key of a text: a hash of its prompt and response ids."""
    return content_hash([[*prompt_ids], [*response_ids]])
