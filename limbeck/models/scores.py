"""Models that give one number for a whole conversation, at its last token: made of a decoder, read from a folder.

Reward models of transformers (`AutoModelForSequenceClassification` with one label) are such models.

Shapes: B rows, T positions, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from limbeck.data.batches import MICRO_TOKENS
from limbeck.models.fingerprint import check_sealed
from limbeck.models.folder import quiet, read_config, read_tokenizer
from limbeck.models.load import frame_tokenizer, load_config, model_folder, model_identity
from limbeck.models.model import Model, gives_scores, head_of
from limbeck.models.placement import Placement
from limbeck.models.states import decoded
from limbeck.models.weights import check_files, check_loaded, first_line, scores_text
from limbeck.storage.files import user_path
from limbeck.types import Message, UserError

Conversation = tuple[tuple[Message, ...], str, bool]  # what was asked, the answer, whether it was cut off
CURE = "give a folder that AutoModelForSequenceClassification of transformers loads with one label, or such a run"


def with_score(net: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same decoder with a row that gives scores in the place of its head, for a text's last token.

    The row is drawn from N(0, 1 / (D + 1)) (Stiennon et al., arXiv:2009.01325), in float32.

    Raises:
        UserError: transformers knows no such model of this family, and so could not load it.
    """
    config = net.config
    kind = config.model_type
    refusal = UserError(f"student.head: transformers has no {kind} with a scalar head; choose another start")
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise refusal
    config.num_labels = 1
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    decoder: Any = net.base_model
    if type(made.base_model) is not type(decoder) or not gives_scores(made):
        raise refusal
    setattr(made, made.base_model_prefix, decoder)
    made.config = config
    width = head_of(made).weight_VD.shape[1]
    row_1D = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
    made.score = nn.Linear(width, 1, bias=False)
    made.score.weight = nn.Parameter(row_1D)
    made.train(net.training)
    return made


@torch.no_grad()
def scores_of(net: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """The score of each text, in evaluation mode; texts of similar length are read together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(texts[index]) <= MICRO_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    training = net.training
    net.eval()
    scores = [0.0] * len(texts)
    for batch in batches:
        for index, score in zip(batch, _scores_B(net, [texts[index] for index in batch]).tolist(), strict=True):
            scores[index] = float(score)
    net.train(training)
    return scores


def _scores_B(net: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:  # noqa: N802 (shape)
    """Right padding needs no mask: attention is causal."""
    last_B = torch.tensor([len(text) - 1 for text in texts], device=net.device)
    tokens_BT = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = torch.tensor(list(text))
    hidden_BTD = decoded(net, tokens_BT)
    ended_BD = hidden_BTD[torch.arange(len(texts), device=net.device), last_B]
    return head_of(net).logits(ended_BD)[:, 0]


@dataclass(frozen=True)
class Scorer:
    """A reward model that was read from a folder."""

    model: Model

    def score(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """The score of each conversation; None for one that its context has no room for."""
        texts = [self.model.whole_ids(*conversation) for conversation in conversations]
        fits = [len(text) <= self.model.max_length for text in texts]
        scores = iter(scores_of(self.model.net, [text for text, fit in zip(texts, fits, strict=True) if fit]))
        return [next(scores) if fit else None for fit in fits]


def scorer_source(name: str) -> str:
    """Where a reward model lies: the student's folder of a run that trained one, or the name as it is."""
    folder = user_path(name)
    return str(folder / "student") if (folder / "recipe.yaml").is_file() else name


def is_scorer(name: str) -> bool:
    """Whether a name is that of a model that gives scores or classes, or of a run that trained one.

    Raises:
        UserError: there is no such model.
    """
    return scores_text(load_config(scorer_source(name)))


def check_scorer(name: str) -> Any:
    """The configuration of a reward model; no weights are read.

    Raises:
        UserError: there is none, or something else; the message says what to do.
    """
    source = scorer_source(name)
    if source != name and not Path(source).is_dir():
        raise UserError(f"the run in {name} has no student yet: run it to its end first")
    config = load_config(source)
    if not scores_text(config) or config.num_labels != 1:
        raise UserError(f"{name} gives no score of a text: {CURE}")
    return config


def scorer_identity(name: str) -> str:
    """The identity of a reward model: what its scores depend on, and no path.

    Raises:
        UserError: there is none.
    """
    check_scorer(name)
    return model_identity(scorer_source(name))


def load_scorer(name: str, placement: Placement | None = None) -> Scorer:
    """Load a reward model in float32: a run that trained one, or a model in Hugging Face form.

    Raises:
        UserError: nothing there, damaged, or no model with one label.
    """
    check_scorer(name)
    source = scorer_source(name)
    folder = model_folder(source)
    check_sealed(folder, name)
    with quiet():
        net = read_scores(folder, name, torch.float32)
        tokenizer = read_tokenizer(folder, name)
    frame_tokenizer(tokenizer, name, None)
    net = (placement or Placement()).put(net)
    return Scorer(Model(net, tokenizer, model_identity(source)))


def read_scores(folder: Path, source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a folder that gives scores, in evaluation mode. `source` is the user's name for it.

    Raises:
        UserError: it gives none, is damaged, or lacks some of its weights.
    """
    config = read_config(folder, source)
    check_files(folder, source)
    try:
        net: PreTrainedModel
        net, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds on files that it can't use; the user needs one
        raise UserError(f"can't load the model {source!r}: {first_line(error)}") from error
    check_loaded(info, source)
    if not gives_scores(net):
        raise UserError(f"{source} (a {config.model_type}) gives no score by one linear row: {CURE}")
    net.eval()
    return net
