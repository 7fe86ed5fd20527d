"""Rollouts of what transformers decoded, for the hosts whose engine that is."""

from future_l1_plugin.la_dapo import LatentScoring, Rollout, make_rollouts
from future_l1_plugin.model import LatentConfig, LatentOutput


def rollouts_of(output: LatentOutput, config: LatentConfig, scoring: LatentScoring) -> list[Rollout]:
    """One of each row, on the model's device. `output` has means; `scoring` is of the policy that it was drawn with."""
    return make_rollouts(
        output.responses,
        output.forced,
        output.logprobs,
        output.latents,
        output.means,
        None if config.budget.exact else output.end_logprobs,
        latent_id=config.latent_id,
        scoring=scoring,
    )
