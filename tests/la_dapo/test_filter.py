"""The group filter, by hand."""

import math

import pytest
import torch

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo import keep_group


@pytest.mark.parametrize("size", [2, 8, 10])
def test_small_groups_are_kept_unless_all_agree(size):
    kept = [keep_group([1.0] * right + [0.0] * (size - right)) for right in range(size + 1)]
    assert kept == [False] + [True] * (size - 1) + [False]


def test_larger_groups_lose_the_nearly_unanimous():
    # 1/11 = 0.091 and 10/11 = 0.909 go; of 20, 2 and 18 are the last that stay (0.1 and 0.9 are inside).
    assert [right for right in range(12) if keep_group([1] * right + [0] * (11 - right))] == list(range(2, 10))
    assert [right for right in range(21) if keep_group([1] * right + [0] * (20 - right))] == list(range(2, 19))


def test_bounds_and_partial_credit():
    assert keep_group([0.5, 0.5])  # the mean counts, not the spread
    assert keep_group(torch.tensor([0.0, 1.0, 1.0]), low=0.5, high=0.7)
    assert not keep_group(torch.tensor([0.0, 1.0, 1.0]), low=0.7, high=0.9)
    assert keep_group([1.0, 1.0], low=0.0, high=1.0)
    assert keep_group([True, False])


def test_errors():
    with pytest.raises(ValueError, match="at least one rollout in the group, found none"):
        keep_group([])
    for bad in (-1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"rollout 1: .* in \[0, 1\], found .* before any penalty"):
            keep_group([0.0, bad])
    for low, high in ((0.9, 0.1), (-0.1, 0.9), (0.1, 1.1), (math.nan, 0.9)):
        with pytest.raises(ConfigError, match="expected 0 <= low <= high <= 1, found low="):
            keep_group([0.0, 1.0], low, high)
