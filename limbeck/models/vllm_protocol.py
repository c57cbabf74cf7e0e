"""What a vLLM server is asked and how its answers are checked; the weights are `vllm.py`'s matter.

Token ids are sent and returned (`return_token_ids`, vLLM 0.10.2 on); every setting that a `generation_config.json`
could fill in is sent; only the student's end tokens end an answer. vLLM's log-probabilities are those before
temperature and top_p (`--logprobs-mode raw_logprobs`) or after (`processed_logprobs`): the same at temperature 1 with
top_p 1. Log-probabilities count a head's padding; those of `generate.write` don't.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.models.generate import Completion, GenerationJob
from limbeck.models.http import (
    Backoff,
    Call,
    Connection,
    Reply,
    as_dict,
    as_dicts,
    read_json,
    send_with_retries,
)
from limbeck.types import UserError, printable

KEY_VARIABLE = "VLLM_API_KEY"  # the variable that vLLM's server itself reads
COMPLETIONS = "/v1/completions"
BUSY = frozenset({429, 502, 503, 504})
REFUSALS = frozenset({400, 404, 405, 422})
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
LOWEST_BIAS = -100.0
MAX_BIASED_TOKENS = 1024  # more tokens that are never sampled would fill every request
MINUS_INFINITY = -9999.0  # as vLLM writes it
SMALL_ANSWER = 2**20  # bytes
BYTES_PER_TOKEN = 512
START = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER"
REFUSED = object()  # a refusal that the caller expects


@dataclass(frozen=True)
class Patience:
    """Seconds for a connection, for one answer, and for a whole call of the writer with all its tries and pauses."""

    connect: float = 10.0
    answer: float = 600.0
    budget: float = 3600.0
    tries: int = 10  # two minutes of pauses: a server that is started again comes back in one
    pause: float = 0.5  # before the second try, then doubled
    longest_pause: float = 30.0


PATIENT = Patience()
GLANCE = Patience(answer=30.0, budget=60.0, tries=2)


@dataclass(frozen=True)
class StudentTokens:
    """What the student can write: the tokenizer's `vocab_size` ids, of which `eos_ids` end an answer. Its head may have
    more rows, which are never sampled."""

    eos_ids: frozenset[int]
    vocab_size: int
    head_rows: int = 0

    @property
    def rows(self) -> int:
        return max(self.vocab_size, self.head_rows)


@dataclass(frozen=True)
class ServedModel:
    """The name and the context of the model that the server holds."""

    name: str
    max_length: int


class VllmSession:
    """One call's exchange with the server: bounded in time and size, repeated while the server is busy or
    unreachable."""

    def __init__(
        self,
        connection: Connection,
        tokens: StudentTokens,
        patience: Patience,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.connection = connection
        self.tokens = tokens
        self.patience = patience
        self.sleep = sleep
        self.deadline = time.monotonic() + patience.budget

    def error(self, problem: str, remedy: str) -> UserError:
        return UserError(f"the vLLM server {self.connection.endpoint.url}: {problem}; {remedy}")

    def require(self, condition: bool, problem: str, remedy: str) -> None:
        if not condition:
            raise self.error(problem, remedy)

    async def ask(
        self,
        method: Literal["GET", "POST"],
        path: str,
        body: Any = None,
        max_bytes: int = SMALL_ANSWER,
        may_refuse: bool = False,
    ) -> Any:
        """The answer's JSON, None where it has no body, or REFUSED where the server `may_refuse` and does.

        Raises:
            UserError: no usable answer in time.
        """
        last = Reply()
        patience = self.patience

        async def send(_: int) -> Reply:
            nonlocal last
            self._check_time(0.0, path, last)
            seconds = min(patience.answer, self.deadline - time.monotonic())
            last = await self.connection.send(Call(method, path, body), max_bytes, seconds)
            return last

        async def pause(seconds: float) -> None:
            self._check_time(seconds, path, last)
            await self.sleep(seconds)

        backoff = Backoff(patience.tries, patience.pause, patience.longest_pause, longest_asked=patience.budget)
        await send_with_retries(send, lambda reply: not _is_busy(reply), backoff, pause)
        if may_refuse and last.status in REFUSALS:
            return REFUSED
        self.require(
            last.failure != "timeout",
            f"no answer to {path} in time",
            "see its log; lower max_tokens or the number of concurrent requests",
        )
        self.require(
            not _is_busy(last), f"{path} failed {patience.tries} times{_outcome(last)}", f"does it run there? {START}"
        )
        return self._content(path, last, max_bytes)

    def _check_time(self, pause: float, path: str, last: Reply) -> None:
        self.require(
            pause < self.deadline - time.monotonic(),
            f"{path} takes longer than the {self.patience.budget:g} s of its budget{_outcome(last)}",
            "send fewer requests at once, see its log",
        )

    def _content(self, path: str, reply: Reply, max_bytes: int) -> Any:
        is_start_enough = path.startswith("/v1")
        remedy = (
            f"start it as {START}" if is_start_enough else f"see its log; it must be a recent vLLM, started as {START}"
        )
        if reply.status in (401, 403):
            remedy = f"set the environment variable {KEY_VARIABLE} to its key"
        elif 300 <= reply.status < 400:
            remedy = "redirects are not followed: give the address that it leads to"
        self.require(
            not reply.truncated, f"an answer to {path} has more than {max_bytes} bytes", "is it a vLLM server?"
        )
        self.require(
            200 <= reply.status < 300, f"{path} was answered with status {reply.status}: {reply.error_text()}", remedy
        )
        if reply.body.strip() in (b"", b"null"):
            return None
        data = read_json(reply.body, allow_nan=True)
        self.require(data is not None, f"{path} was answered with something that is not JSON", "is it a vLLM server?")
        return data

    async def served_model(self, name: str | None) -> ServedModel:
        """The model called `name`; without a name, the only one that is no adapter."""
        cards = as_dicts(as_dict(await self.ask("GET", "/v1/models")).get("data"))
        by_name = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
        if name is None:
            bases = [name for name, card in by_name.items() if card.get("parent") is None]  # adapters name their parent
            name = bases[0] if len(bases) == 1 else ""
        self.require(
            name in by_name,
            f"it serves {printable(list(by_name))}",
            "name the student there, or start it with --served-model-name",
        )
        context = by_name[name].get("max_model_len")
        return ServedModel(name, context if type(context) is int else 2**31)

    async def complete(self, name: str, job: GenerationJob, index: int = 0) -> Completion:
        """The answer to one job, with the log-probability of each of its tokens."""
        max_bytes = SMALL_ANSWER + BYTES_PER_TOKEN * (len(job.prompt_ids) + job.sampling.max_tokens)
        answer = await self.ask("POST", COMPLETIONS, completion_body(name, job, self.tokens), max_bytes)
        choice = self.choice(answer, name, job)
        ids = self._answer_ids(choice, job.sampling.max_tokens)
        outside = [token for token in ids if not 0 <= token < self.tokens.vocab_size]
        self.require(
            not outside,
            f"it wrote token {outside[:1]}, and the tokenizer has {self.tokens.vocab_size}",
            "serve the student itself",
        )
        log_probs = self._log_probs(as_dict(choice.get("logprobs")), ids)
        sampler_log_probs = list(log_probs) if job.sampling.temperature else [0.0] * len(ids)
        return Completion(index, ids, log_probs, sampler_log_probs, own_tokens=len(ids))

    def choice(self, answer: Any, name: str, job: GenerationJob) -> dict[str, Any]:
        """The one choice of an answer to this prompt by this model."""
        answer = as_dict(answer)
        self.require(
            answer.get("model") == name,
            f"asked for {printable(name)}, it answered as {printable(answer.get('model'))}",
            "check its address",
        )
        choices = answer["choices"] if isinstance(answer.get("choices"), list) else []
        self.require(
            len(choices) == 1 and isinstance(choices[0], dict),
            f"it sent {len(choices)} answers for one",
            "remove the proxy or plugin that changes them",
        )
        choice: dict[str, Any] = choices[0]
        for key in ("token_ids", "prompt_token_ids"):
            ids = choice.get(key)
            self.require(
                isinstance(ids, list) and all(type(token) is int for token in ids),
                f"it sends no {key}",
                "it must be vLLM 0.10.2 or later; remove what drops return_token_ids",
            )
        self.require(
            choice["prompt_token_ids"] == list(job.prompt_ids),
            "it answered another prompt",
            "remove what changes or cuts prompts",
        )
        return choice

    def _answer_ids(self, choice: Mapping[str, Any], max_tokens: int) -> list[int]:
        """The ids, with the end token that the model wrote at their end: vLLM leaves it in; where it is missing, it is
        put back."""
        ids = list(choice["token_ids"])
        eos_ids = self.tokens.eos_ids
        finish = choice.get("finish_reason")
        reason = choice.get("stop_reason")
        self.require(
            finish in ("stop", "length"),
            f"it gave up an answer ({printable(finish)})",
            "let no other program pause it; see its log",
        )
        if finish == "stop" and (not ids or ids[-1] not in eos_ids):
            ends = eos_ids if reason is None else eos_ids & {reason} if type(reason) is int else frozenset()
            self.require(
                len(ends) == 1,
                f"an answer stopped for {printable(reason)}, no end token of the student",
                "serve the student itself",
            )
            ids += ends
        self.require(
            finish == "length" or reason in (None, ids[-1]),
            f"an answer stopped for {printable(reason)}, not its end",
            "update vLLM",
        )
        self.require(
            finish == "stop" or len(ids) >= max_tokens,
            f"it cut an answer at {len(ids)} of {max_tokens} tokens",
            "raise --max-model-len",
        )
        goes_on = len(ids) > max_tokens or any(token in eos_ids for token in ids[:-1])
        self.require(
            not goes_on,
            "it wrote on past the end token, or past max_tokens",
            "update vLLM (stop_token_ids, max_tokens)",
        )
        return ids

    def _log_probs(self, logprobs: Mapping[str, Any], ids: list[int]) -> list[float]:
        """The log-probability of each token, in nats."""
        values, names = (
            logprobs[key] if isinstance(logprobs.get(key), list) else [] for key in ("token_logprobs", "tokens")
        )
        self.require(
            len(values) == len(ids),
            f"{len(values)} log-probabilities came with {len(ids)} tokens",
            "remove what drops logprobs",
        )
        self.require(
            names == [f"token_id:{token}" for token in ids], "its log-probabilities are of other tokens", "update vLLM"
        )
        self.require(
            all(isinstance(value, float | int) and MINUS_INFINITY < value < 1e-3 for value in values),
            "its log-probabilities are not valid",
            "start it with --logprobs-mode raw_logprobs",
        )
        return [min(0.0, float(value)) for value in values]


def completion_body(name: str, job: GenerationJob, tokens: StudentTokens) -> dict[str, Any]:
    """The request for one job; it leaves nothing to the server's defaults."""
    sampling = job.sampling
    padding = range(tokens.vocab_size, tokens.rows)
    bias = {str(token): LOWEST_BIAS for token in padding} if 0 < len(padding) <= MAX_BIASED_TOKENS else None
    return NEUTRAL | {
        "model": name,
        "prompt": list(job.prompt_ids),
        "max_tokens": sampling.max_tokens,
        "n": 1,
        "stream": False,
        "logit_bias": bias,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "seed": job.seed % 2**63,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        "stop_token_ids": sorted(tokens.eos_ids),
    }


def _is_busy(reply: Reply) -> bool:
    return reply.status in BUSY or reply.failure in ("no connection", "broken connection")


def _outcome(reply: Reply) -> str:
    """The reply's status or error in brackets; empty before the first reply."""
    outcome = reply.error or (f"status {reply.status}" if reply.status else "")
    return f" ({outcome})" if outcome else ""
