"""R_ctr: a rollout is worth more if its latents resemble those of correct rollouts rather than of wrong ones.

Future-L1 (arXiv 2606.05769), outcome-contrastive reward of LA-DAPO:

    s_ij   = mean over t <= min(T_i, T_j) of (1 + cos(z_it, z_jt)) / 2          in [0, 1]
    s_i+   = max over correct j != i of s_ij
    R(i)   = exp(s_i+ / tau) / (exp(s_i+ / tau) + sum over wrong j != i of exp(s_ij / tau))

The paper leaves the empty cases open; here the same formula answers them, an empty sum or exponential of nothing being
zero: no correct other rollout -> 0, no wrong other rollout -> 1, neither -> 0. A rollout without latents gets 0 and is
nobody's positive or negative. The cosine with a zero vector is 0 (so that such a step counts as 1/2), never NaN.

Rewards are constants of the policy gradient: nothing here is differentiated.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from future_l1_plugin.errors import RewardError

TEMPERATURE = 0.5
#: Squared norms outside this range have lost precision in float32: squares below 1e-38 vanish, and thousands of them
#: must not matter against the smallest sum. Such latents are rescaled first.
_SMALLEST, _LARGEST = 1e-27, 1e37

#: Few large operations, so that threads meet seldom, but no larger than a processor's cache.
_BUFFER_BYTES = 2 * 2**20


@torch.no_grad()
def outcome_contrastive(latents: list[Tensor], correct: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """R_ctr of the rollouts of one prompt.

    Args:
        latents: G tensors (T_i, H), in any floating dtype; T_i = 0 stands for a rollout without latents.
        correct: Bool (G,).
        temperature: tau, > 0.

    Returns:
        Float (G,) in [0, 1], float32 (float64 if the latents are), on the latents' device.

    Raises:
        RewardError: see `outcome_contrastive_groups`.
    """
    return outcome_contrastive_groups(latents, correct, torch.zeros(len(latents), dtype=torch.long), temperature)


@torch.no_grad()
def outcome_contrastive_groups(
    latents: list[Tensor], correct: Tensor, group: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """R_ctr of the rollouts of many prompts; only rollouts of one group are compared.

    Working memory: 2 MiB, or the largest group padded to the longest rollout if that is more.

    Args:
        latents: N tensors (T_i, H), in any floating dtype; T_i = 0 stands for a rollout without latents.
        correct: Bool (N,).
        group: Long (N,), the rollout's prompt; any numbers, in any order.
        temperature: tau, > 0.

    Returns:
        Float (N,) in [0, 1], in the order of `latents`, float32 (float64 if the latents are), on their device.

    Raises:
        RewardError: lengths that differ, `correct` not Bool, latents that are not (T, H) with one H, NaN or infinity in
            a latent (the message names the rollout), a temperature that is not positive.
    """
    check_temperature(temperature)
    correct, group = torch.as_tensor(correct), torch.as_tensor(group)
    _check_shapes(latents, correct, group)
    # Promoted, so that one float32 rollout among bfloat16 ones loses nothing.
    dtype = torch.float32
    for kind in {latent.dtype for latent in latents}:
        dtype = torch.promote_types(dtype, kind)
    device = latents[0].device if latents else None
    rewards = torch.zeros(len(latents), dtype=dtype, device=device)

    members: dict[int, list[int]] = {}
    for rollout, number in enumerate(group.tolist()):
        if latents[rollout].shape[0]:
            members.setdefault(number, []).append(rollout)
    if not members:
        return rewards
    groups = list(members.values())
    most = max(map(len, groups))
    # Groups of fewer rollouts are filled up with rollout -1, of length 0.
    index = torch.tensor([rollouts + [-1] * (most - len(rollouts)) for rollouts in groups], device=device)  # (P, G)
    lengths = torch.tensor([len(latent) for latent in latents], device=device)[index] * (index >= 0)
    similarity = _similarity(latents, groups, lengths, dtype)
    values = _reward(similarity, lengths > 0, correct.to(device)[index], temperature)
    rewards[index[index >= 0]] = values[index >= 0].to(dtype)
    return rewards


def check_temperature(temperature: float) -> None:
    """Raises RewardError unless the temperature is a positive finite number."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise RewardError(
            f"temperature: expected a positive number (the paper's is {TEMPERATURE}), found {temperature!r}"
        )


def _similarity(latents: list[Tensor], groups: list[list[int]], lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """s_ij, float64 (P, G, G), of the rollouts of P groups with lengths Long (P, G); of no meaning where one is 0."""
    most, steps = lengths.shape[1], int(lengths.max())
    width = latents[groups[0][0]].shape[1]
    # Some groups at a time, in one buffer that stays in the cache. The squared norms stand on the diagonal of the
    # products, so the latents are read once and never normalised themselves.
    at_once = max(1, _BUFFER_BYTES // (steps * most * width * dtype.itemsize or 1))
    buffer = torch.empty(min(at_once, len(groups)) * steps * most * width, dtype=dtype, device=lengths.device)
    products = torch.zeros(len(groups), steps, most, most, dtype=dtype, device=lengths.device)
    for start in range(0, len(groups), at_once):
        chunk = range(start, min(start + at_once, len(groups)))
        products[start : chunk.stop] = _products(latents, [groups[number] for number in chunk], most, steps, buffer)
    for number in _extreme(products, lengths).nonzero().flatten().tolist():
        _check_finite(latents, groups[number])
        products[number] = _products(latents, [groups[number]], most, steps, buffer, rescale=True)[0]
    products = products.double()
    squares = products.diagonal(dim1=2, dim2=3)  # (P, T, G)
    # Zero vectors: 0 / tiny is the cosine 0 that they are defined to have.
    scale = squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    cosines = (products * scale[..., :, None] * scale[..., None, :]).clamp_(-1, 1).sum(1)
    return (1 + cosines / torch.minimum(lengths[:, :, None], lengths[:, None, :])) / 2


def _products(
    latents: list[Tensor], groups: list[list[int]], most: int, steps: int, buffer: Tensor, rescale: bool = False
) -> Tensor:
    """<z_it, z_jt> within each of P groups, (P, T, G, G) with T = `steps` and G = `most`; 0 where there is no step t.

    buffer: room for T * P * G latents, overwritten.
    rescale: divide each latent by its largest component first, which changes no cosine.
    """
    rollouts = [latents[rollout] for group in groups for rollout in group]
    width, slots = rollouts[0].shape[1], len(groups) * most
    room = buffer[: steps * slots * width].view(steps, slots, width)  # (T, P * G, H)
    if len(rollouts) == slots and all(len(latent) == steps for latent in rollouts):
        torch.stack(rollouts, dim=1, out=room)
    else:
        room.zero_()
        for number, group in enumerate(groups):
            for place, rollout in enumerate(group, start=number * most):
                room[: len(latents[rollout]), place] = latents[rollout]
    if rescale:
        room /= room.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(room.dtype).tiny)
    room = room.view(steps * len(groups), most, width)
    return torch.bmm(room, room.transpose(1, 2)).view(steps, len(groups), most, most).transpose(0, 1)


def _extreme(products: Tensor, lengths: Tensor) -> Tensor:
    """Bool (P,): groups in which the square of a latent overflowed, underflowed, or is not finite."""
    squares = products.diagonal(dim1=2, dim2=3)  # (P, T, G)
    there = torch.arange(squares.shape[1], device=lengths.device)[None, :, None] < lengths[:, None, :]
    return (there & ~((squares > _SMALLEST) & (squares < _LARGEST))).flatten(1).any(1)


def _reward(similarity: Tensor, there: Tensor, correct: Tensor, temperature: float) -> Tensor:
    """R(i), float64 (P, G), from s_ij float64 (P, G, G), whether i has latents Bool (P, G), and correct Bool (P, G)."""
    itself = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    positive = (there & correct)[:, None, :] & ~itself  # (P, G, G): j is a positive of i
    negative = (there & ~correct)[:, None, :] & ~itself
    nearest = similarity.masked_fill(~positive, -torch.inf).amax(2)  # s_i+; -inf where there is none
    # R = 1 / (1 + sum exp((s_ij - s_i+) / tau)): the differences first, so that no temperature overflows.
    excess = ((similarity - nearest[:, :, None]) / temperature).masked_fill(~negative, -torch.inf)
    return torch.sigmoid(-torch.logsumexp(excess, dim=2)).masked_fill(nearest == -torch.inf, 0.0)


def _check_shapes(latents: Sequence[Tensor], correct: Tensor, group: Tensor) -> None:
    count = len(latents)
    for name, values in (("correct", correct), ("group", group)):
        if values.shape != (count,):
            raise RewardError(
                f"{name}: expected one value for each of the {count} rollouts, found shape {tuple(values.shape)}. "
                "Pass the latents of every rollout, an empty (0, H) tensor for one without."
            )
    if correct.dtype != torch.bool:
        raise RewardError(f"correct: expected Bool, found {correct.dtype}. Compare the accuracy with 0.5 first.")
    width = None
    for rollout, latent in enumerate(latents):
        if latent.dim() != 2 or not latent.is_floating_point():
            raise RewardError(
                f"latents of rollout {rollout}: expected a floating-point tensor (T, H), found {latent.dtype} "
                f"{tuple(latent.shape)}. Stack one row a latent; an empty (0, H) tensor for none."
            )
        if latent.shape[0] == 0:  # no step, so its width means nothing
            continue
        width = width or (latent.shape[1], rollout)
        if latent.shape[1] != width[0]:
            raise RewardError(
                f"latents of rollout {rollout}: expected hidden size {width[0]} as in rollout {width[1]}, found "
                f"{latent.shape[1]}. Rollouts that are compared must come from one model."
            )


def _check_finite(latents: list[Tensor], rollouts: list[int]) -> None:
    for rollout in rollouts:
        latent = latents[rollout]
        if not (finite := latent.isfinite().all(1)).all():
            step = int((~finite).nonzero()[0])
            raise RewardError(
                f"latents of rollout {rollout}: expected finite values, found NaN or infinity at latent {step} of "
                f"{len(latent)}. The rollout's hidden state overflowed: decode in bfloat16 or float32, not float16."
            )
