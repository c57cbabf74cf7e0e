"""An OpenAI-compatible server on loopback with planted faults; it counts what it would bill."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "toy"


def answer(text="fine", finish="stop", model=MODEL, tokens=3, **message):
    """A reply's body; a chat's and a completion's at once."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "text": text,
        "finish_reason": finish,
    }
    return {"id": "x", "model": model, "choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}


class Scripted(ThreadingHTTPServer):
    """`script(number, body)` says what becomes of try `number` (from 0): a body, or a fault by name with its argument."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script=lambda number, body: answer(), models=({"id": MODEL},), port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.models = script, list(models)
        self.lock, self.seen, self.bills, self.running, self.most = threading.Lock(), [], Counter(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append((self.path, body, dict(self.headers)))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            self.act(self.server.script(number, body))
        finally:
            with self.server.lock:
                self.server.running -= 1

    def act(self, what):
        if isinstance(what, dict):
            return self.billed(json.dumps(what).encode())
        fault, *given = what
        if fault == "slow":
            time.sleep(given[0])
            return self.billed(json.dumps(given[1] if len(given) > 1 else answer()).encode())
        if fault == "status":
            return self.reply(
                given[0], given[2] if len(given) > 2 else b'{"error": "no"}', given[1] if len(given) > 1 else {}
            )
        if fault == "bytes":
            return self.billed(given[0])
        self.bill()
        if fault == "hang":
            time.sleep(given[0])
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(int(given[0] / 0.02)):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.02)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(answer()).encode()[: given[0]])
        elif fault == "flood":
            self.send_response(200)
            self.send_header("Content-Length", str(given[0]))
            self.end_headers()
            block = b"x" * 2**20
            for _ in range(given[0] // len(block)):
                self.wfile.write(block)
        self.close_connection = True
        return None

    def bill(self):
        with self.server.lock:
            self.server.bills[self.headers["Idempotency-Key"]] += 1

    def billed(self, body):
        self.bill()
        self.reply(200, body)

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
