"""A checkpoint is whole or invisible: killed at every point, damaged at every file."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.storage import checkpoint
from limbeck.types import UserError

ROOT = Path(__file__).parent.parent.parent


def save(folder, step):
    checkpoint.save(folder, step, {"w": torch.full((3,), float(step))}, {"job": "j", "step": step})


def test_round_trip_and_retention(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    found = checkpoint.load_newest(tmp_path)
    assert found.step == 5 and found.tensors["w"].tolist() == [5.0] * 3 and found.state == {"job": "j", "step": 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "folder"])
@pytest.mark.promise("R1")
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    tensors = tmp_path / "step-00000002" / "tensors.safetensors"
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "manifest":
        (tmp_path / "step-00000002" / "manifest.json").write_text('{"step": 2,')
    else:
        (tmp_path / "step-00000003").mkdir()
        tensors.unlink()
    assert checkpoint.load_newest(tmp_path).step == 1


@pytest.mark.promise("R1")
def test_every_flip_in_a_manifest_is_seen(tmp_path):
    """A manifest that says something else gives the checkpoint before, or the same state; never another one."""
    checkpoint.save(tmp_path, 1, {"w": torch.zeros(2)}, {"job": "j", "lr": 0.25, "left": [1, 2]})
    checkpoint.save(tmp_path, 2, {"w": torch.ones(2)}, {"job": "j", "lr": 0.5, "left": [2]})
    file = tmp_path / "step-00000002" / "manifest.json"
    content = file.read_bytes()
    skipped = 0
    for place in range(len(content)):
        for bit in (0, 2, 5):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            found = checkpoint.load_newest(tmp_path)
            assert found.step == 1 or (found.step, found.state) == (2, {"job": "j", "lr": 0.5, "left": [2]})
            skipped += found.step == 1
    assert skipped > 2 * len(content)


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    assert checkpoint.load_newest(tmp_path).state == {"job": "j", "step": 1}
    file.write_text(json.dumps({**manifest, "sha25": "0" * 64}))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("damage", ["tensors", "manifest", "empty"])
@pytest.mark.promise("R2")
def test_what_is_damaged_does_not_count_among_those_that_are_kept(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    both = {"tensors": "tensors.safetensors", "manifest": "manifest.json"}
    for name in both.values() if damage == "empty" else [both[damage]]:
        file = tmp_path / "step-00000002" / name
        content = bytearray(file.read_bytes())
        content[-4] ^= 1
        file.write_bytes(b"" if damage == "empty" else content)
        os.utime(file, (1, 1))
    save(tmp_path, 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003"]
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    checkpoint.prune(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("R2")
@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_in_between_the_newest_two_whole_ones_stay(tmp_path, seed):
    rng, whole = random.Random(seed), []
    for step in range(1, 25):
        save(tmp_path, step)
        whole = [*whole, step][-2:]
        there = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
        assert there.issuperset(whole), "what was whole when the newest was saved"
        assert checkpoint.load_newest(tmp_path).step == step
        if rng.random() < 0.5:
            hit = rng.choice(whole)
            file = tmp_path / f"step-{hit:08}" / rng.choice(["tensors.safetensors", "manifest.json"])
            file.write_bytes(file.read_bytes()[:-2])
            whole.remove(hit)


def test_what_a_kill_left_half_removed_goes_when_a_training_is_done(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / f".step-00000000.{'0' * 32}.old"
    left.mkdir()
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_when_none_is_whole_the_user_is_told(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_newest(tmp_path)


def test_parts_of_several_processes_are_read_whole(tmp_path):
    """Rows in the order of the processes, of which one may have none; a part that is missing or changed is a damage."""
    rows = torch.arange(15.0).reshape(5, 3)
    shares = rows[:3], rows[3:], rows[5:]

    def parts(new):
        return dict(checkpoint.save_part(new, {"v": share}, number, of=3) for number, share in enumerate(shares))

    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.ones(2)}, {}, parts=parts)
    newest = checkpoint.load_newest(tmp_path)
    assert sorted(newest.tensors) == ["v", "w"] and len(newest.tensors) == 2 and torch.equal(newest.tensors["v"], rows)
    with pytest.raises(KeyError):
        newest.tensors["x"]
    part = tmp_path / "step-00000002" / "part-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    assert checkpoint.load_newest(tmp_path).step == 1
    part.unlink()
    assert checkpoint.load_newest(tmp_path).step == 1


def crash_points() -> list[str]:
    """Every crash point named in the code, so that a new one can't escape the matrix."""
    found = set()
    for file in (ROOT / "limbeck").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "crash_point"
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    return sorted(found)


SAVE_POINTS = [name for name in crash_points() if name.startswith(("checkpoint.", "directory."))]
SCRIPT = """
import sys, torch
from pathlib import Path
from limbeck.storage import checkpoint
for step in (1, 2, 3):
    part = lambda new: dict([checkpoint.save_part(new, {"v": torch.ones(3)}, 0, of=1)])
    checkpoint.save(Path(sys.argv[1]), step, {"w": torch.full((3,), float(step))}, {}, parts=part)
"""


@pytest.mark.parametrize("point", SAVE_POINTS)
@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.promise("R1")
def test_killed_at_every_point_the_previous_or_the_new_one_is_there(tmp_path, point, time):
    environment = {**os.environ, "LIMBECK_CRASH_AT": f"{point}:{time}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=False)
    assert done.returncode == 137
    found = checkpoint.load_newest(tmp_path)
    after_commit = point == "checkpoint.before_prune"
    assert (found.step if found else 0) == (time if after_commit else time - 1)
    save(tmp_path, 9)
    assert checkpoint.load_newest(tmp_path).step == 9 and not list(tmp_path.glob(".*"))


def test_the_matrix_knows_its_points():
    assert {
        "checkpoint.before_tensors",
        "checkpoint.before_part",
        "checkpoint.before_manifest",
        "checkpoint.before_prune",
        "directory.before_rename",
    } <= set(SAVE_POINTS)


def test_every_point_of_the_package_is_one_that_a_test_kills_at():
    """Not only those of a save: a new one without a test fails here."""
    texts = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    points = crash_points()
    assert len(points) >= 10 and len(points) > len(SAVE_POINTS)
    for point in set(points) - set(SAVE_POINTS):
        assert any(re.search(rf'"{re.escape(point)}[:"]', text) for text in texts), point
