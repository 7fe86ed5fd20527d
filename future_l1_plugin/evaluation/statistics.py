"""Means, differences and their standard errors. Plain numbers in and out; no torch, no lmms-eval."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Metric:
    """A number and its standard error (None where there is none: a single sample, or no sample)."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class Paired:
    """Accuracy of `ours` minus that of `theirs` on n questions, as fractions, with the standard error (None for n = 1).

    gained: only ours is right; lost: only theirs is (McNemar's two counts). interval: 95%, normal approximation.
    """

    n: int
    difference: float
    stderr: float | None
    gained: int
    lost: int

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.stderr is None:
            return None
        return self.difference - Z95 * self.stderr, self.difference + Z95 * self.stderr


def clustered_stderr(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Standard error of the mean of values that depend on each other within a cluster; None for fewer than two values.

    s^2 / n, and to it the products e_i e_j / n^2 of different values of one cluster, e being the distance from the mean
    (equation 4 of arXiv 2411.00640, as lmms-eval computes it).
    """
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    errors, sums = [value - mean for value in values], defaultdict(float)
    for error, cluster in zip(errors, clusters, strict=True):
        sums[cluster] += error
    squares = sum(error**2 for error in errors)
    across = sum(total**2 for total in sums.values()) - squares
    return math.sqrt(max(squares / (n - 1) / n + across / n**2, 0.0))
