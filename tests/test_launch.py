"""docs/launch.md: its scripts are bash, its manifests fit together, and torch's launcher and Limbeck take what they are given."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from limbeck import cli
from tests.docs_text import DOCS, blocks

PAGE = (DOCS / "launch.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(cli.app).commands
MANIFESTS = {
    data.get("kind") or data.get("name", "teacher"): data for data in map(yaml.safe_load, blocks(PAGE, "yaml"))
}
SKY = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK"}  # that it sets
SLURM = {"SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_JOB_ID"}
VALUES = dict.fromkeys(SKY | SLURM, "2") | {"first": "node-1"}


def scripts():
    return [*blocks(PAGE, "bash"), MANIFESTS["limbeck"]["run"], MANIFESTS["limbeck"]["setup"]]


def launches():
    """What follows `torchrun` in every script and manifest."""
    for script in scripts():
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(
                re.sub(r"\$\{?(\w+)\}?", lambda found: VALUES.get(found[1], found[0]), line), comments=True
            )
            if "torchrun" in words:
                yield words[words.index("torchrun") + 1 :]
    yield container()["args"]


def container():
    (only,) = MANIFESTS["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def test_scripts_are_bash():
    assert len(scripts()) == 7
    for script in scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    bad = subprocess.run(["bash", "-n"], input="if true; then", text=True, capture_output=True)
    assert bad.returncode != 0


def test_torch_and_limbeck_take_every_argument():
    found = [get_args_parser().parse_args(words) for words in launches()]
    assert len(found) == 3
    for parsed in found:
        assert parsed.module and parsed.training_script == "limbeck"
        assert parsed.nnodes == "2" and parsed.nproc_per_node in ("2", "8") and parsed.shutdown_timeout == 300
        assert parsed.rdzv_endpoint.endswith(":29500") or parsed.master_port == 29500
        command, *args = parsed.training_script_args
        context = COMMANDS[command].make_context(command, list(args))
        assert str(context.params["out"]).startswith("/shared/")
        assert Path(DOCS.parent / context.params["recipe"]).is_file()
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nnode-count", "2"])


def test_variables_are_those_that_the_launchers_set():
    for script, known in ((MANIFESTS["limbeck"]["run"], SKY), (blocks(PAGE, "bash")[1], SLURM)):
        used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)\}?", script))
        assert used and used <= known, used


def test_slurm_asks_for_as_many_devices_as_there_are_ranks():
    script = blocks(PAGE, "bash")[1]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "one launcher on each machine"
    assert asked["gpus-per-node"] == re.search(r"--nproc-per-node (\d+)", script)[1]
    seconds = int(asked["signal"].removeprefix("TERM@"))
    assert seconds > int(re.search(r"--shutdown-timeout (\d+)", script)[1])
    assert script.startswith("#!/bin/bash\n#SBATCH"), "sbatch reads no settings after the first command"


def test_the_pods_find_each_other():
    service, job = MANIFESTS["Service"], MANIFESTS["Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(container()["args"][1])
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    parsed = get_args_parser().parse_args(container()["args"])
    assert parsed.rdzv_endpoint == first
    assert int(parsed.nproc_per_node) == container()["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["restartPolicy"] in ("Never", "OnFailure"), "a Job takes no other"
    assert pod["terminationGracePeriodSeconds"] > parsed.shutdown_timeout
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(word, str) for word in container()["args"])


def test_the_sky_task_has_what_one_needs():
    task = MANIFESTS["limbeck"]
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "setup", "run"}
    assert re.fullmatch(r"[A-Z0-9-]+:\d+", task["resources"]["accelerators"]) and task["num_nodes"] > 1


def test_no_key_stands_in_what_is_copied():
    for block in (*blocks(PAGE, "bash"), *blocks(PAGE, "yaml")):
        assert not re.search(r"LIMBECK_API_KEY[=:]\s*\S", block)
