"""Models in the form of lm-evaluation-harness: one that is loaded here, and one behind an OpenAI-compatible server.

Importing this file imports that program. Keys come from OPENAI_API_KEY, which it reads itself; what is probed here goes
through `models.http`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from limbeck.models.http import Call, Endpoint, read_json
from limbeck.models.model import Model
from limbeck.types import UserError

ROWS_TOGETHER = 8
SECONDS_TO_ANSWER = 300
PROBE_SECONDS = 60
PROBE_BYTES = 2**28  # of an answer that names every token of a vocabulary
LIKELIEST = 256
ALL_TOKENS = 1_000_000  # how many next tokens are asked for: most choices are among the first


class LocalModel(HFLM):  # type: ignore[misc]
    """A model that is loaded here.

    With `apart`, prompt and choice are tokenised one by one and joined as ids, as Limbeck's own tasks do; without it,
    as lm-evaluation-harness does: white space at the prompt's end goes to the choice, and the choice's tokens are those
    that the joined text has more than the prompt. The two differ where the prompt ends in white space (a chat
    template's last newline) or a token spans the boundary. A prompt out of a chat template gets no further special
    tokens.
    """

    def __init__(self, model: Model, apart: bool, chat: bool) -> None:
        self.apart = apart
        super().__init__(
            pretrained=model.net,
            tokenizer=model.tokenizer,
            backend="causal",
            batch_size=ROWS_TOGETHER,
            max_length=model.max_length,
            add_bos_token=False if chat else None,
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self.apart:
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)


class ChatServer(LocalChatCompletion):  # type: ignore[misc]
    """The server's chat/completions: it applies its own chat template. Text only."""

    def __init__(self, model: str, base_url: str) -> None:
        super().__init__(model=model, base_url=f"{base_url}/chat/completions", timeout=SECONDS_TO_ANSWER)

    def parse_generations(self, outputs: Any, **_: Any) -> list[str]:
        return [_text(choice.get("message"), "content") for choice in _choices(outputs)]


class TextServer(LocalCompletionsAPI):  # type: ignore[misc]
    """The server's completions. With the model's tokenizer (a folder) it gets token ids, and given text can be
    scored."""

    def __init__(self, model: str, base_url: str, tokenizer: str | None, apart: bool) -> None:
        self.apart = apart
        super().__init__(
            model=model,
            base_url=f"{base_url}/completions",
            timeout=SECONDS_TO_ANSWER,
            tokenizer=tokenizer,
            tokenizer_backend="huggingface" if tokenizer else None,
            tokenized_requests=tokenizer is not None,
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self.apart:
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def parse_generations(self, outputs: Any, **_: Any) -> list[str]:
        return [_text(choice, "text") for choice in _choices(outputs)]


class TokenServer(TextServer):
    """llama.cpp's server, which returns no log-probabilities of a given prompt: its own /completion says how likely
    each next token is, so a choice is scored token by token. The prompt stays in its cache; one request costs one
    token."""

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Per request ((context, choice), context ids, choice ids): (log p(choice | context) in nats, whether it is the
        greedy text)."""
        results = []
        for _, context, continuation in requests:
            steps = [self._next(context + continuation[:at], token) for at, token in enumerate(continuation)]
            results.append((sum(log_prob for log_prob, _ in steps), all(first for _, first in steps)))
        return results

    def _next(self, ids: list[int], token: int) -> tuple[float, bool]:
        """log p(token | ids), and whether it is the likeliest."""
        for count in (LIKELIEST, ALL_TOKENS):
            likely = next_tokens(self.base_url.removesuffix("/v1/completions"), ids, count)
            if token in likely:
                return likely[token], max(likely, key=lambda id_: likely[id_]) == token
        raise UserError(
            f"the server names {len(likely)} tokens that may come next, and token {token} is not among them: is"
            " --tokenizer its model's?"
        )


def next_tokens(root: str, ids: list[int], count: int) -> dict[int, float]:
    """The log-probabilities (nats, before temperature) of the `count` likeliest next tokens, from llama.cpp's
    /completion.

    Raises:
        UserError: it doesn't answer, or names none.
    """
    body = {
        "prompt": ids,
        "n_predict": 1,
        "n_probs": count,
        "temperature": 0,
        "cache_prompt": True,
        "post_sampling_probs": False,
    }
    reply = _post(root, "/completion", body)
    steps = reply.get("completion_probabilities") if isinstance(reply, dict) else None
    tops = steps[0].get("top_logprobs") if isinstance(steps, list) and steps and isinstance(steps[0], dict) else None
    if (
        not isinstance(tops, list)
        or not tops
        or not all(isinstance(top, dict) and "id" in top and "logprob" in top for top in tops)
    ):
        raise UserError(f"the server at {root} names no next tokens with their log-probabilities")
    return {int(top["id"]): float(top["logprob"]) for top in tops}


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer's JSON, None where it is none."""
    endpoint = Endpoint(url, "OPENAI_API_KEY", PROBE_SECONDS)
    reply = endpoint.run(lambda connection: connection.send(Call("POST", path, body), PROBE_BYTES))
    if reply.failure:
        raise UserError(f"no answer from {url}{path}: {reply.error}; is the server running?")
    return None if reply.truncated else read_json(reply.body, allow_nan=True)


def _choices(outputs: Any) -> list[dict[str, Any]]:
    """The choices of a reply, in order. A reply without any must not be scored as an empty one."""
    replies = outputs if isinstance(outputs, list) else [outputs]
    all_choices = []
    for reply in replies:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise UserError(
                f"the server's reply holds no choices: {str(reply)[:200]!r}; is it an OpenAI-compatible server?"
            )
        all_choices += sorted(choices, key=lambda choice: int(choice.get("index") or 0))
    return all_choices


def _text(part: Any, key: str) -> str:
    text = part.get(key) if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"the server's reply holds no text: {str(part)[:200]!r}; a reasoning model may need more tokens to come to"
            " its answer"
        )
    return text


def scorer(model: str, base_url: str, prompt: list[int]) -> type[TextServer]:
    """The class that scores given text on this server: by the log-probabilities of a given prompt (`echo`), or, for
    llama.cpp's, token by token.

    Args:
        prompt: token ids, at least two of them.

    Raises:
        UserError: it can do neither, or doesn't answer.
    """
    if _echoes(model, base_url, prompt):
        return TextServer
    try:
        next_tokens(base_url.removesuffix("/v1"), prompt, 1)
    except UserError as error:
        raise UserError(
            f"the server at {base_url} does not return the log-probabilities of a given prompt (echo with logprobs),"
            " which multiple-choice and likelihood tasks need, nor those of the next token (llama.cpp's /completion):"
            " use a server that does, such as vLLM's or llama.cpp's, or give the model's folder instead of --base-url"
        ) from error
    return TokenServer


def _echoes(model: str, base_url: str, prompt: list[int]) -> bool:
    """Whether the server returns the log-probabilities of a given prompt."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": [prompt],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    reply = _post(base_url, "/completions", body)
    choices = reply.get("choices") if isinstance(reply, dict) else None
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    log_probs = first.get("logprobs")
    values = log_probs.get("token_logprobs") if isinstance(log_probs, dict) else None
    tops = log_probs.get("top_logprobs") if isinstance(log_probs, dict) else None
    return isinstance(values, list) and isinstance(tops, list) and len(values) == len(tops) == len(prompt) + 1
