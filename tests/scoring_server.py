"""A server that scores text with a model in this process, in llama.cpp's protocol or vLLM's, and can be made to do it wrongly. With its own
text (`say`) it gives log-probabilities in OpenAI's shape, the end token's with llama.cpp's.

As vLLM it speaks in the shapes of answers that vLLM 0.32 gave (tests/recorded.py).
"""

from __future__ import annotations

import json

import torch

from limbeck.models.byte_alignment import tokens_of
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
        self.octets = tokens_of(model.tokenizer)
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

    def said(self, body):
        """The tokens of `say` with `top_logprobs` likely ones at each."""
        tokenizer = self.model.tokenizer
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        prompt_ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = [*tokenizer(self.say, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        log_TV = self.log_probs(prompt_ids + ids)[len(prompt_ids) - 1 :]
        entries = []
        for log_V, written in zip(log_TV, ids, strict=False):
            top = [self.token(n, x) for n, x in self.top(log_V, body["top_logprobs"])]
            entries.append({**self.token(written, float(log_V[written])), "top_logprobs": top})
        return entries if self.protocol == "llama.cpp" else entries[:-1]

    def token(self, number, log_prob):
        octets = self.octets.bytes_of[number]
        entry = {"token": (octets or b"").decode("utf-8", "replace"), "bytes": list(octets or b""), "logprob": log_prob}
        return {"id": number, **entry} if self.protocol == "llama.cpp" else entry

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
                reply = recorded("chat")[1] | {"model": "toy"}
                reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"] = self.say, "stop"
                reply["usage"] |= {"completion_tokens": 3}
            else:
                reply = answer(self.say)
            if body.get("logprobs"):
                reply["usage"]["completion_tokens"] = len(self.said(body))
                reply["choices"][0]["logprobs"] = {"content": self.said(body)}
            return reply
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
