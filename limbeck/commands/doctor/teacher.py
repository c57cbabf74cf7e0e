"""The doctor's checks of the teacher's weights, of the server that stands for it, and of the losses.

Shapes: N response positions, K tokens named at a position, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.commands.doctor.patient import (
    TOKENS_PER_POSITION,
    NothingToCheckError,
    Patient,
    response_targets,
    teacher_log_probs,
)
from limbeck.models.api import ApiTeacher
from limbeck.models.engines import ENGINES, find_engine
from limbeck.models.load import load_model
from limbeck.models.model import head_of
from limbeck.models.own_text import PROBE, probe
from limbeck.models.score import ServerScorer
from limbeck.models.template import frame_of
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import Block, TeacherSignal, TopTokens
from limbeck.signals.dense import DenseRows
from limbeck.types import Request, Sampling, UserError, printable

# KL in nats between local and served weights; 4-bit weights in llama.cpp's own arithmetic stay within 0.01
MEAN_KL = 0.02
LARGEST_KL = 0.2
ZERO = 1e-4
SAME_TEMPERATURE = 0.05
RATIO_ERROR = 0.1


def check_weights(patient: Patient) -> str:
    """Check that the weights are finite, and show how well the teacher predicts plain text."""
    model = patient.model  # loading it checks for NaN, and for a head with unknown logit scaling
    dtype = str(head_of(model.net).weight_VD.dtype).removeprefix("torch.")
    start = patient.recipe.student.start.pretrained
    if start is not None and start != patient.recipe.speaker:
        load_model(start, template=patient.recipe.student.template)  # the run loads it after the text is paid for
        dtype += ", and so are the student's"
    if patient.recipe.teacher.model is None or patient.run.models.other_tokens:
        where = "are not here" if patient.recipe.teacher.model is None else "use another tokenizer"
        return f"the student's are finite, in {dtype}; the teacher's {where}"
    nats = float(-patient.log_probs.gather(-1, response_targets(patient.texts)[:, None]).mean())
    guessing = math.log(head_of(model.net).vocab_size)
    return (
        f"finite, in {dtype}; the teacher's loss on plain text is {nats:.2f} nats per token, that of guessing"
        f" {guessing:.2f}"
    )


def check_repeatable(patient: Patient) -> str:
    """Check that the teacher gives the same numbers twice."""
    difference = float((patient.log_probs - teacher_log_probs(patient.teacher, patient.texts)).abs().max())
    if difference > ZERO:
        raise UserError(
            f"the teacher gives different numbers for the same text (up to {difference:.2g} nats): dropout is on, or"
            " its kernels are not deterministic; put it in evaluation mode"
        )
    if difference == 0:
        return "the teacher gives bit-identical numbers for the same text"
    return f"the teacher's numbers for the same text differ by at most {difference:.1g} nats"


def check_server(patient: Patient) -> str:
    """Check that the server has the right tokenizer and template, gives log-probabilities, and has room; or that it
    answers, where its own text is all that is needed of it."""
    if not patient.reads_given_text:
        return _answers(patient.server)
    scorer = patient.scorer
    scorer.probe()
    asked = patient.model.with_context(patient.run.method.measured_context)
    longest = max(len(asked.prompt_ids(prompt.messages)) for part in patient.run.text.given_prompts for prompt in part)
    needed = longest + max(writer.max_tokens for writer in patient.recipe.writer)
    if (room := scorer.room()) is not None and room < needed:
        raise UserError(
            f"the server's context is {room} tokens, and a prompt with its answer may need {needed}: start it with a"
            " larger context"
        )
    same = f"{scorer.identity} has the same tokens and template and {scorer.told}"
    return same + _content_there(patient, scorer) if isinstance(scorer, ServerScorer) else same


def _content_there(patient: Patient, scorer: ServerScorer) -> str:
    """Whether the server takes what looks like a control token in a prompt as one; a fault where a prompt holds any."""
    tokenizer = patient.model.tokenizer
    end = patient.model.end_of_turn
    name = str(tokenizer.convert_ids_to_tokens(end))
    asked = ({"role": "user", "content": f"What does {name} mean?"},)
    if scorer.framed(asked).count(end) <= patient.model.with_context(None).prompt_ids(asked).count(end):
        return "; it keeps control tokens in a prompt as text"
    pattern = frame_of(tokenizer).pattern
    prompts = [prompt for part in patient.run.text.given_prompts for prompt in part]
    held = [prompt.id for prompt in prompts if any(pattern.search(message["content"]) for message in prompt.messages)]
    if held:
        raise UserError(
            f"the server reads {name!r} in a prompt as the control token, and {len(held)} of {len(prompts)} prompts"
            f" hold such words (first {held[0]!r}): leave them out, or let the teacher write from weights that are here"
        )
    return f"; it reads {name!r} in a prompt as the control token, which no prompt here holds"


def _answers(server: ApiTeacher) -> str:
    """What a server says that only writes."""
    kind = server.endpoint.run(find_engine)
    program = f" ({ENGINES[kind].title})" if kind is not None else ""
    if server.settings.logprobs is not None:
        named = probe(server)
        return f"{server.identity}{program} answers, and names {named} tokens at each position of its own text"
    ((_, answer),) = server.answers([Request(server.identity, PROBE, Sampling(1.0, 1.0, 8), seed=0)])
    if answer.finish in ("error", "malformed"):
        raise UserError(f"the server's answer can't be used ({answer.finish}): {printable(answer.raw or 'no reply')}")
    return f"{server.identity}{program} answers"


def check_served_weights(patient: Patient) -> str:
    """Check that the served model has the weights that are here, by its top tokens at every position."""
    if not patient.reads_given_text:
        raise NothingToCheckError("the teacher's weights are not here")
    log_NV = patient.log_probs
    signal = patient.scorer.view(patient.texts).signal
    assert signal is not None
    served = _likeliest(signal) if signal.whole else signal.top_tokens()
    k = served.ids_NK.shape[1]
    local_NK = log_NV.gather(-1, served.ids_NK)
    kl_N = _bucketed_kl(local_NK, served.log_prob_NK)
    shared = [
        len(set(a) & set(b)) for a, b in zip(log_NV.topk(k).indices.tolist(), served.ids_NK.tolist(), strict=True)
    ]
    mean_kl = max(0.0, float(kl_N.mean()))
    summary = (
        f"{mean_kl:.4f} nats apart on average over {len(kl_N)} positions, {sum(shared) / len(shared):.1f} of"
        f" {k} top tokens shared"
    )
    if mean_kl > MEAN_KL or float(kl_N.max()) > LARGEST_KL:
        worst = kl_N.topk(min(3, len(kl_N))).indices.tolist()
        where = "; ".join(_position(patient, number, kl_N) for number in worst)
        raise UserError(
            f"the served model is not the one here: {summary}. Largest differences:"
            f" {where}.{_temperature_hint(local_NK, served.log_prob_NK)} Serve the same weights and their plain"
            " log-probabilities, or set teacher.model"
        )
    return summary


def _likeliest(signal: TeacherSignal) -> TopTokens:
    """The likeliest tokens of whole distributions, as many as a server is asked to name."""
    log_NV = signal.chunk(slice(None)).rows(slice(None)).p.log
    top = log_NV.topk(min(TOKENS_PER_POSITION, log_NV.shape[1]))
    return TopTokens(top.indices, top.values, torch.full(top.indices.shape[:1], top.indices.shape[1]))


def check_zero(patient: Patient) -> str:
    """Check that the recipe's divergences are zero for a student that equals its teacher."""
    log_NV = patient.log_probs
    targets_N = response_targets(patient.texts)
    labels = []
    for term in patient.run.method.terms:
        if term.name not in DIVERGENCES:
            continue
        p = Distribution(log_NV.clone())
        q = Distribution(log_NV.clone())
        values_N, gradient_NV = (
            replace(term, settings=replace(term.settings, by=None))
            .at_step(0.0, {})
            .values(Block(q, targets_N, DenseRows(p)))
        )
        if float(values_N.abs().max()) > ZERO or float(gradient_NV.abs().max()) > ZERO:
            raise UserError(
                f"{term.label} is {float(values_N.abs().max()):.2g} nats for a student that equals its teacher, not 0:"
                " please report this bug"
            )
        labels.append(term.label)
    if not labels:
        raise NothingToCheckError("no loss compares distributions")
    return f"for a student that equals its teacher, {', '.join(labels)} and its gradient are 0"


def _temperature_hint(local_NK: Tensor, served_NK: Tensor) -> str:
    """Say so if the served numbers are the local ones at another temperature: then all differences from the top token
    have the same ratio."""
    local = local_NK - local_NK[:, :1]
    served = served_NK - served_NK[:, :1]
    ratio = float((local * served).sum() / served.square().sum().clamp_min(1e-9))
    error = float((local - ratio * served).abs().mean() / local.abs().mean().clamp_min(1e-9))
    if error < RATIO_ERROR and abs(ratio - 1) > SAME_TEMPERATURE:
        return f" The served numbers are those of the model here at temperature {ratio:.2f}."
    return ""


def _position(patient: Patient, number: int, kl_N: Tensor) -> str:
    row_N, position_N = patient.texts.response_positions()
    ids = patient.texts.tokens_BT[row_N[number], : position_N[number] + 1].tolist()
    return f"after {patient.model.tokenizer.decode(ids[-8:])!r}, {float(kl_N[number]):.2f} nats"


def _bucketed_kl(local_NK: Tensor, served_NK: Tensor) -> Tensor:
    """KL(local || served) [N] in nats, over the named tokens and one bucket for the rest of the probability."""
    p, q = (
        torch.cat([x.exp(), (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-6)], -1) for x in (local_NK, served_NK)
    )
    return (p * (p / q).log()).sum(-1)
