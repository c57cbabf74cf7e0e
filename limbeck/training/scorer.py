"""Scores answers by their log-probability under a model in process."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.data.batches import Row
from limbeck.elicit.flow import ScoreRequest
from limbeck.models.model import Model
from limbeck.training.prepare import next_token_log_probs, response_log_probs
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
        log_probs = self._labels(list(unique.values()))
        left = [row for name, row in unique.items() if name not in log_probs]
        log_probs |= response_log_probs(self.model.net, left)
        return [LogProb(log_probs[row.sample_id] if row.response_ids else 0.0, len(row.response_ids)) for row in rows]

    def _labels(self, rows: Sequence[Row]) -> dict[str, float]:
        """Those of answers of one token to the same prompt, such as the labels of a choice: the prompt is read once."""
        by_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            if len(row.response_ids) == 1:
                by_prompt.setdefault(row.prompt_ids, []).append(row)
        several = {prompt: alike for prompt, alike in by_prompt.items() if len(alike) > 1}
        tokens = [[row.response_ids[0] for row in alike] for alike in several.values()]
        found = next_token_log_probs(self.model.net, list(several), tokens)
        return {
            row.sample_id: nats
            for alike, log_probs in zip(several.values(), found, strict=True)
            for row, nats in zip(alike, log_probs, strict=True)
        }

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
