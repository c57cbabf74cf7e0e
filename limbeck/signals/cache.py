"""The teacher's distributions over the training text, computed once and kept in files that check themselves.

A shard's name holds the SHA-256 of its bytes, so one that was cut short or changed is found before anything is trained
on it; it appears whole or not at all, so a run that was killed goes on with the texts that no shard holds. A text is
known by its very tokens, prompt and response as the teacher sees them: under another tokenizer, template or prompt it
is another text.

Shapes: N response positions, E width of the teacher, V vocabulary.
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
from limbeck.objectives.head import Head
from limbeck.signals.dense import DenseSignal
from limbeck.signals.pack import Packed, pack, unpack
from limbeck.signals.sparse import TopK
from limbeck.storage.files import file_sha256, full_disk_as_os_error, sweep, write_bytes, write_json
from limbeck.types import Batch, UserError, content_hash

VERSION = 1
SHARD_TOKENS = 16384  # response positions after which a shard is written: what a kill can cost


class SignalCache:
    """One teacher's distributions in one form, in a folder of their own.

    Args:
        folder: where; made if it is not there.
        teacher: the teacher's identity, which holds its weights, tokenizer, template and what it is shown.
        vocabulary: how many tokens its distributions are over.
        form: what is kept.
        device: where signals are put.

    Raises:
        UserError: the folder holds another teacher's, another form's or another version's, or a file that has changed.
    """

    def __init__(
        self, folder: Path, teacher: str, vocab_size: int, form: CacheSettings, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.form = form
        self.device = device
        self._about = {"version": VERSION, "teacher": teacher, "vocabulary": vocab_size, "form": form.form}
        self._check()
        self._places: dict[str, tuple[Path, dict[str, tuple[int, int]]]] = {}
        self._open: dict[Path, Any] = {}
        self._waiting: dict[str, Packed] = {}
        self._head: Head | None = None
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._add(shard)

    def _check(self) -> None:
        file = self.folder / "about.json"
        if not file.exists():
            write_json(file, self._about)
        sweep(self.folder)
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(
                f"{file} is damaged ({error}); remove {self.folder}, and what it held is computed again"
            ) from error
        for name, value in self._about.items():
            if not isinstance(found, dict) or found.get(name) != value:
                there = found.get(name) if isinstance(found, dict) else None
                raise UserError(
                    f"{self.folder} is a cache of another {name}: it holds {there!r}, and this run needs {value!r}; "
                    "name another teacher.cache.folder, or remove it"
                )

    def _add(self, shard: Path) -> None:
        """Take up a shard that is whole; its name says what its bytes must be."""
        opened = _opened(shard, shard)
        if json.loads(opened.metadata()["about"]) != self._about:
            raise UserError(f"{shard} is of another teacher, vocabulary or form than its folder says; remove it")
        self._open[shard] = opened
        for key, places in json.loads(opened.metadata()["texts"]).items():
            self._places[key] = shard, {name: (start, stop) for name, (start, stop) in places.items()}

    def __len__(self) -> int:
        """How many texts it holds."""
        return len(self._places) + len(self._waiting)

    def __contains__(self, key: object) -> bool:
        return key in self._places or key in self._waiting

    @property
    def bytes(self) -> int:
        """What its shards take on the disk; a head is not counted."""
        return sum(shard.stat().st_size for shard in self._open)

    def add(self, keys: Sequence[str], signal: DenseSignal | TopK, targets_N: Tensor, lengths: Sequence[int]) -> None:
        """Keep the distributions of some texts, whose positions follow each other in `signal`; written once enough have
        come together, and at once where a server gave them."""
        start = 0
        if self.form.hidden is not None and not list(self.folder.glob("head-*.safetensors")):
            assert isinstance(signal, DenseSignal)
            self._write("head", *_plain_head(signal.head))
        for key, length in zip(keys, lengths, strict=True):
            part = slice(start, start + length)
            own = (
                signal.chunk(part)
                if isinstance(signal, TopK)
                else DenseSignal(signal.hidden_NE[part], signal.head, signal.buffer)
            )
            self._waiting[key] = pack(own, targets_N[part], self.form, int(key[:15], 16), self.vocab_size)
            start += length
        if isinstance(signal, TopK) or sum(len(text["target"]) for text in self._waiting.values()) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if not self._waiting:
            return
        texts: dict[str, dict[str, tuple[int, int]]] = {}
        ends = dict.fromkeys(next(iter(self._waiting.values())), 0)
        for key, text in self._waiting.items():
            texts[key] = {name: (ends[name], ends[name] + len(tensor)) for name, tensor in text.items()}
            ends = {name: stop for name, (_, stop) in texts[key].items()}
        joined = {name: torch.cat([text[name] for text in self._waiting.values()]) for name in ends}
        self._add(self._write("shard", joined, {"texts": json.dumps(texts), "about": json.dumps(self._about)}))
        self._waiting = {}

    def _write(self, kind: str, tensors: dict[str, Tensor], about: dict[str, str]) -> Path:
        content = save(tensors, about)
        path = self.folder / f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with full_disk_as_os_error():
            write_bytes(path, content)
        return path

    def text(self, key: str) -> Packed:
        """What is kept of one text; only its own bytes are read."""
        if key in self._waiting:
            return self._waiting[key]
        shard, places = self._places[key]
        return {name: self._open[shard].get_slice(name)[start:stop] for name, (start, stop) in places.items()}

    def view(self, batch: Batch) -> TeacherView:
        """The teacher's distribution at the batch's response positions.

        Raises:
            UserError: a text that was never kept, or whose kept rows are not as many as its tokens.
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
        if self.form.hidden is not None:
            head = self.head
            hidden_NE = torch.cat([text["hidden"] for text in texts]).to(self.device, head.weight_VD.dtype)
            return TeacherView(DenseSignal(hidden_NE, head))
        signal = unpack(texts, self.form, self.vocab_size)
        return TeacherView(signal.to(self.device))

    @property
    def head(self) -> Head:
        """The teacher's head, of a `hidden` form."""
        if self._head is None:
            file = next(self.folder.glob("head-*.safetensors"), None)
            if file is None:
                raise UserError(
                    f"the teacher's head is missing in {self.folder}; remove the folder, and what it held is computed"
                    " again"
                )
            opened = _opened(file, self.folder)
            told = json.loads(opened.metadata()["head"])
            bias_V = opened.get_tensor("bias").to(self.device) if "bias" in opened.keys() else None  # noqa: SIM118 (it is no dictionary)
            self._head = Head(opened.get_tensor("weight").to(self.device), bias_V, told["scale"], told["softcap"])
        return self._head


def _opened(file: Path, remove: Path) -> Any:
    """A file whose bytes are what its name says they must be; what to `remove` where they are not."""
    if file_sha256(file)[:32] != file.stem.partition("-")[2]:
        raise UserError(
            f"{file} was cut short or has changed since it was written; remove {remove}, and what it held is computed"
            " again"
        )
    return safe_open(str(file), framework="pt")


def _plain_head(head: Head) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The head's tensors, adapters folded in, and its numbers."""
    weight_VD = head.weight_VD
    if head.low_rank is not None:
        a_RD, b_VR, scaling = head.low_rank
        weight_VD = weight_VD + (b_VR @ a_RD * scaling).to(weight_VD.dtype)
    tensors = {"weight": weight_VD.contiguous()} | ({} if head.bias_V is None else {"bias": head.bias_V.contiguous()})
    return tensors, {"head": json.dumps({"scale": head.scale, "softcap": head.softcap})}


def texts_of(batch: Batch) -> Iterator[tuple[str, int]]:
    """(key, number of response tokens) of each row."""
    for prompt_ids, response_ids in ids_of(batch):
        yield text_key(prompt_ids, response_ids), len(response_ids)


def ids_of(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, response) of each row in token ids, as the teacher sees it."""
    seen = batch.seen_by_teacher()
    for tokens_T, mask_T in zip(seen.tokens_BT, seen.mask_BT, strict=True):
        answer = mask_T.nonzero()[:, 0].tolist()
        ids = tokens_T[: answer[-1] + 1].tolist()
        yield ids[: answer[0]], ids[answer[0] :]


def text_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """What a text is known by."""
    return content_hash([[*prompt_ids], [*response_ids]])
