"""A server that scores text with a model in this process, in llama.cpp's protocol or vLLM's, and can be made to do it wrongly.

As vLLM it speaks in the shapes of answers that vLLM 0.32 gave (tests/recorded.py).
"""

from __future__ import annotations

import json

import torch

from limbeck.models.model import head_of, hidden_states
from tests.recorded import recorded
from tests.scripted_server import Handler, Scripted, answer


class ScoringServer(Scripted):
    """`spoil(path, reply)` may change, or replace by a (fault, ...), whatever would be said; `temperature` is that of its softmax."""

    def __init__(
        self,
        model,
        protocol="llama.cpp",
        spoil=lambda path, reply: reply,
        temperature=1.0,
        say="the cat sat on the mat",
    ):
        self.model, self.protocol, self.spoil, self.temperature, self.say = model, protocol, spoil, temperature, say
        super().__init__()
        self.RequestHandlerClass = ScoringHandler

    @torch.no_grad()
    def log_probs(self, ids):
        """[T, V], fp32, of the next token after each."""
        net = self.model.net
        logits = head_of(net).logits(hidden_states(net, torch.tensor([ids]))[0])
        return (logits / self.temperature).log_softmax(-1)

    def top(self, log_V, k):
        values, ids = log_V.topk(min(k, len(log_V)))
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def asked(self, path, body):
        tokenizer = self.model.tokenizer
        if path == "/v1/models":
            if self.protocol == "vLLM":
                card = recorded("models")[1]["data"][0]
                return {"object": "list", "data": [card | model for model in self.models]}
            return {"object": "list", "data": self.models}
        if path == "/props" and self.protocol == "llama.cpp":
            return {"default_generation_settings": {"n_ctx": 256}}
        if path == "/version" and self.protocol == "vLLM":
            return recorded("version")[1]
        if path == "/v1/chat/completions":
            if self.protocol == "vLLM":
                chat = recorded("chat")[1] | {"model": "toy"}
                chat["choices"][0]["message"]["content"], chat["choices"][0]["finish_reason"] = self.say, "stop"
                chat["usage"] |= {"completion_tokens": 3}
                return chat
            return answer(self.say)
        if path == "/apply-template" and self.protocol == "llama.cpp":
            return {
                "prompt": tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            }
        if path == "/tokenize":
            text = body.get("content", body.get("prompt"))
            if "messages" in body:
                text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            return {**recorded("tokenize-text")[1], "count": len(ids), "tokens": ids}
        if path == "/completion" and self.protocol == "llama.cpp":
            entries = [
                {"id": n, "logprob": x} for n, x in self.top(self.log_probs(body["prompt"])[-1], body["n_probs"])
            ]
            return {
                "model": "toy", "tokens_evaluated": len(body["prompt"]), "truncated": False,
                "completion_probabilities": [{**entries[0], "top_logprobs": entries}],
            }  # fmt: skip
        if path == "/v1/completions" and self.protocol == "vLLM":
            log_TV, rows = self.log_probs(body["prompt"]), [None]
            for place, written in enumerate(body["prompt"][1:]):
                named = {
                    **dict(self.top(log_TV[place], body["prompt_logprobs"])),
                    written: float(log_TV[place][written]),
                }
                rows.append({str(n): {"logprob": x, "rank": 1, "decoded_token": ""} for n, x in named.items()})
            whole = recorded("prompt-logprobs")[1] | {"model": "toy"}
            whole["choices"][0]["prompt_logprobs"] = rows
            return whole
        return ("status", 404)


class ScoringHandler(Handler):
    def do_GET(self):
        self.say({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, dict(self.headers)))
        self.say(body)

    def say(self, body):
        self.act(self.server.spoil(self.path, self.server.asked(self.path, body)))
