"""The kinds of teacher, by the `kind` of their section in the recipe."""

from __future__ import annotations

from limbeck.config.teacher import TeacherSettings
from limbeck.models.bridge import BridgedKind
from limbeck.models.local import LocalKind
from limbeck.models.self_teacher import SelfKind
from limbeck.models.served import ServedKind
from limbeck.models.several import SeveralKind
from limbeck.models.teacher_interface import TeacherKind

KINDS: dict[str, TeacherKind] = {
    "local": LocalKind(),
    "self": SelfKind(),
    "several": SeveralKind(),
    "bridged": BridgedKind(),
    "served": ServedKind(),
}


def kind(settings: TeacherSettings) -> TeacherKind:
    """The `TeacherKind` of a recipe's teacher."""
    return KINDS[settings.kind]
