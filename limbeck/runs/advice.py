"""What `check` says beside its figures: a server's time, and what speaks against so short or so long a training."""

from __future__ import annotations

from limbeck.config.recipe import Recipe
from limbeck.config.significance import LEAST_STEPS

LEAST_EPOCHS = 0.8  # the estimate of the text's length may be off by so much
MOST_EPOCHS = 10
LITTLE_TEXT = 100_000  # tokens


def served_time(recipe: Recipe, requests: int, tokens: int) -> dict[str, str]:
    """What can be said of the time that the teacher's server takes: what its rates allow at best."""
    server = recipe.teacher.server
    if server is None:
        return {}
    if server.batch:
        return {"elicit": "unknown: a batch may take the provider a day"}
    rates = [
        amount / rate
        for amount, rate in ((requests, server.requests_per_minute), (tokens, server.tokens_per_minute))
        if rate is not None
    ]
    if rates:
        return {"elicit": f"at least {max(rates):.1f} min by teacher.server's rates; the rest depends on the server"}
    each = requests / server.concurrency
    return {
        "elicit": f"unknown: depends on the server ({requests:,} requests, {server.concurrency} at once: {each:,.0f}"
        " times what one takes there)"
    }


def training_cautions(recipe: Recipe, steps: int, epochs: float, tokens: int) -> tuple[str, ...]:
    """What speaks against so short, or so long, a training, with the numbers and the remedy."""
    settings = recipe.train
    found = []
    if steps < LEAST_STEPS:
        found.append(
            f"about {steps} steps: in fewer than {LEAST_STEPS} a student hardly leaves its start; give more prompts,"
            f" more train.epochs, or less train.tokens_per_step than {settings.tokens_per_step:,}"
        )
    if recipe.written_share >= 0.5:  # the student writes anew at every step, so no text is read again
        return tuple(found)
    if epochs < LEAST_EPOCHS:
        found.append(
            f"the steps read about {epochs:.0%} of the text: the rest is paid for and never trained on; set"
            " train.epochs: 1, or more train.steps"
        )
    if epochs > MOST_EPOCHS and tokens < LITTLE_TEXT:
        found.append(
            f"about {tokens:,} tokens are read {epochs:.0f} times: so little text is learnt by heart; give more"
            f" prompts, or {'fewer train.steps' if settings.steps else 'fewer train.epochs'}"
        )
    return tuple(found)
