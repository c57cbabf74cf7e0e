"""The answer in a text that a model wrote: what follows its thinking, and where it says its answer.

Whoever judges or parses a text reads it through `after_thinking`, so that drafts in the thinking neither pass nor fail.
A template may open the thinking in the prompt: then the text has its end alone, and `opened_by` tells from the prompt
how it began. Not covered: thinking without any marks, and thinking that a server cut off after it opened it itself.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Collection

NAMES = "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis|seed:think|antthinking"
OPENS = re.compile(
    rf"\s*(?:<(?P<name>{NAMES})>|(?P<mistral>\[THINK\])|(?P<kimi>◁think▷)|(?P<cohere><\|START_THINKING\|>)"
    r"|(?P<gemma><\|channel>thought\b)|(?P<granite>Here(?: is|'s|’s) my thought process:))",
    re.IGNORECASE,
)
CLOSERS = {
    "mistral": "[/THINK]",
    "kimi": "◁/think▷",
    "cohere": "<|END_THINKING|>",
    "gemma": "<channel|>",
    "granite": "response:",
}
CLOSE = r"(?:</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>)"
# the end of thinking that the prompt began; in quotes, or within a sentence, it is talked about
CLOSES = re.compile(
    rf"(?<![`\"'“‘«(])(?!(?<=[\w,] ){CLOSE} (?-i:[a-z])){CLOSE}(?![`\"'”’»),;]|\.(?!\d))", re.IGNORECASE
)
GOES_ON = re.compile(" [a-z]")
XML = ("<thought>", "<reasoning>")  # tags that answers have, too
LATER = re.compile(r"^[ \t]*(?P<open><think(?:ing)?>|\[THINK\])", re.IGNORECASE | re.MULTILINE)
FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
WRAPPED = re.compile(
    r"\s*(?:<(?:answer|response|output)>|<\|START_RESPONSE\|>|<\|begin_of_box\|>)(.*?)"
    r"(?:</(?:answer|response|output)>|<\|END_RESPONSE\|>|<\|end_of_box\|>|\Z)\s*\Z",
    re.IGNORECASE | re.DOTALL,
)
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)([^<]{0,200}(?:<\|constrain\|>[^<]{0,40})?)<\|message\|>")
CHANNEL_ENDS = re.compile(r"<\|(?:end|return|start|call)\|>")
UNMARKED = re.compile(r"analysis[^\W_]")  # no word: the channel's name, then its text
FINAL_WITHOUT_MARKS = re.compile(r"(?:assistant)?final(?=\W|[A-Z0-9])|assistantfinal")

# Tokens that say what a text is. A tokenizer may call them special; a text without them can't be read.
MARKERS = frozenset(
    "<think> </think> [THINK] [/THINK] ◁think▷ ◁/think▷ <|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|>"
    " <|END_RESPONSE|> <|START_ACTION|> <|END_ACTION|> [TOOL_CALLS] [ARGS] [CALL_ID] <tool_call> </tool_call>"
    " <|tool_call|> <|python_tag|> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>"
    " <｜tool▁call▁begin｜> <｜tool▁call▁end｜>"
    " <｜tool▁sep｜>"
    " <|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|>"
    " <|tool_call_argument_begin|> <|channel> <channel|> <|begin_of_box|> <|end_of_box|>".split()
)
CHANNEL_MARKERS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>"})

STATED = re.compile(
    r"####|\banswer\s*(?:is(?![a-z])|would be|must be|:|=)"
    r"|\bAntwort\s*(?:ist|lautet|:)|\brespuesta\s*(?:correcta\s*)?(?:es|:)"
    r"|\bréponse\s*(?:correcte\s*)?(?:est|:)|\brisposta\s*(?:corretta\s*)?(?:è|:)|\bresposta\s*(?:correta\s*)?(?:é|:)"
    r"|\bодповідь\s*[:—-]|\bответ\s*[:—-]|答案\s*(?:是|为|為|:|：)|答えは|正解は|정답은|답은|답\s*:|उत्तर\s*(?:है|:)|الجواب\s*(?:هو|:)"
    r"|الإجابة\s*(?:هي|:)|\bodpowiedź\s*(?:to|:)|\bcevap\s*:|\bantwoord\s*(?:is|:)|\bsvaret?\s*(?:är|er|:)",
    re.IGNORECASE,
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def after_thinking(text: str) -> str | None:
    """The answer that follows the thinking, which is the whole text where there is none; None where the thinking never
    ends, for then there is no answer. A wrapping that says "answer" is taken off."""
    answer = without_thinking(text)
    if answer is None or answer == text:
        return answer
    wrapped = WRAPPED.match(answer)
    return (wrapped[1] if wrapped else answer).strip()


def without_thinking(text: str) -> str | None:
    """The text without its thinking, as it is where it has none; None where the thinking never ends."""
    if CHANNEL.search(text):
        return _after_channels(text)
    at = 0
    while opened := OPENS.match(text, at):
        closed = _closer(opened).search(text, opened.end())
        if closed is None:
            return None
        at = closed.end()
    if text.startswith("analysis") and (UNMARKED.match(text) or "assistantfinal" in text):
        final = FINAL_WITHOUT_MARKS.search(text, len("analysis"))
        if final or re.match(r"analysis[A-Z]", text):
            return text[final.end() :].strip() if final else None  # channels whose marks a server left out
    at = _after_ends(text, at)
    return _without_later(text[at:], at > 0)


def _after_ends(text: str, at: int) -> int:
    """Where thinking ends that the prompt began. An end whose begin stands before it is talked about, where the
    sentence goes on after it, or where the two are tags of XML."""
    later = LATER.search(text, at)
    since = at
    for closed in CLOSES.finditer(text, at):
        if later and later.start() < closed.start():
            break
        begin = closed[0].lower().replace("/", "", 1)
        is_tag = begin in XML or GOES_ON.match(text, closed.end()) is not None
        if not is_tag or begin not in text[since : closed.start()].lower():
            at = closed.end()
        since = closed.end()
    return at


def _closer(opened: re.Match[str]) -> re.Pattern[str]:
    mark = f"</{opened['name']}>" if opened["name"] else CLOSERS[str(opened.lastgroup)]
    return re.compile(re.escape(mark), re.IGNORECASE)


def _without_later(text: str, thought: bool) -> str | None:
    """The answer without thinking between its lines."""
    parts: list[str] = []
    at = 0
    fences = [match.start() for match in FENCE.finditer(text)]
    for opened in LATER.finditer(text):
        if opened.start() < at or bisect(fences, opened.start()) % 2:
            continue
        mark = opened["open"].replace("<", "</").replace("[", "[/")
        closed = re.compile(re.escape(mark), re.IGNORECASE).search(text, opened.end())
        if closed is None:
            return None
        parts.append(text[at : opened.start()])
        at, thought = closed.end(), True
    answer = "".join(parts) + text[at:]
    return answer.lstrip() if thought else answer


def _after_channels(text: str) -> str | None:
    """What gpt-oss wrote to channels other than its analysis: the final one, or else calls of tools."""
    found = list(CHANNEL.finditer(text))
    limits = [*(message.start() for message in found[1:]), len(text)]  # the next message ends one without a mark
    finals: list[str] = []
    calls: list[str] = []
    for message, limit in zip(found, limits, strict=True):
        end = CHANNEL_ENDS.search(text, message.end(), limit)
        body = text[message.end() : end.start() if end else limit]
        if message[1].lower() == "final":
            finals.append(body)
        elif "to=" in message[2]:
            calls.append(message[0] + body + "<|call|>")
    return finals[-1].strip() if finals else "".join(calls) or None


def closed_by(mark: str) -> str:
    """The mark that ends the thinking which this one opens."""
    found = OPENS.match(mark)
    kind = "" if found is None else found.lastgroup or ""
    return CLOSERS[kind] if kind in CLOSERS else f"{mark[:1]}/{mark[1:]}"


def opened_by(prompt: str) -> str:
    """The mark with which a rendered prompt has begun the thinking of the answer; empty where it has not."""
    tail = prompt[-80:].rstrip()
    last = list(OPENS.finditer(tail))
    return last[-1][0].strip() if last and last[-1].end() == len(tail) else ""


def markers_of(tokens: Collection[str]) -> frozenset[str]:
    """Those of a tokenizer's special tokens that a text can't be read without."""
    return frozenset(tokens) & (MARKERS | (CHANNEL_MARKERS if "<|channel|>" in tokens else frozenset()))


def stated(text: str) -> str | None:
    """What follows the last "the answer is" or the like, in any of fifteen languages; None if it never says so."""
    *_, last = (match.end() for match in STATED.finditer(text)) if STATED.search(text) else (None,)
    return None if last is None else text[last:]


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds; None if there is none, or it is not closed."""
    starts = [match.end() for match in BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for at in range(starts[-1], len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[starts[-1] : at]
    return None
