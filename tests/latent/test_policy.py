"""The latent policies against references that share no code with them: scipy, mpmath, quadrature, Monte Carlo.

Everything is seeded, so a test that passes once passes always. "3 SE" = three standard errors of the Monte Carlo mean.
"""

import math
import sys
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch._subclasses.fake_tensor import FakeTensorMode

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent import policy as policies
from future_l1_plugin.latent.policy import build_policy, policy_names
from future_l1_plugin.latent.sphere import angle_table, concentration, log_normaliser, mean_resultant_length

CPU = torch.device("cpu")
#: (d, kappa): nearly uniform, moderate, concentrated; at d = 4096, 19397.9 has a mean cosine of 0.9.
CASES = [
    *((2, kappa) for kappa in (1e-3, 1.0, 50.0, 1e5)),
    *((3, kappa) for kappa in (1e-3, 1.0, 50.0, 1e5)),
    *((16, kappa) for kappa in (1e-3, 5.0, 70.0, 1e4)),
    *((4096, kappa) for kappa in (1e-3, 1e3, 19397.9, 1e5)),
]
#: mpmath at 30 digits needs 23 s for this pair: (log I_(d/2-1)(kappa), A_d(kappa)) at d = 4096, kappa = 1e5.
SLOW = {(4096, 1e5): (99972.3741817351, 0.979734490589044)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(n, d, seed=0, dtype=torch.float64):
    """n rows of norms between 1 and 3."""
    generator = seeded(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True) * (1 + 2 * torch.rand(n, 1, generator=generator))).to(dtype)


def bessel_reference(d, kappa):
    """log I_(d/2-1)(kappa) and the ratio A_d(kappa), with 30 digits."""
    if (d, kappa) in SLOW:
        return SLOW[d, kappa]
    with mpmath.workdps(30):
        order, k = mpmath.mpf(d) / 2 - 1, mpmath.mpf(kappa)
        below = mpmath.besseli(order, k, maxterms=10**6)
        return float(mpmath.log(below)), float(mpmath.besseli(order + 1, k, maxterms=10**6) / below)


# Numbers of the von Mises-Fisher distribution


@pytest.mark.parametrize(("d", "kappa"), CASES)
def test_normaliser_and_mean_against_bessel_functions(d, kappa):
    log_bessel, ratio = bessel_reference(d, kappa)
    expected = (d / 2 - 1) * math.log(kappa) - d / 2 * math.log(2 * math.pi) - log_bessel
    assert log_normaliser(d, kappa) == pytest.approx(expected, abs=1e-11, rel=1e-14)
    assert mean_resultant_length(d, kappa) == pytest.approx(ratio, rel=1e-14)


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.0), (3, 50.0), (16, 1e-3), (16, 1e4), (4096, 1e4), (4096, 19397.9)])
def test_normaliser_against_scaled_bessel(d, kappa):
    log_bessel = math.log(special.ive(d / 2 - 1, kappa)) + kappa
    expected = (d / 2 - 1) * math.log(kappa) - d / 2 * math.log(2 * math.pi) - log_bessel
    assert log_normaliser(d, kappa) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 10.0, 300.0])
def test_normaliser_closed_form_on_the_ordinary_sphere(kappa):
    assert log_normaliser(3, kappa) == pytest.approx(math.log(kappa / (4 * math.pi * math.sinh(kappa))), abs=1e-12)
    assert mean_resultant_length(3, kappa) == pytest.approx(1 / math.tanh(kappa) - 1 / kappa, rel=1e-9)


@pytest.mark.parametrize("d", [2, 3, 16, 4096])
def test_normaliser_uniform_limit(d):
    log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
    # To second order, log C_d(kappa) = -log area - kappa^2 / (2 d).
    assert log_normaliser(d, 1e-3) == pytest.approx(-log_area - 1e-6 / (2 * d), abs=5e-12)


@pytest.mark.parametrize("kappa", [0.1, 20.0, 1e3])
def test_log_prob_against_scipy(kappa):
    mu, z = directions(20, 16), directions(20, 16, seed=1)
    z = mu / mu.norm(dim=1, keepdim=True) + 0.2 * z  # some near, some far
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    expected = [
        stats.vonmises_fisher(m / np.linalg.norm(m), kappa).logpdf(u) for m, u in zip(mu.numpy(), unit, strict=True)
    ]
    found = build_policy("vmf", kappa=kappa).log_prob(mu, z)
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("d", [2, 3, 16, 4096])
@pytest.mark.parametrize("mean_cosine", [1e-4, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_mean_cosine_round_trip(d, mean_cosine):
    policy = build_policy("vmf", mean_cosine=mean_cosine)
    assert policy.mean_cosine(d) == pytest.approx(mean_cosine, rel=1e-14)
    kappa = concentration(d, mean_cosine)
    assert policy.kappa(d) == kappa
    assert concentration(d, mean_resultant_length(d, kappa)) == pytest.approx(kappa, rel=1e-10)


def test_mean_cosine_inverts_known_values():
    assert concentration(3, 1 / math.tanh(10.0) - 0.1) == pytest.approx(10.0, rel=1e-12)
    assert concentration(16, bessel_reference(16, 70.0)[1]) == pytest.approx(70.0, rel=1e-12)
    assert concentration(4096, bessel_reference(4096, 1e4)[1]) == pytest.approx(1e4, rel=1e-12)


# The sampler


def cosine_cdf(d, kappa):
    """Distribution function of cos(z, mu), by adaptive quadrature of its density exp(k w) (1 - w^2)^((d-3)/2)."""
    mode = 2 * kappa / (d - 3 + math.hypot(d - 3, 2 * kappa)) if kappa > 1 or d > 3 else 0.0
    if d == 3:
        return lambda w: np.expm1(-kappa * (1 - w)) / -math.expm1(-2 * kappa) + 1  # closed form

    def log_density(w):
        return kappa * w + (d - 3) / 2 * math.log1p(-w * w)

    peak = log_density(mode)
    sd = math.sqrt(1 - mean_resultant_length(d, kappa) ** 2 - (d - 1) / kappa * mean_resultant_length(d, kappa))
    low, high = max(-1.0, mode - 15 * sd), min(1.0, mode + 15 * sd)

    def mass(a, b):
        return integrate.quad(lambda w: math.exp(log_density(w) - peak), a, b, epsabs=0, epsrel=1e-11, limit=200)[0]

    def cdf(points):
        points = np.clip(points, low, high)
        order = np.argsort(points)
        edges = np.concatenate([[low], points[order], [high]])
        masses = np.cumsum([mass(a, b) if b > a else 0.0 for a, b in pairwise(edges)])
        result = np.empty(len(points))
        result[order] = masses[:-1] / masses[-1]
        return result

    return cdf


QUANTILE_CASES = [(3, 1e-3), (3, 1.0), (3, 1e5), (16, 0.1), (16, 70.0), (16, 1e4), (4096, 1e3), (4096, 19397.9)]


@pytest.mark.parametrize(("d", "kappa"), QUANTILE_CASES)
def test_angle_is_the_quantile_of_its_uniform(d, kappa):
    # Not a statistical test: the distribution function at the drawn angle must give the uniform back, to 2e-7.
    uniform = torch.linspace(1e-6, 1 - 1e-6, 301, dtype=torch.float64)
    mu = directions(1, d).expand(301, d)
    z = build_policy("vmf", kappa=kappa).place(mu, uniform, torch.randn(301, d, generator=seeded()))
    cosine = torch.cosine_similarity(mu, z, dim=1).numpy()
    # Rising angle = falling cosine.
    np.testing.assert_allclose(1 - cosine_cdf(d, kappa)(cosine), uniform.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 40.0])  # from 50 on, scipy approximates by a normal
def test_angle_on_the_circle_against_scipy(kappa):
    # On the circle the folded angle has twice the von Mises distribution's mass on [0, t].
    uniform = torch.linspace(1e-6, 1 - 1e-6, 301, dtype=torch.float64)
    mu = directions(1, 2).expand(301, 2)
    z = build_policy("vmf", kappa=kappa).place(mu, uniform, torch.randn(301, 2, generator=seeded()))
    angle = torch.cosine_similarity(mu, z, dim=1).clamp(-1, 1).acos().numpy()
    np.testing.assert_allclose(2 * stats.vonmises(kappa).cdf(angle) - 1, uniform.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize(("d", "kappa"), CASES)
def test_table_reproduces_the_mean_cosine(d, kappa):
    angles, cdf = angle_table(d, kappa, CPU)
    assert (angles.diff() > 0).all() and (cdf.diff() >= 0).all()
    assert float(cdf[0]) == 0 and float(cdf[-1]) == 1
    # The sampler's own law is uniform inside a cell: E cos = sum_cells mass (sin b - sin a) / (b - a).
    mean = float((cdf.diff() * angles.sin().diff() / angles.diff()).sum())
    assert mean == pytest.approx(mean_resultant_length(d, kappa), abs=1e-8)


@pytest.mark.parametrize(("d", "kappa"), CASES)
def test_mean_cosine_of_draws(d, kappa):
    n = 2_000 if d == 4096 else 200_000
    mu = directions(1, d).expand(n, d)
    z = build_policy("vmf", kappa=kappa).sample(mu, seeded(d))
    versine = (z / z.norm(dim=1, keepdim=True) - mu / mu.norm(dim=1, keepdim=True)).square().sum(1) / 2
    expected = 1 - mean_resultant_length(d, kappa)
    assert abs(float(versine.mean()) - expected) < 3 * float(versine.std()) / math.sqrt(n)


@pytest.mark.parametrize(("d", "kappa"), [(3, 1.0), (3, 50.0), (16, 5.0), (16, 70.0), (4096, 1e3), (4096, 19397.9)])
def test_marginal_of_the_cosine_kolmogorov_smirnov(d, kappa):
    n = 2_000 if d == 4096 else 5_000
    mu = directions(1, d, seed=1).expand(n, d)
    z = build_policy("vmf", kappa=kappa).sample(mu, seeded(7 * d))
    cosine = torch.cosine_similarity(mu, z, dim=1).numpy()
    assert stats.kstest(cosine, cosine_cdf(d, kappa)).pvalue > 0.02


@pytest.mark.parametrize("d", [2, 3, 16, 4096])
def test_tangent_directions_are_isotropic(d):
    n, kappa = (2_000, 19397.9) if d == 4096 else (40_000, 20.0)
    mu = directions(1, d, seed=2)
    z = build_policy("vmf", kappa=kappa).sample(mu.expand(n, d), seeded(3))
    mean = mu / mu.norm()
    tangent = z - (z @ mean.T) * mean
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    frame = torch.linalg.qr(torch.cat([mean.T, torch.randn(d, min(d - 1, 15), generator=seeded()).double()], 1))[0]
    inside = tangent @ frame[:, 1:]  # coordinates in up to 15 orthonormal tangent directions
    assert (tangent @ mean.T).abs().max() < 1e-8
    # Each coordinate has mean 0 and variance 1/(d-1); different coordinates are uncorrelated.
    scaled = inside * math.sqrt(d - 1)
    moments = scaled.T @ scaled / n
    bound = 4.5 / math.sqrt(n)
    assert scaled.mean(0).abs().max() < bound
    assert (moments - torch.eye(len(moments), dtype=torch.float64)).abs().max() < math.sqrt(2) * bound
    # The direction says nothing about the angle.
    angle = torch.cosine_similarity(z, mu.expand(n, d), dim=1).acos()
    assert np.abs(np.corrcoef(angle.numpy(), inside.numpy(), rowvar=False)[0, 1:]).max() < bound


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)]
)
@pytest.mark.parametrize("d", [2, 3, 16, 4096])
def test_norm_is_kept(d, dtype, tolerance):
    mu = directions(50, d, dtype=dtype)
    z = build_policy("vmf", mean_cosine=0.8).sample(mu, seeded())
    assert z.dtype == dtype and z.shape == mu.shape
    torch.testing.assert_close(z.double().norm(dim=1), mu.double().norm(dim=1), rtol=tolerance, atol=0)


def test_vmf_sample_of_zero_rows_is_zero_and_finite():
    mu = torch.zeros(2, 8)
    mu[1] = 1.0
    z = build_policy("vmf", kappa=5.0).sample(mu, seeded())
    assert torch.equal(z[0], torch.zeros(8)) and z.isfinite().all()


def test_tables_made_in_inference_mode_serve_autograd():
    policy = build_policy("vmf", kappa=12.34)  # a kappa that no other test has put into the cache
    with torch.inference_mode():
        policy.log_prob(torch.ones(1, 5), torch.ones(1, 5))
        policy.sample(torch.ones(1, 5))
    mu = torch.ones(1, 5, requires_grad=True)
    policy.log_prob(mu, policy.sample(mu)).sum().backward()
    assert not any(tensor.is_inference() for tensor in angle_table(5, 12.34, CPU))


def test_extreme_uniforms_give_finite_draws():
    uniform = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for d, kappa in CASES:
        z = build_policy("vmf", kappa=kappa).place(directions(4, d), uniform, torch.randn(4, d, generator=seeded()))
        assert z.isfinite().all()


def test_sampler_never_reads_a_value_back():
    # Fake tensors have no values: anything that would wait for the device raises here.
    policy = build_policy("vmf", mean_cosine=0.9)
    policy.sample(torch.ones(1, 16))  # builds the table
    with FakeTensorMode(allow_non_fake_inputs=True):
        for kind in (policy, build_policy("gaussian", sigma=0.1), build_policy("deterministic")):
            assert kind.sample(torch.empty(5, 16)).shape == (5, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["vmf", "gaussian"])
def test_sampler_runs_in_a_cuda_graph(name):
    policy = build_policy(name, **({"mean_cosine": 0.9} if name == "vmf" else {"sigma": 0.1}))
    mu = directions(256, 4096, dtype=torch.bfloat16).cuda()
    policy.sample(mu[:1])  # builds the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = policy.sample(mu)
        graph.replay()
        first = z.clone()
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(first, z)
    if name == "vmf":
        cosine = torch.cosine_similarity(mu.double(), z.double(), dim=1)
        assert float(cosine.mean()) == pytest.approx(0.9, abs=3 * float(cosine.std()) / 16)


# Densities


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 500.0])
def test_vmf_density_integrates_to_one(kappa):
    policy = build_policy("vmf", kappa=kappa)
    angle = torch.arange(4000, dtype=torch.float64) * (2 * math.pi / 4000)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    density = policy.log_prob(directions(1, 2).expand_as(circle), circle).exp()
    assert float(density.mean()) * 2 * math.pi == pytest.approx(1, abs=1e-11)

    # d = 3: Gauss-Legendre in the height, equidistant in the longitude; mu is in general position.
    height, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(200))
    angle = torch.arange(400, dtype=torch.float64) * (2 * math.pi / 400)
    radius = (1 - height**2).sqrt()[:, None]
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), height[:, None].expand(200, 400)], -1).reshape(
        -1, 3
    )
    density = policy.log_prob(directions(1, 3).expand_as(points), points).exp().reshape(200, 400)
    assert float((density.mean(1) * 2 * math.pi * weight).sum()) == pytest.approx(1, abs=1e-11)


def test_vmf_log_prob_depends_on_directions_only_and_keeps_its_digits():
    policy = build_policy("vmf", kappa=1e4)
    mu, z = directions(8, 4096, dtype=torch.float32), directions(8, 4096, seed=1, dtype=torch.float32)
    z = mu + 0.3 * z
    exact = policy.log_prob(mu.double(), z.double())
    assert exact.dtype == torch.float64
    # In float32 only the result is rounded: half a unit in the last place of 1e4 is 5e-4.
    assert torch.equal(policy.log_prob(mu, z), exact.float())
    torch.testing.assert_close(policy.log_prob(7.0 * mu.double(), 0.01 * z.double()), exact, rtol=0, atol=1e-10)
    # From the definition, row by row, with numpy.
    for m, u, found in zip(mu.double().numpy(), z.double().numpy(), exact, strict=True):
        cosine = m @ u / np.linalg.norm(m) / np.linalg.norm(u)
        assert float(found) == pytest.approx(1e4 * cosine + 5303.916769747, abs=1e-8)


def test_gaussian_log_prob_against_torch():
    mu, z = directions(6, 40), directions(6, 40, seed=1)
    expected = torch.distributions.Normal(mu, 0.3).log_prob(z).sum(1)
    torch.testing.assert_close(build_policy("gaussian", sigma=0.3).log_prob(mu, z), expected, rtol=1e-13, atol=0)


def test_gaussian_draws():
    mu = directions(1, 16).expand(20_000, 16)
    noise = (build_policy("gaussian", sigma=0.3).sample(mu, seeded()) - mu) / 0.3
    assert noise.mean(0).abs().max() < 4 / math.sqrt(20_000)
    assert stats.kstest(noise.flatten().numpy(), stats.norm.cdf).pvalue > 0.02


# KL


@pytest.mark.parametrize(
    ("d", "name", "kwargs"),
    [
        (2, "vmf", {"kappa": 3.0}),
        (3, "vmf", {"kappa": 10.0}),
        (16, "vmf", {"mean_cosine": 0.8}),
        (4096, "vmf", {"mean_cosine": 0.9}),
        (16, "gaussian", {"sigma": 0.4}),
        (4096, "gaussian", {"sigma": 0.05}),
    ],
)
def test_kl_agrees_with_monte_carlo(d, name, kwargs):
    n = 2_000 if d == 4096 else 100_000
    policy = build_policy(name, **kwargs)
    mu = directions(1, d)
    mu_ref = mu + (0.2 if d == 4096 else 0.6) * directions(1, d, seed=3)
    kl = float(policy.kl(mu, mu_ref))
    rows, rows_ref = mu.expand(n, d), mu_ref.expand(n, d)
    z = policy.sample(rows, seeded(5))
    ratio = policy.log_prob(rows, z) - policy.log_prob(rows_ref, z)
    error = float(ratio.std()) / math.sqrt(n)
    assert abs(float(ratio.mean()) - kl) < 3 * error
    assert kl > 20 * error, "the case is only worth something if the KL is well above its noise"


def test_vmf_kl_agrees_with_quadrature():
    policy = build_policy("vmf", kappa=4.0)
    mu, mu_ref = directions(1, 2), directions(1, 2, seed=3)
    angle = torch.arange(4000, dtype=torch.float64) * (2 * math.pi / 4000)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    log_p = policy.log_prob(mu.expand_as(circle), circle)
    log_q = policy.log_prob(mu_ref.expand_as(circle), circle)
    expected = float((log_p.exp() * (log_p - log_q)).mean()) * 2 * math.pi
    assert expected > 0.1
    assert float(policy.kl(mu, mu_ref)) == pytest.approx(expected, rel=1e-11)


def test_kl_by_hand():
    # d = 3, kappa = 10, right angle: 10 (coth 10 - 1/10) (1 - 0) = 9.0000000412...
    x, y = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    assert float(build_policy("vmf", kappa=10.0).kl(x.double(), y.double())) == pytest.approx(9.0000000412, abs=1e-9)
    # (2^2 + 0.5^2) / (2 * 0.5^2) = 8.5
    assert float(build_policy("gaussian", sigma=0.5).kl(x, y)) == 8.5


def test_vmf_kl_of_nearly_equal_means_has_full_precision():
    mu = directions(1, 4096)
    step = torch.randn(1, 4096, generator=seeded(), dtype=torch.float64)
    step = step - (step * mu).sum() / (mu * mu).sum() * mu
    step = step / step.norm() * mu.norm()
    policy = build_policy("vmf", kappa=1e4)
    # 1 - cos(atan 1e-9) = 5e-19, far below the resolution of a cosine
    expected = 1e4 * bessel_reference(4096, 1e4)[1] * 5e-19
    assert float(policy.kl(mu, mu + 1e-9 * step)) == pytest.approx(expected, rel=1e-6)
    assert float(policy.kl(mu, mu.clone())) == 0


# Gradients


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vmf", {"kappa": 7.0}), ("vmf", {"mean_cosine": 0.6}), ("gaussian", {"sigma": 0.7})]
)
@pytest.mark.parametrize("d", [2, 16])
def test_gradients(name, kwargs, d):
    policy = build_policy(name, **kwargs)
    mu, z = directions(3, d).requires_grad_(), directions(3, d, seed=1)
    assert torch.autograd.gradcheck(lambda m: policy.log_prob(m, z), mu, eps=1e-6, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradcheck(policy.kl, (mu, directions(3, d, seed=2).requires_grad_()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), [("vmf", {"kappa": 7.0}), ("gaussian", {"sigma": 0.7})])
def test_float32_gradients_reach_mu_and_never_z(name, kwargs):
    policy = build_policy(name, **kwargs)
    mu, z = directions(3, 16, dtype=torch.float32).requires_grad_(), directions(3, 16, seed=1).requires_grad_()
    policy.log_prob(mu, z).sum().backward()
    assert mu.grad.dtype == torch.float32 and (mu.grad != 0).all()
    assert z.grad is None
    assert not policy.sample(mu, seeded()).requires_grad
    wide = mu.detach().double().requires_grad_()
    policy.log_prob(wide, z).sum().backward()
    torch.testing.assert_close(mu.grad, wide.grad.float(), rtol=1e-5, atol=1e-5)


# The contract common to all


EVERY = [("deterministic", {}), ("vmf", {"kappa": 20.0}), ("vmf", {"mean_cosine": 0.9}), ("gaussian", {"sigma": 0.1})]


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_and_dtypes(name, kwargs, dtype):
    policy = build_policy(name, **kwargs)
    assert policy.name == name and policy.stochastic is (name != "deterministic")
    for n in (0, 1, 5):
        mu = directions(n, 16, dtype=dtype)
        z = policy.sample(mu, seeded())
        assert z.dtype == dtype and z.shape == (n, 16)
        assert bool((z == mu).all()) is (not policy.stochastic or n == 0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        results = [policy.log_prob(mu, z)] + ([policy.kl(mu, z)] if policy.stochastic else [])
        assert all(result.shape == (n,) and result.dtype == wide for result in results)


@pytest.mark.parametrize(("name", "kwargs"), EVERY[1:])
def test_seeds_and_independent_rows(name, kwargs):
    policy = build_policy(name, **kwargs)
    mu = directions(4, 16)
    z = policy.sample(mu, seeded(1))
    assert torch.equal(z, policy.sample(mu, seeded(1)))
    assert not torch.equal(z, policy.sample(mu, seeded(2)))
    # Another row's mu leaves this row's draw, density and KL alone; equal rows get different draws.
    changed = mu.clone()
    changed[2] = directions(1, 16, seed=9)
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(z[keep], policy.sample(changed, seeded(1))[keep])
    assert torch.equal(policy.log_prob(mu, z)[keep], policy.log_prob(changed, z)[keep])
    assert torch.equal(policy.kl(mu, z)[keep], policy.kl(changed, z)[keep])
    assert len(policy.sample(mu[:1].expand(4, 16), seeded(1)).unique(dim=0)) == 4


def test_deterministic_is_a_dirac():
    policy = build_policy("deterministic")
    mu = torch.tensor([[1.0, math.inf], [2.0, 3.0]], requires_grad=True)
    assert torch.equal(policy.sample(mu), mu)
    log_prob = policy.log_prob(mu, mu)
    assert torch.equal(log_prob, torch.zeros(2))
    log_prob.sum().backward()
    assert torch.equal(mu.grad, torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"latent KL to 0, or choose the policy vmf .* or gaussian"):
        policy.kl(mu, mu)


def test_repr_names_the_settings():
    found = [str(build_policy(name, **kwargs)) for name, kwargs in EVERY]
    assert found == ["deterministic()", "vmf(kappa=20.0)", "vmf(mean_cosine=0.9)", "gaussian(sigma=0.1)"]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("uniform", {}, "expected one of deterministic, vmf, gaussian, laplace, found 'uniform'"),
        ("vmf", {"k": 3.0}, "unknown key 'k'; valid keys: kappa, mean_cosine"),
        ("deterministic", {"sigma": 3.0}, "unknown key 'sigma'; it takes none"),
        ("gaussian", {}, "missing key sigma"),
        ("vmf", {}, "exactly one of kappa"),
        ("vmf", {"kappa": 1.0, "mean_cosine": 0.5}, "exactly one of kappa"),
        ("vmf", {"mean_cosine": 1.0}, r"mean_cosine: expected a number in \(0, 1\), found 1.0"),
        ("vmf", {"kappa": 0.0}, r"kappa: expected a number in \(0, 1e\+09\], found 0.0"),
        ("vmf", {"kappa": math.inf}, "kappa: expected a number"),
        ("vmf", {"kappa": "20"}, "kappa: expected a number .* found '20'"),
        ("gaussian", {"sigma": -1}, "sigma: expected a number"),
        ("gaussian", {"sigma": math.nan}, "sigma: expected a number"),
        ("gaussian", {"sigma": True}, "sigma: expected a number"),
    ],
)
def test_bad_settings(name, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(name, **kwargs)


def test_mean_cosine_too_close_to_one_for_the_dimension():
    policy = build_policy("vmf", mean_cosine=1 - 1e-9)
    assert policy.mean_cosine(2) == pytest.approx(1 - 1e-9, abs=1e-15)
    with pytest.raises(ConfigError, match="too close to 1, needs kappa above 1e\\+09 at d=4096"):
        policy.sample(torch.ones(1, 4096))


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_bad_tensors(name, kwargs):
    policy = build_policy(name, **kwargs)
    mu = directions(2, 4)
    with pytest.raises(ValueError, match=r"mu: expected shape \(N, H\).* found \(1, 2, 4\)"):
        policy.sample(mu[None])
    with pytest.raises(TypeError, match=r"mu: expected a floating dtype, found torch\.int64"):
        policy.sample(mu.long())
    with pytest.raises(ValueError, match=r"mu and z: expected equal shapes, found \(2, 4\) and \(1, 4\)"):
        policy.log_prob(mu, mu[:1])


def test_rows_without_direction():
    policy, mu = build_policy("vmf", kappa=5.0), torch.ones(2, 4)
    for value in (0.0, math.nan, math.inf):
        bad = mu.clone()
        bad[1] = value
        with pytest.raises(ValueError, match="vmf: z row 1: expected a norm that is finite and above 0"):
            policy.log_prob(mu, bad)
        with pytest.raises(ValueError, match="vmf: mu row 1"):
            policy.kl(bad, mu)
    with pytest.raises(ValueError, match="H >= 2"):
        policy.sample(torch.ones(3, 1))


def test_every_policy_is_tested_here():
    assert {name for name, _ in EVERY} == set(policy_names()) - {"laplace"}


# A policy that another package brings, tests/installed


def test_an_installed_package_offers_a_policy():
    policy, mu = build_policy("laplace", scale=0.5), directions(3, 4)
    z = policy.sample(mu, seeded())
    expected = stats.laplace(loc=mu.numpy(), scale=0.5).logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(policy.log_prob(mu, z), expected)
    with pytest.raises(ConfigError, match="latent policy laplace: unknown key 'sigma'; valid keys: scale"):
        build_policy("laplace", sigma=1.0)
    with pytest.raises(ConfigError, match="missing key scale"):
        build_policy("laplace")
    with pytest.raises(ConfigError, match=r"expected one of .*, found \['laplace'\]"):
        build_policy(["laplace"])


@pytest.mark.parametrize(
    "entry, module, match",
    [
        (
            "other = other_policy:Other",
            None,
            "other, other_policy:Other of other-policy: cannot be imported: No module",
        ),
        ("other = other_policy:Other", "", "cannot be imported: .*no attribute 'Other'"),
        ("other = other_policy:Other", "Other = dict", "expected a subclass of .*Policy, found <class 'dict'>"),
        (
            "other = other_policy:Other",
            "class Other(Policy): name = 'other'; stochastic = True",
            "lacks sample, place, ",
        ),
        ("other = laplace_policy:Laplace", "", "its `name` is 'laplace'. Give entry point and class one name"),
        ("vmf = laplace_policy:Laplace", "", None),  # our own names stay ours
    ],
)
def test_what_is_wrong_with_an_installed_policy(tmp_path, monkeypatch, entry, module, match):
    info = tmp_path / "other_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{policies.ENTRY_POINTS}]\n{entry}\n")
    if module is not None:
        (tmp_path / "other_policy.py").write_text(f"from future_l1_plugin.latent import Policy\n{module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_policy", raising=False)
    for cached in (policies._offered, policies._loaded):
        cached.cache_clear()
    try:
        if match is None:
            assert isinstance(build_policy("vmf", kappa=1.0), policies.VonMisesFisher)
            return
        with pytest.raises(ConfigError, match=match):
            build_policy("other")
    finally:
        for cached in (policies._offered, policies._loaded):
            cached.cache_clear()
