"""Tempered densities: numbers by hand, the figures of the module's docstring, and what the exponent does to gradients.

Everything is seeded, so a test that passes once passes always. "SE" = standard error of the Monte Carlo mean.
"""

import math

import pytest
import torch

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo import Tempering, continue_log_prob, latent_kl, latent_log_prob
from future_l1_plugin.latent import build_policy

NONE = Tempering("none")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def turned(d, delta=0.0):
    """The first axis of R^d, turned by `delta` radians towards the second: (1, d)."""
    mu = torch.zeros(1, d, dtype=torch.float64)
    mu[0, 0], mu[0, 1] = math.cos(delta), math.sin(delta)
    return mu


@pytest.mark.parametrize(
    ("name", "dimension", "beta"),
    [
        ("none", 4096, 1.0),
        ("sqrt_dim", 4096, 1 / 64),
        ("dim", 4096, 1 / 4096),
        ("sqrt_dim", 16, 0.25),
        ("dim", 16, 0.0625),
        ("dim", 1, 1.0),
        (0.3, 4096, 0.3),
        (1, 16, 1.0),
    ],
)
def test_exponent(name, dimension, beta):
    assert Tempering.from_name(name).beta(dimension) == beta


@pytest.mark.parametrize("name", ["sqrt", "0.5", 0, -0.1, 1.1, math.nan, True, None])
def test_bad_names(name):
    with pytest.raises(ConfigError, match=r"expected one of none, sqrt_dim, dim or a number in \(0, 1\], found"):
        Tempering.from_name(name)
    with pytest.raises(ValueError, match="dimension of at least 1, found 0"):
        NONE.beta(0)


def test_log_prob_and_kl_by_hand():
    # H = 4, sigma = 0.5, z - mu = (0.5, 0, 0, 1): -(1 + 4)/2 - 2 log(2 pi) - 4 log 0.5 = -2.5 - 3.67575 + 2.77259.
    mu, z = torch.zeros(1, 4), torch.tensor([[0.5, 0.0, 0.0, 1.0]])
    gaussian = build_policy("gaussian", sigma=0.5)
    exact = -2.5 - 2 * math.log(2 * math.pi) + 4 * math.log(2)
    for name, beta in (("none", 1.0), ("sqrt_dim", 0.5), ("dim", 0.25)):
        found = latent_log_prob(gaussian, mu, z, Tempering(name))
        assert found.dtype == torch.float64 and found.shape == (1,)
        assert float(found) == pytest.approx(beta * exact, rel=1e-14)
        # KL = ||mu - mu_ref||^2 / (2 sigma^2) = 1.25 / 0.5 = 2.5
        assert float(latent_kl(gaussian, mu, z, Tempering(name))) == pytest.approx(beta * 2.5, rel=1e-14)


def test_rounding_happens_nowhere_on_the_way():
    # bfloat16 means and latents: the density is still that of the stored numbers, in float64.
    policy = build_policy("vmf", mean_cosine=0.9)
    mu = torch.randn(3, 4096, generator=seeded()).bfloat16()
    z = policy.sample(mu, seeded(1))
    exact = policy.log_prob(mu.double(), z.double())
    assert torch.equal(latent_log_prob(policy, mu, z, NONE), exact)
    assert (policy.log_prob(mu, z).double() - exact).abs().max() > 1e-5  # what float32 would lose


def test_deterministic_gives_zeros_on_the_graph():
    mu = torch.randn(3, 8, requires_grad=True)
    found = latent_log_prob(build_policy("deterministic"), mu, mu.detach(), Tempering("dim"))
    assert found.dtype == torch.float64 and torch.equal(found, torch.zeros(3, dtype=torch.float64))
    found.sum().backward()
    assert torch.equal(mu.grad, torch.zeros(3, 8))
    with pytest.raises(ConfigError, match="latent KL to 0"):
        latent_kl(build_policy("deterministic"), mu, mu, NONE)


@pytest.mark.parametrize(
    ("delta", "share"), [(0.001, (0.45, 0.0, 0.0)), (0.01, (0.95, 0.0, 0.0)), (0.1, (1.0, 1.0, 0.0))]
)
def test_size_of_log_ratios_at_4096(delta, share):
    """The table in the docstring of `tempering`."""
    n, d, policy = 600, 4096, build_policy("vmf", mean_cosine=0.9)
    fisher = policy.kappa(d) * policy.mean_cosine(d)
    assert policy.kappa(d) == pytest.approx(19398, abs=1) and fisher == pytest.approx(17458, abs=1)
    old, new = turned(d), turned(d, delta)
    z = policy.sample(old.expand(n, d), seeded())
    for name, beta, outside in zip(("none", "sqrt_dim", "dim"), (1, 1 / 64, 1 / 4096), share, strict=True):
        rule = Tempering(name)
        log_ratio = latent_log_prob(policy, new.expand(n, d), z, rule)
        log_ratio = log_ratio - latent_log_prob(policy, old.expand(n, d), z, rule)
        deviation = beta * math.sqrt(fisher) * math.sin(delta)
        mean = -beta * fisher * (1 - math.cos(delta))
        assert float(log_ratio.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(n))
        assert float(log_ratio.std()) == pytest.approx(deviation, rel=0.12)  # 4 SE
        assert float(latent_kl(policy, old, new, rule)) == pytest.approx(-mean, rel=1e-6)
        found = float(((log_ratio.exp() - 1).abs() > 0.1).double().mean())
        assert found == pytest.approx(outside, abs=0.06)


def test_deviation_under_sqrt_dim_does_not_depend_on_the_dimension():
    for rule, expected in (("sqrt_dim", 1.0), ("dim", None)):
        deviations = []
        for d in (256, 4096):
            policy, n = build_policy("vmf", mean_cosine=0.9), 600
            z = policy.sample(turned(d).expand(n, d), seeded())
            new = latent_log_prob(policy, turned(d, 0.01).expand(n, d), z, Tempering(rule))
            deviations.append(float((new - latent_log_prob(policy, turned(d).expand(n, d), z, Tempering(rule))).std()))
        # "dim": the mean is what stays; the deviation falls with sqrt(4096 / 256) = 4
        assert deviations[0] / deviations[1] == pytest.approx(expected or 4.0, rel=0.12)


@pytest.mark.parametrize("rule", ["none", "sqrt_dim", "dim", 0.5])
@pytest.mark.parametrize("name", ["vmf", "gaussian"])
def test_on_policy_gradient_is_beta_times_the_exact_one(name, rule):
    """f(z) = <t, z> has a known mean: A_d(kappa) <t, mu / ||mu||> under vMF (of the direction), <t, mu> under a
    Gaussian. The gradient of E_old[r^beta f] at r = 1 must be beta times the gradient of that mean."""
    n, d = 40_000, 16
    policy = build_policy(name, **({"mean_cosine": 0.8} if name == "vmf" else {"sigma": 0.3}))
    mu = (1.5 * turned(d, 0.7)).requires_grad_()
    target = torch.nn.functional.normalize(torch.randn(1, d, generator=seeded(3), dtype=torch.float64))
    mean = policy.mean_cosine(d) * (target * mu).sum() / mu.norm() if name == "vmf" else (target * mu).sum()
    (exact,) = torch.autograd.grad(mean, mu)

    rows = mu.detach().expand(n, d).clone().requires_grad_()
    z = policy.sample(rows.detach(), seeded(4))
    f = (torch.nn.functional.normalize(z) if name == "vmf" else z) @ target[0]
    tempering = Tempering(rule)
    log_prob = latent_log_prob(policy, rows, z, tempering)
    ((log_prob - log_prob.detach()).exp() * f).sum().backward()
    each = rows.grad  # (n, d): one estimate a row
    error = (each.mean(0) - tempering.beta(d) * exact[0]).abs() / (each.std(0) / math.sqrt(n)).clamp_min(1e-12)
    assert error.max() < 4
    signal = tempering.beta(d) * exact.norm() / (each.std(0).norm() / math.sqrt(n))
    assert signal > 10, "the case is only worth something if the gradient is well above its noise"


def test_off_policy_bias_of_the_gaussian_is_the_closed_form():
    # d = 4, sigma = 0.5, displacement 0.4: E r^beta = exp(-beta (1 - beta) 0.16 / 0.5); variance falls with beta.
    n, policy = 200_000, build_policy("gaussian", sigma=0.5)
    old = torch.zeros(n, 4, dtype=torch.float64)
    new = old.clone()
    new[:, 1] = 0.4
    z, variances = policy.sample(old, seeded()), []
    for beta in (1.0, 0.5, 0.25):
        rule = Tempering(beta)
        power = (latent_log_prob(policy, new, z, rule) - latent_log_prob(policy, old, z, rule)).exp()
        expected = math.exp(-beta * (1 - beta) * 0.32)
        assert float(power.mean()) == pytest.approx(expected, abs=4 * float(power.std()) / math.sqrt(n))
        variances.append(float(power.var()))
    assert variances[0] > 2 * variances[1] > 4 * variances[2]


@pytest.mark.parametrize(("name", "kwargs"), [("vmf", {"kappa": 7.0}), ("gaussian", {"sigma": 0.7})])
def test_gradients_by_finite_differences(name, kwargs):
    policy, rule = build_policy(name, **kwargs), Tempering("sqrt_dim")
    mu = torch.randn(3, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 5, generator=seeded(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: latent_log_prob(policy, m, z, rule), mu, atol=1e-7)
    assert torch.autograd.gradcheck(lambda m: latent_kl(policy, m, z, rule), mu, atol=1e-7)


# Going on with a span


def test_continue_by_hand():
    # Weights 1, 2, 3, 2 of 8: p(end) = 3/8, log(5/8); at T = 2 the weights are their roots.
    logits = torch.tensor([[1.0, 2.0, 3.0, 2.0]], dtype=torch.float64).log()
    assert float(continue_log_prob(logits, 2)) == pytest.approx(math.log(5 / 8), rel=1e-14)
    roots = 1 + 2 * math.sqrt(2) + math.sqrt(3)
    expected = math.log(1 - math.sqrt(3) / roots)
    assert float(continue_log_prob(logits, 2, temperature=2.0)) == pytest.approx(expected, rel=1e-14)
    # A constant added to all logits changes nothing.
    assert float(continue_log_prob(logits + 300, 2)) == pytest.approx(math.log(5 / 8), rel=1e-12)


@pytest.mark.parametrize("end", [0, 2, 4])
def test_continue_complements_the_end(end):
    logits = 3 * torch.randn(6, 5, generator=seeded(), dtype=torch.float64)
    total = continue_log_prob(logits, end, 0.9).exp() + (logits / 0.9).softmax(1)[:, end]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


def test_continue_at_both_extremes():
    # One other logit at 0: p(end) = sigmoid(x). x = 80: log(1 - p) = -80; x = -80: -exp(-80), which 1 - p would lose.
    logits = torch.tensor([[80.0, 0.0], [-80.0, 0.0], [-math.inf, 0.0]], requires_grad=True)
    found = continue_log_prob(logits, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([-80.0, -math.exp(-80.0), 0.0]), rtol=1e-6, atol=0)
    found[:2].sum().backward()
    assert logits.grad.isfinite().all() and float(logits.grad[0, 0]) == -1


def test_continue_gradient():
    logits = torch.randn(4, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: continue_log_prob(x, 3, 0.9), logits)
    # By hand: d log(1 - p) / d logit_end = -p, in bfloat16 too.
    small = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    continue_log_prob(small, 1).sum().backward()
    assert float(small.grad[0, 1]) == -0.25
    assert continue_log_prob(logits[:0], 3).shape == (0,)


def test_bad_continue():
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"expected logits \(N, V\) with V >= 2, found \(4,\)"):
        continue_log_prob(logits[0], 1)
    with pytest.raises(TypeError, match=r"found torch\.int64"):
        continue_log_prob(logits.long(), 1)
    for end in (-1, 4):
        with pytest.raises(ValueError, match=rf"end_id in \[0, 4\), found {end}"):
            continue_log_prob(logits, end)
    with pytest.raises(ValueError, match=r"temperature above 0, found 0\.0"):
        continue_log_prob(logits, 1, temperature=0.0)
