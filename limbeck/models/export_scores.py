"""An exported reward model: a folder that plain `transformers` loads, whose scores were compared before it is done.

`transformers` takes the last token that is not padding. Where padding is the token that ends a turn, as in many
tokenizers, it would take the one before it: so the folder gets padding that no conversation ends with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.export import export
from limbeck.models.folder import quiet, read_tokenizer, save_model
from limbeck.models.model import Model, gives_scores
from limbeck.models.scores import read_scores, scores_of
from limbeck.models.weights import text_config
from limbeck.types import Message, UserError

MOST_OFF = 1e-4  # between a score in memory and of the folder, over 1 or the score
LENGTHS = (3, 9, 24)
PAD = "<|pad|>"
ASKED: tuple[Message, ...] = ({"role": "user", "content": "Is 7 a prime?"},)
ANSWER = "Yes."


@dataclass(frozen=True)
class ScoresExport:
    """What was found when a reward model was loaded again.

    Args:
        left: whether rows that are padded on the left have the same scores.
        template: whether `apply_chat_template` gives the tokens that it was trained on.
    """

    left: bool
    template: bool

    @property
    def card(self) -> str:
        """How to load it and ask it, for the model card."""
        padding = "" if self.left else " Pad on the right: this family counts positions from the left."
        form = (
            "A conversation is read as `tokenizer.apply_chat_template(messages, return_dict=True,"
            ' return_tensors="pt")` gives it, the answer as its last message.'
            if self.template
            else "A conversation is read as the template's prompt (`add_generation_prompt=True`), the answer's tokens,"
            " and the token that ends a turn; the template alone gives other tokens."
        )
        return (
            "Load it with `transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)`: its one logit is"
            f" the score, of which only differences between answers to one prompt mean something. {form}{padding}\nHow"
            " often it prefers the better of two answers, with confidence intervals, is in the run's"
            " `evaluation/summary.json`."
        )


def write_student(model: Model, folder: Path) -> str:
    """Save a trained student into `folder`, which must exist, and load it again. Returns how to use it, if that is not
    as a model that writes.

    Raises:
        UserError: what was loaded is not what was saved.
    """
    if gives_scores(model.net):
        return export_scores(model, folder).card
    export(model, folder)
    return ""


def export_scores(model: Model, folder: Path) -> ScoresExport:
    """Save a trained reward model into `folder`, which must exist, and load it again.

    Raises:
        UserError: what was loaded gives other scores, or reads text in another way.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    net = model.net
    with quiet():
        pad = _padding(model, tokenizer)
        embedding: Any = net.get_input_embeddings()
        if pad >= len(embedding.weight):
            net.resize_token_embeddings(pad + 1, mean_resizing=False)
    for part in (net.config, text_config(net.config)):
        part.pad_token_id = pad
    save_model(net, tokenizer, folder)
    return _check(model, folder, pad)


def _padding(model: Model, tokenizer: Tokenizer) -> int:
    """Give the tokenizer padding that no conversation ends with; returns its id."""
    whole = set(model.whole_ids(ASKED, ANSWER)) | model.eos_ids
    special = [number for number, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    given = [number for number in (tokenizer.pad_token_id, tokenizer.unk_token_id) if number is not None]
    free = next((number for number in (*given, *special) if number not in whole), None)
    if free is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free)
    tokenizer.padding_side = "right"
    return int(tokenizer.pad_token_id)


def _check(model: Model, folder: Path, pad: int) -> ScoresExport:
    name = f"the student saved in {folder.name}"
    with quiet():
        again = read_scores(folder, name, model.net.dtype).to(model.net.device)  # type: ignore[arg-type]
        tokenizer = read_tokenizer(folder, name)
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_length, LENGTHS[-1])
    tokens = [torch.randint(model.vocab_size, (min(one, length),), generator=generator).tolist() for one in LENGTHS]
    texts = [model.whole_ids(ASKED, ANSWER)[-length:], *[[t if t != pad else t - 1 for t in row] for row in tokens]]
    ours = torch.tensor(scores_of(model.net, texts), dtype=torch.float64)
    right, left = (_padded_scores(again, texts, pad, on_left) for on_left in (False, True))
    if not _close(ours, right):
        raise UserError(
            f"{name}, loaded again, gives other scores than in memory ({[round(v, 4) for v in right.tolist()]}, and"
            f" {[round(v, 4) for v in ours.tolist()]} in memory): nothing is exported"
        )
    written: Any = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": ANSWER}], tokenize=False)
    read = tokenizer(written, add_special_tokens=False)["input_ids"]
    return ScoresExport(left=_close(ours, left), template=list(read) == model.whole_ids(ASKED, ANSWER))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours - theirs).abs() <= MOST_OFF * ours.abs().clamp(min=1)).all())


@torch.inference_mode()
def _padded_scores(net: PreTrainedModel, texts: list[list[int]], pad: int, on_left: bool) -> Tensor:
    """The scores as a user of transformers gets them."""
    width = max(map(len, texts))
    rows = [[pad] * (width - len(text)) + text if on_left else text + [pad] * (width - len(text)) for text in texts]
    tokens_BT = torch.tensor(rows, device=net.device)
    mask_BT = torch.ones_like(tokens_BT)
    for row, text in enumerate(texts):
        blank = slice(0, width - len(text)) if on_left else slice(len(text), width)
        mask_BT[row, blank] = 0
    logits: Tensor = net(input_ids=tokens_BT, attention_mask=mask_BT).logits
    return logits[:, 0].double().cpu()
