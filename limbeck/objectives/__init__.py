"""Losses on tensors. Importing any part of this package imports the files below, which register all losses by name."""

from limbeck.objectives import (
    attention,
    consistency,
    contrast,
    distances,
    dual,
    hidden,
    kl,
    on_policy,
    preference,
    reference_free,
    reward_model,
    rewards,
    supervised,
)

__all__ = [
    "attention",
    "consistency",
    "contrast",
    "distances",
    "dual",
    "hidden",
    "kl",
    "on_policy",
    "preference",
    "reference_free",
    "reward_model",
    "rewards",
    "supervised",
]
