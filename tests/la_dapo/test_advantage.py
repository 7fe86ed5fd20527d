"""Group advantages by hand and against the installed verl."""

import math

import numpy as np
import pytest
import torch

from future_l1_plugin.la_dapo import group_advantage, la_dapo_advantage


def test_by_hand():
    # a: 1, 0, 0, 1 -> mean 1/2, unbiased variance 4 (1/4) / 3 = 1/3; b: 2, 5 -> mean 3.5, variance 2 (2.25) / 1 = 4.5.
    scores = torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0, 1.0])
    group = ["a", "b", "a", "a", "b", "a"]
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1.5 / (math.sqrt(4.5) + 1e-6)
    expected = torch.tensor([a, -b, -a, -a, b, a])
    torch.testing.assert_close(group_advantage(scores, group), expected, rtol=1e-6, atol=0)
    centred = torch.tensor([0.5, -1.5, -0.5, -0.5, 1.5, 0.5])
    assert torch.equal(group_advantage(scores, group, normalise_std=False), centred)
    # eps is added to the deviation: with eps = 1 group b gives 1.5 / (sqrt 4.5 + 1)
    assert float(group_advantage(scores, group, eps=1.0)[4]) == pytest.approx(1.5 / (math.sqrt(4.5) + 1))


def test_labels_of_any_kind_and_order():
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = list("abcabcabc")
    expected = group_advantage(scores, names)
    assert expected.dtype == torch.float64
    assert torch.equal(group_advantage(scores, torch.tensor([7, 1, 5] * 3)), expected)
    assert torch.equal(group_advantage(scores, np.array(names, dtype=object)), expected)
    order = torch.tensor([8, 1, 0, 3, 2, 7, 6, 5, 4])
    torch.testing.assert_close(group_advantage(scores[order], [names[i] for i in order]), expected[order])


@pytest.mark.parametrize("value", [0.1, 0.7, -1.3, 1e4, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(value, size):
    for dtype in (torch.float32, torch.float64):
        scores = torch.full((size,), value, dtype=dtype)
        for normalise_std in (True, False):
            assert torch.equal(group_advantage(scores, ["a"] * size, normalise_std), torch.zeros_like(scores))


def test_group_of_one_keeps_its_score():
    assert group_advantage(torch.tensor([0.75]), ["a"]).tolist() == pytest.approx([0.75 / (1 + 1e-6)])
    assert group_advantage(torch.tensor([0.75]), ["a"], normalise_std=False).tolist() == [0.75]


def test_broadcast_over_the_response():
    # Rewards 1 and 0, on the last token of the first row and spread over the second: scores 1 and 0.
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, -0.5, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    value = 0.5 / (math.sqrt(0.5) + 1e-6)
    expected = value * torch.tensor([[1.0, 1, 1, 0], [-1, -1, 0, 0]])
    before = rewards.clone()
    for kind in (torch.long, torch.bool, torch.float32):
        advantages, returns = la_dapo_advantage(rewards, mask.to(kind), ["a", "a"])
        torch.testing.assert_close(advantages, expected)
        assert torch.equal(advantages, returns) and advantages.data_ptr() != returns.data_ptr()
    assert torch.equal(rewards, before)
    plain, _ = la_dapo_advantage(rewards, mask, ["a", "a"], norm_by_std=False)
    assert plain[:, 0].tolist() == [0.5, -0.5]


def verl_case():
    """Groups of 8, 5, 2 and 1 in mixed order; rewards as 0.9 acc + 0.1 format + a little."""
    generator = torch.Generator().manual_seed(5)
    index = np.array(["a"] * 8 + ["b"] * 5 + ["c"] * 2 + ["d"], dtype=object)[torch.randperm(16, generator=generator)]
    mask = (torch.arange(12) < torch.randint(1, 13, (16, 1), generator=generator)).long()
    rewards = torch.zeros(16, 12)
    scores = 0.9 * torch.randint(0, 2, (16,), generator=generator) + 0.2 * torch.rand(16, generator=generator)
    rewards[torch.arange(16), mask.sum(1) - 1] = scores
    return rewards, mask, index


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_equals_verl(verl_algorithms, norm_by_std):
    rewards, mask, index = verl_case()
    expected, returns = verl_algorithms.compute_grpo_outcome_advantage(
        rewards.clone(), mask, index, norm_adv_by_std_in_grpo=norm_by_std
    )
    advantages, own_returns = la_dapo_advantage(rewards, mask, index, norm_by_std)
    assert advantages.abs().max() > 0.4
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_returns, returns, rtol=1e-5, atol=1e-6)


def test_where_we_depart_from_verl(verl_algorithms):
    # Seven equal scores: their float32 mean is one rounding error off, and verl divides that by 1e-6.
    rewards, mask, index = torch.full((7, 1), 0.7), torch.ones(7, 1), np.array(["a"] * 7, dtype=object)
    expected, _ = verl_algorithms.compute_grpo_outcome_advantage(rewards.clone(), mask, index)
    assert expected.abs().max() > 1e-2
    assert torch.equal(la_dapo_advantage(rewards, mask, index)[0], torch.zeros(7, 1))


def test_errors():
    scores = torch.tensor([1.0, 0.0, math.nan])
    with pytest.raises(ValueError, match=r"row 2 \(group 'b'\): expected a finite score, found nan"):
        group_advantage(scores, ["a", "a", "b"])
    with pytest.raises(ValueError, match="one group label a score, found 2 for 3"):
        group_advantage(scores, ["a", "a"])
    with pytest.raises(ValueError, match=r"scores of shape \(N,\), found \(1, 3\)"):
        group_advantage(scores[None], ["a"])
    with pytest.raises(ValueError, match=r"found \(2, 3\) and \(2, 4\)"):
        la_dapo_advantage(torch.zeros(2, 3), torch.ones(2, 4), ["a", "a"])
