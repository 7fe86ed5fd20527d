"""From finished responses to rewards: what the terms see, and the totals of a batch of groups."""

from dataclasses import dataclass
from typing import Any

from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.la_dapo import Rollout
from future_l1_plugin.latent import LatentTokens, span_index
from future_l1_plugin.rewards import RewardSet, Sample


def make_sample(
    tokenizer: Any, tokens: LatentTokens, prompt: RlPrompt, rollout: Rollout, max_response_length: int
) -> Sample:
    """What the terms see of a response. `extra` holds the prompt's `source` and the path of its `video`, if any."""
    ignored = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    span = span_index(rollout.ids[None], tokens)[0]
    return Sample(
        text=tokenizer.decode([t for t in rollout.ids.tolist() if t not in ignored], skip_special_tokens=False),
        response_ids=rollout.ids,
        latents=rollout.latents.float(),  # rewards are computed in float32, whatever the engine rolls out in
        span=span[span >= 0],
        ground_truth=prompt.ground_truth,
        options=prompt.options,
        kind=prompt.kind,
        question=prompt.question,
        sample_id=prompt.id,
        max_response_length=max_response_length,
        extra={"source": prompt.source, "video": prompt.video},
    )


@dataclass(frozen=True)
class GroupRewards:
    """totals: one for each sample. terms: every term's values, in the same order."""

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
