"""What a distillation is worth, as far as items tell: the share of the teacher's score, and how long a request is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from limbeck.data.batches import Row
from limbeck.evaluate.records import SystemRecords
from limbeck.evaluate.statistics import ratio_interval
from limbeck.evaluate.summary import columns, describe
from limbeck.evaluate.task import Task


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
