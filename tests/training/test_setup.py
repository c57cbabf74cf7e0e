"""What stands between a recipe's terms and a training: refusals before anything is spent, references, equal controls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck import RecipeError, UserError
from limbeck.config.recipe import parse
from limbeck.config.sections import Train
from limbeck.data.batches import CHOSEN, REJECTED, Row, make_batch
from limbeck.models.model import Model
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.head import Head, PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.signals.dense import DenseSignal
from limbeck.storage.store import Store
from limbeck.training import loop as train
from limbeck.training.prepare import response_log_probs
from limbeck.training.setup import TrainingPlan, make_job
from tests.conftest import make_net

BOTH = [
    {"by": "teacher", "max_tokens": 8, "temperature": 1.0},
    {"by": "untouched", "max_tokens": 9, "temperature": 1.0},
]


def rows(count: int = 12) -> list[Row]:
    return [
        Row(
            f"s{i}",
            (5, 6, 7 + i),
            (20 + i, 21, 0),
            frozenset({"teacher", CHOSEN} if i % 2 == 0 else {"untouched", REJECTED}),
            f"p{i // 2}",
        )
        for i in range(count)
    ]


@pytest.fixture
def job(tiny, tmp_path):
    def make(loss, given=None, net=None, folder="run", **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        student = Model(net or drop_layers(tiny.net, [0, 1, 3]), tiny.tokenizer, "student")
        terms = [make_term(name, params, 1.0, f"loss.{name}") for name, params in loss]
        values = Train(**{"steps": 4, "tokens_per_step": 20, "lr": 1e-3, "save_seconds": 1e9, **settings})
        teacher = InProcessTeacher(tiny)
        store = tmp_path / "store.sqlite"
        plan = TrainingPlan(terms, given or rows(), values, tmp_path / folder, key="k", store=store)
        return make_job(plan, student, lambda: teacher)

    return make


def test_of_two_writers_equal_answers_the_better_placed_one_stays(job):
    """Against itself an answer teaches nothing, and would count in what the loss is divided by."""
    given = rows(8)
    given[1] = replace(given[1], response_ids=given[0].response_ids)
    kept = job([("simpo", {})], given).rows
    assert [row.sample_id for row in kept] == [f"s{n}" for n in range(2, 8)]


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"loss": ["dpo"]}, "loss[0].dpo", "every prompt has one"),
        ({"loss": ["reinforce"]}, "loss[0].reinforce", "while it trains"),
        ({"loss": [{"forward_kl": {"only": "techer"}}]}, "loss[0].forward_kl.only", "teacher"),
        ({"loss": [{"forward_kl": {"only": "rejected"}}]}, "loss[0].forward_kl.only", "rejected"),
        ({"loss": ["cross_entropy"], "writer": BOTH}, "loss[0].cross_entropy", "only: chosen"),
        ({"loss": ["forward_kl"], "writer": [{"by": "untouched"}]}, "writer", "keep: uniform"),
        ({"loss": ["dpo"], "writer": BOTH[::-1]}, "evaluate.controls", "controls"),
        ({"loss": [{"relations": {"relation_heads": 7}}]}, "loss[0].relations.relation_heads", "7"),
        ({"loss": [{"hidden_match": {"layers": [[4, 4]]}}]}, "loss[0].hidden_match.layers[0]", "student layer 4"),
        ({"loss": [{"forward_kl": {"weight": -1}}]}, "loss[0].weight", "greater"),
        ({"loss": [{"taid": {"t": {"from": 0, "to": 2}}}]}, "loss[0].taid.t.to", "outside"),
        ({"writer": [BOTH[0], BOTH[0]]}, "", "same settings"),
        (
            {
                "elicit": [{"given": {}}, {"difference": {}}],
                "student": {"start": {"prune": {"layers": 3, "keep": "importance"}}},
                "loss": ["cross_entropy"],
            },
            "elicit[1].difference.reference",
            "keep: uniform",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_spent(recipe_data, change, path, words):
    with pytest.raises(RecipeError) as error:
        check(parse(recipe_data | change))
    assert words in str(error.value) and error.value.path == path


def test_the_control_takes_as_many_steps_as_the_student(recipe_data, tmp_path):
    settings = {"epochs": 1, "tokens_per_step": 40, "lr": 1e-3}
    recipe = parse(
        recipe_data | {"writer": BOTH, "loss": ["dpo", {"cross_entropy": {"only": "chosen"}}], "train": settings}
    )
    folder = run(recipe, tmp_path / "run", stages=("train",))
    counts = [len((folder / home / "metrics.jsonl").read_text().splitlines()) for home in (".", "controls/sft_control")]
    assert counts[0] == counts[1] > 3
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["terms"]["dpo"] == pytest.approx(0.6931, abs=1e-3), (
        "before the first step the student is its own reference"
    )


def test_a_feature_only_training_of_an_untied_model_resumes(job):
    def net():
        made = make_net(layers=3)
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.clone())
        made.config.tie_word_embeddings = False
        return made

    whole = job([("hidden_match", {"layers": "last"})], net=net(), folder="whole")
    train.train(whole)
    first, done = job([("hidden_match", {"layers": "last"})], net=net(), folder="parts"), []
    train.train(first, progress=lambda step, *_: done.append(step), stop=lambda: len(done) >= 2)
    second = job([("hidden_match", {"layers": "last"})], net=net(), folder="parts")
    train.train(second)
    texts = [(each.folder / "metrics.jsonl").read_text().splitlines() for each in (whole, second)]
    assert [json.loads(line)["loss"] for line in texts[0]] == [json.loads(line)["loss"] for line in texts[1]]


def test_the_same_text_twice_has_one_place_in_the_bank(job):
    twice = [*rows(), rows()[0]]
    made = job([("contrast", {"negatives": 3, "dim": 4})], given=twice)
    made.prepare()
    assert len(made.objective.learned["contrast"].bank_ME) == 12
    assert train.train(made)


def test_references_are_scored_once_and_kept(job, tiny, tmp_path):
    made = job([("dpo", {})])
    want = response_log_probs(made.net, made.rows)
    assert {row.sample_id: dict(row.references)["start"] for row in made.rows} == pytest.approx(want)
    with Store(tmp_path / "store.sqlite") as store:
        kept = list(store.evidence("log_prob"))
        assert len(kept) == 12
        store.write_evidence(replace(kept[0], value=-1234.5))
    again = job([("dpo", {})])
    assert dict(again.rows[0].references)["start"] == -1234.5 and again.rows[0].sample_id == kept[0].sample_id


def test_response_log_probs_equal_the_models_own(tiny):
    row = rows()[3]
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    log_probs = tiny.net(ids).logits[0].log_softmax(-1).detach()
    want = sum(float(log_probs[len(row.prompt_ids) + i - 1, token]) for i, token in enumerate(row.response_ids))
    assert response_log_probs(tiny.net, rows())[row.sample_id] == pytest.approx(want, rel=1e-5)


def test_a_prompt_without_its_preferred_answer_is_left_out(job):
    given = [row for row in rows() if row.sample_id not in ("s0", "s3")]
    assert {row.group for row in job([("dpo", {})], given=given).rows} == {"p2", "p3", "p4", "p5"}
    with pytest.raises(UserError, match="two different answers"):
        job([("dpo", {})], given=[row for row in rows() if CHOSEN in row.tags])
    with pytest.raises(UserError, match="no text is left"):
        job([("forward_kl", {"only": "corpus"})])


def test_a_step_without_text_for_a_term_leaves_its_schedules_alone(job):
    made = job(
        [("taid", {"only": "untouched", "t": {"from": 0.1, "to": 1.0, "shape": "adaptive"}}), ("forward_kl", {})]
    )
    made = replace(made, rows=[replace(row, tags=frozenset({"teacher"})) for row in made.rows])
    train.train(made)
    assert made.objective.states == {}


def test_a_token_masked_by_the_heads_bias_gives_finite_losses():
    noise = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*shape, generator=noise) for shape in ((5, 4), (9, 4), (9, 4)))
    bias = torch.zeros(9)
    bias[-1] = -torch.inf
    hidden.requires_grad_()
    signal = DenseSignal(hidden.detach(), Head(teacher, bias))
    names = ("forward_kl", "reverse_kl", "jsd", "tvd", "cross_entropy")
    for name in names:
        term = make_term(name, {}).at_step(0, {})
        total = fused_loss(
            hidden, Head(weight, bias), [term], [1.0], torch.ones(1, 5), PositionEvidence(torch.arange(5), signal)
        )
        (gradient,) = torch.autograd.grad(total.loss, hidden)
        cut = DenseSignal(hidden.detach(), Head(teacher[:-1]))
        want = fused_loss(
            hidden, Head(weight[:-1]), [term], [1.0], torch.ones(1, 5), PositionEvidence(torch.arange(5), cut)
        )
        assert total.sums[name] == pytest.approx(want.sums[name], rel=1e-5)
        torch.testing.assert_close(gradient, torch.autograd.grad(want.loss, hidden)[0], rtol=1e-4, atol=1e-6)


def test_a_batch_of_prompts_alone_gives_zero_with_a_gradient_path(job):
    made = job([("forward_kl", {}), ("hidden_match", {}), ("cross_entropy", {})])
    batch = make_batch(made.rows, (0, 1))
    batch = replace(batch, mask_BT=torch.zeros_like(batch.mask_BT), weight_BT=torch.zeros_like(batch.weight_BT))
    terms = [term.at_step(0, {}) for term in made.terms]
    sums = train.backward(made, batch, terms, {term.label: 0.0 for term in terms})
    assert all(value == 0.0 for value in sums.terms.values())
    assert all(not p.grad.any() for p in made.net.parameters() if p.grad is not None)


def test_rationales_and_labels_are_two_terms_on_two_tasks(recipe_data, tmp_path):
    """Distilling step-by-step, arXiv:2305.02301: a L(label) + (1 - a) L(rationale), the task named in the prompt."""
    lines = [
        {"prompt": f"{task}: why is the sky {colour}", "answer": answer, "task": task}
        for colour in ("red", "blue", "old")
        for task, answer in (("label", "yes"), ("rationale", "the red house sat on the mat"))
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss = [
        {"cross_entropy": {"only": "label", "weight": 0.5}},
        {"cross_entropy": {"only": "rationale", "weight": 0.5}},
    ]
    change = {"prompts": {"from": str(corpus)}, "writer": [{"by": "corpus", "max_tokens": 8}], "loss": loss}
    train_settings = {"steps": 2, "tokens_per_step": 4096, "lr": 1e-3}
    start = {"start": {"prune": {"layers": 3, "keep": "uniform"}}}
    folder = run(
        parse(recipe_data | change | {"train": train_settings, "student": start}), tmp_path / "run", stages=("train",)
    )
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert set(record["terms"]) == {"cross_entropy@label", "cross_entropy@rationale"}
    assert record["loss"] == pytest.approx(sum(0.5 * value for value in record["terms"].values()))
    with pytest.raises(RecipeError, match="label"):
        check(parse(recipe_data | change | {"loss": [{"cross_entropy": {"only": "lable"}}]}))


def test_what_a_head_is_padded_with_changes_nothing(tiny, job):
    """Both models' heads have rows for ids that no token has, which two sizes of one family fill differently."""
    named, losses = len(tiny.tokenizer), []
    for rows_more in (0, 24):
        net = drop_layers(tiny.net, [0, 1, 3])
        if rows_more:
            net.resize_token_embeddings(named + rows_more, mean_resizing=False)
            with torch.no_grad():
                net.get_output_embeddings().weight[named:] = 50.0 * net.get_output_embeddings().weight[:rows_more]
        made = job([("forward_kl", {}), ("jsd", {"teacher_share": 0.5})], net=net, folder=f"run{rows_more}")
        assert made.objective.vocab_size == named
        losses.append(train.loss_on(made.objective, [make_batch(made.rows, tuple(range(4)))], 0.0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
