"""Does the policy gradient on latents alone learn? One latent is the whole response, a reward looks at z only.

A step is what a trainer does: draw 4 groups of 8 latents around mu, score them, take group advantages, and make two
gradient steps on the same draws, so that the second one meets ratios away from 1 and the clip range. Plain gradient
descent on mu, with a step divided by beta, kappa (or 1/sigma^2) and the weight of the latent loss: a unit advantage
then moves mu by `step` times the offset of z, in every case.
"""

import math

import pytest
import torch
from la_dapo_losses import loss_of
from torch.nn.functional import cosine_similarity, normalize

from future_l1_plugin.la_dapo import LaDapoLoss, Tempering, group_advantage, latent_kl, latent_log_prob
from future_l1_plugin.latent import build_policy

GROUPS, SIZE = 4, 8
LABELS = [group for group in range(GROUPS) for _ in range(SIZE)]
SETTINGS = LaDapoLoss(kl_weight=0.0, latent_kl_weight=0.0)


def make(name, d):
    """A policy whose draws lie at about 0.45 rad from mu (of norm 1), and the curvature of its log-density."""
    if name == "vmf":
        policy = build_policy("vmf", mean_cosine=0.9)
        return policy, policy.kappa(d)
    sigma = 0.45 / math.sqrt(d)
    return build_policy("gaussian", sigma=sigma), sigma**-2


def axes(d, cosine=0.0):
    """A target, and a start of norm 1 at that cosine to it: (1, d) each."""
    target, other = torch.eye(d, dtype=torch.float64)[:2]
    return target[None], (cosine * target + math.sqrt(1 - cosine**2) * other)[None]


def climb(policy, curvature, rule, mu, reward, steps, step, settings=SETTINGS, reference=None, seed=0, inner=2):
    """Train mu (1, d) and return it, with the share of clipped latents in each gradient step."""
    generator, d, n = torch.Generator().manual_seed(seed), mu.shape[1], GROUPS * SIZE
    tempering = Tempering(rule)
    rate = step / (tempering.beta(d) * curvature * settings.latent_weight)
    mu, clipped = mu.clone().requires_grad_(), []
    everywhere, nowhere = torch.ones(n, 1, dtype=torch.bool), torch.zeros(n, 1, dtype=torch.bool)
    for _ in range(steps):
        rows = mu.detach().expand(n, d)
        z = policy.sample(rows, generator)
        advantages = group_advantage(reward(z), LABELS)[:, None]
        old = latent_log_prob(policy, rows, z, tempering)[:, None]
        for _ in range(inner):
            new = latent_log_prob(policy, mu.expand(n, d), z, tempering)[:, None]
            kl = latent_kl(policy, mu, reference, tempering).expand(n)[:, None] if reference is not None else None
            loss, metrics, _ = loss_of(
                settings, new, old, advantages, nowhere, everywhere, num_text=0, num_latents=n, latent_kl=kl
            )
            (gradient,) = torch.autograd.grad(loss, mu)
            mu = (mu - rate * gradient).detach().requires_grad_()
            clipped.append(float(metrics["latent/clip_low"] + metrics["latent/clip_high"]))
    return mu.detach(), clipped


@pytest.mark.parametrize("rule", ["none", "sqrt_dim", "dim"])
@pytest.mark.parametrize("name", ["vmf", "gaussian"])
@pytest.mark.parametrize(("d", "steps", "step"), [(16, 40, 0.5), (256, 90, 0.8)])
def test_mu_turns_to_the_rewarded_direction(name, d, steps, step, rule):
    policy, curvature = make(name, d)
    target, start = axes(d)
    end, clipped = climb(policy, curvature, rule, start, lambda z: cosine_similarity(z, target), steps, step)
    assert float(cosine_similarity(start, target)) == 0
    assert float(cosine_similarity(end, target)) > 0.9
    # The same steps in mu: untempered they spend the clip range, tempered by 1/H they hardly ever reach it.
    share = sum(clipped) / len(clipped)
    assert share > 0.3 if rule == "none" else share < 0.01 if rule == "dim" else 0.15 < share < 0.4


@pytest.mark.parametrize("rule", ["none", "sqrt_dim"])
@pytest.mark.parametrize("name", ["vmf", "gaussian"])
def test_right_or_wrong_is_enough(name, rule):
    # 1 if z is within the cap, else 0, as an answer is judged; a third of the first draws are right.
    policy, curvature = make(name, 16)
    target, start = axes(16, cosine=0.5)

    def reward(z):
        return (cosine_similarity(z, target) > 0.5).double()

    def success(mu):
        return float(reward(policy.sample(mu.expand(2000, 16), torch.Generator().manual_seed(9))).mean())

    end, _ = climb(policy, curvature, rule, start, reward, 40, 0.5)
    assert success(start) < 0.35 and success(end) > 0.95


def test_equal_rewards_move_nothing():
    for name in ("vmf", "gaussian"):
        policy, curvature = make(name, 16)
        _, start = axes(16)
        end, _ = climb(policy, curvature, "sqrt_dim", start, lambda z: torch.full((len(z),), 0.7), 5, 0.3)
        assert torch.equal(end, start)


def test_without_noise_there_is_nothing_to_learn_from():
    _, start = axes(16)
    deterministic = build_policy("deterministic")
    end, _ = climb(deterministic, 1.0, "none", start, lambda z: torch.arange(len(z)).double(), 5, 0.3)
    assert torch.equal(end, start)


def test_one_gradient_step_a_batch_makes_tempering_a_matter_of_step_size():
    # At r = 1 the gradient is beta times the exact one, so a step divided by beta takes the same way.
    policy, curvature = make("vmf", 16)
    target, start = axes(16)
    ends = [
        climb(policy, curvature, rule, start, lambda z: cosine_similarity(z, target), 20, 0.3, inner=1)[0]
        for rule in ("none", "sqrt_dim", "dim", 0.3)
    ]
    assert float(cosine_similarity(ends[0], target)) > 0.3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vmf", "gaussian"])
def test_kl_pulls_back_to_the_reference(name):
    policy, curvature = make(name, 16)
    reference, start = axes(16, cosine=0.3)
    settings = LaDapoLoss(kl_weight=0.0, latent_kl_weight=0.5)
    end, _ = climb(policy, curvature, "sqrt_dim", start, lambda z: z[:, 0] * 0, 60, 0.05, settings, reference)
    assert float(cosine_similarity(end, reference)) > 0.9


def test_a_tempered_kl_balances_the_reward_at_the_same_mu():
    # Gaussian, f(z) = <t, z>: beta t = weight beta (mu - ref) / sigma^2, so mu = ref + t sigma^2 / weight for any beta.
    policy, sigma, weight, d = build_policy("gaussian", sigma=0.5), 0.5, 0.8, 4
    target, reference = axes(d)
    mu = (reference + target * sigma**2 / weight).expand(1, d)
    for rule in ("none", "sqrt_dim", "dim"):
        # Antithetic draws (mu +- sigma sqrt(d) e_i): their mean reproduces the exact gradient of a linear reward.
        offsets = sigma * math.sqrt(d) * torch.eye(d, dtype=torch.float64)
        z = mu + torch.cat([offsets, -offsets])
        rows, n = mu.expand(2 * d, d).clone().requires_grad_(), 2 * d
        log_prob = latent_log_prob(policy, rows, z, Tempering(rule))[:, None]
        kl = latent_kl(policy, rows, reference.expand(n, d), Tempering(rule))[:, None]
        everywhere = torch.ones(n, 1, dtype=torch.bool)
        settings = LaDapoLoss(kl_weight=0.0, latent_weight=1.0, latent_kl_weight=weight)
        loss, _, _ = loss_of(
            settings, log_prob, log_prob.detach(), (z @ target[0])[:, None], ~everywhere, everywhere, 0, n, latent_kl=kl
        )
        (gradient,) = torch.autograd.grad(loss, rows)
        assert gradient.sum(0).abs().max() < 1e-12 and normalize(gradient).abs().max() > 0.1
