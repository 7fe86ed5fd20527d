"""LA-DAPO: advantages, group filter, policy loss over tokens and latents. Pure tensor functions: no host, no I/O."""

from future_l1_plugin.la_dapo.actions import (
    LatentScoring,
    LossInputs,
    LossOutputs,
    action_log_probs,
    action_mask,
    kl_at_latents,
    split_actions,
)
from future_l1_plugin.la_dapo.advantage import group_advantage, la_dapo_advantage
from future_l1_plugin.la_dapo.correction import RolloutCorrection, angle_between, correction_weights
from future_l1_plugin.la_dapo.filter import keep_group
from future_l1_plugin.la_dapo.policy_loss import LaDapoLoss, policy_loss
from future_l1_plugin.la_dapo.rollout import Rollout, make_rollouts, rollout_log_probs
from future_l1_plugin.la_dapo.tempering import Tempering, latent_kl, latent_log_prob
from future_l1_plugin.latent.going_on import continue_log_prob, continue_log_prob_at

__all__ = [
    "LaDapoLoss",
    "LatentScoring",
    "LossInputs",
    "LossOutputs",
    "Rollout",
    "RolloutCorrection",
    "Tempering",
    "action_log_probs",
    "action_mask",
    "angle_between",
    "continue_log_prob",
    "continue_log_prob_at",
    "correction_weights",
    "group_advantage",
    "keep_group",
    "kl_at_latents",
    "la_dapo_advantage",
    "latent_kl",
    "latent_log_prob",
    "make_rollouts",
    "policy_loss",
    "rollout_log_probs",
    "split_actions",
]
