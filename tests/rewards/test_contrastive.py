"""R_ctr: values worked out by hand, and a plain double loop as the second implementation."""

import math

import pytest
import torch
import torch.nn.functional as F

from future_l1_plugin.errors import RewardError
from future_l1_plugin.rewards import outcome_contrastive, outcome_contrastive_groups

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def plain(latents, correct, temperature=0.5):
    """The formula, pair by pair and step by step."""
    rewards = []
    for i, own in enumerate(latents):
        nearest, wrong = None, 0.0
        for j, other in enumerate(latents):
            steps = min(len(own), len(other))
            if i == j or not steps:
                continue
            similarity = 0.0
            for t in range(steps):
                a, b = own[t].double(), other[t].double()
                cosine = float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0
                similarity += (1 + cosine) / 2 / steps
            if correct[j]:
                nearest = similarity if nearest is None else max(nearest, similarity)
            else:
                wrong += math.exp(similarity / temperature)
        positive = math.exp(nearest / temperature) if nearest is not None else 0.0
        rewards.append(positive / (positive + wrong) if positive + wrong else 0.0)
    return torch.tensor(rewards, dtype=torch.float64)


def rollouts(*directions):
    return [torch.tensor(steps).reshape(-1, 2) for steps in directions]


def rewards(latents, correct, temperature=0.5):
    return outcome_contrastive(latents, torch.tensor(correct), temperature)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_one_positive_one_negative():
    # Rollout 0 (right): s to 1 (right) = 1, to 2 (wrong) = 1/2; e^(1/.5) / (e^2 + e^1) = e / (e + 1).
    # Rollout 2 (wrong): s+ = 1/2, and no wrong one but itself: 1.
    e = math.e
    close(rewards(rollouts([EAST], [EAST], [NORTH]), [True, True, False]), [e / (e + 1), e / (e + 1), 1.0])


def test_opposite_directions_and_a_higher_temperature():
    # s to the right one 1/2, to the wrong one 0: e^(.5/1) / (e^.5 + e^0).
    close(rewards(rollouts([EAST], [NORTH], [WEST]), [True, True, False], 1.0)[:1], [math.e**0.5 / (math.e**0.5 + 1)])


def test_several_positives_take_the_nearest_several_negatives_the_sum():
    latents = rollouts([EAST], [WEST], [EAST], [NORTH], [NORTH])
    positive, negative = math.exp(2), 2 * math.exp(1)
    close(rewards(latents, [True, True, True, False, False])[:1], [positive / (positive + negative)])


def test_length_does_not_matter_only_direction():
    latents = rollouts([EAST], [EAST], [NORTH])
    scaled = [latents[0] * 1e-3, latents[1] * 50, latents[2] * 7]
    close(rewards(scaled, [True, True, False]), rewards(latents, [True, True, False]).tolist())


def test_ragged_rollouts_are_compared_over_the_shorter():
    # Over two steps: mean of 1 (east, east) and 1/2 (north, east) = 3/4. The third step of rollout 1 counts nowhere.
    latents = rollouts([EAST, NORTH], [EAST, EAST, WEST], [WEST])
    positive = math.exp(0.75 / 0.5)
    close(rewards(latents, [True, True, False])[:1], [positive / (positive + 1)])


def test_no_other_correct_rollout_gives_0():
    assert rewards(rollouts([EAST], [EAST], [NORTH]), [False] * 3).tolist() == [0.0] * 3


def test_no_other_wrong_rollout_gives_1():
    assert rewards(rollouts([EAST], [EAST], [WEST]), [True] * 3).tolist() == [1.0] * 3


def test_neither_gives_0():
    assert rewards(rollouts([EAST]), [True]).tolist() == [0.0]
    assert rewards(rollouts([EAST]), [False]).tolist() == [0.0]
    assert outcome_contrastive([], torch.zeros(0, dtype=torch.bool)).tolist() == []


def test_a_lone_correct_rollout_is_not_its_own_positive():
    found = rewards(rollouts([EAST], [EAST], [NORTH]), [True, False, False])
    # The wrong ones have it as positive and one another as negative: e^(1/.5)/(e^2 + e^1) and e^1/(e^1 + e^1).
    close(found, [0.0, math.e / (math.e + 1), 0.5])


def test_a_rollout_without_latents_gets_0_and_is_nobodys_partner():
    latents = [*rollouts([EAST], [EAST], [NORTH]), torch.zeros(0, 2), torch.zeros(0, 5)]
    found = rewards(latents, [True, True, False, True, False])
    close(found, [*rewards(latents[:3], [True, True, False]).tolist(), 0.0, 0.0])
    assert rewards([*rollouts([EAST]), torch.zeros(0, 2)], [False, True]).tolist() == [0.0, 0.0]
    assert rewards([torch.zeros(0, 2)] * 2, [False, True]).tolist() == [0.0, 0.0]


def test_the_cosine_with_a_zero_vector_is_0():
    # s between zero and anything, zero included, is 1/2, as between right angles.
    found = rewards(rollouts([[0.0, 0.0]], [EAST], [[0.0, 0.0]]), [True, True, False])
    close(found, [0.5, 0.5, 1.0])


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-22, 1e-18, 1e18, 1e25, 3e38])
def test_extreme_lengths_neither_overflow_nor_vanish(scale):
    generator = torch.Generator().manual_seed(1)
    latents = [F.normalize(torch.rand(3, 4, generator=generator), dim=-1) for _ in range(4)]
    correct = torch.tensor([True, False, True, False])
    expected = plain(latents, correct).float()
    latents[0], latents[3] = latents[0] * scale, latents[3] / 2 * scale
    torch.testing.assert_close(outcome_contrastive(latents, correct), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1e3, 1e300])
def test_no_temperature_overflows(temperature):
    latents = rollouts([EAST], [EAST], [NORTH], [WEST])
    found = rewards(latents, [True, True, False, False], temperature)
    expected = 1.0 if temperature < 1 else 1 / 3
    torch.testing.assert_close(found[:2], torch.full((2,), expected), rtol=0, atol=1e-3)
    assert found.isfinite().all()


@pytest.mark.parametrize("buffer", [1, 3000, 10**6])
@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_groups_agree_with_the_double_loop(seed, buffer, monkeypatch):
    monkeypatch.setattr("future_l1_plugin.rewards.contrastive._BUFFER_BYTES", buffer)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 10, (6,), generator=generator)
    group = torch.repeat_interleave(torch.tensor([7, -2, 0, 3, 900, 5]), sizes)
    group = group[torch.randperm(len(group), generator=generator)]
    latents = [
        torch.randn(int(length), 24, generator=generator, dtype=torch.float64)
        for length in torch.randint(0, 7, (len(group),), generator=generator)
    ]
    for latent in latents[::5]:
        latent[:1] = 0
    correct = torch.rand(len(group), generator=generator) < 0.5
    expected = torch.zeros(len(group), dtype=torch.float64)
    for number in group.unique():
        members = (group == number).nonzero().flatten()
        expected[members] = plain([latents[i] for i in members], correct[members], 0.3)
    found = outcome_contrastive_groups(latents, correct, group, 0.3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    single = outcome_contrastive_groups([latent.float() for latent in latents], correct, group, 0.3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_latents_are_compared_in_float32(mixed):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 4096, generator=generator).bfloat16() for _ in range(5)]
    if mixed:
        latents[1] = torch.randn(16, 4096, generator=generator)
    correct = torch.tensor([True, False, True, True, False])
    found = outcome_contrastive(latents, correct)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(latents, correct).float(), rtol=1e-6, atol=1e-6)


def test_rewards_carry_no_gradient_and_leave_the_latents_alone():
    latents = [torch.randn(2, 4, requires_grad=True) for _ in range(3)]
    before = [latent.detach().clone() for latent in latents]
    assert not outcome_contrastive(latents, torch.tensor([True, False, True])).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(latents, before, strict=True))


ERRORS = [
    (dict(temperature=0.0), "temperature: expected a positive number .* found 0.0"),
    (dict(temperature=-1.0), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(correct=torch.tensor([True])), r"correct: expected one value for each of the 3 rollouts, found shape \(1,\)"),
    (dict(group=torch.zeros(4, dtype=torch.long)), r"group: expected one value .* found shape \(4,\)"),
    (dict(correct=torch.tensor([1.0, 0.0, -1.0])), "correct: expected Bool, found torch.float32. Compare"),
    (dict(latents=1, value=torch.ones(2, 3)), "rollout 1: expected hidden size 2 as in rollout 0, found 3"),
    (dict(latents=1, value=torch.ones(2)), r"rollout 1: expected a floating-point tensor \(T, H\), found .*\(2,\)"),
    (dict(latents=2, value=torch.ones(1, 2, dtype=torch.long)), "rollout 2: expected a floating-point tensor"),
    (dict(latents=2, value=torch.tensor([EAST, [math.nan, 0.0]])), "rollout 2: .* NaN or infinity at latent 1 of 2"),
    (dict(latents=2, value=torch.tensor([[math.inf, 0.0]])), "rollout 2: .* NaN or infinity at latent 0 of 1"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_name_what_is_wrong(change, message):
    arguments = dict(correct=torch.tensor([True, False, True]), group=torch.zeros(3, dtype=torch.long))
    latents = rollouts([EAST], [EAST], [NORTH])
    if "value" in change:
        latents[change["latents"]] = change["value"]
        change = {}
    with pytest.raises(RewardError, match=message):
        outcome_contrastive_groups(latents, **{**arguments, **change})


def test_the_size_of_a_real_batch():
    """64 prompts x 8 rollouts x 16 latents x 4096 numbers, one prompt of them against the loop. Speed: bench_rl.py."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 4096, generator=generator) for _ in range(512)]
    correct, group = torch.rand(512, generator=generator) < 0.5, torch.arange(512) // 8
    found = outcome_contrastive_groups(latents, correct, group)
    torch.testing.assert_close(found[:8], plain(latents[:8], correct[:8]).float(), rtol=1e-6, atol=1e-6)
