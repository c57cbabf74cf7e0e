"""Forward and reverse Kullback-Leibler divergence: mixed, skewed, weighted, and between parts of the vocabulary.

Logarithms of p and q are taken from log-softmax. Mixtures m are summed as probabilities and then clamped above zero:
where m underflows, both parts do, and so does all that it is multiplied with. Every divergence also takes `temperature`
T: T squared times the divergence of p_T and q_T.

Shapes: R positions, V outcomes (the vocabulary, or a few tokens and a bucket for the rest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.distribution import IMPOSSIBLE, Distribution, ValueAndGradient, least_of_mass
from limbeck.objectives.divergence import TINY, dot, through_softmax
from limbeck.objectives.divergence_loss import SHARE, register_divergence
from limbeck.objectives.parameters import Range

VANISHING = 1e-30  # below this a sum of probabilities has lost digits: take logarithms instead


@register_divergence("sum p log(p / q)", "Hinton et al., arXiv:1503.02531", sampled=True)
def forward_kl(p: Distribution, q: Distribution) -> ValueAndGradient:
    """KL(p || q): covers all that the teacher does. Gradient T (q_T - p_T).

    Limits: 0 iff q = p; with temperature to infinity, half the variance over the vocabulary of the logit difference.
    """
    return dot(p.prob, p.log - q.log), q.prob - p.prob


@register_divergence("sum q log(q / p)", "Gu et al., arXiv:2306.08543 (its per-token form)", one_hot=False)
def reverse_kl(p: Distribution, q: Distribution) -> ValueAndGradient:
    """KL(q || p): keeps to what the teacher does most. Gradient q (log(q / p) - KL) at T = 1.

    Not MiniLLM: that is the sequence-level divergence on the student's own text; this is one position's.
    """
    ratio_RV = q.log - p.log
    values_R = dot(q.prob, ratio_RV)
    return values_R, q.prob * (ratio_RV - values_R[:, None])


@register_divergence(
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
    forward_R = -dot(p.prob, ratio_RV)
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


@register_divergence(
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
    student_R = dot(q.prob, ratio_RV)
    values_R = b * dot(p.prob, p.log - log_m_RV) + (1 - b) * student_R
    return values_R, (1 - b) * q.prob * (ratio_RV - student_R[:, None])


@register_divergence(
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


@register_divergence("KL(p || a p + (1-a) q), a = alpha", "Ko et al. (DistiLLM), arXiv:2402.03898", alpha=SHARE)
def skew_kl(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """Forward KL to a mixture that contains some teacher, which bounds the gradient where q vanishes.

    Limits: alpha 0 is `forward_kl`, 1 is zero. Curvature (1-a)^2 at q = p.
    """
    if alpha == 0:
        return forward_kl(p, q)
    m_RV, log_m_RV = _log_mixture(p, q, alpha)
    return dot(p.prob, p.log - log_m_RV), through_softmax((alpha - 1) * p.prob * q.prob / m_RV, q)


@register_divergence(
    "KL(q || (1-a) p + a q), a = alpha", "Ko et al. (DistiLLM), arXiv:2402.03898", one_hot=False, alpha=SHARE
)
def skew_reverse_kl(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """Reverse KL to a mixture that contains some student. Limits: alpha 0 is `reverse_kl`, 1 is zero."""
    if alpha == 0:
        return reverse_kl(p, q)
    m_RV, log_m_RV = _log_mixture(p, q, 1 - alpha)
    ratio_RV = q.log - log_m_RV
    return dot(q.prob, ratio_RV), through_softmax(q.prob * (ratio_RV - alpha * q.prob / m_RV), q)


@register_divergence(
    "KL(q || sg[(1-a) p + a q]), a = alpha", "Ko et al. (DistiLLM-2), arXiv:2503.07067", one_hot=False, alpha=SHARE
)
def skew_reverse_kl_fixed(p: Distribution, q: Distribution, *, alpha: float = 0.1) -> ValueAndGradient:
    """`skew_reverse_kl` with the mixture held fixed, as DistiLLM-2's published code has it: gradient q (log(q/m) -
    KL)."""
    if alpha == 0:
        return reverse_kl(p, q)
    ratio_RV = q.log - _log_mixture(p, q, 1 - alpha)[1]
    values_R = dot(q.prob, ratio_RV)
    return values_R, q.prob * (ratio_RV - values_R[:, None])


@register_divergence(
    "KL(softmax((1-t) sg[z_q] + t z_p) || q)", "Shing et al. (TAID), arXiv:2501.16937", buckets=False, t=SHARE
)
def taid(p: Distribution, q: Distribution, *, t: float = 0.4) -> ValueAndGradient:
    """Forward KL to a target between student and teacher, mixed as logits and held fixed. Give t a rising schedule.

    Limits: t = 1 is `forward_kl`; for t to 0 the gradient is t q (d - sum q d) with d = z_q - z_p.
    """
    return forward_kl(Distribution(torch.lerp(q.logits_RV, p.logits_RV, t)), q)


@register_divergence(
    "w KL(p || q) + (1-w) KL(q || p), w = sg[g_head / (g_head + g_tail)]",
    "Wu et al. (AKL), arXiv:2404.02657",
    one_hot=False,
    mu=Range(0, 1, open_low=True, open_high=True),
)
def adaptive_kl(p: Distribution, q: Distribution, *, mu: float = 0.5) -> ValueAndGradient:
    """Forward and reverse KL weighted by where the student is wrong: g = sum |p - q| in the teacher's head and tail.

    The head is the smallest set of tokens with mass mu (with the token that crosses mu, and with all that tie with it,
    so that no order of the vocabulary matters). Weights are held fixed; equal models share them evenly. The authors'
    published snippet leaves the crossing token out; the paper's text, as we read it, does not.
    """
    least_R1 = least_of_mass(p.prob, mu)[:, None]
    gap_RV = (p.prob - q.prob).abs_()
    below_R1 = torch.nextafter(least_R1, torch.full_like(least_R1, -1))
    in_head_RV = (p.prob - below_R1).relu_().sign_()  # 1 where p >= least: arithmetic is twice as fast as a comparison
    all_R = gap_RV.sum(-1)
    head_R = dot(in_head_RV, gap_RV)
    share_R = torch.where(all_R > 0, head_R / all_R.clamp_min(TINY), 0.5)
    return _blend(p, q, share_R, 1 - share_R)


@register_divergence(
    "sum w p log(p/q) + (1-w) q log(q/p), w = sg[p / (p + q)]", "Jung et al. (ToDi), arXiv:2505.16297", one_hot=False
)
def todi(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Forward KL where the student gives a token too little, reverse KL where too much: w = sigmoid(log p/q), fixed.

    The weight is the abstract's; that it has no gradient is our reading.
    """
    ratio_RV = p.log - q.log
    w_RV = ratio_RV.sigmoid()
    wp_RV = w_RV * p.prob
    wq_RV = (1 - w_RV) * q.prob
    return dot(wp_RV - wq_RV, ratio_RV), through_softmax(wq_RV * (1 - ratio_RV) - wp_RV, q)


@register_divergence(
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
    """Reverse KL, plus forward KL where the teacher has many ways to go on (its entropy in nats exceeds `threshold`).

    Limits: `reverse_kl` for a threshold above log V; the sum of both KLs (w = 1) at 0. That forward KL is added where
    the teacher's entropy is high is the paper's abstract; threshold and weight were not confirmed there.
    """
    forward_R = forward_weight * (-dot(p.prob, p.log) > threshold).to(q.log.dtype)
    return _blend(p, q, forward_R, 1.0)


@register_divergence(
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

    The target is the next token of the text; without targets it is the teacher's most likely token.
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
    among_R = dot(p_hat_RV, p.log - q.log) - rest[:, 0]
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
