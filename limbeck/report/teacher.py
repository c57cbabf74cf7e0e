"""Who the teacher was, in words: its name, whose weights it ran with, and what it was shown that the student was
not."""

from __future__ import annotations

from typing import Any

from limbeck.config.teacher import SelfTeacher

WEIGHTS = {
    "start": "the student's own, as they were before training",
    "live": "the student's own, as they are at each step",
    "average": "a moving average of the student's own, which keeps {decay:g} of itself at every step",
}
PLACES = {
    "prompt": "the prompt",
    "answer": "the prompt's known answer",
    "feedback": "the feedback given with the prompt",
}


def teacher_name(teacher: Any) -> str:
    """Its model, or its name behind a server. A recipe names a teacher by its model alone, or by a record."""
    return (
        str(teacher.get("model") or (teacher.get("server") or {}).get("name", ""))
        if isinstance(teacher, dict)
        else str(teacher)
    )


def teacher_aside(teacher: Any) -> str:
    """What a reader must know with the name; "" where the teacher was a model that saw what the student sees."""
    if not isinstance(teacher, dict):
        return ""
    own = ", with weights of the student's own" if teacher.get("weights") in WEIGHTS else ""
    if teacher.get("server"):
        own += (
            f", its text by {teacher['server'].get('name', '')} behind a server"
            if teacher.get("model")
            else ", behind a server"
        )
    return own + (", shown another prompt than the student" if teacher.get("context") else "")


def teacher_facts(teacher: Any) -> list[tuple[str, str]]:
    """A card's entries: model, weights and what it was shown, as (name, text). None where a name is all there is."""
    if not isinstance(teacher, dict):
        return []
    found = [("model", teacher_name(teacher))]
    if server := teacher.get("server"):
        found.append(("text written by", f"{server.get('name', '')} behind a server"))
    if words := WEIGHTS.get(teacher.get("weights", "own")):
        found.append(("weights", words.format(decay=teacher.get("decay", SelfTeacher.model_fields["decay"].default))))
    context = teacher.get("context") or {}
    system = context.get("system")
    user = context.get("user")
    if system is not None:
        found.append(("shown as a system message", str(system)))
    if user is not None:
        found.append(("shown in place of the prompt", str(user)))
        places = [f"{{{name}}} stands for {words}" for name, words in PLACES.items() if f"{{{name}}}" in str(user)]
        found += [("where", "; ".join(places))] if places else []
    alone = "the prompt alone"
    return [*found, ("shown to the student", alone)] if context else [*found, ("shown", f"{alone}, as the student is")]
