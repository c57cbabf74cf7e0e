"""What an evaluation asks of a served teacher, for plans."""

from __future__ import annotations

from limbeck.elicit.step import Estimate
from limbeck.evaluate.items import GenerationSettings
from limbeck.runs.resolve import Method


def asked_to_measure(method: Method, answer: int) -> Estimate:
    """What the evaluation asks of a served teacher beside the held-out text: greedy answers to the held-out prompts,
    and the tasks that are answered in a chat.

    Args:
        answer: tokens of one, as far as they are known.
    """
    settings, prompts = method.recipe.evaluate, method.held_out_prompts
    if method.recipe.teacher.server is None or method.recipe.teacher.model or method.recipe.student.scores:
        return Estimate()
    asked = {prompt.id: (prompt.identity, prompt.check) for prompt in prompts}
    counts = {settings.max_tokens: len(prompts)}
    for task in method.tasks:
        own = task.protocol
        if isinstance(own, GenerationSettings) and own.format == "chat" and own.thinking is None:
            new = [
                prompt
                for prompt in task.prompts
                if not task.shares_answers or asked.get(prompt.id) != (prompt.identity, prompt.check)
            ]
            most = own.max_tokens or settings.max_tokens
            counts[most] = counts.get(most, 0) + len(new) * len(own.draws)
    tokens = sum(count * min(answer, most) for most, count in counts.items())
    return Estimate(requests=sum(counts.values()), tokens=tokens)
