"""Whole recipes on tiny models, on the CPU and with every model on the pretend GPU; prints one JSON line a recipe.

    python -m tests.long.recipes_on_a_device [NAME ...]      # those whose name contains one of these; all by default

Not seen by it: what `parameter.data = x` does (a moving average as teacher), since the wrappers don't notice it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.attention
import transformers

import limbeck
from limbeck.commands.chat import answer
from limbeck.commands.doctor.run import examine
from limbeck.commands.profile import profile
from limbeck.config.recipe import parse
from limbeck.evaluate import fidelity
from limbeck.models.load import load_model
from limbeck.models.placement import Placement, find_device
from limbeck.objectives import head
from limbeck.progress import Silent, StoppedError
from limbeck.signals import cache
from limbeck.storage import checkpoint
from limbeck.types import Sampling
from tests.conftest import PROMPTS, make_net, make_tokenizer
from tests.devices.pretend_gpu import Gpu, device, pretend_gpu
from tests.scoring_server import ScoringServer

TEACHER = {"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 12}
NUCLEUS = {"by": "teacher", "temperature": 0.7, "top_p": 0.9, "max_tokens": 12}
STUDENT = {"by": "student", "max_tokens": 12}
UNTOUCHED = {"by": "untouched", "temperature": 1.0, "top_p": 1.0, "max_tokens": 12}
BOTH = [TEACHER | {"share": 1.0}, UNTOUCHED | {"share": 1.0}]
TRAIN = {"steps": 3, "tokens_per_step": 32, "lr": 1e-3, "seed": 3}
DIVERGENCES = (
    "forward_kl reverse_kl symmetric_kl jsd jsd_rescaled tvd hellinger skew_kl skew_reverse_kl taid adaptive_kl dkd todi"
    " alpha_beta logit_mse uld"
).split()
RANKING = "dpo orpo kto ipo simpo pro rrhf dpkd".split()
FEATURES: dict[str, dict[str, Any]] = {
    "hidden_match": {"embeddings": True},
    "attention_match": {"layers": "last"},
    "attention_kl": {},
    "value_relation": {},
    "relations": {"relation_heads": 4},
    "filtered_match": {"filter_steps": 2},
    "contrast": {"negatives": 5, "dim": 8},
    "cka": {},
}
ON_POLICY = "on_policy_distillation iw_on_policy_distillation minillm_long".split()


def prune(keep: str) -> dict[str, Any]:
    settings = {"layers": 3, "keep": keep}
    return {"start": {"prune": settings if keep in ("uniform", "first") else settings | {"calibration": 2}}}


def cases(tiny: str, other: str, url: str) -> dict[str, dict[str, Any]]:
    """The sections of each recipe that differ from the common ones; `stages`, `resume` and `doctor` are for
    `losses`."""
    own = {"start": {"pretrained": tiny}}
    live = {"model": tiny, "weights": "live", "context": {"system": "be short"}}
    table: dict[str, dict[str, Any]] = {f"divergence {name}": {"loss": [name]} for name in DIVERGENCES}
    table |= {f"ranking {name}": {"loss": [name], "writer": BOTH} for name in RANKING}
    table |= {f"feature {name}": {"loss": [{name: params}, "forward_kl"]} for name, params in FEATURES.items()}
    table |= {f"on policy {name}": {"loss": [name], "writer": [STUDENT]} for name in ON_POLICY}
    table |= {f"start prune {keep}": {"student": prune(keep)} for keep in ("importance", "block_influence", "first")}
    table |= {
        f"cache {name}": {"teacher": {"model": tiny, "cache": form}}
        for name, form in {
            "hidden": {"hidden": {"dtype": "float32"}},
            "top_k": {"top_k": {"k": 8}},
            "top_k mass": {"top_k": {"k": 8, "mass": 0.6}},
            "sampled": {"sampled": {"draws": 10}},
        }.items()
    }
    table |= {
        f"several {together}": {"teacher": {"model": tiny, "beside": [{"model": other}], "together": together}}
        for together in ("mean", "least_cross_entropy", "uncertainty")
    }
    mixed = ["forward_kl", {"jsd": {"only": "mixed"}}]
    return table | {
        "cross_entropy": {"loss": ["cross_entropy"]},
        "consistency": {"writer": BOTH, "loss": [{"cross_entropy": {"only": "chosen"}}, "consistency"]},
        "dual space": {"loss": ["dual_space"]},
        "nucleus sampling": {"writer": [NUCLEUS]},
        "start scratch": {"student": {"start": {"scratch": {"config": {"num_hidden_layers": 2}}}}},
        "start lora": {"student": {"start": {"pretrained": other}, "lora": {"rank": 2, "alpha": 4}}},
        "lora on the teacher": {
            "student": {"start": {"pretrained": tiny}, "lora": {"rank": 2, "alpha": 4}},
            "teacher": {"model": tiny, "context": {"system": "be short"}},
        },
        "served": {"teacher": {"server": {"url": url, "name": "toy", "names": 8}}, "student": own},
        "served cache": {
            "teacher": {"server": {"url": url, "name": "toy"}, "cache": {"top_k": {"k": 8}}},
            "student": own,
        },
        "bridge": {"teacher": {"model": tiny, "bridge": {}}, "student": {"start": {"pretrained": other}}},
        "mixup": {"train": TRAIN | {"mixup": 0.4}, "loss": mixed},
        "adaptive taid": {"loss": [{"taid": {"t": {"from": 0.2, "to": 1.0, "shape": "adaptive"}}}]},
        "self live context": {"teacher": live, "student": own},
        "on policy gkd": {"writer": [TEACHER | {"share": 0.5}, STUDENT | {"share": 0.5}], "loss": ["jsd"]},
        "on policy replay": {"writer": [STUDENT], "loss": ["reverse_kl"], "rollout": {"replay": {"size": 8}}},
        "joint mixture": written_with({"teacher_share": 0.2}),
        "joint speculation": written_with({"teacher_top_k": 5}),
        "teacher on the cpu": {"machine": {"teacher_device": "cpu"}},
        "teacher on the cpu, features": {
            "loss": [{"hidden_match": {}}, {"attention_kl": {}}],
            "machine": {"teacher_device": "cpu"},
        },
        "teacher on the cpu, evaluate": {
            "machine": {"teacher_device": "cpu"},
            "stages": ("elicit", "train", "evaluate", "report"),
        },
        "checkpointing": {"machine": {"checkpointing": True}},
        "small micro-batches": {"machine": {"micro_tokens": 20}},
        "evaluate and judge": {"stages": ("elicit", "train", "evaluate", "report"), "judge": other},
        "resume": {"resume": True},
        "doctor and profile": {"doctor": True},
    }


def written_with(joint: dict[str, Any]) -> dict[str, Any]:
    return {"writer": [STUDENT], "loss": ["reverse_kl"], "rollout": {"joint": joint}}


def recipe_data(sections: dict[str, Any], tiny: str, folder: Path, device: str) -> dict[str, Any]:
    """A whole recipe, with its prompts written into `folder`."""
    folder.mkdir()
    prompts, held_out = folder / "prompts.jsonl", folder / "held-out.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
    held_out.write_text('{"id": "h1", "prompt": "count one two"}\n{"id": "h2", "prompt": "a dog ran"}\n')
    measured = {"metrics": ["fidelity"], "prompts": str(held_out), "max_tokens": 12, "controls": ["untouched"]}
    if judge := sections.get("judge"):
        measured["judge"] = judge
    own = {
        key: value for key, value in sections.items() if key not in ("stages", "resume", "doctor", "judge", "machine")
    }
    return {
        "name": "tiny",
        "teacher": tiny,
        "student": prune("uniform"),
        "prompts": {"from": str(prompts)},
        "writer": [TEACHER],
        "loss": ["forward_kl"],
        "train": TRAIN,
        "evaluate": measured,
        "machine": {"device": device} | sections.get("machine", {}),
    } | own


def losses(sections: dict[str, Any], tiny: str, folder: Path, device: str) -> list[float]:
    """The losses of a run and what was measured of its student."""
    recipe = parse(recipe_data(sections, tiny, folder, device))
    run = folder / "run"
    metrics = run / "metrics.jsonl"
    stages = sections.get("stages", ("elicit", "train"))
    if sections.get("resume"):
        try:
            limbeck.run(recipe, run, stop=lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
        except StoppedError:
            stages = ("train",)
    limbeck.run(recipe, run, stages=stages)
    values = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    if "evaluate" in stages:
        measured = json.loads((run / "evaluation" / "summary.json").read_text())["systems"]["student"]
        values += [measured[name]["value"] for name in ("forward_kl", "reverse_kl", "top1_agreement")]
    if sections.get("doctor"):
        verdicts = [finding.verdict for finding in examine(recipe, run)]
        assert "fine" in verdicts
        values += [float(["fine", "not looked at", "fault"].index(verdict)) for verdict in verdicts]
        assert profile(recipe, folder / "profile", Silent())["seconds_per_step"] > 0
        student = load_model(str(run / "student"), placement=Placement(find_device(device)))
        values.append(float(len(answer(student, "why is the sky blue", Sampling(temperature=0.0, max_tokens=6)))))
    return values


def keep_what_wrappers_lack() -> None:
    """safetensors and `save_pretrained` look at storages, which wrappers don't have: give them the CPU's tensors."""

    def on_the_host(value: Any) -> Any:
        return value.inner.detach().clone() if isinstance(value, Gpu) else value

    def tensors_first(save: Any) -> Any:
        return lambda tensors, *rest, **how: save({n: on_the_host(t) for n, t in tensors.items()}, *rest, **how)

    cache.save = tensors_first(cache.save)
    checkpoint.save_file = tensors_first(checkpoint.save_file)
    saver = transformers.PreTrainedModel.save_pretrained

    def save_pretrained(net: Any, *rest: Any, **how: Any) -> Any:
        if next(net.parameters()).device.type == "cpu":
            return saver(net, *rest, **how)
        state = how.pop("state_dict", None) or net.state_dict()
        twin = type(net)(net.config)
        twin.load_state_dict({name: on_the_host(tensor) for name, tensor in state.items()})
        return saver(twin, *rest, **how)

    transformers.PreTrainedModel.save_pretrained = save_pretrained


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= 1e-4 * max(1e-3, abs(y)) for x, y in zip(a, b, strict=True))


def compared(sections: dict[str, Any], tiny: str, folder: Path) -> dict[str, Any]:
    """The losses on both devices, and whether they are the same."""
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # which is what the wrappers run
            on_cpu = losses(sections, tiny, folder / "cpu", "cpu")
        with pretend_gpu() as counts:
            on_gpu = losses(sections, tiny, folder / "gpu", "gpu")
        assert counts.operators > 1000, "nothing ran on the device"
    except Exception as error:  # noqa: BLE001 (it is shown)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/limbeck/" in f.filename]
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames[-4:]]
        if "--trace" in sys.argv:
            traceback.print_exc()
        return {"result": "broken", "error": f"{type(error).__name__}: {str(error)[:300]}", "where": where}
    waits = counts.waits.most_common(20 if "--waits" in sys.argv else 0)
    same = close(on_gpu, on_cpu)
    return {"result": "same" if same else "different", "cpu": on_cpu, "gpu": on_gpu, "waits": waits}


def main() -> None:
    torch.set_num_threads(1)
    device()  # before the first backward pass: autograd counts the devices then
    keep_what_wrappers_lack()
    head.BLOCK_ELEMENTS = fidelity.BLOCK_ELEMENTS = head.CHUNK_ELEMENTS  # one block a chunk, as off the CPU
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as home:
        tokenizer = make_tokenizer()
        folders = []
        for seed, name in ((0, "tiny"), (5, "other")):
            folders.append(str(Path(home) / name))
            make_net(vocab_size=len(tokenizer), seed=seed).save_pretrained(folders[-1])
            tokenizer.save_pretrained(folders[-1])
        with ScoringServer(load_model(folders[1]), "vLLM") as server:
            for number, (name, sections) in enumerate(cases(*folders, server.url).items()):
                if names and not any(one in name for one in names):
                    continue
                folder = Path(home) / str(number)
                folder.mkdir()
                print(json.dumps({"recipe": name} | compared(sections, folders[0], folder)), flush=True)


if __name__ == "__main__":
    main()
