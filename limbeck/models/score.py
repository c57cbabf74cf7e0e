"""A server that scores text it is given: the teacher's likeliest tokens at every response position, by token id.

Two protocols. llama.cpp's `/completion` is asked once for each position, with all token ids before it, for one token
and the `n_probs` likeliest; its cache of the prompt makes each of these requests cost one token. vLLM's
`/v1/completions` is asked once for each text, with `prompt_logprobs`. Both give log-probabilities of the whole softmax
at temperature 1, whatever is drawn.

Nothing a server says is believed: its tokens, its template and what it can do are probed before anything is asked, and
every answer is looked at for the model's name, the number of its tokens, ids that are no tokens, and probabilities that
are none. Not covered: servers that give log-probabilities of what they wrote alone (OpenAI's), and checking a server's
weights (`limbeck doctor` compares them).

Shapes: N response positions, K tokens named at a position.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx2
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.api import ApiTeacher, read_json, said
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.signals.cache import ids_of
from limbeck.signals.sparse import TopK
from limbeck.types import Batch, UserError

ScoringProtocol = Literal["llama.cpp", "vLLM"]
# at one position: ids and log-probabilities of the likeliest tokens, and log p of the written
NamedTokens = tuple[list[int], list[float], float]
ODD = "Zwölf Boxkämpfer, 12.5 % naïve 日本語 🙂\n\tdef f(x): return x  # <b>"  # what tokenizers differ in
ASKED = ({"role": "user", "content": "Is it 1, or 2?"},)
ROUNDING = 1e-3  # by how much probabilities in a server's float32 may pass 1


class ServerScorer:
    """A server's distributions over given text, as its `k` likeliest tokens at every position.

    Args:
        api: how the server is reached, with its limits and retries.
        k: how many tokens are wanted at every position.
        tokenizer: the student's, in whose ids the text is.
        written: whether log p of every written token is needed, too.
    """

    gives = frozenset({"text", "teacher_distribution"})
    model = None  # its weights are not here
    average = None

    def __init__(self, api: ApiTeacher, k: int, tokenizer: Tokenizer, written: bool = False) -> None:
        self.api = api
        self.tokenizer = tokenizer
        self.written = written
        self.vocab_size = len(tokenizer)
        self.k = min(k, self.vocab_size)
        self._protocol: ScoringProtocol | None = None

    @property
    def identity(self) -> str:
        return self.api.identity

    def probe(self) -> None:
        """Find out how the server scores, and that its tokens, its template and its number of tokens are what is
        needed.

        Raises:
            UserError: it can't score, means other tokens by the ids, frames a conversation otherwise, or names fewer
                tokens than asked for.
        """
        self._protocol = self.api.wait(self._find_protocol)
        if self.written and self._protocol != "vLLM":
            raise UserError(
                "a llama.cpp server names its likeliest tokens, and what the student writes may not be among them: this"
                " recipe's losses on the student's own text need a vLLM server, or divergences with a bucket (jsd,"
                " reverse_kl)"
            )
        told = self.api.wait(lambda client: self._tokens_of(client, ODD))
        own = list(self.tokenizer(ODD, add_special_tokens=False)["input_ids"])
        if told != own:
            at = next((n for n, (a, b) in enumerate(zip(told, own, strict=False)) if a != b), min(len(told), len(own)))
            raise UserError(
                f"the server's tokens are not the student's: token {at} of a test text is {told[at : at + 3]} there and"
                f" {own[at : at + 3]} here; serve a model of the student's family with its own tokenizer, or give the"
                " student the server's"
            )
        framed = self.framed()
        mine = [int(n) for n in _framed(self.tokenizer)]
        if framed != mine:
            theirs, ours = (repr(self.tokenizer.decode(ids))[:160] for ids in (framed, mine))
            raise UserError(
                f"the server frames a conversation otherwise than the student: {theirs} there and {ours} here; start"
                " the server with the student's chat template"
            )
        self.score([(mine, [own[0]])])

    def room(self) -> int | None:
        """How many tokens a prompt with its answer may have, where the server says it (llama.cpp's does)."""
        _, data = self.api.wait(lambda client: self.api.peek(client, "GET", "//props"))
        settings = data.get("default_generation_settings") if isinstance(data, dict) else None
        found = settings.get("n_ctx") if isinstance(settings, dict) else None
        return found if type(found) is int else None

    def framed(self) -> list[int]:
        """A short conversation in the server's chat template, as token ids."""
        return self.api.wait(self._framed_there)

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The server's distribution at the batch's response positions.

        Raises:
            UserError: what the server says is not what was asked for.
        """
        assert taps == NO_TAPS and vocab_size in (
            None,
            self.vocab_size,
        ), "a server has no layers, and its tokens are the student's"
        named = [position for text in self.score(list(ids_of(batch))) for position in text]
        ids_NK, log_NK, written_N = (torch.tensor([position[side] for position in named]) for side in (0, 1, 2))
        return TeacherView(TopK(ids_NK, log_NK, target_log_prob_N=None if bool(written_N.isnan().any()) else written_N))

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[NamedTokens]]:
        """The likeliest tokens at every position of each (prompt, response), which are token ids."""
        if self._protocol is None:
            self.probe()
        return self.api.wait(lambda client: self._all(client, texts))

    async def _all(
        self, client: httpx2.AsyncClient, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[NamedTokens]]:
        free = asyncio.Semaphore(self.api.settings.concurrency)
        ask = self._by_position if self._protocol == "llama.cpp" else self._at_once

        async def one(prompt: Sequence[int], response: Sequence[int]) -> list[NamedTokens]:
            async with free:
                return await ask(client, list(prompt), list(response))

        tasks = [asyncio.ensure_future(one(*text)) for text in texts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    # llama.cpp and vLLM

    async def _by_position(
        self, client: httpx2.AsyncClient, prompt: list[int], response: list[int]
    ) -> list[NamedTokens]:
        found = []
        # A token that is part of a character is held back, and its log-probabilities with it: so a whole one is drawn,
        # come what may. What
        # the bias does to the draw it does not do to the log-probabilities.
        drawn = [[int(self.tokenizer("a", add_special_tokens=False)["input_ids"][0]), 1000.0]]
        for place in range(len(response)):
            ids = prompt + response[:place]
            body = {
                "prompt": ids,
                "n_predict": 1,
                "n_probs": self.k,
                "cache_prompt": True,
                "temperature": 0.0,
                "logit_bias": drawn,
            }
            data = await self._asked(client, "//completion", body, len(ids) + 1)
            if data.get("truncated") or data.get("tokens_evaluated", len(ids)) != len(ids):
                raise UserError(
                    f"the server read {data.get('tokens_evaluated')} of {len(ids)} tokens: give it a larger context"
                )
            listed = data.get("completion_probabilities")
            if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
                raise UserError(
                    "the server gave no log-probabilities; it must be a llama.cpp server that knows n_probs"
                )
            entries = listed[0].get("top_logprobs")
            pairs = (
                [(one.get("id"), one.get("logprob")) for one in entries if isinstance(one, dict)]
                if isinstance(entries, list)
                else []
            )
            found.append(self._checked(pairs, response[place]))
        return found

    async def _at_once(self, client: httpx2.AsyncClient, prompt: list[int], response: list[int]) -> list[NamedTokens]:
        ids = prompt + response
        body = {
            "model": self.api.settings.name,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }
        data = await self._asked(client, "/completions", body, len(ids) + 1)
        choices = data.get("choices")
        listed = (
            choices[0].get("prompt_logprobs")
            if isinstance(choices, list) and choices and isinstance(choices[0], dict)
            else None
        )
        if not isinstance(listed, list) or len(listed) != len(ids):
            told = f"{len(listed)} rows" if isinstance(listed, list) else "no log-probabilities"
            raise UserError(
                f"the server gave {told} for a text of {len(ids)} tokens; it must be a vLLM server that knows"
                " prompt_logprobs"
            )
        return [
            self._checked(_vllm_pairs(listed[place], ids[place]), ids[place]) for place in range(len(prompt), len(ids))
        ]

    async def _asked(self, client: httpx2.AsyncClient, path: str, body: Any, tokens: int) -> dict[str, Any]:
        status, content = await self.api.tried(client, path, body, "", tokens)
        data = read_json(content)
        if status != 200 or not isinstance(data, dict):
            raise UserError(
                f"the server does not score a text of {tokens - 1} tokens (status {status or 'none'}). {said(content)}"
            )
        named = data.get("model")
        if (
            isinstance(named, str)
            and named != self.api.settings.name
            and not named.endswith(f"/{self.api.settings.name}")
        ):
            raise UserError(f"the answer is of the model {named[:80]!r}, and {self.api.settings.name!r} was asked")
        return data

    def _checked(self, pairs: Sequence[tuple[Any, Any]], written: int) -> NamedTokens:
        """The `k` likeliest, once they are tokens with probabilities, and the written one's, NaN where it is not
        named."""
        good = [
            (n, x)
            for n, x in pairs
            if type(n) is int and 0 <= n < self.vocab_size and type(x) in (int, float) and not math.isnan(x)
        ]
        if len(good) < len(pairs):
            raise UserError(
                f"the server names {len(pairs) - len(good)} tokens that are none of the student's, or have no"
                " log-probability"
            )
        if len({n for n, _ in good}) < len(good) or any(x > ROUNDING for _, x in good):
            raise UserError("the server names a token twice, or gives one a probability above 1")
        if len(good) < self.k:
            raise UserError(
                f"the server names {len(good)} tokens at a position, and {self.k} are needed: set"
                f" teacher.cache.top_k.k: {len(good) or 1}, or let the server give more (vLLM: --max-logprobs)"
            )
        good.sort(key=lambda pair: -pair[1])
        if (total := sum(math.exp(x) for _, x in good)) > 1 + ROUNDING:
            raise UserError(f"the probabilities that the server gives add up to {total:.3f}: they are no softmax")
        return (
            [n for n, _ in good[: self.k]],
            [float(x) for _, x in good[: self.k]],
            float(dict(good).get(written, math.nan)),
        )

    # What is probed

    async def _find_protocol(self, client: httpx2.AsyncClient) -> ScoringProtocol:
        for path, key, protocol in (
            ("//props", "default_generation_settings", "llama.cpp"),
            ("//version", "version", "vLLM"),
        ):
            status, data = await self.api.peek(client, "GET", path)
            if status == 200 and isinstance(data, dict) and key in data:
                return protocol  # type: ignore[return-value]
        raise UserError(
            f"{self.api.settings.url} can't score text: it is neither a llama.cpp nor a vLLM server; use losses on text"
            " (cross_entropy), or serve the model with one of them (`limbeck serve`)"
        )

    async def _tokens_of(self, client: httpx2.AsyncClient, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        if self._protocol == "vLLM":
            body = {"model": self.api.settings.name, "prompt": text, "add_special_tokens": False}
        return await self._ids(client, body)

    async def _framed_there(self, client: httpx2.AsyncClient) -> list[int]:
        if self._protocol == "vLLM":
            body = {"model": self.api.settings.name, "messages": list(ASKED), "add_generation_prompt": True}
            return await self._ids(client, body)
        status, data = await self.api.peek(client, "POST", "//apply-template", {"messages": list(ASKED)})
        if status != 200 or not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
            raise UserError(
                "the server does not say how it frames a conversation (/apply-template): use a newer llama.cpp server"
            )
        return await self._tokens_of(client, data["prompt"])

    async def _ids(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> list[int]:
        status, data = await self.api.peek(client, "POST", "//tokenize", body)
        ids = data.get("tokens") if isinstance(data, dict) else None
        if status != 200 or not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise UserError(
                "the server does not say what its tokens are (/tokenize), so they can't be held against the student's"
            )
        return ids


def _framed(tokenizer: Tokenizer) -> Sequence[int]:
    text = tokenizer.apply_chat_template(list(ASKED), add_generation_prompt=True, tokenize=False)
    ids: Sequence[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return ids


def _vllm_pairs(row: Any, written: int) -> list[tuple[Any, Any]]:
    """(id, log-probability) of one position. The written token stands in every row, so a row that has moved is
    found."""
    if not isinstance(row, dict) or str(written) not in row:
        raise UserError(
            "the server's rows are not those of the tokens that were sent: a row lacks the token written at its place"
        )
    return [
        (int(key) if key.isdecimal() else None, one.get("logprob") if isinstance(one, dict) else None)
        for key, one in row.items()
    ]
