"""Folders of a run and of a comparison as Limbeck writes them, made here from a few numbers; `text` stands wherever a model or a user could write."""

from __future__ import annotations

import json
import math
import random

import yaml

# What a model or a user could write to break out of a page.
PAYLOADS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</p><img src=x onerror=alert(1)>", '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)", "javascript:alert(1)", "{{ 7 * 7 }}", "{% for x in ().__class__.__base__.__subclasses__() %}x{% endfor %}",
    "<!--", "<!--<script>", "--><b>", "]]>", "</title><svg onload=alert(1)>", "</style><style>*{display:none}</style>", "</svg><script>alert(1)</script>",
    "\u202etxt", "&lt;b&gt;", "&#x3c;script&#x3e;", "a\u2028b\u2029c", "back\\slash \\u003c/script", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<base href=//x.invalid>", '<meta http-equiv="refresh" content="0;url=//x.invalid">', "<a href=//x.invalid>x</a>", "__proto__", "<details open ontoggle=alert(1)>",
]  # fmt: skip

METRICS = {
    "forward_kl": ("Forward KL", "nats a token", "low", "Fidelity on held-out text"),
    "reverse_kl": ("Reverse KL", "nats a token", "low", "Fidelity on held-out text"),
    "jsd": ("Jensen-Shannon", "nats, at most 0.69", "low", "Fidelity on held-out text"),
    "top1_agreement": ("Same first choice", "share of tokens", "high", "Fidelity on held-out text"),
    "entropy": ("Entropy", "nats a token", "none", "Fidelity on held-out text"),
    "own_forward_kl": ("Forward KL", "nats a token", "low", "On its own text"),
    "own_repetition": ("Repetition", "share of 4-grams", "low", "On its own text"),
    "everyday/pass_rate": ("Pass rate", "", "high", "Task everyday"),
    "everyday/tokens": ("Tokens", "", "none", "Task everyday"),
}
VALUES = {"forward_kl": 0.69, "reverse_kl": 0.92, "jsd": 0.14, "top1_agreement": 0.62, "entropy": 1.8, "own_forward_kl": 0.8,
          "own_repetition": 0.06, "everyday/pass_rate": 0.35, "everyday/tokens": 43.0}  # fmt: skip
KINDS = ["explain", "rewrite", "summarise", "list"]


def interval(value, low, high, n=60, **more):
    return {"value": value, "low": low, "high": high, "n": n, **more}


def around(value, share=0.08, n=60, **more):
    rim = abs(value) * share
    return interval(value, value - rim, value + rim, n, **more)


def values(factor):
    """Every metric at `factor` times the distance between 1 and 0, as a system that is nearer or farther would have it."""
    sides = {
        "low": lambda value: value * factor,
        "high": lambda value: max(0.0, 1 - (1 - value) * factor),
        "none": lambda value: value,
    }
    return {name: around(sides[METRICS[name][2]](value)) for name, value in VALUES.items()}


def described(text):
    return {
        name: {"title": title + text, "unit": unit + text, "better": better, "group": group + text}
        for name, (title, unit, better, group) in METRICS.items()
    }


def curve(kind, slope):
    if kind == "calibration":
        return [{"confidence": c / 10 + 0.05, "accuracy": (c / 10 + 0.05) ** slope, "count": 10 + c} for c in range(10)]
    return [{"upto": length, "value": slope * math.sqrt(length)} for length in (1, 4, 16, 32, 64)]


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_answers(folder, systems, prompts, words, text):
    """Item files with `prompts` prompts; answers are `words` words long, repeatable by seed."""
    draw = random.Random(7)
    vocabulary = [
        "the",
        "of",
        "bread",
        "yeast",
        "water",
        "gas",
        "rises",
        "warm",
        "oven",
        "dough",
        "flour",
        "a",
        "is",
        "and",
        "to",
        "in",
        "that",
    ]
    ids = [f"{KINDS[n % 4]}-{n:05d}{text}" for n in range(prompts)]
    kinds = [KINDS[n % 4] + text for n in range(prompts)]
    records = [
        {"prompt_id": id_, "kind": kind, "prompt": f"Question {n}: why does bread rise?{text}"}
        for n, (id_, kind) in enumerate(zip(ids, kinds, strict=True))
    ]
    write_lines(folder / "prompts.jsonl", records)
    for name in systems:
        write_lines(folder / f"answers-{name}.jsonl", [
            {"prompt_id": id_, "kind": kind, "text": f"{' '.join(draw.choices(vocabulary, k=words))}.{text}", "tokens": words,
             "finished": draw.random() < 0.8, "passed": draw.choice([True, False, None])}
            for id_, kind in zip(ids, kinds, strict=True)
        ])  # fmt: skip
    lens = []
    for id_ in ids[:24]:
        for writer in ("teacher", "student"):
            first = [
                ["Bread" + text, 0.02, [["Bread" + text, 0.91], ["The", 0.04]], [["Bread", 0.88], ["It" + text, 0.05]]],
                ["\n", 5.5, " one", " two"],
            ]
            rest = [
                [
                    f" {word}",
                    round(draw.expovariate(1.2), 4),
                    [[f" {word}", 0.5], [" a", 0.2], [" b", 0.1]],
                    [[" c", 0.4]],
                ]
                for word in draw.choices(vocabulary, k=30)
            ]
            lens.append({"writer": writer, "prompt_id": id_, "tokens": first + rest})
    write_lines(folder / "lens.jsonl", lens)


def rollout(step, text=""):
    """What a step's record says of the student's text: answers become shorter, and end more often, from step to step."""
    facts = {
        "seconds": 0.6, "written": 8, "answers": 8, "tokens": 400 - step, "length": 80.0 - step, "finished": round(0.5 + step / 100, 4), "repetition": 0.3 - step / 200,
        "distinct_2": 0.8, "age": 0.0, "own": 1.0, "teacher_log_prob": -2.0 + step / 40, "student_log_prob": -1.5, "overlap": 0.4 + step / 100,
        "entropy": 1.2, "teacher_entropy": 1.5,
    }  # fmt: skip
    return facts | ({"advice": ["the student repeats itself: lower its share" + text]} if step == 13 else {})


def efficiency(layers):
    return {"layers": layers, "parameters": layers * 4_500_000, "bytes": layers * 18_000_000, "prefill_tokens_per_second": 9000.0 / layers,
            "decode_tokens_per_second": 900.0 / layers, "first_token_ms": 3.1 * layers}  # fmt: skip


def labelled(text=""):
    """What a summary says of a classification with three labels, one of which has text that a user wrote."""
    labels = ["billing", "refund" + text, "other", "(no label)"]

    def figures(counts):
        f1 = [around(0.6 + n / 10, 0.1, 20) for n in range(3)]
        return {
            "by_label": [{"precision": around(0.7, 0.1, 20) if n else None, "recall": around(0.65, 0.1, 20), "f1": f1[n], "items": 20, "chosen": 19 * bool(n)} for n in range(3)],
            "macro_f1": around(0.7, 0.05, 60), "confusions": counts,
        }  # fmt: skip

    student = figures([[0, 1, 18], [0, 3, 2], [1, 1, 20], [2, 2, 19], [2, 1, 1]])
    return {"labels": labels, "systems": {"teacher": figures([[0, 0, 20], [1, 1, 20], [2, 2, 20]]), "student": student}}


def write_items(folder, task, text=""):
    """Items of a classification by its files: the student is sure and wrong on the first."""
    labels = ["billing", "refund" + text, "other"]
    write_lines(folder / "questions.jsonl", [
        {"task": task, "item": f"{task}/{n}", "text": f"message {n}{text}", "answer": labels[n % 3]} for n in range(6)
    ])  # fmt: skip
    for system, chosen in (("teacher", [0, 1, 2, 0, 1, 2]), ("untouched", [2] * 6), ("student", [1, 1, 2, 0, 2, 2])):
        write_lines(folder / f"task-{task}+{system}.jsonl", [
            {"item": f"{task}/{n}", "scores": {"acc": float(said == n % 3)}, "weights": {}, "text": labels[said],
             "facts": {"answer": n % 3, "chosen": said, "probabilities": [0.9 if k == said else 0.05 for k in range(3)]}}
            for n, said in enumerate(chosen)
        ])  # fmt: skip


def judged_pair(outcomes, **more):
    """What a summary says of a judge that held the student against one system; `outcomes` are wins, ties, losses, unparsable."""
    read = sum(outcomes[:3])
    return {
        "win_rate": around((outcomes[0] + outcomes[1] / 2) / read, n=read) if read else None,
        "outcomes": dict(zip(("first", "tie", "second", "unparsable", "too_long"), (*outcomes, 0), strict=True)),
        "unparsable_share": outcomes[3] / sum(outcomes), "swap_consistency": 0.8, "first_position_share": 0.52, "longer_wins": 0.55,
        "length_correlation": 0.1, "judge_is_teacher": False, "undefined": "",
    } | more  # fmt: skip


def make_run(folder, text="", prompts=12, words=20):
    """A finished run's folder with every file and key that a report reads."""
    systems = {"teacher": values(0.0), "untouched": values(1.7), "sft_control": values(1.2), "student": values(1.0)}
    paired = {
        "student - untouched": {name: around(-0.4 if METRICS[name][2] == "low" else 0.2, p=0.0001) for name in VALUES},
        "student - sft_control": {name: interval(-0.05, -0.12, 0.02, p=0.21) for name in VALUES}
        | {"jsd": interval(0.03, 0.01, 0.05, p=0.004)},
    }
    summary = {
        "name": "run" + text, "recipe": "a" * 64, "controls": ["untouched", "sft_control"],
        "systems": systems | ({text: {"forward_kl": around(0.5), text: around(0.1)}} if text else {}), "metrics": described(text), "paired": paired,
        "recovered": {"forward_kl": interval(0.57, 0.52, 0.61), "top1_agreement": None},
        "efficiency": {name: efficiency(30 if name == "teacher" else 24) for name in systems},
        "calibration": {name: curve("calibration", 1 + n / 4) for n, name in enumerate(systems)},
        "exposure": {name: curve("exposure", n) for n, name in enumerate(systems) if n},
        "by_kind": {kind + text: {name: {"forward_kl": around(0.4 + n / 10, 0.2, 15)} for name in systems} for n, kind in enumerate(KINDS)},
        "robustness": {f"everyday@typos{text}/pass_rate": {name: around(0.2, 0.1, 26) for name in systems}},
        "by_token_class": {name + text: {"tokens": 900 // n, "forward_kl": 0.4 * n, "share_of_loss": 0.4 / n} for n, name in enumerate(("word start", "digits", "end of text"), 1)},
        "wording": {name: {"distinct_1": 0.41, "distinct_2": 0.83, "self_bleu": None} for name in systems},
        "leaks": [
            {"item": f"everyday/{n}{text}", "training": "p7" + text, "kind": kind, "excerpt": "why does bread rise" + text}
            for n, kind in enumerate(("exact", "overlap", "same_but_for_numbers", "exact" + text if text else "contained"))
        ],
        "judge": {"model": "judge@0123456789abcdef" + text, "max_tokens": 256, "pairs": {
            "student - untouched": judged_pair((30, 10, 15, 5)), "student - sft_control" + text: judged_pair((20, 18, 20, 2), swap_consistency=0.41),
            "student - teacher": judged_pair((9, 12, 36, 3), length_correlation=-0.624),
        }},
        "warnings": ["Only 12 held-out answers: intervals are wide." + text],
        "by_label": {"intents" + text: labelled(text)}, "by_field": {"forms" + text: {"city" + text: {name: around(0.5, n=40) for name in systems}}},
        "kept": {"everyday/pass_rate": interval(0.8, 0.7, 0.95)}, "requests": {"requests": 60, "prompt_tokens": 200.0, "teacher_prompt_tokens": 300.0, "answer_tokens": 21.0},
        "cautions": ["One seed: another training may give another result." + text],
        "held_out": {"answers": 60, "writer": "teacher" + text, "temperature": 0.7, "top_p": 0.95, "max_tokens": 80, "cut_off": 29},
        "tasks": {"everyday" + text: {"version": "1.0" + text, "kind": "generate" + text, "settings": {"decoding": "greedy" + text, "max_tokens": 64}}},
        "machine": {"python": "3.11.7" + text, "torch": "2.13.0" + text, "threads": 2, "gpu": None},
    }  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    recipe = {"name": "run" + text, "title": "Forward-KL distillation of a small model" + text, "paper": "arXiv:1503.02531" + text,
              "teacher": {"model": "smollm2" + text, "context": {"system": "Answer in one short sentence." + text, "user": "{prompt} Think first." + text}},
              "prompts": {"from": "builtin/everyday" + text, "limit": 144}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_answers(folder / "evaluation", list(systems), prompts, words, text)
    write_items(folder / "evaluation", "intents", text)
    for place, start in ((folder, 1.1), (folder / "controls" / "sft_control", 2.3)):
        write_lines(place / "metrics.jsonl", [
            {"step": n, "loss": start / math.sqrt(n), "terms": {"forward_kl": start / n, "cross_entropy" + text: start / math.sqrt(n)},
             "response_tokens": 512, "seconds": 1.5, **({"rollout": rollout(n, text)} if place == folder and n % 3 else {})} for n in range(1, 40)
        ])  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (folder / "start.json").write_text(json.dumps({"kept": [0], "drops": [[5, 0.12], [17, 0.23]]}))
    (folder / "inputs.json").write_text(json.dumps({"teacher": "smollm2@64279157" + text, "prompts": "03023ce0"}))
    return folder


def make_comparison(folder, text="", prompts=12, words=20, seeds=(7, 8, 9)):
    """A comparison's folder of four methods; the first is the base."""
    factors = {"seq-kd": 1.3, "forward-kl": 1.0, "reverse-kl": 1.25, "jsd": 1.05}
    base, *others = factors
    effects = {"forward-kl": (-0.11, 0.03, 0.003), "reverse-kl": (0.09, 0.04, 0.012), "jsd": (-0.03, 0.05, 0.31)}
    systems = {"teacher": values(0.0), "untouched": values(1.9)} | {
        name: values(factor) for name, factor in factors.items()
    }
    paired = {}
    for name in others:
        value, rim, p = effects[name]
        sides = {metric: -value if METRICS[metric][2] == "high" else value for metric in VALUES}
        paired[f"{name} - {base}"] = {
            metric: interval(side, side - rim, side + rim, p=p / 3, p_holm=p) for metric, side in sides.items()
        }
    comparison = {
        "name": "four-methods" + text, "base": base, "seeds": list(seeds), "systems": systems, "metrics": described(text), "paired": paired,
        "methods": {name: {"title": name.replace("-", " ").capitalize() + text, "paper": "arXiv:2306.13649" + text, "loss": [name + text], "recipe": "b" * 64} for name in factors},
        "by_seed": {name: {str(seed): {metric: x["value"] + seed / 900 for metric, x in systems[name].items()} for seed in seeds} for name in factors},
        "recovered": {name: {"forward_kl": interval(0.5, 0.4, 0.6), "jsd": None} for name in factors},
        "cost": {name: {"teacher_tokens": 7523, "trained_tokens": 22569.5, "steps": 45, "seconds": 90.0 * (n + 1), "peak_memory_mib": 1500 + 220 * n, "writing_share": 0.213 * n} for n, name in enumerate(factors)},
        "rollout": {name: {"length": 61.5, "finished": 0.934, "overlap": 0.71, "entropy": 1.25, "repetition": 0.004} for name in ("forward-kl", "jsd")},
        "by_kind": {kind + text: {name: {"forward_kl": around(0.4 + n / 10, 0.2, 15)} for name in systems} for n, kind in enumerate(KINDS)},
        "robustness": {f"everyday@typos{text}/pass_rate": {name: around(0.2, 0.1, 26) for name in systems}},
        "efficiency": {"teacher": efficiency(30), "untouched": efficiency(24)}, "calibration": {"teacher": curve("calibration", 1)},
        "held_out": {"answers": 60, "writer": "teacher", "temperature": 0.7, "top_p": 0.95, "max_tokens": 80, "cut_off": 29},
        "tasks": {"everyday" + text: {"version": "1.0" + text}}, "leaks": [], "warnings": ["A note." + text],
        "machine": {"python": "3.11.7" + text}, "settings": {"teacher": {"model": "smollm2" + text, "weights": "average", "context": {"system": "Be brief." + text}}, "train": {"lr": 0.0002, "note": text}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(comparison))
    runs = [f"{name}-s{seed}" for name in factors for seed in seeds]
    write_answers(folder / "evaluation", ["teacher", "untouched", *runs], prompts, words, text)
    return folder
