"""Text of others as data in a question: every line of it follows a bar, so that none can close its fence, and control
tokens in it are broken, so that none can end the message."""

from __future__ import annotations

import re
from collections.abc import Collection

CONTROL = re.compile(
    r"<\|[^\s|<>]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?(?:INST|SYSTEM_PROMPT)\]|</?think>"
)
BAR = "| "
HOLE = re.compile(r"\{(\w+)\}")


def fenced(text: str, control: Collection[str] = ()) -> str:
    """The text as data: a bar before every line (Unicode's line ends count) and a space in every control token.

    Args:
        control: the reader's own control tokens, in addition to the usual ones.
    """
    named = sorted((token for token in control if len(token.strip()) > 1), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, named), CONTROL.pattern]))
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + " " + match[0][1:], text)
    return "\n".join(BAR + line for line in text.splitlines() or [""])


def fill_fenced(template: str, control: Collection[str], **texts: str) -> str:
    """The template with every `{name}` replaced by its text, fenced; what looks like a name in a text stays as it is.

    Raises:
        KeyError: a name without a text, which is a bug in this package.
    """
    blocks = {name: fenced(text, control) for name, text in texts.items()}
    return HOLE.sub(lambda match: blocks[match[1]], template)
