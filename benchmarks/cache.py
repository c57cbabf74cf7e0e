"""What a kept teacher costs in bytes, how wrong it is, and what it saves; writes docs/evidence/cache.json.

    .venv/bin/python benchmarks/cache.py        # some five minutes on two cores

The teacher is SmolLM2-135M-Instruct on its own text, the student the same with 24 of its 30 layers before any training.
For every form: bytes of the shards per response token; the mean forward KL as the form gives it, beside the whole
distribution's; and the distance of the gradient for the student's logits, summed over all positions, from the exact
one. Renormalising the top tokens, which is not offered, stands beside them. Then the same steps with the teacher live
and kept, in turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import load_recipe
from limbeck.commands.console import Terminal
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.model import head_of
from limbeck.models.taps import features
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import PositionEvidence, chunks, fused_loss
from limbeck.objectives.term import make_term
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.signals.cache import SignalCache
from limbeck.signals.forms import form_of
from limbeck.storage.files import write_json
from limbeck.training.prepare import even_batches, fill_cache

HERE = Path(__file__).parent.parent
OUT = HERE / "docs" / "evidence" / "cache.json"
RUN = HERE / "runs" / "cache"
FORMS: list[dict[str, Any]] = [
    {"hidden": {"dtype": "float32"}},
    {"hidden": {"dtype": "bfloat16"}},
    *({"top_k": {"k": k}} for k in (16, 64, 256)),
    *({"top_k": {"mass": mass, "k": 4096}} for mass in (0.9, 0.95, 0.98)),
    *({"top_k": {"mass": mass, "k": 64}} for mass in (0.95, 0.98)),
    *({"sampled": {"draws": draws}} for draws in (12, 50)),
]
SIZES = ("prompts.limit=40", "writer.0.max_tokens=80")
KL = DIVERGENCES["forward_kl"]
TEXTS = 12
ROUNDS = 16
REPEATS = 3


def told(values_N: Tensor, gradient_V: Tensor, exact_N: Tensor, exact_V: Tensor) -> dict[str, float]:
    difference_N = values_N - exact_N
    return {
        "kl": float(values_N.mean()),
        "kl_bias": float(difference_N.mean()),
        "kl_bias_se": float(difference_N.std() / len(difference_N) ** 0.5),
        "gradient_error": float((gradient_V - exact_V).norm() / exact_V.norm()),
    }


class Measure:
    """One text's teacher and student states, and a form's loss on them against the exact one."""

    def __init__(self, run: Run, rows: list[Row], vocab_size: int) -> None:
        self.rows = rows
        self.vocab_size = vocab_size
        batch = make_batch(rows)
        where = batch.response_positions()
        self.targets_N = batch.tokens_BT[where[0], where[1] + 1]
        self.teacher = run.models.teacher.view(batch, vocab_size=vocab_size).signal
        net = run.models.initial_student().net
        with torch.no_grad():
            self.hidden_ND = features(net, batch.tokens_BT)[0][where]
        self.head = head_of(net).detached()

    def loss(self, signal: Any, renormalised: int = 0) -> tuple[Tensor, Tensor]:
        """(values [N], sum of the gradients for the logits [V])."""
        values = []
        gradient_V = torch.zeros(self.vocab_size)
        for part in chunks(len(self.hidden_ND), self.vocab_size, 2**22):
            q = Distribution(self.head.logits(self.hidden_ND[part]))
            if renormalised:
                log_CK, ids_CK = Distribution(signal.chunk(part).logits_CV).log.topk(renormalised)
                p = Distribution(log_CK)
                own = Distribution(q.logits_RV.gather(-1, ids_CK))
                found, some_CK = KL(p, own, {"temperature": 1.0})
                gradient_V.scatter_add_(0, ids_CK.flatten(), some_CK.flatten())
            else:
                rows = signal.chunk(part).rows(slice(0, part.stop - part.start))
                found, some_CV = rows.compare(KL, {"temperature": 1.0}, q, self.targets_N[part])
                gradient_V += some_CV.sum(0)
            values.append(found)
        return torch.cat(values), gradient_V


def forms(run: Run, measure: Measure, folder: Path) -> list[dict[str, Any]]:
    exact = measure.loss(measure.teacher)
    found = []
    for form in FORMS:
        settings = CacheSettings(**form)
        cache = SignalCache(folder / str(len(found)), run.models.teacher.identity, measure.vocab_size, settings)
        fill_cache(
            cache,
            partial(run.models.teacher.view, vocab_size=measure.vocab_size),
            measure.rows,
            lambda done, total: None,
        )
        facts = {"form": form, "bytes_per_token": cache.bytes / len(measure.targets_N)}
        facts |= told(*measure.loss(cache.view(make_batch(measure.rows)).signal), *exact)
        if settings.sampled is not None:
            facts["rounds"] = rounds(measure, settings, exact)
        found.append(facts)
        print(facts, flush=True)
    for k in (16, 64, 256):
        found.append(
            {
                "form": {"renormalised": {"k": k}},
                "bytes_per_token": None,
                **told(*measure.loss(measure.teacher, k), *exact),
            }
        )
        print(found[-1], flush=True)
    return found


def rounds(measure: Measure, settings: CacheSettings, exact: tuple[Tensor, Tensor]) -> list[float]:
    """The gradient's error where it is averaged over 1, 2, 4... caches of other draws: unbiased, it falls with the root
    of their number."""
    form = form_of(settings)
    total_V = torch.zeros(measure.vocab_size)
    errors = []
    for number in range(1, ROUNDS + 1):
        packed = form.pack(measure.teacher, measure.targets_N, 1000 + number, measure.vocab_size)
        signal = form.unpack([packed], measure.vocab_size, None)
        total_V += measure.loss(signal)[1]
        if number & (number - 1) == 0:
            errors.append(float((total_V / number - exact[1]).norm() / exact[1].norm()))
    return errors


def speed(run: Run, rows: list[Row], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Seconds of an epoch's forward and backward passes, live and kept in turns; and of reading what was kept alone."""
    student = run.models.initial_student()
    term = make_term("forward_kl", {}).at_step(0.0, {})
    live = partial(run.models.teacher.view, vocab_size=vocab_size)
    views: dict[str, Any] = {"live": live}
    chosen = {
        "hidden": {"hidden": {}},
        "top_k": {"top_k": {"mass": 0.98, "k": 64}},
        "sampled": {"sampled": {"draws": 50}},
    }
    for name, form in chosen.items():
        cache = SignalCache(folder / name, run.models.teacher.identity, vocab_size, CacheSettings.model_validate(form))
        fill_cache(cache, live, rows, lambda done, total: None)
        views[name] = cache.view
    batches = [make_batch(rows, micro_batch) for micro_batch in even_batches(rows)]
    seconds: dict[str, list[float]] = {
        name: [] for name in [*views, *(f"reading {name}" for name in views if name != "live")]
    }
    for _ in range(REPEATS):
        for name, view in views.items():
            began = time.perf_counter()
            for batch in batches:
                epoch_step(student.net, view(batch).signal, batch, term)
            seconds[name].append(time.perf_counter() - began)
            if name != "live":
                began = time.perf_counter()
                for batch in batches:
                    view(batch)
                seconds[f"reading {name}"].append(time.perf_counter() - began)
    tokens = sum(int(batch.mask_BT.sum()) for batch in batches)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["live"], seconds[name], strict=True)) for name in chosen
    }
    return {"tokens": tokens, "repeats": REPEATS, "seconds": medians, "times_faster_than_live": ratios}


def epoch_step(net: Any, signal: Any, batch: Any, term: Any) -> None:
    where = batch.response_positions()
    hidden_BTD, _ = features(net, batch.tokens_BT)
    targets_N = batch.tokens_BT[where[0], where[1] + 1]
    weight_KN = torch.ones(1, len(targets_N))
    fused_loss(
        hidden_BTD[where],
        head_of(net),
        [term],
        [1.0],
        weight_KN=weight_KN,
        evidence=PositionEvidence(targets_N, signal),
    ).loss.backward()
    net.zero_grad(set_to_none=True)


def main() -> None:
    reporter = Terminal()
    reporter.stage("The text and the student's start")
    run = Run(resolve(load_recipe("forward-kl", SIZES)), RUN, reporter)
    student = run.models.initial_student()
    rows = run.rows(run.text.training(), student)
    vocab_size = min(head_of(student.net).vocab_size, head_of(run.models.teacher.model.net).vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        found = forms(run, Measure(run, rows[:TEXTS], vocab_size), Path(folder))
        tokens = sum(len(row.response_ids) for row in rows[:TEXTS])
        write_json(OUT, {"forms": found, "tokens": tokens, "speed": speed(run, rows, vocab_size, Path(folder))})


if __name__ == "__main__":
    main()
