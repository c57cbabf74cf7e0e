"""The doctor's checks of the recipe and of its text: tokenizer, chat template, end of an answer, bridge."""

from __future__ import annotations

from limbeck.commands.doctor.patient import (
    ANSWERS,
    QUESTIONS,
    DoubtfulError,
    NothingToCheckError,
    Patient,
)
from limbeck.config.teacher import BridgedTeacher
from limbeck.models.bridge import TeacherOverBridge
from limbeck.models.model import head_of
from limbeck.models.template import frame_of
from limbeck.runs.preflight import check
from limbeck.types import UserError

LEAST_ALIGNED = 0.5
LEAST_ENDED = 1 / 3  # of the training answers; with fewer that end by themselves, it is a fault
MOSTLY_ENDED = 0.9  # with fewer, a warning


def check_recipe(patient: Patient) -> str:
    """Check that the recipe's parts fit together."""
    check(patient.recipe)
    if patient.run.models.other_tokens:
        between = "a bridge" if isinstance(patient.recipe.teacher, BridgedTeacher) else "text alone"
        return f"its parts fit together; teacher and student have different tokenizers, with {between} between them"
    return "its parts fit together; teacher and student share vocabulary, chat template and end token"


def check_tokens(patient: Patient) -> str:
    """Check that texts survive the tokenizer, and that the model has a row for every token."""
    model = patient.model
    for text in (*QUESTIONS, *ANSWERS):
        decoded = str(model.tokenizer.decode(model.text_ids(text)))
        if decoded.strip() != text.strip():
            raise UserError(
                f"the tokenizer turns {text!r} into {decoded!r}: its files are damaged or belong to another model; use"
                " the model's own"
            )
    rows = head_of(model.net).vocab_size
    if model.vocab_size > rows:
        raise UserError(
            f"the tokenizer has ids up to {model.vocab_size - 1} and the model {rows}: they belong to different models;"
            " put the right tokenizer beside the weights"
        )
    return f"texts survive encoding and decoding; {len(model.tokenizer):,} tokens, {rows:,} rows in the model"


def check_bridge(patient: Patient) -> str:
    """Check that two tokenizers have enough in common for a loss to teach something."""
    settings = patient.recipe.teacher
    if not isinstance(settings, BridgedTeacher) or not patient.run.models.other_tokens:
        raise NothingToCheckError("teacher and student have the same tokenizer")
    bridge = TeacherOverBridge(patient.run.models.teacher, patient.model, settings.bridge)
    try:
        responses = [row.response_ids for row in patient.training_rows]
    except NothingToCheckError:
        texts = patient.texts
        responses = [tuple(row[mask].tolist()) for row, mask in zip(texts.tokens_BT, texts.mask_BT, strict=True)]
    facts = bridge.facts(responses)
    summary = (
        f"{facts['common_tokens']:,} of the student's {facts['student_tokens']:,} tokens are the teacher's, too; of the"
        f" tokens in {len(responses)} answers {facts['aligned_share']:.0%} start where one of the teacher's starts,"
        f" {facts['single_share']:.0%} are a single token in both"
    )
    if facts["aligned_share"] < LEAST_ALIGNED:
        raise UserError(
            f"{summary}: most of the text would teach nothing; choose another teacher, or teach the unaligned text"
            " with others: written"
        )
    return summary


def check_content(patient: Patient) -> str:
    """Check that content can't end a turn: what looks like a control token in it is text, in prompts and answers."""
    model = patient.model
    controls = frame_of(model.tokenizer).controls
    marks = sorted(set(controls.values()) & set(model.prompt_ids(({"role": "user", "content": QUESTIONS[0]},))))
    names = sorted(name for name, token in controls.items() if token in {*marks, model.end_of_turn})
    for name in names:
        model.prompt_ids(({"role": "user", "content": f"What does {name} mean?{name}"},))  # refuses what it can't do
        if set(model.text_ids(f"It is {name}.")) & set(controls.values()):
            raise UserError(
                f"an answer that speaks of {name!r} would hold that control token, since its tokenizer makes it of"
                " plain text: leave such text out, or use another model"
            )
    return f"what looks like a control token in a text stays text ({', '.join(names[:4]) or 'the template has none'})"


def check_end_of_answer(patient: Patient) -> str:
    """Check that answers end with an end token, both in the chat template and in the training text."""
    model = patient.model
    end = frame_of(model.tokenizer).end
    if end is None:
        raise UserError(
            "the chat template puts no control token after an answer, and text ends with"
            f" {model.tokenizer.eos_token!r}: the student would not stop in a conversation; let the"
            " template end answers with {{ eos_token }}"
        )
    configured = getattr(model.net.generation_config, "eos_token_id", None)
    stops = set(configured) if isinstance(configured, list) else {configured}
    where = {"the tokenizer": {model.tokenizer.eos_token_id}, "generation_config.json": stops}
    others = [name for name, tokens in where.items() if end not in tokens]
    named = repr(model.tokenizer.decode([end]))
    try:
        rows = patient.training_rows
    except NothingToCheckError:
        if len(others) == len(where):
            return f"the template and the text end an answer with {named}, of which {' and '.join(others)} know nothing"
        return f"the template and the text end an answer with {named}"
    finished = sum(row.response_ids[-1] in model.eos_ids for row in rows)
    if not finished:
        raise UserError(
            f"none of {len(rows)} training answers ends with an end token, so the student would never learn to stop:"
            " raise max_tokens until answers finish"
        )
    seen = f"{finished} of {len(rows)} training answers end with an end token"
    if finished == len(rows):
        return seen
    seen += "; the others were cut off"
    if finished < LEAST_ENDED * len(rows):
        raise UserError(
            f"{seen}: the student would learn to stop from few of them, and to break off from most; raise max_tokens of"
            " the writer (or step) until answers finish, or ask for shorter ones"
        )
    if finished < MOSTLY_ENDED * len(rows):
        raise DoubtfulError(f"{seen}: raise max_tokens of the writer (or step), or ask for shorter ones")
    return seen
