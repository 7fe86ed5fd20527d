"""Counter-based noise: the numbers at a position of a request are a function of (seed, position) alone.

No generator has a state that preemption, batching or another rank could bring out of step, and nothing waits for the
device. The bits are those of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): its finaliser, applied to a counter that
starts at a hash of seed and position.
"""

import math

import torch
from torch import Tensor

from future_l1_plugin.latent.policy_base import Policy


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def uniforms(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """float64 (N, count) in [0, 1), from seed and position, Long (N,) each."""
    key = _mix(_mix(seed * _STEP) + position * _STEP)
    counter = torch.arange(1, count + 1, device=seed.device)
    return _shift(_mix(key[:, None] + counter * _STEP), 11).double() * 2.0**-53


def draw(policy: Policy, mu: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """What `policy.sample` draws, with noise of (seed, position) in place of a generator's.

    Args:
        mu: floating (N, H).
        seed, position: Long (N,).

    Returns:
        (N, H) in mu's dtype.
    """
    if not policy.stochastic:
        return mu
    half = -(-mu.shape[1] // 2)
    numbers = uniforms(seed, position, 1 + 2 * half)
    radius = (-2 * (1 - numbers[:, 1 : half + 1]).log()).sqrt()  # Box and Muller: two normal numbers from two uniform
    angle = 2 * math.pi * numbers[:, half + 1 :]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, : mu.shape[1]].float()
    return policy.place(mu, numbers[:, 0].contiguous(), normal)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of an unsigned number, which torch's signed shift is not."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    for bits, factor in _ROUNDS:
        x = (x ^ _shift(x, bits)) * factor
    return x ^ _shift(x, 31)
