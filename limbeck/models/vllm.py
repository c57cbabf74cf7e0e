"""The student's text from a vLLM server that runs beside the training: `GenerationJob` in, `Completion` out, as in
`generate.write`.

Token ids go out and come back (`return_token_ids`, vLLM 0.10.2 on); every setting that a `generation_config.json` would
fill in is sent; the student's end tokens alone end an answer. vLLM's log-probabilities are those before temperature and
top_p (`--logprobs-mode raw_logprobs`) or after (`processed_logprobs`): the same at temperature 1 with top_p 1. Other
draws are refused.

`sync` writes safetensors into a folder that the server sees, too, then asks for `/pause?mode=wait` (left out where it
is unknown), `/collective_rpc` (`reload_weights` with `weights_path`), `/reset_prefix_cache` (keys and values of the old
weights) and `/resume`.
Sources: docs.vllm.ai, "What is Layerwise (Re)loading?" and "Async Reinforcement Learning"; vllm/entrypoints/serve/dev,
2026. The server needs VLLM_SERVER_DEV_MODE=1, which opens `/collective_rpc` to whoever reaches its port, API key or not
("Security").

Not confirmed: nothing here ran against a real vLLM or on a GPU; the tests speak its protocol. Which release first has
`weights_path` (0.14 read old weights again, vllm issue 32718), and which models survive it (some Mamba hybrids don't,
pull request 48284): so the server's log-probabilities are compared with the student's after every reload, which shows
other weights, not those of a few small steps ago. Not covered: two models that write one text, several servers behind
one address, speculative decoding, an external KV cache, weights sharded over ranks. Log-probabilities count a head's
padding; those of `generate.write` don't. N tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import ssl
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.generate import Completion, GenerationJob
from limbeck.models.load import quiet
from limbeck.models.sample import log_prob_of
from limbeck.storage.files import full_disk_as_os_error, new_directory, remove_directory, sweep
from limbeck.types import Sampling, UserError

KEY = "VLLM_API_KEY"  # the variable that vLLM's server itself reads
COMPLETIONS = "/v1/completions"
BUSY = frozenset({429, 502, 503, 504})
REFUSED = frozenset({400, 404, 405, 422})
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
NEVER = -100.0
MOST_PADDING = 1024  # the protocol's lowest bias; more tokens that are never drawn would fill every request
# mean difference from the student's log-probabilities: a guess that leaves room for bfloat16, not for other weights
NATS = 0.3
PROBE_TOKENS = 8
PROBE_SEEDS = 8
FLAT = -2.0  # so many draws of a text with probability exp(-2): a chance of exp(-16)
POLL = 0.2  # seconds between two looks at `stop`
SMALL = 2**20
PER_TOKEN = 512  # bytes that an answer may have
START = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER"
NO = object()  # a refusal that was reckoned with
certificates = cache(ssl.create_default_context)  # reading them for every call would take longer than the call
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Seconds for a connection, for one answer, and for a whole call of the writer with all its tries and pauses."""

    connect: float = 10.0
    answer: float = 600.0
    budget: float = 3600.0
    tries: int = 8
    pause: float = 0.5  # before the second try, then doubled
    longest_pause: float = 30.0


@dataclass(frozen=True)
class Probed:
    """What the server turned out to be. `off` is the mean difference from the student's own log-probabilities, in
    nats."""

    model: str
    context: int
    version: str
    log_probs: Literal["raw", "processed", "unknown"]
    off: float


@dataclass
class VllmWriter:
    """The student as it writes on a vLLM server, which holds this one student: no other run may write or sync through
    it.

    All that goes wrong with the server is a `UserError`, with a remedy. The key is read from the environment and kept
    nowhere.

    Args:
        url: the server's address, with or without `/v1`.
        folder: the writer's own, seen by the server, too; older weights in it are removed. `folder_there` is the
            server's name for it. eos_ids, tokens: what ends an answer; ids from `tokens` on are never drawn.
        rows: ids that the student's head has, where those are more.
        model: the name it is served under; needed where several are.
        together: requests under way at once.
    """

    url: str
    folder: Path
    eos_ids: frozenset[int]
    tokens: int
    rows: int = 0
    model: str | None = None
    folder_there: str | None = None
    together: int = 64
    patience: Patience = Patience()
    _met: tuple[str, int] | None = field(default=None, init=False, repr=False)
    _prompt: tuple[int, ...] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if (
            parts.scheme not in {"http", "https"}
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise UserError(
                "the vLLM server's address must look like http://localhost:8000, without a password: its key comes"
                f" from {KEY}"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.rows, self.folder = max(self.tokens, self.rows), self.folder.resolve()

    def write(self, jobs: Sequence[GenerationJob], stop: Callable[[], bool] = lambda: False) -> list[Completion]:
        """One answer per job, in their order, with log-probabilities. Once `stop` is true, unfinished ones are left
        out."""
        if any(
            how.temperature != 0 and (how.temperature, how.top_p) != (1.0, 1.0)
            for how in {job.sampling for job in jobs}
        ):
            raise UserError(
                "through vLLM the student writes with temperature 1 and top_p 1, or with temperature 0: of other draws"
                " the server does not give both log-probabilities; set those, or let it write in process"
            )
        if any(job.beside_ids is not None for job in jobs):
            raise UserError("two models write one text in process only: leave out the vLLM server, or rollout.joint")
        return self._call(partial(self._write, jobs, stop)) if jobs else []

    def sync(self, net: PreTrainedModel, tokenizer: Tokenizer) -> None:
        """Give the server the student's present weights and, where `probe` has been there, look whether it writes with
        them."""
        # a new name each time: a shared disk may have the old one cached
        path = self.folder / f"weights-{uuid.uuid4().hex[:12]}"
        save(net, tokenizer, path)
        self._call(partial(self._sync, net, path.name))
        sweep(self.folder)
        for old in set(self.folder.glob("weights-*")) - {path}:
            remove_directory(old)

    def probe(self, net: PreTrainedModel, prompt_ids: Sequence[int]) -> Probed:
        """Refuse a server of another model or vocabulary, or that drops ids, log-probabilities, seeds or temperatures.

        It must have the weights of `net` already; `prompt_ids` is any prompt of the training.
        """
        self._prompt = tuple(prompt_ids)
        return self._call(partial(self._probe, net, self._prompt))

    def _call(self, work: Callable[[_Wire], Coroutine[Any, Any, T]]) -> T:
        async def call() -> T:
            wire = _Wire(self.url, self.patience)
            async with wire.client:
                return await work(wire)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(call())
        with ThreadPoolExecutor(1) as pool:  # a notebook's thread has a loop of its own
            return pool.submit(asyncio.run, call()).result()

    async def _write(self, jobs: Sequence[GenerationJob], stop: Callable[[], bool], wire: _Wire) -> list[Completion]:
        name, context = await self._meet(wire)
        longest = max(len(job.prompt_ids) + job.sampling.max_tokens for job in jobs)
        wire.need(
            longest <= context,
            f"prompt and answer take {longest} tokens of its {context}",
            "raise --max-model-len, or ask for less",
        )
        gate = asyncio.Semaphore(max(1, self.together))

        async def one(index: int, job: GenerationJob) -> Completion:
            async with gate:
                return await self._ask(wire, name, job, index)

        tasks = [asyncio.create_task(one(index, job)) for index, job in enumerate(jobs)]
        waiting = set(tasks)
        try:
            while waiting and not stop():
                done, waiting = await asyncio.wait(waiting, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks if not task.cancelled()]

    async def _ask(self, wire: _Wire, name: str, job: GenerationJob, index: int = 0) -> Completion:
        room = SMALL + PER_TOKEN * (len(job.prompt_ids) + job.sampling.max_tokens)
        choice = _choice(wire, await wire.ask("POST", COMPLETIONS, self._body(name, job), room), name, job)
        ids = self._ended(wire, choice, job.sampling.max_tokens)
        beside = choice.get("logprobs")
        wrong = [token for token in ids if not 0 <= token < self.tokens]
        wire.need(
            not wrong, f"it drew token {wrong[:1]}, and the tokenizer has {self.tokens}", "serve the student itself"
        )
        beside = beside if isinstance(beside, dict) else {}
        found, named = (
            beside[key] if isinstance(beside.get(key), list) else [] for key in ("token_logprobs", "tokens")
        )
        wire.need(
            len(found) == len(ids),
            f"{len(found)} log-probabilities came with {len(ids)} tokens",
            "take out what drops logprobs",
        )
        wire.need(
            named == [f"token_id:{token}" for token in ids], "its log-probabilities are of other tokens", "update vLLM"
        )
        # -9999 is vLLM's minus infinity
        fine = all(isinstance(value, float | int) and -9999.0 < value < 1e-3 for value in found)
        wire.need(fine, "its log-probabilities are none", "start it with --logprobs-mode raw_logprobs")
        log_prob = [min(0.0, float(value)) for value in found]
        return Completion(index, ids, log_prob, log_prob[:] if job.sampling.temperature else [0.0] * len(ids), len(ids))

    def _body(self, name: str, job: GenerationJob) -> dict[str, Any]:
        how = job.sampling
        padding = range(self.tokens, self.rows)
        bias = {str(token): NEVER for token in padding} if 0 < len(padding) <= MOST_PADDING else None
        return NEUTRAL | {
            "model": name,
            "prompt": list(job.prompt_ids),
            "max_tokens": how.max_tokens,
            "n": 1,
            "stream": False,
            "logit_bias": bias,
            "temperature": how.temperature,
            "top_p": how.top_p if how.temperature else 1.0,
            "seed": job.seed % 2**63,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": sorted(self.eos_ids),
        }

    def _ended(self, wire: _Wire, choice: Mapping[str, Any], most: int) -> list[int]:
        """The ids, with the end token that the model wrote at their end: vLLM leaves it in; where it is left out, it is
        put back."""
        ids = list(choice["token_ids"])
        finish = choice.get("finish_reason")
        reason = choice.get("stop_reason")
        wire.need(
            finish in ("stop", "length"),
            f"it gave up an answer ({_shown(finish)})",
            "let no other program pause it; see its log",
        )
        if finish == "stop" and (not ids or ids[-1] not in self.eos_ids):
            ends = self.eos_ids if reason is None else self.eos_ids & {reason} if type(reason) is int else frozenset()
            wire.need(
                len(ends) == 1,
                f"an answer stopped for {_shown(reason)}, no end token of the student",
                "serve the student itself",
            )
            ids += ends
        wire.need(
            finish == "length" or reason in (None, ids[-1]),
            f"an answer stopped for {_shown(reason)}, not its end",
            "update vLLM",
        )
        wire.need(
            finish == "stop" or len(ids) >= most,
            f"it cut an answer at {len(ids)} of {most} tokens",
            "raise --max-model-len",
        )
        past = len(ids) > most or any(token in self.eos_ids for token in ids[:-1])
        wire.need(
            not past, "it wrote on past the end token, or past max_tokens", "update vLLM (stop_token_ids, max_tokens)"
        )
        return ids

    async def _sync(self, net: PreTrainedModel, name: str, wire: _Wire) -> None:
        path = f"{(self.folder_there or str(self.folder)).rstrip('/')}/{name}"
        paused = await wire.ask("POST", "/pause?mode=wait", may_refuse=True) is not NO
        told = await wire.ask(
            "POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, may_refuse=True
        )
        if told is not NO:
            await wire.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        if paused:  # after any other failure it stays so: its weights may be mixed
            await wire.ask("POST", "/resume")
        wire.need(told is not NO, "its weights can't be reloaded", f"it must be a recent vLLM, started as {START}")
        if self._prompt is not None:
            job = GenerationJob(self._prompt, Sampling(1.0, 1.0, 2 * PROBE_TOKENS), 1)
            _compare(wire, net, [(job, await self._ask(wire, (await self._meet(wire))[0], job))])

    async def _meet(self, wire: _Wire) -> tuple[str, int]:
        """The name and context of the served model, asked for once."""
        if self._met is None:
            answer = await wire.ask("GET", "/v1/models")
            cards = answer.get("data") if isinstance(answer, dict) else None
            cards = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
            known = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
            bases = [name for name, card in known.items() if card.get("parent") is None]  # an adapter names its parent
            name = bases[0] if self.model is None and len(bases) == 1 else self.model or ""
            wire.need(
                name in known,
                f"it serves {_shown(list(known))}",
                "name the student there, or start it with --served-model-name",
            )
            context = known[name].get("max_model_len")
            self._met = name, context if type(context) is int else 2**31
        return self._met

    async def _probe(self, net: PreTrainedModel, prompt: tuple[int, ...], wire: _Wire) -> Probed:
        name, context = await self._meet(wire)
        version = await wire.ask("GET", "/version", may_refuse=True)
        body = self._body(name, GenerationJob(prompt, Sampling(0.0, 1.0, 1), 0))
        # vLLM refuses what its head lacks
        await wire.ask("POST", COMPLETIONS, body | {"logit_bias": {str(self.rows - 1): 0.0}})
        beyond = await wire.ask("POST", COMPLETIONS, body | {"logit_bias": {str(self.rows): 0.0}}, may_refuse=True)
        wire.need(
            beyond is NO, f"its vocabulary has more than the student's {self.rows} tokens", "serve the student itself"
        )
        greedy = GenerationJob(prompt, Sampling(0.0, 1.0, PROBE_TOKENS), 0)
        top = await self._ask(wire, name, greedy)
        draws = [GenerationJob(prompt, Sampling(1.0, 1.0, PROBE_TOKENS), seed + 1) for seed in range(PROBE_SEEDS)]
        drawn = [await self._ask(wire, name, job) for job in (*draws, draws[0])]
        wire.need(
            drawn[0].ids == drawn[-1].ids, "one seed gave two texts", "update vLLM, or take out what drops `seed`"
        )
        fixed = sum(top.log_prob) < FLAT and all(text.ids == top.ids for text in drawn)
        wire.need(not fixed, "it draws the same text for every seed", "take out what drops `seed` or `temperature`")
        off = _compare(wire, net, [(greedy, top), *zip(draws, drawn, strict=False)])
        hot = GenerationJob(prompt, Sampling(8.0, 1.0, 1), 1)
        choice = _choice(wire, await wire.ask("POST", COMPLETIONS, self._body(name, hot) | {"logprobs": 1}), name, hot)
        mode: Literal["raw", "processed", "unknown"] = "unknown"
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):  # whatever else may stand there
            likeliest = max(choice["logprobs"]["top_logprobs"][0].values())
            mode = "raw" if abs(likeliest - top.log_prob[0]) <= NATS / 3 else "processed"
        return Probed(
            name, context, _shown(version.get("version")) if isinstance(version, dict) else "unknown", mode, off
        )


class _Wire:
    """One call's conversation with the server: bounded in time and size, tried again while the server is busy or out of
    reach."""

    def __init__(self, base: str, patience: Patience) -> None:
        self.base = base
        self.patience = patience
        self.end = time.monotonic() + patience.budget
        timeout = httpx2.Timeout(None, connect=patience.connect)
        limits = httpx2.Limits(max_connections=None)
        # No proxy of the environment and no redirect: the key goes to the named host alone.
        self.client = httpx2.AsyncClient(
            headers=_headers(), verify=certificates(), timeout=timeout, limits=limits, trust_env=False
        )

    def odd(self, what: str, remedy: str) -> UserError:
        return UserError(f"the vLLM server {self.base}: {what}; {remedy}")

    def need(self, fine: bool, what: str, remedy: str) -> None:
        if not fine:
            raise self.odd(what, remedy)

    async def ask(self, method: str, path: str, body: Any = None, most: int = SMALL, may_refuse: bool = False) -> Any:
        """The answer's JSON, None where it has no body, or NO."""
        why = ""
        wait = 0.0
        for attempt in range(self.patience.tries):
            fits = wait < self.end - time.monotonic()
            self.need(
                fits,
                f"{path} takes longer than the {self.patience.budget:g} s it may{why}",
                "ask for less at once, see its log",
            )
            await asyncio.sleep(wait)
            wait = min(self.patience.longest_pause, self.patience.pause * 2**attempt) * random.uniform(0.7, 1.3)  # noqa: S311 (a pause)
            try:
                async with asyncio.timeout(min(self.patience.answer, self.end - time.monotonic())):
                    status, asked, raw = await self._once(method, path, body, most)
            except TimeoutError:
                raise self.odd(
                    f"no answer to {path} in time", "see its log; lower max_tokens or the requests at once"
                ) from None
            except httpx2.TransportError as error:
                why = f" ({type(error).__name__})"
                continue
            if status not in BUSY:
                return NO if may_refuse and status in REFUSED else self._content(path, status, raw)
            why, wait = f" (status {status})", max(wait, asked)
        raise self.odd(
            f"{path} could not be asked for, {self.patience.tries} times{why}", f"does it run there? {START}"
        )

    async def _once(self, method: str, path: str, body: Any, most: int) -> tuple[int, float, bytes]:
        raw = bytearray()
        async with self.client.stream(method, self.base + path, json=body) as response:
            async for part in response.aiter_raw():
                raw += part
                self.need(len(raw) <= most, f"an answer to {path} has more than {most} bytes", "is it a vLLM server?")
            return response.status_code, _seconds(response.headers.get("retry-after", "")), bytes(raw)

    def _content(self, path: str, status: int, raw: bytes) -> Any:
        remedy = (
            f"start it as {START}"
            if path.startswith("/v1")
            else f"see its log; it must be a recent vLLM, started as {START}"
        )
        if status in (401, 403):
            remedy = f"set {KEY} to its key"
        elif 300 <= status < 400:
            remedy = "redirects are not followed: give the address that it leads to"
        found = re.search(rb'"(?:message|detail)": ?"((?:[^"\\]|\\.)*)', raw)  # as vLLM and FastAPI write what is wrong
        said = (found[1] if found else raw).decode("utf-8", "replace")
        self.need(200 <= status < 300, f"{path} was answered with status {status}: {_shown(said)}", remedy)
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(raw) if raw.strip() else None
        raise self.odd(f"{path} was answered with no JSON", "is it a vLLM server?")


def _choice(wire: _Wire, answer: Any, name: str, job: GenerationJob) -> dict[str, Any]:
    """The one choice of an answer to this prompt by this model."""
    answer = answer if isinstance(answer, dict) else {}
    wire.need(
        answer.get("model") == name,
        f"asked for {_shown(name)}, it answered as {_shown(answer.get('model'))}",
        "check its address",
    )
    choices = answer["choices"] if isinstance(answer.get("choices"), list) else []
    wire.need(
        len(choices) == 1 and isinstance(choices[0], dict),
        f"it sent {len(choices)} answers for one",
        "take out what changes them",
    )
    choice: dict[str, Any] = choices[0]
    for key in ("token_ids", "prompt_token_ids"):
        ids = choice.get(key)
        fine = isinstance(ids, list) and all(type(token) is int for token in ids)
        wire.need(fine, f"it sends no {key}", "it must be vLLM 0.10.2 or later; take out what drops return_token_ids")
    wire.need(
        choice["prompt_token_ids"] == list(job.prompt_ids),
        "it answered another prompt",
        "take out what changes or cuts prompts",
    )
    return choice


def _compare(wire: _Wire, net: PreTrainedModel, texts: Sequence[tuple[GenerationJob, Completion]]) -> float:
    """Mean difference between the server's log-probabilities and the student's, in nats; greedy tokens must be likely
    ones."""
    training = net.training
    net.eval()
    found = [_off(net, job.prompt_ids, text) for job, text in texts]
    net.train(training)
    off = sum(off for off, _ in found) / len(found)
    worst = max([off, *(gap for (job, _), (_, gap) in zip(texts, found, strict=True) if job.sampling.temperature == 0)])
    wire.need(
        worst <= NATS,
        f"its log-probabilities are {worst:.2g} nats off the student's",
        "serve the student, unquantised; update vLLM",
    )
    return off


@torch.inference_mode()
def _off(net: PreTrainedModel, prompt_ids: Sequence[int], text: Completion) -> tuple[float, float]:
    """How far the server's log-probabilities are from the student's, and the drawn tokens behind its likeliest: means,
    in nats."""
    tokens = torch.tensor([[*prompt_ids, *text.ids]], device=net.device)
    logits_NV = net(input_ids=tokens[:, :-1], logits_to_keep=len(text.ids)).logits[0].float()
    own_N, best_N = (log_prob_of(logits_NV, ids_N) for ids_N in (tokens[0, -len(text.ids) :], logits_NV.argmax(-1)))
    return float((own_N.cpu() - torch.tensor(text.log_prob)).abs().mean()), float((best_N - own_N).mean())


def save(net: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> None:
    """Write the student for a server to read: a plain Hugging Face folder, adapters folded into copies of the
    weights."""
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in net.state_dict().items() if ".lora_" not in name
    }
    for name, layer in net.named_modules():
        if hasattr(layer, "get_delta_weight") and not layer.merged:
            adapted = sum(layer.get_delta_weight(adapter).detach() for adapter in layer.active_adapters)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + adapted
    with new_directory(path) as folder, quiet(), full_disk_as_os_error():
        net.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY, "")
    if not re.fullmatch(r"[!#-\[\]-~]*", key):
        raise UserError(f"{KEY} holds what no header can carry: set it anew, without spaces, quotes or line breaks")
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _seconds(text: str) -> float:
    """What a Retry-After header asks for: seconds, or a date."""
    with contextlib.suppress(ValueError, OverflowError):
        return float(text) if text.isdecimal() else parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0


def _shown(value: object) -> str:
    """What the server sent, fit for a message, and never the key."""
    text = str(value).replace(os.environ.get(KEY) or "\n", " ")
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]
