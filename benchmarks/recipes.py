"""Runs every built-in recipe once from end to end, on real weights at a small size; writes recipes/evidence.json.

    make evidence-recipes                                # all that has no row yet; killed, it goes on
    .venv/bin/python benchmarks/recipes.py dpo gkd       # these again

As many recipes run at once as there are cores, and one of a large model, each with one thread; a recipe that is named
alone has all threads. One that takes longer than LIMIT_S is ended.

The size is the same for all (`small`): at most PROMPTS training prompts (half of them where steps make text of them),
STEPS steps of TOKENS response tokens, HELD_OUT held-out answers and ITEMS items of a task. It shows that a recipe runs
and that its loss falls, not how good its method is. A recipe that asks for a server gets one here: llama.cpp with
SmolLM2-135M, or vLLM where one is set up by `make vllm`. What can't run here has its reason instead of figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from vllm_server import PYTHON, VllmServer

from limbeck.commands.serve import KEY, serve
from limbeck.config.builtin import evidence_file, recipe_files
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.models.load import model_folder
from limbeck.models.placement import multiplies_in_bfloat16
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import Metrics, read_json
from limbeck.storage.rounds import kept_round, rounds_in

PROMPTS, STEPS, TOKENS, ANSWER, HELD_OUT, ITEMS, COUNT = 16, 6, 128, 32, 6, 3, 12
WRITTEN = 160  # tokens of an answer in the steps WRITING
WRITING = ("answer", "critique", "debate", "lengthen", "rationale", "rationalise", "refine")
GROUPS, GROUP = 4, 4  # of a step with rewards
LIMIT_S = 1200
RUNS = Path("runs/evidence")
MODEL = "smollm2-135m-instruct"
SERVED = {"api-own-logprobs": "llama.cpp", "api-top-logprobs": "llama.cpp", "minillm-from-server": "vllm"}
QWEN = "qwen2.5-coder-0.5b-instruct"
SUMS = (  # these need a teacher that gets sums right
    "distilling-step-by-step",
    "equation-reasoner",
    "fine-tune-cot",
    "limo",
    "mcc-kd",
    "metamath",
    "openthoughts",
    "rft",
    "s1",
)
STRONG = "qwen2.5-coder-1.5b-instruct"
JUDGED = ("codeultrafeedback", "oss-instruct", "rlaif")  # a teacher that writes code and verdicts
HARD = ("extract-to-a-schema", "pandalm", "persdistill")  # one whose verdicts hold in both orders, whose JSON is whole
OWN_SUMS = ("rest-em", "star")  # and these a student that does
OWN = {  # what a recipe needs at this size
    "distillm": ["--set=rollout.validation.prompts=4"],
    **{key: [f"--set=teacher={QWEN}"] for key in (*SUMS, *JUDGED)},
    "codeultrafeedback": [f"--set=teacher={QWEN}", "--set=elicit.1.params.max_tokens=400"],  # room for programs
    "extract-to-a-schema": [
        f"--set=teacher={STRONG}",
        f"--set=student.start={{pretrained: {MODEL}}}",  # pruned, that teacher is too large to train here
        "--set=evaluate.max_tokens=96",
    ],
    "multi-teacher-average": ["--set=student.start.prune.layers=6"],  # 20 take 26 GB to train
    "pandalm": [
        f"--set=teacher={STRONG}",
        "--set=prompts.limit=16",  # few verdicts hold in both orders
        "--set=elicit.0.params.max_tokens=160",
        "--set=elicit.1.params.reasons=false",  # after reasons it does not write its verdict on a line of its own
        "--set=evaluate.max_tokens=96",
    ],
    "persdistill": [
        f"--set=teacher={STRONG}",
        "--set=prompts.limit=40",  # few attempts are mended
        "--set=elicit.0.params.max_tokens=160",
        "--set=elicit.1.params.max_tokens=160",
        "--set=evaluate.max_tokens=96",
    ],
    "tinystories": [
        f"--set=teacher={QWEN}",
        "--set=prompts.limit=null",  # its words, verbs after nouns
        "--set=student.start.scratch.config.num_key_value_heads=3",  # as many as heads, which the other teacher has
    ],
    **{key: [f"--set=student.start.pretrained={QWEN}"] for key in OWN_SUMS},
}
MISSING = {"r1-traces": "needs a server of a model that thinks aloud, such as DeepSeek-R1's distilled ones"}
VARIANTS = {  # what no recipe of its own shows: (recipe, overrides)
    "quickstart, robustness": (
        "quickstart",
        [
            '--set=evaluate.metrics=["fidelity", "everyday", "everyday@typos"]',
            '--set=evaluate.limits={"everyday": 6, "everyday@typos": 6}',
        ],
    ),
    "quickstart, judged": ("quickstart", [f"--set=evaluate.judge={QWEN}"]),
    "few-shot-mcqa, on multiple choice": (
        "few-shot-mcqa",
        ['--set=evaluate.metrics=["fidelity", "choices"]', '--set=evaluate.limits={"choices": 6}'],
    ),
}


def small(recipe: Recipe) -> list[str]:
    """The overrides that bring a recipe to the size at which all are run."""
    settings: dict[str, Any] = {
        "prompts.limit": min(recipe.prompts.limit or PROMPTS, PROMPTS // 2 if recipe.elicit else PROMPTS),
        "train.epochs": None,
        "train.steps": STEPS,
        "train.tokens_per_step": TOKENS,
        "evaluate.limit": HELD_OUT,
        "evaluate.max_tokens": ANSWER,
        "evaluate.own_prompts": 1,
        "evaluate.controls": ["untouched"],
        "evaluate.speeds": False,
    }
    if tasks := [name for name in recipe.evaluate.metrics if name != "fidelity"]:
        settings["evaluate.limits"] = dict.fromkeys(tasks, ITEMS)
    if recipe.student.start.prune is not None and recipe.student.start.prune.keep in ("importance", "block_influence"):
        settings["student.start.prune.calibration"] = 1
    if all(writer.by != "elicited" for writer in recipe.writer):
        most = [min(writer.max_tokens, ANSWER) for writer in recipe.writer]
        writers = [writer.model_dump(mode="json", exclude_unset=True) for writer in recipe.writer]
        settings["writer"] = [writer | {"max_tokens": tokens} for writer, tokens in zip(writers, most, strict=True)]
    for index, step in enumerate(recipe.elicit or []):
        for key, limit in {"count": COUNT, "requests": COUNT, "each": 1}.items():
            if key in step.params:
                settings[f"elicit.{index}.params.{key}"] = min(step.params[key], limit)
        if step.name in WRITING:
            settings[f"elicit.{index}.params.max_tokens"] = min(step.params.get("max_tokens", WRITTEN), WRITTEN)
    if recipe.rollout is not None and recipe.rollout.rewards:
        settings |= {"rollout.prompts": GROUPS, "rollout.group": min(recipe.rollout.group or GROUP, GROUP)}
    if multiplies_in_bfloat16():
        settings["train.precision"] = "bfloat16"
    if recipe.rounds is not None:
        short = {"epochs": None, "steps": STEPS, "tokens_per_step": TOKENS}
        settings["rounds.n"] = min(recipe.rounds.n, 2)
        parts = {"first": recipe.rounds.first} | {
            f"stages.{name}": part for name, part in (recipe.rounds.stages or {}).items()
        }
        for name, part in parts.items():
            if part is not None:
                settings[f"rounds.{name}"] = part | {"train": part.get("train", {}) | short}
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


@contextlib.contextmanager
def server_for(recipe: str) -> Iterator[list[str]]:
    """The overrides that name a server which runs here, for a recipe that asks for one."""
    kind = SERVED.get(recipe)
    if kind is None:
        yield []
        return
    os.environ.setdefault(KEY, secrets.token_urlsafe(24))
    if kind == "llama.cpp":
        server = serve(MODEL, context=512, slots=2)
        yield _address(server.url, kind)
        del server  # which stops it
        return
    log = RUNS / "vllm.log"
    with VllmServer(model_folder(MODEL), MODEL, log.resolve(), key=os.environ[KEY]) as running:
        yield _address(running.url, kind)


def _address(url: str, kind: str) -> list[str]:
    settings = {"url": url, "name": MODEL, "kind": kind, "key": KEY, "concurrency": 2}
    return [f"--set=teacher.server.{key}={json.dumps(value)}" for key, value in settings.items()]


def run(name: str, recipe: str, overrides: list[str], threads: int = 1) -> dict[str, Any]:
    """Run a recipe in a process of its own; its row of evidence."""
    loaded = load_recipe(recipe_files()[recipe])
    row: dict[str, Any] = {"recipe": recipe, "hash": loaded.hash}
    row |= {"also": [one.removeprefix("--set=") for one in OWN[recipe]]} if recipe in OWN else {}
    if recipe in MISSING:
        return row | {"not_run": MISSING[recipe]}
    print(f"{name} ...", flush=True)
    if SERVED.get(recipe) == "vllm" and not PYTHON.exists():
        return row | {"not_run": "needs vLLM: `make vllm`"}
    folder = RUNS / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    with server_for(recipe) as address:
        command = [
            sys.executable,
            "-m",
            "limbeck",
            "run",
            recipe,
            *small(loaded),
            *OWN.get(recipe, []),
            *overrides,
            *address,
        ]
        command += [f"--set=machine.threads={threads}", "--out", str(folder)]
        began = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)  # noqa: S603
        except subprocess.TimeoutExpired:
            return row | {"failed": f"took longer than {LIMIT_S} s on {threads} cores"}
        seconds = time.perf_counter() - began
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return row | {"failed": words[-1][:400], "exit": done.returncode}
    row |= measured(folder) | {"seconds": round(seconds)}
    shutil.rmtree(folder)  # gigabytes
    return row


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says of it."""
    homes = list(rounds_in(folder).values()) or [folder]
    of_rounds = [Metrics(home / "metrics.jsonl").update() for home in homes]
    steps = [record for records in of_rounds for record in records]
    last = of_rounds[-1]  # the losses of other rounds may be others
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    answers = read_json(kept_round(folder) / "answers.json") or {}
    held_out = {}
    for metric in ("forward_kl", "perplexity"):
        values = [summary["systems"].get(system, {}).get(metric) for system in ("untouched", "student")]
        if all(values):
            held_out[metric] = [round(value["value"], 4) for value in values]
    return {
        "answers": answers,
        "steps": len(steps),
        "trained_tokens": sum(step.get("tokens", 0) for step in steps),
        "training_loss": [round(last[0]["loss"], 4), round(last[-1]["loss"], 4)],
        **({"rounds": len(homes)} if len(homes) > 1 else {}),
        "held_out": held_out,
        "tasks": {
            metric: [round(value["value"], 4), value["n"]]
            for metric, value in summary["systems"]["student"].items()
            if any(metric.startswith(task) for task in summary.get("tasks", {}))
        },
        "parameters": summary["efficiency"]["student"]["parameters"],
    }


def main() -> None:
    chosen = sys.argv[1:]
    file = evidence_file()
    evidence = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    work: dict[str, tuple[str, list[str]]] = {name: (name, []) for name in recipe_files()} | VARIANTS
    if unknown := [name for name in chosen if name not in work]:
        raise SystemExit(f"no recipe or variant: {', '.join(unknown)}; there are {', '.join(work)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    due = chosen or [name for name in work if not _current(evidence["rows"].get(name, {}), work[name][0])]
    due.sort(key=lambda name: work[name][0] in OWN)  # what takes long, last
    cores = len(os.sched_getaffinity(0))
    evidence["size"] = {
        "prompts": PROMPTS,
        "steps": STEPS,
        "tokens_per_step": TOKENS,
        "answer_tokens": ANSWER,
        "held_out_answers": HELD_OUT,
        "task_items": ITEMS,
        "made_prompts": COUNT,
        "groups": [GROUPS, GROUP],
        "precision": "bfloat16" if multiplies_in_bfloat16() else "float32",
    }
    evidence["machine"] = f"{platform.machine()}, {cores} cores, a recipe on each, beside other work"
    # models of some gigabytes: one recipe of them at a time, beside the others
    with ThreadPoolExecutor(cores) as pool, ThreadPoolExecutor(1) as alone:
        threads = cores if len(due) == 1 else 1
        running = {
            (alone if _is_large(work[name][0]) else pool).submit(run, name, *work[name], threads): name for name in due
        }
        for future in as_completed(running):
            name = running[future]
            try:
                row = future.result()
            except Exception:  # noqa: BLE001 (of one recipe: the others go on)
                traceback.print_exc()
                continue
            evidence["rows"][name] = row
            print(f"{name}: {json.dumps(row)}", flush=True)
            evidence["rows"] = {key: evidence["rows"][key] for key in work if key in evidence["rows"]}
            write_json(file, evidence)


def _is_large(recipe: str) -> bool:
    if recipe in HARD:
        return True
    return any("1.5b" in line.partition("#")[0] for line in recipe_files()[recipe].read_text().splitlines())


def _current(row: dict[str, Any], recipe: str) -> bool:
    return "steps" in row and row["hash"] == load_recipe(recipe_files()[recipe]).hash


if __name__ == "__main__":
    main()
