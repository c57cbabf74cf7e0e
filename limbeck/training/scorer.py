"""Scores answers by their log-probability under a model in process."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.data.batches import Row
from limbeck.elicit.flow import ScoreRequest
from limbeck.models.model import Model
from limbeck.training.prepare import response_log_probs
from limbeck.types import LogProb, UserError


class ModelScorer:
    """Answers `ScoreRequest`s. Without messages, the answer follows the BOS token, or EOS if there is none. Tokens
    beyond the model's context count neither for the score nor for the number of tokens."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.identity = model.identity

    def log_probs(self, questions: Sequence[ScoreRequest]) -> list[LogProb]:
        """The log-probabilities, in the order of the questions.

        Raises:
            UserError: a prompt that fills the context.
        """
        rows = [self._row(question) for question in questions]
        unique = {row.sample_id: row for row in rows if row.response_ids}
        log_probs = response_log_probs(self.model.net, list(unique.values()))
        return [LogProb(log_probs[row.sample_id] if row.response_ids else 0.0, len(row.response_ids)) for row in rows]

    def _row(self, question: ScoreRequest) -> Row:
        tokenizer = self.model.tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        prompt = self.model.prompt_ids(question.messages) if question.messages else [begin]
        room = self.model.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer to be scored in a context of"
                f" {self.model.max_length}"
            )
        return Row(question.key, tuple(prompt), tuple(self.model.text_ids(question.answer)[:room]))
