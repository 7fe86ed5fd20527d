"""Rewards: what a finished response and its latent trajectory are worth.

Importing this package loads no torch: the two rewards on tensors load it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import future_l1_plugin.rewards.terms  # noqa: F401, registers the built-in terms
from future_l1_plugin.rewards.accuracy import accuracy
from future_l1_plugin.rewards.answer import extract_answer, option_letter
from future_l1_plugin.rewards.format import format_reward
from future_l1_plugin.rewards.registry import Sample, reward_term, term_names
from future_l1_plugin.rewards.reward_set import RewardSet
from future_l1_plugin.rewards.text import length_share, overlong, repetition

if TYPE_CHECKING:
    from future_l1_plugin.rewards.contrastive import outcome_contrastive, outcome_contrastive_groups
    from future_l1_plugin.rewards.diversity import mean_adjacent_cosine, temporal_diversity

_ON_TENSORS = {
    "outcome_contrastive": "contrastive",
    "outcome_contrastive_groups": "contrastive",
    "mean_adjacent_cosine": "diversity",
    "temporal_diversity": "diversity",
}

__all__ = [
    "RewardSet",
    "Sample",
    "accuracy",
    "extract_answer",
    "format_reward",
    "length_share",
    "mean_adjacent_cosine",
    "option_letter",
    "outcome_contrastive",
    "outcome_contrastive_groups",
    "overlong",
    "repetition",
    "reward_term",
    "temporal_diversity",
    "term_names",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TENSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_TENSORS[name]}"), name)
