"""What every latent policy offers, and the checks they share. The policies themselves are in `policy`."""

from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError


class Policy:
    """What every policy offers.

    Attributes:
        name: as given to `build_policy`.
        stochastic: whether z differs from mu.
    """

    name: str
    stochastic: bool

    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw z around mu.

        Args:
            mu: floating (N, H), N >= 0.
            generator: on mu's device; None = the global one.

        Returns:
            (N, H) in mu's dtype, on its device. From a stochastic policy it carries no gradient. The draw is made in
            float32 or float64 and rounded once; `log_prob` takes z as it is stored.

        Raises:
            ValueError, TypeError: shape or dtype.
        """
        raise NotImplementedError

    def place(self, mu: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """The draw as a function of its noise, for callers with a random stream of their own for each row.

        Args:
            mu: floating (N, H).
            uniform: float64 (N,) in [0, 1).
            normal: floating (N, H), standard normal.

        Returns:
            z (N, H) in mu's dtype.
        """
        raise NotImplementedError

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        """Log-density of z, in nats, differentiable in mu; z counts as data.

        Args:
            mu: floating (N, H).
            z: floating (N, H), in any floating dtype.

        Returns:
            float32 (N,), or float64 if mu is float64.

        Raises:
            ValueError, TypeError: shape or dtype; a row without a direction where the policy needs one.
        """
        raise NotImplementedError

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        """KL(policy at mu || policy at mu_ref), in nats, exact, differentiable in both.

        Args:
            mu: floating (N, H).
            mu_ref: floating (N, H), in any floating dtype.

        Returns:
            float32 (N,), or float64 if mu is float64. Never negative.

        Raises:
            ValueError, TypeError: as `log_prob`.
        """
        raise NotImplementedError


def number_in(what: str, value: Any, most: float, open_end: bool = False) -> float:
    """`value` as a float in (0, most], or in (0, most) if open_end."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not (fits and 0 < value <= most and not (open_end and value == most)):
        raise ConfigError(f"{what}: expected a number in (0, {most:g}{')' if open_end else ']'}, found {value!r}")
    return float(value)


def result_dtype(mu: Tensor) -> torch.dtype:
    """float32, or float64 if mu is float64."""
    return torch.promote_types(mu.dtype, torch.float32)


def check_matrix(name: str, rows: Tensor, least: int = 1) -> None:
    """ValueError or TypeError, naming the argument, unless `rows` is floating (N, H) with H >= least."""
    if rows.ndim != 2 or rows.shape[1] < least:
        raise ValueError(f"{name}: expected shape (N, H) with H >= {least}, found {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, found {rows.dtype}")


def check_pair(mu: Tensor, name: str, other: Tensor, least: int = 1) -> None:
    """`check_matrix` for both, and ValueError unless their shapes agree."""
    check_matrix("mu", mu, least)
    check_matrix(name, other, least)
    if mu.shape != other.shape:
        raise ValueError(f"mu and {name}: expected equal shapes, found {tuple(mu.shape)} and {tuple(other.shape)}")
