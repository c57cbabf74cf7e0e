"""A teacher with another tokenizer or template: the student's responses are re-encoded in its tokens and aligned.

Shapes: N response positions of the student, M of the teacher, E width of the teacher.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from limbeck.config.teacher import BridgedTeacher, BridgeSettings
from limbeck.models.byte_alignment import SPACE, Tokens, segments, tokens_of
from limbeck.models.compatibility import OTHER_TOKENS
from limbeck.models.load import load_tokenizer
from limbeck.models.local import served_text_caveat
from limbeck.models.model import Model, head_of
from limbeck.models.sources import source_of
from limbeck.models.states import shared_states
from limbeck.models.teacher_interface import WRITES, Teacher, TeacherParts, TeacherUse
from limbeck.models.template import end_of_turn
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherStates, TeacherView
from limbeck.objectives.log_probs import token_log_probs
from limbeck.signals.bridged import BridgedSignal, Pairs, Places
from limbeck.types import Batch, RecipeError, UserError, content_hash

GIVES = frozenset({"text", "raw", "teacher_distribution", "teacher_states"})
PREFIX_BYTES = 8  # compared to detect a tokenizer that puts a space before every text
ALIGNMENT_CACHE_SIZE = 50_000  # responses
SCALE_TOKENS = 256  # tokens by which the scale of the embeddings is measured


@dataclass(frozen=True)
class Aligned:
    """A response in the teacher's tokens.

    Args:
        ids: the response in the teacher's tokens.
        at: for each of the student's tokens, the place of the teacher's token that begins at the same byte, or -1.
        cover: for each of the student's tokens, the number of teacher's tokens that cover it.
        single: how many of the student's tokens are one token in both.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    cover: tuple[int, ...]
    single: int


class Vocabularies:
    """Two tokenizers: which of their tokens correspond, and the student's responses in the teacher's tokens.

    Args:
        ours: the student's tokenizer.
        theirs: the teacher's tokenizer.
        our_ends, their_end: the tokens that end an answer.
        sizes: the vocabulary sizes, (student's, teacher's).
        nearest: whether tokens without a counterpart are matched by edit distance.
    """

    def __init__(
        self, ours: Any, theirs: Any, our_ends: frozenset[int], their_end: int, sizes: tuple[int, int], nearest: bool
    ) -> None:
        self.theirs = theirs
        self.our_ends = our_ends
        self.their_end = their_end
        self.sizes = sizes
        self.by_spelling = nearest
        self.same = ours.get_vocab() == theirs.get_vocab() and their_end in our_ends
        self._tokens: tuple[Tokens, Tokens] | None = None if self.same else (tokens_of(ours), tokens_of(theirs))
        self._our_end = end_of_turn(ours)
        self._our_texts = {number: ours.convert_ids_to_tokens(number) for number in ours.all_special_ids}
        self._spaced = _puts_a_space(ours), _puts_a_space(theirs)
        self.align = lru_cache(ALIGNMENT_CACHE_SIZE)(self._align)

    @cached_property
    def pairs(self) -> Pairs:
        """The correspondence of tokens with the same bytes, and of the tokens that end an answer."""
        ours, theirs = self.sizes
        if self._tokens is None:
            counterparts = {number: number for number in range(min(ours, theirs))}
        else:
            mine, other = self._tokens
            counterparts = {}
            for value, number in mine.ids.items():
                if number < ours and (counterpart := other.ids.get(value)) is not None and counterpart < theirs:
                    counterparts[number] = counterpart
            counterparts[self._our_end] = self.their_end
        ours_K = torch.tensor(sorted(counterparts))
        theirs_K = torch.tensor([counterparts[number] for number in ours_K.tolist()])
        ours_W = torch.full((theirs,), -1).index_copy_(0, theirs_K, ours_K)
        nearest = self._nearest() if self.by_spelling else None
        return Pairs(
            ours_K,
            theirs_K,
            ours_alone=_without(ours, ours_K),
            theirs_alone=_without(theirs, theirs_K),
            ours_W=ours_W,
            nearest=nearest,
        )

    def _nearest(self) -> Callable[[int], int | None]:
        """Maps a teacher's token to the student's with the least edit distance in bytes; the first of equals."""
        if self._tokens is None:
            return lambda token: None
        mine, other = self._tokens
        spellings = {
            number: value.decode("latin-1")
            for number, value in enumerate(mine.bytes_of)
            if value and number < self.sizes[0]
        }

        @lru_cache(None)
        def near(token: int) -> int | None:
            value = other.bytes_of[token]
            if not value:
                return None
            return int(process.extractOne(value.decode("latin-1"), spellings, scorer=Levenshtein.distance)[2])

        return near

    def _align(self, response: tuple[int, ...], equal_only: bool) -> Aligned:
        """Re-encode a response of the student in the teacher's tokens, and align the two.

        Args:
            equal_only: align only tokens that are one token in both.
        """
        if self._tokens is None:
            return Aligned(response, tuple(range(len(response))), (1,) * len(response), len(response))
        mine, other = self._tokens
        ended = bool(response) and response[-1] in self.our_ends
        body = response[:-1] if ended else response
        ours = [self._bytes(mine, token) for token in body]
        we_space, they_space = self._spaced
        if we_space and ours:
            ours[0] = ours[0].removeprefix(b" ")  # which its text does not have
        text = b"".join(ours)
        ids = self._their_ids(text.decode("utf-8", errors="replace"))
        theirs = [other.bytes_of[token] or b"" for token in ids]
        joined = b"".join(theirs)
        prefix = text[:PREFIX_BYTES]
        if not joined.startswith(prefix) and joined.startswith(b" " + prefix):
            theirs[0] = theirs[0].removeprefix(b" ")
        at = [-1] * len(response)
        cover = [0] * len(response)
        single = 0
        done = 0
        for segment in segments(ours, theirs):
            done = segment.ours.stop
            first = segment.ours.start
            if first == 0 and we_space != they_space:
                continue  # what could stand there has a space in one of them: other tokens have the same bytes
            single += segment.single
            if equal_only and not segment.single:
                continue
            size = 0
            count = 0
            while size < len(ours[first]):
                size += len(theirs[segment.theirs.start + count])
                count += 1
            at[first] = segment.theirs.start
            cover[first] = max(1, count)
        if ended:
            if done == len(body):
                at[-1], cover[-1], single = len(ids), 1, single + 1
            ids = [*ids, self.their_end]
        return Aligned(tuple(ids), tuple(at), tuple(cover), single)

    def _bytes(self, tokens: Tokens, token: int) -> bytes:
        value = tokens.bytes_of[token] if token < len(tokens.bytes_of) else None
        return value if value is not None else str(self._our_texts.get(token, "\ufffd")).encode()

    def _their_ids(self, text: str) -> list[int]:
        return list(self.theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) if text else []


def _puts_a_space(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a space before every text."""
    return bool(tokenizer.tokenize("a", add_special_tokens=False)[0].startswith(SPACE))


class TeacherOverBridge:
    """A teacher beside a student with another tokenizer. Rows carry the prompt in the teacher's tokens
    (`teacher_prompt_ids`).

    Raises:
        UserError: a tokenizer of an unknown kind, or two that share nothing.
    """

    gives = GIVES
    average = None
    vocab_size = sys.maxsize  # a bridge cuts nothing off the student's vocabulary

    def __init__(self, teacher: Teacher, student: Model, settings: BridgeSettings) -> None:
        assert teacher.model is not None
        self.model = teacher.model
        self.settings = settings
        net = self.model.net
        sizes = (
            min(head_of(student.net).vocab_size, student.vocab_size),
            min(head_of(net).vocab_size, self.model.vocab_size),
        )
        end = self.model.end_of_turn
        edits = settings.match == "edits"
        self.vocabularies = Vocabularies(
            student.tokenizer, self.model.tokenizer, our_ends=student.eos_ids, their_end=end, sizes=sizes, nearest=edits
        )
        self.identity = f"{teacher.identity}+bridge-{content_hash([settings.model_dump(), student.identity])[:16]}"
        pairs = self.vocabularies.pairs
        if len(pairs.ours_K) < 2:
            raise UserError(
                f"no token of {teacher.identity} is one of the student's, so there is nothing to compare; choose"
                " another teacher"
            )
        self.pairs = pairs.to(net.device)

    def align(self, response: Sequence[int]) -> Aligned:
        """The response in the teacher's tokens."""
        return self.vocabularies.align(tuple(response), self.settings.spans == "equal")

    def facts(self, responses: Sequence[Sequence[int]]) -> dict[str, Any]:
        """How much the two have in common: tokens of the vocabularies, and the shares of these responses' tokens that
        are aligned and that are one token in both."""
        texts = [self.align(response) for response in responses]
        tokens = sum(len(text.at) for text in texts)
        return {
            "student_tokens": self.vocabularies.sizes[0],
            "teacher_tokens": self.vocabularies.sizes[1],
            "common_tokens": len(self.pairs.ours_K),
            "aligned_share": sum(place >= 0 for text in texts for place in text.at) / max(1, tokens),
            "single_share": sum(text.single for text in texts) / max(1, tokens),
            "tokens_per_student_token": sum(len(text.ids) for text in texts) / max(1, tokens),
        }

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:  # noqa: ARG002
        """The teacher's distributions at the student's response positions, and its states at its own positions."""
        assert not any(taps), "validate refuses layers of a teacher with other tokens"
        net = self.model.net
        device = self.model.net.device
        texts = [self.align(ids) for ids in _responses(batch)]
        tokens_BT, mask_BT = self._tokens(batch, texts)
        hidden_BTE = shared_states(net, tokens_BT)
        row_M, target_M = mask_BT.nonzero(as_tuple=True)
        hidden_ME = hidden_BTE[row_M, target_M - 1]
        head = head_of(net).detached()
        head = head.cut(min(head.vocab_size, self.vocabularies.sizes[1]))
        target_ids_M = tokens_BT[row_M, target_M].to(device)
        places = self._places(batch, texts, hidden_ME, head=head, target_ids_M=target_ids_M)
        signal = BridgedSignal(
            hidden_ME, head, self.pairs, places, rest=self.settings.rest, others=self.settings.others
        )
        embed: Any = net.get_input_embeddings()
        scale = embed(torch.arange(SCALE_TOKENS, device=device)).std()
        before_ME = embed(tokens_BT[row_M, target_M - 1].to(device)) / scale
        embedded = None if self.vocabularies.same else (before_ME, embed(target_ids_M) / scale)
        return TeacherView(signal, states=TeacherStates(hidden_ME, head, row_M.to(device), embedded))

    def _tokens(self, batch: Batch, texts: Sequence[Aligned]) -> tuple[Tensor, Tensor]:
        """(tokens [B, T], mask of response tokens [B, T]) in the teacher's tokens."""
        teacher_batch = batch.seen_by_teacher()
        prompts = [
            row[: int(mask.nonzero()[0, 0])].tolist()
            for row, mask in zip(teacher_batch.tokens_BT, teacher_batch.mask_BT, strict=True)
        ]
        rows = [(prompt, text.ids) for prompt, text in zip(prompts, texts, strict=True)]
        width = max(len(prompt) + len(ids) for prompt, ids in rows)
        if width > self.model.max_length:
            raise UserError(
                f"a text takes {width} of the teacher's tokens, more than its context of {self.model.max_length}:"
                " shorten it"
            )
        tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (prompt, ids) in enumerate(rows):
            tokens_BT[number, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
            mask_BT[number, len(prompt) : len(prompt) + len(ids)] = True
        return tokens_BT, mask_BT

    def _places(
        self, batch: Batch, texts: Sequence[Aligned], hidden_ME: Tensor, *, head: Any, target_ids_M: Tensor
    ) -> Places:
        """Where the student's response positions lie in the teacher's, with log P of each token's cover."""
        device = hidden_ME.device
        starts = torch.tensor([0, *(len(text.ids) for text in texts)]).cumsum(0)
        at = [
            place + int(start) if place >= 0 else -1
            for text, start in zip(texts, starts, strict=False)
            for place in text.at
        ]
        at_N = torch.tensor(at, device=device)
        cover_N = torch.tensor([count for text in texts for count in text.cover], device=device) * (at_N >= 0)
        row_N, position_N = batch.response_positions()
        written_N = batch.tokens_BT[row_N, position_N + 1].to(device)
        first_N = target_ids_M[at_N.clamp_min(0)]
        moved_N = (self.pairs.ours_W[first_N] != written_N) & (at_N >= 0)
        log_cover_N = hidden_ME.new_zeros(len(at_N), dtype=torch.promote_types(hidden_ME.dtype, torch.float32))
        if bool(moved_N.any()):
            covered = [range(int(a), int(a) + int(c)) for a, c in zip(at_N[moved_N], cover_N[moved_N], strict=True)]
            owner = torch.tensor([number for number, each in enumerate(covered) for _ in each], device=device)
            where = torch.tensor([place for each in covered for place in each], device=device)
            log_prob = token_log_probs(hidden_ME[where], head, target_ids_M[where])
            log_cover_N[moved_N] = torch.zeros(len(covered), dtype=log_prob.dtype, device=device).index_add_(
                0, owner, log_prob
            )
        return Places(at_N, first_N, log_cover_N, written_N)


def _without(size: int, ids: Tensor) -> Tensor:
    """The numbers below `size` that are not among `ids`."""
    return torch.ones(size, dtype=torch.bool).index_fill_(0, ids, False).nonzero()[:, 0]


def _responses(batch: Batch) -> list[list[int]]:
    """Each row's response in the student's tokens."""
    return [row[mask].tolist() for row, mask in zip(batch.tokens_BT, batch.mask_BT, strict=True)]


def has_other_tokens(settings: BridgedTeacher, student: str, template: str | None = None) -> bool:
    """Whether teacher and student differ in their tokens or their template; `template` is the student's own."""
    theirs = load_tokenizer(settings.model, settings.template)
    return _differ(theirs, load_tokenizer(student, template))


def _differ(theirs: Any, ours: Any) -> bool:
    return bool(theirs.get_vocab() != ours.get_vocab() or theirs.chat_template != ours.chat_template)


class BridgedKind:
    """A model in process whose tokens are not the student's."""

    def gives(self, settings: BridgedTeacher) -> frozenset[str]:
        evidence = GIVES | WRITES
        return evidence if settings.server is None else evidence - {"contrast"}

    def lacks(self, _: BridgedTeacher, evidence: str) -> str:
        if evidence == "contrast":
            return "it writes against another prompt, which a server can't; leave teacher.server out"
        return "it reads the teacher token by token, and this one has other tokens; use a divergence, uld or dual_space"

    def refuse(self, _: BridgedTeacher, use: TeacherUse) -> None:
        recipe = use.recipe
        path = "teacher.bridge"
        if recipe.student.start.pretrained is None:
            raise RecipeError(
                "student.start", "a student made of the teacher has its tokens and needs no bridge: give pretrained"
            )
        if recipe.train.mixup is not None or (recipe.rollout is not None and recipe.rollout.joint is not None):
            raise RecipeError(
                path,
                "texts are mixed, and written by two models, in one vocabulary only; leave train.mixup and joint out",
            )
        if not use.read & GIVES:
            raise RecipeError(path, "no loss reads the teacher's distribution or states; leave it out")

    def prepare(self, settings: BridgedTeacher, parts: TeacherParts) -> Teacher:
        bridged = TeacherOverBridge(parts.load(settings.model), parts.student, settings.bridge)
        responses = parts.responses()
        facts = bridged.facts(responses)
        shares = (
            f"; of the text's tokens {facts['aligned_share']:.1%} are aligned, {facts['single_share']:.1%} one in both"
        )
        parts.report_facts(
            "bridge.json",
            facts,
            f"{facts['common_tokens']:,} of {facts['student_tokens']:,} tokens are the teacher's, too"
            + (shares if responses else ""),
        )
        return bridged

    def caveats(self, settings: BridgedTeacher, student: str | None) -> list[str]:
        theirs = load_tokenizer(settings.model, settings.template)
        if student is not None and _differ(theirs, source_of(student).tokenizer(student)):  # whatever template it got
            return [OTHER_TOKENS]
        return [] if settings.server is None else [served_text_caveat(settings.server.name, settings.model)]
