"""The reward terms of `rewards`, under verl's two roofs: one trajectory at a time, and a whole group.

`LatentRewardManager` scores a trajectory in verl's reward workers, beside the rollouts: accuracy (rule and judge),
format and every other term that needs one sample only. `group_rewards` adds the terms that compare the rollouts of a
prompt, in the trainer, where all of them have arrived.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from future_l1_plugin.integrations.verl.settings import reward_set
from future_l1_plugin.latent import LatentTokens, span_index
from future_l1_plugin.rewards import RewardSet, Sample
from future_l1_plugin.rewards.judge import JudgeUnavailable
from future_l1_plugin.rewards.reward_set import ACCURACY, CORRECT_FROM

#: Key in `reward_extra_info`: why the sample's group must not be trained on.
DROPPED = "dropped"


def make_sample(
    tokenizer: Any,
    tokens: LatentTokens,
    response: Tensor,
    latents: Tensor,
    reward_model: dict[str, Any],
    sample_id: str,
    max_response_length: int,
) -> Sample:
    """What the terms see. `response` Long (T,), `latents` (k, H), `reward_model` from the dataset's row."""
    ignored = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    span = span_index(response[None], tokens)[0]
    return Sample(
        text=tokenizer.decode([t for t in response.tolist() if t not in ignored], skip_special_tokens=False),
        response_ids=response,
        latents=latents,
        span=span[span >= 0],
        ground_truth=reward_model["ground_truth"],
        options=reward_model.get("options"),
        kind=reward_model.get("kind", "auto"),
        question=reward_model.get("question", ""),
        sample_id=sample_id,
        max_response_length=max_response_length,
    )


class LatentRewardManager(RewardManagerBase):
    """verl's `reward.reward_manager` (source importlib)."""

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any = None, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.tokens = LatentTokens.from_tokenizer(tokenizer)
        self.rewards = reward_set(config)
        self.max_response_length = config.data.max_response_length

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The weighted sum of the sample's own terms, and each of them.

        A judge that cannot be reached (`on_failure: drop_group`) leaves the reason in `reward_extra_info`.
        """
        item = data[-1:][0]
        length = int(item.non_tensor_batch["response_len"])
        sample = make_sample(
            self.tokenizer,
            self.tokens,
            item.batch["responses"][:length],
            item.non_tensor_batch["tool_extra_fields"]["latents"],
            item.non_tensor_batch["reward_model"],
            str(item.non_tensor_batch["extra_info"]["id"]),
            self.max_response_length,
        )
        try:
            scores = await self.rewards.score_sample(sample)
        except JudgeUnavailable as error:
            return {"reward_score": 0.0, "reward_extra_info": {"acc": 0.0, DROPPED: str(error)}}
        return {
            "reward_score": math.fsum(self.rewards.weights[name] * value for name, value in scores.items()),
            "reward_extra_info": {"acc": float(scores[ACCURACY] >= CORRECT_FROM), **scores},
        }


@dataclass(frozen=True)
class GroupRewards:
    """totals: one a sample. terms: every term's values, in the same order."""

    totals: list[float]
    terms: dict[str, list[float]]


def group_rewards(
    rewards: RewardSet, samples: list[Sample], scores: list[dict[str, float]], group: list[str]
) -> GroupRewards:
    """Group terms and totals of a batch. `scores`: each sample's own terms; `group`: each sample's prompt.

    Raises RewardError as `RewardSet.score_group`.
    """
    members: dict[str, list[int]] = {}
    for i, name in enumerate(group):
        members.setdefault(name, []).append(i)
    totals = [0.0] * len(samples)
    terms: dict[str, list[float]] = {}
    for indices in members.values():
        some, each = rewards.score_group([samples[i] for i in indices], [scores[i] for i in indices])
        for i, total in zip(indices, some, strict=True):
            totals[i] = total
        for name, values in each.items():
            column = terms.setdefault(name, [0.0] * len(samples))
            for i, value in zip(indices, values, strict=True):
                column[i] = value
    return GroupRewards(totals, terms)


def last_token(total: float, length: int) -> Tensor:
    """verl's token-level form of an outcome reward: Float (T,), the reward on the last token."""
    scores = torch.zeros(length)
    scores[-1] = total
    return scores
