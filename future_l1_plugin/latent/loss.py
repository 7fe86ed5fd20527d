"""The latent part of the SFT objective: the distance between mu and the visual features of the future frames."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, cosine_similarity

from future_l1_plugin.errors import ConfigError

#: Name in a recipe (`latent.loss`) -> mean distance of mu and target, floating (K, H) both, K >= 1; a scalar.
LOSSES = {
    "mse": lambda mu, target: (mu - target).square().mean(),
    "sum_mse": lambda mu, target: (mu - target).square().sum(-1).mean(),
    "cosine": lambda mu, target: (1 - cosine_similarity(mu, target, dim=-1)).mean(),
}


def latent_loss(mu: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Mean distance between mu_t and e*_t over the K latent positions (Future-L1, arXiv 2606.05769, SFT objective).

    Args:
        mu: floating (K, H), K >= 0.
        target: floating (K, H), vision-merger output; counts as data.
        kind: a name of LOSSES: "sum_mse", the paper's (1/K) sum_t ||mu_t - e*_t||^2; "mse", the same divided by H, as
            in the public release; "cosine", (1/K) sum_t (1 - cos(mu_t, e*_t)).

    Returns:
        Scalar, float32 (float64 if mu is float64). With K = 0 a zero that is still attached to mu's graph: every rank
        of a distributed run then has the same parameters in its backward pass.

    Raises:
        ConfigError: unknown kind.
        ValueError: shapes that differ or are not (K, H).
    """
    if kind not in LOSSES:
        raise ConfigError(f"latent_loss: expected one of {', '.join(LOSSES)}, found {kind!r}")
    if mu.ndim != 2 or mu.shape != target.shape:
        raise ValueError(
            f"latent_loss: expected mu and target of one shape (K, H), found {tuple(mu.shape)}, {tuple(target.shape)}"
        )
    mu = mu.to(torch.promote_types(mu.dtype, torch.float32))
    target = target.detach().to(mu)
    if len(mu) == 0:
        return mu.sum()
    return LOSSES[kind](mu, target)


def pool_targets(tokens: Tensor, budget: int) -> Tensor:
    """Average the visual features of a frame down (or repeat them up) to a fixed number of latents.

    Latent j is the mean of the features floor(j n / budget) to ceil((j + 1) n / budget) - 1 in raster order, as in
    torch's `adaptive_avg_pool1d` and in the public release.

    Args:
        tokens: floating (n, H), n >= 1, one frame in raster order.
        budget: latents wanted, at least 1.

    Returns:
        (budget, H) in the dtype of `tokens`; averaged in float32.

    Raises:
        ValueError: shape.
        ConfigError: budget below 1.
    """
    if tokens.ndim != 2 or len(tokens) == 0:
        raise ValueError(f"pool_targets: expected features of shape (n, H) with n >= 1, found {tuple(tokens.shape)}")
    if budget < 1:
        raise ConfigError(f"train_fixed_latent_budget: expected at least 1, found {budget}")
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return adaptive_avg_pool1d(wide.T[None], budget)[0].T.to(tokens.dtype)
