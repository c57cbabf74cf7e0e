"""What is measured, in words: titles, units and which way is better. Summaries carry this, so that pages need no code
of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from limbeck.evaluate.tasks import Task

Better = Literal["low", "high", "none"]
HELD_OUT = "Fidelity on held-out text of the teacher"
OWN = "On text that it writes itself"


@dataclass(frozen=True)
class Metric:
    title: str
    unit: str
    better: Better
    group: str


METRICS = {
    "forward_kl": Metric("Forward KL", "nats a token", "low", HELD_OUT),
    "reverse_kl": Metric("Reverse KL", "nats a token", "low", HELD_OUT),
    "jsd": Metric("Jensen-Shannon", "nats, at most 0.69", "low", HELD_OUT),
    "tvd": Metric("Total variation", "0 to 1", "low", HELD_OUT),
    "top1_agreement": Metric("Same first choice", "share of tokens", "high", HELD_OUT),
    "top5_overlap": Metric("Common among first five", "share", "high", HELD_OUT),
    "perplexity": Metric("Perplexity", "of the teacher's text", "low", HELD_OUT),
    "entropy": Metric("Entropy", "nats a token", "none", HELD_OUT),
    "agree_when_wrong": Metric("Same error as the teacher", "share of its errors", "none", HELD_OUT),
    "ece": Metric("Calibration error", "ECE, 10 bins, first choices", "low", HELD_OUT),
    "own_forward_kl": Metric("Forward KL", "nats a token", "low", OWN),
    "own_reverse_kl": Metric("Reverse KL", "nats a token", "low", OWN),
    "own_top1_agreement": Metric("Same first choice", "share of tokens", "high", OWN),
    "own_teacher_perplexity": Metric("Teacher's perplexity", "of its text", "low", OWN),
    "own_entropy": Metric("Entropy", "nats a token", "none", OWN),
    "own_tokens": Metric("Length", "tokens an answer", "none", OWN),
    "own_finished": Metric("Finished", "share of answers", "none", OWN),
    "own_repetition": Metric("Repetition", "share of 4-grams", "low", OWN),
}
NLLS = {  # what perplexities are compared by
    "nll": Metric("Negative log-likelihood", "nats a token", "low", HELD_OUT),
    "own_teacher_nll": Metric("Teacher's negative log-likelihood", "nats a token", "low", OWN),
}


def described(names: Sequence[str], tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Title, unit, direction and group of every named metric; `TASK/METRIC` are the tasks' own."""
    by_name = {task.name: task for task in tasks}
    found = {}
    for name in names:
        task_name, _, measure = name.rpartition("/")
        task = by_name.get(task_name)
        metric = METRICS.get(name) or NLLS.get(name)
        if metric is None:
            better = task.better(measure) if task else "none"
            title = task.title(measure) if task else measure.replace("_", " ").capitalize()
            metric = Metric(title, "", better, f"Task {task_name}")
        found[name] = asdict(metric)
    return found
