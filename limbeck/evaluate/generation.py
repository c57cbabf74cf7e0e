"""Generation: the system writes, greedily or sampled; verifiers and references judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.verify import verify
from limbeck.evaluate.items import GenerationSettings, parse_prompt
from limbeck.evaluate.likelihood import prompt_ids
from limbeck.evaluate.metrics import TaskMetric
from limbeck.evaluate.records import CheckedAnswer, ItemResult, Progress
from limbeck.evaluate.statistics import pass_at_k
from limbeck.evaluate.task import GreedyAnswers, HarnessForm, PromptDraw, Task, TaskKind, WriteAnswers
from limbeck.evaluate.thinking_budget import BudgetedAnswer, answers_within
from limbeck.evaluate.thinking_settings import BUDGETED, ThinkingSettings, budget_metrics
from limbeck.evaluate.wording import rouge_l
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model
from limbeck.types import Sampling, UserError, content_hash


def answer_all(
    system: Model, prompts: Sequence[Prompt], max_tokens: int, progress: Progress = lambda done, total: None
) -> list[CheckedAnswer]:
    """The system's greedy answers, in the order of the prompts, each judged by its check."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    jobs = [GenerationJob(system.prompt_ids(prompt.messages), sampling, 0) for prompt in prompts]
    return _answer_jobs(system, prompts, jobs, progress)


def _answer_jobs(
    system: Model, prompts: Sequence[Prompt], jobs: Sequence[GenerationJob], progress: Progress
) -> list[CheckedAnswer]:
    """The answer of every job; job i asks prompt i."""
    answers: dict[int, CheckedAnswer] = {}
    for index, ids in generate(system.net, jobs, system.eos_ids, vocab_size=system.vocab_size):
        prompt = prompts[index]
        text = system.opens_thinking(jobs[index].prompt_ids) + system.decode(ids)
        answers[index] = CheckedAnswer(
            prompt_id=prompt.id,
            kind=prompt.kind,
            text=text,
            tokens=len(ids),
            finished=ids[-1] in system.eos_ids,
            passed=verify(prompt.check, text),
            answered=after_thinking(text) is not None,
        )
        progress(len(answers), len(jobs))
    return [answers[index] for index in range(len(jobs))]


def score_answers(task: Task, write: WriteAnswers, answers: GreedyAnswers) -> list[ItemResult]:
    """One result per prompt, the mean over its draws, so that resampling items keeps the draws of a prompt together.

    Args:
        write: the answers to (prompt, seed) in their order; the prompt's text is still to be put into the task's
            template.
        answers: used where the task shares them.
    """
    settings: GenerationSettings = task.protocol
    if "rouge_l" in task.metrics:
        rouge_l("a word", ["a word"])  # a missing package is reported before anything is written
    shared = answers.by_prompt if task.shares_answers else {}
    draws = [(prompt, seed) for prompt in task.prompts if prompt.id not in shared for seed in settings.draws]
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens or answers.max_tokens)
    new: dict[str, list[CheckedAnswer]] = {}
    for answer in write(draws, sampling):
        new.setdefault(answer.prompt_id, []).append(answer)
    return [
        _prompt_result(prompt, new.get(prompt.id) or [shared[prompt.id]], settings, task.metrics)
        for prompt in task.prompts
    ]


def _prompt_result(
    prompt: Prompt, answers: Sequence[CheckedAnswer], settings: GenerationSettings, metrics: Sequence[str]
) -> ItemResult:
    draws: list[dict[str, Any]] = [
        {
            "seed": seed,
            "text": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
            "passed": answer.passed,
            "answered": answer.answered,
        }
        for seed, answer in zip(settings.draws, answers, strict=True)
    ]
    scores = _scores(prompt, draws, settings, "rouge_l" in metrics)
    return ItemResult(prompt.id, scores, text=answers[0].text, facts=_facts(draws))


def _scores(
    prompt: Prompt, draws: Sequence[dict[str, Any]], settings: GenerationSettings, compare: bool
) -> dict[str, float]:
    """The means over the draws of a prompt. To `compare` them with the references also adds to the draws."""
    scores = {name: _mean(draws, name) for name in ("finished", "answered", "tokens")}
    if prompt.check is not None:
        scores["pass_rate"] = _mean(draws, "passed")
        passed = sum(bool(draw["passed"]) for draw in draws)
        scores |= {f"pass@{k}": pass_at_k(len(draws), passed, k) for k in settings.pass_at}
    if prompt.answers and compare:
        for draw in draws:
            said = after_thinking(draw.get("said", draw["text"])) or ""
            draw["rouge_l"] = rouge_l(said, prompt.answers, stemmer=settings.stemmer)
        if draws[0]["rouge_l"] is not None:  # None for references without a word that ROUGE knows
            scores["rouge_l"] = _mean(draws, "rouge_l")
    return scores


def _facts(draws: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> dict[str, Any]:
    if len(draws) > 1:
        return {"draws": draws}
    return {key: draws[0][key] for key in ("tokens", "finished", "passed", "answered", *more)}


def _scored_within(task: Task, system: Model, max_tokens: int, progress: Progress) -> list[ItemResult]:
    """One result per prompt with its scores at every budget; the text is that of the largest."""
    settings: GenerationSettings = task.protocol
    thinking = settings.thinking
    assert thinking is not None
    draws = [(prompt, seed) for prompt in task.prompts for seed in settings.draws]
    jobs = _jobs(task, system, draws, Sampling(settings.temperature, settings.top_p, max_tokens))
    asked = [prompt for prompt, _ in draws]
    total = len(thinking.levels) * len(jobs)
    by_budget: dict[int, list[BudgetedAnswer]] = {}
    for most in thinking.levels:
        report = partial(_report_more, progress, len(by_budget) * len(jobs), total)
        by_budget[most] = answers_within(
            system, asked, jobs, thinking, most=most, max_tokens=max_tokens, progress=report
        )
    return [_result_within(task, thinking, by_budget, number) for number in range(len(task.prompts))]


def _report_more(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _result_within(
    task: Task, thinking: ThinkingSettings, by_budget: Mapping[int, Sequence[BudgetedAnswer]], number: int
) -> ItemResult:
    """The result on the prompt of this number."""
    settings: GenerationSettings = task.protocol
    prompt, count = task.prompts[number], len(settings.draws)
    compare = any(name.startswith("rouge_l") for name in task.metrics)
    scores: dict[str, float] = {}
    facts: dict[str, Any] = {}
    text = ""
    for most, answers in by_budget.items():
        own = answers[number * count : (number + 1) * count]
        draws = [{"seed": seed} | vars(answer) for seed, answer in zip(settings.draws, own, strict=True)]
        found = _scores(prompt, draws, settings, compare) | {name: _mean(draws, name) for name in BUDGETED}
        scores |= {f"{name}{thinking.suffix(most)}": value for name, value in found.items()}
        facts[str(most)] = _facts(draws, ("text", *BUDGETED, "forced_tokens", "waits"))
        text = own[0].text
    return ItemResult(prompt.id, scores, text=text, facts={"budgets": facts})


def _jobs(task: Task, system: Model, draws: Sequence[PromptDraw], sampling: Sampling) -> list[GenerationJob]:
    return [
        GenerationJob(
            prompt_ids(system, task.protocol, {"prompt": prompt.text}),
            sampling,
            int(content_hash([prompt.id, seed])[:15], 16),
        )
        for prompt, seed in draws
    ]


def _mean(draws: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(draw[key]) for draw in draws) / len(draws)


class GenerationKind(TaskKind):
    name = "generation"
    settings = GenerationSettings
    metrics = {  # noqa: RUF012
        "pass_rate": TaskMetric("Pass rate", "high"),
        "pass": TaskMetric("Pass", "high"),
        "rouge_l": TaskMetric("ROUGE-L", "high"),
        "finished": TaskMetric("Finished", "none"),
        "answered": TaskMetric("Came to an answer", "high"),
        "tokens": TaskMetric("Length in tokens", "none"),
        "thinking_tokens": TaskMetric("Thinking in tokens", "none"),
        "cut_thinking": TaskMetric("Thinking ended by its budget", "none"),
    }
    takes_references = True

    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> Prompt:
        return parse_prompt(data, ident, place)

    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        settings: GenerationSettings = task.protocol
        if settings.thinking is not None:
            if any(name.startswith("rouge_l") for name in task.metrics):
                rouge_l("a word", ["a word"])  # a missing package is reported before anything is written
            limit = settings.max_tokens or answers.max_tokens
            return _scored_within(task, system, limit, progress)

        def write(draws: Sequence[PromptDraw], sampling: Sampling) -> list[CheckedAnswer]:
            jobs = _jobs(task, system, draws, sampling)
            return _answer_jobs(system, [prompt for prompt, _ in draws], jobs, progress)

        return score_answers(task, write, answers)

    def score_by_text(self, task: Task, write: WriteAnswers, answers: GreedyAnswers) -> list[ItemResult]:
        settings: GenerationSettings = task.protocol
        if settings.format != "chat" or settings.thinking is not None:
            return []

        def write_filled(draws: Sequence[PromptDraw], sampling: Sampling) -> Sequence[CheckedAnswer]:
            filled = [(replace(prompt, text=settings.fill({"prompt": prompt.text})), seed) for prompt, seed in draws]
            return write(filled, sampling)

        return score_answers(task, write_filled, answers)

    def possible_metrics(self, settings: GenerationSettings, items: Sequence[Prompt]) -> list[str]:
        checked = any(prompt.check is not None for prompt in items)
        compared = any(prompt.answers for prompt in items)
        passes = ["pass_rate", *(f"pass@{k}" for k in settings.pass_at)] if checked else []
        names = [*passes, *(["rouge_l"] if compared else []), "finished", "answered", "tokens"]
        return names if settings.thinking is None else budget_metrics(names, settings.thinking)

    def shares_answers(self, settings: GenerationSettings) -> bool:
        return settings.shares_answers

    def change_question(self, item: Prompt, change: Callable[[str], str]) -> Prompt:
        return replace(item, text=change(item.text))

    def harness_form(self, task: Task, max_tokens: int) -> HarnessForm:
        """Greedy answers, judged by the prompts' own checks; an answer without a check counts nowhere."""
        settings: GenerationSettings = task.protocol
        checks = {prompt.id: prompt.check for prompt in task.prompts}
        if settings.thinking is not None:
            raise UserError(f"{task.name}: its thinking is held to a budget, which the harness can't do")
        if settings.temperature > 0:
            raise UserError(
                f"{task.name}: its answers are sampled, and other random numbers give other answers; only greedy ones"
                " compare"
            )
        if not any(checks.values()):
            raise UserError(f"{task.name}: none of its prompts has a check, so there is nothing to count")

        def judge(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
            passed = verify(checks[doc["id"]], replies[0])
            return {} if passed is None else {"pass_rate": float(passed)}

        docs = [{"id": prompt.id, "prompt": settings.fill({"prompt": prompt.text})} for prompt in task.prompts]
        config = {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "",
            "target_delimiter": "",
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": settings.max_tokens or max_tokens},
            "process_results": judge,
            "metric_list": [{"metric": "pass_rate", "aggregation": "mean", "higher_is_better": True}],
        }
        return HarnessForm(docs, settings.format == "chat", config)
