"""Generation: the same text as the library's own loop, whatever shares the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck.models.generate import Decoding, GenerationJob, SecondModel, _Batch, generate, write
from limbeck.models.joint import Mixture, Speculation
from limbeck.models.prune import drop_layers
from limbeck.models.sample import RowSamplings, _from_nucleus, draw
from limbeck.models.slots import CACHE_BYTES, cache_room, columns_of, row_bytes
from limbeck.objectives.sizes import SIZES
from limbeck.types import Sampling, UserError
from tests.conftest import PROMPTS


def prompts(tiny, count=10):
    texts = [*PROMPTS[: count - 2], "a", "why is the red cat on the mat and the dog in the house " * 2]
    return [tiny.prompt_ids(({"role": "user", "content": text},)) for text in texts]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_greedy_text_equals_the_librarys_own(tiny, rows):
    jobs = [GenerationJob(ids, Sampling(max_tokens=90), 0) for ids in prompts(tiny)]
    got = dict(generate(tiny.net, jobs, tiny.eos_ids, decoding=Decoding(rows)))
    for index, job in enumerate(jobs):
        want = tiny.net.generate(
            torch.tensor([job.prompt_ids]),
            max_new_tokens=90,
            do_sample=False,
            attention_mask=torch.ones(1, len(job.prompt_ids)),
        )
        assert got[index] == want[0, len(job.prompt_ids) :].tolist()


def test_sampled_text_does_not_depend_on_the_batch(tiny):
    jobs = [
        GenerationJob(ids, Sampling(1.0, 0.9, 5 + 7 * (number % 6)), number) for number, ids in enumerate(prompts(tiny))
    ]
    alone = {
        index: dict(generate(tiny.net, [job], frozenset(), decoding=Decoding(1)))[0] for index, job in enumerate(jobs)
    }
    for rows in (2, 5, 64):
        assert dict(generate(tiny.net, jobs, frozenset(), decoding=Decoding(rows))) == alone
    assert len({tuple(ids) for ids in alone.values()}) > 5


def test_a_group_shares_its_prompts_pass_and_writes_the_same(tiny):
    """Prompts that stand several times are read once; ids are the same as row by row, log-probabilities to rounding."""
    net = copy.deepcopy(tiny.net).double()  # rounding to float32 is left to the logits alone
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    jobs = [GenerationJob(prompts[n // 4], Sampling(1.0, 1.0, 10), seed=n) for n in range(8)]
    read = []
    handle = net.get_decoder().register_forward_pre_hook(
        lambda module, args, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    together, alone = (
        {c.index: c for c in write(net, jobs, tiny.eos_ids, decoding=Decoding(batch_rows=rows, record=True))}
        for rows in (8, 1)
    )
    handle.remove()
    assert (2, 5) in read and (8, 5) not in read
    assert len({tuple(one.ids) for one in together.values()}) > 4
    for number in range(8):
        assert together[number].ids == alone[number].ids
        assert together[number].log_prob == pytest.approx(alone[number].log_prob, abs=1e-6)


def test_rows_of_very_different_length_share_the_cache(tiny):
    """Long answers beside many short ones: columns are reused, so the write column must move back in time."""
    ids = prompts(tiny)
    jobs = [
        GenerationJob(ids[number % len(ids)], Sampling(1.0, 1.0, 100 if number == 0 else 6), number)
        for number in range(60)
    ]
    together = dict(generate(tiny.net, jobs, frozenset(), decoding=Decoding(3)))
    assert [len(together[index]) for index in range(60)] == [100, *[6] * 59]
    for index in (0, 7, 59):
        assert dict(generate(tiny.net, [jobs[index]], frozenset(), decoding=Decoding(1)))[0] == together[index]


def test_an_answer_ends_with_the_end_token_or_at_its_limit(tiny):
    job = GenerationJob(prompts(tiny)[0], Sampling(1.0, 1.0, 200), 5)
    free = dict(generate(tiny.net, [job], frozenset(), decoding=Decoding(1)))[0]
    end = free[3]
    stopped = dict(generate(tiny.net, [job], frozenset({end}), decoding=Decoding(1)))[0]
    assert stopped == free[: free.index(end) + 1]


def test_stop_ends_between_two_tokens(tiny):
    jobs = [GenerationJob(ids, Sampling(max_tokens=50), 0) for ids in prompts(tiny)]
    assert list(generate(tiny.net, jobs, frozenset(), stop=lambda: True)) == []


def test_a_prompt_without_room_is_refused(tiny):
    with pytest.raises(UserError, match="context of 256"):
        list(generate(tiny.net, [GenerationJob([5] * 200, Sampling(max_tokens=100), 0)], frozenset()))


def on_cpu(*samplings):
    return RowSamplings.of(samplings, torch.device("cpu"))


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_draws_follow_the_distribution(top_p):
    noise = torch.Generator().manual_seed(1)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 20_000
    uniform = torch.rand(n, generator=noise, dtype=torch.float64)
    drawn = draw(logits.expand(n, -1), on_cpu(*[Sampling(0.7, top_p)] * n), uniform).token_B
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
    drawn = draw(
        logits,
        on_cpu(Sampling(0.0), Sampling(1.0, 1.0), Sampling(1.0, 0.5)),
        torch.tensor([0.999, 0.0, 0.999], dtype=torch.float64),
    )
    assert drawn.token_B.tolist() == [1, 0, 1] and drawn.log_prob_B[0] == 0


# Log-probabilities, and two models that write one text


def exact_log_probs(net, prompt, ids, temperature=1.0):
    logits = net(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_recorded_log_probs_are_those_of_one_pass_over_the_text(tiny, temperature, top_p):
    jobs = [GenerationJob(ids, Sampling(temperature, top_p, 9), number) for number, ids in enumerate(prompts(tiny, 6))]
    for text in write(tiny.net, jobs, frozenset(), decoding=Decoding(4, record=True)):
        prompt = jobs[text.index].prompt_ids
        torch.testing.assert_close(
            torch.tensor(text.log_prob), exact_log_probs(tiny.net, prompt, text.ids), rtol=1e-4, atol=1e-4
        )
        drawn_from = exact_log_probs(tiny.net, prompt, text.ids, temperature)
        if top_p == 1:
            torch.testing.assert_close(torch.tensor(text.sampler_log_prob), drawn_from, rtol=1e-4, atol=1e-4)
        else:
            assert (torch.tensor(text.sampler_log_prob) >= drawn_from - 1e-4).all() and max(
                text.sampler_log_prob
            ) <= 1e-6


@pytest.fixture
def student(tiny):
    return drop_layers(tiny.net, [0, 3])


def drawn(net, jobs, second=None, rows=4):
    return {
        text.index: text for text in write(net, jobs, frozenset(), decoding=Decoding(rows, record=True, second=second))
    }


def jobs_of(tiny, temperature=1.0):
    return [GenerationJob(ids, Sampling(temperature, 1.0, 12), number) for number, ids in enumerate(prompts(tiny, 7))]


def test_speculation_over_the_whole_vocabulary_is_the_student_alone(tiny, student):
    jobs = jobs_of(tiny)
    alone = drawn(student, jobs)
    both = drawn(student, jobs, SecondModel(tiny.net, Speculation(10**6)))
    for index, text in alone.items():
        assert both[index].ids == text.ids and both[index].own_tokens == 12
        torch.testing.assert_close(
            torch.tensor(both[index].sampler_log_prob), torch.tensor(text.sampler_log_prob), rtol=1e-4, atol=1e-4
        )


def test_speculation_with_1_and_a_greedy_teacher_is_the_teachers_greedy_text(tiny, student):
    jobs = jobs_of(tiny)
    greedy = dict(
        generate(tiny.net, [GenerationJob(job.prompt_ids, Sampling(0.0, 1.0, 12), 0) for job in jobs], frozenset())
    )
    both = drawn(student, jobs, SecondModel(tiny.net, Speculation(1, 0.0)))
    assert {index: text.ids for index, text in both.items()} == greedy
    assert any(text.own_tokens < 12 for text in both.values())


def test_every_token_of_speculation_is_among_the_teachers_likeliest_or_its_own(tiny, student):
    jobs, k = jobs_of(tiny), 5
    accepted = []
    for wide in (2, k, 40):
        both = drawn(student, jobs, SecondModel(tiny.net, Speculation(wide)))
        accepted.append(sum(text.own_tokens for text in both.values()))
        if wide == k:
            for index, text in both.items():
                logits = tiny.net(torch.tensor([[*jobs[index].prompt_ids, *text.ids]])).logits[
                    0, len(jobs[index].prompt_ids) - 1 : -1
                ]
                rank = (logits > logits.gather(1, torch.tensor(text.ids)[:, None])).sum(-1)
                assert int((rank < k).sum()) >= text.own_tokens
    assert accepted[0] < accepted[1] < accepted[2] <= 12 * len(jobs)


@pytest.mark.parametrize("joint", [Mixture(0.3), Mixture(0.6, 0.7), Speculation(3), Speculation(2, 0.5)])
def test_draws_of_two_models_follow_the_distribution_they_report(joint):
    noise, n = torch.Generator().manual_seed(3), 20_000
    own, other = 2 * torch.randn(2, 6, generator=noise)
    uniform = torch.rand(n, 2, generator=noise, dtype=torch.float64)
    found = joint(own.expand(n, -1), other.expand(n, -1), on_cpu(*[Sampling(1.0)] * n), uniform)
    want = torch.zeros(6)
    want[found.token_B] = found.log_prob_B.exp()
    assert want.sum() == pytest.approx(1, abs=1e-4), "all six were drawn at some time, and their probabilities add up"
    got = torch.bincount(found.token_B, minlength=6) / n
    assert ((got - want).abs() < 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()


def test_the_mixture_has_both_models_at_its_ends(tiny, student):
    jobs = jobs_of(tiny)
    assert {i: t.ids for i, t in drawn(student, jobs, SecondModel(tiny.net, Mixture(0.0))).items()} == {
        i: t.ids for i, t in drawn(student, jobs).items()
    }
    assert {i: t.ids for i, t in drawn(student, jobs, SecondModel(tiny.net, Mixture(1.0))).items()} == {
        i: t.ids for i, t in drawn(tiny.net, jobs).items()
    }


def test_the_model_beside_may_see_another_prompt(tiny, student):
    """With the whole mixture, what is written is what the model beside writes after the prompt that it sees."""
    jobs = jobs_of(tiny)
    longer = [(*jobs[0].prompt_ids, *job.prompt_ids) for job in jobs]
    pairs = [
        GenerationJob(job.prompt_ids, job.sampling, job.seed, other) for job, other in zip(jobs, longer, strict=True)
    ]
    alone = drawn(
        tiny.net, [GenerationJob(other, job.sampling, job.seed) for job, other in zip(jobs, longer, strict=True)]
    )
    assert {i: t.ids for i, t in drawn(student, pairs, SecondModel(tiny.net, Mixture(1.0))).items()} == {
        i: t.ids for i, t in alone.items()
    }


def test_a_small_cache_makes_fewer_rows_and_the_same_text(tiny, monkeypatch):
    jobs = jobs_of(tiny)
    row = row_bytes(tiny.net, columns_of(max(len(job.prompt_ids) for job in jobs), 12))
    texts = []
    for room, rows in ((None, 7), (1, 1), (3 * row, 3)):
        monkeypatch.setattr(SIZES, "cache_bytes", room)
        assert len(_Batch(tiny.net, jobs, Decoding()).rows) == rows
        texts.append(dict(generate(tiny.net, jobs, frozenset())))
    assert texts[0] == texts[1] == texts[2]


def test_on_cuda_the_cache_may_take_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    assert cache_room(torch.device("cuda:1")) == 2 * 2**30
    assert cache_room(torch.device("cpu")) == CACHE_BYTES


def test_penalised_tokens_are_drawn_less_beside_rows_without_a_penalty(tiny):
    jobs = [GenerationJob(ids, Sampling(1.0, 1.0, 40, presence_penalty=4.0), 1) for ids in prompts(tiny, 3)]
    jobs += [GenerationJob(job.prompt_ids, Sampling(1.0, 1.0, 40), 1) for job in jobs]
    texts = dict(generate(tiny.net, jobs, frozenset(), decoding=Decoding(4)))
    plain = dict(generate(tiny.net, jobs[3:], frozenset()))
    assert [texts[index] for index in (3, 4, 5)] == [plain[index] for index in (0, 1, 2)]
    assert sum(len(set(texts[index])) for index in range(3)) > sum(len(set(texts[index])) for index in range(3, 6))


def test_a_finished_row_beside_others_does_not_run_out_of_positions():
    """GPT-2 has a table of positions: a dead slot's must stay within it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    jobs = [GenerationJob(range(5, 25), Sampling(1.0, 1.0, 20 if row else 1), row) for row in range(8)]
    jobs += [GenerationJob(range(5, 15), Sampling(1.0, 1.0, 30), row) for row in range(8, 20)]
    together = dict(generate(net, jobs, frozenset(), decoding=Decoding(8)))
    for index in (1, 9, 19):
        assert dict(generate(net, [jobs[index]], frozenset()))[0] == together[index]


def eight_tokens(tiny, count=9):
    sampling = Sampling(1.0, 1.0, 8)
    return [
        GenerationJob(tiny.prompt_ids(({"role": "user", "content": text},)), sampling, n)
        for n, text in enumerate(PROMPTS[:count])
    ]


def test_where_memory_runs_out_fewer_rows_decode_together_and_the_text_is_the_same(tiny, monkeypatch):
    jobs, eos = eight_tokens(tiny), tiny.eos_ids
    expected = {completion.index: completion.ids for completion in write(tiny.net, jobs, eos)}
    widths, step = [], _Batch.step

    def short_of_memory(batch):
        widths.append(len(batch.rows))
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(batch)

    monkeypatch.setattr(_Batch, "step", short_of_memory)
    written = [(completion.index, completion.ids) for completion in write(tiny.net, jobs, eos)]
    assert dict(written) == expected and len(written) == len(jobs), "each answer once"
    assert max(widths) == 9 and min(widths) <= 2
    monkeypatch.setattr(_Batch, "step", lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        list(write(tiny.net, jobs, eos))
    monkeypatch.setattr(_Batch, "step", lambda batch: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        list(write(tiny.net, jobs, eos))


def test_the_users_size_of_the_cache_goes_before_the_devices(monkeypatch):
    monkeypatch.setattr(SIZES, "cache_bytes", 12345)
    assert cache_room(torch.device("cpu")) == cache_room(torch.device("cuda")) == 12345
