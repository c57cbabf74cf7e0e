"""Estimates what a run will cost on a device: requests, tokens, disk, memory and time.

Counts of floating-point operations are the floor of dense decoders: 2 per weight and token forward, 4 more backward;
attention, norms and memory traffic come on top, so times are lower bounds stretched by the hardware's `overhead`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from limbeck.config.recipe import Recipe
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.step import Estimate
from limbeck.objectives.term import Term
from limbeck.runs.advice import served_time, training_cautions
from limbeck.runs.amounts import TextAmounts
from limbeck.runs.cluster import passing_teacher, predict, writing_time
from limbeck.runs.hardware import GIB, Hardware
from limbeck.runs.lengths import Lengths
from limbeck.runs.memory import (
    LIBRARY_BYTES,
    compute_dtype,
    disk_bytes,
    kept_bytes,
    models_bytes,
    teacher_precision,
)
from limbeck.runs.prediction import Prediction, Work
from limbeck.runs.rewarded import RewardedText, rewarded_bytes, rewarded_text
from limbeck.runs.shapes import Shape, Shapes, forward_flops, step_flops
from limbeck.training import controls
from limbeck.training.job import tokens_beside
from limbeck.types import STUDENTS

QUESTION_TOKENS = 400  # what a judge reads beside two answers, about
VERDICT_TOKENS = 100  # what a judge writes, about
SCORED_TOKENS = 200  # length of a text that is scored, about


def _forward(shape: Shape | None, tokens: int) -> float:
    return 0.0 if shape is None else forward_flops(shape, tokens, tokens)


def judging_flops(judge: Shape, questions: int, answer: int) -> float:
    """Floor of `questions` verdicts, each on two answers of `answer` tokens; half is added for decoding, as for the
    teacher."""
    return 1.5 * forward_flops(judge, questions * (QUESTION_TOKENS + 2 * answer), questions * VERDICT_TOKENS)


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a run.

    Args:
        notes: what was read from which file of prompts.
        answers: how long answers are taken to be, and why.
        unknown: the stages whose time, or a part of it, can't be told, and what can be said of it.
        cautions: what speaks against training so.
        rounds: how many rounds there are, each of which costs so much.
        judged: (answers, tokens) that the student writes and rewards judge, if they do.
        prediction: of the machines that it was made for, where their numbers are stated.
        texts: (prompts that are trained on, prompts that are held out); `limited` if prompts.limit allows no more.
        again: (requests, tokens) beside those, if every answer that may be asked for again is.
        text_cost: of the teacher's training and held-out text by its server's price, if it has one: `about`, `at_most`
            with what is asked for again, and the `tokens_read` and `tokens_written` of the former.
    """

    requests: int
    teacher_tokens: int
    trained_tokens: int
    steps: int
    trainings: int
    disk_bytes: int
    memory_bytes: int
    seconds: dict[str, float]
    device: str = "cpu"
    device_memory: int | None = None
    measured: bool = True
    notes: tuple[str, ...] = ()
    answers: str = ""
    unknown: Mapping[str, str] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
    rounds: int = 1
    judged: tuple[int, int] | None = None
    prediction: Prediction | None = None
    texts: tuple[int, int] = (0, 0)
    limited: bool = False
    again: tuple[int, int] = (0, 0)
    text_cost: Mapping[str, float] | None = None

    @property
    def cost(self) -> float | None:
        """Of all devices for all rounds, at the stated price; None without one."""
        return None if self.prediction is None else self.prediction.cost(self.rounds * sum(self.seconds.values()))

    def lines(self) -> list[tuple[str, str]]:
        all_minutes = self.rounds * sum(self.seconds.values()) / 60
        minutes = {stage: f"{value / 60:.1f} min" for stage, value in self.seconds.items()}
        limit = " (no more, by prompts.limit)" if self.limited else ""
        judged = "" if self.judged is None else "{:,}, of about {:,} tokens".format(*self.judged)
        return [
            *(("prompts", note) for note in self.notes),
            *([("rounds", f"{self.rounds}, and what follows is of each")] if self.rounds > 1 else []),
            ("texts", f"{self.texts[0]:,} trained{limit}, {self.texts[1]:,} held out"),
            ("requests to the teacher", f"{self.requests:,}{self._again(self.requests, self.again[0])}"),
            ("tokens it will write", f"about {self.teacher_tokens:,}{self._again(self.teacher_tokens, self.again[1])}"),
            *([] if self.text_cost is None else [("cost of the teacher's text", self._text_cost(self.text_cost))]),
            *([("length of an answer", self.answers)] if self.answers else []),
            ("trainings", f"{self.trainings} (the student{' and its control' if self.trainings > 1 else ''})"),
            ("steps of each", f"about {self.steps:,}"),
            *([("answers that rewards judge", judged)] if judged else []),
            ("trained tokens of each", f"about {self.trained_tokens:,}"),
            ("disk, at its peak", f"{self.disk_bytes / GIB:.1f} GiB{self._students()}"),
            ("device", self.device),
            ("peak memory", self._memory()),
            *(() if self.prediction is None else self.prediction.lines()),
            *((f"time, {stage}", text) for stage, text in {**minutes, **self._told()}.items()),
            ("time, all", f"{all_minutes:.0f} min {self._where()} (an estimate){self._beside()}"),
            *([] if self.cost is None else [("cost of the machines", self._cost())]),
            *(("note", caution) for caution in self.cautions),
        ]

    def _again(self, amount: int, more: int) -> str:
        return f" (at most {amount + more:,}, if every answer is asked for again)" if more else ""

    def _text_cost(self, cost: Mapping[str, float]) -> str:
        """In the currency of the stated price."""
        most = f" (at most {cost['at_most']:,.2f}, if every answer is asked for again)" if sum(self.again) else ""
        tokens = f"{cost['tokens_read']:,} tokens read, {cost['tokens_written']:,} written"
        return f"about {cost['about']:,.2f}{most}: about {tokens}"

    def _students(self) -> str:
        """What the students of the other rounds take."""
        return ", and a student for every other round" if self.rounds > 1 else ""

    def _told(self) -> dict[str, str]:
        """What is said of the stages whose time is not known, after what is."""
        known = {
            stage: f"{self.seconds[stage] / 60:.1f} min here, and: " for stage in self.unknown if stage in self.seconds
        }
        return {stage: known.get(stage, "") + text for stage, text in self.unknown.items()}

    def _beside(self) -> str:
        return ", and what the server takes" if self.unknown else ""

    @property
    def fits(self) -> bool:
        """Whether the device has as much memory; true where that is not known."""
        return self.device_memory is None or self.memory_bytes <= self.device_memory

    def _memory(self) -> str:
        needed = f"{self.memory_bytes / GIB:.1f} GiB"
        if self.device_memory is None:
            return needed
        there = "" if self.prediction is None else f" on each device, while {self.prediction.fullest}"
        room = f"{needed} of {self.device_memory / GIB:.0f} GiB{there}"
        cures = "teacher.dtype or teacher.quantise, student.lora, machine.checkpointing, machine.teacher_device"
        if self.prediction is not None and self.prediction.could_divide:
            cures = f"machine.shard: full, {cures}"
        return room if self.fits else f"{room}: TOO MUCH; it needs {cures}, or a larger device"

    def _cost(self) -> str:
        """In the currency of the stated price."""
        alone = sum(self.seconds.values()) - self.seconds["train"]
        share = alone / max(1e-9, sum(self.seconds.values()))
        return f"{self.cost:,.2f}, of which {share:.0%} while one device elicits and evaluates"

    def _where(self) -> str:
        if self.prediction is not None:
            return "there by the stated numbers"
        return "on this machine under its present load" if self.measured else f"on a {self.device} by its data sheet"

    def on(self, hardware: Hardware, dtype: torch.dtype) -> Plan:
        """The same plan with operations turned into seconds on this hardware."""
        rate = hardware.rate(dtype)
        return replace(
            self,
            seconds={stage: flops / rate for stage, flops in self.seconds.items()},
            device=hardware.name,
            device_memory=hardware.memory,
            measured=hardware.measured,
        )

    def as_dict(self) -> dict[str, Any]:
        facts = {key: value for key, value in vars(self).items() if key != "prediction"}
        told = {} if self.prediction is None else {"prediction": self.prediction.as_dict(), "cost": self.cost}
        return {
            **facts,
            **told,
            "fits": self.fits,
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }


def trained_controls(recipe: Recipe, terms: Sequence[Term]) -> list[str]:
    """The controls that are trained. Fine-tuning is no control of itself: that would be the same run twice."""
    plain = [(term.label, {key: schedule.start for key, schedule in term.params.items()}) for term in terms]
    by_others = all(writer.by not in (*STUDENTS, "student") for writer in recipe.writer)
    is_fine_tuning = plain == [("cross_entropy", {"label_smoothing": 0.0})] and not recipe.all_answer and by_others
    return controls.trained_controls(recipe, is_fine_tuning)


def _elicited(bills: Sequence[Estimate], lengths: Lengths) -> float:
    """Tokens that a model reads and writes in the steps of elicitation."""
    read = zip(lengths.questions, bills, strict=True)
    return sum(question * bill.requests + bill.tokens + SCORED_TOKENS * bill.scores for question, bill in read)


def _memory_bytes(
    recipe: Recipe, terms: Sequence[Term], shapes: Shapes, judge: Shape | None, *, hardware: Hardware
) -> int:
    """What the models take, the libraries, and a chunk of logits."""
    chunk = 0 if hardware.memory is None else 4 * hardware.memory // 64  # larger ones than on the CPU
    return int(models_bytes(recipe, terms, shapes, judge, hardware=hardware) + LIBRARY_BYTES + chunk)


def make_plan(
    recipe: Recipe,
    terms: Sequence[Term],
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    shapes: Shapes,
    *,
    hardware: Hardware,
    lengths: Lengths,
    bills: Sequence[Estimate] = (),
) -> Plan:
    """Estimate a run from the sizes alone; nothing is loaded. Where there is no teacher in process, its text costs no
    time here.

    Args:
        prompts: (training, held out).
        hardware: where it will run.
        lengths: of prompts and answers, as far as they are known.
        bills: what the steps of elicitation will ask for.
    """
    text, held_out = TextAmounts.of(recipe, prompts, lengths, bills), prompts[1]
    steps, epochs, rewarded = _steps(recipe, terms, text)
    trainings = 1 + len(trained_controls(recipe, terms))
    controls_write = trainings > 1 and not recipe.fixed_writers  # text of others that only the controls read
    cache = recipe.teacher.cache if shapes.teacher is not None else None
    # by a llama.cpp server; vLLM is asked once for each text
    scored = text.response_tokens if shapes.teacher is None and recipe.teacher.cache else 0
    judging = shapes.judge if recipe.evaluate.judge not in (None, recipe.teacher.model) else None
    as_training = recipe.student.scores or lengths.held_out_given  # given, or written as the training text is
    asked = round(text.by_teacher * len(held_out)) if as_training else len(held_out)
    requests = round(text.by_teacher * text.prompts) + asked + (text.prompts if controls_write else 0)
    teacher_tokens = int(text.by_teacher / text.by_all * text.response_tokens) + text.answer_tokens * asked
    disk = int(kept_bytes(cache, shapes.teacher, text.response_tokens)) + disk_bytes(recipe, shapes.student, trainings)
    beside = (text.tokens if controls_write else 0) + (0 if as_training else text.held_out_tokens)
    elicit = _elicit_flops(recipe, text, shapes, beside, elicited=_elicited(bills, lengths))
    read = requests * lengths.shown
    read += sum(each * bill.requests for each, bill in zip(lengths.questions, bills, strict=True))
    requests += sum(bill.requests for bill in bills) + scored
    teacher_tokens += sum(bill.tokens for bill in bills)
    made = Plan(
        requests=requests,
        teacher_tokens=teacher_tokens,
        trained_tokens=int(text.response_tokens * epochs),
        steps=steps,
        trainings=trainings,
        disk_bytes=disk,
        memory_bytes=_memory_bytes(recipe, terms, shapes, judging, hardware=hardware)
        + (int(rewarded_bytes(recipe, terms, shapes.student, shapes.scorers, hardware=hardware)) if rewarded else 0),
        seconds=({} if elicit == 0 else {"elicit": elicit})
        | {
            "train": _train_flops(recipe, terms, text, shapes, epochs=epochs, trainings=trainings, rewarded=rewarded),
            **_evaluate_flops(recipe, text, shapes, len(held_out)),
        },
        answers=f"about {text.response_tokens / (text.prompts * text.by_all):,.0f} tokens ({lengths.source})",
        unknown=served_time(recipe, requests, teacher_tokens + int(read)),
        cautions=training_cautions(recipe, steps, epochs, text.response_tokens),
        judged=None if rewarded is None else rewarded.judged(text.response_tokens / text.prompts),
    )
    if hardware.cluster is None:
        return made.on(hardware, compute_dtype(recipe))
    return _predicted(made, recipe, terms, shapes, text=text, hardware=hardware, rewarded=rewarded, epochs=epochs)


def _steps(recipe: Recipe, terms: Sequence[Term], text: TextAmounts) -> tuple[int, float, RewardedText | None]:
    """(steps of a training, how often they read the text, the answers that rewards judge)."""
    settings = recipe.train
    row_tokens = tokens_beside(recipe) or settings.tokens_per_step
    steps = settings.steps or max(1, round((settings.epochs or 1) * text.response_tokens / row_tokens))
    rewarded = rewarded_text(recipe, terms, steps)
    if rewarded is not None:
        return steps, rewarded.trained / text.prompts, rewarded
    return steps, steps * settings.tokens_per_step / text.response_tokens, None


def _work(
    recipe: Recipe, text: TextAmounts, shapes: Shapes, *, steps: int, epochs: float, rewarded: RewardedText | None
) -> Work:
    """A step of the student's training."""
    answers = text.prompts * text.by_all
    prompt, answer = text.prompt_tokens / answers, text.response_tokens / answers
    tokens, responses = text.tokens * epochs / steps, text.response_tokens * epochs / steps
    writer, settings = recipe.student_writer, recipe.rollout
    if writer is None or (settings is not None and settings.through is not None):
        return Work(tokens, responses)
    written = recipe.written_share * responses / answer
    read, further = written * prompt, 0.0
    if rewarded is not None:
        written, read = rewarded.written / steps, rewarded.asked * prompt / steps
        further = rewarded.reference_flops(shapes.student, prompt, answer) / steps
    return Work(tokens, responses, written, read, prompt=prompt, answer=answer, most=writer.max_tokens, further=further)


def _predicted(
    made: Plan,
    recipe: Recipe,
    terms: Sequence[Term],
    shapes: Shapes,
    *,
    text: TextAmounts,
    hardware: Hardware,
    rewarded: RewardedText | None,
    epochs: float,
) -> Plan:
    """A plan, whose seconds are still operations, on the machines that `hardware` is a device of: rank 0 alone does all
    but train."""
    work = _work(recipe, text, shapes, steps=made.steps, epochs=epochs, rewarded=rewarded)
    controls = made.trainings - 1
    prediction = predict(recipe, terms, shapes, work, hardware=hardware, steps=made.steps, controls=controls)
    own, settings = compute_dtype(recipe), teacher_precision(recipe)
    seconds = made.on(hardware, own).seconds
    answers = text.prompts * text.by_all
    prompt, answer = text.prompt_tokens / answers, text.response_tokens / answers
    if shapes.teacher is not None and "elicit" in seconds:
        writing = writing_time(
            hardware, shapes.teacher, settings, answers=made.teacher_tokens / answer, prompt=prompt, answer=answer
        )
        operations = made.seconds["elicit"] / hardware.rate(settings.dtype)
        seconds["elicit"] = max(operations, writing.seconds)
    alone = 0.0
    if shapes.teacher is not None and recipe.teacher.cache is not None:
        alone += _forward(shapes.teacher, text.tokens) / hardware.rate(settings.dtype)
    if rewarded is not None:
        alone += rewarded.judging_flops(shapes.scorers, prompt, answer) / hardware.rate(own)
    seconds["train"] = prediction.seconds(made.steps, controls) + alone
    return replace(
        made,
        seconds=seconds,
        device=prediction.cluster.in_words + (", weights divided among all" if prediction.divided else ""),
        device_memory=prediction.cluster.memory_bytes,
        memory_bytes=prediction.memory_bytes,
        measured=False,
        prediction=prediction,
    )


def _elicit_flops(recipe: Recipe, text: TextAmounts, shapes: Shapes, beside: int, *, elicited: float) -> float:
    """What the writers' text costs here, which a server's does not, with what the teacher writes beside the training
    text; written tokens count half more than read ones."""
    by_teacher = text.by_teacher / text.by_all * text.tokens + beside + elicited
    by_untouched = int(text.by_untouched / text.by_all * text.tokens * 1.5)
    writer = shapes.teacher if recipe.teacher.server is None else None
    return _forward(writer, int(by_teacher * 1.5)) + forward_flops(shapes.student, by_untouched, by_untouched)


def _train_flops(
    recipe: Recipe,
    terms: Sequence[Term],
    text: TextAmounts,
    shapes: Shapes,
    *,
    epochs: float,
    trainings: int,
    rewarded: RewardedText | None,
) -> float:
    """The training of the student and of its controls, with what the student writes and what a cache is filled with."""
    tokens = int(text.tokens * epochs)
    trained = int(text.response_tokens * epochs)
    teacher = passing_teacher(recipe, terms, shapes)
    flops = step_flops(shapes.student, teacher, tokens, trained)
    flops += (trainings - 1) * step_flops(shapes.student, None, tokens, trained)
    if recipe.machine.checkpointing:  # the backward pass computes the activations again
        flops += trainings * forward_flops(shapes.student, tokens, 0)
    if shapes.teacher is not None and recipe.teacher.cache is not None:  # once, whatever the number of epochs
        flops += _forward(shapes.teacher, text.tokens)
    if rewarded is not None:
        prompt, answer = (amount / text.prompts for amount in (text.prompt_tokens, text.response_tokens))
        return flops + rewarded.flops(shapes.student, shapes.scorers, prompt, answer)
    written = int(recipe.written_share * (tokens + trained))
    return flops + 1.5 * forward_flops(shapes.student, written, written)


def _evaluate_flops(recipe: Recipe, text: TextAmounts, shapes: Shapes, held_out: int) -> dict[str, float]:
    systems = 2 + len(recipe.evaluate.controls)
    shape = shapes.teacher or shapes.student
    flops = {"evaluate": systems * 2.5 * forward_flops(shape, text.held_out_tokens, text.held_out_tokens)}
    if shapes.judge is not None:  # each pair in both orders, against every system but the student
        flops["judge"] = judging_flops(shapes.judge, 2 * (systems - 1) * held_out, text.answer_tokens)
    return flops
