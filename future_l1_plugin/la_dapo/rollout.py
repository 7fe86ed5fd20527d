"""The log-probabilities that a rollout reports, written once for every way of decoding."""

from torch import Tensor

from future_l1_plugin.la_dapo.tempering import Tempering, latent_log_prob
from future_l1_plugin.latent.policy_base import Policy


def rollout_log_probs(
    ids: Tensor,
    logprobs: Tensor,
    latents: Tensor,
    means: Tensor,
    end_logprobs: Tensor | None,
    *,
    latent_id: int,
    policy: Policy,
    tempering: Tempering,
) -> Tensor:
    """Of every action in a response, or in several that are concatenated: T ids, k of them latents.

        text            as given
        `<|latent|>`    tempered log-density of z, plus log(1 - p(end)) where the budget leaves that choice
        forced markers  as given: 0

    Args:
        ids: Long (T,).
        logprobs: floating (T,), of the ids; what stands at latents is not used.
        latents, means: floating (k, H): z as fed, and the mu around which each was drawn.
        end_logprobs: floating (k,), log p(`<|latent_end|>`) where each latent was chosen; None with an exact budget.

    Returns:
        float64 (T,), in nats: float32 would lose 1e-3 of an untempered density of 1e4.
    """
    density = latent_log_prob(policy, means, latents, tempering)
    if end_logprobs is not None:  # the model could have ended the span at each of these positions, and went on
        density = density + (-end_logprobs.double().expm1()).log()
    return logprobs.double().masked_scatter(ids == latent_id, density)
