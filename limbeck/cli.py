"""The verbs. Each imports what it needs when it is called, so that `limbeck --help` answers at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.commands import console
from limbeck.progress import Reporter

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe

app = typer.Typer(
    help="Distil large language models: elicit what a teacher knows, train a student on it, prove what was kept.",
    epilog="Start with: limbeck run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a built-in recipe.", metavar="RECIPE")
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.", metavar="RUN")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Replace a setting: a.b=c. May be given again.", metavar="A.B=C")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run folder; runs/NAME by default.", metavar="DIR")]
TrackOption = Annotated[
    str | None,
    typer.Option("--track", help="Tell a tracker too: tensorboard, trackio, wandb or mlflow.", metavar="TRACKER"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


KINDS = ("divergences", "losses", "steps", "recipes")  # of what `limbeck methods` lists


def main() -> None:
    """The command's entry point."""
    with console.messages():
        app()


@app.command(epilog="Example: limbeck run recipes/quickstart.yaml --set train.lr=1e-4 --out runs/second")
def run(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006
    out: OutOption = None,
    json_: JsonOption = False,
    track: TrackOption = None,
) -> None:
    """Do all that a recipe asks for and that is not done yet. Kill it and run it again: it goes on."""
    _stages(recipe, set_, out, json_, ("elicit", "train", "evaluate", "report"), track)


@app.command(epilog="Example: limbeck elicit recipes/quickstart.yaml")
def elicit(recipe: RecipeArgument, set_: SetOption = [], out: OutOption = None, json_: JsonOption = False) -> None:  # noqa: B006
    """Ask the teacher for its text (and for its distributions, where they are kept), nothing more."""
    _stages(recipe, set_, out, json_, ("elicit",))


@app.command(epilog="Example: limbeck train recipes/quickstart.yaml --profile")
def train(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006
    out: OutOption = None,
    json_: JsonOption = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time one step against its FLOP floor instead of training.")
    ] = False,
    track: TrackOption = None,
) -> None:
    """Train the student and its control (and elicit first, where text is missing)."""
    if profile:
        _profile(recipe, set_, out, json_)
    else:
        _stages(recipe, set_, out, json_, ("elicit", "train"), track)


@app.command(epilog="Example: limbeck evaluate recipes/quickstart.yaml")
def evaluate(recipe: RecipeArgument, set_: SetOption = [], out: OutOption = None, json_: JsonOption = False) -> None:  # noqa: B006
    """Measure teacher, controls and student of a trained run, and write its report."""
    _stages(recipe, set_, out, json_, ("evaluate", "report"))


@app.command(epilog="Example: limbeck report runs/quickstart")
def report(
    run_folder: RunArgument,
    json_: JsonOption = False,
    table: Annotated[bool, typer.Option("--table", help="Print the result table as Markdown instead.")] = False,
) -> None:
    """Write report.html again from a run folder."""
    from limbeck.report.page import read_comparison, read_summary, write_report
    from limbeck.report.table import compare_markdown, markdown

    if table:
        compared = (run_folder / "comparison.json").exists()
        text = compare_markdown(read_comparison(run_folder)) if compared else markdown(read_summary(run_folder))
        console.out.print(text, markup=False, end="")
    else:
        _result({"report": str(write_report(run_folder))}, json_)


@app.command(epilog="Example: limbeck compare seq-kd forward-kl reverse-kl --like quickstart --seeds 3")
def compare(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes; only their writers and losses are their own.", metavar="RECIPE...")
    ],
    like: Annotated[
        str | None,
        typer.Option(
            "--like", help="Whose teacher, student, prompts and training all take; else the first's.", metavar="RECIPE"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How often each is trained.", min=1)] = 3,
    base: Annotated[
        str | None, typer.Option("--base", help="What the others are held against; else the first.", metavar="NAME")
    ] = None,
    set_: SetOption = [],  # noqa: B006
    out: OutOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep every trained student, not only each method's first.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train recipes under the same conditions and show what may be said of their differences. Kill it: it goes on."""
    from limbeck.runs.compare import compare as compare_recipes

    reporter = console.JsonLines() if json_ else console.Terminal()
    with console.StopAsked().listening() as stop:
        try:
            folder = compare_recipes(
                recipes, out, like=like, seeds=seeds, base=base, overrides=set_, keep=keep, reporter=reporter, stop=stop
            )
        finally:
            reporter.close()
    from limbeck.report.verdict import compare_verdict

    comparison = json.loads((folder / "comparison.json").read_text())
    _result(
        {"comparison": str(folder), "verdict": compare_verdict(comparison), "report": str(folder / "report.html")},
        json_,
    )


@app.command(epilog="Example: limbeck check recipes/quickstart.yaml --set teacher=./my-model")
def check(recipe: RecipeArgument, set_: SetOption = [], json_: JsonOption = False) -> None:  # noqa: B006
    """Say what a recipe will cost, and refuse what can't work, before anything is loaded."""
    from limbeck.config.recipe import load_recipe
    from limbeck.runs.preflight import check as check_recipe

    loaded = load_recipe(recipe, set_)
    plan = check_recipe(loaded)
    if json_:
        _result({"recipe": loaded.hash, "plan": plan.as_dict()}, True)
        return
    console.out.print(f"[bold]{loaded.name}[/bold] (hash {loaded.hash[:16]}) can run.")
    for name, value in plan.lines():
        console.out.print(f"  {name:<26} {value}", markup=False)


@app.command(epilog="Example: limbeck doctor recipes/offline-top-k.yaml")
def doctor(recipe: RecipeArgument, set_: SetOption = [], out: OutOption = None, json_: JsonOption = False) -> None:  # noqa: B006
    """Ask the teacher a few texts and look for what silently ruins a distillation; exit status 2 where there is a
    fault."""
    from limbeck.commands.doctor import as_data, examine
    from limbeck.config.recipe import load_recipe

    findings = examine(load_recipe(recipe, set_), out, lambda name: console.err.print(f"[dim]{name} ...[/dim]"))
    found = as_data(findings)
    if json_:
        _result(found, True)
    else:
        for one in findings:
            colour = {"fine": "green", "fault": "red"}.get(one.verdict, "dim")
            console.out.print(f"[{colour}]{one.verdict:<13}[/{colour}]", end=" ")
            console.out.print(f"{one.name}: {one.seen}", markup=False, soft_wrap=True)
    if found["faults"]:
        raise typer.Exit(2)


@app.command(epilog="Example: limbeck cache recipes/offline-top-k.yaml --import vllm.jsonl")
def cache(
    recipe: RecipeArgument,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Another tool's log-probabilities, put into the cache.")
    ] = None,
    export: Annotated[Path | None, typer.Option("--export", help="A file to write for another tool.")] = None,
    set_: SetOption = [],  # noqa: B006
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Exchange the teacher's distributions over a recipe's text with other tools: vLLM's and axolotl's columns, in JSON
    lines."""
    from limbeck.commands.exchange import bring_in, take_out
    from limbeck.config.recipe import load_recipe
    from limbeck.runs.build import run_folder
    from limbeck.types import UserError

    loaded = load_recipe(recipe, set_)
    folder = run_folder(loaded, out)
    if (import_ is None) == (export is None):
        raise UserError("give exactly one of --import FILE and --export FILE")
    _result(bring_in(loaded, folder, import_) if import_ else take_out(loaded, folder, export or Path()), json_)


@app.command(epilog="Example: limbeck methods jsd")
def methods(
    name: Annotated[str | None, typer.Argument(help="One divergence, loss, step or recipe.", metavar="NAME")] = None,
    json_: JsonOption = False,
) -> None:
    """List the losses, steps of elicitation, recipes and tasks that can be named."""
    from limbeck.runs.build import methods as list_methods
    from limbeck.types import UserError, nearest

    known = list_methods()
    if name is not None:
        found = {kind: known[kind][name] for kind in KINDS if name in known[kind]}
        if not found:
            names = [entry for kind in KINDS for entry in known[kind]]
            raise UserError(f"no method is named {name!r}{nearest(name, names)}")
        known = found
    if json_ or name is not None:
        _result(known, True)
        return
    for kind in KINDS:
        console.out.print(f"[bold]{kind}[/bold]")
        for entry, facts in known[kind].items():
            console.out.print(
                f"  {entry:<16} {facts.get('formula') or facts.get('title') or facts.get('kind')}", markup=False
            )
    console.out.print("[bold]tasks[/bold]\n  " + ", ".join(known["tasks"]))


@app.command(epilog="Example: limbeck models get smollm2-135m-instruct")
def models(
    action: Annotated[str | None, typer.Argument(help="`get` fetches and converts a model.", metavar="get")] = None,
    name: Annotated[str | None, typer.Argument(help="The model to get.", metavar="NAME")] = None,
    json_: JsonOption = False,
) -> None:
    """List the models known by name, with licence and terms, and what is cached; or get one."""
    from limbeck.models.named import NAMED, home, is_fetched
    from limbeck.types import UserError

    if action is not None and (action != "get" or name is None):
        raise UserError("say `limbeck models`, or `limbeck models get NAME`")
    if name is not None:
        from limbeck.models.load import model_folder
        from limbeck.models.named import fetch

        fetch(name)
        _result({"model": name, "folder": str(model_folder(name))}, json_)
        return
    listed = [
        {
            "name": m.name,
            "title": m.title,
            "licence": m.licence,
            "terms": m.terms,
            "download_mb": m.download_mb,
            "cached": is_fetched(m.name),
        }
        for m in NAMED.values()
    ]
    if json_:
        _result({"models": listed, "cache": str(home())}, True)
        return
    for facts in listed:
        state = "cached" if facts["cached"] else f"not fetched yet ({facts['download_mb']} MB)"
        console.out.print(
            f"[bold]{facts['name']}[/bold]  {facts['title']}\n  licence {facts['licence']}; {facts['terms']}; {state}"
        )


@app.command(epilog="Example: echo 'Why is the sky blue?' | limbeck chat runs/quickstart")
def chat(
    run_folder: RunArgument,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
) -> None:
    """Teacher and student answer the same line side by side. An empty line ends."""
    from limbeck.commands.chat import converse

    converse(run_folder, max_tokens, temperature)


@app.command(epilog="Example: limbeck watch runs/quickstart")
def watch(
    run_folder: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
) -> None:
    """Show how a run goes, anew every second: losses, rate, time left. Ctrl-C ends the watching, not the run."""
    from limbeck.commands.watch import watch as watch_run

    watch_run(run_folder, console.out, once)


@app.command(epilog="Example: limbeck serve qwen2.5-coder-1.5b-instruct --port 8080")
def serve(
    model: Annotated[str, typer.Argument(help="A name of `limbeck models`, or a GGUF file.", metavar="MODEL")],
    port: Annotated[int, typer.Option("--port", help="0 for any that is free.", min=0, max=65535)] = 8080,
    context: Annotated[
        int, typer.Option("--context", help="Tokens of a prompt and its answer together.", min=64)
    ] = 4096,
    slots: Annotated[int, typer.Option("--slots", help="Requests that are answered at once.", min=1)] = 4,
    threads: Annotated[
        int | None, typer.Option("--threads", help="One less than there are cores, unless set.", min=1)
    ] = None,
) -> None:
    """Serve a model on loopback with the packaged llama.cpp server; its key comes from LIMBECK_API_KEY, or is made up
    and shown once."""
    from limbeck.commands.serve import KEY, wait
    from limbeck.commands.serve import serve as start

    serving = start(model, port, context, slots, threads)
    if serving.made:
        console.err.print(f"export {KEY}={serving.key}", markup=False)
    console.out.print(f"teacher.server: {{url: {serving.url}, name: {serving.name}}}", markup=False)
    wait()


@app.command(epilog="Example: limbeck harness runs/quickstart --task arc_easy --task my-task.yaml --limit 100")
def harness(
    where: Annotated[
        str,
        typer.Argument(
            help="A run folder, a model, or with --base-url the server's name of its model.", metavar="WHERE"
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            "--task", help="A task's name, a YAML file, or a task folder. May be given again.", metavar="TASK"
        ),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first so many items of each task.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A JSON file; RUN/evaluation/harness.json of a run.", metavar="FILE")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", help="An OpenAI-compatible server; its key comes from OPENAI_API_KEY.", metavar="URL"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Whose tokenizer the served model has; to score given text.", metavar="MODEL"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a student, a model or a server."""
    from limbeck.commands.harness.run import harness as run_harness

    def note(text: str) -> None:
        console.err.print(text, markup=False)

    found = run_harness(where, task, out, limit=limit, chat=chat, base_url=base_url, tokenizer=tokenizer, note=note)
    if json_:
        _result(found, True)
        return
    for name, entry in found["tasks"].items():
        for metric, result in entry["results"].items():
            shown = "not a number" if result["value"] is None else f"{result['value']:.4f}"
            error = "" if result["stderr"] is None else f" +- {result['stderr']:.4f}"
            console.out.print(f"{name} {metric}: {shown}{error}", markup=False)
    console.out.print(f"results: {found['file']}", markup=False)


def _stages(
    recipe: str,
    overrides: list[str],
    out: Path | None,
    as_json: bool,
    stages: tuple[str, ...],
    tracker: str | None = None,
) -> None:
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from limbeck.runs.pipeline import run as run_recipe

    reporter = console.JsonLines() if as_json else console.Terminal()
    with console.StopAsked().listening() as stop:
        try:
            with _tracked(reporter, loaded, out, tracker) as told:
                folder = run_recipe(loaded, out, told, stop, stages)
        finally:
            reporter.close()
    result: dict[str, Any] = {"run": str(folder)}
    if "report" in stages:
        from limbeck.report.page import verdict

        summary = json.loads((folder / "evaluation" / "summary.json").read_text())
        result |= {"verdict": verdict(summary), "report": str(folder / "report.html")}
    _result(result, as_json)


@contextlib.contextmanager
def _tracked(reporter: Reporter, recipe: Recipe, out: Path | None, tracker: str | None) -> Iterator[Reporter]:
    """The reporter, or one that tells a tracker too."""
    if tracker is None:
        yield reporter
        return
    from limbeck.commands.track import Tracked
    from limbeck.runs.build import run_folder

    tracked = Tracked(reporter, run_folder(recipe, out), tracker)
    try:
        yield tracked
    finally:
        tracked.close()


def _profile(recipe: str, overrides: list[str], out: Path | None, as_json: bool) -> None:
    from limbeck.commands.profile import profile
    from limbeck.config.recipe import load_recipe

    _result(profile(load_recipe(recipe, overrides), out, console.Terminal()), as_json)


def _result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.out.print_json(json.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        console.out.print(f"{name.replace('_', ' ')}: {value}", markup=False)
