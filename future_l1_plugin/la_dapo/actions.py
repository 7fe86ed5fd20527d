"""The actions of a response: which positions are one, what log-probability they have, and what the loss asks of them.

A response of T ids holds two kinds of actions. Tokens that the model chose, `text`; and latents, under the ids
`<|latent|>` that were forced for them. Tokens forced by the grammar are not actions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.la_dapo.tempering import Tempering, latent_kl, latent_log_prob
from future_l1_plugin.latent.policy import build_policy
from future_l1_plugin.latent.policy_base import Policy


@dataclass(frozen=True)
class LatentScoring:
    """What a latent counts as an action: the density it was drawn from, and how that enters a ratio."""

    policy: Policy
    tempering: Tempering

    @classmethod
    def build(cls, policy: Mapping[str, Any], tempering: str | float) -> "LatentScoring":
        """From the keys of a recipe. Raises ConfigError as `build_policy` and `Tempering`."""
        return cls(build_policy(**policy), Tempering.from_name(tempering))

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        """`latent_log_prob`: float64 (K,) for mu, z (K, H), in nats, tempered."""
        return latent_log_prob(self.policy, mu, z, self.tempering)

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        """`latent_kl`: float64 (K,) for mu, mu_ref (K, H), in nats, tempered."""
        return latent_kl(self.policy, mu, mu_ref, self.tempering)


def action_mask(ids: Tensor, forced: Tensor, latent_id: int) -> Tensor:
    """Bool, the shape of `ids` Long and `forced` Bool: True at actions.

    An end marker that the budget forced is none; a latent is one, under the id that was forced for it.
    """
    return ~forced | (ids == latent_id)


def split_actions(ids: Tensor, actions: Tensor, latent_id: int) -> tuple[Tensor, Tensor]:
    """Masks Bool (text, latent), disjoint, of the shape of `ids` Long and `actions` (Bool, or 0 and 1)."""
    actions = actions.bool()
    latent = actions & (ids == latent_id)
    return actions & ~latent, latent


def action_log_probs(
    token_log_probs: Tensor, at: Tensor, scoring: LatentScoring, mu: Tensor, latents: Tensor, went_on: Tensor | None
) -> Tensor:
    """The log-probabilities of tokens, with those of latents in the places of the ids `<|latent|>`.

    The id itself was chosen by nobody. What was chosen is the latent and, where the span's budget leaves a choice, that
    the span went on.

    Args:
        token_log_probs: floating (..), log p(id).
        at: Bool, of the same shape, True at the K latents, in reading order.
        scoring: of the policy that drew them.
        mu: floating (K, H), the hidden states one position before the latents, with their graph.
        latents: floating (K, H), as recorded.
        went_on: floating (K,), log(1 - p(end)) (`continue_log_prob_at`); None with an exact budget.

    Returns:
        float64 (..), in nats: an untempered density is of the order of 1e4, where float32 resolves 1e-3.
    """
    chosen = scoring.log_prob(mu, latents.to(mu.device))
    if went_on is not None:
        chosen = chosen + went_on
    return token_log_probs.double().masked_scatter(at, chosen.double())


def kl_at_latents(like: Tensor, at: Tensor, scoring: LatentScoring, mu: Tensor, mu_ref: Tensor) -> Tensor:
    """`latent_kl` at the K positions of `at` (Bool, the shape of `like`), 0 elsewhere; mu, mu_ref floating (K, H)."""
    kl = torch.zeros_like(like)
    return kl.masked_scatter(at, scoring.kl(mu, mu_ref.to(mu.device))) if len(mu) else kl


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """A micro-batch for `policy_loss`: B responses of up to T ids. What stands outside the masks has no effect.

    Args:
        log_prob: floating (B, T), of the model being trained: `action_log_probs`.
        old_log_prob: floating (B, T), the same at the time of the rollout; counts as data.
        advantages: floating (B, T).
        text_mask: Bool (B, T), tokens that the model chose.
        latent_mask: Bool (B, T), positions with a latent; disjoint from text_mask.
        num_text: tokens in the text masks of the whole batch, over all micro-batches and ranks.
        num_latents: the same for latents. 0: the latent part is 0.
        ref_log_prob: floating (B, T), log p(token) of the reference; needed if kl_weight > 0.
        latent_kl: floating (B, T), `kl_at_latents`; needed if latent_kl_weight > 0 and the batch has latents.
        entropy: floating (B, T), of the token distributions, in nats; needed if entropy_weight > 0, else only reported.
        weights: floating (B, T), of each action's policy loss, clipped as it is: `correction.correction_weights`, where
            the rollout's policy is not the actor's. Count as data.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    text_mask: Tensor
    latent_mask: Tensor
    num_text: float
    num_latents: float
    ref_log_prob: Tensor | None = None
    latent_kl: Tensor | None = None
    entropy: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class LossOutputs:
    """What a micro-batch gives.

    loss: scalar, always attached to log_prob's graph. means: 0-d tensors without gradient, to be added over
    micro-batches and ranks; a mean over no action is 0. For x in text, latent:
        x/pg_loss          the policy loss, without its weight
        x/ratio            mean ratio
        x/clip_low         share of actions whose gradient the lower end of the clip range cuts (A < 0)
        x/clip_high        and the upper end (A > 0)
        x/dual_clip        share cut by the dual clip
        x/kl_old           mean of old_log_prob - log_prob, an estimate of KL(old || new); latents: tempered
        x/kl_ref           mean KL to the reference, if given
        text/entropy       mean entropy, if given
    maxima: text/ratio_gap and latent/ratio_gap, the largest |ratio - 1|; to be joined by the maximum.
    """

    loss: Tensor
    means: dict[str, Tensor]
    maxima: dict[str, Tensor]
