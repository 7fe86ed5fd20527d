"""The log-probabilities of what transformers decoded, for the hosts whose rollout that is."""

import torch
from torch import Tensor

from future_l1_plugin.la_dapo import Tempering, rollout_log_probs
from future_l1_plugin.latent.policy_base import Policy
from future_l1_plugin.model import LatentConfig, LatentOutput


def decoded_log_probs(
    output: LatentOutput, policy: Policy, tempering: Tempering, config: LatentConfig
) -> tuple[Tensor, ...]:
    """`rollout_log_probs` float64 (T_i,) of each row, on the model's device. `output` has means."""
    flat = rollout_log_probs(
        torch.cat(output.responses),
        torch.cat(output.logprobs),
        torch.cat(output.latents),
        torch.cat(output.means),
        None if config.budget.exact else torch.cat(output.end_logprobs),
        latent_id=config.latent_id,
        policy=policy,
        tempering=tempering,
    )
    return flat.split([len(row) for row in output.responses])
