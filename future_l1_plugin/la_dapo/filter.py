"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): which groups of rollouts are worth a gradient."""

import math
from collections.abc import Sequence

from torch import Tensor

from future_l1_plugin.errors import ConfigError


def keep_group(accuracies: Sequence[float] | Tensor, low: float = 0.1, high: float = 0.9) -> bool:
    """Whether low <= mean accuracy <= high for the rollouts of one prompt. Future-L1 (arXiv 2606.05769): [0.1, 0.9].

    DAPO keeps 0 < number of correct rollouts < group size. With right-or-wrong accuracies and groups of up to 10,
    [0.1, 0.9] says the same: in a group of 8 the extreme means inside are 1/8 and 7/8. From 11 rollouts on it is
    stricter: one right out of 11 is 0.09 and goes. Only accuracy counts: rollouts that are all right are dropped even
    where the other reward terms tell them apart.

    Args:
        accuracies: one number in [0, 1] for each rollout of the group, a sequence or a tensor (G,).
        low: least mean that is kept.
        high: greatest mean that is kept.

    Raises:
        ConfigError: unless 0 <= low <= high <= 1.
        ValueError: an empty group, or an accuracy outside [0, 1].
    """
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"group filter: expected 0 <= low <= high <= 1, found low={low}, high={high}")
    values = [float(value) for value in (accuracies.tolist() if isinstance(accuracies, Tensor) else accuracies)]
    if not values:
        raise ValueError("group filter: expected at least one rollout in the group, found none")
    for row, value in enumerate(values):
        if not 0 <= value <= 1:
            raise ValueError(
                f"group filter: rollout {row}: expected an accuracy in [0, 1], found {value}. Pass right or wrong as "
                "judged, before any penalty (repetition counts as -1 in the reward, not here)."
            )
    return low <= math.fsum(values) / len(values) <= high
