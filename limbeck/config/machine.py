"""Where a recipe runs: its `machine` section, or a file of its own. None of it is part of the recipe's hash: the same
run goes on elsewhere, or with other sizes. What changes numbers (precision, quantisation) is in `train` and `teacher`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from limbeck.config.cluster import Cluster
from limbeck.config.section import Section

Device = Annotated[str, Field(pattern=r"^(auto|[a-z]+(:[0-9]+)?)$")]


class Workers(Section):
    """Processes on a Ray cluster that write the teachers' text, each with a model of its own (docs/launch.md).

    Args:
        count: how many; each holds the model that it is asked for, beside the one in this process.
        cluster: the address of a running cluster, `auto` for the one on this machine; by default one is started here
            for the run.
        cpus: of each, and so its torch threads on a CPU.
        gpus: 1 puts each model on a device of its own, 0 on the CPU.
    """

    count: Annotated[int, Field(ge=1, le=4096)]
    cluster: Annotated[str, Field(pattern=r"^(auto|[A-Za-z0-9_.\[\]:-]+:[0-9]+)$")] | None = None
    cpus: Annotated[int, Field(ge=1, le=1024)] = 1
    gpus: Literal[0, 1] = 0


class Machine(Section):
    """Devices and sizes. A size that is left out follows from the device's memory.

    Args:
        device: of the student and of everything else: auto, cpu, cuda, cuda:1, mps, ...; auto takes the first CUDA
            device, or the CPU.
        teacher_device: of the teachers, where they have one of their own.
        attention: transformers' name of the attention that the models use, such as sdpa or flash_attention_2.
        checkpointing: compute the student's activations again in the backward pass instead of storing them.
        micro_tokens: tokens (with padding) of one forward pass in training.
        cache_gib: memory for keys and values while a model writes.
        head_mib: memory for one chunk of logits.
        threads: of torch on the CPU; by default one for each core. On a machine that others use, 1 is often fastest.
        answers: the folder in which runs share their teachers' answers, or `none`; by default $LIMBECK_STORE, else
            limbeck/answers in ~/.local/share.
        shard: with several ranks (docs/ranks.md), `full` divides weights, gradients and moments among them while they
            train (FSDP2); with `none` each rank holds the whole models.
        workers: processes on a Ray cluster that write the text of the teachers whose weights are here.
        timeout: seconds after which a rank that does not answer ends the run on all.
        cluster: the numbers of machines that are not here, from which `limbeck check` predicts; a run reads none of it.
    """

    device: Device = "auto"
    teacher_device: Device | None = None
    attention: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] | None = None
    checkpointing: bool = False
    micro_tokens: Annotated[int, Field(ge=16)] | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    head_mib: Annotated[float, Field(ge=1)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    answers: Annotated[str, Field(min_length=1)] | None = None
    shard: Literal["none", "full"] = "none"
    workers: Workers | None = None
    timeout: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 600
    cluster: Cluster | None = None
