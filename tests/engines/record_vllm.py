"""Writes down what a real vLLM answers, as tests/fixtures/vllm-VERSION/NAME.json; the fast tests' servers speak in these words.

PYTHONPATH=. .venv/bin/python tests/engines/record_vllm.py     # after `make vllm`; a minute
"""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.vllm_server import VllmServer
from tests.conftest import make_net, make_tokenizer
from tests.recorded import FIXTURES

NAME = "toy"
IDS = [1, 50, 60, 70, 2]
MESSAGES = [{"role": "user", "content": "Is it 1, or 2?"}]
COMPLETION = {
    "model": NAME, "prompt": IDS, "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "seed": 7, "n": 1, "stream": False,
    "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True, "stop_token_ids": [0],
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
    "logit_bias": None,
}  # fmt: skip
SCORED = {"model": NAME, "prompt": IDS, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2}
ENDS = COMPLETION | {"logit_bias": {"0": 100.0}}  # the end token, at once
CALLS = {
    "models": ("GET", "/v1/models", None),
    "unauthorized": ("GET", "/v1/models", None),
    "version": ("GET", "/version", None),
    "tokenize-text": ("POST", "/tokenize", {"model": NAME, "prompt": "a cat", "add_special_tokens": False}),
    "tokenize-chat": ("POST", "/tokenize", {"model": NAME, "messages": MESSAGES, "add_generation_prompt": True}),
    "chat": ("POST", "/v1/chat/completions", {"model": NAME, "messages": MESSAGES, "max_tokens": 3, "seed": 7}),
    "completion": ("POST", "/v1/completions", COMPLETION),
    "completion-ended": ("POST", "/v1/completions", ENDS),
    "completion-top": ("POST", "/v1/completions", COMPLETION | {"logprobs": 1, "max_tokens": 1, "temperature": 2.0}),
    "prompt-logprobs": ("POST", "/v1/completions", SCORED),
    "too-hot": ("POST", "/v1/completions", COMPLETION | {"temperature": 8.0}),
    "out-of-vocabulary": ("POST", "/v1/completions", COMPLETION | {"logit_bias": {"300": 0.0}}),
    "too-many-logprobs": ("POST", "/v1/completions", SCORED | {"prompt_logprobs": 21}),
    "too-long": ("POST", "/v1/completions", SCORED | {"prompt": [1] * 300}),
    "no-such-model": ("POST", "/v1/completions", SCORED | {"model": "nobody"}),
    "pause": ("POST", "/pause?mode=wait", None),
    "reload": ("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "FOLDER"}}),
    "reload-without-method": ("POST", "/collective_rpc", {}),
    "reset": ("POST", "/reset_prefix_cache?reset_running_requests=true", None),
    "weight-version": ("POST", "/update_weight_version", {"new_version": "weights-1"}),
    "resume": ("POST", "/resume", None),
    "weight-info": ("GET", "/weight_info", None),
    "start-weight-update": ("POST", "/start_weight_update", None),
}


def ask(server: VllmServer, method: str, path: str, body: object, key: str | None = None) -> tuple[int, object]:
    """(status, JSON of the body)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.root + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    return status, json.loads(raw) if raw else None


def record(server: VllmServer, name: str) -> dict[str, object]:
    """The call with its answer; paths of this machine are left out."""
    method, path, body = CALLS[name]
    sent = json.loads(json.dumps(body).replace("FOLDER", str(server.folder)))
    status, answer = ask(server, method, path, sent, None if name == "unauthorized" else server.key)
    kept = json.loads(json.dumps(answer).replace(str(server.folder), "FOLDER"))
    return {"method": method, "path": path, "body": body, "status": status, "answer": kept}


def main() -> None:
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "model"
        tokenizer = make_tokenizer()
        make_net(vocab_size=len(tokenizer), head_dim=32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with VllmServer(folder, NAME, Path(there) / "log.txt") as server:
            records = {name: record(server, name) for name in CALLS}
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    for name, found in records.items():
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (FIXTURES / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, found["status"])


if __name__ == "__main__":
    main()
