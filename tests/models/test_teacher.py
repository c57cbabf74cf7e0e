"""What a teacher in process can be asked beside chat: to go on with a raw text, to write against itself, to stop at a text, to score."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.elicit.flow import ScoreRequest, StepContext
from limbeck.models.model import header_of
from limbeck.models.teacher import InProcessTeacher
from limbeck.training.scorer import ModelScorer
from limbeck.types import Sampling, UserError

WHY, COUNT = (
    ({"role": "user", "content": "why is the sky blue"},),
    ({"role": "user", "content": "count one two three"},),
)
GREEDY = Sampling(max_tokens=12)


def the_answer(teacher, request):
    ((_, answer),) = teacher.answers([request])
    return answer


def next_logits(model, ids):
    with torch.no_grad():
        return model.net(torch.tensor([ids])).logits[0, -1]


def test_a_raw_text_is_continued_as_it_stands(tiny):
    teacher, scene = InProcessTeacher(tiny), StepContext(tiny.identity, 7, "0/x")
    chat = the_answer(teacher, scene.request(WHY, GREEDY))
    raw = tiny.tokenizer.apply_chat_template(list(WHY), tokenize=False, add_generation_prompt=True)
    assert the_answer(teacher, scene.request((), GREEDY, raw=raw)).ids == chat.ids
    header = header_of(tiny.tokenizer)
    assert header == "<|user|>"
    other = the_answer(teacher, scene.request((), GREEDY, raw=header)).ids
    assert other[0] == int(next_logits(tiny, tiny.raw_ids(header)).argmax())


@pytest.mark.promise("S4")
def test_control_tokens_in_a_text_are_text(tiny):
    (end,) = tiny.raw_ids("<|end|>")
    assert end not in tiny.text_ids("a cat <|end|> sat") and end in tiny.raw_ids("a cat <|end|> sat")
    assert tiny.text_ids("the cat sat") == tiny.raw_ids("the cat sat")


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_contrast_draws_what_follows_from_one_prompt_and_not_the_other(tiny, strength):
    teacher, scene = InProcessTeacher(tiny), StepContext(tiny.identity, 7, "0/x")
    answer = the_answer(teacher, scene.request(WHY, GREEDY, against=COUNT, contrast=strength))
    own, other = tiny.prompt_ids(WHY), tiny.prompt_ids(COUNT)
    for place, token in enumerate(answer.ids):
        written = list(answer.ids[:place])
        scores = [
            next_logits(tiny, prompt + written).double().log_softmax(-1)[: tiny.vocab_size] for prompt in (own, other)
        ]
        assert token == int((scores[0] - strength * scores[1]).argmax())
    if strength == 0:
        assert answer.ids == the_answer(teacher, scene.request(WHY, GREEDY)).ids


def test_an_answer_ends_before_a_text_that_stops_it(tiny):
    teacher, scene = InProcessTeacher(tiny), StepContext(tiny.identity, 7, "0/x")
    found = [
        the_answer(teacher, scene.request(WHY, Sampling(1.0, 1.0, 24, stop=("e", "a")), number)) for number in range(8)
    ]
    stopped = [answer for answer in found if answer.ids is None]
    assert stopped and all("e" not in answer.text and "a" not in answer.text for answer in found)
    assert {answer.finish for answer in stopped} <= {"ok", "empty"}
    assert all(answer.ids for answer in found if answer.finish == "length")


def test_presence_penalty_keeps_a_greedy_text_from_repeating(tiny):
    teacher, scene = InProcessTeacher(tiny), StepContext(tiny.identity, 7, "0/x")
    plain = the_answer(teacher, scene.request(WHY, Sampling(max_tokens=24))).ids
    varied = the_answer(teacher, scene.request(WHY, Sampling(max_tokens=24, presence_penalty=100.0))).ids
    assert len(set(varied)) == len(varied) and len(set(plain)) < len(plain)
    ids = tiny.prompt_ids(WHY)
    for place, token in enumerate(varied):
        logits = next_logits(tiny, ids + list(varied[:place]))[: tiny.vocab_size]
        logits[list(varied[:place])] -= 100.0
        assert token == int(logits.argmax())


def test_scores_are_the_sum_of_the_tokens_log_probabilities(tiny):
    scorer = ModelScorer(tiny)
    answers = ["the cat sat", "a dog ran to the red house", ""]
    found = scorer.log_probs([ScoreRequest(WHY, answer) for answer in answers] + [ScoreRequest((), "the cat sat")])
    for answer, one in zip(answers, found, strict=False):
        prompt, ids = tiny.prompt_ids(WHY), tiny.text_ids(answer)
        wanted = sum(
            float(next_logits(tiny, prompt + ids[:n]).double().log_softmax(-1)[token]) for n, token in enumerate(ids)
        )
        assert (one.nats, one.tokens) == (pytest.approx(wanted, abs=1e-4), len(ids))
    ids = tiny.text_ids("the cat sat")
    begin = [tiny.tokenizer.eos_token_id]
    alone = sum(
        float(next_logits(tiny, begin + ids[:n]).double().log_softmax(-1)[token]) for n, token in enumerate(ids)
    )
    assert found[-1].nats == pytest.approx(alone, abs=1e-4) and math.isfinite(alone)


def test_labels_of_one_token_are_scored_as_if_alone(tiny):
    """Labels after one prompt are read off its last position, for any mixture of prompts and longer answers."""
    other = ({"role": "user", "content": "a dog ran"},)
    asked = [ScoreRequest(prompt, text) for prompt in (WHY, other) for text in ("a", "b", "the cat sat", "c")]
    together = ModelScorer(tiny).log_probs(asked)
    alone = [ModelScorer(tiny).log_probs([one])[0] for one in asked]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.nats for one in together] == pytest.approx([one.nats for one in alone], rel=1e-5, abs=1e-5)


def test_a_text_beyond_the_context_is_scored_as_far_as_it_fits(tiny):
    long = "the cat sat on the mat " * 100
    (one,) = ModelScorer(tiny).log_probs([ScoreRequest(WHY, long)])
    assert one.tokens == tiny.max_length - len(tiny.prompt_ids(WHY)) < len(tiny.text_ids(long))
    with pytest.raises(UserError, match="leaves no room"):
        ModelScorer(tiny).log_probs([ScoreRequest(({"role": "user", "content": long},), "a")])
