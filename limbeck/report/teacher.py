"""A description of the teacher: its name, whose weights it ran with, and what it was shown that the student was not."""

from __future__ import annotations

from typing import Any

from limbeck.config.teacher import SelfTeacher

WEIGHTS = {
    "start": "the student's, from before training",
    "live": "the student's, at the current step",
    "average": "a moving average of the student's (decay {decay:g} per step)",
}
PLACES = {
    "prompt": "the plain prompt",
    "answer": "the prompt's known answer",
    "feedback": "the feedback on the prompt",
}


def teacher_name(teacher: Any) -> str:
    """The teacher's model, or its name on a server. A recipe names a teacher by its model alone, or by a mapping."""
    return (
        str(teacher.get("model") or (teacher.get("server") or {}).get("name", ""))
        if isinstance(teacher, dict)
        else str(teacher)
    )


def teacher_aside(teacher: Any) -> str:
    """What to say after the teacher's name; "" for a plain model that saw the same prompts as the student."""
    if not isinstance(teacher, dict):
        return ""
    aside = ", with the student's weights" if teacher.get("weights") in WEIGHTS else ""
    if teacher.get("server"):
        aside += (
            f", its text written by {teacher['server'].get('name', '')} on a server"
            if teacher.get("model")
            else ", on a server"
        )
    return aside + (", with other prompts than the student" if teacher.get("context") else "")


def teacher_facts(teacher: Any) -> list[tuple[str, str]]:
    """Model, weights and prompts of the teacher as (name, text); empty if the recipe only names a model."""
    if not isinstance(teacher, dict):
        return []
    facts = [("model", teacher_name(teacher))]
    if server := teacher.get("server"):
        facts.append(("text written by", f"{server.get('name', '')} on a server"))
    if weights := WEIGHTS.get(teacher.get("weights", "own")):
        decay = teacher.get("decay", SelfTeacher.model_fields["decay"].default)
        facts.append(("weights", weights.format(decay=decay)))
    context = teacher.get("context") or {}
    system = context.get("system")
    user = context.get("user")
    if system is not None:
        facts.append(("system message", str(system)))
    if user is not None:
        facts.append(("prompt", str(user)))
        places = [f"{{{name}}} is {meaning}" for name, meaning in PLACES.items() if f"{{{name}}}" in str(user)]
        facts += [("where", "; ".join(places))] if places else []
    return [*facts, ("student sees", "the plain prompt") if context else ("prompt", "the same as the student's")]
