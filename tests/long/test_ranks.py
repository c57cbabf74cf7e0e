"""The command on several ranks: the run of one process, ranks that die or hang, and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from tests.runs.test_pipeline import ROOT, command, recipe_file  # noqa: F401 (a fixture)
from tests.training import test_ranks
from tests.training.test_ranks import assert_equal, results, states_server  # noqa: F401 (a fixture)

PATIENCE = 300  # seconds


def start(*arguments: object, torchrun: bool = False, ranks: int = 2, **faults: str) -> subprocess.Popen[str]:
    """`limbeck ARGUMENTS --ranks 2`, or the same by torchrun; read its output with `communicate`. `faults` are variables
    of `storage.files.crash_point`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **faults}
    program = (
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "limbeck"]
        if torchrun
        else ["limbeck"]
    )
    launched = [] if torchrun else ["--ranks", str(ranks)]
    return subprocess.Popen(
        [sys.executable, "-m", *program, *map(str, arguments), *launched],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(what: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.01)


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def rank(parent: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of a rank."""
    return next(p for p in psutil.Process(parent.pid).children() if p.environ().get("RANK") == str(number))


@pytest.fixture
def recipe(recipe_data, recipe_file):  # noqa: F811
    def write(machine=None, **train):
        recipe_data["train"] |= {"tokens_per_step": 150, **train}
        recipe_data["loss"] = ["forward_kl", {"cross_entropy": {"weight": 0.5}}]
        recipe_data["evaluate"]["metrics"] = ["fidelity"]
        recipe_data["machine"] = {"micro_tokens": 64, "threads": 1} | (machine or {})
        recipe_file.write_text(yaml.safe_dump(recipe_data))
        return recipe_file

    return write


def assert_same_student(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(home / "student" / "model.safetensors") for home in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (theirs[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-6, name


def assert_same_evaluation(folder: Path, other: Path) -> None:
    """The same items in the same order, whoever measured them, with figures of weights that differ by rounding."""
    files = sorted(file.name for file in folder.glob("*.jsonl") if file.stat().st_size)
    assert files == sorted(f.name for f in other.glob("*.jsonl") if f.stat().st_size) and len(files) > 10
    for name in files:
        ours, theirs = (
            [json.loads(line) for line in (home / name).read_text().splitlines()] for home in (folder, other)
        )
        keys = [[record.get("prompt_id", record.get("item")) for record in records] for records in (ours, theirs)]
        assert keys[0] == keys[1] and len(keys[0]) > 1, name
        if name.startswith(("fidelity", "free")):
            for one, two in zip(ours, theirs, strict=True):
                assert two["sums"] == pytest.approx(one["sums"], rel=1e-3, abs=1e-3), name
        elif "teacher" in name or "untouched" in name:  # the very same weights
            assert [record.get("text") for record in ours] == [record.get("text") for record in theirs], name


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_whole_run_is_that_of_one_process(recipe, tmp_path, shard, torchrun):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert command("run", recipe(), "--out", alone).returncode == 0
    run = start("run", recipe({"shard": shard}), "--out", together, "--json", torchrun=torchrun)
    out, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, err
    result = json.loads(out)
    assert result["run"] == str(together) and out.count("verdict") == 1
    assert err.count('"Training: student"') == 1, "one rank speaks"
    assert_equal(alone, together)
    assert_equal(alone / "controls" / "sft_control", together / "controls" / "sft_control")
    assert_same_student(alone, together)
    assert_same_evaluation(alone / "evaluation", together / "evaluation")
    files = [{str(file.relative_to(home)) for file in home.rglob("*")} for home in (alone, together)]
    apart = ("lock", "checkpoints/")  # of divided weights each rank writes a part
    assert not [name for name in files[0] ^ files[1] if not any(word in name for word in apart)]
    # it is done: nothing is trained again
    before = (together / "metrics.jsonl").stat().st_mtime_ns
    again = start("run", recipe({"shard": shard}), "--out", together)
    again.communicate(timeout=PATIENCE)
    assert again.returncode == 0
    assert (together / "metrics.jsonl").stat().st_mtime_ns == before


KINDS = {  # of training, as the command runs them: what the recipe has instead, and whether weights can be divided
    "groups with a reward": (
        {
            "writer": [{"by": "student", "max_tokens": 12}],
            "rollout": {"prompts": 3, "group": 3, "rewards": ["check", {"length": {"free": 4, "weight": 0.5}}]},
            # without a teacher the gradient of a step whose groups are equal is rounding, of which Adam makes a step
            "loss": ["ppo_clip", {"reverse_kl": {"weight": 0.5}}],
        },
        False,
    ),
    "minillm": (
        {
            "writer": [
                {"by": "teacher", "share": 0.5, "max_tokens": 12},
                {"by": "student", "share": 0.5, "max_tokens": 12},
            ],
            "rollout": {"joint": {"teacher_share": 0.2}},
            "loss": [
                {"reverse_kl": {"only": "student", "by": "importance_weight"}},
                "minillm_long",
                {"cross_entropy": {"only": "teacher"}},
            ],
        },
        False,
    ),
    "features": (
        {"loss": ["forward_kl", {"hidden_match": {"layers": "uniform", "embeddings": True, "weight": 0.05}}]},
        False,
    ),
    "top-k cache": ({"cache": {"top_k": {"k": 20}}, "loss": ["forward_kl"]}, True),
    "hidden cache": ({"cache": {"hidden": {}}, "loss": ["reverse_kl"]}, True),
    "adapters": ({"lora": {"rank": 4, "alpha": 8}, "loss": ["forward_kl"]}, True),
}
RUNS = [(kind, "none") for kind in KINDS] + [(kind, "full") for kind, (_, divides) in KINDS.items() if divides]


@pytest.mark.parametrize(("kind", "shard"), RUNS)
@pytest.mark.promise("R4")
def test_every_kind_of_training_on_2_and_4_ranks_is_that_of_one_process(
    recipe_data,
    recipe_file,  # noqa: F811
    tmp_path,
    kind,
    shard,
):
    changes = dict(KINDS[kind][0])
    if "cache" in changes:
        recipe_data["teacher"] = {"model": recipe_data["teacher"], "cache": changes.pop("cache")}
    if "lora" in changes:
        recipe_data["student"]["lora"] = changes.pop("lora")
    recipe_data |= changes
    recipe_data["train"] |= {"tokens_per_step": 150, "steps": 5, "lr": 1e-4}  # larger ones let rounding grow
    recipe_data["evaluate"] = {"metrics": ["fidelity"], "max_tokens": 12, "controls": [], "speeds": False} | {
        "prompts": recipe_data["evaluate"]["prompts"]
    }
    recipe_data["machine"] = {"micro_tokens": 48, "threads": 1}
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    alone = tmp_path / "alone"
    done = command("run", recipe_file, "--out", alone)
    assert done.returncode == 0, done.stderr
    recipe_data["machine"]["shard"] = shard
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    for ranks in (2, 4):
        together = tmp_path / str(ranks)
        run = start("run", recipe_file, "--out", together, ranks=ranks)
        _, err = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, err
        assert_equal(alone, together)
        assert_same_student(alone, together)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.promise("R10")
def test_a_rank_that_dies_ends_all_and_the_run_goes_on(recipe, tmp_path, number, shard):
    file, out = recipe({"shard": shard}, steps=300, save_seconds=0), tmp_path / "run"
    run = start("train", file, "--out", out)
    until(lambda: steps(out) > 5)
    rank(run, number).send_signal(signal.SIGKILL)
    begun = time.monotonic()
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2 and time.monotonic() - begun < 60
    assert err.count("limbeck:") == 1 and f"rank {number} ended with signal SIGKILL" in err and "Traceback" not in err
    kept = steps(out)
    again = start("train", recipe({"shard": shard}, steps=300, save_seconds=0), "--out", out)
    until(lambda: steps(out) > kept)
    again.send_signal(signal.SIGINT)
    _, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 2 and err.count("stopped") == 1, err


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.promise("R10")
def test_a_rank_that_hangs_ends_all_within_the_timeout(recipe, tmp_path, number):
    out = tmp_path / "run"
    run = start("train", recipe({"timeout": 20}, steps=100000), "--out", out)
    until(lambda: steps(out) > 2)
    rank(run, number).send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2 and time.monotonic() - begun < 90
    assert err.count("limbeck:") == 1 and "has not answered for 20 s" in err and "Traceback" not in err


STAGES = {  # (kind of training, whether weights are divided, where, the ranks that are lost there)
    "eliciting": ("off-policy", False, "elicit.after_record:5", (0,)),
    "caching the teacher": ("hidden cache", False, "directory.before_rename:2", (0,)),
    "training": ("off-policy", False, "train.after_step:3", (0, 1)),
    "training divided": ("off-policy", True, "train.after_step:3", (0, 1)),
    "writing for the student": ("groups with a reward", False, "rollout.after_write:2", (0, 1)),
    "saving": ("off-policy", False, "checkpoint.before_tensors:2", (0,)),
    "saving parts": ("off-policy", True, "checkpoint.before_part:2", (0, 1)),
    "exporting": ("off-policy", True, "directory.before_rename:5", (0,)),
    "evaluating": ("off-policy", False, "write answers-student.jsonl", (0,)),
    "reporting": ("off-policy", False, "write report.html", (0,)),
}
LOST = [(stage, lost, how) for stage, (*_, ranks) in STAGES.items() for lost in ranks for how in ("SIGKILL", "SIGSTOP")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing disturbs, by the kind of its training; made when it is first asked for."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(("stage", "lost", "how"), LOST)
@pytest.mark.promise("R3", "R10")
def test_a_rank_that_is_lost_in_any_stage_ends_all_and_the_run_goes_on(
    recipe_data,
    recipe_file,  # noqa: F811
    tmp_path,
    undisturbed,
    stage,
    lost,
    how,
):
    kind, divided, place, _ = STAGES[stage]
    changes = dict(KINDS[kind][0]) if kind in KINDS else {"loss": ["forward_kl"]}
    if "cache" in changes:
        recipe_data["teacher"] = {"model": recipe_data["teacher"], "cache": changes.pop("cache")}
    recipe_data |= changes
    recipe_data["train"] |= {"tokens_per_step": 150, "steps": 5, "lr": 1e-4, "save_seconds": 0}
    recipe_data["evaluate"] |= {"metrics": ["fidelity"], "max_tokens": 12, "controls": [], "speeds": False}
    recipe_data["machine"] = {"micro_tokens": 48, "threads": 1, "timeout": 20}
    recipe_data["machine"] |= {"shard": "full"} if divided else {}
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    faults = {"LIMBECK_CRASH_AT": place, "LIMBECK_CRASH_RANK": str(lost), "LIMBECK_CRASH_BY": how}
    begun = time.monotonic()
    run = start("run", recipe_file, "--out", tmp_path / "run", **faults)
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2 and time.monotonic() - begun < 120, err
    words = f"rank {lost} ended with signal SIGKILL" if how == "SIGKILL" else "has not answered for 20 s"
    assert err.count("limbeck:") == 1 and words in err and "Traceback" not in err, err
    again = start("run", recipe_file, "--out", tmp_path / "run")
    _, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, err
    clean = undisturbed / f"{kind} {divided}"
    if not clean.exists():
        whole = start("run", recipe_file, "--out", clean)
        _, err = whole.communicate(timeout=PATIENCE)
        assert whole.returncode == 0, err
    assert [line["loss"] for line in results(tmp_path / "run")] == [line["loss"] for line in results(clean)]
    assert_same_student(tmp_path / "run", clean)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.promise("R10")
def test_a_rank_that_is_lost_while_it_waits_ends_all(recipe_data, recipe_file, tmp_path, how):  # noqa: F811
    """Rank 0 elicits, and finds at the training that rank 1 is gone."""
    lines = [json.dumps({"id": f"q{n}", "prompt": f"count {n} cats on the mat"}) for n in range(400)]
    Path(recipe_data["prompts"]["from"]).write_text("\n".join(lines))
    recipe_data["machine"] = {"threads": 1, "timeout": 20}
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    run = start("run", recipe_file, "--out", tmp_path / "run")
    until(lambda: (tmp_path / "run" / "store.sqlite").exists())
    rank(run, 1).send_signal(signal.Signals[how])
    _, err = run.communicate(timeout=PATIENCE)
    words = "rank 1 ended with signal SIGKILL" if how == "SIGKILL" else "rank 1 has not answered for 20 s"
    assert run.returncode == 2 and words in err and err.count("limbeck:") == 1, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.promise("R14")
def test_a_stop_is_after_the_step_with_a_checkpoint(recipe, tmp_path, number):
    out = tmp_path / "run"
    run = start("train", recipe(steps=100000), "--out", out)
    until(lambda: steps(out) > 2)
    run.send_signal(number)
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2 and err.count("limbeck:") == 1 and "run it again to go on" in err, err
    last = results(out)[-1]["step"]
    assert (out / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()


def test_a_mistake_is_said_once(recipe, tmp_path):
    run = start(
        "run", recipe({"shard": "full"}), "--out", tmp_path / "run", "--set", "loss=[hidden_match]", torchrun=True
    )
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1 and err.count("limbeck:") == 1 and "machine.shard" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [2, 4])
def test_every_case_on_more_ranks(tmp_path, size, states_server):  # noqa: F811
    test_ranks.check(size, tmp_path, list(test_ranks.CASES))
