"""The commands. Each imports what it needs when it is called, so that `limbeck --help` answers at once, and reads its
recipe before anything heavy is imported, so that a mistake in it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import __version__
from limbeck.commands import console, printing
from limbeck.commands.answers import answers
from limbeck.commands.export.command import export
from limbeck.commands.new.command import new
from limbeck.commands.options import ScaleOption, SetOption
from limbeck.commands.push import push
from limbeck.commands.ranks import one_process
from limbeck.commands.report import report
from limbeck.commands.serving import serve
from limbeck.commands.why import why

app = typer.Typer(
    help="Distil large language models: collect a teacher's knowledge, train a student on it, measure what was kept.",
    epilog="Start with: limbeck run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a built-in recipe.", metavar="RECIPE")
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.", metavar="RUN")]
MachineOption = Annotated[
    Path | None,
    typer.Option("--machine", help="A file with the machine section: device, sizes, cluster.", metavar="FILE"),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", metavar="DEVICE")]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run folder. Default: runs/NAME.", metavar="DIR")]
TrackOption = Annotated[
    str | None,
    typer.Option("--track", help="Also log to tensorboard, trackio, wandb or mlflow.", metavar="TRACKER"),
]
RanksOption = Annotated[
    int | None,
    typer.Option("--ranks", help="Share training and evaluation among this many processes.", min=1, metavar="N"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line."""
    with console.error_messages():
        app()


def _print_version(asked: bool) -> None:
    if asked:
        console.out.print(__version__)
        raise typer.Exit


@app.callback()
def _limbeck(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command."""


@app.command(epilog="Example: limbeck run recipes/quickstart.yaml --set train.lr=1e-4 --out runs/second")
def run(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    json_: JsonOption = False,
    track: TrackOption = None,
    ranks: RanksOption = None,
) -> None:
    """Run a whole recipe: elicit, train, evaluate, report. If it is stopped, run it again to continue."""
    from limbeck.commands.stages import run_stages
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_, machine, scale=scale)
    stages = ("elicit", "train", "evaluate", "report")
    run_stages(loaded, stages, out=out, as_json=json_, tracker=track, count=ranks)


@app.command(epilog="Example: limbeck elicit recipes/quickstart.yaml")
def elicit(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Collect the teacher's text, and its distributions if the recipe caches them."""
    from limbeck.commands.stages import run_stages
    from limbeck.config.recipe import load_recipe

    run_stages(load_recipe(recipe, set_, machine, scale=scale), ("elicit",), out=out, as_json=json_)


@app.command(epilog="Example: limbeck train recipes/quickstart.yaml --profile")
def train(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    json_: JsonOption = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Don't train: time a few steps and compare them with their FLOP floor.")
    ] = False,
    track: TrackOption = None,
    ranks: RanksOption = None,
) -> None:
    """Train the student and its controls, after eliciting any text that is missing."""
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_, machine, scale=scale)
    if not profile:
        from limbeck.commands.stages import run_stages

        run_stages(loaded, ("elicit", "train"), out=out, as_json=json_, tracker=track, count=ranks)
        return
    one_process("train --profile", ranks)
    from limbeck.commands.profile import profile as profile_steps

    printing.print_result(profile_steps(loaded, out, console.Terminal()), json_)


@app.command(epilog="Example: limbeck evaluate recipes/quickstart.yaml")
def evaluate(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    json_: JsonOption = False,
    ranks: RanksOption = None,
) -> None:
    """Evaluate the teacher, the controls and the student of a trained run, and write its report."""
    from limbeck.commands.stages import run_stages
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_, machine, scale=scale)
    run_stages(loaded, ("evaluate", "report"), out=out, as_json=json_, count=ranks)


app.command(epilog="Example: limbeck report runs/quickstart --csv")(report)


@app.command(epilog="Example: limbeck compare seq-kd forward-kl reverse-kl --like quickstart --seeds 3")
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(help="The recipes. Each contributes only its writers and losses.", metavar="RECIPE..."),
    ],
    set_: SetOption,
    scale: ScaleOption = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            help="The recipe that sets teacher, student, prompts and training for all. Default: the first.",
            metavar="RECIPE",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per recipe.", min=1)] = 3,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The recipe to compare the others with. Default: the first.", metavar="NAME"),
    ] = None,
    out: OutOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep every trained student, not only the first seed's.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train several recipes under the same conditions and test their differences."""
    one_process("compare")
    from limbeck.config.recipe import load_recipe
    from limbeck.types import UserError

    if like is None and (set_ or scale is not None):
        given = "--set" if set_ else "--scale"
        raise UserError(f"{given} changes the common settings, so say whose they are: --like RECIPE")
    common = None if like is None else load_recipe(like, set_, scale=scale)
    loaded = [load_recipe(recipe) for recipe in recipes]
    from limbeck.runs.compare import compare as compare_recipes

    with console.long_work(json_) as (reporter, stop):
        folder = compare_recipes(
            loaded, out, like=common, seeds=seeds, base=base, keep=keep, reporter=reporter, stop=stop
        )
    from limbeck.report.page import compare_verdict, read_comparison

    verdict = compare_verdict(read_comparison(folder))
    result = {"comparison": str(folder), "verdict": verdict, "report": str(folder / "report.html")}
    printing.print_result(result, json_)


@app.command(epilog="Example: limbeck check recipes/quickstart.yaml --set teacher=./my-model")
def check(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    device_like: Annotated[
        str | None,
        typer.Option("--device-like", help="Estimate for hardware that is not here: h100-80gb, ...", metavar="NAME"),
    ] = None,
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Check that a recipe can run and fits the device, that its servers are there, and print what it will cost; no
    model is loaded."""
    from limbeck.commands.check import check as check_recipe
    from limbeck.config.recipe import load_recipe

    if not check_recipe(load_recipe(recipe, set_, machine, scale=scale), device_like, out, as_json=json_):
        raise typer.Exit(console.USER_ERROR)


@app.command(epilog="Example: limbeck doctor recipes/offline-top-k.yaml")
def doctor(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Look for faults that silently ruin a distillation, with a few texts. Exit status 2 if there is one."""
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_, machine, scale=scale)
    from limbeck.commands.doctor.run import as_data, examine

    findings = examine(loaded, out, lambda name: console.err.print(f"[dim]{name} ...[/dim]"))
    data = as_data(findings)
    if json_:
        printing.print_result(data, json_)
    else:
        printing.print_findings(findings)
    if data["faults"]:
        raise typer.Exit(console.USER_ERROR)


@app.command(epilog="Example: limbeck cache recipes/offline-top-k.yaml --import vllm.jsonl")
def cache(
    recipe: RecipeArgument,
    set_: SetOption,
    scale: ScaleOption = None,
    machine: MachineOption = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="A file of another tool's log-probabilities, to put into the cache.")
    ] = None,
    export: Annotated[Path | None, typer.Option("--export", help="A file to write for another tool.")] = None,
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Import or export teacher log-probabilities as JSON lines, in vLLM's or axolotl's format."""
    from limbeck.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_, machine, scale=scale)
    from limbeck.commands.exchange import export_cache, import_file
    from limbeck.runs.claim import run_folder
    from limbeck.types import UserError

    folder = run_folder(loaded, out)
    if import_ is not None and export is None:
        printing.print_result(import_file(loaded, folder, import_), json_)
    elif export is not None and import_ is None:
        printing.print_result(export_cache(loaded, folder, export), json_)
    else:
        raise UserError("give exactly one of --import FILE and --export FILE")


@app.command(epilog="Example: limbeck methods jsd")
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A divergence, loss, step or recipe to describe.", metavar="NAME")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """List all losses, elicitation steps, recipes and tasks, or describe one of them."""
    from limbeck.runs.catalogue import methods as all_methods

    printing.print_methods(all_methods(), name, json_)


@app.command(epilog="Example: limbeck models get smollm2-135m-instruct")
def models(
    action: Annotated[str | None, typer.Argument(help="`get` downloads and converts a model.", metavar="get")] = None,
    name: Annotated[str | None, typer.Argument(help="The model to get.", metavar="NAME")] = None,
    json_: JsonOption = False,
) -> None:
    """List the models known by name with their licences, or download one."""
    from limbeck.models.named import NAMED, fetch, home, is_fetched
    from limbeck.types import UserError

    if action is not None and (action != "get" or name is None):
        raise UserError("use `limbeck models`, or `limbeck models get NAME`")
    if name is not None:
        from limbeck.models.load import model_folder

        fetch(name)
        printing.print_result({"model": name, "folder": str(model_folder(name))}, json_)
        return
    facts = ("name", "title", "licence", "terms", "download_mb")
    listing = [
        {fact: getattr(model, fact) for fact in facts} | {"cached": is_fetched(model.name)} for model in NAMED.values()
    ]
    if json_:
        printing.print_result({"models": listing, "cache": str(home())}, json_)
    else:
        printing.print_models(listing)


@app.command(epilog="Example: echo 'Why is the sky blue?' | limbeck chat runs/quickstart")
def chat(
    run_folder: RunArgument,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Maximum tokens per answer.", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
    device: DeviceOption = "auto",
) -> None:
    """Ask the teacher and the student the same questions, side by side. An empty line quits."""
    from limbeck.commands.chat import converse

    converse(run_folder, max_tokens, temperature, device)


@app.command(epilog="Example: limbeck watch runs/quickstart")
def watch(
    run_folder: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and exit.")] = False,
) -> None:
    """Show a run's progress live: losses, speed, time left. Ctrl-C stops the display, not the run. Without a terminal,
    print the state once."""
    from limbeck.commands.watch import watch as watch_run

    watch_run(run_folder, console.out, once)


app.command(epilog="Example: limbeck serve qwen2.5-coder-1.5b-instruct --port 8080")(serve)
app.command(epilog="Example: limbeck answers --forget gpt-4o-mini")(answers)
app.command(epilog="Example: limbeck export runs/quickstart --to gguf --type q8_0")(export)
app.command(epilog="Example: limbeck why runs/quickstart --set train.lr=1e-4")(why)
app.command(epilog="Example: limbeck push runs/quickstart --to me/tickets-135m")(push)
app.command(epilog="Example: limbeck new tickets --task classify --data tickets.csv")(new)


@app.command(epilog="Example: limbeck harness runs/quickstart --task arc_easy --task my-task.yaml --limit 100")
def harness(
    where: Annotated[
        str,
        typer.Argument(
            help="A run folder, a model, or with --base-url the model's name on the server.", metavar="WHERE"
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option("--task", help="A task name, YAML file or task folder. Can be repeated.", metavar="TASK"),
    ],
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first items of each task.", min=1)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The JSON file to write. Default for a run: RUN/evaluation/harness.json.", metavar="FILE"
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="An OpenAI-compatible server; its key is OPENAI_API_KEY.", metavar="URL"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The model whose tokenizer the server uses, for scoring.", metavar="MODEL"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a student, a model or a server."""
    from limbeck.commands.harness.run import harness as run_harness

    def note(text: str) -> None:
        console.err.print(text, markup=False)

    results = run_harness(where, task, out, limit=limit, chat=chat, base_url=base_url, tokenizer=tokenizer, note=note)
    if json_:
        printing.print_result(results, json_)
    else:
        printing.print_task_results(results)
