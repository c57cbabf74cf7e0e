"""Two hundred SIGKILLs at random moments of an elicitation over HTTP; writes docs/evidence/kills.json.

    .venv/bin/python benchmarks/kills.py            # some 15 minutes on two cores
    .venv/bin/python benchmarks/kills.py 20         # fewer kills, written nowhere

A child asks a server that counts what it would bill, four requests at once; it is killed after a random number of
answers and a random time, and started again, until it was killed so often; then it may end. Promised: what it
acknowledged is in its store, nobody is billed for more than the unique requests and those under way at each kill, and
at the end every request has its answer, in the child's store and in the one that runs share, so that another run is
billed for nothing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from limbeck.storage.files import write_json
from limbeck.storage.store import Store

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from tests.scripted_server import Scripted  # noqa: E402

OUT = HERE / "docs" / "evidence" / "kills.json"
KILLS = 200
REQUESTS = 3000
AT_ONCE = 4
SEED = 7
CHILD = f"""
import sys
from pathlib import Path
from limbeck.elicit.engine import elicit
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.config.server import Served
from limbeck.elicit.sharing import Sharing
from limbeck.storage.answers import SharedAnswers
from limbeck.storage.store import Store
from limbeck.types import Sampling

url, folder, name = sys.argv[1:]
scene = StepContext("served:toy", 7, "0/x")
requests = [scene.request((user(f"question {{n}}"),), Sampling(max_tokens=16)) for n in range({REQUESTS})]
said = Path(folder, "acknowledged").open("a")
shared = SharedAnswers(Path(folder) / "shared", url)
with Store(Path(folder) / name) as store:
    def told(done, total, tokens):
        said.write(f"{{done}}\\n")
        said.flush()
    shared.add_from(store, "served:toy")
    teacher = lambda: ApiTeacher(Served(url=url, name="toy", concurrency={AT_ONCE}))
    elicit(requests, store, teacher, told, sharing=Sharing(lambda: shared))
"""


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    noise = random.Random(SEED)  # noqa: S311 (a draw, not a secret)
    began = time.perf_counter()
    lost = 0
    before_any = 0
    with tempfile.TemporaryDirectory() as name, Scripted(lambda number, body: ("slow", 0.01)) as server:
        folder = Path(name)
        child = folder / "child.py"
        said = folder / "acknowledged"
        child.write_text(CHILD)
        command = [sys.executable, str(child), server.url, name, "s.sqlite"]
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        for number in range(kills):
            asked = len(server.seen) + noise.randint(0, 2 * REQUESTS // (3 * KILLS))
            process = subprocess.Popen(command, env=environment)  # noqa: S603 (ours)
            while process.poll() is None and len(server.seen) < asked:
                time.sleep(0.001)
            time.sleep(noise.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            process.wait()
            acknowledged = (
                max([int(line) for line in said.read_text().splitlines() if line], default=0) if said.exists() else 0
            )
            before_any += not acknowledged
            there = _count(folder / "s.sqlite").get("ok", 0)
            lost += max(0, acknowledged - there)
            if number % 10 == 9:
                print(
                    f"{number + 1} kills: {acknowledged} acknowledged, {there} stored, {sum(server.bills.values())}"
                    " billed",
                    flush=True,
                )
        subprocess.run(command, env=environment, check=True)  # noqa: S603 (ours)
        answered = _count(folder / "s.sqlite")
        bills = sum(server.bills.values())
        subprocess.run([*command[:-1], "other.sqlite"], env=environment, check=True)  # noqa: S603 (ours)
        billed_to_another = sum(server.bills.values()) - bills
        facts = {
            "kills": kills,
            "requests": REQUESTS,
            "at_once": AT_ONCE,
            "acknowledged_and_lost": lost,
            "answered": answered,
            "billed": bills,
            "billed_twice": bills - len(server.bills),
            "billed_to_another_run": billed_to_another,
            "most_allowed": REQUESTS + kills * AT_ONCE,
            "killed_before_any_answer": before_any,
            "seconds": round(time.perf_counter() - began),
        }
    print(facts)
    if lost or billed_to_another or answered != {"ok": REQUESTS} or not REQUESTS <= bills <= REQUESTS + kills * AT_ONCE:
        sys.exit("a promise was broken")
    if kills == KILLS:
        write_json(OUT, facts)


def _count(file: Path) -> dict[str, int]:
    """The answers in a store by how they ended; opened as a run opens it, which makes one that is not there yet."""
    with Store(file) as store:
        return Store.count(store.path)


if __name__ == "__main__":
    main()
