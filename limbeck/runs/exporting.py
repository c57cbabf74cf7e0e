"""The trained student as it is exported: whole, where its weights were divided among ranks, with card and manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from limbeck.models.export_scores import write_student
from limbeck.models.fingerprint import seal_export
from limbeck.models.model import Model
from limbeck.models.sharding import is_divided
from limbeck.models.start import add_adapters
from limbeck.runs.models import RunModels
from limbeck.storage.files import write_text
from limbeck.training import sharded


def exported(models: RunModels, student: Model) -> Model:
    """The trained student with its adapters folded in. Divided weights are gathered on rank 0 alone; the teacher, which
    was divided with them, is loaded again where it is needed next."""
    if not is_divided(student.net):
        return models.finished(student)
    models.release()
    recipe = models.method.recipe

    def fresh() -> PreTrainedModel:
        net = models.student_to_train().net
        if recipe.student.lora is not None:
            add_adapters(net, recipe.student.lora, recipe.train.seed)
        return net

    return models.finished(replace(student, net=sharded.plain(student.net, fresh)))


def write_export(student: Model, folder: Path, card: Callable[[str], str]) -> None:
    """Write a trained student into `folder`, which must exist. `card` returns its card, given how it is loaded."""
    use = write_student(student, folder)
    write_text(folder / "README.md", card(use))
    seal_export(folder)
