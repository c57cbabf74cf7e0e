"""The packaged llama.cpp server (extra `serve`: xllamacpp) for a model that comes as GGUF, on loopback, with a key."""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.models.named import NAMED, fetch
from limbeck.types import UserError

KEY = "LIMBECK_API_KEY"


@dataclass(frozen=True)
class Serving:
    """A server that runs in this process until it ends. Its key is in `key`, and nowhere else."""

    url: str
    name: str
    key: str
    made: bool  # whether the key was made up here, and has to be told to whoever asks
    server: Any


def serve(model: str, port: int = 0, context: int = 4096, slots: int = 4, threads: int | None = None) -> Serving:
    """Start a server.

    Args:
        model: a name of `limbeck models`, or a `.gguf` file.
        port: 0 for any that is free.
        context: tokens of a prompt and its answer together, for each of the `slots` requests that are answered at once.
        threads: left out, one less than there are cores: with as many, everything else on the machine brings it to a
            crawl.

    Raises:
        UserError: no such model, or xllamacpp is not installed.
    """
    path = fetch(model) if model in NAMED else Path(model).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"there is no GGUF file {model!r}: name one, or a model of `limbeck models`")
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("the packaged server is not installed: pip install 'limbeck[serve]'") from error
    given = os.environ.get(KEY)
    name = model if model in NAMED else path.stem
    key = given or secrets.token_urlsafe(24)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {name}
    params.api_keys = [key]
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.use_jinja = True
    params.n_ctx = context * slots
    params.n_parallel = slots  # llama.cpp divides its context by the slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or max(1, (os.cpu_count() or 2) - 1)
    server = xllamacpp.Server(params)
    return Serving(f"{server.listening_address}/v1", name, key, given is None, server)


def wait() -> None:
    """Keep the process alive until it is interrupted."""
    threading.Event().wait()
