"""LA-DAPO: advantages, group filter, policy loss over tokens and latents. Pure tensor functions: no host, no I/O."""

from future_l1_plugin.la_dapo.advantage import group_advantage, la_dapo_advantage
from future_l1_plugin.la_dapo.correction import RolloutCorrection, angle_between, correction_weights
from future_l1_plugin.la_dapo.filter import keep_group
from future_l1_plugin.la_dapo.policy_loss import LaDapoLoss, policy_loss
from future_l1_plugin.la_dapo.rollout import rollout_log_probs
from future_l1_plugin.la_dapo.tempering import Tempering, latent_kl, latent_log_prob
from future_l1_plugin.latent.going_on import continue_log_prob, continue_log_prob_at

__all__ = [
    "LaDapoLoss",
    "RolloutCorrection",
    "Tempering",
    "angle_between",
    "continue_log_prob",
    "continue_log_prob_at",
    "correction_weights",
    "group_advantage",
    "keep_group",
    "la_dapo_advantage",
    "latent_kl",
    "latent_log_prob",
    "policy_loss",
    "rollout_log_probs",
]
