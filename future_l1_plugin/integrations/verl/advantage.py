"""`algorithm.adv_estimator: la_dapo`: the group advantage of `la_dapo`, under verl's signature."""

from typing import Any

import torch

from future_l1_plugin.integrations.verl.host import register_adv_est
from future_l1_plugin.integrations.verl.names import ADVANTAGE
from future_l1_plugin.la_dapo import la_dapo_advantage


@register_adv_est(ADVANTAGE)
def compute_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both (B, T); `index` names each row's group."""
    normalise = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    return la_dapo_advantage(token_level_rewards, response_mask, index, norm_by_std=normalise)
