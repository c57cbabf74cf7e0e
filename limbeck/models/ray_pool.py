"""The workers of `workers.py` on a Ray cluster: one that runs, or one that is started on this machine for the run."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from limbeck.config.machine import Workers
from limbeck.models.placement import is_out_of_memory
from limbeck.models.weights import first_line
from limbeck.models.workers import Answer, LostWorkerError, ModelOnWorker, WorkerCall
from limbeck.types import Request, UserError

CONNECT_SECONDS = 10
HOMES = frozenset({"LIMBECK_HOME", "HF_HOME"})  # variables that say where models are


def check_ray() -> None:
    """Refuse workers where Ray is not installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("ray") is None:
        raise UserError("machine.workers: Ray is not installed: pip install 'limbeck[scale]', or leave workers out")


class ModelWorker:
    """Runs in a process of its own."""

    def __init__(self, model: ModelOnWorker, settings: Workers) -> None:
        torch.set_num_threads(settings.cpus)
        self.teacher = model.load(settings.gpus)

    def answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        numbers = {id(request): number for number, request in enumerate(requests)}
        for request, generated in self.teacher.answers(requests):
            yield numbers[id(request)], generated


@dataclass(eq=False)
class _RayCall:
    stream: Any

    def next(self) -> Answer | None:
        import ray

        try:
            answer: Answer = ray.get(next(self.stream))
        except StopIteration:
            return None
        except ray.exceptions.RayError as error:
            raise _meaning(error) from error
        return answer


def _meaning(error: Exception) -> Exception:
    """What an error of Ray's says: the worker's own refusal, what it can't load or hold, or that it died."""
    cause, text = getattr(error, "cause", None), str(error)
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if isinstance(cause, (RuntimeError, MemoryError)) and is_out_of_memory(cause):
        return UserError(
            f"machine.workers: memory ran out on a worker ({first_line(cause)}): give each more of it, or shorten"
            " max_tokens"
        )
    if "UserError: " in text:  # raised while the worker loaded its model
        return UserError(text.rpartition("UserError: ")[2].strip())
    if getattr(error, "actor_init_failed", False) or "failed to import on the worker" in text:
        last = text.strip().splitlines()[-1]
        return UserError(
            f"machine.workers: a worker can't start ({last}): install the same Limbeck on every machine of the cluster"
        )
    return LostWorkerError(first_line(error)) if cause is None else error


class RayPool:
    """Workers on a Ray cluster, which is started or joined when the first is.

    Raises:
        UserError: Ray is not installed, the cluster can't be reached, or has too few processors or devices.
    """

    def __init__(self, model: ModelOnWorker, settings: Workers) -> None:
        check_ray()
        self.model = model
        self.settings = settings
        self._has_room = False
        self._owns = False

    def start(self) -> Any:
        import ray

        if not ray.is_initialized():
            _join(self.settings)
            self._owns = self.settings.cluster is None
        settings = self.settings
        if not self._has_room:  # those that take the place of others wait for it
            _check_room(settings)
            self._has_room = True
        options: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_restarts": 0}
        if settings.cluster is not None and (variables := {name: os.environ[name] for name in HOMES & set(os.environ)}):
            options["runtime_env"] = {"env_vars": variables}
        return ray.remote(ModelWorker).options(**options).remote(self.model, settings)

    def ask(self, worker: Any, requests: Sequence[Request]) -> _RayCall:
        return _RayCall(worker.answers.options(num_returns="streaming").remote(list(requests)))

    def ready(self, calls: Sequence[WorkerCall], seconds: float) -> list[WorkerCall]:
        import ray

        by_stream = {call.stream: call for call in calls if isinstance(call, _RayCall)}
        there, _ = ray.wait(list(by_stream), timeout=seconds)
        return [by_stream[stream] for stream in there]

    def stop(self, worker: Any) -> None:
        import ray

        ray.kill(worker)

    def settle(self) -> None:
        import ray

        if self._owns:  # a cluster of this process alone
            ray.shutdown()
            self._owns = False


def _check_room(settings: Workers) -> None:
    """Refuse more workers than the cluster could ever run at once."""
    import ray

    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            by_gpus = has.get("GPU", 0) // settings.gpus if settings.gpus else math.inf
            room += int(min(has.get("CPU", 0) // settings.cpus, by_gpus))
    if room < settings.count:
        raise UserError(
            f"machine.workers: the cluster has room for {room} workers of {settings.cpus} CPUs and {settings.gpus} GPUs"
            f" each, and {settings.count} are asked for: lower count, cpus or gpus"
        )


def _join(settings: Workers) -> None:
    """Join the cluster that the settings name, or start one of this machine's processors and devices, for this process
    alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = signal.getsignal(signal.SIGTERM)  # Ray replaces it, and would end the run without a word
    try:
        _connect(settings)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _connect(settings: Workers) -> None:
    import ray

    try:
        if settings.cluster is None:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, settings.count * settings.cpus),  # processes may share a processor
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
            return
        if settings.cluster != "auto":  # Ray itself waits for minutes
            host, _, port = settings.cluster.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        elif "://" in os.environ.get("RAY_ADDRESS", ""):
            raise UserError("RAY_ADDRESS names a client's port: name the cluster's own, such as head:6379")
        ray.init(address=settings.cluster, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises many kinds
        if settings.cluster is None:
            raise UserError(f"machine.workers: Ray does not start on this machine ({first_line(error)})") from error
        raise UserError(
            f"machine.workers.cluster: {settings.cluster} can't be reached ({first_line(error)}): start Ray there"
            " (ray start --head), or leave cluster out for one on this machine"
        ) from error
