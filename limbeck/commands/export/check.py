"""Whether an exported file is the student: llama.cpp opens it, and is asked what the student was asked.

The student answers a few prompts greedily. At every token of its answers the file's next-token distribution is compared
with the student's: KL(student || file) over the file's likeliest tokens and one bucket for the rest, which is at most
the KL over the whole vocabulary. The server runs in a process of its own, so that a file that it can't take ends
nothing else.

Shapes: N tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from limbeck.config.server import Served
from limbeck.models.api import ApiTeacher
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.http import Call, as_dict
from limbeck.models.model import Model
from limbeck.models.score import TEST_TEXT, NamedTokens, ServerScorer
from limbeck.types import Message, Request, Sampling, UserError

KEY, OUR_KEY = "LIMBECK_API_KEY", "LIMBECK_EXPORT_KEY"
NAMED = 64  # tokens that the server names at a position
MAX_TOKENS = 24
LEAST = 1e-9  # of a bucket's probability: the rest of two distributions that both name nearly everything
INSTALL = "not checked against the student: pip install 'limbeck[serve]' and export it again to have it checked"


@dataclass(frozen=True)
class Asked:
    """A prompt, the student's greedy answer, and the student's log-probabilities at the answer's tokens [N, V]."""

    messages: tuple[Message, ...]
    prompt_ids: list[int]
    answer_ids: list[int]
    text: str
    log_p_NV: Tensor


def can_check() -> bool:
    return find_spec("xllamacpp") is not None


def ask_student(model: Model, prompts: Sequence[str]) -> list[Asked]:
    """The student's greedy answers, with its distributions."""
    chats: list[tuple[Message, ...]] = [({"role": "user", "content": prompt},) for prompt in prompts]
    ids = [model.prompt_ids(chat)[-model.max_length // 2 :] for chat in chats]
    sampling = Sampling(0.0, 1.0, min(MAX_TOKENS, model.max_length // 4))
    jobs = [GenerationJob(prompt, sampling, 0) for prompt in ids]
    answers = dict(generate(model.net, jobs, model.eos_ids, vocab_size=model.vocab_size))
    asked = []
    for number, (chat, prompt) in enumerate(zip(chats, ids, strict=True)):
        answer = [int(token) for token in answers[number]]
        log_p_NV = log_probs(model, prompt, answer)
        asked.append(Asked(chat, prompt, answer, model.decode(answer).strip(), log_p_NV))
    return asked


@torch.inference_mode()
def log_probs(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The model's log-probabilities [N, V] at the tokens of an answer."""
    ids = torch.tensor([[*prompt, *answer]], device=model.net.device)
    logits: Tensor = model.net(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu().double().log_softmax(-1)


def compare_file(model: Model, file: Path, asked: Sequence[Asked], most_kl: float) -> dict[str, Any]:
    """Open a GGUF file with llama.cpp and compare it with the student.

    Returns:
        The numbers of the comparison, by name.

    Raises:
        UserError: llama.cpp can't open it, it reads text as other tokens, or its distributions are further from the
            student's than `most_kl` (nats a token).
    """
    longest = max(len(one.prompt_ids) for one in asked) + 2 * MAX_TOKENS
    with _serving(file, context=max(512, longest)) as settings:
        api = ApiTeacher(settings)
        _check_tokens(api, model, asked)
        scorer = ServerScorer(api, NAMED, model.tokenizer)
        scorer.vocab_size = asked[0].log_p_NV.shape[-1]  # rows of the head without a token have a probability, too
        differs = _framing(scorer, model, asked)
        scores = scorer.score([(one.prompt_ids, one.answer_ids) for one in asked])
        same_answers = _same_answers(api, asked)
    found = measured(asked, [_from_server(one, named) for one, named in zip(asked, scores, strict=True)])
    found |= {"same_greedy_answers": same_answers, "same_prompt_tokens": not differs, "most_kl_nats_per_token": most_kl}
    if differs:
        found["prompt_tokens_differ"] = differs
    check_kl(found, most_kl)
    return found


def check_kl(found: Mapping[str, Any], most_kl: float) -> None:
    """Refuse what is no longer the student.

    Raises:
        UserError: it is further from it than `most_kl`.
    """
    if not found["kl_nats_per_token"] <= most_kl:
        raise UserError(
            f"the export is not the student: {found['kl_nats_per_token']:.3g} nats a token from it over"
            f" {found['tokens']} tokens, where at most {most_kl:g} are expected of this type; nothing was written. Take"
            " a --type with more bits; if f16 fails as well, this family is not exported rightly: please report it"
        )


def measured(asked: Sequence[Asked], each: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The comparison's numbers, from the KL and the agreement of the first choice at every token of every answer."""
    kl_N, same_N = (torch.cat(column) for column in zip(*each, strict=True))
    return {
        "prompts": len(asked),
        "tokens": len(kl_N),
        "kl_nats_per_token": round(float(kl_N.mean()), 6),
        "largest_kl_nats": round(float(kl_N.max()), 6),
        "same_first_choice": round(float(same_N.double().mean()), 4),
    }


def _from_server(one: Asked, named: Sequence[NamedTokens]) -> tuple[Tensor, Tensor]:
    """KL(student || file) over the named tokens and a bucket, and whether the first choices agree, at every token."""
    kl, same = [], []
    for log_p_V, (ids, logs, _) in zip(one.log_p_NV, named, strict=True):
        log_p = log_p_V[torch.tensor(ids)]
        log_q = torch.tensor(logs, dtype=torch.float64)
        rest_p, rest_q = ((1 - log.exp().sum()).clamp(min=LEAST) for log in (log_p, log_q))
        kl.append((log_p.exp() * (log_p - log_q)).sum() + rest_p * (rest_p / rest_q).log())
        same.append(log_p_V.argmax() == ids[0])
    return torch.stack(kl), torch.stack(same)


def _check_tokens(api: ApiTeacher, model: Model, asked: Sequence[Asked]) -> None:
    for text in (TEST_TEXT, *(one.messages[0]["content"] for one in asked), *(one.text for one in asked)):
        body = {"content": text, "add_special": False, "parse_special": True}
        theirs, ours = _tokenized(api, Call("POST", "/tokenize", body, at_root=True)), model.raw_ids(text)
        if theirs != ours:
            raise UserError(
                f"the export reads text otherwise than the student: {text[:40]!r} is {str(theirs)[:80]} there and"
                f" {str(ours)[:80]} here, so nothing was written; serve the folder with transformers or vLLM, or"
                " convert it with llama.cpp's own convert_hf_to_gguf.py"
            )


def _tokenized(api: ApiTeacher, call: Call) -> Any:
    return as_dict(api.endpoint.run(lambda connection: connection.send(call)).json()).get("tokens")


def _framing(scorer: ServerScorer, model: Model, asked: Sequence[Asked]) -> str:
    """How llama.cpp's chat endpoint frames a prompt otherwise than the student's template; empty where it doesn't."""
    differs = ""
    try:
        scorer.probe()
        for one in asked:
            theirs = scorer.framed(one.messages)
            if theirs != one.prompt_ids:
                there, here = (repr(model.tokenizer.decode(ids)[:120]) for ids in (theirs, one.prompt_ids))
                return f"{there} there, {here} in the student's template"
    except UserError as error:
        differs = str(error)
    return differs


def _same_answers(api: ApiTeacher, asked: Sequence[Asked]) -> int:
    """How many of the chat endpoint's greedy answers are the student's, word for word."""
    requests = [
        Request(api.identity, one.messages, Sampling(0.0, 1.0, max(1, len(one.answer_ids))), seed)
        for seed, one in enumerate(asked)
    ]
    texts = {request.key: answer.text.strip() for request, answer in api.answers(requests)}
    return sum(texts.get(request.key) == one.text for request, one in zip(requests, asked, strict=True))


@contextlib.contextmanager
def _serving(file: Path, context: int) -> Iterator[Served]:
    """The packaged llama.cpp server with this file, in a process of its own that ends with the block. It has one slot,
    so that each token of an answer finds what stands before it in the cache."""
    key = secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "limbeck", "serve", str(file), "--port", "0", "--context", str(context)]
    process = subprocess.Popen(  # noqa: S603 (fixed arguments)
        [*command, "--slots", "1"],
        env=os.environ | {KEY: key},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.environ[OUR_KEY] = key
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line.startswith("teacher.server:"):
            process.kill()
            reason = [line for line in process.stderr.read().splitlines() if "error" in line.lower()][-1:]
            raise UserError(f"llama.cpp can't open the export: {(reason or ['it gave no reason'])[0].strip()[:300]}")
        place = yaml.safe_load(line)["teacher.server"]
        yield Served(url=place["url"], name=place["name"], kind="llama.cpp", key=OUR_KEY, concurrency=1)
    finally:
        os.environ.pop(OUR_KEY, None)
        process.kill()
        process.communicate()
