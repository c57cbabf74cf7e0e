"""A server's log-probabilities of its own text as a teacher: a sparse signal with gaps at the student's positions.

A server that scores no given text (OpenAI's, most providers') still names the likeliest tokens at each position of what
it writes. The student reads the same text in its own tokens. Where one token of each has the same bytes at the same
place, the server's distribution is also about the student's token: named tokens that the student has, by their bytes,
are outcomes, all other probability goes to the bucket. Everywhere else is a gap, counted by its reason:

- `split`: the two split this piece of text differently;
- `other text`: the server's tokens are not (or no longer) the text, for example after a character whose bytes it hides;
- `end`: the end of the answer, of which most servers say nothing;
- `unclear`: the numbers are of another token than the written one, as llama.cpp's at letters of several tokens;
- `no log-probabilities`: none came with the text, or none are possible, or none are of the student's tokens.

Not covered: a server's text that was changed afterwards (trimmed, taken out of a longer one), and the student's own
text.

Shapes: N response positions, K tokens named at a position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.data.batches import Row
from limbeck.models.api import ApiTeacher
from limbeck.models.byte_alignment import Tokens, segments, tokens_of
from limbeck.models.told import LEAST, Kept
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.signals.gaps import GappedSignal
from limbeck.signals.sparse import TopK
from limbeck.types import TAUGHT, Batch, Request, Sampling, UserError

MIN_SHARE = 0.5  # of the text's tokens that must be taught
MIN_REST = 1e-6  # least probability of the bucket beside a server's tokens, whose numbers are rounded
ROUNDING = 1e-3
PROBE = ({"role": "user", "content": "Say hello."},)
Named = dict[int, float]  # log-probabilities by the student's token id


@dataclass(frozen=True)
class Alignment:
    """What is known at each position of one response (None at a gap), and how many gaps there are of each reason."""

    named: list[Named | None]
    gaps: Counter[str] = field(default_factory=Counter)


class Aligner:
    """Aligns a server's tokens with the student's.

    Args:
        tokenizer: the student's.
        ends: the student's tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        self.tokens: Tokens = tokens_of(tokenizer)
        self.ends = ends
        ids: Any = tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
        self.specials = {text.encode(): number for text, number in zip(tokenizer.all_special_tokens, ids, strict=True)}

    def align(self, kept: Kept | None, response: Sequence[int]) -> Alignment:
        """What the server said at the positions of a response, which is its text in the student's tokens."""
        ended = bool(response) and response[-1] in self.ends
        ours = [self.tokens.bytes_of[token] or b"" for token in (response[:-1] if ended else response)]
        if not kept:
            return Alignment([None] * len(response), Counter({"no log-probabilities": len(response)}))
        theirs = [entry[0].encode("latin-1") for entry in kept]
        end = kept[-1] if theirs[-1] == b"" or theirs[-1] in self.specials else None
        if end is not None:
            theirs.pop()
        spaced = bool(ours and ours[0].startswith(b" ") and theirs and not theirs[0].startswith(b" "))
        if spaced:  # a tokenizer that puts a space before every text: what could begin it has that space here, too
            ours[0] = ours[0].removeprefix(b" ")
        trusted = self._are_ours(kept)
        named: list[Named | None] = [None] * len(response)
        gaps = Counter[str]()
        done = (0, 0)
        for segment in segments(ours, theirs):
            done = (segment.ours.stop, segment.theirs.stop)
            if not segment.single:
                gaps["split"] += len(segment.ours)
                continue
            place = segment.ours.start
            before = b" " if spaced and place == 0 else b""
            named[place], reason = self._named(kept[segment.theirs.start], response[place], trusted, before)
            gaps[reason] += 1
        gaps["other text"] += len(ours) - done[0]
        if ended:
            reason = "end"
            if end is not None and done == (len(ours), len(theirs)):
                named[-1], reason = self._named(end, response[-1], trusted)
            gaps[reason] += 1
        return Alignment(named, Counter({name: count for name, count in gaps.items() if name and count}))

    def _are_ours(self, kept: Kept) -> bool:
        """Whether the server's ids are the student's: every likely token with an id and bytes has them here, too."""
        pairs = {
            (number, value.encode("latin-1")) for entry in kept for value, number, _ in entry[3] if number is not None
        }
        checked = [(number, value) for number, value in pairs if value]
        size = len(self.tokens.bytes_of)
        return bool(checked) and all(
            number < size and (self.tokens.bytes_of[number] == value or self.specials.get(value) == number)
            for number, value in checked
        )

    def _named(self, entry: list[Any], written: int, trusted: bool, before: bytes = b"") -> tuple[Named | None, str]:
        """The student's tokens that are named at a position where it has written one token; or None with the reason.
        They have the bytes `before` those that the server names."""
        value, number, log_prob, likely = entry
        named: Named = {}
        is_named = False
        for other, other_id, other_log_prob in likely:
            same = other == value and (other_id is None or number is None or other_id == number)
            is_named = is_named or same
            token = written if same else self._ours(other.encode("latin-1"), other_id if trusted else None, before)
            if token is not None:
                named[token] = _add(named.get(token), other_log_prob)
        if not is_named:
            ids = {other_id for _, other_id, _ in likely if other_id is not None}
            lowest = min((other_log_prob for _, _, other_log_prob in likely), default=-math.inf)
            if number in ids or log_prob > lowest + ROUNDING or not value.isascii():
                return None, "unclear" if likely else "no log-probabilities"
            if log_prob > LEAST:
                named[written] = _add(named.get(written), log_prob)
        if not named or sum(map(math.exp, named.values())) > 1 + ROUNDING:
            return None, "no log-probabilities"
        return named, ""

    def _ours(self, value: bytes, number: int | None, before: bytes) -> int | None:
        if number is not None:
            return number if number < len(self.tokens.bytes_of) else None
        return self.specials.get(value, self.tokens.ids.get(before + value)) if value else None


def _add(one: float | None, other: float) -> float:
    """log(exp(one) + exp(other))."""
    return other if one is None else max(one, other) + math.log1p(math.exp(-abs(one - other)))


class OwnTextTeacher:
    """A server that is known by its text and by what it named while it wrote.

    Args:
        identity: the server's.
        told: returns what was kept of samples by their ids, in their order; None where nothing was.
        aligner: aligns with the student.
        vocab_size: of the student.
        device: where signals are put.
    """

    gives = frozenset({"text", "teacher_distribution"})
    model = None  # its weights are not here
    average = None

    def __init__(
        self,
        identity: str,
        told: Callable[[Sequence[str]], Iterable[Kept | None]],
        aligner: Aligner,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.identity = identity
        self.told = told
        self.aligner = aligner
        self.vocab_size = vocab_size
        self.device = device
        self._signals: dict[str, GappedSignal] = {}
        self._gaps = Counter[str]()

    def mark(self, rows: Sequence[Row], report_facts: Callable[[str, dict[str, Any], str], None]) -> list[Row]:
        """The rows with the column `taught`, 1 at each token whose distribution is known.

        Args:
            report_facts: called with a file's name in the run folder, facts to write there, and the same in words.

        Raises:
            UserError: less than half of the tokens can be taught.
        """
        marked = []
        for row, kept in zip(rows, self.told([row.sample_id for row in rows]), strict=True):
            alignment = self.aligner.align(kept, row.response_ids)
            if row.sample_id not in self._signals:
                self._gaps += alignment.gaps
                self._signals[row.sample_id] = _signal(alignment.named)
            taught = tuple(float(named is not None) for named in alignment.named)
            marked.append(replace(row, columns={**row.columns, TAUGHT: taught}))
        facts = self.facts
        if facts["taught_share"] < MIN_SHARE:
            raise UserError(
                f"the server's log-probabilities stand at {facts['taught_share']:.0%} of the text's tokens in the"
                f" student's tokens ({self.reasons}), and half are needed: take a student with the server's tokenizer,"
                " or leave teacher.server.logprobs out and use losses on text (cross_entropy)"
            )
        words = f"{facts['taught_share']:.1%} of the text's tokens have the server's log-probabilities"
        report_facts("logprobs.json", facts, f"{words} ({self.reasons})")
        return marked

    @property
    def facts(self) -> dict[str, Any]:
        """How many of the text's tokens are taught, how many are gaps and why, and how much probability is named."""
        taught = sum(int(signal.known_N.sum()) for signal in self._signals.values())
        tokens = sum(len(signal.known_N) for signal in self._signals.values())
        mass = sum(float((1 - rest_N)[signal.known_N].sum()) for signal, rest_N in self._with_rest())
        gaps = {f"gaps: {reason}": count for reason, count in self._gaps.most_common()}
        return {
            "tokens": tokens,
            "taught": taught,
            "taught_share": taught / max(1, tokens),
            **gaps,
            "named_probability": mass / max(1, taught),
        }

    def _with_rest(self) -> list[tuple[GappedSignal, torch.Tensor]]:
        return [(signal, signal.top.rest_N) for signal in self._signals.values() if signal.top.rest_N is not None]

    @property
    def reasons(self) -> str:
        """The gaps in words."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self._gaps.most_common()) or "no gaps"

    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:  # noqa: ARG002
        """What the server said at the batch's response positions.

        Raises:
            UserError: text that is not among the marked rows.
        """
        assert taps == NO_TAPS, "a server has no layers"
        missing = [sample_id for sample_id in batch.sample_ids if sample_id not in self._signals]
        if missing:
            raise UserError(f"the server said nothing of sample {missing[0][:12]}: it teaches its own text only")
        first, *rest = (self._signals[sample_id] for sample_id in batch.sample_ids)
        return TeacherView(first.join(rest).to(self.device))


def _signal(positions: Sequence[Named | None]) -> GappedSignal:
    """One text's signal, the likeliest tokens first. A gap names one token, which nobody looks at."""
    columns = [sorted((named or {0: 0.0}).items(), key=lambda pair: -pair[1]) for named in positions]
    width = max(map(len, columns))
    ids_NK = torch.zeros(len(columns), width, dtype=torch.long)
    log_NK = torch.full((len(columns), width), -math.inf)
    for place, column in enumerate(columns):
        ids_NK[place, : len(column)] = torch.tensor([token for token, _ in column])
        log_NK[place, : len(column)] = torch.tensor([log_prob for _, log_prob in column])
    rest_N = (1 - log_NK.double().exp().sum(-1)).clamp_min(MIN_REST).float()
    count_N = torch.tensor([len(column) for column in columns])
    top = TopK(ids_NK, log_NK, rest_N, count_N)
    return GappedSignal(top, torch.tensor([named is not None for named in positions]))


def probe(api: ApiTeacher) -> int:
    """How many tokens the server names at the positions of a short text of its own. The request is billed.

    Raises:
        UserError: it gives no log-probabilities with its text.
    """
    request = Request(api.identity, PROBE, Sampling(1.0, 1.0, 8), seed=0)
    ((_, answer),) = api.answers([request])
    api.budget.is_not_stored(request.key)
    if answer.finish == "error":
        raise UserError(
            f"{api.endpoint.url} does not answer with log-probabilities: {answer.raw or 'no reply'!r}"[:400]
        )
    named = [len(entry[3]) for entry in answer.told or []]
    if not any(named):
        raise UserError(
            f"{api.endpoint.url} answers, but without log-probabilities, though they were asked for (teacher.server"
            ".logprobs): leave that out and use losses on text (cross_entropy), or use another server or model"
        )
    return max(named)
