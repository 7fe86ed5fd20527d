"""EasyR1's reward manager with the reward terms of a recipe."""

from typing import Any

import torch
from torch import Tensor
from verl.protocol import DataProto

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.integrations.easyr1.actor import ROLLOUT
from future_l1_plugin.integrations.easyr1.dataset import PROMPT
from future_l1_plugin.integrations.rl.grading import score_samples
from future_l1_plugin.integrations.rl.samples import group_rewards, make_sample
from future_l1_plugin.integrations.rl.settings import checked_rewards
from future_l1_plugin.integrations.verl.columns import PROMPT as ROW
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.rewards import Sample
from future_l1_plugin.rewards.reward_set import ACCURACY, CORRECT_FROM

#: Names of columns beside the terms': whether a response is right, and whether its group lacks a judge's verdict.
CORRECT, DROPPED = "acc", "no_verdict"


def samples_of(data: DataProto, tokenizer: Any, tokens: LatentTokens) -> list[Sample]:
    """What the reward terms see of a batch of finished responses."""
    prompts = [RlPrompt.from_dict(row[ROW]) for row in data.non_tensor_batch[PROMPT]]
    longest = data.batch["responses"].shape[1]
    rollouts = data.non_tensor_batch[ROLLOUT]
    return [make_sample(tokenizer, tokens, *pair, longest) for pair in zip(prompts, rollouts, strict=True)]


class LatentRewardManager:
    """Made by the runner in a Ray actor, an asynchronous one: the judge's connections belong to its one loop.

    Takes the place of EasyR1's `AutoRewardManager`.
    """

    def __init__(self, rewards: list[dict[str, Any]], tokenizer: Any) -> None:
        self.rewards = checked_rewards(rewards)
        self.tokenizer = tokenizer
        self.tokens = LatentTokens.from_tokenizer(tokenizer)

    async def compute_reward(self, data: DataProto) -> tuple[Tensor, dict[str, list[float]]]:
        """Float (N, T), each response's total on its last token, and columns of N values for logging and filtering:
        "overall" (the totals), each term, CORRECT, and DROPPED. A group without a verdict has zeros everywhere.

        Groups are rows of one `uid`; in validation, where EasyR1 gives none, of one prompt.
        """
        samples = samples_of(data, self.tokenizer, self.tokens)
        group = list(data.non_tensor_batch.get("uid", [sample.sample_id for sample in samples]))
        scores = await score_samples(self.rewards, samples)
        dropped = {name for name, found in zip(group, scores, strict=True) if found is None}
        kept = [i for i, name in enumerate(group) if name not in dropped]
        found = group_rewards(self.rewards, *([column[i] for i in kept] for column in (samples, scores, group)))
        correct = [float(scores[i][ACCURACY] >= CORRECT_FROM) for i in kept]
        columns = {
            name: _spread(values, kept, len(samples))
            for name, values in {"overall": found.totals, **found.terms, CORRECT: correct}.items()
        }
        columns[DROPPED] = [float(name in dropped) for name in group]
        totals = torch.zeros(data.batch["responses"].shape)
        for i, sample in enumerate(samples):
            totals[i, len(sample.response_ids) - 1] = columns["overall"][i]
        return totals, columns


def _spread(values: list[float], places: list[int], length: int) -> list[float]:
    """The values at their places, 0 elsewhere."""
    column = [0.0] * length
    for place, value in zip(places, values, strict=True):
        column[place] = value
    return column
