"""R_div and its metric: values worked out by hand, and a plain loop as the second implementation."""

import math
from itertools import pairwise

import pytest
import torch

from future_l1_plugin.errors import RewardError
from future_l1_plugin.latent import LatentTokens, span_index
from future_l1_plugin.rewards import mean_adjacent_cosine, temporal_diversity

EAST, NORTH, WEST, NORTHEAST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]


def tensors(latents, span):
    return torch.tensor(latents).reshape(-1, 2), torch.tensor(span, dtype=torch.long)


# latents, span of each, R_div, mean adjacent cosine
BY_HAND = [
    ([], [], 0.0, None),
    ([EAST], [0], 0.0, None),
    ([EAST, NORTH, WEST], [0, 0, 0], 0.0, None),
    ([EAST, EAST], [0, 1], -1.0, 1.0),
    ([EAST, WEST], [0, 1], -1.0, -1.0),
    ([EAST, NORTH], [0, 1], 0.0, 0.0),
    ([EAST, NORTHEAST], [0, 1], -0.5, math.sqrt(0.5)),
    # Means: (1, 1)/2 and north; cos 45 degrees.
    ([EAST, NORTH, NORTH, NORTH], [0, 0, 1, 1], -0.5, math.sqrt(0.5)),
    # Three spans, two pairs: 1/2 and 1.
    ([EAST, NORTHEAST, NORTHEAST], [0, 1, 2], -0.75, (math.sqrt(0.5) + 1) / 2),
    # Only neighbours count: the first and third are alike.
    ([EAST, NORTH, EAST], [0, 1, 2], 0.0, 0.0),
    # Spans 1 and 2 hold no latents: 0 and 3 are adjacent.
    ([EAST, EAST], [0, 3], -1.0, 1.0),
    # A zero mean: cosine 0, though the latents are not zero.
    ([EAST, WEST, EAST, EAST], [0, 0, 1, 2], -0.5, 0.5),
    ([[0.0, 0.0], [0.0, 0.0]], [0, 1], 0.0, 0.0),
    # Length does not matter between spans.
    ([[1e30, 0.0], [1e-30, 0.0]], [0, 1], -1.0, 1.0),
    ([[3e38, 0.0], [3e38, 0.0], [1e-38, 1e-38]], [0, 0, 1], -0.5, math.sqrt(0.5)),
]


@pytest.mark.parametrize(("latents", "span", "reward", "cosine"), BY_HAND)
def test_by_hand(latents, span, reward, cosine):
    latents, span = tensors(latents, span)
    found = temporal_diversity(latents, span)
    assert type(found) is float
    assert found == pytest.approx(reward, abs=1e-7)
    assert math.copysign(1, found) == (-1 if reward else 1)  # no -0.0 in reports
    assert mean_adjacent_cosine(latents, span) == (None if cosine is None else pytest.approx(cosine, abs=1e-7))


def test_spans_of_a_response_with_an_empty_and_an_unclosed_one():
    tokens = LatentTokens(latent=1, start=2, end=3)
    #                    span 0        1 (empty)       2            3 (unclosed)
    ids = torch.tensor([[2, 1, 1, 3, 9, 2, 3, 9, 2, 1, 3, 9, 2, 1, 1]])
    span = span_index(ids, tokens)
    span = span[span >= 0]
    assert span.tolist() == [0, 0, 2, 3, 3]
    latents = torch.tensor([EAST, EAST, NORTHEAST, NORTH, NORTH])
    assert temporal_diversity(latents, span) == pytest.approx(-0.5)


@pytest.mark.parametrize("seed", range(6))
def test_random_rollouts_agree_with_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    span = torch.randint(0, 9, (20,), generator=generator).sort().values
    latents = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    means = [latents[span == number].mean(0) for number in span.unique()]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairwise(means)]
    assert temporal_diversity(latents, span) == pytest.approx(-sum(c * c for c in cosines) / len(cosines), rel=1e-12)
    assert mean_adjacent_cosine(latents, span) == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    # bfloat16 has 8 bits, but once rounded the arithmetic is exact.
    rounded = latents.bfloat16()
    assert temporal_diversity(rounded, span) == temporal_diversity(rounded.double(), span)


def test_no_gradient_is_kept():
    latents = torch.randn(2, 4, requires_grad=True)
    assert isinstance(temporal_diversity(latents, torch.tensor([0, 1])), float)


ERRORS = [
    (torch.ones(3, 2), torch.tensor([0, 1]), "span: expected one whole number for each of the 3 latents"),
    (torch.ones(2, 2), torch.tensor([0.0, 1.0]), "span: expected one whole number .* torch.float32"),
    (torch.ones(2), torch.tensor([0, 1]), r"latents: expected a floating-point tensor \(T, H\)"),
    (torch.ones(2, 2).long(), torch.tensor([0, 1]), "latents: expected a floating-point"),
    (torch.ones(2, 2), torch.tensor([-1, 0]), "span: expected numbers >= 0, found -1. Leave out"),
    (torch.ones(3, 2), torch.tensor([0, 2, 1]), "never decrease, found 2 then 1 at latent 2"),
    (torch.tensor([EAST, [math.nan, 0.0]]), torch.tensor([0, 1]), "NaN or infinity at latent 1 of 2"),
    (torch.tensor([[math.inf, 0.0]]), torch.tensor([0]), "NaN or infinity at latent 0 of 1"),
]


@pytest.mark.parametrize("function", [temporal_diversity, mean_adjacent_cosine])
@pytest.mark.parametrize(("latents", "span", "message"), ERRORS)
def test_errors_name_what_is_wrong(function, latents, span, message):
    with pytest.raises(RewardError, match=message):
        function(latents, span)
