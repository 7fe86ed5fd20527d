"""Masks and log-probabilities of actions, against a loop over positions."""

import torch

from future_l1_plugin.la_dapo import (
    LatentScoring,
    action_log_probs,
    action_mask,
    kl_at_latents,
    split_actions,
)
from future_l1_plugin.latent import build_policy

LATENT = 7
SCORING = LatentScoring.build({"name": "gaussian", "sigma": 0.5}, 0.25)


def test_what_is_an_action():
    """A start marker that was forced and one that was chosen, two latents, an end that the budget forced, a word."""
    ids = torch.tensor([8, LATENT, LATENT, 9, 1, 8])
    forced = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    actions = action_mask(ids, forced, LATENT)
    assert actions.tolist() == [False, True, True, False, True, True]
    text, latent = split_actions(ids, actions, LATENT)
    assert text.tolist() == [False, False, False, False, True, True]
    assert latent.tolist() == [False, True, True, False, False, False]
    assert split_actions(ids, actions.long(), LATENT)[0].dtype == torch.bool  # as hosts store it


def test_latents_take_the_place_of_their_ids():
    """Gaussian log-density in four dimensions, by its formula, to the power of 1/4, plus log(1 - p(end))."""
    torch.manual_seed(0)
    at = torch.tensor([[False, True, False], [True, False, True]])
    tokens, went_on = torch.randn(2, 3), -torch.rand(3)
    mu, z = torch.randn(3, 4), torch.randn(3, 4)
    found = action_log_probs(tokens, at, SCORING, mu, z, went_on)
    assert found.dtype == torch.float64
    expected = tokens.double().clone()
    for k, (row, column) in enumerate(at.nonzero().tolist()):
        normaliser = 4 * torch.log(torch.tensor(0.5 * (2 * torch.pi) ** 0.5, dtype=torch.float64))
        density = -((z[k].double() - mu[k].double()) ** 2).sum() / (2 * 0.25) - normaliser
        expected[row, column] = 0.25 * density + went_on[k].double()
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    without = action_log_probs(tokens, at, SCORING, mu, z, None)
    torch.testing.assert_close(without[at], expected[at] - went_on.double(), atol=1e-9, rtol=0)


def test_the_gradient_of_a_latent_goes_to_its_mu_and_not_to_its_id():
    at = torch.tensor([[True, False]])
    tokens, mu = torch.zeros(1, 2, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    z = torch.randn(1, 4)
    action_log_probs(tokens, at, SCORING, mu, z, None).sum().backward()
    assert tokens.grad.tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(mu.grad, 0.25 * (z - mu.detach()) / 0.25, atol=1e-6, rtol=0)


def test_kl_stands_at_latents():
    """KL of two Gaussians of one width: half the squared distance over the variance; tempered."""
    at = torch.tensor([[False, True, True]])
    mu, reference = torch.randn(2, 4), torch.randn(2, 4)
    kl = kl_at_latents(torch.zeros(1, 3).double(), at, SCORING, mu, reference)
    expected = 0.25 * (mu.double() - reference.double()).square().sum(1) / (2 * 0.25)
    torch.testing.assert_close(kl[0, 1:], expected, atol=1e-9, rtol=0)
    assert kl[0, 0] == 0
    none = kl_at_latents(torch.zeros(1, 3), torch.zeros(1, 3).bool(), SCORING, mu[:0], reference[:0])
    assert none.tolist() == [[0.0, 0.0, 0.0]]


def test_a_scoring_is_what_a_recipe_says():
    assert str(SCORING.policy) == str(build_policy("gaussian", sigma=0.5)) and SCORING.tempering.beta(16) == 0.25
