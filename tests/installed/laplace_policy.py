"""A latent policy that some other package brings: z = mu + independent Laplace noise."""

import math

import torch
from torch import Tensor

from future_l1_plugin.latent import Policy


class Laplace(Policy):
    """Args: scale: b of each coordinate's density exp(-|z - mu| / b) / 2b."""

    name = "laplace"
    stochastic = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        normal = torch.randn(mu.shape, device=mu.device, generator=generator)
        return self.place(mu, normal, normal)

    @torch.no_grad()
    def place(self, mu: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        # A standard normal number's quantile, taken in the Laplace distribution.
        tail = torch.special.ndtr(-normal.double().abs()).clamp_min(1e-300)
        return (mu - self.scale * normal.sign() * (2 * tail).log()).to(mu.dtype)

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        distance = (z.detach().double() - mu.double()).abs().sum(-1) / self.scale
        found = -distance - mu.shape[1] * math.log(2 * self.scale)
        return found.to(torch.promote_types(mu.dtype, torch.float32))

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        distance = (mu.double() - mu_ref.double()).abs() / self.scale
        return (distance + (-distance).exp() - 1).sum(-1).to(torch.promote_types(mu.dtype, torch.float32))
