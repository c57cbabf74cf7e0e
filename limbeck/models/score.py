"""A server that scores given text: the teacher's likeliest tokens at every response position, by token id.

Two protocols. llama.cpp's `/completion` is called once for each position, with all token ids before it, for one token
and the `n_probs` likeliest; its prompt cache makes each of these calls cost one token. vLLM's `/v1/completions` is
called once for each text, with `prompt_logprobs`. Both give log-probabilities of the whole softmax at temperature 1,
whatever is sampled.

Nothing a server says is trusted: its tokens, its template and its abilities are probed first, and every answer is
checked for the model's name, the number of tokens, ids that are not tokens, and values that are not probabilities. Not
covered: servers that give log-probabilities only of what they wrote (OpenAI's), and checking a server's weights
(`limbeck doctor` compares them).

Shapes: N response positions, K tokens named at a position.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.api import ApiTeacher
from limbeck.models.http import MAX_BYTES, NAMED_BYTES, Call, Connection, as_dict, as_dicts
from limbeck.models.model import vocab_size_of
from limbeck.models.replies import read_usage
from limbeck.models.told import LEAST
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.signals.cache import ids_of
from limbeck.signals.sparse import TopK
from limbeck.types import Batch, Message, UserError

ScoringProtocol = Literal["llama.cpp", "vLLM"]
# at one position: ids and log-probabilities of the likeliest tokens, and log p of the written one
NamedTokens = tuple[list[int], list[float], float]
TEST_TEXT = "Zwölf Boxkämpfer, 12.5 % naïve 日本語 🙂\n\tdef f(x): return x  # <b>"  # what tokenizers differ in
TEST_CHAT = ({"role": "user", "content": "Is it 1, or 2?"},)
SAME = 0.2  # nats between two answers for one text, on average: in low precision a server's sums move with the batch
ROUNDING = 1e-3  # by how much probabilities in a server's float32 may pass 1


class ServerScorer:
    """A server's distributions over given text, as its `k` likeliest tokens at every position.

    Args:
        api: the server, with its limits and retries.
        k: how many tokens to ask for at every position.
        tokenizer: the student's; the text is in its ids.
        written: whether log p of every written token is needed, too.
        chat: a short conversation of the kind that is scored, which the server must frame as the student does.
    """

    gives = frozenset({"text", "teacher_distribution"})
    model = None  # its weights are not here
    average = None

    def __init__(
        self,
        api: ApiTeacher,
        k: int,
        tokenizer: Tokenizer,
        *,
        written: bool = False,
        chat: Sequence[Message] = TEST_CHAT,
    ) -> None:
        self.api = api
        self.chat = chat
        self.tokenizer = tokenizer
        self.written = written
        self.vocab_size = vocab_size_of(tokenizer)
        self.k = min(k, self.vocab_size)
        self._protocol: ScoringProtocol | None = None
        self._sample: tuple[tuple[list[int], list[int]], NamedTokens] | None = None

    @property
    def identity(self) -> str:
        return self.api.identity

    @property
    def told(self) -> str:
        """What it says of given text, in words."""
        return f"names {self.k} tokens at every position"

    def probe(self) -> None:
        """Find out how the server scores; check its tokens, its template and how many tokens it names.

        Raises:
            UserError: it can't score, its ids mean other tokens, it frames a conversation otherwise, or names too few
                tokens.
        """
        self._protocol = self.api.endpoint.run(self._find_protocol)
        if self.written and self._protocol != "vLLM":
            raise UserError(
                "a llama.cpp server names its likeliest tokens, and what the student writes may not be among them: this"
                " recipe's losses on the student's own text need a vLLM server, or divergences with a bucket (jsd,"
                " reverse_kl)"
            )
        theirs = self.api.endpoint.run(lambda connection: self._tokenize(connection, TEST_TEXT))
        ours = list(self.tokenizer(TEST_TEXT, add_special_tokens=False)["input_ids"])
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            at = next((place for place, (there, here) in pairs if there != here), min(len(theirs), len(ours)))
            raise UserError(
                f"the server's tokens are not the student's: token {at} of a test text is {theirs[at : at + 3]} there"
                f" and {ours[at : at + 3]} here; serve a model of the student's family with its own tokenizer, or give"
                " the student the server's"
            )
        their_chat = self.framed(self.chat)
        our_chat = [int(n) for n in _framed(self.tokenizer, self.chat)]
        if their_chat != our_chat:
            there, here = (repr(self.tokenizer.decode(ids))[:160] for ids in (their_chat, our_chat))
            raise UserError(
                f"the server frames a conversation otherwise than the student: {there} there and {here} here; start"
                " the server with the student's chat template"
            )
        text = (our_chat, [ours[0]])
        ((named,),) = self.score([text])
        self._sample = (text, named)

    def room(self) -> int | None:
        """How many tokens a prompt with its answer may have, where the server says so."""
        reply = self.api.endpoint.run(lambda connection: connection.send(Call("GET", "/props", at_root=True)))
        room = as_dict(as_dict(reply.json()).get("default_generation_settings")).get("n_ctx")
        if room is None:  # vLLM
            reply = self.api.endpoint.run(lambda connection: connection.send(Call("GET", "/models")))
            models = {model.get("id"): model for model in as_dicts(as_dict(reply.json()).get("data"))}
            room = as_dict(models.get(self.api.settings.name)).get("max_model_len")
        return room if type(room) is int and room > 0 else None

    def framed(self, chat: Sequence[Message]) -> list[int]:
        """A short conversation in the server's chat template, as token ids."""
        return self.api.endpoint.run(lambda connection: self._frame(connection, chat))

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The server's distribution at the batch's response positions.

        Raises:
            UserError: the server's answer is not what was requested.
        """
        assert taps == NO_TAPS and vocab_size in (
            None,
            self.vocab_size,
        ), "a server has no layers, and its tokens are the student's"
        positions = [position for text in self.score(list(ids_of(batch))) for position in text]
        ids_NK, log_NK, written_N = (torch.tensor(column) for column in zip(*positions, strict=True))
        return TeacherView(TopK(ids_NK, log_NK, target_log_prob_N=None if bool(written_N.isnan().any()) else written_N))

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[NamedTokens]]:
        """The likeliest tokens at every position of each (prompt, response), which are token ids.

        After the first time the probe's text is scored along, and its numbers must still be those of the probe.

        Raises:
            UserError: the server gives no usable answer, or has other weights than at the probe.
        """
        is_new = self._sample is None
        if self._protocol is None:
            self.probe()
        if is_new or self._sample is None:
            return self.api.endpoint.run(lambda connection: self._score_all(connection, texts))
        text, before = self._sample
        *positions, (now,) = self.api.endpoint.run(lambda connection: self._score_all(connection, [*texts, text]))
        later = dict(zip(*now[:2], strict=True))
        gaps = [abs(later[token] - log_prob) for token, log_prob in zip(*before[:2], strict=True) if token in later]
        if 2 * len(gaps) < self.k or sum(gaps) > SAME * len(gaps):
            raise UserError(
                f"{self.api.endpoint.url} no longer gives the numbers that it gave at first, for one test text"
                f" ({len(gaps)} of {self.k} likeliest tokens are the same): its weights changed; serve the first model"
                " again and run it again to go on, or give another --out"
            )
        return positions

    async def _score_all(
        self, connection: Connection, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[NamedTokens]]:
        slots = asyncio.Semaphore(self.api.at_once)
        score = self._score_by_position if self._protocol == "llama.cpp" else self._score_at_once

        async def score_one(prompt: Sequence[int], response: Sequence[int]) -> list[NamedTokens]:
            async with slots:
                return await score(connection, list(prompt), list(response))

        tasks = [asyncio.ensure_future(score_one(*text)) for text in texts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    # llama.cpp and vLLM

    async def _score_by_position(
        self, connection: Connection, prompt: list[int], response: list[int]
    ) -> list[NamedTokens]:
        positions = []
        # The server holds back a token that is part of a character, and its log-probabilities with it. So a bias makes
        # it write a whole character; the bias does not change the log-probabilities.
        bias = [[int(self.tokenizer("a", add_special_tokens=False)["input_ids"][0]), 1000.0]]
        for place in range(len(response)):
            ids = prompt + response[:place]
            body = {
                "prompt": ids,
                "n_predict": 1,
                "n_probs": self.k,
                "cache_prompt": True,
                "temperature": 0.0,
                "logit_bias": bias,
            }
            read = 1 if place else len(ids)  # its cache holds what it has read before
            call = Call("POST", "/completion", body, at_root=True)
            data = await self._send(connection, call, len(ids), named=self.k, read=read)
            if data.get("truncated") or data.get("tokens_evaluated", len(ids)) != len(ids):
                raise UserError(
                    f"the server read {data.get('tokens_evaluated')} of {len(ids)} tokens: give it a larger context"
                )
            steps = data.get("completion_probabilities")
            if not isinstance(steps, list) or not steps or not isinstance(steps[0], dict):
                raise UserError(
                    "the server gave no log-probabilities; it must be a llama.cpp server that knows n_probs"
                )
            pairs = [(token.get("id"), token.get("logprob")) for token in as_dicts(steps[0].get("top_logprobs"))]
            positions.append(self._check(pairs, response[place]))
        return positions

    async def _score_at_once(self, connection: Connection, prompt: list[int], response: list[int]) -> list[NamedTokens]:
        ids = prompt + response
        body = {
            "model": self.api.settings.name,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }
        named = (self.k + 1) * len(ids)
        data = await self._send(connection, Call("POST", "/completions", body), len(ids), named=named, read=len(ids))
        choices = data.get("choices")
        rows = as_dict(choices[0]).get("prompt_logprobs") if isinstance(choices, list) and choices else None
        if not isinstance(rows, list) or len(rows) != len(ids):
            what = f"{len(rows)} rows" if isinstance(rows, list) else "no log-probabilities"
            raise UserError(
                f"the server gave {what} for a text of {len(ids)} tokens; it must be a vLLM server that knows"
                " prompt_logprobs"
            )
        return [self._check(_vllm_pairs(rows[at], ids[at]), ids[at]) for at in range(len(prompt), len(ids))]

    async def _send(self, connection: Connection, call: Call, size: int, *, named: int, read: int) -> dict[str, Any]:
        """The reply to a call about a text of `size` tokens, of which the server has to read `read`. It names so many
        tokens."""
        most = MAX_BYTES + NAMED_BYTES * named
        reply = await self.api.send(connection, call, size + 1, max_bytes=most)
        data = reply.json()
        if reply.status == 200:
            self.api.budget.count(read_usage(data), read + 1)
        if reply.status == 200 and reply.truncated:
            raise UserError(
                f"the server answers with more than {most:,} bytes about a text of {size} tokens: lower"
                " teacher.cache.top_k.k, or check the server"
            )
        if reply.status != 200 or not isinstance(data, dict):
            raise UserError(
                f"the server does not score a text of {size} tokens (status {reply.status or 'none'}). {reply.quote()}"
            )
        model = data.get("model")
        name = self.api.settings.name
        if isinstance(model, str) and model != name and not model.endswith(f"/{name}"):
            raise UserError(f"the answer is of the model {model[:80]!r}, not of {name!r}")
        return data

    def _check(self, pairs: Sequence[tuple[Any, Any]], written: int) -> NamedTokens:
        """The `k` likeliest tokens, refused if they are not tokens with probabilities; and log p of the written one,
        NaN where it is not named."""
        good = [
            (token, max(log_prob, LEAST))  # of an impossible one some servers say -inf, some the least of all numbers
            for token, log_prob in pairs
            if type(token) is int
            and 0 <= token < self.vocab_size
            and type(log_prob) in (int, float)
            and not math.isnan(log_prob)
        ]
        if len(good) < len(pairs):
            raise UserError(
                f"the server names {len(pairs) - len(good)} tokens that are none of the student's, or have no"
                " log-probability"
            )
        if len({token for token, _ in good}) < len(good) or any(log_prob > ROUNDING for _, log_prob in good):
            raise UserError("the server names a token twice, or gives one a probability above 1")
        if len(good) < self.k:
            raise UserError(
                f"the server names {len(good)} tokens at a position, and {self.k} are needed: set"
                f" teacher.cache.top_k.k: {len(good) or 1}, or let the server give more (vLLM: --max-logprobs)"
            )
        good.sort(key=lambda pair: -pair[1])
        if (total := sum(math.exp(log_prob) for _, log_prob in good)) > 1 + ROUNDING:
            raise UserError(f"the probabilities that the server gives add up to {total:.3f}: they are no softmax")
        return (
            [token for token, _ in good[: self.k]],
            [float(log_prob) for _, log_prob in good[: self.k]],
            float(dict(good).get(written, math.nan)),
        )

    # Probing

    async def _find_protocol(self, connection: Connection) -> ScoringProtocol:
        protocols: dict[ScoringProtocol, tuple[str, str]] = {
            "llama.cpp": ("/props", "default_generation_settings"),
            "vLLM": ("/version", "version"),
        }
        for protocol, (path, key) in protocols.items():
            reply = await connection.send(Call("GET", path, at_root=True))
            if reply.status == 200 and key in as_dict(reply.json()):
                return protocol
        raise UserError(
            f"{self.api.endpoint.url} can't score text: it is neither a llama.cpp nor a vLLM server; use losses on text"
            " (cross_entropy), or serve the model with one of them (`limbeck serve`)"
        )

    async def _tokenize(self, connection: Connection, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        if self._protocol == "vLLM":
            body = {"model": self.api.settings.name, "prompt": text, "add_special_tokens": False}
        return await self._ids(connection, body)

    async def _frame(self, connection: Connection, chat: Sequence[Message]) -> list[int]:
        if self._protocol == "vLLM":
            body = {"model": self.api.settings.name, "messages": list(chat), "add_generation_prompt": True}
            return await self._ids(connection, body)
        call = Call("POST", "/apply-template", {"messages": list(chat)}, at_root=True)
        reply = await connection.send(call)
        prompt = as_dict(reply.json()).get("prompt")
        if reply.status != 200 or not isinstance(prompt, str):
            raise UserError(
                "the server does not say how it frames a conversation (/apply-template): use a newer llama.cpp server"
            )
        return await self._tokenize(connection, prompt)

    async def _ids(self, connection: Connection, body: Mapping[str, Any]) -> list[int]:
        reply = await connection.send(Call("POST", "/tokenize", body, at_root=True))
        ids = as_dict(reply.json()).get("tokens")
        if reply.status != 200 or not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise UserError(
                "the server does not say what its tokens are (/tokenize), so they can't be compared with the student's"
            )
        return ids


def _framed(tokenizer: Tokenizer, chat: Sequence[Message]) -> Sequence[int]:
    text = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
    ids: Sequence[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return ids


def _vllm_pairs(row: Any, written: int) -> list[tuple[Any, Any]]:
    """(id, log-probability) of one position. Every row names the written token, so a shifted row is noticed."""
    if not isinstance(row, dict) or str(written) not in row:
        raise UserError(
            "the server's rows are not those of the tokens that were sent: a row lacks the token written there"
        )
    return [(int(key) if key.isdecimal() else None, as_dict(entry).get("logprob")) for key, entry in row.items()]
