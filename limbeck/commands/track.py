"""Experiment trackers: trackio, tensorboard, wandb and mlflow are told what `metrics.jsonl` and the evaluation say.

A tracker follows the run folder instead of the training: it is brought up to date every few seconds, and
`tracking.json` keeps how far it got. So a run that goes on after a kill goes on there too, and a finished run can be
sent later. No step stands twice, but for a kill in the moment between telling the tracker and noting it. Each training
is a run of its own in the tracker, with the same names of numbers, so that their curves lie over each other.

Not covered: keys. Where a service wants one, its own library finds it; it is never read, stored or printed here.
"""

from __future__ import annotations

import importlib.util
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from limbeck.progress import Reporter
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import Metrics, evaluation, is_number, read_json, trainings, values_of
from limbeck.types import UserError, nearest

SECONDS_BETWEEN = 5.0
CREDENTIALS = re.compile(r"//[^/@\s]+@")  # name and password inside an address


@dataclass(frozen=True)
class Place:
    """Where a tracker's run belongs: the run folder, the recipe's name, the training's name, and its settings (numbers
    and the recipe's hash; never a path or an address). `known` is the id that the tracker gave this run before, if it
    did."""

    folder: Path
    project: str
    training: str
    settings: dict[str, Any]
    known: str | None


class Sink(Protocol):
    """One run inside a tracker. `id` finds it again in a later process."""

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def results(self, values: dict[str, float], step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under RUN/tensorboard/TRAINING: `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = place.training
        self._writer = SummaryWriter(str(place.folder / "tensorboard" / place.training))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def results(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in trackio's local database (its TRACKIO_DIR): `trackio show`."""

    def __init__(self, place: Place) -> None:
        import trackio

        self.id = place.known or f"{place.training}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=place.project, name=self.id, resume="allow", config=place.settings, embed=False
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def results(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, place: Place) -> None:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled") and not wandb.login(prompt=False):
            # it would wait for one to be typed
            raise ConnectionError("it knows no key; run `wandb login`, or set WANDB_MODE=offline")
        self.id = place.known or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=place.project,
            name=place.training,
            id=self.id,
            resume="allow",
            reinit="create_new",
            dir=str(place.folder),
            config=place.settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def results(self, values: dict[str, float], step: int) -> None:  # noqa: ARG002
        """To the run's summary: wandb drops a row whose step it has seen, as in a run that goes on."""
        self._run.summary.update(values)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says."""

    def __init__(self, place: Place) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if place.known is None:
            found = self._client.get_experiment_by_name(place.project)
            experiment = found.experiment_id if found else self._client.create_experiment(place.project)
            self.id = self._client.create_run(experiment, run_name=place.training).info.run_id
            for name, value in place.settings.items():
                self._client.log_param(self.id, name, value)
        else:
            self.id = place.known

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.id, name, value, step=step)

    def results(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self.id)


TRACKERS: dict[str, Callable[[Place], Sink]] = {
    "mlflow": Mlflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check(name: str) -> None:
    """Refuse a tracker that can't be used, before anything is spent.

    Raises:
        UserError: no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise UserError(f"--track: no tracker is named {name!r}{nearest(name, TRACKERS)}")
    if not installed(name):
        package = "limbeck[track]" if name in ("tensorboard", "trackio") else name
        raise UserError(f"--track {name}: it is not installed; pip install {package}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Tracked:
    """A reporter that passes everything on and brings a tracker up to date on the way.

    Nothing is told before the first stage: until then the folder may be refused, or be another process's.
    A tracker that fails is reported once and left alone from then on; the work goes on.
    """

    def __init__(self, reporter: Reporter, folder: Path, tracker: str) -> None:
        check(tracker)
        self.reporter = reporter
        self.folder = folder
        self.tracker = tracker
        self.begun = False
        self.failed = False
        self.last = 0.0
        self.metrics: dict[str, Metrics] = {}
        self.sinks: dict[str, Sink] = {}

    def stage(self, title: str) -> None:
        self.begun = True
        self._update()
        self.reporter.stage(title)

    def progress(self, done: int, total: int, detail: str = "") -> None:
        self.reporter.progress(done, total, detail)
        if time.monotonic() - self.last >= SECONDS_BETWEEN:
            self._update()

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def close(self) -> None:
        """Tell the rest and end the tracker's runs. The reporter inside is its maker's to close."""
        self._update()
        self._guarded(self._close_sinks)

    def _update(self) -> None:
        if self.begun:
            self._guarded(self._send)
        self.last = time.monotonic()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 (any fault of a foreign service: it must not end the training)
            self.failed = True
            reason = CREDENTIALS.sub("//", next(iter(str(error).splitlines()), ""))[:300]
            self.reporter.note(
                f"{self.tracker} failed and is not told any more; the run goes on ({type(error).__name__}: {reason})"
            )

    def _send(self) -> None:
        """All that is new in the folder. What was sent is noted after the tracker has it."""
        file = self.folder / "tracking.json"
        state = (read_json(file) or {}).get(self.tracker, {})
        before = repr(state)
        for name, place in trainings(self.folder).items():
            told = state.setdefault(name, {"step": 0})
            for record in self.metrics.setdefault(name, Metrics(place / "metrics.jsonl")).update():
                if record["step"] > told["step"]:
                    self._sink(name, told).log(values_of(record), record["step"])
                    told["step"] = record["step"]
        for name, values in evaluation(self.folder).items():
            told = state.setdefault(name, {"step": 0})
            if not told.get("evaluated"):
                self._sink(name, told).results(
                    {f"evaluation/{metric}": value for metric, value in values.items()}, told["step"]
                )
                told["evaluated"] = True
        if repr(state) != before:
            for sink in self.sinks.values():
                sink.flush()
            write_json(file, (read_json(file) or {}) | {self.tracker: state})

    def _sink(self, name: str, told: dict[str, Any]) -> Sink:
        if name not in self.sinks:
            recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text())
            settings = {key: value for key, value in recipe.get("train", {}).items() if is_number(value)}
            self.sinks[name] = TRACKERS[self.tracker](
                Place(self.folder, recipe["name"], name, settings, told.get("id"))
            )
            told["id"] = self.sinks[name].id
        return self.sinks[name]

    def _close_sinks(self) -> None:
        for sink in self.sinks.values():
            sink.close()
