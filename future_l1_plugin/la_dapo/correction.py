"""What to do where the rollout's policy is not the actor's: truncated importance weights for tokens and latents.

Rollouts are drawn by an inference engine whose numbers differ from the actor's: other kernels, other roundings, in
bfloat16 by 1e-2 nats per token and more. The policy gradient is an expectation under the actor at the time of the
rollout ("old"), so each action is weighted by what truncated importance sampling (TIS; Yao et al. 2025, "Your Efficient
RL Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl; for V-trace's
rho, arXiv 1802.01561) leaves of its ratio:

    w = min(r, upper)                          r = p_old(a) / p_rollout(a)
    w = r if lower <= r <= upper, else 0       with a lower bound (IcePop)

r is cut to e^+-20 first. For text this is verl's `rollout_is: token`, constants included.

At a latent, log-probabilities are tempered (`tempering`): r = exp(beta (log p_old(z) - log p_rollout(z))), times the
ratio of going on with the span where the model had that choice. With the loss's own ratio it makes one tempered ratio
of the trained policy to the rollout's: (p_new / p_old)^beta (p_old / p_rollout)^beta. Tokens and latents share the
bounds: both are ratios that would be 1 if the engines agreed. A tempered one reaches a bound of 2 only where the
densities differ by log(2) / beta nats (44 with sqrt_dim at H = 4096), that is where two engines do not compute the same
thing; untempered, 0.01 rad between their means carries one in eight over it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo.policy_loss import MAX_LOG_RATIO


@dataclass(frozen=True)
class RolloutCorrection:
    """How importance weights are truncated.

    Args:
        upper: greatest weight; above 0.
        lower: None: smaller ratios count as they are. Otherwise in (0, upper], and ratios outside of the two weigh 0.
        normalize: divide by the mean weight, of text and latents apart.

    Raises:
        ConfigError: a bound outside its range.
    """

    upper: float = 2.0
    lower: float | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.upper < math.inf:
            raise ConfigError(f"rollout correction: expected an upper bound above 0, found {self.upper}")
        if self.lower is not None and not 0 < self.lower <= self.upper:
            raise ConfigError(f"rollout correction: expected a lower bound in (0, {self.upper}], found {self.lower}")


def correction_weights(
    settings: RolloutCorrection, old_log_prob: Tensor, rollout_log_prob: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The weight of each action of one kind, tokens or latents, for `policy_loss`.

    Args:
        settings: bounds.
        old_log_prob: floating (..), the actor's log-probabilities before the update, at latents tempered.
        rollout_log_prob: floating (..), the rollout's of the same actions.
        mask: Bool (..), the actions of this kind. What stands outside, NaN included, has no effect.

    Returns:
        (weights, statistics). weights: (..) in the wider of the two dtypes, at least float32, without gradient, 0
        outside the mask. statistics: `mean` of the weights before they are normalised, `truncated`: the share of ratios
        that a bound changed. Both are over the mask; empty if there is nothing in it.

    Raises:
        ValueError: shapes that differ.
    """
    if not old_log_prob.shape == rollout_log_prob.shape == mask.shape:
        raise ValueError(
            f"rollout correction: expected one shape, found {tuple(old_log_prob.shape)} (old_log_prob), "
            f"{tuple(rollout_log_prob.shape)} (rollout_log_prob), {tuple(mask.shape)} (mask)"
        )
    dtype = torch.promote_types(torch.promote_types(old_log_prob.dtype, rollout_log_prob.dtype), torch.float32)
    gap = old_log_prob.detach().to(dtype) - rollout_log_prob.detach().to(dtype)
    ratio = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    changed = ratio > settings.upper
    weights = ratio.clamp(max=settings.upper)
    if settings.lower is not None:
        changed |= ratio < settings.lower
        weights = torch.where(changed, 0.0, ratio)
    weights = torch.where(mask, weights, 0.0)
    if not bool(mask.any()):
        return weights, {}
    mean = weights[mask].mean()
    if settings.normalize and mean > 1e-8:  # else all of them were cut: left as they are
        weights = weights / mean
    return weights, {"mean": float(mean), "truncated": float(changed[mask].to(dtype).mean())}


def angle_between(mu: Tensor, other: Tensor) -> Tensor:
    """Radians between two means, (N, H) each, floating: how far rollout and actor disagree on where a latent belongs.

    Returns float32 (N,), in [0, pi], exact for small angles (arccos would not see one below 3e-4 in float32).
    """
    mu, other = (normalize(mean.detach().float(), dim=1) for mean in (mu, other))
    return 2 * torch.atan2((mu - other).norm(dim=1), (mu + other).norm(dim=1))
