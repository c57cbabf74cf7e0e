"""Scores from the probability of given text, against plain full logits in fp64; planted answers; rolling windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from limbeck.evaluate import choice, likelihood
from limbeck.evaluate.choice import macro_f1, score_choices
from limbeck.evaluate.items import (
    ChoiceItem,
    ChoiceSettings,
    LabelSettings,
    Passage,
    PassageSettings,
    RankingItem,
    RankingSettings,
)
from limbeck.evaluate.likelihood import Continuation, log_probs, prompt_ids, text_ids
from limbeck.evaluate.ranking import score_rankings
from limbeck.evaluate.rolling import perplexity, score_passages, windows
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.states import shares_prefixes
from limbeck.types import UserError
from tests.families import FAMILIES, make_model


def quiet(done, total):
    pass


def slow(net, prompt, ids):
    """log q(ids | prompt) from the whole model's own logits, one row, fp64."""
    with torch.no_grad():
        log_TV = net(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
    return sum(float(log_TV[len(prompt) - 1 + at, token]) for at, token in enumerate(ids))


ITEMS = [
    ChoiceItem("a", {"question": "why is the sky blue"}, ("the cat sat", "a dog", "red"), 1),
    ChoiceItem("b", {"question": "count"}, ("one two three four five", "mat"), 0),
    ChoiceItem("c", {"question": "ein Hund läuft"}, ("ä", "zwei Bäume", "x", "{question}"), 2),
]


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_choice_scores_equal_the_definitions(tiny, form):
    settings = ChoiceSettings(format=form)
    for item, scored in zip(ITEMS, score_choices(ITEMS, settings, tiny, quiet), strict=True):
        text = f"Question: {item.fields['question']}\nAnswer:"
        template = f"<|user|>{text}<|end|><|assistant|>" if form == "chat" else text
        prompt = tiny.tokenizer(template, add_special_tokens=False)["input_ids"]
        space = " " if form == "plain" else ""
        encoded = [tiny.tokenizer(space + text, add_special_tokens=False)["input_ids"] for text in item.choices]
        want = np.array([slow(tiny.net, prompt, ids) for ids in encoded])
        share = np.exp(want) / np.exp(want).sum()
        assert scored.item == item.id
        assert scored.facts["log_probs"] == pytest.approx(want.tolist(), rel=1e-4)
        assert scored.facts["probabilities"] == pytest.approx(share.tolist(), rel=1e-3, abs=1e-9)
        assert scored.facts["chosen"] == want.argmax() and scored.text == item.choices[int(want.argmax())]
        by_bytes = want / [len(text.encode()) for text in item.choices]
        truth = np.eye(len(item.choices))[item.answer]
        assert scored.scores == {
            "acc": float(want.argmax() == item.answer),
            "acc_norm": float(by_bytes.argmax() == item.answer),
            "probability": pytest.approx(share[item.answer], rel=1e-3, abs=1e-9),
            "brier": pytest.approx(((share - truth) ** 2).sum(), rel=1e-3, abs=1e-9),
        }


def test_bytes_and_not_characters_normalise(tiny, monkeypatch):
    """Six characters in twelve bytes: 12 nats over 12 bytes beat 9 nats over 6."""
    item = ChoiceItem("a", {"question": "q"}, ("йййййй", "abcdef"), 0)
    monkeypatch.setattr(choice, "log_probs", lambda *_: [-12.0, -9.0])
    (scored,) = score_choices([item], ChoiceSettings(), tiny, quiet)
    assert scored.scores["acc"] == 0 and scored.scores["acc_norm"] == 1


def test_log_probs_do_not_depend_on_batch_padding_order_or_neighbours(tiny, monkeypatch):
    base = tuple(range(10, 30))
    wanted = [
        Continuation("short", base[:3], (7,)),
        Continuation("other", base[:3], (8,)),  # the same inputs as the first, another target
        Continuation("longer", base[:3], (7, 9, 11)),
        Continuation("inside", base[:5], base[5:9]),
        Continuation("whole", base[:2], base[2:]),
        Continuation("apart", (50, 51), (52, 53, 54)),
    ]
    alone = [log_probs(tiny, [one])[0] for one in wanted]
    want = [slow(tiny.net, one.prompt_ids, one.ids) for one in wanted]
    told = []
    assert log_probs(tiny, wanted, lambda *counts: told.append(counts)) == pytest.approx(want, rel=1e-4)
    assert told[-1] == (6, 6)
    assert alone == pytest.approx(want, rel=1e-4)
    assert log_probs(tiny, wanted[::-1])[::-1] == pytest.approx(want, rel=1e-4)
    monkeypatch.setattr(likelihood, "TOKENS_TOGETHER", 1)
    assert log_probs(tiny, wanted) == pytest.approx(want, rel=1e-4)


def test_rows_that_begin_a_longer_row_are_not_run(tiny, monkeypatch):
    rows = []
    states = likelihood.shared_states
    monkeypatch.setattr(
        likelihood, "shared_states", lambda net, tokens_BT: rows.append(len(tokens_BT)) or states(net, tokens_BT)
    )
    wanted = [Continuation(str(n), (5, 6, 7), (n,)) for n in range(10, 16)] + [Continuation("long", (5, 6), (7, 8, 9))]
    log_probs(tiny, wanted)
    assert sum(rows) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_several_continuations_is_read_once_in_every_family(family, tiny, tmp_path):
    make_model(family, tmp_path / "model", 3, tiny.tokenizer)
    model = load_model(str(tmp_path / "model"))
    prompt = tuple(range(20, 50))  # longer than the windows of those that have some
    wanted = [Continuation(str(n), prompt, tuple(range(n, n + n % 4 + 1))) for n in range(60, 67)]
    wanted.append(Continuation("other", prompt[:20], (8, 9)))
    read = []
    model.net.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    values = log_probs(model, wanted)
    tokens = sum(read)
    assert values == pytest.approx([slow(model.net, one.prompt_ids, one.ids) for one in wanted], abs=1e-4)
    assert tokens < 100 if shares_prefixes(model.net) else tokens > 150


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(tiny):
    wanted = [Continuation("a", (5, 6), (7, 8))]
    expected = log_probs(tiny, wanted)
    for layer in tiny.net.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tiny.net.train()
    assert log_probs(tiny, wanted) == expected
    assert tiny.net.training


def test_a_planted_answer_is_found(tiny):
    """The head is biased so that one word's tokens become certain."""
    ids = text_ids(tiny, " mat")
    bias_V = torch.zeros(tiny.net.get_output_embeddings().weight.shape[0])
    bias_V[ids] = 60.0
    tiny.net.get_output_embeddings().bias = torch.nn.Parameter(bias_V)
    items = [ChoiceItem(str(n), {"question": f"q{n}"}, ("cat", "dog", "mat", "sky"), 2) for n in range(3)]
    for scored in score_choices(items, ChoiceSettings(), tiny, quiet):
        assert scored.scores["acc"] == 1 and scored.scores["probability"] > 0.99 and scored.scores["brier"] < 1e-3
        assert scored.text == "mat"


def test_the_begin_token_stands_first_where_the_tokenizer_puts_it(tiny):
    from tokenizers.processors import TemplateProcessing

    plain = prompt_ids(tiny, ChoiceSettings(), ITEMS[0].fields)
    tiny.tokenizer.bos_token = "<|system|>"
    assert prompt_ids(tiny, ChoiceSettings(), ITEMS[0].fields) == plain
    bos, eos = tiny.tokenizer.bos_token_id, tiny.tokenizer.eos_token_id
    special = [("<|system|>", bos), ("<|end|>", eos)]
    tiny.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=special
    )
    assert prompt_ids(tiny, ChoiceSettings(), ITEMS[0].fields) == (bos, *plain)  # and no end-of-sequence token after it
    assert prompt_ids(tiny, LabelSettings(template="{text}", labels=("a", "b")), {"text": ""}) == (bos,)


def test_text_of_items_is_no_template(tiny):
    ids = prompt_ids(
        tiny, ChoiceSettings(template="{context} {question}"), {"context": "{question}", "question": "the cat"}
    )
    assert tiny.decode(ids) == "{question} the cat"


def test_what_does_not_fit_or_has_no_token_or_is_not_finite_is_refused_by_name(tiny):
    with pytest.raises(UserError, match=r"item-9 takes 300 tokens, and the model's context is 256: shorten it"):
        log_probs(tiny, [Continuation("item-9", tuple([5] * 298), (6, 7, 8))])
    with pytest.raises(UserError, match="item-9: a text to be scored has no token"):
        log_probs(tiny, [Continuation("item-9", (5,), ())])
    with torch.no_grad():
        tiny.net.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="item-9: the model gives it a log-probability that is not finite"):
        log_probs(tiny, [Continuation("item-9", (5,), (6,))])


def test_macro_f1_by_hand_and_its_interval_against_plain_resampling():
    truth, chosen = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    # label 0: 1 hit, 1 false, 1 missed; label 1: 2 hits, 1 false; label 2: none of one; label 3 occurs nowhere
    assert macro_f1(truth, chosen, 4).value == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    noise = np.random.default_rng(1)
    truth = noise.integers(0, 3, 60)
    chosen = np.where(noise.random(60) < 0.7, truth, noise.integers(0, 3, 60))

    def plain(truth, chosen):
        scores = []
        for label in range(3):
            hits, named = ((truth == label) & (chosen == label)).sum(), (truth == label).sum() + (chosen == label).sum()
            if named:
                scores.append(2 * hits / named)
        return np.mean(scores)

    found = macro_f1(truth, chosen, 3)
    picks = noise.integers(0, 60, (2000, 60))
    low, high = np.quantile([plain(truth[pick], chosen[pick]) for pick in picks], [0.025, 0.975])
    assert found.value == pytest.approx(plain(truth, chosen)) and found.n == 60
    assert found.low == pytest.approx(low, abs=0.02) and found.high == pytest.approx(high, abs=0.02)
    assert macro_f1(truth, chosen, 3) == found


def test_documents_are_ordered_by_the_likelihood_of_the_query(tiny):
    item = RankingItem(
        "r",
        "why is the sky blue",
        ("a dog ran", "the cat sat on the mat", "sky", "count one two"),
        (0.0, 1.0, 2.0, 0.0),
    )
    settings = RankingSettings(k=(4, 1))
    (scored,) = score_rankings([item], settings, tiny, quiet)
    query = text_ids(tiny, " why is the sky blue")
    want = [slow(tiny.net, text_ids(tiny, f"{text}\nQuestion:"), query) / len(query) for text in item.documents]
    assert scored.facts["log_probs"] == pytest.approx(want, rel=1e-4)
    order = sorted(range(4), key=lambda place: -want[place])
    assert scored.facts["order"] == order and scored.text == item.documents[order[0]]
    gains = [2 ** item.relevances[place] - 1 for place in order]
    best = 3 / math.log2(2) + 1 / math.log2(3)
    assert scored.scores["ndcg@4"] == pytest.approx(
        sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains)) / best
    )
    assert scored.scores["ndcg@1"] == pytest.approx(gains[0] / 3)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(1, 8, 4), (7, 8, 4), (8, 8, 4), (50, 8, 4), (50, 8, 1), (50, 8, 7), (51, 2, 1)]
)
def test_windows_score_every_token_exactly_once_with_enough_before_it(tokens, window, stride):
    scored = []
    for number, (begin, first, end) in enumerate(windows(tokens, window, stride)):
        assert end - begin <= window and begin < first < end
        assert number == 0 or first - begin >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, tokens + 1))


TEXTS = ["the cat sat on the mat, a dog ran to the red house. " * 3, "why is the sky blue", "zwei Bäume"]


def test_one_window_that_fits_is_the_plain_log_likelihood(tiny):
    items = [Passage(f"p{n}", text) for n, text in enumerate(TEXTS)]
    scored = score_passages(items, PassageSettings(window=1024), tiny, quiet)
    for item, found in zip(items, scored, strict=True):
        ids = text_ids(tiny, item.text)
        nats = -slow(tiny.net, [tiny.tokenizer.eos_token_id], ids)
        size = len(item.text.encode())
        assert found.facts == {
            "nats": pytest.approx(nats, rel=1e-4), "tokens": len(ids), "bytes": size, "words": len(item.text.split()), "window": 256, "stride": 128,
        }  # fmt: skip
        assert found.scores["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-4)
        assert found.weights == {"bits_per_byte": size}
    total, size = sum(item.facts["nats"] for item in scored), sum(len(text.encode()) for text in TEXTS)
    assert perplexity(scored, "bytes").value == pytest.approx(math.exp(total / size))


def test_windows_condition_on_what_stands_in_them_only(tiny):
    """Against a loop over tokens that cuts each one's context by hand."""
    ids = text_ids(tiny, TEXTS[0])
    assert len(ids) > 30
    (found,) = score_passages([Passage("p", TEXTS[0])], PassageSettings(window=16, stride=6), tiny, quiet)
    sequence = [tiny.tokenizer.eos_token_id, *ids]
    want = 0.0
    for at in range(1, len(sequence)):
        begin = 0 if at < 16 else 6 * ((at - 16) // 6 + 1)
        want -= slow(tiny.net, sequence[begin:at], sequence[at : at + 1])
    assert found.facts["nats"] == pytest.approx(want, rel=1e-4)
    assert found.facts["tokens"] == len(ids) and found.facts["window"] == 16 and found.facts["stride"] == 6


@pytest.mark.parametrize("window", [1024, 24])
def test_a_given_answer_is_scored_after_its_conversation_alone(tiny, window):
    told = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "Why is the sky blue?"})
    item = Passage("p", "Rayleigh scattering of light.", told)
    (found,) = score_passages([item], PassageSettings(window=window, stride=8), tiny, quiet)
    ids = text_ids(tiny, item.text)
    before = tiny.prompt_ids(told)
    sequence = [*before, *ids]
    expected = 0.0
    for begin, first, end in windows(len(sequence) - 1, window, 8):
        for place in range(max(first, len(before)), end):
            expected -= slow(tiny.net, sequence[begin:place], [sequence[place]])
    assert found.facts["nats"] == pytest.approx(expected, rel=1e-4)
    assert found.facts["tokens"] == len(ids) and found.facts["bytes"] == len(item.text)


def test_a_perplexity_beyond_any_number_is_left_out(tiny):
    (found,) = score_passages([Passage("p", "x" * 250)], PassageSettings(), tiny, quiet)
    assert found.facts["nats"] > 700 and perplexity([found], "words") is None


def test_scores_in_half_precision_stay_near(tiny):
    half = Model(tiny.net.bfloat16(), tiny.tokenizer, "half")
    wanted = [Continuation("a", (5, 6), (7, 8))]
    value = log_probs(half, wanted)[0]
    tiny.net.float()
    assert value == pytest.approx(log_probs(tiny, wanted)[0], rel=0.05)
