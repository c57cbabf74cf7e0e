"""What a distillation is worth, as far as items tell: the share of the teacher's score, and how long a request is.

Also what servers were paid for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from limbeck.config.named_models import TEACHER
from limbeck.data.batches import Row
from limbeck.elicit.bills import Bills
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate.protocol import EvaluationProtocol
from limbeck.evaluate.records import SystemRecords
from limbeck.evaluate.statistics import ratio_interval
from limbeck.evaluate.summary import columns, describe
from limbeck.evaluate.task import Task
from limbeck.types import Sampling


def kept(student: SystemRecords, teacher: SystemRecords, tasks: Sequence[Task]) -> dict[str, dict[str, Any] | None]:
    """The student's score as a share of the teacher's on the same items, per metric of a task of which more is better.

    None where the teacher's own score may be 0, so that there is no share. Its interval resamples items: both scores
    are taken over the same resample.
    """
    ours, theirs = columns(student, tasks), columns(teacher, tasks)
    names = [name for name in ours if "/" in name and name in theirs]
    result: dict[str, dict[str, Any] | None] = {}
    for name in (name for name, facts in describe(names, tasks).items() if facts["better"] == "high"):
        a, b = ours[name], theirs[name]
        common = sorted(set(a.ids) & set(b.ids))
        places = [{ident: number for number, ident in enumerate(one.ids)} for one in (a, b)]
        first, second = ([place[ident] for ident in common] for place in places)
        if not common or not np.array_equal(a.weights[first], b.weights[second]) or (b.values[second] < 0).any():
            continue
        if ratio_interval(b.values[second], b.weights[second]).low <= 0:
            result[name] = None
        else:
            result[name] = ratio_interval(a.values[first], b.values[second]).as_dict()
    return result


def requests(rows: Sequence[Row]) -> dict[str, float]:
    """Mean tokens of a held-out prompt, as the student and the teacher see it, and of the teacher's answer to it."""
    shown = [row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids for row in rows]
    return {
        "requests": len(rows),
        "prompt_tokens": sum(len(row.prompt_ids) for row in rows) / len(rows),
        "teacher_prompt_tokens": sum(map(len, shown)) / len(rows),
        "answer_tokens": sum(len(row.response_ids) for row in rows) / len(rows),
    }


def teachers_requests(text: TrainingText, protocol: EvaluationProtocol) -> dict[str, Any]:
    """What the teacher's server counted of the greedy answers to the held-out prompts, as `counted`; empty where no
    server counted any."""
    if text.recipe.teacher.server is None:
        return {}
    greedy = Sampling(temperature=0.0, max_tokens=protocol.max_tokens)
    answers, read, written = text.usage_of_said([(prompt, 0) for prompt in protocol.prompts], greedy)
    return {"counted": {"answers": answers, "tokens_read": read, "tokens_written": written}} if answers else {}


def bill(bills: Bills) -> dict[str, Any]:
    """What servers were paid for, where there are any: answers, tokens, and by the recipe's prices money; the teacher's
    as `bill`, and those of other models by their names as `bills`."""
    recipe = bills.recipe
    served = [name for name, model in (recipe.models or {}).items() if model.server is not None]
    teacher = bills.identity(TEACHER)  # a model that is the teacher's own is in its bill
    others = {name: _costs(bills, name) for name in served if bills.identity(name) != teacher}
    return ({} if recipe.teacher.server is None else {"bill": _costs(bills, TEACHER)}) | (
        {"bills": others} if others else {}
    )


def _costs(bills: Bills, by: str) -> dict[str, Any]:
    """A bill. `unmetered` are answers whose tokens the server did not count; with any, there is no money."""
    answers, read, written = bills.paid(by)
    costs: dict[str, Any] = {"answers": answers, "tokens_read": read, "tokens_written": written}
    if unmetered := bills.unmetered(by):
        costs["unmetered"] = unmetered
    elif (money := bills.money(by)) is not None:
        costs["money"] = money
    answers, read, written = bills.reused(by)
    if answers:  # of earlier runs, paid then
        costs["reused"] = {"answers": answers, "tokens_read": read, "tokens_written": written}
        if read and (money := bills.price(read, written, by)) is not None:
            costs["reused"]["money"] = money
    tries, tokens = bills.unanswered(by)
    if tries:
        costs["maybe_billed"] = {"tries": tries, "tokens_at_most": tokens}
    return costs
