"""A conversation as token ids through a tokenizer's chat template, in which the control tokens of its content are text.

`apply_chat_template` reads `<|im_end|>` in a user's words as the token that ends a turn. Here only the template's own
pieces are read so. Content without such a string takes the plain road, whose ids are those of `apply_chat_template` to
the bit. Otherwise the strings are marked, the marked conversation is rendered and cut at the control tokens outside the
marks, and each piece is encoded as text. This is checked by the same conversation with harmless words in their place:
it must give the plain road's ids, and as many control tokens.

Not covered: what a model server does with such text, and templates that join a control token from a user's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.elicit.thinking import MARKERS, closed_by, markers_of, opened_by
from limbeck.models.around_answer import end_in, header_between
from limbeck.models.chat import TOOLS, for_template
from limbeck.types import Message, UserError

ASKED, SAID = "zqlimbeckaskedqz", "zqlimbecksaidqz"  # words that no template writes itself
THINKING = re.compile(r"think|thought|reason", re.IGNORECASE)
ANCHORS = ("", "\U000f0000", "\n")  # what a piece is encoded after: nothing, or what no text merges with
GIVE_ONE = "give it one of Limbeck's or your own (template: chatml, alpaca, plain, or a .jinja file)"
# `strftime_now` in a template would give another prompt, and other request keys, every day: 26 July 2024 for all days
DATE = {
    "%-d": "26", "%d": "26", "%e": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24",
    "%A": "Friday", "%a": "Fri", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": "208",
}  # fmt: skip
SAME_DAY = "{%- macro strftime_now(format) -%}{{- format FILTERS -}}{%- endmacro +%}".replace(
    "FILTERS", " ".join(f"| replace('{code}', '{value}')" for code, value in DATE.items())
)
MOST_ADDED = 2**20  # characters that a template may add to a conversation, and how often it may repeat what was said
MOST_TIMES = 8


@dataclass(frozen=True)
class Frame:
    """How a tokenizer frames a conversation.

    Args:
        source: the template that is rendered; one that asks for the date is told the same day always.
        parts: whether it wants content as a list of parts.
        controls: the tokens that frame a conversation or have no text, by their strings.
        structural: those of `controls` that the tokenizer does not call special, and so does not split on request.
        end: the token that ends an answer; None if the template puts none there.
        rest: what stands after that token, such as a line's end.
        before: what stands between a prompt and an answer, thinking left out, such as <|channel|>final<|message|>.
        after: what stands between an answer and `end`: the mark that closes its part, such as <|END_RESPONSE|>.
        marks: the tokens that set parts of an answer apart (thinking, channels, calls), by their strings.
    """

    source: str
    parts: bool
    controls: Mapping[str, int] = field(default_factory=dict)
    structural: frozenset[str] = frozenset()
    end: int | None = None
    rest: str = ""
    before: str = ""
    after: str = ""
    marks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", _any_of(self.controls))
        object.__setattr__(self, "structure", _any_of(self.structural))

    pattern: re.Pattern[str] = field(init=False)
    structure: re.Pattern[str] = field(init=False)


_FRAMES: WeakKeyDictionary[Tokenizer, tuple[Any, int, Frame]] = WeakKeyDictionary()


def frame_of(tokenizer: Tokenizer, name: str = "the tokenizer") -> Frame:
    """How a tokenizer frames a conversation. `name` stands for it in messages.

    Raises:
        UserError: no template, several without a default, one that can't be rendered, that leaves out the user's words,
            or that has no place for the answer.
    """
    known = _FRAMES.get(tokenizer)
    if known is not None and known[:2] == (tokenizer.chat_template, len(tokenizer)):
        return known[2]
    source = same_day(_template_text(tokenizer, name))
    try:
        frame = _frame(tokenizer, source, name)
    except TemplateRefusalError as refusal:
        raise UserError(f"{name} has a chat template that can't be used: {refusal}; {GIVE_ONE}") from refusal
    _FRAMES[tokenizer] = (tokenizer.chat_template, len(tokenizer), frame)
    return frame


class TemplateRefusalError(UserError):
    """A template refused a conversation."""


def _template_text(tokenizer: Tokenizer, name: str) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"{name} has several chat templates and no default: name one of {', '.join(sorted(template))}"
                f" (template: {min(template)}, under teacher or student)"
            )
        template = template["default"]
    if not template:
        raise UserError(f"{name} has no chat template; use an instruction-tuned model, or {GIVE_ONE}")
    return str(template)


def same_day(template: str) -> str:
    """The template; one that asks for the date with the same answer on every day."""
    if "strftime_now" not in template:
        return template
    return SAME_DAY + re.sub(r"\A[ \t]+(?=\{[%#])", "", template)  # as jinja strips a line that begins with a block


def _frame(tokenizer: Tokenizer, source: str, name: str) -> Frame:
    """Find out by rendering a question and an answer."""
    question: Message = {"role": "user", "content": ASKED}
    parts = False
    try:
        prompt = _render(tokenizer, source, parts, (question,))
    except TemplateRefusalError:
        prompt = ""
    if ASKED not in prompt:
        parts = True
        prompt = _render(tokenizer, source, parts, (question,))
    if ASKED not in prompt or (parts and "'type'" in prompt):  # the list itself, written out, is no content
        raise UserError(
            f"{name} has a chat template that leaves out what the user says, given as text or as a list of parts;"
            f" {GIVE_ONE}"
        )
    try:
        asked = _render(tokenizer, source, parts, (question,), answer=False)
        whole = _render(tokenizer, source, parts, (question, {"role": "assistant", "content": SAID}), answer=False)
    except TemplateRefusalError:  # it takes no answers: what it frames them with is not known
        asked = whole = prompt
    before, said, after = whole.partition(SAID)
    header = header_between(prompt, before) if said else ""
    if header and prompt == asked:
        raise UserError(
            f"{name} has a chat template without a place for the answer: {header.strip()!r} stands before answers in a"
            f" conversation, and not at the end of a prompt (add_generation_prompt); {GIVE_ONE}"
        )
    pieces = (*asked.split(ASKED), prompt.removeprefix(asked), header, after)
    controls, structural = _controls(tokenizer, pieces)
    end = end_in(after, _any_of(controls)) if said else None
    last = None if end is None else controls[end[0]]
    closes = "" if end is None or not after[: end.start()].strip() else after[: end.start()]
    rest = "" if end is None else after[end.end() :]
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {text: added[text] for text in markers_of(added) if added[text] not in (last, tokenizer.eos_token_id)}
    return Frame(source, parts, controls, structural, end=last, rest=rest, before=header, after=closes, marks=marks)


def _controls(tokenizer: Tokenizer, pieces: Sequence[str]) -> tuple[dict[str, int], frozenset[str]]:
    """The control tokens by their strings, and which of them are not special; `pieces` are the template's own.

    Special tokens are, except the one for unknown text, and those that plain text gives as well (a pad token `!`). So
    are other added tokens in the template, but for words, and the marks of thinking and calls, which answers hold.
    """
    controls = {}
    structural = set()
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if not text.strip() or number == tokenizer.unk_token_id:
            continue
        frames = any(text in piece for piece in pieces)
        if token.special and (frames or number == tokenizer.eos_token_id or _plain(tokenizer, text) != [number]):
            controls[text] = number
        elif not token.special and frames and not text.isalnum() and not (text in MARKERS or THINKING.search(text)):
            controls[text] = number
            structural.add(text)
    return controls, frozenset(structural)


def _any_of(texts: Mapping[str, int] | frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: the one that the chat template puts there, else the tokenizer's own."""
    end = frame_of(tokenizer).end if tokenizer.chat_template else None
    return int(tokenizer.eos_token_id if end is None else end)


def render(tokenizer: Tokenizer, messages: Sequence[Message], answer: bool = True) -> str:
    """The conversation as text; with `answer` it ends where an answer begins.

    Raises:
        UserError: the template refuses this conversation, or can't be used at all.
    """
    frame = frame_of(tokenizer)
    return _render(tokenizer, frame.source, frame.parts, messages, answer=answer)


def _render(tokenizer: Tokenizer, source: str, parts: bool, messages: Sequence[Message], answer: bool = True) -> str:
    shown, tools = for_template(messages)
    if parts:
        shown = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in shown]
    offered: dict[str, Any] = {} if tools is None else {"tools": tools}
    try:
        text = str(
            tokenizer.apply_chat_template(
                shown, chat_template=source, add_generation_prompt=answer, tokenize=False, **offered
            )
        )
        said = sum(len(part) for message in messages for part in message.values())
        if len(text) > MOST_ADDED + MOST_TIMES * said:
            raise ValueError(f"it makes {len(text):,} characters of {said:,}")
        return text
    except Exception as error:  # a template may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        roles = ", ".join(message["role"] for message in messages) or "nobody"
        raise TemplateRefusalError(f"the chat template refuses a conversation ({roles}): {reason}") from error


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation as token ids, ready to be answered; what looks like a control token in its content is text.

    Raises:
        UserError: the template refuses this conversation, or its content can't be kept apart from its control tokens.
    """
    frame = frame_of(tokenizer)
    text = _render(tokenizer, frame.source, frame.parts, messages)
    beside = [text for message in messages for key, text in message.items() if key not in ("role", "content")]
    tools = [message["content"] for message in messages if message["role"] == TOOLS]
    if any(frame.pattern.search(part) for part in (*beside, *tools)):
        raise UserError(_unsafe(messages, "they stand in a call, a tool or reasoning"))
    if any(frame.pattern.search(message["content"]) for message in messages):
        return _guarded_ids(tokenizer, frame, messages, text)
    ids = read(tokenizer, text)
    if _count(frame, ids) > len(frame.pattern.findall(text)):
        raise UserError(_unsafe(messages, "its tokenizer makes a control token of other text"))
    return ids


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as token ids, nothing added; what looks like a control token is treated as text."""
    if tokenizer.chat_template and (frame := frame_of(tokenizer)).structural:
        return _as_text(tokenizer, frame, text)
    return _plain(tokenizer, text)


def opened(tokenizer: Tokenizer) -> str:
    """The mark with which the template itself begins the thinking of every answer, such as <think>; empty if none."""
    return opened_by(render(tokenizer, ({"role": "user", "content": "Why?"},))[-64:]).strip()


def continued(mark: str, answer: str, is_cut: bool = False) -> str:
    """A given answer as it goes on from a prompt that ends with `mark`, which opens its thinking (see `opened`; empty
    if none does): without a mark of its own, and with the end of a thinking that it lacks."""
    if not mark:
        return answer
    begun = answer.lstrip()
    if begun.startswith(mark):
        return begun.removeprefix(mark).lstrip("\n")
    close = closed_by(mark)
    return answer if close in answer or is_cut else f"\n{close}\n\n{answer}"


# The guarded road


def _guarded_ids(tokenizer: Tokenizer, frame: Frame, messages: Sequence[Message], text: str) -> list[int]:
    opens, closes = _marks(frame.source, messages)
    marked = _replaced(frame, messages, lambda found: f"{opens}{found[0]}{closes}")
    harmless = _render(tokenizer, frame.source, frame.parts, _replaced(frame, messages, lambda _: "x"))
    unmarked, taken = _unmarked(_render(tokenizer, frame.source, frame.parts, marked), opens, closes)
    if unmarked != text:
        raise UserError(_unsafe(messages, "its chat template changes such words"))
    expected = read(tokenizer, harmless)
    for anchor in ANCHORS:
        if encoded(tokenizer, frame, harmless, [], anchor=anchor) == expected:
            break
    else:
        raise UserError(_unsafe(messages, "its tokenizer reads a text otherwise than its pieces"))
    ids = encoded(tokenizer, frame, text, taken, anchor=anchor)
    if _count(frame, ids) != _count(frame, expected):
        raise UserError(_unsafe(messages, "its tokenizer makes a control token of plain text"))
    if tokenizer.unk_token_id not in ids and _letters(tokenizer, ids) != _letters(tokenizer, read(tokenizer, text)):
        raise UserError(_unsafe(messages, "its tokenizer can't write them as text"))
    return ids


def _unsafe(messages: Sequence[Message], reason: str) -> str:
    said = next((message["content"] for message in messages if message["role"] == "user"), "")
    return (
        f"the prompt {said[:60]!r} can't be shown to the model with its control tokens as text: {reason}; leave the"
        " prompt out, or use another model"
    )


def _marks(source: str, messages: Sequence[Message]) -> tuple[str, str]:
    """Two characters for private use that stand nowhere in the conversation or its template."""
    used = set(source).union(*(message["content"] for message in messages))
    free = (chr(number) for number in range(0xF0000, 0xFFFFE) if chr(number) not in used)
    return next(free), next(free)


def _replaced(frame: Frame, messages: Sequence[Message], by: Any) -> list[Message]:
    return [message | {"content": frame.pattern.sub(by, message["content"])} for message in messages]


def _unmarked(text: str, opens: str, closes: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the places in it that were marked."""
    plain = ""
    taken = []
    for piece in re.split(f"({opens}[^{opens}{closes}]*{closes})", text):
        inner = piece.strip(opens + closes)
        if piece.startswith(opens):
            taken.append((len(plain), len(plain) + len(inner)))
        plain += inner
    return plain, taken


def encoded(tokenizer: Tokenizer, frame: Frame, text: str, taken: Sequence[tuple[int, int]], anchor: str) -> list[int]:
    """Token ids of a rendered conversation whose places `taken` are text. The pieces between control tokens are encoded
    one by one, after an `anchor` that is removed again where a tokenizer puts a space before a text."""
    ids: list[int] = []
    begin = 0
    for start, end in [*_own_controls(frame, text, taken), (len(text), len(text))]:
        piece = text[begin:start]
        token = _added(tokenizer, frame, text[start:end])
        piece = piece.rstrip() if token is not None and token.lstrip else piece
        ids += _as_text(tokenizer, frame, piece, anchor if begin > 0 else "")
        ids += [frame.controls[text[start:end]]] if token is not None else []
        begin = end
        while token is not None and token.rstrip and text[begin : begin + 1].isspace():
            begin += 1
    return ids


def _own_controls(frame: Frame, text: str, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Where the template's own control tokens stand: outside the places that are `taken`."""
    borders = [0, *(border for place in taken for border in place), len(text)]
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        yield from (found.span() for found in frame.pattern.finditer(text, begin, end))


def _added(tokenizer: Tokenizer, frame: Frame, text: str) -> Any:
    """The tokenizer's entry of a control token; None for other text."""
    return tokenizer.added_tokens_decoder[frame.controls[text]] if text in frame.controls else None


def _as_text(tokenizer: Tokenizer, frame: Frame, text: str, anchor: str = "") -> list[int]:
    """A text's ids without control tokens: special ones are split on request, the others are cut in the middle."""
    cuts = [(found.start() + found.end()) // 2 for found in frame.structure.finditer(text)]
    ids = []
    for begin, end in pairwise([0, *cuts, len(text)]):
        ids += _plain(tokenizer, text[begin:end], anchor if begin == 0 else anchor or ANCHORS[1])
    return ids


def _plain(tokenizer: Tokenizer, text: str, anchor: str = "") -> list[int]:
    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    if anchor:
        first, both = encode(anchor), encode(anchor + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return encode(text)


def read(tokenizer: Tokenizer, text: str) -> list[int]:
    """As `apply_chat_template` reads a rendered conversation."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _count(frame: Frame, ids: Sequence[int]) -> int:
    controls = set(frame.controls.values())
    return sum(token in controls for token in ids)


def _letters(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids without spaces, of which decoders put some around control tokens."""
    return "".join(str(tokenizer.decode(list(ids), skip_special_tokens=False)).split())
