"""Divergences between teacher p and student q over the vocabulary, per position, in nats.

A divergence is one function here, registered by its decorator. It returns its value and, in closed form, its gradient
with respect to the student's logits, so that the head needs no graph: of a loss D(q), that is q (g - sum q g) with
g = dD/dq. Logarithms of p and q are taken from log-softmax. Mixtures m are summed as probabilities and then clamped
above zero: where m underflows, both parts do, and so does all that it is multiplied with.

Every divergence but `logit_mse` also takes `temperature` T: T squared times the divergence of p_T and q_T.

Shapes: N or R positions, V outcomes (the vocabulary, or a few tokens and a bucket for the rest).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, least_of_mass
from limbeck.objectives.parameters import Range, checked, defaults_of
from limbeck.types import RecipeError, nearest

ValueAndGradient = tuple[Tensor, Tensor]
DivergenceFn = Callable[..., ValueAndGradient]
TEMPERATURE = Range(0, 1000, open_low=True)
SHARE = Range(0, 1)
TINY = 1e-37
SMALL_EXPONENT = 0.05
VANISHING = 1e-30  # below this a sum of probabilities has lost digits: take logarithms instead


@dataclass(frozen=True)
class Divergence:
    """A registered divergence: `fn(p, q, **params) -> (values_R, gradient_RV)`, p and q being `Distribution`s.

    `buckets` says whether it is meaningful on a teacher's top tokens with a bucket for the rest; `one_hot` whether it
    is finite where the teacher gives a token no probability; `targets` whether it reads the token that the text went on
    with; `sorts` that it compares probabilities by their rank, so that p and q may be over different vocabularies.
    """

    name: str
    fn: DivergenceFn
    formula: str
    paper: str
    ranges: dict[str, Range] = field(default_factory=dict)
    buckets: bool = True
    one_hot: bool = True
    targets: bool = False
    softens: bool = True
    sorts: bool = False

    @property
    def defaults(self) -> dict[str, float]:
        """The parameters and their defaults, read from the function's own signature."""
        return defaults_of(self.fn) | ({"temperature": 1.0} if self.softens else {})

    def __call__(
        self, p: Distribution, q: Distribution, params: Mapping[str, float], targets_R: Tensor | None = None
    ) -> ValueAndGradient:
        """Values [R] and their gradient for the student's logits [R, V]."""
        rest = dict(params)
        t = rest.pop("temperature", 1.0)
        extra = {"targets_R": targets_R} if self.targets else {}
        if p.logits_RV.dtype != q.logits_RV.dtype:
            p = Distribution(p.logits_RV.to(q.logits_RV.dtype))
        values_R, gradient_RV = self.fn(p.at(t), q.at(t), **extra, **rest)
        return (values_R, gradient_RV) if t == 1 else (t**2 * values_R, gradient_RV.mul_(t))


DIVERGENCES: dict[str, Divergence] = {}


def _register(
    formula: str,
    paper: str,
    *,
    buckets: bool = True,
    one_hot: bool = True,
    targets: bool = False,
    softens: bool = True,
    sorts: bool = False,
    **ranges: Range,
) -> Callable[[DivergenceFn], DivergenceFn]:
    def add(fn: DivergenceFn) -> DivergenceFn:
        legal = ranges | ({"temperature": TEMPERATURE} if softens else {})
        DIVERGENCES[fn.__name__] = Divergence(
            fn.__name__, fn, formula, paper, legal, buckets, one_hot, targets, softens, sorts
        )
        return fn

    return add


def _dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV * b_RV).sum(-1)


def _through_softmax(qg_RV: Tensor, q: Distribution) -> Tensor:
    """q (g - sum q g) from the product q g, which it overwrites."""
    return qg_RV.addcmul_(q.prob, qg_RV.sum(-1, keepdim=True), value=-1)


@_register("sum p log(p / q)", "Hinton et al., arXiv:1503.02531")
def forward_kl(p: Distribution, q: Distribution) -> ValueAndGradient:
    """KL(p || q): covers all that the teacher does. Gradient T (q_T - p_T).

    Limits: 0 iff q = p; with temperature to infinity, half the variance over the vocabulary of the logit difference.
    """
    return _dot(p.prob, p.log - q.log), q.prob - p.prob


@_register("sum q log(q / p)", "Gu et al., arXiv:2306.08543 (its per-token form)", one_hot=False)
def reverse_kl(p: Distribution, q: Distribution) -> ValueAndGradient:
    """KL(q || p): keeps to what the teacher does most. Gradient q (log(q / p) - KL) at T = 1.

    Not MiniLLM: that is the sequence-level divergence on the student's own text; this is one position's.
    """
    ratio_RV = q.log - p.log
    values_R = _dot(q.prob, ratio_RV)
    return values_R, q.prob * (ratio_RV - values_R[:, None])


@_register(
    "s KL(p || q) + (1-s) KL(q || p), s = forward_share",
    "Jeffreys; BitDistiller's CAKLD, arXiv:2402.10631, for a fixed s",
    one_hot=False,
    forward_share=SHARE,
)
def symmetric_kl(p: Distribution, q: Distribution, *, forward_share: float = 0.5) -> ValueAndGradient:
    """Both directions at once. Limits: 1 gives `forward_kl`, 0 `reverse_kl`."""
    return _blend(p, q, forward_share, 1 - forward_share)


def _blend(p: Distribution, q: Distribution, forward: Tensor | float, reverse: Tensor | float) -> ValueAndGradient:
    """f KL(p || q) + r KL(q || p) in few passes; the gradient is f (q - p) + r q (log(q/p) - KL(q || p))."""
    ratio_RV = q.log - p.log
    forward_R = -_dot(p.prob, ratio_RV)
    weighed_RV = q.prob * ratio_RV
    reverse_R = weighed_RV.sum(-1)
    a_R1, b_R1 = (
        torch.as_tensor(w, dtype=ratio_RV.dtype, device=ratio_RV.device).expand(len(ratio_RV))[:, None]
        for w in (forward, reverse)
    )
    gradient_RV = weighed_RV.mul_(b_R1).addcmul_(q.prob, a_R1 - b_R1 * reverse_R[:, None]).addcmul_(p.prob, -a_R1)
    return a_R1[:, 0] * forward_R + b_R1[:, 0] * reverse_R, gradient_RV


def _log_mixture(p: Distribution, q: Distribution, teacher_share: float) -> tuple[Tensor, Tensor]:
    """m = b p + (1-b) q and its logarithm, for 0 < b < 1."""
    m_RV = torch.lerp(q.prob, p.prob, teacher_share).clamp_min_(TINY)
    return m_RV, m_RV.log()


@_register(
    "b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q, b = teacher_share",
    "Agarwal et al., arXiv:2306.13649",
    teacher_share=Range(0, 1, open_low=True, open_high=True),
)
def jsd(p: Distribution, q: Distribution, *, teacher_share: float = 0.5) -> ValueAndGradient:
    """Generalised Jensen-Shannon divergence; b is the teacher's share of the mixture m and of the sum.

    Limits: at most ln 2 for b = 0.5; it vanishes like b FKL for b to 0 and like (1-b) RKL for b to 1, and with it the
    gradient (curvature b (1-b) at q = p), so the ends are refused: see `jsd_rescaled`.
    """
    b = teacher_share
    _, log_m_RV = _log_mixture(p, q, b)
    ratio_RV = q.log - log_m_RV
    student_R = _dot(q.prob, ratio_RV)
    values_R = b * _dot(p.prob, p.log - log_m_RV) + (1 - b) * student_R
    return values_R, (1 - b) * q.prob * (ratio_RV - student_R[:, None])


@_register(
    "JSD_b / (b (1-b)), b = teacher_share",
    "Agarwal et al., arXiv:2306.13649, divided by its curvature",
    teacher_share=SHARE,
)
def jsd_rescaled(p: Distribution, q: Distribution, *, teacher_share: float = 0.5) -> ValueAndGradient:
    """`jsd` with the same curvature at q = p for every b. Continuous at both ends: 0 gives forward KL, 1 reverse KL."""
    if teacher_share in (0, 1):
        return forward_kl(p, q) if teacher_share == 0 else reverse_kl(p, q)
    values_R, gradient_RV = jsd(p, q, teacher_share=teacher_share)
    scale = 1 / (teacher_share * (1 - teacher_share))
    return scale * values_R, gradient_RV.mul_(scale)


@_register("1/2 sum |p - q|", "Wen et al., arXiv:2307.15190")
def tvd(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Total variation distance. Bounded by 1; its square is at most half the forward KL (Pinsker). Not smooth at q =
    p."""
    difference_RV = q.prob - p.prob
    return 0.5 * difference_RV.abs().sum(-1), _through_softmax(0.5 * difference_RV.sign() * q.prob, q)


@_register("1/2 sum (sqrt p - sqrt q)^2", "Hellinger; the alpha = beta = 1/2 case of arXiv:2505.04560 up to a factor 4")
def hellinger(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Squared Hellinger distance, between 0 and 1; at most the total variation distance."""
    root_p_RV = p.prob.sqrt()
    root_q_RV = q.prob.sqrt()
    return 0.5 * (root_p_RV - root_q_RV).square().sum(-1), _through_softmax(-0.5 * root_p_RV * root_q_RV, q)


@_register("KL(p || a p + (1-a) q), a = alpha", "Ko et al. (DistiLLM), arXiv:2402.03898", alpha=SHARE)
def skew_kl(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """Forward KL to a mixture that contains some teacher, which bounds the gradient where q vanishes.

    Limits: alpha 0 is `forward_kl`, 1 is zero. Curvature (1-a)^2 at q = p.
    """
    if alpha == 0:
        return forward_kl(p, q)
    m_RV, log_m_RV = _log_mixture(p, q, alpha)
    return _dot(p.prob, p.log - log_m_RV), _through_softmax((alpha - 1) * p.prob * q.prob / m_RV, q)


@_register("KL(q || (1-a) p + a q), a = alpha", "Ko et al. (DistiLLM), arXiv:2402.03898", one_hot=False, alpha=SHARE)
def skew_reverse_kl(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """Reverse KL to a mixture that contains some student. Limits: alpha 0 is `reverse_kl`, 1 is zero."""
    if alpha == 0:
        return reverse_kl(p, q)
    m_RV, log_m_RV = _log_mixture(p, q, 1 - alpha)
    ratio_RV = q.log - log_m_RV
    return _dot(q.prob, ratio_RV), _through_softmax(q.prob * (ratio_RV - alpha * q.prob / m_RV), q)


@_register(
    "KL(q || sg[(1-a) p + a q]), a = alpha", "Ko et al. (DistiLLM-2), arXiv:2503.07067", one_hot=False, alpha=SHARE
)
def skew_reverse_kl_fixed(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """`skew_reverse_kl` with the mixture held fixed, as DistiLLM-2's published code has it: gradient q (log(q/m) -
    KL)."""
    if alpha == 0:
        return reverse_kl(p, q)
    ratio_RV = q.log - _log_mixture(p, q, 1 - alpha)[1]
    values_R = _dot(q.prob, ratio_RV)
    return values_R, q.prob * (ratio_RV - values_R[:, None])


@_register("KL(softmax((1-t) sg[z_q] + t z_p) || q)", "Shing et al. (TAID), arXiv:2501.16937", buckets=False, t=SHARE)
def taid(p: Distribution, q: Distribution, *, t: float = 0.4) -> ValueAndGradient:
    """Forward KL to a target between student and teacher, mixed as logits and held fixed. Give t a rising schedule.

    Limits: t = 1 is `forward_kl`; for t to 0 the gradient is t q (d - sum q d) with d = z_q - z_p.
    """
    return forward_kl(Distribution(torch.lerp(q.logits_RV, p.logits_RV, t)), q)


@_register(
    "w KL(p || q) + (1-w) KL(q || p), w = sg[g_head / (g_head + g_tail)]",
    "Wu et al. (AKL), arXiv:2404.02657",
    one_hot=False,
    mu=Range(0, 1, open_low=True, open_high=True),
)
def adaptive_kl(p: Distribution, q: Distribution, *, mu: float = 0.5) -> ValueAndGradient:
    """Forward and reverse KL weighed by where the student is wrong: g = sum |p - q| in the teacher's head and in its
    tail.

    The head is the smallest set of tokens with mass mu (with the token that crosses mu, and with all that tie with it,
    so that no order of the vocabulary matters). Weights are held fixed; equal models share them evenly. The authors'
    published snippet leaves the crossing token out; the paper's text, as we read it, does not.
    """
    least_R1 = least_of_mass(p.prob, mu)[:, None]
    gap_RV = (p.prob - q.prob).abs_()
    below_R1 = torch.nextafter(least_R1, torch.full_like(least_R1, -1))
    in_head_RV = (p.prob - below_R1).relu_().sign_()  # 1 where p >= least: arithmetic is twice as fast as a comparison
    all_R = gap_RV.sum(-1)
    head_R = _dot(in_head_RV, gap_RV)
    share_R = torch.where(all_R > 0, head_R / all_R.clamp_min(TINY), 0.5)
    return _blend(p, q, share_R, 1 - share_R)


@_register(
    "alpha KL(p_y || q_y) + beta KL(p_rest || q_rest), y = the target against all others, rest = among the others",
    "Zhao et al. (DKD), arXiv:2203.08679",
    buckets=False,
    one_hot=False,
    targets=True,
    alpha=Range(0, 100),
    beta=Range(0, 100),
)
def dkd(
    p: Distribution, q: Distribution, *, alpha: float = 1.0, beta: float = 0.5, targets_R: Tensor | None = None
) -> ValueAndGradient:
    """Decoupled KD: the binary KL of the target token and the KL among all other tokens, weighed apart.

    The target is the token that the text goes on with; where none is given, the teacher's most likely one.
    Identity: forward KL = binary KL + (1 - p_y) KL among the others. The paper's beta for images is 8; TAID's port
    for language takes 0.5, our default.
    """
    target_R1 = (p.prob.argmax(-1) if targets_R is None else targets_R)[:, None]
    p_hat_RV, log_rest_p = _others(p, target_R1)
    q_hat_RV, log_rest_q = _others(q, target_R1)
    p_y = p.prob.gather(-1, target_R1)
    q_y = q.prob.gather(-1, target_R1)
    rest = log_rest_p - log_rest_q
    binary = p_y * (p.log.gather(-1, target_R1) - q.log.gather(-1, target_R1)) + log_rest_p.exp() * rest
    among_R = _dot(p_hat_RV, p.log - q.log) - rest[:, 0]
    gradient_RV = alpha * (p_y - q_y) * q_hat_RV + beta * (q_hat_RV - p_hat_RV)
    gradient_RV.scatter_(-1, target_R1, alpha * (q_y - p_y))
    return alpha * binary[:, 0] + beta * among_R, gradient_RV


def _others(model: Distribution, target_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution among all tokens but the target, and the logarithm of their whole probability [R, 1]."""
    rest_RV = model.prob.scatter(-1, target_R1, 0)
    total_R1 = rest_RV.sum(-1, keepdim=True)
    if bool((total_R1 > VANISHING).all()):
        return rest_RV / total_R1, total_R1.log()
    among = Distribution(model.logits_RV.scatter(-1, target_R1, IMPOSSIBLE))
    return among.prob, among.logits_RV.logsumexp(-1, keepdim=True) - model.logits_RV.logsumexp(-1, keepdim=True)


@_register(
    "sum w p log(p/q) + (1-w) q log(q/p), w = sg[p / (p + q)]", "Jung et al. (ToDi), arXiv:2505.16297", one_hot=False
)
def todi(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Forward KL where the student gives a token too little, reverse KL where too much: w = sigmoid(log p/q), held
    fixed.

    The weight by the abstract; that it is held fixed is our reading.
    """
    ratio_RV = p.log - q.log
    w_RV = ratio_RV.sigmoid()
    wp_RV = w_RV * p.prob
    wq_RV = (1 - w_RV) * q.prob
    return _dot(wp_RV - wq_RV, ratio_RV), _through_softmax(wq_RV * (1 - ratio_RV) - wp_RV, q)


@_register(
    "-1/(ab) sum p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b), a = alpha, b = beta",
    "Wang et al. (ABKD), arXiv:2505.04560",
    one_hot=False,
    alpha=Range(0, 4),
    beta=Range(0, 4),
)
def alpha_beta(p: Distribution, q: Distribution, *, alpha: float = 0.2, beta: float = 0.7) -> ValueAndGradient:
    """Alpha-beta divergence. Limits: (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times `hellinger`."""
    a = alpha
    b = beta
    small = 0 < min(a or 1, b or 1) < SMALL_EXPONENT  # near a limit, half of fp32's digits cancel
    log_p_RV, log_q_RV = (p.log.double(), q.log.double()) if small else (p.log, q.log)
    q_ab_RV = ((a + b) * log_q_RV).exp_()
    p_ab_RV = ((a + b) * log_p_RV).exp_()
    mixed_RV = (a * log_p_RV).add_(log_q_RV, alpha=b).exp_()
    if a > 0 and b > 0:
        qg_RV = (q_ab_RV - mixed_RV).div_(a)
        values_R = p_ab_RV.mul_(a / (a + b)).add_(q_ab_RV, alpha=b / (a + b)).sub_(mixed_RV).sum(-1) / (a * b)
    else:
        ratio_RV = log_q_RV - log_p_RV
        qg_RV = q_ab_RV * ratio_RV if a == 0 else (q_ab_RV - mixed_RV) / a
        if a == 0 and b == 0:
            values_R = 0.5 * ratio_RV.square().sum(-1)
        elif b == 0:
            values_R = (-a * p_ab_RV * ratio_RV - p_ab_RV + q_ab_RV).sum(-1) / a**2
        else:
            values_R = (b * q_ab_RV * ratio_RV - q_ab_RV + p_ab_RV).sum(-1) / b**2
    return values_R.to(q.log.dtype), _through_softmax(qg_RV.to(q.log.dtype), q)


@_register(
    "1/2 Var_v(z_q - z_p), over the vocabulary",
    "the temperature limit in Hinton et al., arXiv:1503.02531",
    buckets=False,
    one_hot=False,
    softens=False,
)
def logit_mse(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Mean squared error of logits, each centred over the vocabulary (a shift of logits means nothing): `forward_kl` at
    infinite temperature. The same, up to a factor, as matching all pairwise differences of logits (arXiv:2509.25837).

    Columns that are masked in both models should be cut off, not masked: their difference counts as 0 here.
    """
    size = q.logits_RV.shape[-1]
    difference_RV = q.logits_RV - p.logits_RV
    centred_RV = difference_RV - difference_RV.sum(-1, keepdim=True) / size
    return 0.5 * centred_RV.square().sum(-1) / size, centred_RV / size


@_register(
    "KL(q || p) + w 1[H(p) > threshold] KL(p || q)",
    "Jin et al. (entropy-aware OPD), arXiv:2603.07079",
    buckets=False,
    one_hot=False,
    threshold=Range(0, 1000),
    forward_weight=Range(0, 1000),
)
def entropy_aware_kl(
    p: Distribution, q: Distribution, *, threshold: float = 0.8, forward_weight: float = 1.0
) -> ValueAndGradient:
    """Reverse KL, and forward KL beside it where the teacher has many ways to go on (entropy in nats above
    `threshold`).

    Limits: `reverse_kl` for a threshold above log V; the sum of both KLs (w = 1) at 0. That forward KL is added where
    the teacher's entropy is high is the paper's abstract; threshold and weight were not confirmed there.
    """
    forward_R = forward_weight * (-_dot(p.prob, p.log) > threshold).to(q.log.dtype)
    return _blend(p, q, forward_R, 1.0)


@_register(
    "sum_i |p_(i) - q_(i)|, probabilities in falling order",
    "Boizard et al. (ULD), arXiv:2402.12030",
    buckets=False,
    sorts=True,
)
def uld(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Sorted probabilities compared rank by rank, the shorter list filled with zeros: the two vocabularies may differ.

    At most 2. It is 0 for every permutation of p, too, so it says nothing of which token is meant: keep cross-entropy
    beside it.
    """
    return sorted_distance(p.prob, None, q)


def sorted_distance(p_RW: Tensor, ours_J: Tensor | None, q: Distribution) -> ValueAndGradient:
    """`uld` of non-negative numbers p [R, W] and the student's probabilities, of all tokens or of those with the ids
    `ours_J`."""
    own_RJ = q.prob if ours_J is None else q.prob[:, ours_J]
    ranked_RJ, order_RJ = own_RJ.sort(-1, descending=True)
    shared = min(p_RW.shape[-1], own_RJ.shape[-1])
    teacher_RJ = torch.zeros_like(ranked_RJ)
    teacher_RJ[:, :shared] = p_RW.topk(shared, -1).values
    beyond_R = (p_RW.sum(-1) - teacher_RJ.sum(-1)).clamp_min(0)  # the teacher's smaller ones, which stand against zeros
    difference_RJ = ranked_RJ - teacher_RJ
    slope_RJ = torch.zeros_like(own_RJ).scatter_(-1, order_RJ, difference_RJ.sign())
    slope_RV = slope_RJ if ours_J is None else torch.zeros_like(q.prob).index_copy_(-1, ours_J, slope_RJ)
    return difference_RJ.abs().sum(-1) + beyond_R, _through_softmax(slope_RV * q.prob, q)


def checked_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The divergence's parameters with defaults filled in.

    Raises:
        RecipeError: an unknown divergence or parameter, or a value outside its range; `path` says where it stood.
    """
    if name not in DIVERGENCES:
        raise RecipeError(path, f"no divergence is named {name!r}{nearest(name, DIVERGENCES)}")
    known = DIVERGENCES[name]
    return checked(name, known.defaults, known.ranges, params, path)
