"""Models in the form that lm-evaluation-harness asks: one that is loaded here, and one behind an OpenAI-compatible server.

Importing this file imports that program. Keys come from OPENAI_API_KEY, which it reads itself.
"""

from __future__ import annotations

import os
from typing import Any

import requests
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from limbeck.models.load import Model
from limbeck.types import UserError

ROWS_TOGETHER = 8
SECONDS_TO_ANSWER = 300
PROBE_SECONDS = 60


class Loaded(HFLM):  # type: ignore[misc]
    """A loaded model.

    With `apart`, prompt and choice are tokenised one by one and joined as ids, as Limbeck's own tasks do; without it, as
    lm-evaluation-harness does: white space at the prompt's end goes to the choice, and the choice's tokens are those
    that the joined text has more than the prompt. The two differ where the prompt ends in white space (a chat
    template's last newline) or a token spans the boundary. A prompt out of a chat template gets no further special tokens.
    """

    def __init__(self, model: Model, apart: bool, chat: bool) -> None:
        self.apart = apart
        super().__init__(
            pretrained=model.net, tokenizer=model.tokenizer, backend="causal", batch_size=ROWS_TOGETHER, max_length=model.context,
            add_bos_token=False if chat else None,
        )  # fmt: skip

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self.apart:
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)


class ServedChat(LocalChatCompletion):  # type: ignore[misc]
    """The server's chat/completions: it applies its own chat template. Text only."""

    def __init__(self, model: str, base_url: str) -> None:
        super().__init__(model=model, base_url=f"{base_url}/chat/completions", timeout=SECONDS_TO_ANSWER)

    def parse_generations(self, outputs: Any, **_: Any) -> list[str]:
        return [_text(choice.get("message"), "content") for choice in _choices(outputs)]


class ServedText(LocalCompletionsAPI):  # type: ignore[misc]
    """The server's completions. With the model's tokenizer (a folder) it gets token ids, and given text can be scored."""

    def __init__(self, model: str, base_url: str, tokenizer: str | None, apart: bool) -> None:
        self.apart = apart
        super().__init__(
            model=model, base_url=f"{base_url}/completions", timeout=SECONDS_TO_ANSWER, tokenizer=tokenizer,
            tokenizer_backend="huggingface" if tokenizer else None, tokenized_requests=tokenizer is not None,
        )  # fmt: skip

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self.apart:
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def parse_generations(self, outputs: Any, **_: Any) -> list[str]:
        return [_text(choice, "text") for choice in _choices(outputs)]


def _choices(outputs: Any) -> list[dict[str, Any]]:
    """The choices of a reply, in order. An answer that is none must not be scored as an empty one."""
    replies = outputs if isinstance(outputs, list) else [outputs]
    found = []
    for reply in replies:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise UserError(f"the server's reply holds no choices: {str(reply)[:200]!r}; is it an OpenAI-compatible server?")
        found += sorted(choices, key=lambda choice: int(choice.get("index") or 0))
    return found


def _text(part: Any, key: str) -> str:
    text = part.get(key) if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"the server's reply holds no text: {str(part)[:200]!r}; a reasoning model may need more tokens to come to its answer"
        )
    return text


def check_scores_text(model: str, base_url: str, prompt: list[int]) -> None:
    """Ask the server for the log-probabilities of a given prompt, and refuse one that doesn't return them.

    Args:
        prompt: token ids, at least two of them.

    Raises:
        UserError: it doesn't, or it doesn't answer.
    """
    asked: dict[str, Any] = {"model": model, "prompt": [prompt], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        response = requests.post(
            f"{base_url}/completions", json=asked, timeout=PROBE_SECONDS, headers={"Authorization": f"Bearer {key}"}, allow_redirects=False
        )
        reply = response.json()
    except requests.RequestException as error:
        raise UserError(f"no answer from {base_url}/completions: {type(error).__name__}; is the server running?") from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    found = first.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    tops = found.get("top_logprobs") if isinstance(found, dict) else None
    if not (response.ok and isinstance(values, list) and isinstance(tops, list) and len(values) == len(tops) == len(prompt) + 1):
        raise UserError(
            f"the server at {base_url} does not return the log-probabilities of a given prompt (echo with logprobs), which multiple-choice "
            "and likelihood tasks need: use a server that does, such as vLLM's, or give the model's folder instead of --base-url"
        )
