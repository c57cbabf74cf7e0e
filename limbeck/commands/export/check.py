"""Whether an exported file is the student: llama.cpp opens it, and is asked what the student was asked.

llama.cpp answers a few prompts greedily. At every token of its answers the file's next-token distribution is compared
with the student's: KL(student || file) over the file's likeliest tokens and one bucket for the rest, which is at most
the KL over the whole vocabulary. An answer is the student's own greedy one if each of its tokens is the student's first
choice. The server runs in a process of its own, so that a file that it can't take ends nothing else.

Shapes: N tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
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
MOST_TOKENS = 1024  # of a prompt with its answer
TIE = 0.05  # nats between two tokens that rounding may exchange
LEAST = 1e-9  # of a bucket's probability: the rest of two distributions that both name nearly everything
INSTALL = "not checked against the student: pip install 'limbeck[serve]' and export it again to have it checked"


@dataclass(frozen=True)
class Asked:
    """A prompt, a greedy answer, and the student's log-probabilities at the answer's tokens [N, V]."""

    messages: tuple[Message, ...]
    prompt_ids: list[int]
    answer_ids: list[int]
    log_p_NV: Tensor


def can_check() -> bool:
    return find_spec("xllamacpp") is not None


def ask_student(model: Model, prompts: Sequence[str]) -> list[Asked]:
    """The student's greedy answers, with its distributions."""
    chats = _chats(model, prompts, MOST_TOKENS)
    jobs = [GenerationJob(ids, Sampling(0.0, 1.0, MAX_TOKENS), 0) for _, ids in chats]
    answers = dict(generate(model.net, jobs, model.eos_ids, vocab_size=model.vocab_size))
    return [_scored(model, chat, ids, answers[number]) for number, (chat, ids) in enumerate(chats)]


def _chats(model: Model, prompts: Sequence[str], room: int) -> list[tuple[tuple[Message, ...], list[int]]]:
    """The prompts as conversations and as token ids, without those that leave no room for an answer."""
    chats: list[tuple[Message, ...]] = [({"role": "user", "content": prompt},) for prompt in prompts]
    framed = [(chat, model.prompt_ids(chat)) for chat in chats]
    fitting = [(chat, ids) for chat, ids in framed if len(ids) + MAX_TOKENS < min(model.max_length, room)]
    if not fitting:
        raise UserError(
            f"no prompt fits into a context of {min(model.max_length, room)} tokens, so the export can't be checked"
        )
    return fitting


def _scored(model: Model, chat: tuple[Message, ...], prompt: list[int], answer: Sequence[int]) -> Asked:
    ids = [int(token) for token in answer]
    return Asked(chat, prompt, ids, log_probs(model, prompt, ids))


@torch.inference_mode()
def log_probs(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The model's log-probabilities [N, V] at the tokens of an answer."""
    ids = torch.tensor([[*prompt, *answer]], device=model.net.device)
    logits: Tensor = model.net(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu().double().log_softmax(-1)


def compare_file(model: Model, file: Path, prompts: Sequence[str], most_kl: float) -> dict[str, Any]:
    """Open a GGUF file with llama.cpp and compare it with the student.

    Returns:
        The numbers of the comparison, by name.

    Raises:
        UserError: llama.cpp can't open it, it reads text as other tokens, goes on after a token that ends an answer of
            the student, or its distributions are further from the student's than `most_kl` (nats a token).
    """
    with _serving(file, context=MOST_TOKENS) as settings:
        api = ApiTeacher(settings)
        scorer = ServerScorer(api, NAMED, model.tokenizer)
        chats = _chats(model, prompts, scorer.room() or MOST_TOKENS)
        _check_tokens(api, model, [TEST_TEXT, *(chat[0]["content"] for chat, _ in chats)])
        asked = [_scored(model, chat, ids, _answer(api, model, ids)) for chat, ids in chats]
        scorer.vocab_size = asked[0].log_p_NV.shape[-1]  # rows of the head without a token have a probability, too
        differs = _framing(scorer, model, asked)
        scores = scorer.score([(one.prompt_ids, one.answer_ids) for one in asked])
        differs = differs or _chat_differs(api, model, asked[0], scores[0])
    found = measured(asked, [_from_server(one, named) for one, named in zip(asked, scores, strict=True)])
    found |= {
        "same_greedy_answers": sum(_is_greedy(one) for one in asked),
        "same_prompt_tokens": not differs,
        "most_kl_nats_per_token": most_kl,
    }
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


def _is_greedy(one: Asked) -> bool:
    return one.log_p_NV.argmax(-1).tolist() == one.answer_ids


def _check_tokens(api: ApiTeacher, model: Model, texts: Sequence[str]) -> None:
    for text in texts:
        body = {"content": text, "add_special": False, "parse_special": True}
        theirs, ours = _called(api, "/tokenize", body).get("tokens"), model.raw_ids(text)
        if theirs != ours:
            raise UserError(
                f"the export reads text otherwise than the student: {text[:40]!r} is {str(theirs)[:80]} there and"
                f" {str(ours)[:80]} here, so nothing was written; serve the folder with transformers or vLLM, or"
                " convert it with llama.cpp's own convert_hf_to_gguf.py"
            )


def _called(api: ApiTeacher, path: str, body: dict[str, Any]) -> dict[str, Any]:
    call = Call("POST", path, body, at_root=True)
    return as_dict(api.endpoint.run(lambda connection: connection.send(call)).json())


def _answer(api: ApiTeacher, model: Model, prompt: list[int]) -> list[int]:
    """The file's greedy answer as token ids, with the end of its turn if it ends."""
    body = {"prompt": prompt, "n_predict": MAX_TOKENS, "temperature": 0.0, "return_tokens": True, "cache_prompt": True}
    data = _called(api, "/completion", body)
    tokens = data.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise UserError("llama.cpp opens the export and gives no answer: nothing was written")
    if passed := [token for token in tokens[:-1] if token in model.eos_ids]:
        raise UserError(
            "the export does not end where the student ends: llama.cpp goes on after"
            f" {str(model.tokenizer.convert_ids_to_tokens(passed[0]))!r}, so nothing was written; leave in eos_token_id"
            " of the student's generation_config.json only tokens that it writes, or serve the folder with transformers"
            " or vLLM"
        )
    ended = data.get("stop_type") == "eos" and tokens[-1:] not in [[number] for number in model.eos_ids]
    return [*tokens, model.end_of_turn] if ended or not tokens else tokens


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


def _chat_differs(api: ApiTeacher, model: Model, one: Asked, named: Sequence[NamedTokens]) -> str:
    """How the chat endpoint reads a prompt, or answers it, otherwise than the file does by token ids; empty if not."""
    request = Request(api.identity, one.messages, Sampling(0.0, 1.0, MAX_TOKENS), 0)
    ((_, answer),) = api.answers([request])
    if answer.usage and answer.usage[0] != len(one.prompt_ids):
        return (
            f"the chat endpoint reads {answer.usage[0]} tokens where the student's template gives {len(one.prompt_ids)}"
        )
    mark = model.opens_thinking(one.prompt_ids)  # in the prompt here, and in the answer there
    there = _plain(answer.text.removeprefix(mark))
    if there != _plain(model.decode(one.answer_ids)):
        again = _plain(model.decode(_answer(api, model, one.prompt_ids)))  # what its cache holds moves its sums
        said = f"the chat endpoint answers {answer.text[:120]!r}, not {model.decode(one.answer_ids)[:120]!r}"
        return "" if there == again or _is_tie(model, one, named, there) else said
    ended = one.answer_ids[-1] in model.eos_ids
    if len(one.answer_ids) < MAX_TOKENS and ended != (answer.finish in ("ok", "empty")):
        return f"the chat endpoint's answer finishes as {answer.finish!r} where the file's own ends by its end token"
    return ""


def _plain(text: str) -> str:
    """A text without white space, which servers strip at some places, and without the halves of letters."""
    return "".join(text.replace("\ufffd", "").split())


def _is_tie(model: Model, one: Asked, named: Sequence[NamedTokens], there: str) -> bool:
    """Whether another answer parts from the file's own at a token that is hardly likelier than the next: then which is
    written is a matter of rounding."""
    same = (there.startswith(_plain(model.decode(one.answer_ids[:end]))) for end in range(1, len(one.answer_ids)))
    parted = next((number for number, is_same in enumerate(same) if not is_same), len(one.answer_ids) - 1)
    _, logs, _ = named[parted]
    return len(logs) > 1 and logs[0] - logs[1] < TIE


@contextlib.contextmanager
def _serving(file: Path, context: int) -> Iterator[Served]:
    """The packaged llama.cpp server with this file, in a process of its own that ends with the block. It has one slot,
    so that each token of an answer finds what stands before it in the cache."""
    key = secrets.token_urlsafe(24)
    process = subprocess.Popen(  # noqa: S603 (fixed arguments)
        [sys.executable, "-m", "limbeck.commands.export.serve_alone", str(file), str(context)],
        env=os.environ | {KEY: key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.environ[OUR_KEY] = key
    lines: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()  # a full pipe would stop the server
    try:
        url = process.stdout.readline().strip()
        if not url.startswith("http"):
            process.kill()
            reader.join()
            reasons = [line for line in lines if "error" in line.lower()]
            reason = (reasons or ["it gave no reason"])[0].strip()[:300]
            raise UserError(f"llama.cpp can't open the export, so nothing was written: {reason}")
        yield Served(url=url, name=file.stem, kind="llama.cpp", key=OUR_KEY, concurrency=1)
    finally:
        os.environ.pop(OUR_KEY, None)
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
