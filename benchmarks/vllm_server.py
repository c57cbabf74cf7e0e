"""A real vLLM on loopback, started from the virtual environment that `make vllm` makes; killed and started again at
will."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("LIMBECK_VLLM", ROOT / ".venv-vllm")) / "bin" / "python"
KEY = "local-secret-key"
UP_SECONDS = 300.0  # most of which it spends importing itself
OWN_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class VllmServer:
    """A model folder, served under `name` on a port that stays the same over restarts.

    Args:
        log: where its words go.
        options: more of its command line.
    """

    def __init__(self, folder: Path, name: str, log: Path, options: tuple[str, ...] = (), key: str = KEY) -> None:
        self.folder, self.name, self.log, self.options, self.key = folder, name, log, options, key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it; `wait` until it answers."""
        if not PYTHON.exists():
            raise FileNotFoundError(f"no vLLM at {PYTHON}: run `make vllm`")
        command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)),
            *("--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"),
            *self.options,
        ]
        inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VLLM_API_KEY")}
        environment = inherited | OWN_SETTINGS | ({"VLLM_API_KEY": self.key} if self.key else {})
        with self.log.open("ab") as log:  # a session of its own, so that its workers die with it
            self.process = subprocess.Popen(  # noqa: S603 (our own command)
                command, env=environment, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        assert self.process is not None
        end = time.monotonic() + UP_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended at once: {self.log.read_text(errors='replace')[-2000:]}")
            try:
                self.version()
                return
            except (OSError, HTTPException, ValueError):
                time.sleep(0.5)
        raise TimeoutError(f"vLLM was not up in {UP_SECONDS:g} s; its log is {self.log}")

    def version(self) -> str:
        """What it says of itself.

        Raises:
            OSError, HTTPException, ValueError: it does not answer yet.
        """
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("GET", "/version")
            return str(json.loads(connection.getresponse().read())["version"])

    def start(self) -> None:
        self.launch()
        self.wait()

    def kill(self) -> None:
        """End it and its workers as a crash would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> VllmServer:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
