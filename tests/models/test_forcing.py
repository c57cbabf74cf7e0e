"""Budget forcing: thinking is cut at its budget and ended, ends that are too early are taken away, and a text that needs
nothing of this is plain generation's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from limbeck.models import forcing
from limbeck.models.forcing import Forcing, check_forcing, write_within
from limbeck.models.generate import GenerationJob, generate
from limbeck.types import Sampling, UserError

PROMPTS = ("why is the sky blue", "a dog ran", "count one two three", "the cat")


def jobs_of(model, temperature=0.0, count=4):
    sampling = Sampling(temperature, 1.0, 1)
    return [
        GenerationJob(model.prompt_ids(({"role": "user", "content": text},)), sampling, seed)
        for seed, text in enumerate(PROMPTS[:count])
    ]


def plain(model, jobs, max_tokens):
    longer = [
        GenerationJob(job.prompt_ids, Sampling(job.sampling.temperature, 1.0, max_tokens), job.seed) for job in jobs
    ]
    found = dict(generate(model.net, longer, model.eos_ids, vocab_size=model.vocab_size))
    return [found[number] for number in range(len(jobs))]


class Played:
    """In place of `generate`: a model that writes what `says` answers to the text so far, in tokens of one letter."""

    def __init__(self, model, monkeypatch, says):
        self.model = model
        self.says = says
        self.asked = []  # the text after the prompt, for every stretch
        monkeypatch.setattr(forcing, "generate", self)

    def __call__(self, net, jobs, eos_ids, vocab_size=None):
        for index, job in enumerate(jobs):
            before = self.model.decode(job.prompt_ids).rpartition("blue")[2]
            self.asked.append((before, job.seed))
            letters = self.says(before)
            end = [min(eos_ids)] if letters.endswith("$") else []
            script = [self.letter(letter) for letter in letters.removesuffix("$")] + end
            ids = []
            for token in script[: job.sampling.max_tokens]:
                ids.append(token)
                if (job.until is not None and job.until(ids)) or token in eos_ids:
                    break
            yield index, ids

    def letter(self, letter):
        (token,) = self.model.text_ids(letter)
        return token


def written(model, monkeypatch, says, bounds):
    played = Played(model, monkeypatch, says)
    (found,) = write_within(model, jobs_of(model, count=1), bounds)
    return model.decode(found.ids), found, played.asked


def counts(found):
    return found.thinking_tokens, found.answer_tokens, found.forced_tokens, found.waits, found.is_cut, found.finished


def test_thinking_within_its_budget_is_left_alone(tiny, monkeypatch):
    text, found, asked = written(tiny, monkeypatch, lambda _: "<think>abc</think>7$", Forcing(18, 5))
    assert text == "<think>abc</think>7" and len(asked) == 1 and asked[0][1] == 0
    assert counts(found) == (18, 2, 0, 0, False, True)


def test_thinking_is_cut_at_its_budget_and_the_answer_follows(tiny, monkeypatch):
    def says(before):
        return "the answer$" if "</think>" in before else "<think>" + "x" * 50

    text, found, asked = written(tiny, monkeypatch, says, Forcing(10, 20))
    assert text == "<think>xxx\n</think>\n\nthe answer"
    put = len(tiny.raw_ids("\n</think>\n\n"))
    assert counts(found) == (10, 11, put, 0, True, True)
    assert [before for before, _ in asked] == ["", "<think>xxx\n</think>\n\n"] and asked[0][1] != asked[1][1]
    text, found, _ = written(tiny, monkeypatch, says, Forcing(10, 4))
    assert text.endswith("\n\nthe ") and counts(found) == (10, 4, put, 0, True, False)


@pytest.mark.parametrize("thought", ["<think>x</", "<think>x</think"])
def test_a_mark_that_the_budget_cuts_in_two_is_not_left_half(tiny, monkeypatch, thought):
    text, found, _ = written(
        tiny, monkeypatch, lambda before: "7$" if "</think>" in before else "<think>x</think>", Forcing(len(thought), 5)
    )
    assert text == "<think>x\n</think>\n\n7" and found.thinking_tokens == len(thought) and found.is_cut


def test_an_early_end_is_taken_away_as_often_as_there_are_waits(tiny, monkeypatch):
    stretches = iter(["<think>a</think>", "b</think>", "c</think>9$"])
    text, found, asked = written(tiny, monkeypatch, lambda _: next(stretches), Forcing(100, 5, waits=2))
    assert text == "<think>a Waitb Waitc</think>9"
    put = 2 * len(tiny.text_ids(" Wait"))
    assert counts(found) == (16 + 9 + 9, 2, put, 2, False, True) and len({seed for _, seed in asked}) == 3


def test_the_end_of_the_text_in_the_midst_of_thinking(tiny, monkeypatch):
    """It is an end like that of the thinking where a wait is due, and left as it is otherwise."""
    stretches = iter(["<think>a\n$", "b$"])
    text, found, _ = written(tiny, monkeypatch, lambda _: next(stretches), Forcing(100, 5, waits=1, wait="Hmm"))
    assert text == "<think>a\nHmmb" and counts(found) == (10 + 2, 0, len(tiny.text_ids("Hmm")), 1, False, True)


def test_waits_end_with_the_budget(tiny, monkeypatch):
    def says(before):
        return "7$" if "</think>" in before else "b</think>" if before else "<think>a</think>"

    text, found, _ = written(tiny, monkeypatch, says, Forcing(30, 5, waits=9))
    # 16 + 9 tokens are thought, and 5 of the third stretch: its end is cut in two
    assert text == "<think>a Waitb Waitb\n</think>\n\n7" and found.waits == 2 and found.thinking_tokens == 30
    text, found, _ = written(tiny, monkeypatch, lambda before: "<think>a</think>7$", Forcing(16, 5, waits=3))
    assert text == "<think>a</think>7" and found.waits == 0, "an end with the budget's last token is no early one"


@pytest.mark.parametrize(
    ("opened", "closed"),
    [("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>"), ("◁think▷", "◁/think▷"), ("<|channel>thought", "<channel|>")],
)  # fmt: skip
def test_marks_of_other_families_are_ended_by_their_own(tiny, monkeypatch, opened, closed):
    def says(before):
        return "7$" if closed in before else "x" * 40

    monkeypatch.setattr(type(tiny), "opens_thinking", lambda *_: opened)
    text, found, _ = written(tiny, monkeypatch, says, Forcing(6, 5))
    assert text == f"xxxxxx\n{closed}\n\n7" and found.is_cut


def test_a_mark_may_be_put_before_the_thinking_or_a_cue_end_it(tiny, monkeypatch):
    text, found, asked = written(
        tiny, monkeypatch, lambda before: "7$" if "</think>" in before else "x" * 9, Forcing(3, 5, begin="<think>")
    )
    assert text == "<think>\nxxx\n</think>\n\n7" and asked[0][0] == "<think>\n" and found.thinking_tokens == 3
    assert found.forced_tokens == len(tiny.raw_ids("<think>\n")) + len(tiny.raw_ids("\n</think>\n\n"))
    text, found, _ = written(
        tiny, monkeypatch, lambda before: " 7$" if "Answer:" in before else "2 and 5", Forcing(5, 5, cue="Answer:")
    )
    assert text == "2 and\n\nAnswer: 7" and counts(found)[:2] == (5, 3)
    text, found, _ = written(tiny, monkeypatch, lambda _: "so answer: 7$", Forcing(20, 5, cue="Answer:"))
    assert text == "so answer: 7" and counts(found) == (10, 3, 0, 0, False, True)


def test_a_text_that_does_not_think_has_the_answers_length(tiny, monkeypatch):
    text, found, _ = written(tiny, monkeypatch, lambda _: "no thinking here", Forcing(50, 4, waits=3))
    assert text == "no t" and counts(found) == (0, 4, 0, 0, False, False)
    text, found, _ = written(tiny, monkeypatch, lambda _: "7$", Forcing(50, 4, waits=3))
    assert text == "7" and counts(found) == (0, 2, 0, 0, False, True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_budget_that_is_not_reached_is_plain_generation_bit_for_bit(tiny, temperature):
    """The cue is what the model writes in any case."""
    jobs = jobs_of(tiny, temperature)
    free = plain(tiny, jobs, 40)
    for number, ids in enumerate(free):
        cue = next(text for at in range(5, 30) if len(text := tiny.decode(ids[at : at + 3])) > 1 and text.isprintable())
        at = next(n for n in range(len(ids) + 1) if cue.lower() in tiny.decode(ids[:n]).lower())
        (found,) = write_within(tiny, [jobs[number]], Forcing(at, 40 - at, cue=cue))
        assert found.ids == ids and found.thinking_tokens == at and found.forced_tokens == 0
    without = write_within(tiny, jobs, Forcing(20, 40))
    assert [row.ids for row in without] == free and {row.thinking_tokens for row in without} == {0}


def test_a_cut_text_goes_on_as_the_model_does_after_what_was_put(tiny):
    jobs = jobs_of(tiny)
    free = plain(tiny, jobs, 12)
    for job, ids, row in zip(jobs, free, write_within(tiny, jobs, Forcing(7, 9, cue="@@@")), strict=True):
        put = tiny.text_ids("\n\n@@@")
        assert row.ids[:7] == ids[:7] and row.ids[7 : 7 + len(put)] == put
        prompt = GenerationJob([*job.prompt_ids, *row.ids[: 7 + len(put)]], job.sampling, 0)
        assert row.ids[7 + len(put) :] == plain(tiny, [prompt], 9)[0]


def test_where_memory_runs_out_the_text_is_watched_anew(tiny, monkeypatch):
    jobs = jobs_of(tiny)
    expected = write_within(tiny, jobs, Forcing(7, 9, cue="@@@"))
    real, calls = forcing.generate.__globals__["_write_one_token"], [0]

    def short_of_memory(batch, *rest):
        calls[0] += 1
        if calls[0] == 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(batch, *rest)

    monkeypatch.setitem(forcing.generate.__globals__, "_write_one_token", short_of_memory)
    assert write_within(tiny, jobs, Forcing(7, 9, cue="@@@")) == expected


def test_what_does_not_fit_the_context_is_refused_before_anything_is_written(tiny, monkeypatch):
    monkeypatch.setattr(forcing, "generate", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(UserError, match="don't fit a context of 256: lower the budget"):
        write_within(tiny, jobs_of(tiny), Forcing(200, 60))
    with pytest.raises(UserError, match="channels"):
        check_forcing({"<|channel|>"})


def test_channels_are_refused_where_a_model_writes_them(tiny, monkeypatch):
    with pytest.raises(UserError, match="gpt-oss"):
        written(tiny, monkeypatch, lambda _: "<|channel|>analysis<|message|>so", Forcing(50, 4))
