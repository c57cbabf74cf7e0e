"""Checks that teacher and student have the same tokens and the same chat template."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.template import end_of_turn, render
from limbeck.types import UserError, content_hash

OTHER_TOKENS = (
    "Teacher and student have other tokens, so they are compared by their text: perplexity is how likely the student"
    " finds the teacher's held-out text, in its own tokens."
)
PROBE = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
)


def check_same_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """Refuse two vocabularies that differ: losses over the vocabulary compare token by token.

    Raises:
        UserError: the vocabularies differ; the message shows where.
    """
    ours = student.get_vocab()
    theirs = teacher.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise UserError(
        f"teacher and student have different vocabularies: {len(different)} tokens differ, for example {different[:3]};"
        " use a student of the teacher's family, or read the teacher through a bridge (teacher.bridge: {})"
    )


def tokens_key(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary: equal for what `check_same_vocabulary` lets pass."""
    return content_hash(tokenizer.get_vocab())


def frame_key(tokenizer: Tokenizer) -> str:
    """A hash of how a conversation is framed: equal for what `check_same_template` lets pass."""
    return content_hash([render(tokenizer, PROBE), str(tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)))])


def have_other_tokens(teacher: Tokenizer, student: Tokenizer) -> bool:
    """Whether two models share only text: their vocabularies or their templates differ."""
    try:
        check_same_vocabulary(teacher, student)
        check_same_template(teacher, student)
    except UserError:
        return True
    return False


def check_takes_system(tokenizer: Tokenizer, whose: str = "teacher") -> None:
    """Refuse a chat template without a place for a system message.

    Raises:
        UserError: the template refuses the message, or leaves it out.
    """
    messages = [{"role": "system", "content": "limbeck-probe"}, PROBE[0]]
    problem = f"the {whose}'s chat template has no place for a system message; put it into teacher.context.user instead"
    try:
        text = render(tokenizer, messages)
    except UserError as error:
        raise UserError(problem) from error
    if "limbeck-probe" not in text:
        raise UserError(problem)


def check_same_template(teacher: Tokenizer, student: Tokenizer) -> None:
    """Refuse two chat templates that differ: the teacher judges the student's own tokens, so both must frame a
    conversation, and end an answer, in the same way.

    Raises:
        UserError: chat templates that render differently, or different tokens after an answer.
    """
    their_end, our_end = (tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) for tokenizer in (teacher, student))
    if their_end != our_end:
        raise UserError(
            f"teacher and student end an answer with different tokens, {their_end!r} and {our_end!r}:"
            " give the student the teacher's tokenizer (copy its tokenizer files into the student's folder)"
        )
    ours, theirs = (render(tokenizer, PROBE) for tokenizer in (student, teacher))
    if ours != theirs:
        at = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"teacher and student frame a conversation differently (chat templates): {theirs[at : at + 40]!r} of the"
            f" teacher is {ours[at : at + 40]!r} of the student, so the teacher would judge prompts that it does not"
            " know; give the student the teacher's chat template"
        )
