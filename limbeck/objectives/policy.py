"""Policy gradients: losses on the log-probability of tokens that were sampled, one value per token.

Autograd does not see the sampling: a gradient here is right only in expectation over the writer whose log-probabilities
the columns hold, and each docstring says which gradient that is. Statistics that span tokens or samples (advantages,
returns, whitening, length weights) belong before the step is cut into micro-batches; they carry no gradient. A
temperature other than 1 or a top-p below 1 is another writer: without its log-probabilities the expectations do not
hold.

A policy loss is one function, registered by its decorator: in `on_policy.py` those that the teacher's log-probabilities
drive, in `rewards.py` those that rewards of whole answers drive.

Shapes: N response tokens, B rows, T positions, V vocabulary. q is the student now, p the teacher, log q(y) the value at
the sampled token. Everything is fp32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.objectives.distribution import ValueAndGradient
from limbeck.objectives.facts import TextFacts
from limbeck.objectives.head import Block
from limbeck.objectives.loss import ADVANTAGE, STUDENT, Loss, LossSettings, Responses
from limbeck.objectives.parameters import Range, check_numbers, defaults_of
from limbeck.objectives.precision import full_precision
from limbeck.objectives.registry import LossesOf, register
from limbeck.types import RecipeError, UserError, nearest

Columns = Mapping[str, Tensor]
PolicyFn = Callable[..., Tensor]
Prepare = Callable[..., dict[str, Tensor]]
# log-ratios are clamped to this before exp, so that fp32 stays finite; a clamped token has no gradient
LOG_CAP = 20.0
K1_REMEDY = (
    "k1 = log q - log p differentiated on sampled tokens trains nothing on average (its expected gradient is 0); use"
    " k2, whose gradient is the reverse KL's, or the loss on_policy_distillation"
)


@dataclass(frozen=True, kw_only=True)
class Policy(Loss):
    """A policy loss `fn(log_prob_N, columns, **params) -> values_N`.

    Args:
        needed: the columns that it needs, such as teacher_log_prob (the teacher's own, if no column holds it).
        optional: columns that it reads where they are there.
        prepare: `prepare(responses, **params)` makes those of its columns that span a response.
    """

    fn: PolicyFn
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    prepare: Prepare | None = None

    fused: ClassVar[bool] = True

    @property
    def defaults(self) -> dict[str, float]:
        return defaults_of(self.fn) | (defaults_of(self.prepare) if self.prepare else {})

    @property
    def needs(self) -> str:
        rewards = "; rollout.rewards" if ADVANTAGE in self.reads else ""
        return f"text that the student writes: a writer {{by: student}}{rewards}"

    @property
    def reads_teacher_log_prob(self) -> bool:
        return "teacher_distribution" in self.reads

    @property
    def spans_responses(self) -> bool:
        return self.prepare is not None

    @property
    def is_on_policy(self) -> bool:
        return self.spans_responses or (ADVANTAGE in self.reads and "old_log_prob" not in self.needed)

    @property
    def writes_columns(self) -> frozenset[str]:
        return frozenset(self.needed) - {"teacher_log_prob"} if self.spans_responses else frozenset()

    def limit(self, only: str | None, path: str) -> str | None:
        if only not in (None, STUDENT):
            raise RecipeError(
                path, f"{self.name} applies to text that the student writes while it trains; leave `only` out"
            )
        return STUDENT

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        if self.spans_responses and facts.reuses_rollouts:
            raise RecipeError(
                settings.path,
                f"{self.name} reads what the student thought when it wrote, so its text must be new: leave ahead and"
                " replay out",
            )
        if self.is_on_policy and facts.copy_writes:
            raise RecipeError(
                settings.path,
                f"{self.name} takes the student itself to be the one that wrote, and its copy is another: leave dtype"
                " out",
            )
        if facts.temperature == 0:
            raise RecipeError(
                settings.path,
                f"{self.name} is right in expectation over drawn text, and this student draws none; give it a"
                " temperature",
            )
        if facts.top_p < 1:
            raise RecipeError(
                settings.path,
                f"{self.name} is right in expectation over all that the student could write, and top_p {facts.top_p:g}"
                " cuts some of it off: set the student's top_p to 1",
            )
        if not self.corrects:
            self._check_own_draws(settings, facts)

    @property
    def corrects(self) -> bool:
        """Whether it reads how likely each token was when it was drawn, so that another writer's draws are weighed."""
        return bool({"old_log_prob", "importance_weight"} & {*self.needed, *self.optional})

    def _check_own_draws(self, settings: LossSettings, facts: TextFacts) -> None:
        """Refuse draws from another distribution than today's student's own. A penalty may be a few updates behind,
        within the passes of a step, as in the papers of PPO and GRPO."""
        is_behind = facts.repeats_rollouts and "reference_log_prob" in self.needed
        for is_other, what, remedy in (
            (facts.temperature not in (None, 1), f"drawn at temperature {facts.temperature}", "set temperature: 1"),
            (facts.writes_jointly, "written with another model", "leave rollout.joint out"),
            (facts.reuses_rollouts and not is_behind, "of an older student", "leave ahead, replay and passes out"),
        ):
            if is_other:
                raise RecipeError(
                    settings.path,
                    f"{self.name} is right for what today's student draws from its own distribution, and this text is"
                    f" {what}: {remedy}, or use a loss that reads old_log_prob (on_policy_distillation, ppo_clip)",
                )

    def columns(self, responses: Responses, params: Mapping[str, float]) -> dict[str, Tensor]:
        if self.prepare is None:
            return {}
        return self.prepare(responses, **{name: params[name] for name in defaults_of(self.prepare)})

    def token_values(self, block: Block, params: Mapping[str, float]) -> ValueAndGradient:
        """Autograd gives the slope for the written token's log-probability; the rest is the softmax."""
        index_R1 = block.targets_R[:, None]
        columns = dict(block.columns)
        if "teacher_log_prob" in self.needed and "teacher_log_prob" not in columns and block.teacher is not None:
            columns["teacher_log_prob"] = block.teacher.log_prob(block.targets_R)
        with torch.enable_grad():
            log_prob_R = block.q.log.gather(-1, index_R1)[:, 0].detach().requires_grad_()
            values_R = self(log_prob_R, columns, params)
            (slope_R,) = torch.autograd.grad(values_R.sum(), log_prob_R)
        gradient_RV = block.q.prob * -slope_R[:, None]
        return values_R.detach(), gradient_RV.scatter_add_(-1, index_R1, slope_R[:, None])

    def __call__(self, log_prob_N: Tensor, columns: Columns, params: Mapping[str, float]) -> Tensor:
        """Values [N], from parameters that are checked already and columns that are checked here."""
        for column in self.needed:
            if column not in columns:
                raise UserError(
                    f"{self.name} reads the column {column!r}; the rollout wrote only:"
                    f" {', '.join(sorted(columns)) or 'none'}"
                )
        own = {name: full_precision(columns[name]) for name in self.needed + self.optional if name in columns}
        for name, column_N in own.items():
            if column_N.shape != log_prob_N.shape:
                raise UserError(
                    f"{self.name}: {name!r} is {tuple(column_N.shape)}, the tokens are {tuple(log_prob_N.shape)}"
                )
        return self.fn(full_precision(log_prob_N), own, **{name: params[name] for name in defaults_of(self.fn)})


POLICIES = LossesOf(Policy)


def register_policy(
    formula: str,
    paper: str,
    needed: tuple[str, ...],
    *,
    optional: tuple[str, ...] = (),
    prepare: Prepare | None = None,
    weights: tuple[str, ...] = (),
    **ranges: Range,
) -> Callable[[PolicyFn], PolicyFn]:
    """Register the function below as a policy loss under its own name; see `Policy`.

    What `prepare` makes, and the teacher's log-probability, come from the teacher's distribution. Those of its columns
    that are `weights` may multiply other losses. `ranges` are the legal values of its parameters and of `prepare`'s.
    """
    made = {"teacher_log_prob", *(needed if prepare else ())}
    evidence = {column for column in needed if column not in made} | {STUDENT}
    if made & set(needed):
        evidence.add("teacher_distribution")

    def add(fn: PolicyFn) -> PolicyFn:
        register(
            Policy(
                name=fn.__name__,
                formula=formula,
                paper=paper,
                reads=frozenset(evidence),
                ranges=ranges,
                writes=weights,
                fn=fn,
                needed=needed,
                optional=optional,
                prepare=prepare,
            )
        )
        return fn

    return add


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    return (log_prob - old_log_prob).clamp(max=LOG_CAP).exp()


def checked_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The loss's parameters with defaults filled in; RecipeError at `path` for an unknown name or an illegal value."""
    if name == "kl_penalty_k1":
        raise RecipeError(path, K1_REMEDY)
    if name not in POLICIES:
        raise RecipeError(path, f"no policy loss is named {name!r}{nearest(name, POLICIES)}")
    return check_numbers(name, POLICIES[name].defaults, POLICIES[name].ranges, params=params, path=path)


def policy_loss(name: str, log_prob_N: Tensor, columns: Columns, **params: float) -> Tensor:
    """The loss `name` at every token: values [N], fp32 or better, differentiable in `log_prob_N` only.

    UserError for an unknown name or parameter, a value out of range, a column that is missing or of another shape.
    """
    values = checked_params(name, params, name)
    return POLICIES[name](log_prob_N, columns, values)
