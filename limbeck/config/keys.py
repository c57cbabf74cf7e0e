"""Which environment variables a recipe may name as a server's key, and where each may be sent.

A recipe is another's data: it must not have a variable of this machine sent to an address of its choice. So a key is
the user's own for Limbeck (`LIMBECK_...`), or that of a provider, which goes to that provider alone. What
`VARIABLE_ORIGIN` says in the environment binds any key to one address.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from limbeck.types import UserError, nearest

OWN = re.compile(r"LIMBECK_[A-Z0-9_]+")
PROVIDERS: dict[str, tuple[str, ...]] = {  # where a provider's key may go: never where its customers run servers
    "OPENAI_API_KEY": ("openai.com",),
    "ANTHROPIC_API_KEY": ("anthropic.com",),
    "GEMINI_API_KEY": ("generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
    "GOOGLE_API_KEY": ("generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
    "HF_TOKEN": ("huggingface.co",),
    "MISTRAL_API_KEY": ("mistral.ai",),
    "DEEPSEEK_API_KEY": ("deepseek.com",),
    "OPENROUTER_API_KEY": ("openrouter.ai",),
    "TOGETHER_API_KEY": ("together.xyz", "together.ai"),
    "FIREWORKS_API_KEY": ("fireworks.ai",),
    "GROQ_API_KEY": ("groq.com",),
    "CEREBRAS_API_KEY": ("cerebras.ai",),
    "NVIDIA_API_KEY": ("nvidia.com",),
    "XAI_API_KEY": ("x.ai",),
    "COHERE_API_KEY": ("cohere.com", "cohere.ai"),
}
ORIGIN = "_ORIGIN"


def check_key(variable: str, url: str) -> None:
    """Refuse a key that a recipe may not name, or not for this address.

    Raises:
        ValueError: with what to name instead.
    """
    if OWN.fullmatch(variable) and not variable.endswith(ORIGIN):
        return
    domains = PROVIDERS.get(variable)
    if domains is None:
        raise ValueError(
            f"{variable!r} is not a variable that a recipe may send: put the key into one that begins with LIMBECK_,"
            f" such as LIMBECK_API_KEY, or name a provider's own{nearest(variable, PROVIDERS)}"
        )
    parts = urlsplit(url)
    host = (parts.hostname or "").casefold()
    if parts.scheme != "https" or not any(host == domain or host.endswith(f".{domain}") for domain in domains):
        raise ValueError(
            f"{variable} goes to https://...{domains[0]} alone, not to {host or url!r}: put the key of this server into"
            " a variable of its own, such as LIMBECK_API_KEY"
        )


def check_origin(variable: str, url: str) -> None:
    """Refuse to send a key elsewhere than its `VARIABLE_ORIGIN` says, where that is set.

    Raises:
        UserError: another origin.
    """
    bound = os.environ.get(variable + ORIGIN)
    if bound and _origin(bound) != _origin(url):
        raise UserError(
            f"{variable} is for {bound} ({variable + ORIGIN} says so), and the recipe asks {url}: correct the address,"
            " or name another variable in teacher.server.key"
        )


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").casefold(), port
