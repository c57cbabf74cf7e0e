"""The server that writes a run's text, and that scores it where the teacher is known from there alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from limbeck.config.teacher import ServedTeacher
from limbeck.models.api import ApiTeacher
from limbeck.models.batch import BatchTeacher
from limbeck.models.load import load_tokenizer
from limbeck.models.model import Model
from limbeck.models.own_text import Aligner, OwnTextTeacher
from limbeck.models.score import TEST_CHAT, ServerScorer
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.told import Kept
from limbeck.runs.resolve import Method
from limbeck.storage.store import Store
from limbeck.types import TOLD


def scorer_of(
    method: Method, server: ApiTeacher, device: torch.device | str = "cpu"
) -> ServerScorer | StatesTeacher | None:
    """The server as a scorer of text, if the recipe's teacher is known from there alone and gives a distribution, which
    is put on this device."""
    settings = method.recipe.teacher
    if not isinstance(settings, ServedTeacher) or not settings.reads_given_text:
        return None
    if settings.gives_states:
        return StatesTeacher(server, load_tokenizer(method.recipe.speaker, method.recipe.speaker_template), device)
    assert settings.named_tokens is not None
    reads_log_prob = any(term.loss.reads_teacher_log_prob for term in method.terms)
    tokenizer = load_tokenizer(method.recipe.speaker, method.recipe.speaker_template)
    context = method.prompt_context
    system = () if context is None or context.system is None else ({"role": "system", "content": "Be brief."},)
    chat = (*system, *TEST_CHAT)
    return ServerScorer(server, settings.named_tokens, tokenizer, written=reads_log_prob, chat=chat)


def served(method: Method) -> ApiTeacher | None:
    """The server that writes the teacher's text, if the recipe names one."""
    server = method.recipe.teacher.server
    if server is None:
        return None
    return BatchTeacher(server) if server.batch else ApiTeacher(server)


def own_text_of(method: Method, identity: str, library: Path, student: Model) -> OwnTextTeacher | None:
    """The server as a teacher of its own text, which `library` has with its log-probabilities under `identity`; None if
    the recipe does not ask for them."""
    settings = method.recipe.teacher
    if not isinstance(settings, ServedTeacher) or settings.server.logprobs is None:
        return None

    def told(sample_ids: Sequence[str]) -> Iterator[Kept | None]:
        with Store(library / "store.sqlite") as store:
            yield from (store.evidence_of(sample_id, TOLD, identity) for sample_id in sample_ids)

    aligner = Aligner(student.tokenizer, student.eos_ids)
    return OwnTextTeacher(identity, told, aligner, student.vocab_size, device=student.net.device)
