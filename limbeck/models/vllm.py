"""The student's text from a vLLM server that runs beside the training: `GenerationJob` in, `Completion` out, as in
`generate.write`. `vllm_protocol.py` has the requests and the checks of the answers; this file has the weights.

`sync` writes safetensors into a folder that the server sees, too, then calls `/pause?mode=wait` (skipped where it is
unknown), `/collective_rpc` (`reload_weights` with `weights_path`), `/reset_prefix_cache` (keys and values of the old
weights), `/update_weight_version` (the folder's name) and `/resume`. `holds_them` asks `/weight_info` for that name: a
server that was started again in between, or got weights from elsewhere, is found out. The server needs
VLLM_SERVER_DEV_MODE=1, which opens `/collective_rpc` to whoever reaches its port, API key or not.

Tested against vLLM 0.32 on a CPU (tests/engines), not on a GPU. Its `/start_weight_update`, `/update_weights` and
`/finish_weight_update` take weights without a folder, but by no way that is open to us. By its source, its back ends
`nccl`, `sparse_nccl` and `nccl_m2n` need CUDA devices on both sides, `ipc` takes pickled handles to CUDA memory,
`sharded_rdt` needs Ray and NIXL, `modelexpress` a service of its own; none was tried. Without a back end named at its
start the server answers 500, as was seen. Its `/weight_checker` is of no use on a CPU, where the weights are packed and
the checksums of most are those of empty tensors.
Which release first has `weights_path` (0.14 read old weights again, vllm issue 32718), and which models survive it
(some Mamba hybrids don't, pull request 48284), is not known: so the server's log-probabilities are compared with the
student's after every reload, by a bound that the first look sets.
On a CPU, vLLM 0.32 packs the head's matrix, and where it is the embedding's, too, a folder without it is read but the
head is not packed again: the server goes on with the head that it was started with. So what is sent names a head.
Not covered: two models that write one text, several servers behind one address, speculative decoding, an external KV
cache, weights sharded over ranks. N tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.folder import quiet
from limbeck.models.generate import Completion, GenerationJob
from limbeck.models.http import Call, Connection, Endpoint, as_dict, check_address
from limbeck.models.quantise import QuantisedLinear
from limbeck.models.sample import log_prob_of
from limbeck.models.vllm_protocol import (
    COMPLETIONS,
    GLANCE,
    KEY_VARIABLE,
    PATIENT,
    REFUSED,
    START,
    Patience,
    ServedModel,
    StudentTokens,
    VllmSession,
    completion_body,
)
from limbeck.storage.files import full_disk_as_os_error, new_directory, remove_directory, sweep, write_json
from limbeck.types import Sampling, UserError, printable

# mean difference from the student's log-probabilities: a guess that leaves room for bfloat16, not for other weights
NATS = 0.3
# later it may be so many times what it was at first, and in float32 at least so much: a few tokens say it with noise
TIMES, LEAST = 8.0, 2e-3
PROBE_TOKENS = 8
PROBE_SEEDS = 8
FLAT = -2.0  # so many samples of a text with probability exp(-2): a chance of exp(-16)
HOT = 2.0  # the highest temperature that vLLM 0.32 takes
POLL_SECONDS = 0.2
RESET = "/reset_prefix_cache?reset_running_requests=true"
RELOAD = "/collective_rpc"
T = TypeVar("T")


@dataclass(frozen=True)
class ProbeResult:
    """What the server turned out to be. `difference` is the mean one from the student's own log-probabilities, in
    nats."""

    model: str
    context: int
    version: str
    log_probs: Literal["raw", "processed", "unknown"]
    difference: float


@dataclass
class VllmWriter:
    """The student as it writes on a vLLM server, which holds this one student: no other run may write or sync through
    it.

    Whatever goes wrong with the server is a `UserError`, with a remedy. The key is read from the environment and stored
    nowhere.

    Args:
        url: the server's address, with or without `/v1`.
        folder: for this writer alone, and visible to the server; older weights in it are removed.
        tokens: what the student can write.
        model: the name it is served under; needed where there are several.
        server_folder: the server's name for `folder`, where that is another.
        concurrency: how many requests are under way at once.
        sleep: waits between tries.
    """

    url: str
    folder: Path
    tokens: StudentTokens
    model: str | None = None
    server_folder: str | None = None
    concurrency: int = 64
    patience: Patience = PATIENT
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _served: ServedModel | None = field(default=None, init=False, repr=False)
    _prompt: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    _version: str | None = field(default=None, init=False, repr=False)
    _bound: float = field(default=NATS, init=False, repr=False)

    def __post_init__(self) -> None:
        url = check_address(self.url, "the vLLM server's address", "http://localhost:8000", KEY_VARIABLE)
        self.url = url.removesuffix("/v1").rstrip("/")
        self.folder = self.folder.resolve()

    def write(self, jobs: Sequence[GenerationJob], stop: Callable[[], bool] = lambda: False) -> list[Completion]:
        """One answer per job, in their order, with log-probabilities. Once `stop` is true, unfinished ones are left
        out."""
        if any(
            sampling.temperature != 0 and (sampling.temperature, sampling.top_p) != (1.0, 1.0)
            for sampling in {job.sampling for job in jobs}
        ):
            raise UserError(
                "through vLLM the student writes with temperature 1 and top_p 1, or with temperature 0: for other"
                " settings the server does not give both log-probabilities; set those, or let it write in process"
            )
        if any(job.second_prompt_ids is not None for job in jobs):
            raise UserError("two models write one text in process only: leave out the vLLM server, or rollout.joint")
        return self._run(partial(self._write, jobs, stop)) if jobs else []

    def sync(self, net: PreTrainedModel, tokenizer: Tokenizer) -> None:
        """Give the server the student's present weights; after a `probe`, check that it writes with them."""
        # a new name each time: a shared disk may have the old one cached
        path = self.folder / f"weights-{uuid.uuid4().hex[:12]}"
        save(net, tokenizer, path)
        self._run(partial(self._sync, net, path.name))
        sweep(self.folder)
        for old in set(self.folder.glob("weights-*")) - {path}:
            remove_directory(old)

    def holds_them(self) -> bool:
        """Whether the server still has the weights of the last `sync`; true where it keeps no account (older ones)."""
        return self._version is None or self._run(self._weight_version) == self._version

    def probe(self, net: PreTrainedModel, prompt_ids: Sequence[int]) -> ProbeResult:
        """Refuse a server of another model or vocabulary, or one that drops ids, log-probabilities, seeds or
        temperatures.

        It must have the weights of `net` already; `prompt_ids` is any prompt of the training.
        """
        self._prompt = tuple(prompt_ids)
        return self._run(partial(self._probe, net, self._prompt))

    def _run(self, work: Callable[[VllmSession], Awaitable[T]]) -> T:
        async def with_session(connection: Connection) -> T:
            return await work(VllmSession(connection, self.tokens, self.patience, self.sleep))

        return Endpoint(self.url, KEY_VARIABLE, self.patience.answer, self.patience.connect).run(with_session)

    async def _served_model(self, session: VllmSession) -> ServedModel:
        """The served model, requested once."""
        if self._served is None:
            self._served = await session.served_model(self.model)
        return self._served

    async def _write(
        self, jobs: Sequence[GenerationJob], stop: Callable[[], bool], session: VllmSession
    ) -> list[Completion]:
        served = await self._served_model(session)
        longest = max(len(job.prompt_ids) + job.sampling.max_tokens for job in jobs)
        session.require(
            longest <= served.max_length,
            f"prompt and answer take {longest} tokens of its {served.max_length}",
            "raise --max-model-len, or ask for less",
        )
        slots = asyncio.Semaphore(max(1, self.concurrency))

        async def complete(index: int, job: GenerationJob) -> Completion:
            async with slots:
                return await session.complete(served.name, job, index)

        tasks = [asyncio.create_task(complete(index, job)) for index, job in enumerate(jobs)]
        waiting = set(tasks)
        try:
            while waiting and not stop():
                done, waiting = await asyncio.wait(waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks if not task.cancelled()]

    async def _sync(self, net: PreTrainedModel, name: str, session: VllmSession) -> None:
        path = f"{(self.server_folder or str(self.folder)).rstrip('/')}/{name}"
        reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        is_paused = await session.ask("POST", "/pause?mode=wait", may_refuse=True) is not REFUSED
        is_reloaded = await session.ask("POST", RELOAD, reload, may_refuse=True) is not REFUSED
        if is_reloaded:
            reset = as_dict(await session.ask("POST", RESET))
            session.require(
                reset.get("success") is not False,
                "it did not drop what it computed with the old weights",
                "let no other program use it",
            )
            named = await session.ask("POST", "/update_weight_version", {"new_version": name}, may_refuse=True)
            self._version = None if named is REFUSED else name
        if is_paused:  # after any other failure it stays so: its weights may be mixed
            await session.ask("POST", "/resume")
        session.require(is_reloaded, "its weights can't be reloaded", f"it must be a recent vLLM, started as {START}")
        if self._prompt is not None:
            served = await self._served_model(session)
            job = GenerationJob(self._prompt, Sampling(1.0, 1.0, 2 * PROBE_TOKENS), 1)
            texts = [(job, await session.complete(served.name, job))]
            _compare(session, net, texts, self._bound)

    async def _weight_version(self, session: VllmSession) -> Any:
        return as_dict(await session.ask("GET", "/weight_info")).get("weight_version")

    async def _probe(self, net: PreTrainedModel, prompt: tuple[int, ...], session: VllmSession) -> ProbeResult:
        served = await self._served_model(session)
        version = as_dict(await session.ask("GET", "/version", may_refuse=True)).get("version", "unknown")
        await self._check_head(served.name, prompt, session)
        greedy = GenerationJob(prompt, Sampling(0.0, 1.0, PROBE_TOKENS), 0)
        likeliest = await session.complete(served.name, greedy)
        jobs = [GenerationJob(prompt, Sampling(1.0, 1.0, PROBE_TOKENS), seed + 1) for seed in range(PROBE_SEEDS)]
        samples = [await session.complete(served.name, job) for job in (*jobs, jobs[0])]
        session.require(
            samples[0].ids == samples[-1].ids, "one seed gave two texts", "update vLLM, or remove what drops `seed`"
        )
        is_fixed = sum(likeliest.log_prob) < FLAT and all(text.ids == likeliest.ids for text in samples)
        session.require(
            not is_fixed, "it writes the same text for every seed", "remove what drops `seed` or `temperature`"
        )
        texts = [(greedy, likeliest), *zip(jobs, samples, strict=False)]
        difference = _compare(session, net, texts, NATS)
        self._bound = min(NATS, max(LEAST, TIMES * difference))
        mode = await self._log_prob_mode(served.name, prompt, likeliest.log_prob[0], session)
        return ProbeResult(served.name, served.max_length, printable(version), mode, difference=difference)

    async def _check_head(self, name: str, prompt: tuple[int, ...], session: VllmSession) -> None:
        """Refuse a head of another size: vLLM refuses a bias on tokens that its head lacks."""
        rows = self.tokens.rows
        body = completion_body(name, GenerationJob(prompt, Sampling(0.0, 1.0, 1), 0), self.tokens)
        await session.ask("POST", COMPLETIONS, body | {"logit_bias": {str(rows - 1): 0.0}})
        beyond = await session.ask("POST", COMPLETIONS, body | {"logit_bias": {str(rows): 0.0}}, may_refuse=True)
        session.require(
            beyond is REFUSED, f"its vocabulary has more than the student's {rows} tokens", "serve the student itself"
        )

    async def _log_prob_mode(
        self, name: str, prompt: tuple[int, ...], greedy_log_prob: float, session: VllmSession
    ) -> Literal["raw", "processed", "unknown"]:
        """Whether log-probabilities are those before or after the temperature."""
        hot = GenerationJob(prompt, Sampling(HOT, 1.0, 1), 1)
        answer = await session.ask("POST", COMPLETIONS, completion_body(name, hot, self.tokens) | {"logprobs": 1})
        choice = session.choice(answer, name, hot)
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):  # the shape is not checked
            highest = max(choice["logprobs"]["top_logprobs"][0].values())
            return "raw" if abs(highest - greedy_log_prob) <= NATS / 3 else "processed"
        return "unknown"


def _compare(
    session: VllmSession,
    net: PreTrainedModel,
    texts: Sequence[tuple[GenerationJob, Completion]],
    bound: float,
) -> float:
    """Mean difference between the server's log-probabilities and the student's, in nats; greedy tokens must be likely
    ones."""
    training = net.training
    net.eval()
    pairs = [_differences(net, job.prompt_ids, text) for job, text in texts]
    net.train(training)
    mean = sum(difference for difference, _ in pairs) / len(pairs)
    gaps = [gap for (job, _), (_, gap) in zip(texts, pairs, strict=True) if job.sampling.temperature == 0]
    worst = max([mean, *gaps])
    session.require(
        mean <= bound and worst <= NATS,
        f"its log-probabilities are {worst:.2g} nats off the student's",
        "serve the student, unquantised; update vLLM",
    )
    return mean


@torch.inference_mode()
def _differences(net: PreTrainedModel, prompt_ids: Sequence[int], text: Completion) -> tuple[float, float]:
    """(server's log-probabilities from the student's, sampled tokens behind the student's likeliest): mean distances in
    nats."""
    tokens = torch.tensor([[*prompt_ids, *text.ids]], device=net.device)
    logits_NV = net(input_ids=tokens[:, :-1], logits_to_keep=len(text.ids)).logits[0].float()
    own_N, best_N = (log_prob_of(logits_NV, ids_N) for ids_N in (tokens[0, -len(text.ids) :], logits_NV.argmax(-1)))
    return float((own_N.cpu() - torch.tensor(text.log_prob)).abs().mean()), float((best_N - own_N).mean())


def look(url: str, model: str | None) -> str:
    """The name of the model that this server would write as; asks for no text and gives it no weights.

    Raises:
        UserError: it does not answer, wants another key, serves no such model, or takes no weights.
    """
    address = check_address(url, "the vLLM server's address", "http://localhost:8000", KEY_VARIABLE)

    async def with_session(connection: Connection) -> str:
        session = VllmSession(connection, StudentTokens(frozenset(), 0), GLANCE, asyncio.sleep)
        name = (await session.served_model(model)).name
        reply = await connection.send(Call("POST", RELOAD, {}))  # 400 where it is known, as no method is named
        session.require(reply.status not in (404, 405), "its weights can't be reloaded", f"start it as {START}")
        return name

    endpoint = Endpoint(address.removesuffix("/v1").rstrip("/"), KEY_VARIABLE, GLANCE.answer, GLANCE.connect)
    return endpoint.run(with_session)


def save(net: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> None:
    """Write the student for a server to read: a plain Hugging Face folder with a head of its own, adapters folded into
    copies of the weights, quantised weights as the numbers that they stand for."""
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in net.state_dict().items() if ".lora_" not in name
    }
    for name, layer in net.named_modules():
        if isinstance(layer, QuantisedLinear):
            plain = name.removesuffix(".base_layer")
            weights[f"{plain}.weight"] = layer.dequantised(torch.float32)
            del weights[f"{plain}.scale"]
    for name, layer in net.named_modules():
        if hasattr(layer, "get_delta_weight") and not layer.merged:
            adapted = sum(layer.get_delta_weight(adapter).detach() for adapter in layer.active_adapters)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + adapted
    if net.config.get_text_config().tie_word_embeddings:
        embedding, head = (_name_of(net, part) for part in (net.get_input_embeddings(), net.get_output_embeddings()))
        weights[f"{head}.weight"] = weights[f"{embedding}.weight"].detach().clone()
    with new_directory(path) as folder, quiet(), full_disk_as_os_error():
        net.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        write_json(config, json.loads(config.read_text()) | {"tie_word_embeddings": False})


def _name_of(net: PreTrainedModel, module: Any) -> str:
    return next(str(name) for name, part in net.named_modules() if part is module)
