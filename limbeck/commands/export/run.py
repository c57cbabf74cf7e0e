"""`limbeck export`: a trained student as a GGUF file, for Ollama, or as a clean Hugging Face folder.

Every export is opened again and compared with the student before it gets its name; one that is not the student leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from limbeck.commands.export.check import (
    INSTALL,
    Asked,
    ask_student,
    can_check,
    check_kl,
    compare_file,
    log_probs,
    measured,
)
from limbeck.commands.export.ollama import modelfile
from limbeck.commands.export.student import Exportable, find_student
from limbeck.models.export import export as save_student
from limbeck.models.folder import quiet, read_config, read_weights, save_model
from limbeck.models.load import load_model, load_tokenizer
from limbeck.models.model import Model
from limbeck.models.to_gguf.types import FileType, file_type
from limbeck.models.to_gguf.write import check_room, write_gguf
from limbeck.progress import Reporter
from limbeck.storage.files import exclusive, file_sha256, new_directory, remove_directory, sweep, write_json, write_text
from limbeck.types import UserError, content_hash, nearest

FORMS = ("gguf", "ollama", "hf")
FOLDER_TYPES = {"f32": (torch.float32, 0.001), "f16": (torch.float16, 0.01), "bf16": (torch.bfloat16, 0.05)}
RECORD = "export.json"
WRITTEN = 2  # raised where a GGUF file is written otherwise, so that one that was kept is not served for it
BESIDE = ("README.md", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class Job:
    """One export: what, in which form, how it is reported, and whether it was asked to stop."""

    student: Exportable
    form: str
    kind: str
    reporter: Reporter
    stop: Callable[[], bool] = lambda: False

    def progress(self, done: int, total: int, detail: str = "") -> None:
        if self.stop():
            raise UserError("stopped; nothing was written, run it again")
        self.reporter.progress(done, total, detail)


def export(
    where: str | Path,
    form: str,
    kind: str | None,
    out: Path | None,
    reporter: Reporter,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Export a student into a new folder.

    Args:
        where: a run folder, or a model's folder in Hugging Face form.
        form: one of FORMS.
        kind: how its weights are stored; by default f16 in a GGUF file, and as they are in a folder.
        out: the new folder. By default `exports/FORM-TYPE` in the run folder, else `NAME-FORM-TYPE` here.

    Returns:
        What `export.json` holds, and where it is.

    Raises:
        UserError: something that the user can mend, or an export that is not the student.
    """
    if form not in FORMS:
        raise UserError(f"--to {form}: there is no such form{nearest(form, FORMS)}; there are {', '.join(FORMS)}")
    student = find_student(where)
    if form != "hf":
        kind = file_type(kind or "f16").name
    elif kind is not None and (kind := kind.lower()) not in FOLDER_TYPES:
        raise UserError(f"--type {kind} is none of a folder's ({', '.join(FOLDER_TYPES)}); --to gguf makes others")
    target = out or _default(student, form, kind)
    _check_target(target)
    with _alone(student):
        return _export(Job(student, form, kind or "", reporter=reporter, stop=stop), target)


def _export(job: Job, target: Path) -> dict[str, Any]:
    with _whole(job.student) as student_folder, new_directory(target) as folder:
        job = replace(job, student=replace(job.student, folder=student_folder))
        record = _export_folder(job, folder) if job.form == "hf" else _export_file(job, folder)
        write_json(folder / RECORD, record)
    return {"folder": str(target), **record}


@contextlib.contextmanager
def _alone(student: Exportable) -> Iterator[None]:
    """One export of a run at a time; what a killed one left half-written is removed."""
    if student.run is None:
        yield
        return
    with exclusive(student.run / "exports" / ".lock", wait=True):
        sweep(student.run / "exports")
        yield


def exported_once(run: Path, reporter: Reporter) -> tuple[str, Path]:
    """The name and the GGUF file (f16) of a run's student; exported unless a file of these very weights is there.

    Raises:
        UserError: the folder is no run, its student can't be exported, or the export is not the student.
    """
    student = find_student(run)
    if student.run is None:
        raise UserError(f"{run} is not a run folder: `limbeck export {run} --to gguf` makes a file to serve")
    target = student.run / "exports" / f"served-{content_hash([WRITTEN, student.content])[:16]}"
    with _alone(student):
        if not target.is_dir():
            for old in target.parent.glob("served-*"):
                remove_directory(old)
            _export(Job(student, "gguf", "f16", reporter=reporter), target)
    return student.name, next(target.glob("*.gguf"))


def _check_target(target: Path) -> None:
    if target.suffix == ".gguf":
        raise UserError(f"--out {target} is the name of a file: give a folder, which is made and gets the files")
    if target.exists():
        raise UserError(f"{target} exists: remove it, or give another --out")
    there = next(parent for parent in target.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, so {target} can't be made: give another --out")


def _default(student: Exportable, form: str, kind: str | None) -> Path:
    name = f"{form}-{kind}" if kind else form
    return student.run / "exports" / name if student.run else Path(f"{student.name}-{name}")


@contextlib.contextmanager
def _whole(student: Exportable) -> Iterator[Path]:
    """The student's folder; of a folder of adapters, a temporary one with the adapters folded into their base."""
    if not student.is_adapters:
        yield student.folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(str(student.folder))
        save_model(model.net, model.tokenizer, Path(scratch))
        del model
        yield Path(scratch)


def _export_file(job: Job, folder: Path) -> dict[str, Any]:
    """A GGUF file, with a Modelfile for Ollama."""
    kind = file_type(job.kind)
    file = folder / f"{job.student.name}-{kind.name}.gguf"
    job.reporter.stage(f"writing {file.name}")
    with quiet():
        write_gguf(job.student.folder, file, kind, name=job.student.name, progress=job.progress)
    record: dict[str, Any] = {"form": job.form, "type": kind.name, **_facts(file), "weights": job.student.content}
    if job.form == "ollama":
        record |= _write_modelfile(job, folder, file)
    if can_check():
        record["agreement"] = _check(job, file, kind)
    else:
        record["agreement"] = None
        record["note"] = INSTALL
    return record


def _check(job: Job, file: Path, kind: FileType) -> dict[str, Any]:
    job.reporter.stage("comparing it with the student")
    model = load_model(str(job.student.folder))
    found = compare_file(model, file, job.student.prompts, kind.most_kl)
    if not found["same_prompt_tokens"]:
        job.reporter.note(f"llama.cpp's chat endpoint is not the student's: {found['prompt_tokens_differ']}")
    return found


def _write_modelfile(job: Job, folder: Path, file: Path) -> dict[str, Any]:
    from transformers import GenerationConfig

    with quiet():
        model = load_model(str(job.student.folder))
        settings: Any = model.net.generation_config or GenerationConfig()
    first = model.end_of_turn
    ends = [first, *sorted(model.eos_ids - {first})]
    text, differs = modelfile(model.tokenizer, file.name, ends=ends, settings=settings, context=model.max_length)
    write_text(folder / "Modelfile", text)
    if not differs:
        return {"modelfile": "Modelfile"}
    job.reporter.note(f"the Modelfile's template does not cover all of the student's: {differs}")
    return {"modelfile": "Modelfile", "modelfile_does_not_cover": differs}


def _export_folder(job: Job, folder: Path) -> dict[str, Any]:
    """A folder in Hugging Face form, loaded again by plain `transformers` and compared."""
    source = job.student.folder
    saved = str(getattr(read_config(source, job.student.name), "dtype", None) or torch.float32).removeprefix("torch.")
    names = {str(dtype).removeprefix("torch."): name for name, (dtype, _) in FOLDER_TYPES.items()}
    kind = job.kind or names.get(saved, "f32")
    dtype, most_kl = FOLDER_TYPES[kind]
    job.reporter.stage(f"writing {job.student.name} as {kind}")
    model = load_model(str(source))
    check_room(folder, sum(part.numel() for part in model.net.parameters()) * dtype.itemsize)
    asked = ask_student(model, job.student.prompts)
    del model
    with quiet():
        model = Model(read_weights(source, job.student.name, dtype), load_tokenizer(str(source)), job.student.name)
    found = measured(asked, _again(model, asked)) | {"most_kl_nats_per_token": most_kl}
    check_kl(found, most_kl)
    save_student(model, folder)
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    files = [_facts(file) for file in sorted(folder.iterdir())]
    return {"form": "hf", "type": kind, "files": files, "weights": job.student.content, "agreement": found}


def _again(model: Model, asked: Sequence[Asked]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """KL and agreement of the first choice of the model as it is now, at every token of its answers from before."""
    found = []
    for one in asked:
        log_q_NV = log_probs(model, one.prompt_ids, one.answer_ids)
        kl_N = (one.log_p_NV.exp() * (one.log_p_NV - log_q_NV)).sum(-1)
        found.append((kl_N, one.log_p_NV.argmax(-1) == log_q_NV.argmax(-1)))
    return found


def _facts(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
