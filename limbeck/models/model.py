"""A loaded model: a decoder with its tokenizer, and the readings of it that everything else is built on.

Shapes: B rows, T positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.elicit.thinking import markers_of, opened_by
from limbeck.models import given_answer, template
from limbeck.models.context import PromptContext
from limbeck.models.weights import context_length
from limbeck.objectives.head import Head
from limbeck.types import Message, UserError


@dataclass(frozen=True)
class Model:
    """A decoder, its tokenizer, and `identity`, which stands for the model in request keys (name and content, not a
    path).

    `prompt_context` is what it is shown in addition to the prompt, if anything.
    """

    net: PreTrainedModel
    tokenizer: Tokenizer
    identity: str
    prompt_context: PromptContext | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer, according to the chat template, the tokenizer and the generation settings."""
        settings = getattr(self.net, "generation_config", None)  # a model that gives scores has none
        configured = getattr(settings, "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        ids = {self.end_of_turn, self.tokenizer.eos_token_id, *more}
        return frozenset(token for token in ids if isinstance(token, int))

    @property
    def end_of_turn(self) -> int:
        """The token that an answer is taught to end with: the chat template's."""
        return template.end_of_turn(self.tokenizer)

    @cached_property  # the vocabulary is a large dictionary
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id, as some have holes; a head may have more rows."""
        return vocab_size_of(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, without control tokens, but for those that set thinking, channels and tool calls apart
        from the answer."""
        if self._dropped is not None:
            return str(self.tokenizer.decode([token for token in ids if token not in self._dropped]))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def _dropped(self) -> frozenset[int] | None:
        """The control tokens that a text leaves out; None where it can leave out all."""
        special = {
            token.content: ident for ident, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        kept = markers_of(special.keys())
        dropped = {ident for content, ident in special.items() if content not in kept}
        return frozenset(dropped) | self.eos_ids if kept else None

    def opens_thinking(self, prompt_ids: Sequence[int]) -> str:
        """The mark with which a prompt in the model's template has begun the thinking of the answer, or nothing."""
        return opened_by(str(self.tokenizer.decode(list(prompt_ids[-32:]))))

    @property
    def max_length(self) -> int:
        """How many tokens its context takes."""
        return min(context_length(self.net.config), 2**31)

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """The conversation as token ids, through the model's own (sandboxed) chat template, ready to be answered. What
        looks like a control token in its content is text."""
        shown = messages if self.prompt_context is None else self.prompt_context(messages)
        return template.prompt_ids(self.tokenizer, shown)

    @cached_property
    def _opened(self) -> str:
        """The mark with which the template itself begins the thinking of every answer, or nothing."""
        return template.opened(self.tokenizer)

    def answer_ids(self, text: str, is_cut: bool = False) -> list[int]:
        """A given answer as token ids that go on from a prompt, with the end of its turn unless it was cut off."""
        return given_answer.answer_ids(self.tokenizer, text, self._opened, is_cut)

    def whole_ids(self, messages: tuple[Message, ...], answer: str, is_cut: bool = False) -> list[int]:
        """A conversation with its answer, as the chat template ends it: what a score is given for."""
        ids = [*self.prompt_ids(messages), *self.answer_ids(answer, is_cut)]
        return ids if is_cut else [*ids, *self.closing_ids]

    @cached_property
    def closing_ids(self) -> list[int]:
        """What the chat template puts after the token that ends an answer."""
        return given_answer.closing_ids(self.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """A text as token ids, nothing added; what looks like a control token is treated as text."""
        return template.text_ids(self.tokenizer, text)

    def raw_ids(self, text: str) -> list[int]:
        """A text as token ids, control tokens recognised: for our own texts in the model's format, never for
        content."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def with_context(self, prompt_context: PromptContext | None) -> Model:
        """The same model with another prompt context: another teacher, with another identity."""
        return replace(
            self,
            prompt_context=prompt_context,
            identity=self.named(self.identity.partition("+sight-")[0], prompt_context),
        )

    @staticmethod
    def named(identity: str, prompt_context: PromptContext | None) -> str:
        """The identity of a model with this prompt context."""
        return identity if prompt_context is None else f"{identity}+sight-{prompt_context.name}"


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest id of a tokenizer. Ids may have holes (cl100k's have), so that it has fewer tokens."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def header_of(tokenizer: Tokenizer, served: bool = False) -> str | None:
    """The text before a user's first message in the chat template; None where there is none. A server that continues
    text puts the token that begins it there by itself, where the tokenizer does: `served` leaves it out."""
    mark = "USER MESSAGE"
    text = template.render(tokenizer, ({"role": "user", "content": mark},), answer=False)
    before, separator, _ = text.partition(mark)
    begin = tokenizer.bos_token_id
    if served and begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]:
        before = before.removeprefix(tokenizer.bos_token)
    return before if separator and before else None


def hidden_states(net: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, D] after the final norm. Right padding needs no mask: attention is causal."""
    hidden_BTD: Tensor = net.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def gives_scores(net: PreTrainedModel) -> bool:
    """Whether a model gives one number for a text, and no distribution over a vocabulary."""
    return isinstance(getattr(net, "score", None), nn.Linear) and net.config.num_labels == 1


def head_of(net: PreTrainedModel) -> Head:
    """The output projection, with the bias, soft cap, logit scale and LoRA adapter that the model has; of a model that
    gives scores, the one row that does.

    Raises:
        UserError: a head that is not a linear layer.
    """
    if gives_scores(net):
        scores: Any = net.score
        return Head(scores.weight, scores.bias)
    config: Any = net.config.get_text_config()
    layer: Any = net.get_output_embeddings()
    low_rank = None
    if hasattr(layer, "lora_A"):
        if len(layer.active_adapters) != 1 or layer.disable_adapters:
            raise UserError(
                f"{net.config.model_type}: its head has several adapters, or a disabled one; merge them first"
            )
        (name,) = layer.active_adapters
        if not layer.merged:
            low_rank = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        layer = layer.get_base_layer()
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{net.config.model_type}: its head is not a linear layer; choose another model")
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite divides, Cohere multiplies
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, softcap=float(cap) if cap else None, low_rank=low_rank)
