"""The student as a writer in the loop: its degenerate cases are other methods, exactly; killed, it goes on with the same text."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

import limbeck
from limbeck.config.recipe import parse
from limbeck.config.sections import Rollout, Writer
from limbeck.data.batches import FixedText, Row
from limbeck.models.copy import Copy
from limbeck.models.generate import Completion, Decoding, GenerationJob, write
from limbeck.objectives.parameters import Range
from limbeck.objectives.schedule import make_schedule
from limbeck.training.rollout import SHARE, Rollouts
from limbeck.training.rollout_stats import Advice, facts_of
from limbeck.types import RecipeError, Sampling, UserError
from tests.runs.test_pipeline import command

TEACHER, STUDENT = (
    {"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 12},
    {"by": "student", "max_tokens": 12},
)


@pytest.fixture
def trained(recipe_data, tmp_path):
    """Train a variation of the tiny recipe; returns its folder."""

    def go(name, writer, loss=("forward_kl",), **sections):
        data = recipe_data | {"writer": writer, "loss": list(loss), **sections}
        data["student"] = sections.get("student", {"start": {"prune": {"layers": 3, "keep": "uniform"}}})
        data["evaluate"] = recipe_data["evaluate"] | {"controls": ["untouched"]}
        limbeck.run(parse(data), tmp_path / name, stages=("elicit", "train"))
        return tmp_path / name

    return go


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"].hex() for record in records(folder)]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


def distance(one, other):
    """Largest difference of two trained students' weights."""
    a, b = weights(one), weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# Degenerate cases


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_share_0_is_off_policy_to_the_bit(trained, per):
    plain = trained("plain", [TEACHER])
    none = trained("none", [TEACHER, STUDENT | {"share": 0}], rollout={"per": per})
    assert losses(none) == losses(plain) and distance(none, plain) == 0
    some = trained("some", [TEACHER, STUDENT | {"share": 0.5}], rollout={"per": per})
    assert losses(some) != losses(plain)


def test_gkd_with_a_forward_divergence_is_imitkd(trained):
    writers = [TEACHER, STUDENT | {"share": {"from": 0.0, "to": 1.0}}]
    gkd = trained("gkd", writers, [{"jsd_rescaled": {"teacher_share": 0.0}}])
    imitkd = trained("imitkd", writers, ["forward_kl"])
    assert [r["loss"] for r in records(gkd)] == pytest.approx([r["loss"] for r in records(imitkd)], rel=1e-6)
    assert distance(gkd, imitkd) < 1e-6


def test_minillm_without_its_long_term_is_gkd_with_reverse_kl_on_policy(trained):
    single = {"reverse_kl": {"by": "importance_weight"}}
    long = {"minillm_long": {"weight": 1e-30}}  # there, and too light to be felt
    minillm = trained("minillm", [STUDENT], [single, long])
    gkd = trained("gkd", [STUDENT], [{"jsd_rescaled": {"teacher_share": 1.0}}])
    assert [r["terms"]["reverse_kl"] for r in records(minillm)] == pytest.approx(
        [r["loss"] for r in records(gkd)], rel=1e-5
    )
    assert distance(minillm, gkd) < 1e-5


def test_minillm_with_gamma_0_and_no_single_step_is_on_policy_distillation(trained):
    """Its return is then log p - log q of the token itself; what it adds to the loss's value has no gradient."""
    form = {"own_token": 1, "gamma": 0, "length_norm": 0}
    minillm = trained("minillm", [STUDENT], [{"minillm_long": form}])
    opd = trained("opd", [STUDENT], ["on_policy_distillation"])
    assert distance(minillm, opd) < 1e-5
    assert distance(opd, trained("reverse", [STUDENT], ["reverse_kl"])) > 1e-4, (
        "an estimate, not the sum over the vocabulary"
    )


def test_iw_opd_without_a_boost_is_on_policy_distillation(trained):
    one = trained("iw", [STUDENT], [{"iw_on_policy_distillation": {"boost": 0}}])
    assert distance(one, trained("opd", [STUDENT], ["on_policy_distillation"])) < 1e-5
    assert distance(one, trained("boosted", [STUDENT], ["iw_on_policy_distillation"])) > 1e-5


def test_a_student_that_is_its_teacher_has_no_loss_on_its_own_text(trained, tiny_folder):
    out = trained("same", [STUDENT], ["reverse_kl"], student={"start": {"pretrained": str(tiny_folder)}})
    assert abs(records(out)[0]["loss"]) < 1e-6


def test_a_copy_in_another_precision_follows_the_student(tiny):
    copy = Copy(tiny.net, torch.bfloat16)
    first = copy.now()
    assert first.dtype == torch.bfloat16 and not first.training and tiny.net.dtype == torch.float32
    with torch.no_grad():
        for parameter in tiny.net.parameters():
            parameter.add_(0.5)
    assert copy.now() is first
    assert all(
        torch.equal(own, theirs.bfloat16())
        for own, theirs in zip(first.parameters(), tiny.net.parameters(), strict=True)
    )
    job = GenerationJob(
        tiny.prompt_ids(({"role": "user", "content": "why is the sky blue"},)), Sampling(1.0, 1.0, 12), 3
    )
    (text,) = write(copy.now(), [job], tiny.eos_ids, decoding=Decoding(record=True))
    for place, token in enumerate(text.ids):
        logits = first(torch.tensor([[*job.prompt_ids, *text.ids[:place]]])).logits[0, -1].float()
        assert text.sampler_log_prob[place] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=0.05)


# Going on


@pytest.mark.long
@pytest.mark.parametrize(
    ("writer", "rollout", "loss"),
    [
        (
            [TEACHER, STUDENT | {"share": 0.6}],
            {"replay": {"size": 6, "fresh": {"from": 1.0, "to": 0.0}}, "per": "batch"},
            ["jsd"],
        ),
    ],  # more in tests/long/test_kills.py
)
@pytest.mark.promise("R3")
def test_killed_and_run_again_the_losses_are_the_same_to_the_bit(
    recipe_data, tmp_path, writer, rollout, loss, crash_at="train.after_step:4"
):
    data = recipe_data | {"writer": writer, "rollout": rollout, "loss": loss}
    data["train"] |= {"save_seconds": 0, "steps": 7}
    data["student"], data["evaluate"] = (
        {"start": {"prune": {"layers": 3, "keep": "uniform"}}},
        data["evaluate"] | {"controls": ["untouched"]},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    assert command("train", file, "--out", killed, crash_at=crash_at).returncode == 137
    done = command("train", file, "--out", killed)
    assert done.returncode == 0, done.stderr
    assert command("train", file, "--out", clean).returncode == 0
    assert losses(killed) == losses(clean) and len(losses(clean)) == 7
    assert distance(killed, clean) == 0


# The source alone, with a scripted student: answer number n has 3 + n % 5 tokens and ends

EOS = 0


def script(lengths=lambda n: 3 + n % 5):
    asked = []

    def write(jobs):
        found = []
        for job in jobs:
            length = lengths(len(asked))
            asked.append(job)
            ids = [*range(10, 10 + length - 1), EOS]
            found.append(Completion(0, ids, [-1.0] * length, [-1.5] * length, length))
        return found

    write.asked = asked
    return write


def slots(count=6):
    return [Row(f"p{n}", (1, 2, 3 + n), (), frozenset(), f"p{n}") for n in range(count)]


def schedule(raw):
    return make_schedule(raw, "", Range(0, 1).check)


def rollouts(write, share=1.0, fresh=1.0, fixed=None, tokens=20, order=(), watched=None, **settings):
    writer = Writer(by="student", max_tokens=16)
    places = frozenset({EOS}), order
    return Rollouts(
        slots(),
        fixed,
        write,
        writer,
        Rollout(**settings),
        schedule(share),
        schedule(fresh),
        7,
        tokens,
        *places,
        watched=watched,
    )


def turns(source, steps, states=None):
    states = {} if states is None else states
    return [source.step_batch(step, step / steps, states) for step in range(steps)]


def rows_of(turn):
    return [row for micro_batch in turn.micro_batches for row in micro_batch]


def fixed_text(count=6, length=5, tokens=20):
    rows = [
        Row(f"t{n}", (1, 2, 3 + n), (*range(40, 40 + length - 1), EOS), frozenset({"teacher", "chosen"}), f"p{n}")
        for n in range(count)
    ]
    return FixedText(rows, 7, tokens)


@pytest.mark.parametrize("ahead", [1, 4])
def test_the_ids_drawn_are_the_ids_trained_and_tokens_keep_to_their_number(ahead):
    write = script()
    source = rollouts(write, ahead=ahead)
    found = turns(source, 40)
    written = sum(len(row.response_ids) for turn in found for row in rows_of(turn))
    assert written == pytest.approx(40 * 20, abs=8), "what one step lacks or has too much, others make up for"
    for row in rows_of(found[3]):
        assert (
            row.prompt_ids == (1, 2, 3 + int(row.group[1:])) and row.response_ids[-1] == EOS and row.tags == {"student"}
        )
        assert row.columns["log_prob"] == (-1.0,) * len(row.response_ids) and row.columns["old_log_prob"][0] == -1.5
    ages = [turn.facts["age"] for turn in found]
    assert max(ages) == 0 if ahead == 1 else 0 < max(ages) <= ahead


def test_every_prompt_comes_once_before_any_comes_again_and_each_draw_has_its_own_seed():
    write = script()
    turns(rollouts(write), 12)
    prompts = [job.prompt_ids for job in write.asked]
    for at in range(0, len(prompts) - 6, 6):
        assert len(set(prompts[at : at + 6])) == 6
    assert prompts[:6] != prompts[6:12]
    assert len({job.seed for job in write.asked}) == len(write.asked)


def test_per_batch_a_step_is_wholly_the_students_or_not_at_all():
    kinds = []
    for turn in turns(rollouts(script(), share=0.5, fixed=fixed_text(), per="batch"), 60):
        kinds.append({next(iter(row.tags & {"teacher", "student"})) for row in rows_of(turn)})
    assert all(len(kind) == 1 for kind in kinds)
    assert 18 < sum(kind == {"student"} for kind in kinds) < 42


def test_per_sample_the_share_holds_on_average_and_follows_its_schedule():
    found = turns(rollouts(script(), share={"from": 0.0, "to": 1.0}, fixed=fixed_text()), 90)
    own = [sum("student" in row.tags for row in rows_of(turn)) / len(rows_of(turn)) for turn in found]
    thirds = [sum(own[at : at + 30]) / 30 for at in (0, 30, 60)]
    assert thirds[0] < 0.3 < 0.35 < thirds[1] < 0.65 < 0.7 < thirds[2]
    assert own[0] == 0


def test_where_all_answer_every_prompt_has_all_texts_the_preferred_first():
    for order in (("teacher", "student"), ("student", "teacher")):
        for turn in turns(rollouts(script(), fixed=fixed_text(), order=order), 5):
            for micro_batch in turn.micro_batches:
                groups = {}
                for row in micro_batch:
                    groups.setdefault(row.group, []).append(row)
                for rows in groups.values():
                    assert [min(row.tags & {"teacher", "student"}) for row in rows] == list(order), (
                        "never parted, in their order"
                    )
                    own = rows[order.index("student")]
                    assert own.tags == {"student", "chosen" if order[0] == "student" else "rejected"}


def test_the_buffer_is_first_in_first_out_and_read_again_as_its_schedule_says():
    write = script(lambda _: 5)
    source = rollouts(write, fresh={"from": 1.0, "to": 0.0}, replay={"size": 8, "fresh": 1.0})
    found = turns(source, 60)
    written = [turn.facts["written"] for turn in found]
    first_again = written.index(0)
    assert sum(written[:first_again]) >= 8, "the buffer must be full before it is read"
    assert sum(n > 0 for n in written[:20]) > sum(n > 0 for n in written[40:])
    assert len(source.memory.buffer) == 8
    assert [answer.born for answer in source.memory.buffer] == sorted(answer.born for answer in source.memory.buffer)
    newest = max(step for step, n in enumerate(written) if n)
    assert source.memory.buffer[-1].born == newest
    again = next(turn for turn in found if not turn.facts["written"])
    assert len({row.sample_id for row in rows_of(again)}) == len(rows_of(again)), "no answer twice in a step"
    assert again.facts["age"] > 0


def test_an_adaptive_share_follows_a_scripted_validation_loss():
    """It rises by 0.1 whenever the loss has grown by 0.1 since it last rose (arXiv:2402.03898, as its code has it)."""
    losses = iter([2.0, 2.05, 2.11, 2.2, 2.22, 1.9, 2.33])
    states = {}
    source = rollouts(
        script(), share={"from": 0.0, "to": 1.0, "shape": "plateau"}, fixed=fixed_text(), per="batch",
        watched=lambda _: next(losses), validation={"prompts": 2, "every": 2},
    )  # fmt: skip
    found = turns(source, 15, states)
    shares = [turn.facts["share"] for turn in found if "share" in turn.facts]
    assert shares == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3])
    assert [turn.facts["validation_loss"] for turn in found if "share" in turn.facts] == [
        2.0,
        2.05,
        2.11,
        2.2,
        2.22,
        1.9,
        2.33,
    ]
    assert states[SHARE]["value"] == pytest.approx(0.3)


def test_state_goes_through_json_and_the_text_after_it_is_the_same():
    def make(write):
        return rollouts(write, share=0.7, fresh=0.5, fixed=fixed_text(), ahead=2, replay={"size": 5, "fresh": 0.5})

    straight = turns(make(script()), 12)
    first = make(script())
    turns(first, 6)
    write = script()
    write.asked += [None] * first.memory.asked  # the scripted student's own place
    second = make(write)
    second.restore(json.loads(json.dumps(first.state())))
    assert [second.step_batch(step, step / 12, {}) for step in range(6, 12)][-1].micro_batches == straight[
        -1
    ].micro_batches


def test_a_student_that_only_ends_is_refused_at_once_with_the_cure():
    with pytest.raises(UserError, match=r"nothing but the end token.*cold start"):
        turns(rollouts(script(lambda _: 1)), 5)


def test_drifts_are_told_once_with_advice():
    steps = [{"finished": 0.9, "repetition": 0.05, "length": 20.0, "distinct_2": 0.9}] * 4
    steps += [{"finished": 0.1, "repetition": 0.8, "length": 60.0, "distinct_2": 0.9}] * 8
    advice = Advice()
    said = [text for facts in steps for text in advice.on(facts).get("advice", [])]
    assert len(said) == 3 and {"max_tokens", "repeats", "twice"} <= {
        word for text in said for word in ("max_tokens", "repeats", "twice") if word in text
    }
    steady = Advice()
    assert not any(steady.on(steps[0]) for _ in range(20))


def test_a_student_whose_answers_are_long_keeps_to_its_share():
    """Where it has written ahead of its share it writes nothing, until the steps have caught up."""
    found = turns(rollouts(script(lambda _: 15), share=0.1, fixed=fixed_text()), 200)
    own = sum(len(row.response_ids) for turn in found for row in rows_of(turn) if "student" in row.tags)
    every = sum(len(row.response_ids) for turn in found for row in rows_of(turn))
    assert every == pytest.approx(200 * 15, rel=0.02) and own / every == pytest.approx(0.1, abs=0.03)


def test_a_small_buffer_makes_no_giant_steps():
    found = turns(rollouts(script(lambda _: 5), fresh=0.5, tokens=100, replay={"size": 8, "fresh": 0.5}), 40)
    assert max(sum(len(row.response_ids) for row in rows_of(turn)) for turn in found) <= 205


def test_one_answer_that_only_ends_does_not_end_the_run():
    lengths = iter([1, *[5] * 100])
    source = rollouts(script(lambda _: next(lengths)), share=0.3, fixed=fixed_text())
    assert turns(source, 10) and source.memory.spoken == source.memory.asked - 1


def test_facts_of_text_count_what_they_say():
    facts = facts_of([([5, 6, 5, 6, 5, 6, 0], 7, 0), ([7, 8], 1, 4)], {0})
    assert facts["length"] == 4.5 and facts["finished"] == 0.5 and facts["age"] == 2 and facts["own"] == round(8 / 9, 4)
    assert facts["repetition"] == round(1 - 3 / 4, 4), "5656, 6565, 5656, 6560: one of four is a repetition"
    assert facts["distinct_2"] == round(4 / 7, 4), "56, 65, 60, 78 of seven"


# Refused before anything is spent


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"writer": [STUDENT], "train": {"epochs": 1}}, "train.epochs", "give train.steps"),
        ({"loss": ["on_policy_distillation"]}, "loss[0]", "add a writer"),
        ({"writer": [STUDENT], "loss": ["reinforce"]}, "loss[0]", "which rewards give"),
        (
            {"writer": [STUDENT], "loss": [{"reverse_kl": {"by": "importance_weight"}}]},
            "loss[0].reverse_kl.by",
            "add the loss minillm_long",
        ),
        (
            {"writer": [STUDENT], "loss": [{"reverse_kl": {"by": "weight"}}]},
            "loss[0].reverse_kl.by",
            "importance_weight",
        ),
        ({"writer": [TEACHER, STUDENT], "loss": ["cross_entropy"]}, "loss[0]", "its own text"),
        (
            {"writer": [STUDENT, TEACHER], "loss": [{"cross_entropy": {"only": "chosen"}}]},
            "evaluate.controls",
            "preferred text",
        ),
        (
            {"writer": [TEACHER, STUDENT], "loss": [{"cross_entropy": {"only": "rejected"}}]},
            "loss[0]",
            "{only: teacher}",
        ),
        (
            {"writer": [TEACHER, STUDENT], "loss": [{"cross_entropy": {"only": "student"}}]},
            "loss[0]",
            "{only: teacher}",
        ),
        ({"writer": [STUDENT], "loss": ["cross_entropy"]}, "loss[0]", "choose a divergence"),
        (
            {"writer": [STUDENT], "loss": [{"on_policy_distillation": {"only": "chosen"}}]},
            "loss[0]",
            "leave `only` out",
        ),
        (
            {"writer": [TEACHER, STUDENT | {"share": 0.5}], "loss": ["on_policy_distillation"]},
            "loss",
            "no loss reads the text of the teacher",
        ),
        (
            {
                "elicit": [{"answer": {"n": 2, "max_tokens": 8}}, "rate", "pairs"],
                "writer": [{"by": "elicited", "share": 0.5}, STUDENT | {"share": 0.5}],
                "loss": ["simpo", {"reverse_kl": {"only": "student"}}],
            },
            "loss.simpo",
            "it compares all answers to a prompt, and a student that writes a share of the text takes some away",
        ),
        ({"writer": [STUDENT | {"temperature": 0}], "loss": ["on_policy_distillation"]}, "loss[0]", "draws none"),
        (
            {"writer": [STUDENT], "loss": ["minillm_long"], "rollout": {"ahead": 2}},
            "loss[0]",
            "leave ahead and replay out",
        ),
        (
            {"writer": [TEACHER, STUDENT], "loss": ["minillm_long", {"reverse_kl": {"by": "importance_weight"}}]},
            "loss[1].reverse_kl.by",
            "only: student",
        ),
        (
            {"writer": [STUDENT], "rollout": {"joint": {"teacher_share": 0.2, "teacher_temperature": 0}}},
            "rollout.joint",
            "above 0",
        ),
        (
            {"teacher": {"model": "TINY", "context": {"user": "{prompt} {anwser}"}}},
            "teacher.context",
            "did you mean {answer}",
        ),
        ({"writer": [TEACHER, STUDENT], "loss": ["dpo"]}, "loss[0]", "frozen model's opinion"),
        ({"writer": [TEACHER | {"share": 0.5}, STUDENT]}, "", "add up to 1.5"),
        ({"writer": [TEACHER | {"share": {"from": 0, "to": 1}}]}, "", "only the student's share"),
        ({"writer": [STUDENT, STUDENT | {"temperature": 0.5}]}, "", "only one writer can be the student"),
        ({"rollout": {"ahead": 2}}, "", "no writer is the student"),
        (
            {"writer": [STUDENT], "loss": ["minillm_long"], "rollout": {"dtype": "bfloat16"}},
            "loss[0]",
            "its copy is another",
        ),
        (
            {"writer": [STUDENT], "rollout": {"dtype": "bfloat16", "through": {"vllm": "http://x"}}},
            "rollout.dtype",
            "leave dtype or through",
        ),
        (
            {"writer": [STUDENT], "rollout": {"validation": {"prompts": 4}}},
            "rollout.validation",
            "only an adaptive share",
        ),
        ({"writer": [STUDENT], "rollout": {"joint": {}}}, "rollout.joint", "exactly one of"),
        (
            {"writer": [STUDENT | {"top_p": 0.9}], "rollout": {"joint": {"teacher_share": 0.2}}},
            "rollout.joint",
            "top_p: 1.0",
        ),
        ({"writer": [TEACHER, STUDENT], "rollout": {"ahead": 2}}, "rollout", "leave ahead and replay out"),
        ({"writer": [STUDENT | {"share": {"from": 0, "to": 1, "shape": "plateau"}}]}, "", "add up to"),
        ({"writer": [TEACHER, STUDENT | {"share": {"from": 0, "to": 2}}]}, "writer[1].share.to", "outside"),
        (
            {"writer": [TEACHER, STUDENT | {"share": {"from": 0, "to": 1, "shape": "adaptive"}}]},
            "writer[1].share.shape",
            "not possible",
        ),
        (
            {"writer": [STUDENT | {"top_p": 0.9}], "loss": ["on_policy_distillation"]},
            "loss[0]",
            "set the student's top_p to 1",
        ),
        (
            {"writer": [STUDENT | {"temperature": 0.5}], "loss": ["kl_penalty_k2", "on_policy_distillation"]},
            "loss[0]",
            "set temperature: 1",
        ),
        (
            {"writer": [STUDENT], "rollout": {"replay": {"size": 6}}, "loss": ["kl_penalty_k2", "jsd"]},
            "loss[0]",
            "leave ahead, replay and passes out",
        ),
        ({"teacher": {"model": "TINY", "weights": "live"}}, "teacher.weights", "student.start.pretrained"),
        ({"teacher": {"model": "TINY", "context": {"user": "{prompt} {answer}"}}}, "teacher.context.user", "have none"),
        (
            {"teacher": {"model": "TINY", "context": {"user": "no place for it"}}},
            "teacher.context",
            "must contain {prompt}",
        ),
        (
            {"teacher": {"model": "TINY", "context": {"system": "x"}}, "loss": [{"hidden_match": {}}]},
            "loss[0]",
            "shown other prompts",
        ),
    ],
)
def test_what_can_not_work_is_refused_by_the_check(recipe_data, change, path, words):
    data = recipe_data | {key: value for key, value in change.items() if key != "train"}
    if "train" in change:
        data["train"] = {k: v for k, v in data["train"].items() if k != "steps"} | change["train"]
    if isinstance(data["teacher"], dict):
        data["teacher"] = data["teacher"] | {"model": recipe_data["teacher"]}
    with pytest.raises(RecipeError, match=re.escape(words)) as refused:
        limbeck.check(parse(data))
    assert refused.value.path.startswith(path)


def test_a_prompt_that_leaves_no_room_is_refused_before_the_first_step(recipe_data, tmp_path, prompt_file):
    prompt_file.write_text(
        json.dumps({"id": "long", "prompt": "the cat sat on the mat " * 40}) + "\n" + prompt_file.read_text()
    )
    data = recipe_data | {"writer": [STUDENT], "loss": ["reverse_kl"]}
    data["student"], data["evaluate"] = (
        {"start": {"prune": {"layers": 3, "keep": "uniform"}}},
        data["evaluate"] | {"controls": ["untouched"]},
    )
    with pytest.raises(
        UserError, match=r"line 1: the prompt, with an answer, may take .* more than the context of 256"
    ):
        limbeck.run(parse(data), tmp_path / "out", stages=("elicit", "train"))


def test_another_chat_template_or_end_token_is_refused(tiny_folder, recipe_data, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|system|>"))
    recipe_data["student"] = {"start": {"pretrained": str(other)}}
    with pytest.raises(UserError, match="frame a conversation differently"):
        limbeck.check(parse(recipe_data))


# A whole run


def test_a_run_with_the_students_text_alone_ends_with_its_control(recipe_data, tmp_path):
    recipe_data |= {"writer": [STUDENT], "loss": ["reverse_kl"]}
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out)
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert list(summary["systems"]) == ["teacher", "untouched", "sft_control", "student"]
    facts = records(out)[-1]["rollout"]
    keys = {
        "seconds",
        "written",
        "answers",
        "tokens",
        "length",
        "finished",
        "repetition",
        "age",
        "teacher_log_prob",
        "overlap",
        "entropy",
    }
    assert keys <= set(facts) and facts["age"] == 0 and 0 < facts["overlap"] <= 1
    assert facts["teacher_log_prob"] < 0 and facts["tokens"] == records(out)[-1]["response_tokens"]
