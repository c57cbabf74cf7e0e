"""The recipes of `make soak`: tiny models in every way of teaching, whole runs with their evaluation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from tests.conftest import make_net, make_recipe_data, make_tokenizer, write_prompts  # noqa: E402
from tests.long.recipes_on_a_device import DIVERGENCES, RANKING, cases, recipe_data  # noqa: E402
from tests.runs.test_rounds import adversarial_recipe, rounds_recipe  # noqa: E402
from tests.runs.test_stages import aligned_recipe  # noqa: E402
from tests.scripted_server import answer  # noqa: E402
from tests.training.test_judges import script as verdict  # noqa: E402
from tests.training.test_rewards import ROLLOUT, recipe  # noqa: E402
from tests.training.test_rollout import STUDENT  # noqa: E402

Build = Callable[
    [Path, Path, str], dict[str, Any]
]  # (tiny model, a new folder for prompts, a server's URL) -> a recipe
KEY = "LIMBECK_SOAK_KEY"  # the variable of the key that servers are sent
AT_ONCE = 4
# Each differs from others by its formula alone, so they don't meet faults of their own.
ALIKE = {f"divergence {name}" for name in DIVERGENCES[1:]} | {f"ranking {name}" for name in RANKING[1:]}
NEEDS = {"served", "served cache"}  # a server that scores text, which runs a model


def make_models(folder: Path) -> int:
    """Two models of random weights that differ in their weights alone; the status of a process, 0."""
    tokenizer = make_tokenizer()
    for seed, model in ((0, folder / "tiny"), (5, folder / "other")):
        make_net(vocab_size=len(tokenizer), seed=seed).save_pretrained(model)
        tokenizer.save_pretrained(model)
    return 0


def kinds(tiny: Path, other: Path) -> dict[str, Build]:
    """A recipe of each kind, by name."""
    table: dict[str, Build] = {}
    for name, sections in cases(str(tiny), str(other), "http://unused").items():
        device = any(word in name for word in ("cpu", "doctor", "resume"))
        if name not in ALIKE | NEEDS and not device:
            table[name] = _of_case(sections)
    return table | {
        "control": lambda model, folder, url: _plain(model, folder),
        "rounds": lambda model, folder, url: rounds_recipe(_plain(model, folder), model),
        "stages": _stages,
        "rewards by a stage": lambda model, folder, url: adversarial_recipe(
            rounds_recipe(_plain(model, folder), model), model
        ),
        "asked of a server": _asked,
        "judged by a server": _judged,
    }


def _of_case(sections: dict[str, Any]) -> Build:
    own = {key: value for key, value in sections.items() if key != "stages"}

    def build(tiny: Path, folder: Path, _: str) -> dict[str, Any]:
        return recipe_data(own, str(tiny), folder / "prompts", "cpu")

    return build


def _plain(tiny: Path, folder: Path) -> dict[str, Any]:
    return make_recipe_data(tiny, write_prompts(folder), folder)


def _stages(tiny: Path, folder: Path, _: str) -> dict[str, Any]:
    data = _plain(tiny, folder)
    return aligned_recipe(rounds_recipe(data, tiny), str(tiny), Path(data["prompts"]["from"]))


def _server(url: str) -> dict[str, Any]:
    return {"server": {"url": url, "name": "toy", "concurrency": AT_ONCE, "key": KEY, "timeout": 2}}


def _asked(tiny: Path, folder: Path, url: str) -> dict[str, Any]:
    """Text of a teacher behind a server, asked of it once more, and a student that learns it."""
    data = _plain(tiny, folder)
    again = {"prompt": "Say it again: {{ prompt }}", "into": "prompt", "max_tokens": 6}
    return data | {
        "teacher": _server(url),
        "student": {"start": {"pretrained": str(tiny)}},
        "elicit": [{"ask": again}, {"answer": {"max_tokens": 6, "n": 2, "temperature": 1.0}}],
        "writer": [{"by": "elicited"}],
        "loss": ["cross_entropy"],
        "evaluate": data["evaluate"] | {"controls": ["untouched"], "metrics": ["fidelity", {"everyday": {"limit": 4}}]},
    }


def _judged(tiny: Path, folder: Path, url: str) -> dict[str, Any]:
    """Groups of the student's answers, judged by a model behind a server."""
    rollout = ROLLOUT | {"rewards": [{"judge": "judge"}]}
    data = recipe(_plain(tiny, folder), folder, rollout=rollout, writer=[STUDENT])
    return data | {"models": {"judge": _server(url)}}


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """What the server says: a function of what it is asked alone, so that a run and its twin hear the same."""
    said = verdict(0, body)
    if "RATING" in said["choices"][0]["message"]["content"]:
        return said
    asked = json.dumps([body["messages"], body.get("seed")], sort_keys=True).encode()
    return answer("the " + hashlib.sha256(asked).hexdigest()[:6])
