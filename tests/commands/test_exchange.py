"""Other tools' columns into a cache and out of it: what comes back is what the teacher says, and what can't be is refused."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.commands.exchange import export_cache, import_file
from limbeck.config.recipe import parse
from limbeck.data.batches import make_batch
from limbeck.progress import Silent
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.signals.cache import ids_of
from limbeck.types import UserError

K = 12
WORDS = [a + b for a in ("red", "blue", "old") for b in (" cat", " mat", " house", " sky", "", " car")]


@pytest.fixture
def made(recipe_data, prompt_file, tmp_path):
    """A recipe whose text is a corpus and whose cache is empty, its folder, and (prompt, response, log p [N, V]) of each text."""
    lines = [
        json.loads(line) | {"answer": f"a {word} dog ran"}
        for line, word in zip(prompt_file.read_text().splitlines(), WORDS, strict=True)
    ]
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe_data |= {"writer": [{"by": "corpus"}], "student": {"start": {"prune": {"layers": 3, "keep": "uniform"}}}}
    plain, folder = parse(recipe_data), tmp_path / "run"
    recipe = parse(
        recipe_data | {"teacher": {"model": recipe_data["teacher"], "cache": {"top_k": {"k": K, "bits": 16}}}}
    )
    job = Run(resolve(plain), tmp_path / "plain", Silent())
    job.folder.mkdir()
    texts = []
    for row in job.rows(job.text.training(), job.models.initial_student()):
        batch = make_batch([row])
        signal = job.models.teacher.signal(batch)
        texts.append((*next(ids_of(batch)), signal.head.logits(signal.hidden_NE).detach().log_softmax(-1)))
    return recipe, folder, texts


def named(log_V, written=None, k=K):
    log_probs = {int(token): float(log_V[token]) for token in log_V.topk(k).indices}
    return log_probs if written is None else log_probs | {written: float(log_V[written])}


def vllm(prompt, response, log_NV, k=K):
    after = [
        {str(t): {"logprob": log, "rank": 1} for t, log in named(log_NV[n], token, k).items()}
        for n, token in enumerate(response)
    ]
    return {"prompt_token_ids": prompt + response, "prompt_logprobs": [None] * len(prompt) + after}


def prepared(prompt, response, log_NV):
    rows = [named(log_NV[n]) for n in range(len(response))]
    ids = [list(range(K))] * len(prompt) + [list(row) for row in rows]
    logs = [[-1e9] * K] * len(prompt) + [list(row.values()) for row in rows]
    return {"input_ids": prompt + response, "target_token_ids": ids, "target_logprobs": logs}


def last(prompt, response, log_NV):
    rows = [
        [{"token": f"token_id:{t}", "logprob": log} for t, log in named(log_NV[n]).items()]
        for n in range(len(response))
    ]
    return {"input_ids": prompt + response, "logprobs": rows}


def write(folder, lines):
    file = folder / "theirs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("shape", [vllm, prepared, last])
def test_what_another_tool_kept_is_trained_on_and_is_what_the_teacher_says(shape, made, tmp_path, monkeypatch):
    recipe, folder, texts = made
    counts = import_file(recipe, folder, write(tmp_path, [shape(*text) for text in texts]))
    assert counts == {"texts": len(texts), "holds": len(texts), "read": len(texts), "other": 0}
    calls = []
    monkeypatch.setattr("limbeck.training.setup.fill_cache", lambda cache, view, rows, tell: calls.append(len(cache)))
    run(recipe, folder, stages=("train",))
    ours = [json.loads(line)["terms"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    monkeypatch.undo()
    run(recipe, tmp_path / "own", stages=("train",))
    theirs = [json.loads(line)["terms"] for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert calls == [len(texts)]
    for one, two in zip(ours, theirs, strict=True):
        assert one["forward_kl"] == pytest.approx(two["forward_kl"], rel=1e-3)


def test_what_is_taken_out_can_be_brought_in(made, tmp_path):
    recipe, folder, texts = made
    import_file(recipe, folder, write(tmp_path, [vllm(*text) for text in texts]))
    assert export_cache(recipe, folder, tmp_path / "ours.jsonl") == {"texts": len(texts)}
    lines = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    for line, (prompt, response, log_NV) in zip(lines, texts, strict=True):
        assert line["input_ids"] == prompt + response and line["labels"] == [-100] * len(prompt) + response
        assert {len(line[name]) for name in line} == {len(prompt + response)}
        assert not any(map(any, line["target_mask"][: len(prompt)])), "nothing is taught of the prompt"
        ids, logs = (torch.tensor(line[name][len(prompt) :]) for name in ("target_token_ids", "target_logprobs"))
        assert torch.allclose(logs, log_NV.gather(-1, ids), atol=2e-3)
    for file in (folder / "signals").glob("shard-*"):
        file.unlink()
    assert import_file(recipe, folder, tmp_path / "ours.jsonl")["holds"] == len(texts)


@pytest.mark.long
def test_a_line_may_go_on_after_the_response_and_others_are_counted(made, tmp_path):
    recipe, folder, texts = made
    longer = [line | {"prompt_token_ids": [*line["prompt_token_ids"], 7], "prompt_logprobs": [*line["prompt_logprobs"], None]}
              for line in (vllm(*text) for text in texts[:2])]  # fmt: skip
    foreign = {"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, None, None]}
    assert import_file(recipe, folder, write(tmp_path, [*longer, foreign])) == {
        "texts": len(texts),
        "holds": 2,
        "read": 2,
        "other": 1,
    }
    assert import_file(recipe, folder, write(tmp_path, longer))["read"] == 0, "what is there is not read again"
    run(recipe, folder, stages=("train",))
    assert (folder / "student").exists(), "what is missing is computed"


def spoiled(text, how):
    prompt, response, log_NV = text
    line = vllm(prompt, response, log_NV)
    rows = line["prompt_logprobs"]
    if how == "moved":
        line = vllm(
            prompt, response, torch.eye(log_NV.shape[1])[response].mul(8).log_softmax(-1)
        )  # of a teacher that finds the text likely
        rows = line["prompt_logprobs"]
        line["prompt_logprobs"] = [*rows[: len(prompt)], *rows[len(prompt) + 1 :], rows[len(prompt)]]
    if how == "missing":
        rows[-2] = None
    if how == "too much":
        rows[-2] = {"1": {"logprob": -0.1}, "2": {"logprob": -0.1}}
    if how == "no token":
        rows[-2] = {"99999": {"logprob": -0.1}}
    if how == "not a number":
        rows[-2] = {"1": {"logprob": float("nan")}}
    if how == "short":
        rows.pop()
    if how == "no shape":
        line = {"input_ids": prompt + response}
    return line


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("moved", "one before"), ("missing", "names no tokens"), ("too much", "no probabilities"), ("no token", "no probabilities"),
        ("not a number", "no probabilities"), ("short", "one for each"), ("no shape", "none of the known formats"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_of_it_is_kept(how, says, made, tmp_path):
    recipe, folder, texts = made
    text = max(texts, key=lambda text: len(text[1]))
    with pytest.raises(UserError, match=says):
        import_file(
            recipe, folder, write(tmp_path, [spoiled(text, how) for text in (texts if how == "moved" else [text])])
        )
    with pytest.raises(UserError, match="none of this run's texts"):
        export_cache(recipe, folder, tmp_path / "ours.jsonl")


def test_another_tokenizers_file_and_another_form_are_refused(made, tmp_path, recipe_data):
    recipe, folder, texts = made
    shifted = [([token + 1 for token in prompt], response, log_NV) for prompt, response, log_NV in texts]
    with pytest.raises(UserError, match="other prompts, template or tokenizer"):
        import_file(recipe, folder, write(tmp_path, [vllm(*text) for text in shifted]))
    hidden = parse(recipe_data | {"teacher": {"model": recipe_data["teacher"], "cache": {"hidden": {}}}})
    with pytest.raises(UserError, match="only a top-k cache"):
        import_file(hidden, folder, tmp_path / "theirs.jsonl")
    unwritten = parse(recipe.resolved() | {"writer": [{"by": "teacher"}]})
    with pytest.raises(UserError, match="limbeck elicit"):
        export_cache(unwritten, tmp_path / "empty", tmp_path / "ours.jsonl")


@pytest.mark.long
def test_the_command(made, tmp_path, recipe_data):
    recipe, folder, texts = made
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.resolved()))
    theirs = write(tmp_path, [vllm(*text) for text in texts])
    ran = CliRunner().invoke(app, ["cache", str(file), "--out", str(folder), "--import", str(theirs), "--json"])
    assert json.loads(ran.stdout) == {"texts": len(texts), "holds": len(texts), "read": len(texts), "other": 0}
    ran = CliRunner().invoke(app, ["cache", str(file), "--out", str(folder), "--export", str(tmp_path / "ours.jsonl")])
    assert ran.exit_code == 0 and (tmp_path / "ours.jsonl").exists()
    ran = CliRunner().invoke(app, ["cache", str(file), "--out", str(folder)])
    assert "exactly one" in str(ran.exception)
