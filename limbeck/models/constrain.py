"""A model in process that is held to a form of answers: which tokens may come next, by llguidance (extra `constrain`).

Why this library: one wheel of 3 MB for every Python from 3.9 on, without dependencies (xgrammar brings triton and tvm;
outlines-core has schemas as regular expressions only), for Linux and macOS, and it reads byte-level and SentencePiece
vocabularies from the tokenizer's own file. The end tokens are allowed only where an answer is complete. JSON is written
as `json.dumps` writes it, with its properties in the schema's order, so that the tokens of most answers are taught as
they were sampled. Where the template opens the answer's thinking, the form begins when that ends.

Not covered: slow tokenizers; schemas with keywords that llguidance does not know (`fault` names them).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from limbeck.config.server import Served
from limbeck.elicit.thinking import after_thinking
from limbeck.models.engines import form_words
from limbeck.models.model import Model
from limbeck.types import AnswerForm, UserError, printable

AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LACKS = "a model in process needs llguidance for it: pip install 'limbeck[constrain]'"
TAIL = 32  # tokens in which the end of the thinking is looked for


def unheld(form: AnswerForm, server: Served | None) -> str:
    """Why a teacher, behind a server or in process, can't be held to a form of answers; nothing if it can."""
    if server is not None:
        words = form_words(server, form)
        return words if isinstance(words, str) else ""
    return fault(form) if find_spec("llguidance") is not None else LACKS


def fault(form: AnswerForm) -> str:
    """Why llguidance can't hold a model to a form; nothing if it can."""
    return _said(_library().validate_grammar(_grammar(form)))


def _said(message: str) -> str:
    if not message or message.startswith("WARNING"):
        return ""
    return f"llguidance can't: {printable(message.strip().splitlines()[0])}"


def _library() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise UserError(f"answers are to keep to a form, and {LACKS}") from error
    return LLMatcher


def _grammar(form: AnswerForm) -> str:
    library = _library()
    if form.schema is not None:
        return str(library.grammar_from_json_schema(form.schema, overrides=AS_DUMPED))
    if form.pattern is not None:
        return str(library.grammar_from_regex(form.pattern))
    return str(library.grammar_from_lark("start: " + " | ".join(json.dumps(label) for label in form.labels or ())))


class HeldRow:
    """One answer that is being written."""

    def __init__(self, matcher: Any, end: bytes, still_thinks: Callable[[list[int]], bool] | None) -> None:
        self._matcher = matcher
        self._end = end
        self._still_thinks = still_thinks
        self._thought: list[int] = []

    def allowed(self) -> bytes | None:
        """The tokens that may come next, a bit each, the first in the lowest; None for all of them."""
        if self._still_thinks is not None:
            return None
        return self._end if self._matcher.is_error() else bytes(self._matcher.compute_bitmask())

    def take(self, token: int) -> None:
        """The token that was drawn."""
        if self._still_thinks is None:
            self._matcher.consume_token(token)  # in error afterwards if it can't go on, and the answer ends
            return
        self._thought = [*self._thought[1 - TAIL :], token]
        if not self._still_thinks(self._thought):
            self._still_thinks = None


class Forms:
    """The forms that one model is held to; each grammar is made once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._matchers: dict[AnswerForm, Any] = {}

    def begin(self, form: AnswerForm, prompt_ids: list[int]) -> HeldRow:
        """A new answer to a prompt.

        Raises:
            UserError: this model can't be held to it.
        """
        if form not in self._matchers:
            matcher = _library()(self._tokenizer, _grammar(form))
            if matcher.is_error():
                raise UserError(f"{_said(matcher.get_error())}: set constrain: false at the step that asks")
            self._matchers[form] = matcher
        mark = self.model.opens_thinking(prompt_ids)
        still_thinks = (lambda ids: after_thinking(f"{mark}{self.model.decode(ids)}") is None) if mark else None
        return HeldRow(self._matchers[form].deep_copy(), self._end, still_thinks)

    @property
    def _end(self) -> bytes:
        bits = bytearray((self.model.vocab_size + 7) // 8)
        for token in self.model.eos_ids:
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    @cached_property
    def _tokenizer(self) -> Any:
        """The model's tokenizer as llguidance reads it; takes some seconds."""
        _library()
        from llguidance import LLTokenizer

        backend = getattr(self.model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("a model with a slow tokenizer can't be held to a form: set constrain: false")
        data = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        text = json.dumps(data, ensure_ascii=False)
        return LLTokenizer(text, n_vocab=self.model.vocab_size, eos_token=sorted(self.model.eos_ids))
