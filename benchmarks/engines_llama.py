"""The packaged llama.cpp server as a teacher: its speed, and how near what it says is to the same weights in this
process; writes docs/evidence/engines-llama.json.

    .venv/bin/python benchmarks/engines_llama.py      # some three minutes on two cores

The server has SmolLM2-135M's 4-bit weights, the model here the same weights in fp32. Both read the text that the server
wrote. `nats_apart` is KL(server || here) over the likeliest tokens and a bucket, from the log-probabilities that came
with the text; `same_tokens` leaves out what stands after a piece of text that the server wrote in other tokens than the
tokenizer makes of it, where the two read other contexts. `scored_nats_apart` is that of its scores of given text, a
request for each token. The taught share is that of tokens which had log-probabilities. Speed is in tokens a second, the
first request left out.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from questions import MODEL, QUESTIONS
from torch import Tensor

from limbeck.commands.serve import KEY, serve
from limbeck.config.server import Served
from limbeck.data.batches import Row, make_batch
from limbeck.models.api import ApiTeacher
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.own_text import Aligner, OwnTextTeacher
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import TeacherSignal
from limbeck.storage.files import write_json
from limbeck.types import TAUGHT, Batch, Generated, Request, Sampling

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "engines-llama.json"
TOKENS = 64
TOGETHER = 2
NAMED = 20
SCORED = 2  # answers that are scored token by token


def main() -> None:
    os.environ.setdefault(KEY, secrets.token_urlsafe(24))
    server = serve(MODEL, context=512, slots=TOGETHER)
    settings = Served(url=server.url, name=MODEL, kind="llama.cpp", logprobs=NAMED, concurrency=TOGETHER)
    api = ApiTeacher(settings)
    list(api.answers(requests(api, ["Hello."])))
    began = time.perf_counter()
    answers = {request.key: answer for request, answer in api.answers(requests(api, QUESTIONS))}
    seconds = time.perf_counter() - began
    model = load_model(MODEL)
    rows, teacher = own_text(model, [answers[request.key] for request in requests(api, QUESTIONS)])
    marked = teacher.mark(rows, lambda *_: None)
    batch = make_batch(marked)
    signal = teacher.view(batch).signal
    assert signal is not None
    apart = nats(signal, model, batch)
    same = torch.cat([before_a_gap(row.columns[TAUGHT]) for row in marked])
    few = make_batch(rows[:SCORED])
    began = time.perf_counter()
    scored = ServerScorer(api, NAMED, model.tokenizer).view(few).signal
    scoring = time.perf_counter() - began
    assert scored is not None
    taught = teacher.facts
    written = sum(answer.usage[1] for answer in answers.values() if answer.usage)
    found = {
        "engine": "llama.cpp",
        "version": f"xllamacpp {version('xllamacpp')}",
        "tokens_per_second": round(written / seconds, 1),
        "nats_apart": round(float(apart.mean()), 5),
        "same_tokens_nats_apart": round(float(apart[same].mean()), 5),
        "same_tokens_nats_apart_at_most": round(float(apart[same].max()), 4),
        "same_tokens": int(same.sum()),
        "scored_nats_apart": round(float(nats(scored, model, few).mean()), 5),
        "scored_tokens_per_second": round(int(few.mask_BT.sum()) / scoring, 1),
        "taught_share": round(taught["taught_share"], 4),
        "named_probability": round(taught["named_probability"], 4),
        "named": NAMED,
        "tokens": taught["tokens"],
        "at_once": TOGETHER,
        "model": MODEL,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
    }
    write_json(EVIDENCE, found)
    print(found)


def requests(api: ApiTeacher, questions: Sequence[str]) -> list[Request]:
    drawn = Sampling(1.0, 1.0, TOKENS)
    return [
        Request(api.identity, ({"role": "user", "content": question},), drawn, seed)
        for seed, question in enumerate(questions)
    ]


def own_text(model: Model, answers: Sequence[Generated]) -> tuple[list[Row], OwnTextTeacher]:
    """The answers in the model's tokens, and the server as the teacher of them."""
    rows = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        prompt = model.prompt_ids(({"role": "user", "content": question},))
        ends = [model.tokenizer.eos_token_id] if answer.finish == "ok" else []
        rows.append(Row(str(number), tuple(prompt), (*model.text_ids(answer.text), *ends)))
    aligner = Aligner(model.tokenizer, model.eos_ids)
    told = [answer.told for answer in answers]
    return rows, OwnTextTeacher("server", lambda ids: [told[int(number)] for number in ids], aligner, model.vocab_size)


def before_a_gap(taught: Sequence[float]) -> Tensor:
    """Of one answer's taught tokens, those without a gap before them."""
    taught_N = torch.tensor(taught, dtype=torch.bool)
    return taught_N.long().cumprod(0).bool()[taught_N]


@torch.no_grad()
def nats(signal: TeacherSignal, model: Model, batch: Batch) -> Tensor:
    """KL(server || here) at the positions where the server's distribution is known."""
    dense = InProcessTeacher(model).signal(batch)
    q = Distribution(dense.head.logits(dense.hidden_NE))
    row_N, position_N = batch.response_positions()
    targets_N = batch.tokens_BT[row_N, position_N + 1]
    kl_N, _ = signal.chunk(slice(None)).rows(slice(None)).compare(DIVERGENCES["forward_kl"], {}, q, targets_N)
    known_N = getattr(signal, "known_N", torch.ones(len(kl_N), dtype=torch.bool))
    return kl_N[known_N]


if __name__ == "__main__":
    main()
