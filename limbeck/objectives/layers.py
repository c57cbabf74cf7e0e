"""Which layers of student and teacher are compared, and the linear maps between their widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from limbeck.types import RecipeError, UserError, nearest

Pair = tuple[int, int]
Project = Callable[[Tensor], Tensor]

LAYER_MAPS = ("uniform", "last")
PROJECTIONS = ("learned", "none")


def layer_map(
    spec: object, student_layers: int, teacher_layers: int, embeddings: bool = False, path: str = ""
) -> tuple[Pair, ...]:
    """Pairs (student layer, teacher layer), counted from 1; 0 is the embeddings.

    Args:
        spec: `uniform` (student i to teacher i M / N, halves up, at least 1), `last`, or pairs such as [[4, 8], [8,
            16]].
        embeddings: adds (0, 0) to a named map, and lets explicit pairs name 0.

    Raises:
        RecipeError: an unknown name, or pairs that are malformed, given twice, or outside the models.
    Source: `uniform` is TinyBERT's map, arXiv:1909.10351, for any ratio; `last` MiniLM's, arXiv:2002.10957.
    """
    n = student_layers
    m = teacher_layers
    if isinstance(spec, str):
        if spec not in LAYER_MAPS:
            raise RecipeError(
                path, f"no layer map is named {spec!r}{nearest(spec, LAYER_MAPS)}; or give pairs [student, teacher]"
            )
        uniform = tuple((i, max(1, (2 * i * m + n) // (2 * n))) for i in range(1, n + 1))
        pairs = uniform if spec == "uniform" else ((n, m),)
        return ((0, 0), *pairs) if embeddings else pairs
    if not isinstance(spec, Sequence) or not spec:
        raise RecipeError(path, f"{spec!r} is no layer map; give uniform, last, or pairs such as [[4, 8], [8, 16]]")
    lowest = 0 if embeddings else 1
    pairs = tuple(
        _check_pair(pair, ((n, "student"), (m, "teacher")), lowest, f"{path}[{i}]") for i, pair in enumerate(spec)
    )
    if len(set(pairs)) < len(pairs):
        raise RecipeError(path, "a pair of layers is listed twice; list each once")
    return pairs


def _check_pair(pair: object, models: Sequence[tuple[int, str]], lowest: int, path: str) -> Pair:
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(type(index) is not int for index in pair):
        raise RecipeError(path, f"{pair!r} is not a pair [student layer, teacher layer]")
    for index, (layers, side) in zip(pair, models, strict=True):
        if not lowest <= index <= layers:
            hint = "" if lowest == 0 else " (0, the embeddings, needs embeddings: true)"
            raise RecipeError(path, f"{side} layer {index} is outside {lowest} to {layers}{hint}")
    return (pair[0], pair[1])


def pair_name(pair: Pair) -> str:
    """The key of a pair in `projections`, such as `4-8`."""
    return f"{pair[0]}-{pair[1]}"


def mean_over_pairs(values: Sequence[Tensor]) -> Tensor:
    """The values of all pairs of layers, added up and divided by their number."""
    return torch.stack(list(values)).sum(0) / len(values)


def projections(
    pairs: Sequence[Pair], student_width: int, teacher_width: int, kind: str, seed: int = 0
) -> nn.ModuleDict:
    """One map from the student's width to the teacher's per pair, under `pair_name(pair)`, in fp32.

    `learned`: linear without bias; it starts as the identity where the widths agree, else with orthonormal rows or
    columns drawn from `seed` (torch's own random state is left alone). `none`: the states as they are.

    Raises:
        UserError: `none` between different widths, or an unknown kind.
    """
    if kind not in PROJECTIONS:
        raise UserError(f"no projection is named {kind!r}{nearest(kind, PROJECTIONS)}")
    if kind == "none" and student_width != teacher_width:
        raise UserError(
            f"the student's width {student_width} is not the teacher's {teacher_width}; set projection: learned"
        )
    noise = torch.Generator().manual_seed(seed)
    learned = kind == "learned"
    return nn.ModuleDict(
        {pair_name(pair): linear(student_width, teacher_width, noise) if learned else nn.Identity() for pair in pairs}
    )


def linear(inputs: int, outputs: int, noise: torch.Generator) -> nn.Linear:
    """The identity for equal widths, else a map with orthonormal rows or columns drawn from `noise`; no bias."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    if inputs == outputs:
        nn.init.eye_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight, generator=noise)
    return layer
