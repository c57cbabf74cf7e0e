"""Send the numbers of `metrics.jsonl` and of the evaluation to a tracker: trackio, tensorboard, wandb or mlflow.

A tracker follows the run folder, not the training: it is brought up to date every few seconds, and `tracking.json`
records how far it got. So tracking resumes with a killed run, and a finished run can be sent later. No step is sent
twice, except after a kill in the moment between sending and recording it. Each training is a run of its own in the
tracker, with the same metric names, so that their curves can be compared.

Not covered: keys. If a service needs one, its own library finds it; it is never read, stored or printed here.
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

from limbeck.config.yaml_text import read_yaml
from limbeck.progress import Reporter
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import Metrics, evaluation, is_number, read_json, trainings, values_of
from limbeck.storage.rounds import rounds_in
from limbeck.types import UserError, nearest

SECONDS_BETWEEN = 5.0
MAX_REASON = 300
CREDENTIALS = re.compile(r"//[^/@\s]+@")  # name and password inside an address


@dataclass(frozen=True)
class RunInfo:
    """What a tracker gets to know of a training.

    `settings` are numbers only, never a path or an address. `previous_id` is the tracker's id of this run if an earlier
    process began it.
    """

    folder: Path
    project: str
    training: str
    settings: dict[str, Any]
    previous_id: str | None


class Sink(Protocol):
    """One run in a tracker. A later process continues it by its `id`."""

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def results(self, values: dict[str, float], step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under RUN/tensorboard/TRAINING: `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = info.training
        self._writer = SummaryWriter(str(info.folder / "tensorboard" / info.training))

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

    def __init__(self, info: RunInfo) -> None:
        import trackio

        self.id = info.previous_id or f"{info.training}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(project=info.project, name=self.id, resume="allow", config=info.settings, embed=False)

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

    def __init__(self, info: RunInfo) -> None:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled") and not wandb.login(prompt=False):
            # wandb.init would wait for a key to be typed
            raise ConnectionError("it has no key; run `wandb login`, or set WANDB_MODE=offline")
        self.id = info.previous_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=info.project,
            name=info.training,
            id=self.id,
            resume="allow",
            reinit="create_new",
            dir=str(info.folder),
            config=info.settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def results(self, values: dict[str, float], step: int) -> None:  # noqa: ARG002
        """Write to the run's summary: wandb drops a row whose step it already has, as in a resumed run."""
        self._run.summary.update(values)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, info: RunInfo) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if info.previous_id is None:
            experiment = self._client.get_experiment_by_name(info.project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(info.project)
            self.id = self._client.create_run(experiment_id, run_name=info.training).info.run_id
            for name, value in info.settings.items():
                self._client.log_param(self.id, name, value)
        else:
            self.id = info.previous_id

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.id, name, value, step=step)

    def results(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self.id)


TRACKERS: dict[str, Callable[[RunInfo], Sink]] = {
    "mlflow": Mlflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check(name: str) -> None:
    """Refuse a tracker that can't be used.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise UserError(f"--track: there is no tracker named {name!r}{nearest(name, TRACKERS)}")
    if not installed(name):
        package = "limbeck[track]" if name in ("tensorboard", "trackio") else name
        raise UserError(f"--track {name}: it is not installed; pip install {package}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class TrackingReporter:
    """A reporter that passes everything on to another one, and keeps a tracker up to date.

    Nothing is sent before the first stage: until then the folder may be refused, or belong to another process. A
    tracker that fails is reported once and not used any more; the work goes on.
    """

    def __init__(self, reporter: Reporter, folder: Path, tracker: str) -> None:
        check(tracker)
        self.reporter = reporter
        self.folder = folder
        self.tracker = tracker
        self.started = False
        self.failed = False
        self.last = 0.0
        self.metrics: dict[str, Metrics] = {}
        self.sinks: dict[str, Sink] = {}

    def stage(self, title: str) -> None:
        self.started = True
        self._update()
        self.reporter.stage(title)

    def progress(self, done: int, total: int, detail: str = "") -> None:
        self.reporter.progress(done, total, detail)
        if time.monotonic() - self.last >= SECONDS_BETWEEN:
            self._update()

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def close(self) -> None:
        """Send what is left and end the tracker's runs. Whoever made the inner reporter closes it."""
        self._update()
        self._guarded(self._close_sinks)

    def _update(self) -> None:
        if self.started:
            self._guarded(self._send)
        self.last = time.monotonic()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 (any fault of a foreign service: it must not end the training)
            self.failed = True
            reason = CREDENTIALS.sub("//", next(iter(str(error).splitlines()), ""))[:MAX_REASON]
            self.reporter.note(
                f"{self.tracker} failed and is not used any more; the run goes on ({type(error).__name__}: {reason})"
            )

    def _send(self) -> None:
        """Send everything new in the folder. `tracking.json` is written after the tracker has it."""
        file = self.folder / "tracking.json"
        states = (read_json(file) or {}).get(self.tracker, {})
        before = repr(states)
        for name, place in self._trainings().items():
            state = states.setdefault(name, {"step": 0})
            for record in self.metrics.setdefault(name, Metrics(place / "metrics.jsonl")).update():
                if record["step"] > state["step"]:
                    self._sink(name, state).log(values_of(record), record["step"])
                    state["step"] = record["step"]
        for name, values in self._evaluation().items():
            state = states.setdefault(name, {"step": 0})
            if not state.get("evaluated"):
                results = {f"evaluation/{metric}": value for metric, value in values.items()}
                self._sink(name, state).results(results, state["step"])
                state["evaluated"] = True
        if repr(states) != before:
            for sink in self.sinks.values():
                sink.flush()
            write_json(file, (read_json(file) or {}) | {self.tracker: states})

    def _homes(self) -> dict[str, Path]:
        """The folders of the run, or of its rounds, by what stands before the names of their trainings."""
        return {f"round-{n}-": home for n, home in rounds_in(self.folder).items()} or {"": self.folder}

    def _trainings(self) -> dict[str, Path]:
        homes = self._homes().items()
        return {before + name: place for before, home in homes for name, place in trainings(home).items()}

    def _evaluation(self) -> dict[str, dict[str, float]]:
        homes = self._homes().items()
        return {before + name: values for before, home in homes for name, values in evaluation(home).items()}

    def _sink(self, name: str, state: dict[str, Any]) -> Sink:
        """The tracker's run for this training, opened when first needed."""
        if name not in self.sinks:
            recipe = read_yaml(self.folder / "recipe.yaml")
            settings = {key: value for key, value in recipe.get("train", {}).items() if is_number(value)}
            info = RunInfo(
                folder=self.folder,
                project=recipe["name"],
                training=name,
                settings=settings,
                previous_id=state.get("id"),
            )
            self.sinks[name] = TRACKERS[self.tracker](info)
            state["id"] = self.sinks[name].id
        return self.sinks[name]

    def _close_sinks(self) -> None:
        for sink in self.sinks.values():
            sink.close()
