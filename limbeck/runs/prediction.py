"""What a run takes of a cluster, as `runs.cluster` predicts it: memory, steps, bytes on the wire, and their words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from limbeck.config.cluster import Cluster
from limbeck.runs.hardware import GIB
from limbeck.runs.memory import Parts

LOADING, TRAINING, WRITING = "models are loaded whole", "it trains", "the student writes"
JUDGING = "a judge compares answers"
PASSES, TEXT, WIRE, UPDATE = "passes", "text of the student", "wire", "update of the weights"


@dataclass(frozen=True)
class Work:
    """A step of the student's training, over all ranks.

    Args:
        tokens, responses: of its rows with their prompts, and the response tokens among them.
        written: answers that the student writes for it.
        read: tokens of prompts that it reads to write them.
        prompt, answer: tokens of one, on average.
        most: tokens of an answer at most.
        further: operations of passes beside the student's and the teacher's.
    """

    tokens: float
    responses: float
    written: float = 0.0
    read: float = 0.0
    prompt: float = 0.0
    answer: float = 1.0
    most: int = 1
    further: float = 0.0


class Share(NamedTuple):
    """Seconds of a part of a step, and the stated number that bounds it."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Prediction:
    """What a run takes of a cluster.

    Args:
        memory: bytes of a rank by what they hold, in each phase.
        step, control_step: the parts of a step of the student, and of a control.
        sent: bytes that a rank sends in a step of the student; `all_sent` in all trainings.
        micro_batches: of a step, each of about `micro_tokens` tokens.
    """

    cluster: Cluster
    divided: bool
    memory: dict[str, Parts]
    step: dict[str, Share]
    control_step: dict[str, Share]
    sent: float
    all_sent: float
    micro_batches: int
    micro_tokens: int

    @property
    def fullest(self) -> str:
        """The phase that takes most memory."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def could_divide(self) -> bool:
        """Whether dividing the weights would help: they are not, and are what fills the devices."""
        return self.cluster.devices > 1 and not self.divided and self.fullest != LOADING

    @property
    def memory_bytes(self) -> int:
        return int(sum(self.memory[self.fullest].values()))

    @property
    def step_seconds(self) -> float:
        return sum(share.seconds for share in self.step.values())

    @property
    def bound(self) -> str:
        """The part of a step that takes longest."""
        return max(self.step, key=lambda part: self.step[part].seconds)

    def seconds(self, steps: int, controls: int) -> float:
        """Of all trainings."""
        return steps * (self.step_seconds + controls * sum(share.seconds for share in self.control_step.values()))

    def cost(self, seconds: float) -> float | None:
        """All devices for so long; None without a price."""
        price = self.cluster.price_per_hour
        return None if price is None else seconds / 3600 * self.cluster.devices * price

    def lines(self) -> list[tuple[str, str]]:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory[self.fullest].items() if size)
        shares = ", ".join(f"{part} {_seconds(share.seconds)}" for part, share in self.step.items() if share.seconds)
        bound = self.step[self.bound]
        lines = [
            ("of which", f"{parts} GiB"),
            ("a step", f"{_seconds(self.step_seconds)}: {shares}"),
            ("bound by", f"{bound.limit} ({self.bound}, {bound.seconds / self.step_seconds:.0%} of a step)"),
        ]
        if self.sent:
            hidden = _seconds(self._least_seconds())
            lines.append(
                (
                    "sent by each device",
                    f"{_gigabytes(self.sent)} a step, {_gigabytes(self.all_sent)} in all; a step took {hidden} if it"
                    " were hidden behind passes",
                )
            )
        idle = self.cluster.devices - self.micro_batches
        if idle > 0:
            lines.append(
                (
                    "idle in training",
                    f"{idle} of {self.cluster.devices} devices: a step is {self.micro_batches} micro-batch"
                    f"{'es' if self.micro_batches > 1 else ''} of {self.micro_tokens:,} tokens; give it more"
                    " train.tokens_per_step",
                )
            )
        return lines

    def _least_seconds(self) -> float:
        """A step if the wire and the passes went on at once."""
        wire, passes = self.step[WIRE].seconds, self.step[PASSES].seconds
        return self.step_seconds - wire - passes + max(wire, passes)

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        for name in ("step", "control_step"):
            facts[name] = {part: share._asdict() for part, share in getattr(self, name).items()}
        return {
            **facts,
            "cluster": self.cluster.model_dump(),
            "devices": self.cluster.devices,
            "memory_bytes": self.memory_bytes,
            "fullest": self.fullest,
            "step_seconds": self.step_seconds,
            "bound": self.step[self.bound].limit,
        }


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:,.0f} GB" if value >= 1e11 else f"{value / 1e9:.3g} GB"
