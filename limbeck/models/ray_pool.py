"""The workers of `workers.py` on a Ray cluster: one that runs, or one that is started on this machine for the run."""

from __future__ import annotations

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
from limbeck.models.weights import first_line
from limbeck.models.workers import Answer, LostWorkerError, ModelOnWorker, WorkerCall
from limbeck.types import Request, UserError

CONNECT_SECONDS = 10


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
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except ray.exceptions.RayError as error:
            raise _lost(error) from error
        return answer


def _lost(error: Exception) -> Exception:
    """What an error of Ray's says: the model's own refusal, or that the worker died."""
    text = str(error)
    if "UserError: " in text:  # raised while the worker loaded its model
        return UserError(text.rpartition("UserError: ")[2].strip())
    return LostWorkerError(first_line(error))


class RayPool:
    """Workers on a Ray cluster, which is started or joined when the first is.

    Raises:
        UserError: Ray is not installed, the cluster can't be reached, or has too few processors or devices.
    """

    def __init__(self, model: ModelOnWorker, settings: Workers) -> None:
        check_ray()
        self.model = model
        self.settings = settings

    def start(self) -> Any:
        import ray

        if not ray.is_initialized():
            _join(self.settings)
        settings = self.settings
        has, wants = ray.cluster_resources(), {"CPU": settings.cpus, "GPU": settings.gpus}
        for kind, each in wants.items():
            if has.get(kind, 0) < each * settings.count:
                raise UserError(
                    f"machine.workers: {settings.count} workers take {each * settings.count} of the cluster's"
                    f" {kind}s, and it has {has.get(kind, 0):g}: lower count, cpus or gpus"
                )
        options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_restarts": 0}
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
    try:
        if settings.cluster != "auto":  # Ray itself waits for minutes
            host, _, port = settings.cluster.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=settings.cluster, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises many kinds
        raise UserError(
            f"machine.workers.cluster: {settings.cluster} can't be reached ({first_line(error)}): start Ray there"
            " (ray start --head), or leave cluster out for one on this machine"
        ) from error
