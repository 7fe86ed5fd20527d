"""verl's section `algorithm.rollout_correction`: what of it reaches our loss, and what is refused.

verl computes the weights itself, for whatever log-probabilities there are. Ours come from `la_dapo.correction`, tokens
and latents apart; for tokens they are equal to verl's.

    rollout_is: token             per-token weights on; null: off
    rollout_is_threshold: 2.0     greatest weight; "LOWER_UPPER": ratios outside of both weigh 0
    rollout_is_batch_normalize    divide by the mean weight
"""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.rl.metrics import flat_actions
from future_l1_plugin.la_dapo import Rollout, RolloutCorrection, correction_weights
from future_l1_plugin.latent import LatentTokens

KEY = "algorithm.rollout_correction"
#: verl's defaults of the keys that have no meaning here, and why.
_UNUSED = {
    "rollout_rs": (None, "no response or token is rejected; groups are filtered by `groups`"),
    "rollout_rs_threshold": (None, "no response or token is rejected; groups are filtered by `groups`"),
    "bypass_mode": (False, "the clipped ratio is to the actor's own log-probabilities before the update"),
    "loss_type": ("ppo_clip", "it belongs to bypass_mode, which is off"),
}
_USED = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")


def rollout_correction(config: DictConfig) -> RolloutCorrection | None:
    """The section, checked. None: off.

    Raises:
        ConfigError: a key that would have no effect, or a value that latents do not go with.
    """
    section = config.algorithm.get("rollout_correction", None)
    if section is None:
        return None
    if unknown := sorted(set(section) - set(_UNUSED) - set(_USED)):
        raise ConfigError(f"{KEY}: unknown key `{unknown[0]}`. With latents it has {', '.join(_USED)}")
    for key, (default, why) in _UNUSED.items():
        if section.get(key, default) != default:
            raise ConfigError(
                f"{KEY}.{key}: expected {_yaml(default)}, found {section[key]}. It would have no effect: {why}"
            )
    level, threshold = section.get("rollout_is", None), section.get("rollout_is_threshold", 2.0)
    normalize = section.get("rollout_is_batch_normalize", False)
    if level is None:
        for key, found, default in (("threshold", threshold, 2.0), ("batch_normalize", normalize, False)):
            if found != default:
                raise ConfigError(
                    f"{KEY}.rollout_is_{key}: {found} has no effect while rollout_is is null. Set it to token"
                )
        return None
    if level != "token":
        raise ConfigError(
            f"{KEY}.rollout_is: expected token or null, found {level}. A product over a sequence would multiply "
            "probabilities of tokens and tempered densities of latents. Set it to token"
        )
    upper, lower = parse_threshold(threshold)
    return RolloutCorrection(upper=upper, lower=lower, normalize=bool(normalize))


def parse_threshold(value: Any) -> tuple[float, float | None]:
    """verl's `rollout_is_threshold`, a number or "LOWER_UPPER", as (upper, lower). Raises ConfigError."""
    try:
        bounds = [float(part) for part in str(value).split("_")]
    except ValueError:
        bounds = []
    if isinstance(value, bool) or not 1 <= len(bounds) <= 2:
        raise ConfigError(f'{KEY}.rollout_is_threshold: expected a number or "LOWER_UPPER", found {value!r}')
    return bounds[-1], bounds[0] if len(bounds) == 2 else None


def weights_of(
    settings: RolloutCorrection, rollouts: Sequence[Rollout], actor: Sequence[Tensor], tokens: LatentTokens
) -> tuple[list[Tensor], dict[str, float]]:
    """`correction_weights` (T_i,) of each response, in the log-probabilities' dtype, and statistics by name."""
    old, drawn = torch.cat(list(actor)), torch.cat([rollout.log_probs for rollout in rollouts])
    weights, metrics = torch.zeros_like(old), {}
    for name, where in zip(("text", "latent"), flat_actions(rollouts, tokens), strict=True):
        found, statistics = correction_weights(settings, old, drawn, where)
        weights += found.to(weights)
        metrics |= {f"rollout_correction/{name}_{key}": value for key, value in statistics.items()}
    return list(weights.split([len(row) for row in actor])), metrics


def _yaml(value: Any) -> str:
    return {None: "null", False: "false"}.get(value, str(value))
