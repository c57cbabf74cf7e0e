"""Faults that were planted in a copy of the source are each caught by the tests of their promise: what a test never
fails for, it does not prove."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """In `file` of the package, `right` becomes `wrong`; `tests` must fail then, and pass without."""

    file: str
    right: str
    wrong: str
    tests: str


BEGIN = '        crash_point("checkpoint.before_tensors")\n'
WEIGHTS = '        with full_disk_as_os_error():\n            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new / WHOLE)\n        hashes = parts(new)\n        crash_point("checkpoint.before_manifest")\n'
SEAL = '        seal(new, {"step": step, "state": dict(state)}, sha256=lambda file: hashes.get(file.name) or _sha256(file))\n'
FAULTS = {
    "the manifest is written before the weights": Fault(
        "storage/checkpoint.py",
        BEGIN + WEIGHTS + SEAL,
        BEGIN + "        hashes: dict[str, str] = {}\n" + SEAL + WEIGHTS,
        "tests/storage/test_checkpoint.py",
    ),
    "a checkpoint is visible before it is whole": Fault(
        "storage/checkpoint.py",
        'with new_directory(folder / f"step-{step:08d}") as new:',
        'new = folder / f"step-{step:08d}"\n    new.mkdir(exist_ok=True)\n    with __import__("contextlib").nullcontext():',
        "tests/storage/test_checkpoint.py",
    ),
    "random numbers are not restored in training": Fault(
        "training/loop.py",
        "        torch.manual_seed(_seed(job, step) + RANK_STRIDE * distributed.rank())\n",
        "",
        "tests/training/test_loop.py -k dropout",
    ),
    "random numbers of the writing student go on from the process": Fault(
        "models/generate.py",
        "generator = torch.Generator().manual_seed(job.seed)",
        "generator = torch.default_generator",
        "tests/models/test_generate.py",
    ),
    "a key without the model's identity": Fault(
        "types.py", '            "model": self.model,\n', "", "tests/storage tests/runs/test_teacher_prompt.py -k key"
    ),
    "retries are doubled": Fault(
        "models/api.py",
        "Backoff(self.settings.retries + 1)",
        "Backoff(2 * (self.settings.retries + 1))",
        "tests/models/test_api.py",
    ),
    "a field of the page is not escaped": Fault(
        "report/page.py", "autoescape=True", "autoescape=False", "tests/report -m 'not browser'"
    ),
    "keys are redacted before what is received is decoded": Fault(
        "models/http.py",
        "return None if self.truncated else read_json(self.body)",
        "return None if self.truncated else read_json(without_key(self.body.decode(), self.key).encode())",
        "tests/models/test_http.py",
    ),
    "keys are redacted as they are spelt alone": Fault(
        "models/http.py", "_spellings(key).sub(", "re.compile(re.escape(key)).sub(", "tests/models/test_http.py"
    ),
    "a model is told by the edges of its weights": Fault(
        "models/fingerprint.py",
        "return _by_edges(folder) if NAMING.by_edges else contents(folder)[:32]",
        "return _by_edges(folder)",
        "tests/models/test_fingerprint.py",
    ),
}


def outcome(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *shlex.split(tests)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The source in a folder of its own."""
    folder = tmp_path_factory.mktemp("planted") / "limbeck"
    folder.mkdir()
    for name in ("limbeck", "tests", "recipes", "tasks", "seeds", "machines", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(copy, name):
    fault = FAULTS[name]
    file = copy / "limbeck" / fault.file
    right = file.read_text()
    assert right.count(fault.right) == 1, "the place of the fault has changed"
    assert outcome(copy, fault.tests).returncode == 0
    try:
        file.write_text(right.replace(fault.right, fault.wrong))
        done = outcome(copy, fault.tests)
    finally:
        file.write_text(right)
    assert done.returncode == 1, f"nothing fails:\n{done.stdout[-2000:]}"
    assert "ImportError" not in done.stdout and "NameError" not in done.stdout, done.stdout[-2000:]
