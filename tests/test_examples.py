"""The scripts in examples/ train, save a student that loads, and compute the loss that they say they compute."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.data.batches import steps_of_epoch
from limbeck.elicit.prompts import load_prompts
from limbeck.models.load import load_model
from tests.conftest import make_net, make_tokenizer

FOLDER = Path(__file__).parent.parent / "examples"
STEPS = 3
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of another, smaller model with the same tokens."""
    tokenizer = make_tokenizer()
    folders = []
    for name, layers, seed in (("teacher", 4, 0), ("student", 2, 1)):
        folders.append(tmp_path_factory.mktemp(name))
        make_net(layers, seed, vocab_size=len(tokenizer)).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def example(monkeypatch):
    """Loads a script as a module, with settings for tiny models."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for setting, value in {"HELD_OUT": 4, "MAX_TOKENS": MAX_TOKENS, "TOKENS_PER_STEP": 64, "LR": 1e-2}.items():
            if hasattr(module, setting):
                monkeypatch.setattr(module, setting, value)
        return module

    return load


@pytest.fixture
def arguments(models, prompt_file, tmp_path):
    teacher, student = models
    settings = {"teacher": teacher, "student": student, "prompts": prompt_file, "steps": STEPS, "out": tmp_path / "out"}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def log_probs(folder, row):
    """Log-probabilities of the row's answer tokens in float64, by nothing but transformers."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    with torch.no_grad():
        logits_TV = net(ids).logits[0]
    return logits_TV[len(row.prompt_ids) - 1 : -1].log_softmax(-1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def check_output(printed, losses, folder):
    """What was printed is what was returned; the student loads and still speaks."""
    assert len(losses) == STEPS and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert re.findall(r"^step \d+/\d+  loss (\S+)", printed, re.MULTILINE) == [f"{loss:.4f}" for loss in losses]
    before, after = map(float, re.search(r"(\S+) before, (\S+) after", printed).groups())
    assert math.isfinite(before) and math.isfinite(after) and before != after
    net = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("why is the sky", return_tensors="pt")["input_ids"]
    assert net(ids).logits.isfinite().all()
    return before, after


def test_the_off_policy_example(example, models, arguments, prompt_file, tmp_path, capsys):
    module = example("distill_minimal")
    losses = module.main(arguments)
    before, after = check_output(capsys.readouterr().out, losses, tmp_path / "out")
    assert after < before

    teacher, student = models
    rows = module.write_answers(load_model(str(teacher)), load_prompts(str(prompt_file)))[module.HELD_OUT :]
    first = [rows[n] for micro_batch in steps_of_epoch(rows, module.SEED, 0, 64)[0] for n in micro_batch]
    total = sum(float(kl(log_probs(teacher, row), log_probs(student, row))) for row in first)
    assert losses[0] == pytest.approx(total / sum(len(row.response_ids) for row in first), rel=1e-4)


def test_the_off_policy_example_prunes_its_teacher_where_no_student_is_named(example, arguments, tmp_path, capsys):
    at = arguments.index("--student")
    losses = example("distill_minimal").main(arguments[:at] + arguments[at + 2 :])
    check_output(capsys.readouterr().out, losses, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_on_policy_example(example, models, arguments, prompt_file, tmp_path, capsys):
    module = example("on_policy_minimal")
    losses = module.main(arguments)
    check_output(capsys.readouterr().out, losses, tmp_path / "out")

    teacher, student = models
    prompts = load_prompts(str(prompt_file))
    module.random.Random(module.SEED).shuffle(prompts)
    chosen = prompts[module.HELD_OUT :][: module.PROMPTS_PER_STEP]
    total = tokens = 0
    for row in module.write_answers(load_model(str(student)), chosen, module.SEED):
        log_p, log_q = log_probs(teacher, row), log_probs(student, row)
        log_m = (log_p.exp() / 2 + log_q.exp() / 2).log()
        total += float(kl(log_p, log_m) + kl(log_q, log_m)) / 2
        tokens += len(row.response_ids)
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_an_example_fits_two_screens(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 120
