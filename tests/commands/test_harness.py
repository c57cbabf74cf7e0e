"""lm-evaluation-harness beside Limbeck: the same numbers where the metric is the same, nothing run that a task file names, faults told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.commands.harness import run as harness_module
from limbeck.commands.harness.run import as_harness_task, harness
from limbeck.commands.harness.tasks import local_task
from limbeck.evaluate import tasks
from limbeck.types import UserError

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of foreign packages
QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"why is the {thing} {what}",
        "choices": ["a cat", "the red dog", "blue", "one two é"],
        "answer": i % 4,
    }
    for i, (thing, what) in enumerate((a, b) for a in ("sky", "dog", "cat") for b in ("red", "mat", "house", "blue"))
]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Nothing outside the test's folder is written, and no network is asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def choice_task(folder, settings="{format: chat, template: '{question}'}"):
    folder.mkdir()
    (folder / "task.yaml").write_text(
        f"name: pick\nversion: '2.1'\nkind: multiple_choice\ndescription: d\ntest: test.jsonl\nsettings: {settings}\n"
    )
    (folder / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


def writing_task(folder, settings="{max_tokens: 12}"):
    folder.mkdir()
    (folder / "task.yaml").write_text(
        f"name: say\nversion: '1'\nkind: generation\ndescription: d\ntest: test.jsonl\nsettings: {settings}\n"
    )
    letters = "tiomtiomt"  # words of the answers begin with them
    rows = [
        {
            "id": q["id"],
            "prompt": q["question"],
            **({"check": {"type": "contains", "all": [letters[i % 9]]}} if i else {}),
        }
        for i, q in enumerate(QUESTIONS)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def local_yaml(folder, **changes):
    (folder / "items.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    config = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 3.0},
    }  # fmt: skip
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in (config | changes).items() if value is not None}))
    return file


def samples(out, name):
    return [json.loads(line) for line in (out.parent / f"harness-{name}.jsonl").read_text().splitlines()]


# The same numbers


@pytest.mark.parametrize(
    "settings",
    [
        "{format: chat, template: '{question}'}",
        r'{template: "Question: {question}\nAnswer:"}',
        r'{template: "{question}\n", delimiter: ""}',
    ],
)
def test_both_programs_give_the_same_choices_and_log_probabilities(tmp_path, tiny, tiny_folder, settings):
    task_folder, out = choice_task(tmp_path / "pick", settings), tmp_path / "harness.json"
    entry = harness(str(tiny_folder), [str(task_folder)], out)["tasks"]["pick"]
    task = tasks.load_task(str(task_folder))
    ours = tasks.run_task(task, tiny)
    means = {metric: interval["value"] for metric, interval in tasks.summarise(task, ours).items()}
    assert entry["results"]["acc"]["value"] == means["pick/acc"]
    assert entry["results"]["acc_bytes"]["value"] == means["pick/acc_norm"]
    assert entry["results"]["brier_score"]["value"] == pytest.approx(means["pick/brier"], abs=1e-5)
    assert entry["results"]["acc"]["stderr"] > 0 and entry["results"]["brier_score"]["stderr"] is None
    theirs = samples(out, "pick")
    assert [s["doc"]["id"] for s in theirs] == [scored.item for scored in ours]
    for sample, scored in zip(theirs, ours, strict=True):
        found = [answer[0] for answer in sample["filtered_resps"]]
        assert found == pytest.approx(scored.facts["log_probs"], abs=1e-4)


def test_without_tokenising_apart_a_prompt_that_ends_in_white_space_would_differ(
    tmp_path, tiny, tiny_folder, monkeypatch
):
    from limbeck.commands.harness import models

    task_folder = choice_task(tmp_path / "pick", r'{template: "{question}\n", delimiter: ""}')
    whole = models.LocalModel.__init__
    monkeypatch.setattr(models.LocalModel, "__init__", lambda self, model, apart, chat: whole(self, model, False, chat))
    harness(str(tiny_folder), [str(task_folder)], tmp_path / "harness.json")
    ours = tasks.run_task(tasks.load_task(str(task_folder)), tiny)
    sample = samples(tmp_path / "harness.json", "pick")[0]
    assert [a[0] for a in sample["filtered_resps"]] != pytest.approx(ours[0].facts["log_probs"], abs=1e-2)


def test_both_programs_write_and_judge_the_same_answers(tmp_path, tiny, tiny_folder):
    task_folder, out = writing_task(tmp_path / "say"), tmp_path / "harness.json"
    entry = harness(str(tiny_folder), [str(task_folder)], out)["tasks"]["say"]
    task = tasks.load_task(str(task_folder))
    ours = tasks.run_task(task, tiny)
    means = {metric: interval["value"] for metric, interval in tasks.summarise(task, ours).items()}
    assert entry["results"]["pass_rate"]["value"] == means["say/pass_rate"] and 0 < means["say/pass_rate"] < 1
    assert [s["resps"][0][0] for s in samples(out, "say")] == [scored.text for scored in ours]
    assert "pass_rate" not in samples(out, "say")[0], "an answer without a check counts nowhere"
    assert entry["settings"]["generation"] == {"until": [], "do_sample": False, "max_gen_toks": 12}


def test_a_run_folders_student_is_asked_and_the_file_lies_in_it(tmp_path, tiny_folder):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: tiny\nevaluate: {max_tokens: 7}\n")
    with pytest.raises(UserError, match="no finished student"):
        harness(str(run), [str(writing_task(tmp_path / "say", "{}"))])
    (run / "student").symlink_to(tiny_folder)
    task = choice_task(tmp_path / "pick")
    found = harness(str(run), [str(task)], limit=5)
    assert found["tasks"]["pick"]["items"] == 5 and len(samples(run / "evaluation" / "harness.json", "pick")) == 5
    harness(str(run), [str(tmp_path / "say")], limit=2)
    kept = json.loads((run / "evaluation" / "harness.json").read_text())["tasks"]
    assert list(kept) == ["pick", "say"], "what was measured before stays"
    assert kept["say"]["settings"]["generation"]["max_gen_toks"] == 7
    (run / "recipe.yaml").write_text("- name: tiny\n")
    with pytest.raises(UserError, match="is no recipe of a run"):
        harness(str(run), [str(tmp_path / "say")])
    for entry in kept.values():
        assert entry["model"].startswith("student@") or entry["model"].startswith("model@")
        assert {"lm_eval", "torch", "transformers", "limbeck", "python"} == set(entry["versions"])
    assert kept["pick"]["version"] == "2.1" and kept["pick"]["settings"]["choices_tokenised"] == "apart"


def test_tasks_that_have_no_such_form_are_refused(tmp_path):
    with pytest.raises(UserError, match="sampled"):
        as_harness_task(writing_task(tmp_path / "a", "{temperature: 1.0, seeds: [1]}"))
    with pytest.raises(UserError, match="delimiter"):
        as_harness_task(choice_task(tmp_path / "b", "{format: chat, template: '{question}', delimiter: ' '}"))
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "task.yaml").write_text("name: text\nversion: '1'\nkind: perplexity\ndescription: d\ntest: test.jsonl\n")
    (folder / "test.jsonl").write_text('{"text": "a cat"}\n')
    with pytest.raises(UserError, match="perplexity"):
        as_harness_task(folder)


# Local YAML


def test_a_local_yaml_task_runs_offline_on_local_data(tmp_path, tiny, tiny_folder):
    out = tmp_path / "harness.json"
    entry = harness(str(tiny_folder), [str(local_yaml(tmp_path))], out, limit=6)["tasks"]["mine"]
    assert entry["items"] == 6 and entry["version"] == 3.0 and entry["settings"]["choices_tokenised"] == "joined"
    sample = samples(out, "mine")[0]
    assert sample["arguments"][0] == ["Question: why is the sky red\nAnswer:", " a cat"]
    ids = tiny.tokenizer("Question: why is the sky red\nAnswer: a cat")["input_ids"]
    prompt = tiny.tokenizer("Question: why is the sky red\nAnswer:")["input_ids"]
    with torch.no_grad():
        log_probs_TV = tiny.net(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(log_probs_TV[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
    assert sample["filtered_resps"][0][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process_docs": "f"}, "names code"),
        ({"process_results": "f"}, "names code"),
        ({"use_prompt": "x.yaml:y"}, "names code"),
        ({"class": "os.system"}, "names code"),
        ({"include": "other.yaml"}, "not followed"),
        ({"doc_to_txt": "q"}, "did you mean 'doc_to_text'"),
        ({"unsafe_code": True}, "what the model writes"),
        ({"task": "../../etc"}, "task must be a name"),
        ({"metric_list": [{"metric": "./evil.py"}]}, "no metric is named"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "fetches a metric"),
        ({"metric_list": "acc"}, "must be a list"),
        ({"fewshot_config": {"process_docs": "f"}}, "is not allowed in a local task"),
        ({"dataset_path": "pandas"}, "dataset_path must be"),
        ({"dataset_path": "./here"}, "dataset_path must be"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "may hold data_files"),
        ({"dataset_kwargs": {"data_files": "https://example.com/x.jsonl"}}, "local files"),
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "there is no data file"),
        ({"dataset_kwargs": None}, "needs dataset_kwargs"),
    ],
)
def test_what_could_run_code_or_is_not_there_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        local_task(local_yaml(tmp_path, **changes), ["acc"])


@pytest.mark.parametrize("tag", ["!function evil.run", "!!python/object/apply:os.system ['touch ran']", "!anything x"])
def test_a_tag_is_refused_and_nothing_is_run(tmp_path, tiny_folder, tag, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef run(doc):\n    return 'x'\n")
    file = tmp_path / "task.yaml"
    file.write_text(f"task: evil\ndoc_to_text: {tag}\n")
    with pytest.raises(UserError, match=r"task\.yaml, line 2.*plain data"):
        harness(str(tiny_folder), [str(file)], tmp_path / "out.json")
    assert not (tmp_path / "ran").exists()


def test_a_template_is_rendered_in_a_sandbox(tmp_path, tiny_folder):
    from lm_eval import utils

    before = utils.env
    file = local_yaml(tmp_path, doc_to_text="{{ question.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="SecurityError"):
        harness(str(tiny_folder), [str(file)], tmp_path / "out.json")
    assert utils.env is before


@pytest.fixture
def their_tasks(tmp_path, monkeypatch):
    """A few tasks in the place of the 14,000 that the package brings along, reading which takes half a minute."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "theirs"
    folder.mkdir()
    local_yaml(folder, task="arc_easy", dataset_kwargs={"data_files": {"test": str(folder / "items.jsonl")}}).rename(
        folder / "arc.yaml"
    )
    local_yaml(
        folder, task="code", unsafe_code=True, dataset_kwargs={"data_files": {"test": str(folder / "items.jsonl")}}
    )
    (folder / "utils.py").write_text("def text(doc):\n    return doc['question'].upper()\n")
    (folder / "with_code.yaml").write_text(
        (folder / "arc.yaml").read_text().replace("task: arc_easy", "task: upper\ntag: both").replace(
            "doc_to_text: 'Question: {{question}}\n\n  Answer:'", "doc_to_text: !function utils.text")
    )  # fmt: skip
    monkeypatch.setattr(
        harness_module,
        "_manager",
        lambda named: TaskManager(include_path=str(folder) if named else None, include_defaults=False),
    )


def test_a_named_task_is_that_programs_own_with_its_functions(tmp_path, tiny_folder, their_tasks):
    said, out = [], tmp_path / "out.json"
    found = harness(str(tiny_folder), ["upper", "arc_easy"], out, limit=2, note=said.append)
    assert set(found["tasks"]) == {"upper", "arc_easy"} and "loading the task upper" in said
    assert samples(out, "upper")[0]["arguments"][0][0] == "WHY IS THE SKY RED"
    assert samples(out, "arc_easy")[0]["arguments"][0][0] == "Question: why is the sky red\nAnswer:"
    with pytest.raises(UserError, match="unsafe_code"):
        harness(str(tiny_folder), ["code"], out)


def test_wrong_names_are_one_message(tmp_path, tiny_folder, their_tasks):
    out = tmp_path / "out.json"
    for names, words in [
        (["arc_esy"], "did you mean 'arc_easy'"),
        ([str(tmp_path / "none.yaml")], "no task file"),
        (["builtin/nothing"], "no task is named"),
        ([], "at least once"),
        (["a", "a"], "only once"),
    ]:
        with pytest.raises(UserError, match=words):
            harness(str(tiny_folder), names, out)
    with pytest.raises(UserError, match="--out"):
        harness(str(tiny_folder), ["arc_easy"])
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        harness("m", ["arc_easy"], out, base_url="http://me:secret@localhost")


def test_missing_is_said_with_its_remedy(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[eval\]'"):
        harness("m", ["arc_easy"], tmp_path / "out.json")


# A server


@contextlib.contextmanager
def server(answer):
    """A loopback server. `answer(path, body)` gives (status, reply); what was asked is kept in `asked`, with its key."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            status, reply = answer(self.path, body)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", asked
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def says(text):
    return lambda path, body: (200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def scorer(model):
    """A server that returns the log-probabilities of a given prompt, as vLLM's does."""

    def answer(path, body):
        choices = []
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                log_probs_TV = model.net(torch.tensor([ids])).logits[0].log_softmax(-1)
            values = [None] + [float(log_probs_TV[at - 1, ids[at]]) for at in range(1, len(ids))]
            best = [None] + [{"x": float(log_probs_TV[at - 1].max())} for at in range(1, len(ids))]
            last = float(log_probs_TV[-1].max())
            choices.append(
                {
                    "index": index,
                    "text": "",
                    "logprobs": {"token_logprobs": [*values, last], "top_logprobs": [*best, {"x": last}]},
                }
            )
        return 200, {"choices": choices}

    return answer


def test_a_served_model_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    out = tmp_path / "harness.json"
    with server(says("the tea is on the mat")) as (url, asked):
        entry = harness("some-model", [str(writing_task(tmp_path / "say"))], out, limit=3, base_url=url)["tasks"]["say"]
    assert (
        entry["results"]["pass_rate"]["value"] == 1.0
        and entry["model"] == "some-model"
        and entry["server"] == f"{url}/v1"
    )
    assert [path for path, _, _ in asked] == ["/v1/chat/completions"] * 3 and {key for *_, key in asked} == {
        "Bearer canary-key"
    }
    body = next(body for _, body, _ in asked if body["messages"][-1]["content"] == QUESTIONS[0]["question"])
    assert body["model"] == "some-model" and body["temperature"] == 0 and body["max_tokens"] == 12
    written = "".join(file.read_text() for file in tmp_path.rglob("*.json*"))
    assert "canary" not in written and "the tea is on the mat" in written


def test_a_server_that_scores_text_gives_our_numbers(tmp_path, tiny, tiny_folder):
    task_folder, out = choice_task(tmp_path / "pick"), tmp_path / "harness.json"
    with server(scorer(tiny)) as (url, asked):
        entry = harness("m", [str(task_folder)], out, base_url=url + "/v1", tokenizer=str(tiny_folder))["tasks"]["pick"]
    task = tasks.load_task(str(task_folder))
    ours = tasks.run_task(task, tiny)
    assert entry["results"]["acc"]["value"] == tasks.summarise(task, ours)["pick/acc"]["value"]
    for sample, scored in zip(samples(out, "pick"), ours, strict=True):
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(scored.facts["log_probs"], abs=1e-4)


def by_token(model):
    """A server like llama.cpp's: no log-probabilities of a given prompt, but the likeliest next tokens from its own /completion."""

    def answer(path, body):
        if path == "/v1/completions":
            return 200, {"choices": [{"index": 0, "text": " x", "logprobs": None}]}
        assert path == "/completion" and body["n_predict"] == 1 and body["post_sampling_probs"] is False
        with torch.no_grad():
            likely = (
                model.net(torch.tensor([body["prompt"]]))
                .logits[0, -1]
                .log_softmax(-1)
                .topk(min(body["n_probs"], model.vocab_size))
            )
        tops = [
            {"id": i, "token": "?", "logprob": v}
            for v, i in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
        ]
        return 200, {"content": "x", "completion_probabilities": [{**tops[0], "top_logprobs": tops}]}

    return answer


@pytest.mark.parametrize("likeliest", [3, 1000])
def test_a_server_that_names_next_tokens_scores_text_token_by_token(
    tmp_path, tiny, tiny_folder, monkeypatch, likeliest
):
    from limbeck.commands.harness import models

    monkeypatch.setattr(models, "LIKELIEST", likeliest)
    task_folder, out = choice_task(tmp_path / "pick"), tmp_path / "harness.json"
    with server(by_token(tiny)) as (url, asked):
        entry = harness("m", [str(task_folder)], out, base_url=url + "/v1", tokenizer=str(tiny_folder), limit=3)[
            "tasks"
        ]["pick"]
    task = tasks.load_task(str(task_folder))
    ours = tasks.run_task(task, tiny)[:3]
    assert entry["results"]["acc"]["value"] == sum(scored.scores["acc"] for scored in ours) / 3
    for sample, scored in zip(samples(out, "pick"), ours, strict=True):
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(scored.facts["log_probs"], abs=1e-4)
    assert any(body.get("n_probs") == models.ALL_TOKENS for _, body, _ in asked) == (likeliest == 3), (
        "asked again where it was not named"
    )


def test_a_server_that_cannot_score_text_is_refused_before_any_item(tmp_path, tiny_folder):
    task_folder, out = str(choice_task(tmp_path / "pick")), tmp_path / "out.json"
    without_echo = {
        "choices": [{"index": 0, "text": " x", "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"x": -1.0}]}}]
    }
    with server(lambda path, body: (200, without_echo)) as (url, asked):
        with pytest.raises(UserError, match="whose tokenizer"):
            harness("m", [task_folder], out, base_url=url)
        assert not asked
        with pytest.raises(UserError, match="does not return the log-probabilities of a given prompt"):
            harness("m", [task_folder], out, base_url=url, tokenizer=str(tiny_folder))
        assert [path for path, *_ in asked] == ["/v1/completions", "/completion"] and asked[0][1]["echo"] is True
    with pytest.raises(UserError, match="no answer from"):
        harness("m", [task_folder], out, base_url=url, tokenizer=str(tiny_folder))
    assert not out.exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda path, body: (200, {"choices": []}), "no choices"),
        (lambda path, body: (200, {"error": "overloaded"}), "no choices"),
        (lambda path, body: (200, [1]), "no choices"),
        (lambda path, body: (200, {"choices": [{"index": 0, "message": {"content": None}}]}), "holds no text"),
        (lambda path, body: (200, {"choices": [{"index": 0}]}), "holds no text"),
        (lambda path, body: (200, b'{"choices": [{"ind'), "no usable answer"),
        (lambda path, body: (500, {"error": "broken"}), "no usable answer"),
    ],
)
def test_a_faulty_server_is_told_of_and_never_scored(tmp_path, answer, words, monkeypatch):
    import tenacity.nap

    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    out = tmp_path / "out.json"
    with server(answer) as (url, _), pytest.raises(UserError, match=words):
        harness("m", [str(writing_task(tmp_path / "say"))], out, limit=1, base_url=url)
    assert not out.exists()


@pytest.mark.long
def test_the_command_prints_value_and_error(tmp_path, tiny_folder):
    task_folder = choice_task(tmp_path / "pick")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "limbeck", "harness", str(tiny_folder), "--task", str(task_folder), "--limit", "4"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "h.json")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pick acc: 0." in done.stdout and " +- 0." in done.stdout
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--out" in done.stderr and "Traceback" not in done.stderr


def test_numbers_that_are_none_are_null():
    found = harness_module._results(
        {
            "alias": "x",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "bleu,none": float("nan"),
            "bleu_stderr,none": "N/A",
            "em,strict": 1.0,
        }
    )
    assert found == {
        "acc": {"value": 0.5, "stderr": 0.1}, "bleu": {"value": None, "stderr": None}, "em/strict": {"value": 1.0, "stderr": None},
    }  # fmt: skip
