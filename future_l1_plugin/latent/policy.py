"""Latent policies: how a latent z is drawn around mu, its log-density, and the KL between two of them.

    policy = build_policy("vmf", mean_cosine=0.9)
    z = policy.sample(mu, generator)      # rollout
    policy.log_prob(mu_new, z)            # policy loss
    policy.kl(mu_new, mu_ref)             # KL penalty

A policy is a family of distributions indexed by mu, with no parameter to learn. Rows are independent: row i of a result
depends on row i of the arguments only. Rollouts draw with `sample`, which neither waits for the device nor branches on
its values and takes a fixed number of random draws a row, so that it can be captured in a CUDA graph. Losses use
`log_prob` and `kl`, which check their inputs (one wait for the device for each argument).

Precision: computed in float64, returned in float32, or in float64 if mu is float64. A log-density at H = 4096 is of the
order of 1e4, where float32 resolves 1e-3 nats. Pass `mu.double()` where a probability ratio has to be finer than that.
"""

import math
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.policy_base import Policy, check_matrix, check_pair, number_in, result_dtype
from future_l1_plugin.latent.sphere import MAX_KAPPA, angle_table, concentration, log_normaliser, mean_resultant_length


class Deterministic(Policy):
    """z = mu, as the public release decodes. A Dirac has no density and no KL: there is nothing to explore or clip."""

    name = "deterministic"
    stochastic = False

    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """mu itself."""
        check_matrix("mu", mu)
        return mu

    def place(self, mu: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """mu itself."""
        return mu

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        """Zeros, so that latents contribute nothing to a probability ratio. Attached to mu's graph, with gradient 0."""
        check_pair(mu, "z", z)
        return mu[:, :0].sum(-1).to(result_dtype(mu))  # an empty sum: 0 even where mu is not finite

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        """Raises ConfigError: the KL between two Diracs is 0 or infinite."""
        raise ConfigError(
            "the deterministic latent policy has no KL. Set the weight of the latent KL to 0, or choose the policy "
            "vmf (kappa or mean_cosine) or gaussian (sigma)."
        )

    def __repr__(self) -> str:
        return "deterministic()"


class VonMisesFisher(Policy):
    """z = ||mu|| u with u ~ vMF(mu / ||mu||, kappa): the direction is random, the norm is kept.

    Args:
        kappa: concentration, 0 < kappa <= 1e9, the same at every dimension; or
        mean_cosine: E cos(z, mu), 0 < mean_cosine < 1; kappa then follows from the dimension of mu.

    `log_prob` is the density of the direction z/||z|| with respect to the surface measure of the unit sphere. The norm
    has no density (a Dirac at ||mu||) and takes no part, also when mu has moved since z was drawn.

    A mu of norm 0 has no direction. `sample` must not look at values and returns z = 0 for it; `log_prob` and `kl`
    raise ValueError with the row.
    """

    name = "vmf"
    stochastic = True

    def __init__(self, kappa: float | None = None, mean_cosine: float | None = None) -> None:
        if (kappa is None) == (mean_cosine is None):
            raise ConfigError("vmf: give exactly one of kappa (concentration) and mean_cosine (between 0 and 1)")
        if kappa is not None:
            kappa = number_in("vmf: kappa", kappa, MAX_KAPPA)
        else:
            mean_cosine = number_in("vmf: mean_cosine", mean_cosine, 1.0, open_end=True)
        self._kappa, self._mean_cosine = kappa, mean_cosine

    def kappa(self, d: int) -> float:
        """The concentration at dimension d. Raises ConfigError where mean_cosine would need more than 1e9."""
        if self._kappa is not None:
            return self._kappa
        try:
            return concentration(d, self._mean_cosine)
        except ValueError as error:
            raise ConfigError(f"vmf: {error}") from error

    def mean_cosine(self, d: int) -> float:
        """E cos(z, mu) = A_d(kappa) at dimension d."""
        return mean_resultant_length(d, self.kappa(d))

    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `Policy.sample`. One uniform and H normal numbers per row; `place` says what becomes of them.

        The first call for a dimension and device builds a table on the host (about 10 ms): make it before a CUDA graph
        is captured.
        """
        check_matrix("mu", mu, least=2)
        uniform = torch.rand(len(mu), dtype=torch.float64, device=mu.device, generator=generator)
        normal = torch.randn(mu.shape, dtype=torch.float32, device=mu.device, generator=generator)
        return self.place(mu, uniform, normal)

    @torch.no_grad()
    def place(self, mu: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """See `Policy.place`. The angle between z and mu is the `uniform` quantile of its distribution (accuracy: see
        `sphere.angle_table`), the direction in which z leaves mu is that of `normal` in the tangent space."""
        d = mu.shape[1]
        angles, cdf = angle_table(d, self.kappa(d), mu.device)
        # cdf[cell] <= uniform < cdf[cell + 1], so a cell without mass is never hit and the division is safe.
        cell = (torch.searchsorted(cdf, uniform, right=True) - 1).clamp(0, len(cdf) - 2)
        inside = (uniform - cdf[cell]) / (cdf[cell + 1] - cdf[cell])
        angle = torch.lerp(angles[cell], angles[cell + 1], inside)[:, None]  # (N, 1)
        norm = mu.double().norm(dim=-1, keepdim=True)
        mean = mu.double() / norm.clamp_min(_TINY)
        tangent = normal.double() - (normal.double() * mean).sum(-1, keepdim=True) * mean
        tangent = tangent / tangent.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        return (norm * (angle.cos() * mean + angle.sin() * tangent)).to(mu.dtype)

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        """log C_d(kappa) + kappa cos(mu, z)."""
        check_pair(mu, "z", z, least=2)
        d = mu.shape[1]
        cosine = (_direction("mu", mu) * _direction("z", z.detach())).sum(-1)
        return (log_normaliser(d, self.kappa(d)) + self.kappa(d) * cosine).to(result_dtype(mu))

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        """kappa A_d(kappa) (1 - cos(mu, mu_ref)): symmetric, at most 2 kappa A_d(kappa)."""
        check_pair(mu, "mu_ref", mu_ref, least=2)
        d = mu.shape[1]
        # 1 - cos as half a squared distance: exact also where the two nearly agree.
        versine = (_direction("mu", mu) - _direction("mu_ref", mu_ref)).square().sum(-1) / 2
        return (self.kappa(d) * self.mean_cosine(d) * versine).to(result_dtype(mu))

    def __repr__(self) -> str:
        return f"vmf(kappa={self._kappa})" if self._kappa is not None else f"vmf(mean_cosine={self._mean_cosine})"


class Gaussian(Policy):
    """z = mu + sigma eps, eps standard normal in R^H.

    Args:
        sigma: standard deviation of each coordinate, in the units of mu, above 0. The perturbation has a norm of about
            sigma sqrt(H).
    """

    name = "gaussian"
    stochastic = True

    def __init__(self, sigma: float) -> None:
        self.sigma = number_in("gaussian: sigma", sigma, math.inf, open_end=True)

    @torch.no_grad()
    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `Policy.sample`. H normal numbers per row."""
        check_matrix("mu", mu)
        noise = torch.randn(mu.shape, dtype=result_dtype(mu), device=mu.device, generator=generator)
        return self.place(mu, noise, noise)

    @torch.no_grad()
    def place(self, mu: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """See `Policy.place`; `uniform` is not used."""
        return (mu + self.sigma * normal).to(mu.dtype)

    def log_prob(self, mu: Tensor, z: Tensor) -> Tensor:
        """-||z - mu||^2 / (2 sigma^2) - (H/2) log(2 pi sigma^2)."""
        check_pair(mu, "z", z)
        normaliser = mu.shape[1] * (math.log(2 * math.pi) / 2 + math.log(self.sigma))
        squares = ((z.detach().double() - mu.double()) / self.sigma).square().sum(-1)
        return (-squares / 2 - normaliser).to(result_dtype(mu))

    def kl(self, mu: Tensor, mu_ref: Tensor) -> Tensor:
        """||mu - mu_ref||^2 / (2 sigma^2)."""
        check_pair(mu, "mu_ref", mu_ref)
        squares = ((mu.double() - mu_ref.double()) / self.sigma).square().sum(-1)
        return (squares / 2).to(result_dtype(mu))

    def __repr__(self) -> str:
        return f"gaussian(sigma={self.sigma})"


_BUILT_IN: dict[str, type[Policy]] = {kind.name: kind for kind in (Deterministic, VonMisesFisher, Gaussian)}
#: Entry points by which an installed package offers policies of its own: their name -> a subclass of `Policy`. Every
#: process of a host finds them so, and a request over HTTP can name nothing that was not installed.
ENTRY_POINTS = "future_l1.latent_policies"


def policy_names() -> list[str]:
    """The policies that a recipe can name: ours, then those of installed packages."""
    return [*_BUILT_IN, *sorted(_offered())]


def find_policy(name: str) -> type[Policy]:
    """The class of that name. Raises ConfigError: no such policy, or an installed one that cannot be used."""
    if not isinstance(name, str) or name not in policy_names():
        raise ConfigError(f"latent policy: expected one of {', '.join(policy_names())}, found {name!r}")
    return _BUILT_IN.get(name) or _loaded(name)


@cache
def _offered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in _BUILT_IN}


@cache
def _loaded(name: str) -> type[Policy]:
    entry = _offered()[name]
    where = f"latent policy {name}, {entry.value}" + (f" of {entry.dist.name}" if entry.dist else "")
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise ConfigError(f"{where}: expected a subclass of future_l1_plugin.latent.Policy, found {kind!r}")
    lacks = [part for part in ("sample", "place", "log_prob", "kl") if getattr(kind, part) is getattr(Policy, part)]
    lacks += [part for part in ("name", "stochastic") if not hasattr(kind, part)]
    if lacks:
        raise ConfigError(f"{where}: lacks {', '.join(lacks)}, which every policy has (latent/policy_base.py)")
    if kind.name != name:
        raise ConfigError(f"{where}: its `name` is {kind.name!r}. Give entry point and class one name")
    return kind


def build_policy(name: str, **kwargs: Any) -> Policy:
    """The policy of that name.

    Args:
        name: "deterministic" (no keys), "vmf" (`kappa` or `mean_cosine`), "gaussian" (`sigma`), or one that an
            installed package offers (`ENTRY_POINTS`).
        kwargs: its keys.

    Raises:
        ConfigError: unknown name, unknown or missing key, value outside its range; see `find_policy`.
    """
    kind = find_policy(name)
    keys = signature(kind).parameters
    unknown = sorted(set(kwargs) - set(keys))
    if unknown:
        valid = f"valid keys: {', '.join(keys)}" if keys else "it takes none"
        raise ConfigError(f"latent policy {name}: unknown key {', '.join(map(repr, unknown))}; {valid}")
    missing = [key for key, parameter in keys.items() if parameter.default is parameter.empty and key not in kwargs]
    if missing:
        raise ConfigError(f"latent policy {name}: missing key {', '.join(missing)}")
    return kind(**kwargs)


_TINY = torch.finfo(torch.float64).tiny


def _direction(name: str, rows: Tensor) -> Tensor:
    """Rows scaled to length 1, in float64."""
    rows = rows.double()
    norm = rows.norm(dim=-1, keepdim=True)
    bad = ~((norm > 0) & norm.isfinite()).squeeze(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        found = float(norm[row])
        raise ValueError(f"vmf: {name} row {row}: expected a norm that is finite and above 0, found {found:g}")
    return rows / norm
