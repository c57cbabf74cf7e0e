"""Chat templates for models that have none or several: Limbeck's own by name, and a user's file.

A user's file is data: of bounded size, rendered in jinja's immutable sandbox, and first on a short conversation in a
process of its own with bounded time and memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.data.render_alone import render_alone
from limbeck.models.template import frame_of
from limbeck.storage.files import user_path
from limbeck.types import UserError, content_hash, nearest

MAX_BYTES = 64 * 1024
CPU_SECONDS = 10
OWN_CPU_SECONDS = 4  # for a model's own
OWN_SECONDS = 120
SECONDS = 20  # for the first rendering, its process's start included

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "### Response:\n{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}\n\n{% else %}"
    "{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)
_PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}\n{% elif message['role']"
    " == 'assistant' %}{{ message['content'] }}{{ eos_token }}\n{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": _CHATML, "alpaca": _ALPACA, "plain": _PLAIN}


def template_suffix(template: str | None) -> str:
    """The part of a model's identity that stands for a template that a recipe gives it.

    Raises:
        UserError: no such template.
    """
    if template is None:
        return ""
    text = TEMPLATES.get(template) or (_read(template) if _is_file(template) else template)
    return f"+template-{content_hash(text)[:12]}"


def give_template(tokenizer: Tokenizer, template: str, source: str) -> None:
    """Give the tokenizer of the model `source` a template: one of its own by name, one of `TEMPLATES`, or a file.

    Those of `TEMPLATES` begin a text as the tokenizer does by itself, with its begin-of-sequence token or without.

    Raises:
        UserError: no such template, or one that can't be used with this tokenizer.
    """
    own: Any = tokenizer.chat_template
    if isinstance(own, dict) and template in own:
        tokenizer.chat_template = own[template]
    elif _is_file(template):
        text = _read(template)
        _try(template, text)
        tokenizer.chat_template = text
    elif template in TEMPLATES:
        begin = tokenizer.bos_token_id
        begins = begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATES[template]
    else:
        known = [*TEMPLATES, *(own if isinstance(own, dict) else [])]
        raise UserError(f"no chat template is named {template!r}{nearest(template, known)}; or give a .jinja file")
    if frame_of(tokenizer, f"the tokenizer of {source!r}").end is None:
        raise UserError(
            f"the chat template {template!r} ends an answer with no token that {source!r} knows, so a student would"
            " never learn to stop; use alpaca or plain, or end answers with {{ eos_token }}"
        )


def _is_file(template: str) -> bool:
    return template.endswith(".jinja")


def _read(template: str) -> str:
    file = user_path(template)
    if not file.is_file():
        raise UserError(f"there is no chat template at {template}")
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{template} is larger than {MAX_BYTES} bytes, too large for a chat template")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{template} is no text in UTF-8") from error


def check_own(tokenizer: Tokenizer, source: str) -> None:
    """Refuse a model whose own chat template never ends, or takes gigabytes, before it is rendered in this process.

    Raises:
        UserError: it does; one that merely refuses a conversation is left to `frame_of`.
    """
    own: Any = tokenizer.chat_template
    text = own.get("default") if isinstance(own, dict) else own
    if isinstance(text, str) and not _ends(text):
        raise UserError(
            f"the tokenizer of {source!r} has a chat template that takes too much time or memory for a conversation of"
            f" two turns; give a template of your own ({', '.join(TEMPLATES)}, or a .jinja file, as template)"
        )


@cache
def _ends(text: str) -> bool:
    done = render_alone({"chat": text}, OWN_CPU_SECONDS, OWN_SECONDS)
    return done is not None and (done.ok or (bool(done.fault) and "MemoryError" not in done.fault))


@cache
def _try(template: str, text: str) -> None:
    """Render the template once where it can do no harm. What it gives there is not read: `frame_of` judges it."""
    done = render_alone({"chat": text}, CPU_SECONDS, SECONDS)
    if done is None:
        raise UserError(f"{template} takes more than {SECONDS} seconds for a conversation of two turns")
    if not done.ok:
        reason = done.fault or "it took too much time or memory"
        raise UserError(f"{template} is no chat template that can be rendered: {reason[:300]}")
