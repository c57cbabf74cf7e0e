"""The command line of `limbeck export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.commands import console, printing


def export(
    where: Annotated[
        str, typer.Argument(help="A run folder, or a model's folder in Hugging Face form.", metavar="RUN")
    ],
    to: Annotated[str, typer.Option("--to", help="gguf, ollama or hf.", metavar="FORM")],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="f32, f16, bf16; of GGUF files also q8_0, q6_k, q5_k_m, q4_k_m, q4_0. Default: f16, or as it is (hf).",
            metavar="TYPE",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The new folder. Default: RUN/exports/FORM-TYPE.", metavar="DIR"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the trained student as a GGUF file, for Ollama, or as a clean folder; compare what was written with it."""
    from limbeck.commands.export.student import find_student

    find_student(where)  # before the imports, which take seconds
    from limbeck.commands.export.run import export as export_student

    with console.long_work(json_) as (reporter, stop):
        record = export_student(where, form=to, kind=type_, out=out, reporter=reporter, stop=stop)
    printing.print_result(record if json_ else _lines(record), json_)


def _lines(record: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to know of an export."""
    files = record.get("files") or [record]
    shown = {"folder": record["folder"], "type": record["type"]}
    shown["size"] = f"{sum(file['bytes'] for file in files) / 1e6:.1f} MB"
    found = record["agreement"]
    if found is None:
        return shown | {"checked": record["note"]}
    shown["KL to the student"] = (
        f"{found['kl_nats_per_token']:.5f} nats a token over {found['tokens']} tokens of {found['prompts']} answers"
        f" (largest {found['largest_kl_nats']:.3f}; at most {found['most_kl_nats_per_token']:g} is accepted)"
    )
    shown["same first choice"] = f"{100 * found['same_first_choice']:.1f} % of the tokens"
    if "same_greedy_answers" in found:
        shown["same greedy answers"] = f"{found['same_greedy_answers']} of {found['prompts']}"
        shown["chat template"] = (
            "the same prompt tokens" if found["same_prompt_tokens"] else found["prompt_tokens_differ"]
        )
    return shown
