"""A finished response as training takes it, from whichever engine: the one type that all of them hand over."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from future_l1_plugin.la_dapo.actions import LatentScoring, action_mask


@dataclass(frozen=True)
class Rollout:
    """One response of T ids with k latents.

    ids: Long (T,), the end-of-sequence token included.
    actions: Bool (T,), True at what the model chose: tokens, and latents under the ids that were forced for them.
    log_probs: float64 (T,), in nats, of every action (`rollout_log_probs`); 0 where the grammar chose.
    latents: floating (k, H), z as it was fed, in the engine's dtype.
    means: floating (k, H), the mu around which each was drawn; None where nobody asks for it.
    """

    ids: Tensor
    actions: Tensor
    log_probs: Tensor
    latents: Tensor
    means: Tensor | None = None

    def checked(self, name: str) -> "Rollout":
        """Itself. Raises RuntimeError, with `name` of the response, for a log-probability that is not finite."""
        if not bool(self.log_probs.isfinite().all()):
            raise RuntimeError(f"{name}: a log-probability of its response is not finite")
        return self

    def on(self, device: str | torch.device) -> "Rollout":
        """Its tensors on `device`."""
        return Rollout(*(None if v is None else v.to(device) for v in vars(self).values()))


def rollout_log_probs(
    ids: Tensor,
    logprobs: Tensor,
    latents: Tensor,
    means: Tensor,
    end_logprobs: Tensor | None,
    *,
    latent_id: int,
    scoring: LatentScoring,
) -> Tensor:
    """Of every action in a response, or in several that are concatenated: T ids, k of them latents.

        text            as given
        `<|latent|>`    tempered log-density of z, plus log(1 - p(end)) where the budget leaves that choice
        forced markers  as given: 0

    Args:
        ids: Long (T,).
        logprobs: floating (T,), of the ids; what stands at latents is not used.
        latents, means: floating (k, H): z as fed, and the mu around which each was drawn.
        end_logprobs: floating (k,), log p(`<|latent_end|>`) where each latent was chosen; None with an exact budget.

    Returns:
        float64 (T,), in nats: float32 would lose 1e-3 of an untempered density of 1e4.
    """
    density = scoring.log_prob(means, latents)
    if end_logprobs is not None:  # the model could have ended the span at each of these positions, and went on
        density = density + (-end_logprobs.double().expm1()).log()
    return logprobs.double().masked_scatter(ids == latent_id, density)


def make_rollouts(
    ids: Sequence[Tensor],
    forced: Sequence[Tensor],
    logprobs: Sequence[Tensor],
    latents: Sequence[Tensor],
    means: Sequence[Tensor],
    end_logprobs: Sequence[Tensor] | None,
    *,
    latent_id: int,
    scoring: LatentScoring,
) -> list[Rollout]:
    """Rollouts from what an engine decoded, each argument a row for each response.

    Args:
        forced: Bool (T,), True where the grammar chose the id. The others: as `rollout_log_probs`.
    """
    flat = rollout_log_probs(
        torch.cat(list(ids)),
        torch.cat(list(logprobs)),
        torch.cat(list(latents)),
        torch.cat(list(means)),
        None if end_logprobs is None else torch.cat(list(end_logprobs)),
        latent_id=latent_id,
        scoring=scoring,
    )
    rows = zip(ids, forced, flat.split([len(row) for row in ids]), latents, means, strict=True)
    return [Rollout(row, action_mask(row, fixed, latent_id), log_probs, z, mu) for row, fixed, log_probs, z, mu in rows]
