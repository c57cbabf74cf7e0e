"""Generation: the same text as the library's own loop, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch

from limbeck.models.generate import Job, generate
from limbeck.models.sample import _from_nucleus, draw
from limbeck.types import Sampling, UserError
from tests.conftest import PROMPTS


def prompts(tiny, count=10):
    texts = [*PROMPTS[: count - 2], "a", "why is the red cat on the mat and the dog in the house " * 2]
    return [tiny.prompt_ids(({"role": "user", "content": text},)) for text in texts]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_greedy_text_equals_the_librarys_own(tiny, rows):
    jobs = [Job(ids, Sampling(max_tokens=90), 0) for ids in prompts(tiny)]
    got = dict(generate(tiny.net, jobs, tiny.eos_ids, batch_rows=rows))
    for index, job in enumerate(jobs):
        want = tiny.net.generate(
            torch.tensor([job.prompt_ids]), max_new_tokens=90, do_sample=False, attention_mask=torch.ones(1, len(job.prompt_ids))
        )
        assert got[index] == want[0, len(job.prompt_ids) :].tolist()


def test_sampled_text_does_not_depend_on_the_batch(tiny):
    jobs = [Job(ids, Sampling(1.0, 0.9, 5 + 7 * (number % 6)), number) for number, ids in enumerate(prompts(tiny))]
    alone = {index: dict(generate(tiny.net, [job], frozenset(), 1))[0] for index, job in enumerate(jobs)}
    for rows in (2, 5, 64):
        assert dict(generate(tiny.net, jobs, frozenset(), rows)) == alone
    assert len({tuple(ids) for ids in alone.values()}) > 5


def test_rows_of_very_different_length_share_the_cache(tiny):
    """Long answers beside many short ones: columns are reused, so the write column must move back in time."""
    ids = prompts(tiny)
    jobs = [Job(ids[number % len(ids)], Sampling(1.0, 1.0, 100 if number == 0 else 6), number) for number in range(60)]
    together = dict(generate(tiny.net, jobs, frozenset(), 3))
    assert [len(together[index]) for index in range(60)] == [100, *[6] * 59]
    for index in (0, 7, 59):
        assert dict(generate(tiny.net, [jobs[index]], frozenset(), 1))[0] == together[index]


def test_an_answer_ends_with_the_end_token_or_at_its_limit(tiny):
    job = Job(prompts(tiny)[0], Sampling(1.0, 1.0, 200), 5)
    free = dict(generate(tiny.net, [job], frozenset(), 1))[0]
    end = free[3]
    stopped = dict(generate(tiny.net, [job], frozenset({end}), 1))[0]
    assert stopped == free[: free.index(end) + 1]


def test_stop_ends_between_two_tokens(tiny):
    jobs = [Job(ids, Sampling(max_tokens=50), 0) for ids in prompts(tiny)]
    assert list(generate(tiny.net, jobs, frozenset(), stop=lambda: True)) == []


def test_a_prompt_without_room_is_refused(tiny):
    with pytest.raises(UserError, match="context of 256"):
        list(generate(tiny.net, [Job([5] * 200, Sampling(max_tokens=100), 0)], frozenset()))


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_draws_follow_the_distribution(top_p):
    noise = torch.Generator().manual_seed(1)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 20_000
    uniform = torch.rand(n, generator=noise, dtype=torch.float64)
    drawn = draw(logits.expand(n, -1), [Sampling(0.7, top_p)] * n, uniform).token_B
    p = (logits / 0.7).softmax(0)
    order = p.argsort(descending=True)
    kept = int((p[order].cumsum(0) < top_p).sum()) + 1
    want = torch.zeros(6)
    want[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
    got = torch.bincount(drawn, minlength=6) / n
    assert (got[want == 0] == 0).all()
    assert ((got - want).abs() < 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()


def test_a_short_list_gives_the_same_draws_as_the_whole_vocabulary():
    noise = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(50, 400, generator=noise)
    top_p, uniform = torch.full((50,), 0.9, dtype=torch.float64), torch.rand(50, generator=noise, dtype=torch.float64)
    short, whole = (_from_nucleus(logits, top_p, uniform, shortlist=size) for size in (16, 400))
    assert torch.equal(short[0], whole[0]) and torch.equal(short[1], whole[1])


def test_temperature_zero_is_the_argmax_beside_sampled_rows():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3)
    drawn = draw(logits, [Sampling(0.0), Sampling(1.0, 1.0), Sampling(1.0, 0.5)], torch.tensor([0.999, 0.0, 0.999], dtype=torch.float64))
    assert drawn.token_B.tolist() == [1, 0, 1] and drawn.log_prob_B[0] == 0
