"""How the log-density of a latent becomes usable in a probability ratio when H is in the thousands.

A latent is one action with H coordinates: its log-density adds up H terms, and a ratio of densities multiplies H
factors. How far the log-ratio moves when mu turns by a small angle delta, with vMF at mean cosine 0.9 and H = 4096
(kappa = 19398), z drawn at the old mu, in nats:

    mean -kappa A (1 - cos delta)      standard deviation sqrt(kappa A) sin(delta)      kappa A = 17458

    delta     untempered ("none")      "sqrt_dim", beta 1/64      "dim", beta 1/4096      share of ratios outside
    in rad    mean      deviation      mean      deviation        mean       deviation    [0.9, 1.1], the three in turn
    0.001     -0.0087    0.132         -0.0001    0.0021          -0.000002   0.00003     44%    0%    0%
    0.01      -0.87      1.32          -0.014     0.021           -0.0002     0.0003      95%    0%    0%
    0.1       -87       13.2           -1.36      0.206           -0.021      0.0032     100%  100%    0%

A turn of 0.01 rad is far below what sampling itself does (z lies at 0.45 rad from mu), yet it spreads nine in ten
untempered ratios over 0.05 to 3.7: a clip range of 0.1 is then spent by a step that nothing visible follows from.
Tempering raises the ratio to the power beta(H):

    none       beta = 1              the exact importance ratio
    sqrt_dim   beta = 1 / sqrt(H)    the deviation at a given turn no longer depends on H (the mean grows as sqrt(H))
    dim        beta = 1 / H          the mean no longer depends on H: the geometric mean of the ratio over coordinates,
                                     as GSPO (arXiv 2507.18071) normalises by the length of a sequence
    a number   beta itself, in (0, 1]

What becomes of the policy gradient. The surrogate is E_old[r^beta A] with r = p_new(z) / p_old(z).
- At r = 1 its gradient is E[beta A grad log p(z)]: beta times the exact policy gradient. The direction is exact, only
  the step is scaled (by an optimiser like Adam not even that, but beta then sets the weight of latents against text).
- Away from r = 1 it is a power of the importance weight: less variance, and biased, since E_old[r^beta] < 1 for
  beta < 1. For the Gaussian policy and a displacement D of mu, E_old[r^beta] = exp(-beta (1 - beta) D^2 / (2 sigma^2)).
- Clipping r^beta to [1 - low, 1 + high] lets log r move within [log(1 - low), log(1 + high)] / beta nats. With 0.1 and
  H = 4096 that is +0.095 nats (none), +6.1 nats (sqrt_dim), +390 nats (dim).

The normaliser log C_d(kappa) cancels in a ratio and is kept: log-densities of rollout and actor are compared as they
are. The KL has to be tempered with the same beta (`latent_kl`), or its weight would be 1/beta times what it says.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.policy_base import Policy

_RULES = {"none": lambda h: 1.0, "sqrt_dim": lambda h: 1 / math.sqrt(h), "dim": lambda h: 1 / h}


@dataclass(frozen=True)
class Tempering:
    """The exponent beta of a latent's probability ratio. See the module's docstring.

    Args:
        rule: "none", "sqrt_dim", "dim", or beta itself as a number in (0, 1].

    Raises:
        ConfigError: anything else.
    """

    rule: str | float = "none"

    def __post_init__(self) -> None:
        rule = self.rule
        number = isinstance(rule, int | float) and not isinstance(rule, bool)
        if not (0 < rule <= 1 if number else isinstance(rule, str) and rule in _RULES):
            raise ConfigError(
                f"latent tempering: expected one of {', '.join(_RULES)} or a number in (0, 1], found {rule!r}"
            )

    @classmethod
    def from_name(cls, name: str | float) -> "Tempering":
        """As a recipe writes it: a rule's name or a number."""
        return cls(name)

    def beta(self, dimension: int) -> float:
        """The exponent for latents of `dimension` H coordinates, in (0, 1]. Raises ValueError if H < 1."""
        if dimension < 1:
            raise ValueError(f"latent tempering: expected a dimension of at least 1, found {dimension}")
        return _RULES[self.rule](dimension) if isinstance(self.rule, str) else float(self.rule)


def latent_log_prob(policy: Policy, mu: Tensor, z: Tensor, tempering: Tempering) -> Tensor:
    """beta(H) log p(z | mu): what stands at a latent position where a token would have its log-probability.

    Args:
        policy: any policy; the deterministic one gives zeros.
        mu: floating (N, H), N >= 0: the hidden states one position before the latents.
        z: floating (N, H), the recorded latents in any floating dtype; counts as data.
        tempering: beta.

    Returns:
        float64 (N,), nats times beta, differentiable in mu. Untempered it is of the order of 1e4 at H = 4096, where
        float32 resolves 1e-3: store and subtract it in float64.

    Raises:
        ValueError, TypeError: as `Policy.log_prob`.
    """
    return policy.log_prob(mu.double(), z) * _beta(tempering, mu)


def latent_kl(policy: Policy, mu: Tensor, mu_ref: Tensor, tempering: Tempering) -> Tensor:
    """beta(H) KL(policy at mu || policy at mu_ref), so that its weight is on the scale of the tempered objective.

    With the same beta on both, the mu at which reward and penalty balance does not depend on beta.

    Args:
        policy: a stochastic policy.
        mu: floating (N, H).
        mu_ref: floating (N, H), the reference model's; in any floating dtype.
        tempering: beta.

    Returns:
        float64 (N,), nats times beta, at least 0, differentiable in mu.

    Raises:
        ConfigError: deterministic policy.
        ValueError, TypeError: as `Policy.kl`.
    """
    return policy.kl(mu.double(), mu_ref) * _beta(tempering, mu)


def _beta(tempering: Tempering, mu: Tensor) -> float:
    return tempering.beta(mu.shape[1])
