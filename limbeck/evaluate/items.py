"""The items and settings of evaluation tasks, and how both are read. No model in here.

An items file holds one JSON object per line. Every kind of task has a parser that takes such an object and refuses what
is missing, unknown or of the wrong type, naming the file and the line. `{name}` in a template is replaced by the item's
text of that name, once and literally: a template is no program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from limbeck.data.encodings import lines_of
from limbeck.data.records import DECODER
from limbeck.elicit.conversation import FormError, LeftOutError, check_turns, is_blank, messages_of, tools_message
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.verify import parse_check
from limbeck.evaluate.thinking_settings import ThinkingSettings
from limbeck.types import Message, UserError, nearest

PLACEHOLDER = re.compile(r"\{(\w+)\}")
PositiveInt = Annotated[int, Field(ge=1)]
NonEmptyText = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class ChoiceItem:
    """A question with `choices`, of which number `answer` (from 0) is right. `fields` are the texts that the template
    names."""

    id: str
    fields: Mapping[str, str]
    choices: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        return "\n".join(self.fields.values())


@dataclass(frozen=True)
class Passage:
    """A text whose every token is scored: a document, or the answer to the last of `messages`."""

    id: str
    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class RankingItem:
    """A query and documents with graded relevance (0 for none)."""

    id: str
    query: str
    documents: tuple[str, ...]
    relevances: tuple[float, ...]

    @property
    def text(self) -> str:
        return "\n".join((self.query, *self.documents))


Item = Prompt | ChoiceItem | Passage | RankingItem


class TaskSettings(BaseModel):
    """How a task is asked: `settings` of task.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TemplateSettings(TaskSettings):
    """What comes before the continuation that is scored or written.

    `plain` is the template alone, `chat` the template as a user's message in the model's own chat template. `delimiter`
    is put before a scored continuation, as part of it: by default a space in plain text, nothing in a chat.
    """

    format: Literal["plain", "chat"] = "plain"
    template: str = "{text}"
    delimiter: str | None = None

    @property
    def joint(self) -> str:
        if self.delimiter is not None:
            return self.delimiter
        return " " if self.format == "plain" else ""

    @property
    def placeholders(self) -> list[str]:
        return list(dict.fromkeys(PLACEHOLDER.findall(self.template)))

    def fill(self, fields: Mapping[str, str]) -> str:
        return PLACEHOLDER.sub(lambda match: fields[match[1]], self.template)

    def _require(self, *names: str) -> None:
        if sorted(self.placeholders) != sorted(names):
            required = " and ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"template must name {required} and nothing else; got {self.template!r}")


class GenerationSettings(TemplateSettings):
    """Greedy (temperature 0) unless sampled: one answer for each of `seeds`, or `samples` of them (seeds 0, 1, ...).

    `pass_at` asks for pass@k over the samples. Without `max_tokens`, the run's own limit applies. `stemmer` is ROUGE's.
    With `thinking`, `max_tokens` bounds what follows the thinking.
    """

    format: Literal["plain", "chat"] = "chat"
    template: str = "{prompt}"
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    samples: PositiveInt | None = None
    pass_at: tuple[PositiveInt, ...] = ()
    max_tokens: PositiveInt | None = None
    stemmer: bool = True
    thinking: ThinkingSettings | None = None

    @model_validator(mode="after")
    def _agree(self) -> GenerationSettings:
        self._require("prompt")
        if self.seeds is not None and self.samples is not None:
            raise ValueError("give seeds or samples, not both")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice in seeds, so its answer would count twice; leave one out")
        if self.temperature == 0 and self.draws != (0,):
            raise ValueError(
                "at temperature 0 every answer is the same; set a temperature above 0, or leave seeds and samples out"
            )
        if any(k > len(self.draws) for k in self.pass_at):
            raise ValueError(
                f"pass_at {max(self.pass_at)} needs as many answers; there are {len(self.draws)}: raise samples"
            )
        if self.thinking is not None and self.thinking.budgets is not None and self.pass_at:
            raise ValueError("pass_at can't be measured at several budgets of thinking; give thinking.most")
        return self

    @property
    def draws(self) -> tuple[int, ...]:
        """One seed per answer to a prompt."""
        return self.seeds or tuple(range(self.samples or 1))

    @property
    def shares_answers(self) -> bool:
        """True where the answers are the plain greedy ones that any held-out prompt gets."""
        return (
            self.temperature == 0
            and self.format == "chat"
            and self.template == "{prompt}"
            and self.max_tokens is None
            and self.thinking is None
        )


class ChoiceSettings(TemplateSettings):
    """Every item must have every field that the template names."""

    template: str = "Question: {question}\nAnswer:"

    @model_validator(mode="after")
    def _agree(self) -> ChoiceSettings:
        if not self.placeholders:
            raise ValueError("template must name a field of the items, such as {question}")
        if reserved := {"id", "kind", "choices", "answer"} & set(self.placeholders):
            raise ValueError(f"template can't name {min(reserved)}: that is not a text of the question")
        return self


class LabelSettings(TemplateSettings):
    """The labels are the choices of every item, in this order."""

    template: str = "Text: {text}\nLabel:"
    labels: Annotated[tuple[NonEmptyText, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _agree(self) -> LabelSettings:
        self._require("text")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is given twice in labels; leave one out")
        return self


class RankingSettings(TemplateSettings):
    """The query is scored as the continuation of a document; `k` are the cut-offs of nDCG@k."""

    template: str = "{document}\nQuestion:"
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10,)

    @model_validator(mode="after")
    def _agree(self) -> RankingSettings:
        self._require("document")
        return self


class PassageSettings(TaskSettings):
    """Tokens of a window (at most the model's context) and by how many it moves on (half a window by default)."""

    window: Annotated[int, Field(ge=2)] = 1024
    stride: PositiveInt | None = None

    @model_validator(mode="after")
    def _agree(self) -> PassageSettings:
        if self.stride is not None and self.stride >= self.window:
            raise ValueError(
                f"stride {self.stride} must be below the window of {self.window}, so that every token has some context"
            )
        return self


def parse_prompt(data: dict[str, Any], ident: str, place: str) -> Prompt:
    """A prompt with a `check`, `references`, both, or neither; the references become the prompt's answers."""
    _check_keys(data, ("prompt", "check", "references"), place)
    check = data.get("check")
    if check is not None:
        parse_check(check, place)
    references = _texts(data, "references", place) if "references" in data else ()
    kind = str(data.get("kind", ""))
    return Prompt(ident, _text(data, "prompt", place), kind, references, check=check)


def parse_choice(data: dict[str, Any], ident: str, place: str, settings: ChoiceSettings) -> ChoiceItem:
    names = settings.placeholders
    _check_keys(data, (*names, "choices", "answer"), place)
    choices = _texts(data, "choices", place)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f'{place}: "choices" must be at least two different texts')
    answer = data.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f'{place}: "answer" must be the place of the right choice, 0 to {len(choices) - 1}; got {answer!r}'
        )
    return ChoiceItem(ident, {name: _text(data, name, place) for name in names}, choices, answer)


def parse_label(data: dict[str, Any], ident: str, place: str, settings: LabelSettings) -> ChoiceItem:
    _check_keys(data, ("text", "label"), place)
    label = data.get("label")
    if label not in settings.labels:
        raise UserError(f"{place}: {label!r} is not one of the task's labels{nearest(str(label), settings.labels)}")
    return ChoiceItem(ident, {"text": _text(data, "text", place)}, settings.labels, settings.labels.index(label))


def parse_passage(data: dict[str, Any], ident: str, place: str) -> Passage:
    """A document, or with `messages` (a conversation up to the answer; its `tools`, if any) the answer to it."""
    _check_keys(data, ("text", "messages", "tools"), place)
    text = _text(data, "text", place)
    if "messages" not in data:
        return Passage(ident, text)
    try:
        messages = messages_of(data["messages"], "messages")
        check_turns(messages)
        tools = tools_message(data.get("tools"), "tools")
    except (FormError, LeftOutError) as error:
        raise UserError(f"{place}: {error}") from error
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f'{place}: "messages" must end with a message that "text" answers, of the user or of a tool')
    return Passage(ident, text, (*tools, *messages))


def parse_ranking(data: dict[str, Any], ident: str, place: str) -> RankingItem:
    """`documents` is a list of {"text": ..., "relevance": number}; nDCG needs two different relevances to be worth
    anything."""
    _check_keys(data, ("query", "documents"), place)
    documents = data.get("documents")
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise UserError(f'{place}: "documents" must be a list such as [{{"text": "...", "relevance": 1}}, ...]')
    relevances = []
    for document in documents:
        _check_keys(document, ("text", "relevance"), place)
        grade = document.get("relevance")
        if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= 32:
            raise UserError(f'{place}: "relevance" must be a number from 0 to 32; got {grade!r}')
        relevances.append(float(grade))
    if len(set(relevances)) < 2:
        raise UserError(
            f"{place}: the documents need at least two different relevances, or every order would be as good"
        )
    texts = tuple(_text(document, "text", place) for document in documents)
    return RankingItem(ident, _text(data, "query", place), texts, tuple(relevances))


Parser = Callable[[dict[str, Any], str, str, Any], Item]  # called with (line, id, place for errors, settings)


def read_items(
    file: Path, prefix: str, parse: Parser, settings: TaskSettings, references: Path | None = None
) -> list[Item]:
    """The items of a JSONL file; their ids are `prefix` and the line's `id`, or its number.

    Args:
        references: a file with one list of texts (or one text) for each item, in the same order.

    Raises:
        UserError: a file that is missing, empty or malformed, ids given twice, or lists of different lengths.
    """
    items: list[Item] = []
    lines = read_lines(file)
    if references is not None:
        texts = read_lines(references)
        if len(texts) != len(lines):
            raise UserError(
                f"{references} holds references for {len(texts)} items, {file} holds {len(lines)}: give one line for"
                " each item"
            )
        lines = [
            (number, _with_references(line, numbered, references))
            for (number, line), numbered in zip(lines, texts, strict=True)
        ]
    idents: set[str] = set()
    for number, data in lines:
        place = f"{file}, line {number}"
        if not isinstance(data, dict):
            raise UserError(f"{place}: must be a JSON object, such as {{...}}")
        ident = f"{prefix}{data.get('id', f'line-{number}')}"
        if ident in idents:
            raise UserError(f"{place}: the id {data.get('id')!r} is given twice")
        idents.add(ident)
        items.append(parse(data, ident, place, settings))
    if not items:
        raise UserError(f"{file} holds no item, and nothing can be measured on none; write one JSON object per line")
    return items


def read_lines(file: Path) -> list[tuple[int, Any]]:
    """(number of the line, its JSON value) of every line that is not blank; an object's keys without a value, as tables
    write them, are left out.

    Raises:
        UserError: no such file, or a line that is not JSON or not text; the message names the line.
    """
    if not file.is_file():
        raise UserError(f"can't read {file}: there is no such file; put it there, or name another file in task.yaml")
    values = []
    for number, line in lines_of(file):
        if not line.strip():
            continue
        try:
            value = DECODER.decode(line.strip())
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{file}, line {number}: holds half a character, {half}; remove it") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from error
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if not is_blank(entry)}
        values.append((number, value))
    return values


def _with_references(data: Any, numbered: tuple[int, Any], file: Path) -> Any:
    number, texts = numbered
    if not isinstance(texts, str | list):
        raise UserError(f"{file}, line {number}: must be a text or a list of texts")
    if isinstance(data, dict) and "references" in data:
        raise UserError(f'{file}, line {number}: its item has "references" of its own; give them in one place')
    return {**data, "references": [texts] if isinstance(texts, str) else texts} if isinstance(data, dict) else data


def _check_keys(data: dict[str, Any], legal: Collection[str], place: str) -> None:
    for key in data:
        if key not in legal and key not in ("id", "kind"):
            raise UserError(f"{place}: unknown key {key!r}{nearest(str(key), legal)}")


def _text(data: dict[str, Any], key: str, place: str) -> str:
    text = data.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{place}: needs a non-empty text under "{key}"')
    return text


def _texts(data: dict[str, Any], key: str, place: str) -> tuple[str, ...]:
    texts = data.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f'{place}: needs a list of texts that are not empty under "{key}"')
    return tuple(texts)
