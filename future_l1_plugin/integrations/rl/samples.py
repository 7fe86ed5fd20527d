"""From finished responses to rewards: what the terms see, and the totals of a batch of groups."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from future_l1_plugin.latent import LatentTokens, span_index
from future_l1_plugin.rewards import RewardSet, Sample


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
        latents=latents.float(),  # rewards are computed in float32, whatever the engine rolls out in
        span=span[span >= 0],
        ground_truth=reward_model["ground_truth"],
        options=reward_model.get("options"),
        kind=reward_model.get("kind", "auto"),
        question=reward_model.get("question", ""),
        sample_id=sample_id,
        max_response_length=max_response_length,
    )


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
