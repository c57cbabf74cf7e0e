"""Policy gradients: losses on the log-probability of tokens that were sampled, one value per token.

Autograd does not see the sampling: a gradient here is right only in expectation over the writer that `columns` tell
of, and each docstring says which gradient that is. Statistics that span tokens or samples (advantages, returns,
whitening, length weights) belong before the step is cut into micro-batches; they carry no gradient. A temperature
other than 1 or a top-p below 1 is another writer: without its log-probabilities the expectations below do not hold.

Shapes: N response tokens, B rows, T positions, G prompts, K samples of a prompt, V vocabulary. q is the student now,
p the teacher, log q(y) the value at the sampled token. Everything is fp32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from limbeck.objectives.parameters import Range, checked, defaults_of
from limbeck.objectives.precision import full_precision
from limbeck.types import RecipeError, UserError, nearest

Columns = Mapping[str, Tensor]
SWITCH = Range(0, 1)
# log-ratios are held below this before exp, so that fp32 stays finite; a token held there has no gradient
LOG_CAP = 20.0
K1_REMEDY = (
    "k1 = log q - log p differentiated on sampled tokens trains nothing on average (its expected gradient is 0); use"
    " k2, whose gradient is the reverse KL's, or the loss on_policy_distillation"
)


@dataclass(frozen=True)
class Responses:
    """The whole responses of a step that the student wrote, [B, T], 0 where `mask_BT` is: the log-probability of each
    token under the student that wrote it, under what it was drawn from (another temperature, a mixture), and under the
    teacher."""

    log_prob_BT: Tensor
    sampler_log_prob_BT: Tensor
    teacher_log_prob_BT: Tensor
    mask_BT: Tensor


Prepare = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Policy:
    """A registered loss: `fn(log_prob_N, columns, **params) -> values_N`. It reads `reads`, and `optional` where
    written.

    `prepare(responses, **params)` makes those of its columns that span a response, before the step is cut into
    micro-batches.
    """

    name: str
    fn: Callable[..., Tensor]
    formula: str
    paper: str
    reads: tuple[str, ...]
    optional: tuple[str, ...] = ()
    prepare: Prepare | None = None
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, float]:
        return defaults_of(self.fn) | (defaults_of(self.prepare) if self.prepare else {})

    def columns(self, responses: Responses, params: Mapping[str, float]) -> dict[str, Tensor]:
        """The columns [B, T] that it makes of whole responses."""
        if self.prepare is None:
            return {}
        return self.prepare(responses, **{name: params[name] for name in defaults_of(self.prepare)})

    def __call__(self, log_prob_N: Tensor, columns: Columns, params: Mapping[str, float]) -> Tensor:
        """Values [N], from parameters that are checked already and columns that are checked here."""
        for column in self.reads:
            if column not in columns:
                raise UserError(
                    f"{self.name} reads the column {column!r}; the rollout wrote only:"
                    f" {', '.join(sorted(columns)) or 'none'}"
                )
        read = {c: full_precision(columns[c]) for c in self.reads + self.optional if c in columns}
        for column, tensor in read.items():
            if tensor.shape != log_prob_N.shape:
                raise UserError(
                    f"{self.name}: {column!r} is {tuple(tensor.shape)}, the tokens are {tuple(log_prob_N.shape)}"
                )
        return self.fn(full_precision(log_prob_N), read, **{name: params[name] for name in defaults_of(self.fn)})


POLICIES: dict[str, Policy] = {}


def _register(
    formula: str,
    paper: str,
    reads: tuple[str, ...],
    optional: tuple[str, ...] = (),
    prepare: Prepare | None = None,
    **ranges: Range,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        POLICIES[fn.__name__] = Policy(fn.__name__, fn, formula, paper, reads, optional, prepare, ranges)
        return fn

    return add


def _ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    return (log_prob - old_log_prob).clamp(max=LOG_CAP).exp()


@_register("-A log q(y)", "Williams 1992, doi:10.1007/BF00992696", ("advantage",))
def reinforce(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: that of -E_q[A]. Samples of an older student make it biased: use `ppo_clip`
    there."""
    return -columns["advantage"].detach() * log_prob_N


@_register(
    "-min(r A, clip(r, 1 - low, 1 + high) A), r = q(y) / q_old(y)",
    "Schulman et al., arXiv:1707.06347",
    ("advantage", "old_log_prob"),
    clip_low=Range(0, 1, open_low=True),
    clip_high=Range(0, 1000, open_low=True),
)
def ppo_clip(log_prob_N: Tensor, columns: Columns, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """The gradient is reinforce's at r = 1, and 0 where A > 0 and r > 1 + high or A < 0 and r < 1 - low.

    No dual clip (A < 0, r large). With MiniLLM's mixture as the old student this is the clipped loss of its code.
    """
    advantage_N = columns["advantage"].detach()
    ratio_N = _ratio(log_prob_N, columns["old_log_prob"].detach())
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)


@_register(
    "-r A, A = -c (log q(y) - log p(y)) held fixed, r = q(y) / q_old(y)",
    "Thinking Machines, On-Policy Distillation, October 2025",
    ("teacher_log_prob",),
    ("old_log_prob",),
    coefficient=Range(0, 1000),
)
def on_policy_distillation(log_prob_N: Tensor, columns: Columns, *, coefficient: float = 1.0) -> Tensor:
    """Expected gradient at a prefix: c times that of KL(q || p), exactly; over y ~ q, or y ~ q_old with `old_log_prob`.

    The effect of a token on later prefixes is not credited: that is `minillm_long`. The value at r = 1 is c (log q -
    log p), the k1 estimate of the divergence. A uses today's q, where the tinker cookbook uses q_old: alike until q has
    moved.
    """
    fixed_N = log_prob_N.detach()
    ratio_N = _ratio(log_prob_N, columns.get("old_log_prob", fixed_N).detach())
    return coefficient * (fixed_N - columns["teacher_log_prob"].detach()) * ratio_N


def importance_weights(
    log_prob_BT: Tensor, sampler_log_prob_BT: Tensor, mask_BT: Tensor, mode: str = "token"
) -> Tensor:
    """q / sampler at each response token, 0 elsewhere, without gradient. Padding on either side.

    token   the current token alone: MiniLLM's approximation. Little variance, but biased: prefixes keep the sampler's
            rate, and on the single-step term it is no weight at all, since it averages to 1 over the token.
    prefix  the product over the response up to and including the token (the paper before it approximates). Unbiased for
            what depends on these tokens only, such as the single-step term; for the long term the future must be
            weighted
            too: give the token weights to `minillm_returns`. Its variance grows exponentially with the length.

    Log-weights above 20 are held at 20.
    """
    if mode not in ("token", "prefix"):
        raise UserError(f"no importance weight is named {mode!r}; legal: token, prefix")
    mask_BT = mask_BT.bool()
    log_ratio_BT = torch.where(
        mask_BT, full_precision(log_prob_BT.detach()) - full_precision(sampler_log_prob_BT.detach()), 0.0
    )
    log_weight_BT = log_ratio_BT.cumsum(1) if mode == "prefix" else log_ratio_BT
    return torch.where(mask_BT, log_weight_BT.clamp(max=LOG_CAP).exp(), 0.0)


@dataclass(frozen=True)
class ReturnForm:
    """How MiniLLM's returns are made: divide by `reward_scale`, clip, sum, divide by the count if `length_norm`,
    whiten."""

    own_token: bool = False
    gamma: float = 1.0
    length_norm: bool = True
    reward_scale: float = 1.0
    clip: float = math.inf
    whiten: bool = False


RETURN_FORMS = {
    "paper": ReturnForm(),
    "code": ReturnForm(own_token=True, gamma=0.95, reward_scale=0.5, clip=100.0, whiten=True),
}


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and (population) variance 1 over the response tokens only; 0 elsewhere."""
    mask_BT = mask_BT.bool()
    values_BT = torch.where(mask_BT, full_precision(values_BT.detach()), 0.0)
    count = mask_BT.sum().clamp(min=1)
    centred_BT = torch.where(mask_BT, values_BT - values_BT.sum() / count, 0.0)
    return centred_BT * torch.rsqrt(centred_BT.square().sum() / count + 1e-8)


def minillm_returns(
    log_ratio_BT: Tensor, mask_BT: Tensor, form: str | ReturnForm = "paper", *, token_weight_BT: Tensor | None = None
) -> Tensor:
    """R_t from rewards r_t = log p(y_t) - log q(y_t), without gradient, 0 where masked: the advantage of
    `minillm_long`.

        paper  R_t = sum_{t' > t} gamma^(t'-t) r_t' / (number of terms), gamma 1: the single-step term covers r_t
        code   R_t = sum_{t' >= t} gamma^(t'-t) r_t' / (number of terms), gamma 0.95, r / 0.5 clipped to +-100, whitened

    Change a part with `dataclasses.replace(RETURN_FORMS["paper"], length_norm=False)`: with that, y ~ q and the
    single-step term, the expected gradient is exactly the sequence-level reverse KL's. Length normalisation, gamma < 1,
    the clip and whitening each change it. The code form beside the single-step term counts r_t twice, as their code
    does. Masked positions are skipped: padding on either side or inside changes nothing. `token_weight_BT`
    (`importance_weights`, mode token) weights each later reward by the tokens up to it: with prefix weights the
    expectation is then exact under any sampler. The sum is a backward recursion.
    """
    if isinstance(form, str) and form not in RETURN_FORMS:
        raise UserError(f"no form of MiniLLM's returns is named {form!r}{nearest(form, RETURN_FORMS)}")
    how, mask_BT = RETURN_FORMS[form] if isinstance(form, str) else form, mask_BT.bool()
    reward_BT = torch.where(mask_BT, full_precision(log_ratio_BT.detach()) / how.reward_scale, 0.0).clamp(
        -how.clip, how.clip
    )
    weight_BT = torch.ones_like(reward_BT) if token_weight_BT is None else full_precision(token_weight_BT.detach())
    sum_BT = torch.zeros_like(reward_BT)
    total_B = torch.zeros_like(reward_BT[:, 0])
    for t in reversed(range(reward_BT.shape[1])):
        future_B = how.gamma * total_B
        sum_BT[:, t] = future_B + reward_BT[:, t] if how.own_token else future_B
        total_B = torch.where(mask_BT[:, t], weight_BT[:, t] * (reward_BT[:, t] + future_B), total_B)
    if how.length_norm:
        terms_BT = mask_BT.flip(1).cumsum(1).flip(1) - (0 if how.own_token else mask_BT.long())
        sum_BT = sum_BT / terms_BT.clamp(min=1)
    sum_BT = torch.where(mask_BT, sum_BT, 0.0)
    return whiten(sum_BT, mask_BT) if how.whiten else sum_BT


def _minillm_columns(
    responses: Responses,
    *,
    gamma: float = 1.0,
    own_token: float = 0.0,
    length_norm: float = 1.0,
    reward_scale: float = 1.0,
    clip: float = 1e6,
    whiten: float = 0.0,
) -> dict[str, Tensor]:
    form = ReturnForm(bool(own_token), gamma, bool(length_norm), reward_scale, clip, bool(whiten))
    log_ratio_BT = responses.teacher_log_prob_BT - responses.log_prob_BT
    weight_BT = importance_weights(responses.log_prob_BT, responses.sampler_log_prob_BT, responses.mask_BT)
    return {"advantage": minillm_returns(log_ratio_BT, responses.mask_BT, form), "importance_weight": weight_BT}


@_register(
    "-w A log q(y)",
    "Gu et al., arXiv:2306.08543 (its long term)",
    ("advantage", "importance_weight"),
    prepare=_minillm_columns,
    gamma=Range(0, 1),
    own_token=SWITCH,
    length_norm=SWITCH,
    reward_scale=Range(0, 1000, open_low=True),
    clip=Range(0, 1e6, open_low=True),
    whiten=SWITCH,
)
def minillm_long(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """MiniLLM's long term: reinforce on `minillm_returns` as advantage, weighted by `importance_weights`.

    With the "paper" form (the defaults) add `reverse_kl` per token, weighted by w as well: the single-step term. The
    other parameters are those of `ReturnForm`; switches are 0 or 1.
    """
    return columns["importance_weight"].detach() * reinforce(log_prob_N, columns)


def _position_weights(responses: Responses, *, boost: float = 0.5) -> dict[str, Tensor]:
    gap_BT = torch.where(responses.mask_BT.bool(), responses.log_prob_BT - responses.teacher_log_prob_BT, 0.0).abs()
    before_BT = gap_BT.cumsum(1) - gap_BT
    share_BT = before_BT / gap_BT.sum(1, keepdim=True).clamp(min=1e-12)
    return {"position_weight": torch.where(responses.mask_BT.bool(), 1 + boost * (1 - share_BT), 0.0)}


@_register(
    "-w r A, A as in on_policy_distillation, w = 1 + boost (1 - sum of |A| before the token / sum of |A|)",
    "Xie et al., arXiv:2606.22600 (IW-OPD)",
    ("teacher_log_prob", "position_weight"),
    ("old_log_prob",),
    prepare=_position_weights,
    coefficient=Range(0, 1000),
    boost=Range(0, 1000),
)
def iw_on_policy_distillation(log_prob_N: Tensor, columns: Columns, *, coefficient: float = 1.0) -> Tensor:
    """`on_policy_distillation` with more weight on early tokens: 1 + boost at the first, 1 where all of the gap lies
    behind.

    Limit: on_policy_distillation with boost 0. The weight's form was taken from a reading of its implementation in TRL,
    not confirmed in the paper.
    """
    return columns["position_weight"].detach() * on_policy_distillation(log_prob_N, columns, coefficient=coefficient)


def _k1_k2_k3(log_prob_N: Tensor, reference_N: Tensor, estimator: str) -> Tensor:
    if estimator not in ("k1", "k2", "k3"):
        raise UserError(f"no KL estimator is named {estimator!r}; legal: k1, k2, k3")
    log_ratio_N = full_precision(log_prob_N) - full_precision(reference_N).detach()
    if estimator == "k1":
        return log_ratio_N
    if estimator == "k2":
        return 0.5 * log_ratio_N.square()
    back_N = (-log_ratio_N).clamp(max=LOG_CAP)
    return torch.expm1(back_N) - back_N


def kl_estimate(log_prob_N: Tensor, reference_log_prob_N: Tensor, estimator: str = "k1") -> Tensor:
    """KL(q || p) estimated from y ~ q, as values without gradient: to show, or to subtract from a reward.

    With d = log q - log p: k1 = d, unbiased, of either sign. k2 = d^2 / 2, biased, never negative. k3 = exp(-d) - 1 +
    d, unbiased, never negative (Schulman 2020, "Approximating KL divergence").
    """
    return _k1_k2_k3(log_prob_N, reference_log_prob_N, estimator).detach()


def kl_penalty(log_prob_N: Tensor, reference_log_prob_N: Tensor, estimator: str = "k2") -> Tensor:
    """The same as a loss. What its gradient is in expectation over y ~ q has little to do with how good the value is.

    k1: exactly 0, hence refused. k2: the gradient of KL(q || p), exactly. k3: that of KL(p || q), in logits q - p.
    Samples of an older student are not corrected for. UserError for k1 or an unknown estimator.
    """
    if estimator == "k1":
        raise UserError(f"kl_penalty: {K1_REMEDY}")
    return _k1_k2_k3(log_prob_N, reference_log_prob_N, estimator)


@_register("(log q(y) - log p(y))^2 / 2", "Schulman 2020, Approximating KL divergence", ("reference_log_prob",))
def kl_penalty_k2(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: that of KL(q || reference). See `kl_penalty`."""
    return kl_penalty(log_prob_N, columns["reference_log_prob"], "k2")


@_register(
    "p(y) / q(y) - 1 - log(p(y) / q(y))", "Shao et al., arXiv:2402.03300 (GRPO's penalty)", ("reference_log_prob",)
)
def kl_penalty_k3(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: that of KL(reference || q), not of the KL(q || reference) it estimates."""
    return kl_penalty(log_prob_N, columns["reference_log_prob"], "k3")


def checked_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The loss's parameters with defaults filled in, or a RecipeError that says at which `path` of the recipe it is
    wrong."""
    if name == "kl_penalty_k1":
        raise RecipeError(path, K1_REMEDY)
    if name not in POLICIES:
        raise RecipeError(path, f"no policy loss is named {name!r}{nearest(name, POLICIES)}")
    return checked(name, POLICIES[name].defaults, POLICIES[name].ranges, params, path)


def policy_loss(name: str, log_prob_N: Tensor, columns: Columns, **params: float) -> Tensor:
    """The loss `name` at every token: values [N], fp32 or better, differentiable in `log_prob_N` only.

    UserError for an unknown name or parameter, a value out of range, a column that is missing or of another shape.
    """
    values = checked_params(name, params, name)
    return POLICIES[name](log_prob_N, columns, values)


def _groups(reward_GK: Tensor, present_GK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards with 0 where absent, who is present, and how many of each group, [G, 1]."""
    reward_GK = full_precision(reward_GK.detach() if reward_GK.is_floating_point() else reward_GK.float())
    present_GK = torch.ones_like(reward_GK, dtype=torch.bool) if present_GK is None else present_GK.bool()
    if reward_GK.ndim != 2 or reward_GK.shape[1] < 2 or present_GK.shape != reward_GK.shape:
        raise UserError(
            f"rewards must be [prompts, samples] with at least 2 samples of each prompt; got {tuple(reward_GK.shape)}"
        )
    if not torch.isfinite(reward_GK[present_GK]).all():
        raise UserError("a reward is not finite; mark a sample without a verdict as absent in `present`")
    return torch.where(present_GK, reward_GK, 0.0), present_GK, present_GK.sum(1, keepdim=True)


def rloo(reward_GK: Tensor, present_GK: Tensor | None = None) -> Tensor:
    """r_i minus the mean of the other samples of its prompt: unbiased, and each group sums to 0 (arXiv:2402.14740).

    An absent sample gets 0, and so does one left alone in its group, since nothing can be compared with it. UserError
    for fewer than 2 samples of a prompt, or a reward that is not finite.
    """
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK)
    others_GK = (reward_GK.sum(1, keepdim=True) - reward_GK) / (count_G1 - 1).clamp(min=1)
    return torch.where(present_GK & (count_G1 > 1), reward_GK - others_GK, 0.0)


def grpo(
    reward_GK: Tensor, present_GK: Tensor | None = None, *, scale_std: bool = True, eps: float = 1e-4
) -> tuple[Tensor, int]:
    """(r - group mean) / (group std + eps), or r - group mean when `scale_std` is False (Dr. GRPO, arXiv:2503.20783).

    Returns the advantages, and the number of groups whose rewards are all equal: they give exactly 0 and teach nothing.
    arXiv:2402.03300 writes std(r) and no more. This is the sample deviation (K - 1), which PyTorch's default made the
    usual one, so that learning rates carry over; the population's would give advantages sqrt(K / (K - 1)) larger.
    UserError as for `rloo`.
    """
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK)
    low_G1 = reward_GK.masked_fill(~present_GK, math.inf).amin(1, keepdim=True)
    high_G1 = reward_GK.masked_fill(~present_GK, -math.inf).amax(1, keepdim=True)
    equal_G1 = low_G1 >= high_G1
    centred_GK = torch.where(
        present_GK & ~equal_G1, reward_GK - reward_GK.sum(1, keepdim=True) / count_G1.clamp(min=1), 0.0
    )
    if scale_std:
        variance_G1 = centred_GK.square().sum(1, keepdim=True) / (count_G1 - 1).clamp(min=1)
        centred_GK = centred_GK / (variance_G1.sqrt() + eps)
    return centred_GK, int((equal_G1 & (count_G1 > 0)).sum())


def length_weights(length_GK: Tensor, mode: str, *, constant: float | None = None) -> Tensor:
    """What multiplies each sample's advantage, where the loop sums over tokens and divides by their number n = sum |o|.

    With b samples of length > 0:
        token     1               every token counts the same (the loop as it is; DAPO, arXiv:2503.14476)
        sequence  n / (b |o_i|)   every sample counts the same: GRPO's 1 / |o_i|; long wrong answers are punished less
        per token constant  n / (b C)       the sum over tokens of each sample over a constant C, such as the longest
        allowed (Dr. GRPO)

    `length_GK` holds all samples of the step. The first two could weigh tokens in the loop as well (they sum to n); the
    third could not: dividing by the weights undoes a common factor. UserError for an unknown mode, no token, no
    `constant`.
    """
    if mode not in ("token", "sequence", "constant"):
        raise UserError(f"no length mode is named {mode!r}; legal: token, sequence, constant")
    if mode == "constant" and (constant is None or constant <= 0):
        raise UserError("mode 'constant' needs a constant above 0, such as the largest number of tokens of a response")
    there_GK, length_GK = length_GK > 0, length_GK.double()
    if not there_GK.any():
        raise UserError("no sample has a token: there is nothing to weigh")
    average = length_GK.sum() / there_GK.sum()
    over = {"token": average, "sequence": length_GK.clamp(min=1), "constant": average.new_tensor(constant or 1.0)}[mode]
    return torch.where(there_GK, average / over, 0.0).float()


def teacher_mixed(teacher_logits: Tensor, student_logits: Tensor, alpha: float = 0.2) -> Tensor:
    """log(alpha p + (1 - alpha) q) over the last dimension, without gradient: MiniLLM samples its text from this.

    0.2 is the paper's alpha. Limits: log q at alpha 0, log p at 1. UserError for alpha outside [0, 1] or unlike shapes.
    """
    alpha = Range(0, 1).check("alpha", alpha)
    if teacher_logits.shape != student_logits.shape:
        raise UserError(
            f"teacher and student logits differ in shape: {tuple(teacher_logits.shape)} and"
            f" {tuple(student_logits.shape)}"
        )
    log_p, log_q = (log_softmax(full_precision(x.detach()), dim=-1) for x in (teacher_logits, student_logits))
    log_alpha = math.log(alpha) if alpha else -math.inf
    return torch.logaddexp(log_p + log_alpha, log_q + (math.log1p(-alpha) if alpha < 1 else -math.inf))
