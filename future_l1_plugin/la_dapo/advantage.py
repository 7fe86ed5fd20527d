"""Group-relative advantages, as in GRPO and DAPO (arXiv 2503.14476, section 2.2): A_i = (R_i - mean R) / std R.

One advantage serves all actions of a response, tokens and latents. Numbers agree with verl's
`compute_grpo_outcome_advantage` (0.9.1): unbiased standard deviation, eps beside it, and a group of one keeps its score
(mean 0, deviation 1). One departure: a group of equal scores gives exactly 0. In float32 the mean of equal numbers can
miss them by a rounding error, which the division by eps = 1e-6 would lift to 1e-2.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def group_advantage(
    scores: Tensor, group: Sequence[Hashable] | Tensor, normalise_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Each score against the others of its group.

    Args:
        scores: floating (N,), the rewards of N responses.
        group: N labels (str, or Long (N,)); responses with equal labels answer the same prompt. In any order.
        normalise_std: divide by (std + eps); False as in Dr. GRPO (arXiv 2503.20783).
        eps: added to the standard deviation.

    Returns:
        (N,), float32 (float64 if scores are), on the scores' device, without gradient. Computed in float64. Sums to 0
        over a group of two or more; exactly 0 throughout where all scores of the group are equal; score / (1 + eps) in
        a group of one (score, if not normalise_std).

    Raises:
        ValueError: shapes; a score that is not finite, with its row.
    """
    if scores.ndim != 1:
        raise ValueError(f"group_advantage: expected scores of shape (N,), found {tuple(scores.shape)}")
    labels = group.tolist() if isinstance(group, Tensor) else list(group)
    if len(labels) != len(scores):
        raise ValueError(f"group_advantage: expected one group label a score, found {len(labels)} for {len(scores)}")
    # On the host: N is a few hundred, and the groups are Python labels anyway.
    wide = scores.detach().to("cpu", torch.float64)
    bad = (~wide.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"group_advantage: row {row} (group {labels[row]!r}): expected a finite score, found {float(wide[row])}. "
            "Fix the reward term that gave it."
        )
    rows_of: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    result = torch.zeros_like(wide)
    for rows in rows_of.values():
        own = wide[rows]
        if len(rows) > 1 and own.min() == own.max():
            continue
        mean, std = (own.mean(), own.std()) if len(rows) > 1 else (0.0, 1.0)
        result[rows] = (own - mean) / (std + eps) if normalise_std else own - mean
    return result.to(scores.device, torch.promote_types(scores.dtype, torch.float32))


def la_dapo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable] | Tensor,
    norm_by_std: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`group_advantage` of the summed rewards, on every position of the response. Same contract as verl's estimators.

    Args:
        token_level_rewards: floating (B, T); the score of a response is the sum of its row, usually all of it on the
            last token.
        response_mask: (B, T), Bool or 0/1: positions of the response.
        index: B group labels.
        norm_by_std: see `group_advantage`.
        eps: see `group_advantage`.

    Returns:
        (advantages, returns): the same values twice, (B, T), dtype as `group_advantage`, 0 outside the mask.

    Raises:
        ValueError: shapes, or a score that is not finite.
    """
    if token_level_rewards.ndim != 2 or token_level_rewards.shape != response_mask.shape:
        raise ValueError(
            "la_dapo_advantage: expected rewards and response mask of one shape (B, T), found "
            f"{tuple(token_level_rewards.shape)} and {tuple(response_mask.shape)}"
        )
    advantages = group_advantage(token_level_rewards.sum(-1), index, norm_by_std, eps)
    advantages = advantages[:, None] * response_mask.to(advantages)
    return advantages, advantages.clone()
