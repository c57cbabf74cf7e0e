"""A process of its own that renders a user's chat template once, in bounded time and memory (see `template_names`)."""

from __future__ import annotations

import json
import re
import sys

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 10
MEMORY = 2**30
MESSAGES = ({"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."})


def main() -> None:
    """Read a template as JSON from standard input and render it; a fault is one line on standard error."""
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda _: "26 Jul 2024"}
    text = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", json.loads(sys.stdin.read()))  # transformers' own tag
    try:
        template = environment.from_string(text)
    except TemplateError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for messages, answer in ((MESSAGES[:1], True), (MESSAGES, False)):
        shown = [dict(message) for message in messages]
        try:
            template.render(messages=shown, add_generation_prompt=answer, bos_token="", eos_token="")
        except (MemoryError, RecursionError, OverflowError) as error:
            sys.exit(f"{type(error).__name__} {error}")
        except Exception:  # noqa: BLE001, S112 (it may refuse this conversation; only its bounds are looked at here)
            continue


def _refuse(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
