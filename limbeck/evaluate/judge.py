"""A judge model compares two systems' answers to the same prompts, each pair in both orders (see `two_orders`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.two_orders import INSTRUCTION, PREFER, REASONED, PairVerdict, Ruling, question, read_verdict, trust
from limbeck.evaluate.records import Progress
from limbeck.evaluate.statistics import ratio_interval
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model
from limbeck.models.scores import Scorer
from limbeck.storage.files import read_jsonl, write_text
from limbeck.types import Message, Sampling, UserError, canonical_json, content_hash

Ask = Callable[[list[tuple[Message, ...]]], Sequence[str | None]]
MAX_TOKENS = 256
READING = 2  # how answers are shown and replies read: verdicts of another way are not mixed with ours


def judge_pairs(
    judge: Model | Scorer | Ask,
    prompts: Sequence[Prompt],
    first: Mapping[str, str],
    second: Mapping[str, str],
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, total: None,
    *,
    control: Collection[str] = (),
) -> list[PairVerdict]:
    """Judge every pair of answers in both orders, in the order of the prompts.

    Args:
        judge: a model, which answers greedily, a function from conversations to replies, one each (None where one
            leaves no room for a reply), or a reward model, which reads each answer by itself, so that no order can sway
            it.
        control: the control tokens of a judge that is a function.
        first, second: the systems' answers by prompt id.
        max_tokens: of a model's reply; a pair that leaves no room for it in the model's context is too long, and is not
            asked.
        progress: called after each of a model's replies.

    Raises:
        UserError: an answer is missing, or there is another number of replies than of questions.
    """
    for name, answers in (("first", first), ("second", second)):
        if missing := [prompt.id for prompt in prompts if prompt.id not in answers]:
            raise UserError(
                f"the {name} system has no answer to {len(missing)} prompts, such as {missing[0]!r}; answer them, or"
                " leave them out"
            )
    first, second = ({name: after_thinking(text) or "" for name, text in each.items()} for each in (first, second))
    if isinstance(judge, Scorer):
        return _by_score(judge, prompts, first, second)
    control = judge.tokenizer.get_added_vocab().keys() if isinstance(judge, Model) else control
    questions = []
    for prompt in prompts:
        one = first[prompt.id]
        two = second[prompt.id]
        questions += [question(prompt.shown, one, two, control), question(prompt.shown, two, one, control)]
    replies = _ask_model(judge, questions, max_tokens, progress) if isinstance(judge, Model) else judge(questions)
    if len(replies) != len(questions):
        raise UserError(
            f"the judge gave {len(replies)} replies to {len(questions)} questions; it must give one each, in order"
        )
    verdicts = []
    for prompt, forward, backward in zip(prompts, replies[0::2], replies[1::2], strict=True):
        verdicts.append(
            PairVerdict(
                prompt_id=prompt.id,
                forward="too_long" if forward is None or backward is None else read_verdict(forward, "ab"),
                backward="too_long" if forward is None or backward is None else read_verdict(backward, "ba"),
                first_length=len(first[prompt.id]),
                second_length=len(second[prompt.id]),
                replies=("", "") if forward is None or backward is None else (forward, backward),
            )
        )
    return verdicts


def _by_score(
    judge: Scorer, prompts: Sequence[Prompt], first: Mapping[str, str], second: Mapping[str, str]
) -> list[PairVerdict]:
    """The answer with the higher score; equal scores are a tie."""
    scores = [
        iter(judge.score([(prompt.messages, answers[prompt.id], False) for prompt in prompts]))
        for answers in (first, second)
    ]
    verdicts = []
    for prompt in prompts:
        one, two = (next(of) for of in scores)
        ruling: Ruling = "too_long"
        if one is not None and two is not None:
            ruling = "tie" if one == two else "first" if one > two else "second"
        said = "" if ruling == "too_long" else f"{one:.6g} and {two:.6g}"
        lengths = len(first[prompt.id]), len(second[prompt.id])
        verdicts.append(PairVerdict(prompt.id, ruling, ruling, *lengths, replies=(said, said)))
    return verdicts


def load_or_judge(
    file: Path,
    judge: Callable[[], Model | Scorer | Ask],
    identity: str,
    prompts: Sequence[Prompt],
    first: Mapping[str, str],
    second: Mapping[str, str],
    progress: Progress = lambda done, total: None,
    *,
    control: Collection[str] = (),
) -> list[PairVerdict]:
    """The verdicts of `judge_pairs`, kept in `file`: those on other answers, or of another judge, are asked for anew.
    The judge is loaded only if one is missing.

    Args:
        identity: the judge's; each record's key is a hash of it and of the question.
    """
    questions = [
        [
            identity,
            INSTRUCTION.replace("PREFER", PREFER).replace("ENDING", REASONED),
            MAX_TOKENS,
            READING,
            prompt.shown,
            first.get(prompt.id),
            second.get(prompt.id),
        ]
        for prompt in prompts
    ]
    keys = [content_hash(each) for each in questions]
    kept = {record.pop("key"): record for record in read_jsonl(file)}
    missing = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in kept]
    if missing:
        verdicts = judge_pairs(
            judge(), missing, first, second, max_tokens=MAX_TOKENS, progress=progress, control=control
        )
        by_prompt = {verdict.prompt_id: vars(verdict) for verdict in verdicts}
        kept |= {key: by_prompt[prompt.id] for prompt, key in zip(prompts, keys, strict=True) if key not in kept}
    found = [kept[key] | {"prompt_id": prompt.id} for prompt, key in zip(prompts, keys, strict=True)]
    if missing or list(kept) != keys:
        records = [{"key": key, **record} for key, record in zip(keys, found, strict=True)]
        write_text(file, "".join(canonical_json(record) + "\n" for record in records))
    return [PairVerdict(**record | {"replies": tuple(record["replies"])}) for record in found]


def _ask_model(
    judge: Model, questions: Sequence[tuple[Message, ...]], max_tokens: int, progress: Progress
) -> list[str | None]:
    """A reply to every question; None to both of a pair, which are neighbours, where either leaves no room for the
    reply."""
    prompts = [judge.prompt_ids(messages) for messages in questions]
    fits = [len(ids) + max_tokens <= judge.max_length for ids in prompts]
    places = [place for place in range(len(prompts)) if fits[place] and fits[place ^ 1]]
    jobs = [GenerationJob(prompts[place], Sampling(temperature=0.0, max_tokens=max_tokens), 0) for place in places]
    replies: list[str | None] = [None] * len(questions)
    for done, (index, ids) in enumerate(generate(judge.net, jobs, judge.eos_ids, vocab_size=judge.vocab_size), 1):
        replies[places[index]] = judge.opens_thinking(prompts[places[index]]) + judge.decode(ids)
        progress(done, len(jobs))
    return replies


def summarise_verdicts(verdicts: Sequence[PairVerdict], judge_is_teacher: bool) -> dict[str, Any]:
    """Who wins, and how far the judge can be trusted. What is undefined is None, never a number.

    Returns, as plain data:
        win_rate: of the first system, a tie counted as half, over the pairs that could be read, with its interval.
        outcomes, unparsable_share, swap_consistency, first_position_share, longer_wins: see `trust`.
        length_correlation: Pearson correlation, over readable pairs, of the outcome (1, 0, -1) with log(length + 1) of
            the first answer less that of the second.
        judge_is_teacher: the judge is the teacher of one of the systems, and may favour its own manner.
        undefined: why there is no win rate, where there is none.
    """
    found = trust(verdicts)
    readable = [verdict for verdict in verdicts if verdict.parsed]
    value_I = np.array([{"first": 1.0, "second": -1.0}.get(verdict.outcome, 0.0) for verdict in readable])
    margin_I = np.array([np.log1p(verdict.first_length) - np.log1p(verdict.second_length) for verdict in readable])
    points = ((value_I + 1) / 2).tolist()
    wins = ratio_interval(points, [1.0] * len(readable), of_share=True) if readable else None
    defined = len(readable) > 2 and value_I.std() > 0 and margin_I.std() > 0
    was_asked = len(verdicts) > found["outcomes"]["too_long"]
    unread = "no verdict of the judge could be read" if was_asked else _not_asked(verdicts)
    return {
        "win_rate": wins.as_dict() if wins else None,
        **found,
        "length_correlation": float(np.corrcoef(value_I, margin_I)[0, 1]) if defined else None,
        "judge_is_teacher": judge_is_teacher,
        "undefined": "" if readable else unread,
    }


def _not_asked(verdicts: Sequence[PairVerdict]) -> str:
    return "every pair was too long for the judge's context" if verdicts else "there was nothing to judge"
