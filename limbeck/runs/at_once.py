"""The control of rounds: as much text and training as all of them together, in one round."""

from __future__ import annotations

from typing import Any

from limbeck.config.recipe import Recipe, parse
from limbeck.config.rounds import round_data
from limbeck.elicit.step import AskingStep
from limbeck.elicit.steps import steps_of


def at_once(recipe: Recipe, rounds: int, steps: int, base: str | None = None) -> Recipe:
    """So many rounds of a recipe as one ordinary recipe: `rounds` times as much is asked of the start, and the training
    takes so many `steps`, those of all rounds together.

    The first step of elicitation that says how much it asks for asks for that many times as much (`AskingStep.more`);
    writers answer each prompt once, so that without steps only the training is longer.

    Args:
        base: the folder of the student that the rounds start from, where it was trained before them.

    Raises:
        RecipeError: a step that can't ask for so much.
    """
    data = round_data(recipe.resolved(), 1, base, base)
    data["title"] = f"{recipe.title or recipe.name}, {rounds} rounds at once"
    data["train"] = {key: value for key, value in data["train"].items() if key != "epochs"} | {"steps": steps}
    if recipe.elicit:
        data["elicit"] = _more(recipe, data["elicit"], rounds)
    return parse(data).model_copy(update={"machine": recipe.machine})


def _more(recipe: Recipe, entries: list[dict[str, Any]], times: int) -> list[dict[str, Any]]:
    """The entries of `elicit` with more in the first that can ask for more."""
    for index, (_, step) in enumerate(steps_of(recipe.elicit or ())):
        if isinstance(step, AskingStep) and (more := step.more(times)):
            changed = entries[index] | {"params": entries[index]["params"] | more}
            return [*entries[:index], changed, *entries[index + 1 :]]
    return entries
