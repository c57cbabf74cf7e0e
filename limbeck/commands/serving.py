"""The command line of `limbeck serve`: text by llama.cpp, or hidden states by transformers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from limbeck.types import UserError

Dtype = Literal["float32", "bfloat16"]


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder, a model of `limbeck models`, or a GGUF file; with --states any model.", metavar="MODEL"
        ),
    ],
    port: Annotated[int, typer.Option("--port", help="0 picks a free port.", min=0, max=65535)] = 8080,
    context: Annotated[
        int, typer.Option("--context", help="Maximum tokens of a prompt with its answer.", min=64)
    ] = 4096,
    slots: Annotated[int, typer.Option("--slots", help="Requests answered (with --states: held) at once.", min=1)] = 4,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Default: the number of cores minus one.", min=1)
    ] = None,
    states: Annotated[
        bool, typer.Option("--states", help="Give hidden states: the exact distribution of a teacher elsewhere.")
    ] = False,
    host: Annotated[
        str, typer.Option("--host", help="With --states: the address to listen on.", metavar="ADDRESS")
    ] = "127.0.0.1",
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="With --states: the type of the weights. Default: float32.")
    ] = None,
) -> None:
    """Serve a model or a student here: its text with llama.cpp, or with --states its hidden states with transformers.
    Set its key in LIMBECK_API_KEY, or get a new one printed."""
    if states:
        from limbeck.commands.serve_states import serve_until_stopped as serve_states

        serve_states(model, (host, port), context=context, slots=slots, threads=threads, dtype=dtype)
        return
    if host != "127.0.0.1" or dtype is not None:
        raise UserError("--host and --dtype are settings of --states: add it, or leave them out")
    from limbeck.commands.serve import serve_until_stopped

    serve_until_stopped(model, port=port, context=context, slots=slots, threads=threads)
