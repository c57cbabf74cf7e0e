"""Selecting among 50,000 samples: ROUGE-L novelty and near-duplicates; writes docs/evidence/selection.json.

    .venv/bin/python benchmarks/selection.py        # about a minute on one core

The texts are made: words by their frequency (Zipf) out of 20,000, of lengths like instructions' (4 to 60 words), every
fifth a variant of an earlier text with some words changed.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from limbeck.elicit.similar import Novelty, near_duplicates
from limbeck.storage.files import write_json
from limbeck.training.memory import peak_mib

OUT = Path(__file__).parent.parent / "docs" / "evidence" / "selection.json"
COUNT = 50_000
WORDS = 20_000
VARIANT = 0.2


def texts(count: int, seed: int = 7) -> list[str]:
    """Made texts; the same for the same seed."""
    noise = random.Random(seed)  # noqa: S311 (a draw, not a secret)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    known = ["".join(noise.choices(letters, weights=range(26, 0, -1), k=noise.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    found: list[str] = []
    for _ in range(count):
        if found and noise.random() < VARIANT:
            words = noise.choice(found).split()
            for place in range(len(words)):
                if noise.random() < noise.choice((0.05, 0.3)):
                    words[place] = noise.choice(known)
        else:
            words = noise.choices(known, weights, k=max(4, min(60, round(noise.lognormvariate(2.9, 0.5)))))
        found.append(" ".join(words))
    return found


def main() -> None:
    made = texts(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT)
    began = time.perf_counter()
    novelty = Novelty(0.7, made)
    kept = sum(novelty.add(text) for text in made)
    rouge = time.perf_counter() - began
    began = time.perf_counter()
    unique = sum(twin is None for twin in near_duplicates(made, 0.8))
    near = time.perf_counter() - began
    facts = {"samples": len(made), "mean_words": round(sum(len(text.split()) for text in made) / len(made), 1)}
    results = {
        "rouge_l_novelty": {"seconds": round(rouge, 1), "kept": kept, "threshold": 0.7},
        "near_duplicates": {"seconds": round(near, 1), "kept": unique, "threshold": 0.8},
    }
    print(facts, results, flush=True)
    if len(made) == COUNT:
        write_json(OUT, {"about": facts | {"peak_mib": peak_mib()}, "results": results})


if __name__ == "__main__":
    main()
