"""Random faults over whole runs; writes docs/evidence/soak.json.

    make soak                                       # 30 minutes on two cores
    .venv/bin/python benchmarks/soak.py 2           # two minutes, written nowhere
    .venv/bin/python benchmarks/soak.py 0 7/31      # episode 31 of seed 7 alone; its folder stays in runs/soak

An episode draws a recipe of tiny models (soak_recipes.py) and hits it up to twelve times: SIGKILL at a random moment
or at a named point, SIGTERM or SIGINT, a disk that is full from a random write on, a byte flipped in the newest
checkpoint, a torn line at the end of the metrics; a server meanwhile refuses, hangs up in the middle or does not
answer. Then it may end, undisturbed, and must be what its undisturbed twin is: losses to the bit, weights, answers,
what was measured of every system. Each life is a fork of a process that has imported the library, so that it costs no
start; everything else is `limbeck run` with its own exit status.

Invariants: INVARIANTS below. A broken one is printed with its seed, and its folder stays.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from soak_faults import BETWEEN, Fault, draw, fork, limbeck, played  # noqa: E402
from soak_recipes import AT_ONCE, KEY, Build, kinds, make_models  # noqa: E402

from limbeck.models.load import model_contents  # noqa: E402
from limbeck.storage.files import LEFTOVER, read_jsonl, write_json  # noqa: E402

OUT = HERE / "docs" / "evidence" / "soak.json"
BROKEN = HERE / "runs" / "soak"
MINUTES = 30
SEED = 7
LIMIT_S = 60  # of a life; all end within a few seconds
CANARY = "sk-soak-8f1e5c0b7a"  # the key that no byte of a run may hold
INVARIANTS = {
    "status": "a life ends with 0 or 2, or by the signal that it was sent",
    "end": "undisturbed, it ends with 0",
    "hang": f"no life takes {LIMIT_S} s",
    "traceback": "none is printed",
    "losses": "of every training are its twin's to the bit",
    "weights": "of every student are its twin's to the bit",
    "answers": "are its twin's, and none that was stored is ever gone",
    "measured": "of every system is what was measured of the twin's",
    "bills": "at most the unique requests, those under way at a stop, and what the server broke off",
    "leftovers": "no file under a temporary name stays",
    "key": "no byte of the folder or the messages holds the server's key",
}


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    seed, _, number = (sys.argv[2] if len(sys.argv) > 2 else str(SEED)).partition("/")
    os.environ |= {"OMP_NUM_THREADS": "1", "LIMBECK_STORE": "none", KEY: CANARY, "HF_HUB_OFFLINE": "1"}
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as home:
        os.environ["LIMBECK_HOME"] = f"{home}/limbeck"
        made = fork(lambda: make_models(Path(home)), Path(os.devnull))  # a process that forks has no threads of torch's
        if os.waitpid(made, 0)[1]:
            sys.exit("the models could not be made")
        workers = []
        cores = 1 if number else len(os.sched_getaffinity(0))
        for worker in range(cores):
            numbers = iter([int(number)]) if number else iter(range(worker, 10**9, cores))
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    soak(Path(home), int(seed), numbers, log=Path(home) / f"episodes-{worker}.jsonl", deadline=deadline)
                    code = 0
                except Exception:  # noqa: BLE001 (the folder is the parent's to remove)
                    traceback.print_exc()
                finally:
                    os._exit(code)
            workers.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
        lines = [line for file in Path(home).glob("episodes-*.jsonl") for line in file.read_text().splitlines()]
    facts = summary([json.loads(line) for line in lines], int(seed), minutes)
    print(json.dumps(facts, indent=2))
    if any(codes) or facts["broken"]:
        sys.exit("an invariant is broken, or a worker ended early")
    if minutes >= MINUTES:
        write_json(OUT, facts)


def summary(episodes: list[dict[str, Any]], seed: int, minutes: float) -> dict[str, Any]:
    happened = Counter(fault for episode in episodes for fault in episode["happened"])
    return {
        "seed": seed,
        "minutes": minutes,
        "invariants": INVARIANTS,
        "episodes": len(episodes),
        "lives": sum(episode["lives"] for episode in episodes),
        "killed": happened["kill"] + happened["point"],
        "faults": dict(happened.most_common()),
        "faults_of_servers": dict(sum((Counter(episode["server"]) for episode in episodes), Counter())),
        "recipes": dict(sorted(Counter(episode["kind"] for episode in episodes).items())),
        "broken": [{k: e[k] for k in ("seed", "kind", "broken")} for e in episodes if e["broken"]],
        "longest_life_s": max((episode["longest_s"] for episode in episodes), default=0),
    }


def soak(home: Path, seed: int, numbers: Iterator[int], log: Path, deadline: float) -> None:
    """Episodes until the time is up; each leaves a line in `log`."""
    table = kinds(home / "tiny", home / "other")
    names = sorted(table)
    with log.open("a") as lines:
        for number in numbers:
            # every kind once before any twice, in an order of the seed's
            order = random.Random(f"{seed}/order/{number // len(names)}").sample(names, len(names))  # noqa: S311
            kind = order[number % len(names)]
            episode = Episode(home, f"{seed}/{number}", kind, table[kind])
            facts = episode.run()
            lines.write(json.dumps(facts) + "\n")
            lines.flush()
            word = f"BROKEN: {facts['broken']}" if facts["broken"] else "as its twin"
            print(f"{facts['seed']} {kind}: {' '.join(facts['happened']) or 'nothing'}: {word}", flush=True)
            if time.monotonic() > deadline:
                return


class Episode:
    """One recipe, its faults, and what is broken afterwards."""

    def __init__(self, home: Path, seed: str, kind: str, build: Build) -> None:
        self.seed, self.kind, self.build = seed, kind, build
        self.random = random.Random(seed)  # noqa: S311 (a draw, not a secret)
        self.tiny, self.folder = home / "tiny", home / seed.replace("/", "-")
        self.broken: list[str] = []
        self.happened: list[str] = []
        self.lives, self.longest_s = 0, 0.0
        self.server: Counter[str] = Counter()

    def run(self) -> dict[str, Any]:
        self.folder.mkdir()
        twin, out, log = self.folder / "twin", self.folder / "run", self.folder / "said"
        with played(self.folder, self.seed) as url:
            recipe = often_saved(self.build(self.tiny, self.folder, url))
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            self.live(twin, log, expected=(0,))
            took = self.longest_s
            (self.folder / "faults").touch()
            before: dict[str, str] = {}
            for _ in range(self.random.randint(3, 12)):
                if self.hit(out, log, took) == 0:
                    break  # it is finished
                stored = answers_in(out)
                if any(stored.get(key) != value for key, value in before.items()):
                    self.broken.append("answers: one that was stored is gone or another")
                before = stored
            (self.folder / "faults").unlink()
            if (status := self.live(out, log)) != 0:
                self.broken.append(f"end: {status}: {log.read_text()[-300:]}")
        self.compare(out, twin, log)
        if self.broken:
            shutil.copytree(self.folder, BROKEN / self.folder.name, dirs_exist_ok=True)
        shutil.rmtree(self.folder)
        names = ("seed", "kind", "broken", "happened", "lives", "longest_s", "server")
        return {name: getattr(self, name) for name in names}

    def live(self, out: Path, log: Path, *, fault: Fault | None = None, expected: tuple[int, ...] | None = None) -> int:
        """`limbeck run` in a fork, which meets `fault`; its status, or minus the signal that ended it."""
        began = time.monotonic()
        command = ["run", str(self.folder / "recipe.yaml"), "--out", str(out)]
        pid = fork(lambda: limbeck(command, fault), log)
        sent = False
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if ended:
                break
            if fault is not None and fault.signal and not sent and seconds >= fault.after_s:
                os.killpg(pid, fault.signal)
                sent = True
            if seconds > LIMIT_S:
                self.broken.append(f"hang: {fault and fault.name}")
                os.killpg(pid, signal.SIGKILL)
                sent = True
            time.sleep(0.002)
        self.lives += 1
        self.longest_s = round(max(self.longest_s, seconds), 2)
        code = os.waitstatus_to_exitcode(status)
        if expected is not None and code not in expected:
            self.broken.append(f"status: {code} after {fault and fault.name}: {log.read_text()[-600:]}")
        return code

    def hit(self, out: Path, log: Path, took: float) -> int | None:
        """One fault, in a life or between two; the status of that life."""
        fault = draw(self.random, took)
        if fault.name in BETWEEN:
            if BETWEEN[fault.name](out, self.random):
                self.happened.append(fault.name)
            return None
        code = self.live(out, log, fault=fault, expected=fault.expected)
        if code != 0:
            self.happened.append(fault.name)
        return code

    def compare(self, out: Path, twin: Path, log: Path) -> None:
        said = log.read_text(errors="replace")
        if "Traceback" in said:
            self.broken.append(f"traceback: {said[said.index('Traceback') :][:1500]}")
        for what, read in {"losses": losses, "weights": weights, "answers": answers_in, "measured": measured}.items():
            ours, theirs = read(out), read(twin)
            if ours != theirs:
                differ = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
                self.broken.append(f"{what}: {differ[:3]} of {len(differ)}")
        if left := [file.name for file in out.rglob(".*") if LEFTOVER.fullmatch(file.name)]:
            self.broken.append(f"leftovers: {left[:3]}")
        if CANARY in said or any(CANARY.encode() in file.read_bytes() for file in out.rglob("*") if file.is_file()):
            self.broken.append("key: it is there")
        served = self.folder / "server.json"
        if served.exists():
            facts = json.loads(served.read_text())
            self.server = Counter(facts["faults"])
            stops = sum(name not in BETWEEN for name in self.happened)
            # of the twin and of the run: each its own store
            most = (
                2 * facts["unique"] + AT_ONCE * stops + facts["faults"].get("cut", 0) + facts["faults"].get("hang", 0)
            )
            if facts["bills"] > most:
                self.broken.append(f"bills: {facts['bills']} of at most {most}")


def often_saved(recipe: Any) -> Any:
    """The recipe, with a checkpoint after every step of each of its trainings, and without what differs by itself."""
    if isinstance(recipe, list):
        return [often_saved(part) for part in recipe]
    if not isinstance(recipe, dict):
        return recipe
    also = {"train": {"save_seconds": 0}, "evaluate": {"speeds": False}}
    return {key: often_saved(value) | also[key] if key in also else often_saved(value) for key, value in recipe.items()}


def losses(out: Path) -> dict[str, list[str]]:
    """Of each training, by its folder."""
    return {
        str(log.parent.relative_to(out)): [record["loss"].hex() for record in read_jsonl(log)]
        for log in out.rglob("metrics.jsonl")
    }


def weights(out: Path) -> dict[str, str]:
    """A hash of each student, by its folder."""
    return {
        str(config.parent.relative_to(out)): model_contents(str(config.parent))
        for config in out.rglob("config.json")
        if config.parent.name == "student"
    }


def answers_in(out: Path) -> dict[str, str]:
    """Each answer that is stored, by its key."""
    found: dict[str, str] = {}
    for file in out.rglob("store.sqlite"):
        with closing(sqlite3.connect(file)) as db:
            if db.execute("select 1 from sqlite_master where name = 'samples'").fetchone():
                rows = db.execute("select key, finish, body from answers join samples on id = sample_id")
                found |= {key: f"{finish} {body}" for key, finish, body in rows}
    return found


def measured(out: Path) -> dict[str, Any]:
    """What was measured of each system, by the folder of its run."""
    return {
        str(file.relative_to(out)): json.loads(file.read_text())["systems"]
        for file in out.rglob("evaluation/summary.json")
    }


if __name__ == "__main__":
    main()
