"""Feature terms of a recipe: which layers are compared, by which loss of `feature`, through which learned maps.

A term is bound to a student and a teacher once; what it learns (projections, filters) is trained and checkpointed with
the student and dropped when the student is exported.

Shapes: B rows, N response positions, D width of the student, E of the teacher, M rows of a bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from limbeck.objectives.feature import (
    DISTANCES,
    PROJECTIONS,
    Contrast,
    Features,
    Pair,
    TaskFilters,
    attention_kl,
    attention_match,
    cka_distance,
    draw_negatives,
    hidden_match,
    layer_map,
    pair_name,
    pooled,
    projections,
    relations,
    value_relation,
)
from limbeck.objectives.parameters import Range
from limbeck.types import RecipeError, nearest

MOST_LAYERS = 1000
PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Kind:
    """A feature loss that a recipe can name, with the defaults of its settings."""

    formula: str
    paper: str
    defaults: Mapping[str, Any]
    reads: Literal["hidden", "attention"] = "hidden"
    unit: Literal["token", "row"] = "token"


MATCHES: dict[str, Kind] = {
    "hidden_match": Kind(
        "|W h_q - h_p|^2 / width",
        "FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351",
        {"layers": "uniform", "projection": "learned", "distance": "squared", "embeddings": False},
    ),
    "attention_match": Kind(
        "(score_q - score_p)^2 over heads and visible keys",
        "TinyBERT, arXiv:1909.10351",
        {"layers": "uniform"},
        "attention",
    ),
    "attention_kl": Kind(
        "KL(attention_p || attention_q) over heads", "MiniLM, arXiv:2002.10957", {"layers": "last"}, "attention"
    ),
    "value_relation": Kind(
        "KL(softmax(v v)_p || softmax(v v)_q) over heads", "MiniLM, arXiv:2002.10957", {"layers": "last"}, "attention"
    ),
    "relations": Kind(
        "KL of softmax(x x) for queries, keys and values, cut into relation heads",
        "MiniLMv2, arXiv:2012.15828",
        {"layers": "last", "relation_heads": 1, "of": list(PARTS)},
        "attention",
    ),
    "filtered_match": Kind(
        "|g_q(h_q) - g_p(h_p)|^2 / width, filters g learned on the task first",
        "TED, arXiv:2210.01351",
        {"layers": "uniform", "filter_steps": 20, "filter_lr": 1e-3},
    ),
    "contrast": Kind(
        "-log softmax of cos(s, t) / tau over the own and K other texts",
        "CoDIR, arXiv:2009.14167",
        {"layers": "last", "dim": 128, "temperature": 0.1, "negatives": 64},
        unit="row",
    ),
    "cka": Kind(
        "1 - linear CKA over a row's positions", "Kornblith et al., arXiv:1905.00414", {"layers": "uniform"}, unit="row"
    ),
}
NUMBERS = {
    "relation_heads": Range(1, 4096),
    "filter_steps": Range(1, 100_000),
    "filter_lr": Range(0, 1, open_low=True),
    "dim": Range(1, 65_536),
    "temperature": Range(0, 100, open_low=True),
    "negatives": Range(1, 1_000_000),
}
WORDS = {"projection": PROJECTIONS, "distance": DISTANCES}


@dataclass(frozen=True)
class MatchSettings:
    """A feature term's checked settings; `path` is its place in the recipe, for errors found when layers are known."""

    name: str
    values: Mapping[str, Any]
    path: str = ""

    @property
    def kind(self) -> Kind:
        return MATCHES[self.name]

    def check(self, student: Sizes, teacher: Sizes) -> None:
        """Refuse what these two models can't be compared by. RecipeError with the cure."""
        self.pairs(student.layers, teacher.layers)
        same_width = student.width == teacher.width
        if not same_width and (self.values.get("projection") == "none" or self.name == "filtered_match"):
            cure = "set projection: learned" if self.name == "hidden_match" else "use hidden_match or relations"
            raise RecipeError(
                self.path, f"the student's width {student.width} is not the teacher's {teacher.width}; {cure}"
            )
        if self.name in ATTENTION_LOSSES and student.heads != teacher.heads:
            raise RecipeError(
                self.path,
                f"the student has {student.heads} attention heads, the teacher {teacher.heads}; use relations",
            )
        if self.name == "relations":
            heads = self.values["relation_heads"]
            of = self.values["of"]
            widths = [
                model.key_value_width if part != "query" else model.query_width
                for model in (student, teacher)
                for part in of
            ]
            if wrong := [width for width in widths if width % heads]:
                raise RecipeError(
                    f"{self.path}.relation_heads",
                    f"{heads} does not divide {wrong[0]}; take a divisor of {math.gcd(*widths)}",
                )

    def pairs(self, student_layers: int, teacher_layers: int) -> tuple[Pair, ...]:
        """Which layers are compared. RecipeError for layers that a model does not have."""
        embeddings = bool(self.values.get("embeddings", False))
        return layer_map(
            self.values["layers"], student_layers, teacher_layers, embeddings, f"{self.path}.layers".lstrip(".")
        )


class Sizes(Protocol):
    """What of a model decides whether a feature loss fits it."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def query_width(self) -> int: ...
    @property
    def key_value_width(self) -> int: ...


def match_settings(name: str, params: Mapping[str, Any], path: str) -> tuple[MatchSettings, Literal["token", "row"]]:
    """Check what can be checked without the models.

    Raises:
        RecipeError: an unknown setting or a value that it can't have.
    """
    kind = MATCHES[name]
    values = dict(kind.defaults)
    for key, value in params.items():
        at = f"{path}.{key}".lstrip(".")
        if key not in values:
            raise RecipeError(at, f"{name} has no such parameter{nearest(key, values)}")
        if key in NUMBERS:
            whole = isinstance(kind.defaults[key], int)
            if whole and type(value) is not int:
                raise RecipeError(at, f"{value!r} is not a whole number")
            NUMBERS[key].check(at, value)
        elif key in WORDS and value not in WORDS[key]:
            raise RecipeError(at, f"{value!r} is not possible here{nearest(str(value), WORDS[key])}")
        elif key == "embeddings" and not isinstance(value, bool):
            raise RecipeError(at, f"{value!r} is not true or false")
        elif key == "of" and (not isinstance(value, list) or not value or any(part not in PARTS for part in value)):
            raise RecipeError(at, f"{value!r} is not a list of {', '.join(PARTS)}")
        values[key] = value
    settings = MatchSettings(name, values, path)
    # the shape of `layers`; whether the models have them is seen when they are known
    settings.pairs(MOST_LAYERS, MOST_LAYERS)
    return settings, kind.unit


@dataclass(frozen=True)
class Positions:
    """Where the compared positions are: (row, position) of N response positions in B rows, and who the rows are."""

    row_N: Tensor
    position_N: Tensor
    rows: int
    own_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # each row's place in the bank
    seed: int = 0


class Match(nn.Module):
    """A feature term bound to two models. `forward` gives a value per token [N], or per row [B] (see `kind.unit`)."""

    bank_ME: Tensor
    times = 1.0  # as fast as the student

    def __init__(self, settings: MatchSettings, layers: tuple[int, int], widths: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.layers = layers
        self.widths = widths
        self.pairs = settings.pairs(*layers)
        name = settings.name
        values = settings.values
        self.learned: nn.Module = nn.ModuleDict()
        if name == "hidden_match":
            self.learned = projections(self.pairs, *widths, values["projection"], seed)
        elif name == "filtered_match":
            if widths[0] != widths[1]:
                raise RecipeError(
                    settings.path,
                    f"filters read by each model's own head need equal widths, not {widths}; use hidden_match or"
                    " relations",
                )
            self.learned = TaskFilters(self.pairs, *widths, seed=seed)
        elif name == "contrast":
            sizes = (widths[0] * len(self.pairs), widths[1] * len(self.pairs))
            self.learned = Contrast(*sizes, values["dim"], values["temperature"], seed)
        self.register_buffer("bank_ME", torch.zeros(0, widths[1] * len(self.pairs)))

    def taps(self, side: int) -> tuple[set[int], set[int]]:
        """(hidden layers, attention layers) that this term reads of the student (0) or the teacher (1)."""
        layers = {pair[side] for pair in self.pairs}
        return (layers, set()) if self.settings.kind.reads == "hidden" else (set(), layers)

    def forward(self, student: Features, teacher: Features, place: Positions) -> Tensor:
        if self.settings.name == "contrast":
            return self._contrast(student, teacher, place)
        values = [self._pair(pair, student, teacher, place) for pair in self.pairs]
        return torch.stack(values).sum(0) / len(values)

    def _pair(self, pair: Pair, student: Features, teacher: Features, place: Positions) -> Tensor:
        name = self.settings.name
        where = (place.row_N, place.position_N)
        if self.settings.kind.reads == "attention":
            ours = student.attention[pair[0]]
            theirs = teacher.attention[pair[1]]
            if name != "relations":
                return ATTENTION_LOSSES[name](ours, theirs, *where)
            of = [PARTS.index(part) for part in self.settings.values["of"]]
            heads = self.settings.values["relation_heads"]
            return torch.stack([relations(ours[part], theirs[part], heads, *where) for part in of]).sum(0) / len(of)
        ours_ND = student.hidden[pair[0]][where]
        theirs_NE = teacher.hidden[pair[1]][where]
        if name == "cka":
            return cka_distance(ours_ND, theirs_NE, place.row_N, place.rows)
        if name == "filtered_match":
            filtered: Tensor = self.learned(pair, ours_ND, theirs_NE)
            return filtered
        assert isinstance(self.learned, nn.ModuleDict)
        return hidden_match(ours_ND, theirs_NE, self.learned[pair_name(pair)], self.settings.values["distance"])

    def _contrast(self, student: Features, teacher: Features, place: Positions) -> Tensor:
        ours_BD = pooled([student.hidden[pair[0]] for pair in self.pairs], place.row_N, place.position_N)
        theirs_BE = self.pooled_teacher(teacher, place)
        count = self.settings.values["negatives"]
        drawn = [
            draw_negatives(
                own[None], len(self.bank_ME), count, torch.Generator().manual_seed(place.seed * 2**20 + int(own))
            )
            for own in place.own_B
        ]
        values_B: Tensor = self.learned(ours_BD, theirs_BE, self.bank_ME, torch.cat(drawn).to(ours_BD.device))
        return values_B

    def pooled_teacher(self, teacher: Features, place: Positions) -> Tensor:
        """What the bank holds of these rows: [B, E x layers]."""
        return pooled([teacher.hidden[pair[1]] for pair in self.pairs], place.row_N, place.position_N)


ATTENTION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "attention_match": attention_match,
    "attention_kl": attention_kl,
    "value_relation": value_relation,
}


class Tapping(Protocol):
    """What reads inner layers, or none."""

    def taps(self, side: int, /) -> tuple[set[int], set[int]]: ...


def wanted(matches: Sequence[Tapping], side: int) -> tuple[set[int], set[int]]:
    """The layers that all terms together read of one model."""
    taps = [match.taps(side) for match in matches]
    return set().union(*(hidden for hidden, _ in taps)), set().union(*(attention for _, attention in taps))
