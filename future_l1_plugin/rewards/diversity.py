"""R_div: the spans of one rollout should not repeat each other.

Future-L1 (arXiv 2606.05769), temporal-diversity reward of LA-DAPO, with b_m the mean of the latents of span m:

    R_div = -mean over adjacent spans of cos^2(b_m, b_m+1)          in [-1, 0]

Spans that hold no latents are left out, so that their neighbours are adjacent. Fewer than two spans with latents: 0.
The cosine with a zero mean is 0, never NaN. Computed in float64; nothing here is differentiated.
"""

import torch
from torch import Tensor

from future_l1_plugin.errors import RewardError


def temporal_diversity(latents: Tensor, span: Tensor) -> float:
    """R_div of one rollout.

    Args:
        latents: (T, H), any floating dtype, in the order of the response.
        span: Long (T,), the number of the span that each latent belongs to: `latent.span_index` without its -1s.

    Returns:
        A number in [-1, 0]; 0.0 for fewer than two spans with latents.

    Raises:
        RewardError: other shapes or dtypes, span numbers below 0 or decreasing, NaN or infinity in a latent.
    """
    cosines = _adjacent_cosines(latents, span)
    return 0.0 - float(cosines.square().mean()) if len(cosines) else 0.0


def mean_adjacent_cosine(latents: Tensor, span: Tensor) -> float | None:
    """The mean cosine of adjacent span means, in [-1, 1]: a metric that, unlike R_div, shows the sign.

    Arguments and errors as `temporal_diversity`. None for fewer than two spans with latents.
    """
    cosines = _adjacent_cosines(latents, span)
    return float(cosines.mean()) if len(cosines) else None


@torch.no_grad()
def _adjacent_cosines(latents: Tensor, span: Tensor) -> Tensor:
    """Float64 (M - 1,) for M spans with latents; empty for M < 2."""
    _check(latents, span)
    numbers, number, count = span.unique_consecutive(return_inverse=True, return_counts=True)
    # Largest component 1 over the whole rollout: no sum overflows, and no cosine changes.
    latents = latents.double() / _largest(latents.double().abs().amax()) if len(latents) else latents.double()
    sums = latents.new_zeros(len(numbers), latents.shape[1]).index_add_(0, number, latents)
    means = sums / count[:, None]  # (M, H)
    means = means / _largest(means.abs().amax(1, keepdim=True)) if len(means) else means
    units = means / _largest(means.norm(dim=1, keepdim=True))
    return (units[:-1] * units[1:]).sum(1).clamp_(-1, 1)


def _largest(scale: Tensor) -> Tensor:
    """A divisor that leaves zeros zero."""
    return torch.where(scale > 0, scale, 1)


def _check(latents: Tensor, span: Tensor) -> None:
    if latents.dim() != 2 or not latents.is_floating_point():
        raise RewardError(
            f"latents: expected a floating-point tensor (T, H), found {latents.dtype} {tuple(latents.shape)}. "
            "Stack one row a latent; an empty (0, H) tensor for none."
        )
    if span.shape != latents.shape[:1] or span.is_floating_point() or span.dtype == torch.bool:
        raise RewardError(
            f"span: expected one whole number for each of the {len(latents)} latents, found {span.dtype} "
            f"{tuple(span.shape)}. Take `span_index(response_ids, tokens)` where it is not -1."
        )
    if len(span) and int(span.min()) < 0:
        raise RewardError(
            f"span: expected numbers >= 0, found {int(span.min())}. Leave out the positions where `span_index` is -1."
        )
    if (falling := (span.diff() < 0).nonzero()).numel():
        at = int(falling[0])
        raise RewardError(
            f"span: expected numbers that never decrease, found {int(span[at])} then {int(span[at + 1])} at latent "
            f"{at + 1}. Keep the latents in the order of the response."
        )
    if not (finite := latents.isfinite().all(1)).all():
        raise RewardError(
            f"latents: expected finite values, found NaN or infinity at latent {int((~finite).nonzero()[0])} of "
            f"{len(latents)}. The hidden state overflowed: decode in bfloat16 or float32, not float16."
        )
