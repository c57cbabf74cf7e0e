"""Writes text in every way, on the CPU and on the pretend GPU, and prints what all tokens but the first cost there: a
program for `test_generation_waits.py`, since the pretend GPU registers itself for the whole process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from limbeck.models.generate import Decoding, GenerationJob, SecondModel, write
from limbeck.models.joint import ContrastDecoding, Mixture, Speculation
from limbeck.types import Sampling
from tests.conftest import make_net
from tests.devices.pretend_gpu import pretend_gpu

TOKENS = 10
PLAIN = Sampling(1.0, 1.0, TOKENS)
NUCLEUS = Sampling(0.7, 0.9, TOKENS)
WAYS = {
    "greedy": ([Sampling(0.0, 1.0, TOKENS)], False, None),
    "temperature 1": ([PLAIN], False, None),
    "nucleus": ([NUCLEUS], False, None),
    "all together, recorded": ([Sampling(0.0, 1.0, TOKENS), PLAIN, NUCLEUS], True, None),
    "presence penalty": ([Sampling(0.7, 0.9, TOKENS, presence_penalty=0.5)], False, None),
    "mixture, recorded": ([PLAIN], True, Mixture(0.2, 0.7)),
    "speculation, recorded": ([PLAIN], True, Speculation(5)),
    "speculation of a nucleus, recorded": ([NUCLEUS], True, Speculation(5, 0.0)),
    "contrast": ([NUCLEUS], False, ContrastDecoding(0.5)),
}


def main() -> None:
    torch.set_num_threads(1)
    own, other = make_net(1, seed=1), make_net(1, seed=2)
    expected = {way: text_of(way, own, other) for way in WAYS}
    seen = {}
    with pretend_gpu() as counts:
        for net in (own, other):
            net.to("gpu").tie_weights()
        for way in WAYS:
            same = text_of(way, own, other, at_first_token=counts.clear) == expected[way]
            seen[way] = {"same": same, "waits": dict(counts.waits), "uploads": dict(counts.uploads)}
    print(json.dumps({"steps": TOKENS - 1, "ways": seen}))


def text_of(
    way: str, own: PreTrainedModel, other: PreTrainedModel, at_first_token: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Six rows of different length, admitted together; one ends after half of the steps and leaves the batch."""
    samplings, record, joint = WAYS[way]
    jobs = []
    for row in range(6):
        sampling = samplings[row % len(samplings)]
        jobs.append(
            GenerationJob(tuple(range(5, 9 + row)), sampling if row else replace(sampling, max_tokens=TOKENS // 2), row)
        )

    def is_finished(sampling: Sampling, ids: Sequence[int]) -> bool:
        if len(ids) == 1:
            at_first_token()
        return False

    second = None if joint is None else SecondModel(other, joint)
    decoding = Decoding(record=record, second=second, is_finished=is_finished)
    texts = {text.index: text for text in write(own, jobs, frozenset(), decoding=decoding)}
    return [texts[row].ids for row in range(len(jobs))]


if __name__ == "__main__":
    main()
