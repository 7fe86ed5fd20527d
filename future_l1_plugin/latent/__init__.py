"""Latent spans: tokens, grammar, channel, policy, heads, loss. Pure torch: no I/O, no trainer, no host."""

from future_l1_plugin.latent.channel import LatentChannel
from future_l1_plugin.latent.going_on import continue_log_prob, continue_log_prob_at
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.latent.loss import latent_loss, pool_targets
from future_l1_plugin.latent.policy import build_policy, policy_names
from future_l1_plugin.latent.policy_base import Policy
from future_l1_plugin.latent.spans import SpanBudget, SpanMachine, SpanStep, spans_of
from future_l1_plugin.latent.tokens import LatentTokens, latent_mask, span_index

__all__ = [
    "LatentChannel",
    "LatentTokens",
    "Policy",
    "SpanBudget",
    "SpanMachine",
    "SpanStep",
    "build_head",
    "build_policy",
    "continue_log_prob",
    "continue_log_prob_at",
    "latent_loss",
    "latent_mask",
    "policy_names",
    "pool_targets",
    "span_index",
    "spans_of",
]
