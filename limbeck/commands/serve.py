"""Serve a GGUF model or a run's student here with the packaged llama.cpp server (extra `serve`: xllamacpp)."""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.commands import console
from limbeck.models.gguf_file import check_gguf
from limbeck.models.named import NAMED, fetch
from limbeck.progress import Reporter, Silent
from limbeck.storage.files import user_path
from limbeck.types import UserError

KEY = "LIMBECK_API_KEY"


@dataclass(frozen=True)
class RunningServer:
    """A server that runs in this process until the process ends. Its key is stored nowhere else."""

    url: str
    name: str
    key: str
    key_is_new: bool  # generated here, so it has to be shown to the user
    server: Any


def serve(
    model: str,
    port: int = 0,
    context: int = 4096,
    slots: int = 4,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> RunningServer:
    """Start a server.

    Args:
        model: a name of `limbeck models`, a `.gguf` file, or a run folder, whose student is exported once.
        port: 0 picks a free one.
        context: the maximum length of a prompt with its answer, in tokens, for each slot.
        slots: how many requests are answered at the same time.
        threads: by default one less than the machine has cores: with as many as cores, llama.cpp slows to a crawl when
            anything else runs.

    Raises:
        UserError: there is no such model, or xllamacpp is not installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("the packaged server is not installed: pip install 'limbeck[serve]'") from error
    name, path = _find(model, reporter or Silent())
    user_key = os.environ.get(KEY)
    key = user_key or secrets.token_urlsafe(24)
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
    url = f"{server.listening_address}/v1"
    return RunningServer(url=url, name=name, key=key, key_is_new=user_key is None, server=server)


def _find(model: str, reporter: Reporter) -> tuple[str, Path]:
    """The name and the GGUF file of what is served."""
    path = fetch(model) if model in NAMED else user_path(model)
    if path.is_dir():
        from limbeck.commands.export.run import exported_once

        return exported_once(path, reporter)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"there is no GGUF file {model!r}: give one, a run folder, or a model of `limbeck models`")
    check_gguf(path)  # llama.cpp would end this process
    return (model if model in NAMED else path.stem), path


def serve_until_stopped(model: str, port: int, context: int, slots: int, threads: int | None) -> None:
    """`limbeck serve`: start a server, print where it is, and keep the process alive until it is interrupted."""
    reporter = console.Terminal()
    server = serve(model, port=port, context=context, slots=slots, threads=threads, reporter=reporter)
    if server.key_is_new:
        console.err.print(f"export {KEY}={server.key}", markup=False)
    console.out.print(f"teacher.server: {{url: {server.url}, name: {server.name}}}", markup=False)
    threading.Event().wait()
