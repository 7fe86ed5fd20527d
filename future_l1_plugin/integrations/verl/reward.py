"""The reward terms of `rewards`, under verl's two roofs: one trajectory at a time, and a whole group.

`LatentRewardManager` scores a trajectory in verl's reward workers, beside the rollouts: accuracy (rule and judge),
format and every other term that needs one sample only. `rl.samples.group_rewards` adds the terms that compare the
rollouts of a prompt, in the trainer, where all of them have arrived.
"""

import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.integrations.rl.samples import make_sample
from future_l1_plugin.integrations.verl.columns import DROPPED, PROMPT, ROLLOUT
from future_l1_plugin.integrations.verl.dumps import facts, is_wanted
from future_l1_plugin.integrations.verl.host import RewardManagerBase
from future_l1_plugin.integrations.verl.settings import reward_set
from future_l1_plugin.la_dapo import Rollout
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.rewards.judge import JudgeUnavailable
from future_l1_plugin.rewards.reward_set import ACCURACY, CORRECT_FROM


class LatentRewardManager(RewardManagerBase):
    """verl's `reward.reward_manager` (source importlib)."""

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any = None, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.tokens = LatentTokens.from_tokenizer(tokenizer)
        self.rewards = reward_set(config)
        self.max_response_length = config.data.max_response_length
        self.with_text = is_wanted(config)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The weighted sum of the sample's own terms, and each of them.

        Beside them: what a dump of rollouts says (`dumps`). A judge that cannot be reached (`on_failure: drop_group`)
        leaves the reason in `reward_extra_info`.
        """
        item = data[-1:][0]
        prompt = RlPrompt.from_dict(item.non_tensor_batch[PROMPT])
        rollout: Rollout = item.non_tensor_batch["tool_extra_fields"][ROLLOUT]
        sample = make_sample(self.tokenizer, self.tokens, prompt, rollout, self.max_response_length)
        said = facts(sample, self.tokens, self.with_text)
        try:
            scores = await self.rewards.score_sample(sample)
        except JudgeUnavailable as error:
            return {"reward_score": 0.0, "reward_extra_info": {**said, "acc": 0.0, DROPPED: str(error)}}
        return {
            "reward_score": math.fsum(self.rewards.weights[name] * value for name, value in scores.items()),
            "reward_extra_info": {**said, "acc": float(scores[ACCURACY] >= CORRECT_FROM), **scores},
        }


def last_token(total: float, length: int) -> Tensor:
    """verl's token-level form of an outcome reward: Float (T,), the reward on the last token."""
    scores = torch.zeros(length)
    scores[-1] = total
    return scores
