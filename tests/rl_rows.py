"""Prompts and rollouts of no consequence, for tests of what a reward sees of them."""

import torch
from torch import Tensor

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.la_dapo import Rollout


def a_prompt(name: str, **fields) -> RlPrompt:
    return RlPrompt(**{"id": name, "question": "", "media": "none", "ground_truth": "A", "source": "test"} | fields)


def rollout_of(ids: Tensor, latents: Tensor) -> Rollout:
    """Of these ids, with nothing known about how likely they were."""
    return Rollout(ids, torch.ones_like(ids).bool(), torch.zeros(len(ids), dtype=torch.float64), latents)
