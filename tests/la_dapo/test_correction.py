"""Truncated importance weights: by hand, and against verl's own helper where there are no latents."""

import math

import pytest
import torch
from la_dapo_losses import loss_of

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo import (
    LaDapoLoss,
    RolloutCorrection,
    Tempering,
    correction_weights,
    latent_log_prob,
)
from future_l1_plugin.latent import build_policy

NAN = math.nan
#: p_old / p_rollout of five actions, and one that is none.
RATIO = torch.tensor([0.25, 0.5, 1.0, 3.0, 8.0, NAN], dtype=torch.float64)
MASK = torch.tensor([True] * 5 + [False])


def weights(settings, ratio=RATIO, mask=MASK):
    rollout = torch.full_like(ratio, -3.0)
    return correction_weights(settings, rollout + ratio.log(), rollout, mask)


@pytest.mark.parametrize(
    ("settings", "expected", "mean", "truncated"),
    [
        (RolloutCorrection(), [0.25, 0.5, 1, 2, 2], 5.75 / 5, 2 / 5),
        (RolloutCorrection(upper=4.0), [0.25, 0.5, 1, 3, 4], 8.75 / 5, 1 / 5),
        (RolloutCorrection(upper=4.0, lower=0.4), [0, 0.5, 1, 3, 0], 4.5 / 5, 2 / 5),
        (RolloutCorrection(normalize=True), [0.25 / 1.15, 0.5 / 1.15, 1 / 1.15, 2 / 1.15, 2 / 1.15], 1.15, 2 / 5),
        (RolloutCorrection(upper=1e9), [0.25, 0.5, 1, 3, 8], 12.75 / 5, 0),
    ],
)
def test_by_hand(settings, expected, mean, truncated):
    found, statistics = weights(settings)
    assert found.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert statistics == pytest.approx({"mean": mean, "truncated": truncated}, rel=1e-12)


def test_log_ratios_are_cut_at_twenty_and_nothing_is_zero_everywhere():
    ratio = torch.tensor([1e30, 1e-30], dtype=torch.float64)
    found, _ = weights(RolloutCorrection(upper=1e12), ratio, torch.tensor([True, True]))
    assert found.tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-12)
    found, statistics = weights(RolloutCorrection(), mask=torch.zeros_like(MASK))
    assert found.tolist() == [0.0] * 6 and statistics == {}
    # Normalised by a mean of 0, weights would be NaN.
    found, _ = weights(RolloutCorrection(upper=0.2, lower=0.1, normalize=True))
    assert found.tolist() == [0.0] * 6


def test_weights_are_data_and_multiply_what_is_left_after_clipping():
    """Two tokens and two latents with ratios 1.5 (clipped at 1.28), 1.1 | 1.05, 1.2 (clipped at 1.1), advantage 1."""
    old = torch.zeros(1, 4, dtype=torch.float64)
    log_prob = torch.tensor([[1.5, 1.1, 1.05, 1.2]], dtype=torch.float64).log().requires_grad_()
    text = torch.tensor([[True, True, False, False]])
    rollout = (-torch.tensor([[2.0, 0.5, 0.5, 4.0]], dtype=torch.float64).log()).requires_grad_()
    parts = [correction_weights(RolloutCorrection(upper=3.0), old, rollout, mask)[0] for mask in (text, ~text)]
    assert not any(part.requires_grad for part in parts)
    settings = LaDapoLoss(kl_weight=0.25, latent_kl_weight=0.5)
    loss, metrics, _ = loss_of(
        settings,
        log_prob,
        old,
        torch.ones(1, 4),
        text,
        ~text,
        2,
        2,
        ref_log_prob=log_prob.detach() + math.log(2),  # k3: 2 - log 2 - 1
        latent_kl=torch.full((1, 4), 3.0, dtype=torch.float64),
        weights=sum(parts),
    )
    assert float(metrics["text/pg_loss"]) == pytest.approx(-(2 * 1.28 + 0.5 * 1.1) / 2)
    assert float(metrics["latent/pg_loss"]) == pytest.approx(-(0.5 * 1.05 + 3 * 1.1) / 2)
    # Towards the reference there is nothing to correct.
    kl = 0.25 * (1 - math.log(2)) + 0.5 * 3
    assert float(loss.detach()) == pytest.approx(-1.555 - 0.5 * 1.9125 + kl)
    loss.backward()
    pull = 0.25 * (1 - 2) / 2  # d k3 / d log p = 1 - r, a share of 2
    gradient = [pull, pull - 0.5 * 1.1 / 2, -0.5 * 0.5 * 1.05 / 2, 0.0]
    assert log_prob.grad[0].tolist() == pytest.approx(gradient)


def test_a_latent_s_weight_is_the_tempered_ratio_of_actor_to_rollout():
    """Gaussian with sigma 1 in 4 dimensions: log r = (|z - m_rollout|^2 - |z - m_old|^2) / 2, tempered by 1/2."""
    policy, tempering = build_policy("gaussian", sigma=1.0), Tempering("sqrt_dim")
    z = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    rollout_mu = torch.zeros(2, 4, dtype=torch.float64)  # squares 5 and 9
    old_mu = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)  # 1 and 4
    old, rollout = (latent_log_prob(policy, mu, z, tempering) for mu in (old_mu, rollout_mu))
    found, _ = correction_weights(RolloutCorrection(upper=3.0), old, rollout, torch.tensor([True, True]))
    assert found.tolist() == pytest.approx([math.exp(0.5 * 4 / 2), 3.0])  # e^(5/4) = 3.49 is cut


@pytest.mark.parametrize("threshold", [2.0, "1.3", "0.5_5.0"])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_latents_weights_and_loss_equal_verl(verl_algorithms, threshold, normalize):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.workers.config import ActorConfig

    from future_l1_plugin.integrations.verl.correction import parse_threshold

    rng = torch.Generator().manual_seed(0)
    rollout = -torch.rand(8, 30, generator=rng) * 3
    old = rollout + 0.8 * torch.randn(8, 30, generator=rng)
    new = (old + 0.3 * torch.randn(8, 30, generator=rng)).requires_grad_()
    advantages, mask = torch.randn(8, 30, generator=rng), torch.rand(8, 30, generator=rng) < 0.8
    proto, _, metrics = compute_rollout_correction_and_rejection_mask(
        old, rollout, mask.float(), "token", threshold, rollout_is_batch_normalize=normalize
    )
    theirs = proto.batch["rollout_is_weights"]
    upper, lower = parse_threshold(threshold)
    ours, statistics = correction_weights(RolloutCorrection(upper, lower, normalize), old, rollout, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert statistics["mean"] == pytest.approx(metrics["rollout_corr/rollout_is_mean"], rel=1e-5)
    if lower is None:
        high = metrics["rollout_corr/rollout_is_ratio_fraction_high"]
        assert statistics["truncated"] == pytest.approx(high) and high > 0.05

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=3.0,
    )
    expected, _ = verl_algorithms.compute_policy_loss_vanilla(
        old, new, advantages, mask.float(), "token-mean", config, theirs
    )
    (gradient,) = torch.autograd.grad(expected, new)
    settings = LaDapoLoss(kl_weight=0.0, latent_kl_weight=0.0)
    empty = torch.zeros_like(mask)
    loss, _, _ = loss_of(settings, new, old, advantages, mask, empty, int(mask.sum()), 0, weights=ours)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], gradient, rtol=1e-5, atol=1e-8)


def test_errors():
    for given in ({"upper": 0.0}, {"upper": math.inf}, {"upper": NAN}, {"lower": 0.0}, {"lower": 3.0}):
        with pytest.raises(ConfigError, match="rollout correction: expected a"):
            RolloutCorrection(**given)
    with pytest.raises(ValueError, match=r"expected one shape, found \(2,\) \(old_log_prob\), \(3,\) "):
        correction_weights(RolloutCorrection(), torch.zeros(2), torch.zeros(3), torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"la_dapo weights: expected the shape of log_prob, \(1, 2\), found \(2,\)"):
        zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
        loss_of(LaDapoLoss(), zeros, zeros, zeros, mask, ~mask, 2, 0, weights=torch.zeros(2))
