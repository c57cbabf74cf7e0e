"""A teacher behind a server: how a recipe names it, and what its kind can do."""

from __future__ import annotations

from limbeck.commands.new.draft import inline
from limbeck.commands.new.wishes import KEY, Wishes
from limbeck.models.engines import ENGINES
from limbeck.types import UserError

# requests at once, and why so many
BATCHES = (64, "it batches what comes together")
SLOTS = (4, "as many as it has slots")
CONCURRENCY = {"vllm": BATCHES, "sglang": BATCHES, "llama.cpp": SLOTS, "ollama": SLOTS, "lm-studio": SLOTS}
OTHERS = (8, "requests at once")


def holds_labels(wishes: Wishes) -> bool:
    """Whether the teacher's replies can be held to labels: not if it shall think before them."""
    return wishes.is_served and not wishes.thought and "labels" in ENGINES[wishes.server_kind].forms


def server_lines(wishes: Wishes) -> list[str]:
    """The section `server` of a recipe's teacher.

    Raises:
        UserError: the server can't be told not to think.
    """
    concurrency, why = CONCURRENCY.get(wishes.server_kind, OTHERS)
    return [
        "  server:",
        f"    url: {inline(wishes.teacher)}",
        f"    name: {inline(wishes.teacher_model)}",
        f"    kind: {wishes.server_kind}",
        *_thinking(wishes),
        f"    key: {KEY}   # the environment variable with the key; the key itself stands in no file",
        f"    concurrency: {concurrency}   # {why}",
        "    tolerate: 0.01   # one answer in a hundred may fail",
        "    # limits: {requests: 1000}   # a ceiling, also in tokens and money",
        "    # price: {input: 0.10, output: 0.40}   # of a million tokens; check then says the cost",
    ]


def _thinking(wishes: Wishes) -> list[str]:
    lines = []
    if wishes.thinking == "off":
        effort = ENGINES[wishes.server_kind].effort
        if effort is None:
            raise UserError(
                f"--thinking off: nothing tells a server of kind {wishes.server_kind} not to think; leave it out"
            )
        lines.append(f"    options: {inline(dict(effort))}   # no thinking before an answer, or little")
    if wishes.drops_thinking:
        lines.append("    reasoning: drop   # thinking that comes beside an answer is not learnt")
    return lines
