"""Every built-in recipe is short, parses, names its source, and trains a few steps on a tiny model."""

from __future__ import annotations

import json
import math

import pytest

from limbeck import load_recipe, run
from limbeck.config.builtin import recipe_files
from limbeck.models.folder import save_model
from limbeck.models.load import load_model
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs.resolve import resolve, terms_of
from limbeck.training.scorer import ModelScorer
from tests import plausible
from tests.conftest import make_net, make_tokenizer
from tests.scoring_server import ScoringServer

RECIPES = recipe_files()


def test_the_recipes_of_the_field_are_there():
    assert set(RECIPES) >= {
        "hinton-kd", "seq-kd", "reverse-kl", "jsd", "tvd", "distillm-skew", "akl", "taid", "distillm-2", "dkd", "todi", "abkd", "patient-hints",
        "tinybert", "minilm-v2", "ted", "codir", "dpo", "ipo", "kto", "orpo", "simpo", "rrhf", "pro", "gkd", "imitkd", "minillm", "distillm",
        "on-policy-distillation", "speculative-kd", "f-distill-js", "f-distill-tvd", "opd-entropy-aware", "iw-opd", "prompt-baking", "sdft",
        "opsd", "mixkd", "alpaca", "self-instruct", "evol-instruct", "magpie", "orca", "distilling-step-by-step", "fine-tune-cot", "scott",
        "mcc-kd", "tinystories", "ultrachat", "metamath", "mosaic-it", "superfiltering", "deita", "equation-reasoner", "few-shot-mcqa",
        "bonito", "oss-instruct", "offline-hidden", "offline-top-k", "offline-sampled",
        "api-top-logprobs", "multi-teacher-average", "fusellm", "dynamic-kd", "miniplm", "uld", "gold", "mined", "dskd", "minillm-from-server",
        "api-own-logprobs", "s1", "limo", "openthoughts", "r1-traces", "grpo", "dr-grpo", "dapo", "rloo", "grpo-with-teacher", "reward-model",
        "star", "rft", "rest-em", "lmsi", "spin", "ultrafeedback-dpo", "rlcd", "rlaif", "constitutional", "selfee",
        "persdistill", "codeultrafeedback", "self-rewarding", "self-lengthen", "multiagent", "self-instruct-alone",
        "gad", "lion", "pandalm", "arte",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_at_most_25_lines_and_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    assert len(RECIPES[name].read_text().splitlines()) <= 25
    assert recipe.name == name and recipe.title and recipe.paper
    resolve(recipe)


SMALL = [
    "student={start: {prune: {layers: 3, keep: uniform}}}", "prompts.limit=null", "train.steps=3", "train.epochs=null",
    "train.tokens_per_step=60", "evaluate={metrics: [fidelity], controls: []}",
]  # fmt: skip
OWN = {
    "ted": ["loss.0.params.layers=uniform", "loss.0.params.filter_steps=2"],
    "s1": ["elicit.3.params.most=1.0"],  # the teacher that is played is always right
    "limo": ["elicit.3.params.most=1.0"],
    "r1-traces": ["elicit.0.params.system=a teacher that writes <think> by itself is played"],
    **{
        name: ["rollout.rewards=[repetition: {gram: 1}]", "rollout.prompts=2", "rollout.group=3"]
        for name in ("grpo", "dr-grpo", "dapo", "rloo", "grpo-with-teacher")
    },
    "gad": ["rollout.prompts=2", "rollout.group=3"],
    "arte": ["rounds.stages.tutor.train.lr=0.001"],
    "reward-model": ["student.head=scalar", "evaluate={metrics: [preference], controls: []}"],
    **{
        name: ["train.lr=0.001"]
        for name in (
            "ultrafeedback-dpo",
            "rlcd",
            "rlaif",
            "self-rewarding",
            "dpo",
            "ipo",
            "kto",
            "simpo",
            "orpo",
            "rrhf",
            "pro",
            "lion",
        )
    },  # so that the loss moves in 3 steps
    "distillm": ["rollout.validation={prompts: 4, every: 1}", "rollout.replay.size=4"],
}


def the_same_model(name, folder):
    """The teacher and the student's start; a student that teaches itself, or learns a context, starts as the teacher."""
    recipe = load_recipe(name)
    if recipe.rounds is not None:
        changes = [f"student={{start: {{pretrained: {folder}}}}}", "rounds.n=2"]
        changes += [] if recipe.teacher.model == "previous" else [f"teacher={folder}"]
        stages = recipe.rounds.stages or {}
        return [*changes, *(f"rounds.stages.{stage}.student.start.pretrained={folder}" for stage in stages)]
    if recipe.teacher.kind == "several":
        return [
            f"teacher.model={folder}",
            *(f"teacher.beside.{n}.model={folder}" for n in range(len(recipe.teacher.beside))),
        ]
    if recipe.teacher.kind == "bridged":
        return [f"teacher.model={folder}", f"student={{start: {{pretrained: {folder}}}}}"]
    if recipe.teacher.context is None:
        return [f"teacher={folder}"]
    lora = "" if recipe.student.lora is None else ", lora: {rank: 2, alpha: 4}"
    return [f"teacher.model={folder}", f"student={{start: {{pretrained: {folder}}}{lora}}}"]


def elicited_from(folder, monkeypatch):
    """Prompts that every step can do something with, a teacher with a long context, and answers that pass."""
    tokenizer = make_tokenizer()
    net = make_net(vocab_size=len(tokenizer))
    net.config.max_position_embeddings = 4096
    save_model(net, tokenizer, folder / "roomy")
    kinds, check = ("noun", "verb", "adjective", "maths"), {"type": "number", "answer": 4}
    lines = [
        {"prompt": f"{word} 2 and 2 of {word * 2}?" if kinds[n % 4] == "maths" else word, "answer": f"{word} 4", "kind": kinds[n % 4], "check": check}
        for n, word in enumerate("abc def ghi jkl mno pqr stu vwx bcd efg hij klm nop qrs tuv wxy cde fgh ijk lmn".split())
    ]  # fmt: skip
    (folder / "seeds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held.jsonl").write_text('{"prompt": "held out"}\n')
    monkeypatch.setattr(InProcessTeacher, "answers", plausible.answers)
    monkeypatch.setattr(ModelScorer, "log_probs", plausible.log_probs)
    evaluate = f"evaluate={{metrics: [fidelity], controls: [], prompts: {folder / 'held.jsonl'}}}"
    return [f"teacher={folder / 'roomy'}", f"prompts.from={folder / 'seeds.jsonl'}", evaluate]


@pytest.fixture(scope="module")
def servers(tiny_folder):
    """A teacher behind servers alone: the student's tokens, other weights."""
    model = load_model(str(tiny_folder))
    model.net.load_state_dict(make_net(seed=5, vocab_size=len(model.tokenizer)).state_dict())
    with ScoringServer(model) as one, ScoringServer(model, "vLLM") as other:
        yield {"llama.cpp": one, "vLLM": other}


PLAIN = [name for name in RECIPES if not load_recipe(name).elicit]
QUICK = [*PLAIN[::2], *[name for name in RECIPES if name not in PLAIN][::3]]  # the rest: tests/long


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_trains_a_tiny_student(name, servers, tiny_folder, prompt_file, tmp_path, monkeypatch):
    short = [f"writer.{i}.max_tokens={10 + i}" for i in range(len(load_recipe(name).writer))]
    solved = tmp_path / "solved.jsonl"
    solved.write_text(
        "".join(
            json.dumps(json.loads(line) | {"answer": "a mat"}) + "\n" for line in prompt_file.read_text().splitlines()
        )
    )
    changes = [*SMALL, *short, *OWN.get(name, []), f"prompts.from={solved}"]
    if load_recipe(
        name
    ).elicit:  # a tiny model's answers would pass no filter: the writer is played, and long texts need room
        changes += elicited_from(tmp_path, monkeypatch)
        if load_recipe(name).rounds is not None:
            changes += ["teacher=previous", f"student.start={{pretrained: {tmp_path / 'roomy'}}}", "rounds.n=2"]
        changes += [f"models.{model}={tmp_path / 'roomy'}" for model in load_recipe(name).models or {}]
    elif load_recipe(name).teacher.model is None:
        names, logprobs = load_recipe(name).teacher.server.names, load_recipe(name).teacher.server.logprobs
        url = servers["llama.cpp" if names is None and logprobs is None else "vLLM"].url
        changes += [
            f"teacher.server={{url: {url}, name: toy, names: {names or 'null'}, logprobs: {logprobs or 'null'}}}",
            f"student={{start: {{pretrained: {tiny_folder}}}}}",
        ]
    else:
        changes += the_same_model(name, tiny_folder)
    recipe = load_recipe(name, changes)
    result = run(recipe, tmp_path / "run", stages=("elicit", "train"))
    folder = result.rounds[-1].folder if recipe.rounds is not None else result.folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert set().union(*(record["terms"] for record in records)) <= {term.label for term in terms_of(recipe)}
    for record in records:
        assert all(math.isfinite(value) for value in record["terms"].values()) and record["grad_norm"] > 0
    assert (folder / "student" / "config.json").exists()
    for term in terms_of(recipe):
        values = [record["terms"][term.label] for record in records if term.label in record["terms"]]
        assert len(set(values)) == len(values) > 0, "every term is there, and moves"
