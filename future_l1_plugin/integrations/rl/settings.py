"""The recipe sections `latent` and `rewards`, which mean the same in both hosts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo import LaDapoLoss, LatentScoring
from future_l1_plugin.rewards import RewardSet
from future_l1_plugin.rewards.reward_set import ACCURACY


@dataclass
class LatentSection:
    """How latents are drawn in rollouts, and how they are trained."""

    policy: dict[str, Any] = field(default_factory=lambda: {"name": "vmf", "mean_cosine": 0.9})
    val_policy: dict[str, Any] = field(default_factory=lambda: {"name": "deterministic"})
    tempering: Any = "sqrt_dim"  # none | sqrt_dim | dim | exponent in (0, 1]
    clip_low: float = 0.1
    clip_high: float = 0.1
    dual_clip: float | None = None  # worth setting with tempering none
    weight: float = 0.5  # of the latent policy loss beside the text's
    kl_weight: float = 1.0e-2  # of the latent KL to the reference

    def __post_init__(self) -> None:
        for key in ("policy", "val_policy"):
            # null takes a key out: recipes are merged, and another policy has other keys.
            setattr(self, key, {name: value for name, value in getattr(self, key).items() if value is not None})
            if "name" not in getattr(self, key):
                raise ConfigError(f"latent.{key}: expected a `name` (deterministic, vmf or gaussian) and its keys")
            LatentScoring.build(getattr(self, key), self.tempering)
        if self.kl_weight and not self.scoring().policy.stochastic:
            raise ConfigError(
                f"latent.kl_weight: {self.kl_weight} with a {self.policy['name']} policy, which has no KL. Set it to "
                "0, or choose vmf or gaussian"
            )

    def scoring(self, validate: bool = False) -> LatentScoring:
        """Of rollouts for training, or for validation."""
        return LatentScoring.build(self.val_policy if validate else self.policy, self.tempering)

    def loss(self, *, with_kl: bool, kl_weight: float, **text: Any) -> LaDapoLoss:
        """The loss that this section makes together with its host's own keys.

        Args:
            with_kl: whether there is a reference model; without it neither KL counts.
            kl_weight: of the tokens' KL.
            text: clip_low, clip_high, dual_clip, entropy_weight of tokens, as in `LaDapoLoss`.
        """
        return LaDapoLoss(
            latent_clip_low=self.clip_low,
            latent_clip_high=self.clip_high,
            latent_dual_clip=self.dual_clip,
            latent_weight=self.weight,
            latent_kl_weight=self.kl_weight if with_kl else 0.0,
            kl_weight=kl_weight if with_kl else 0.0,
            **text,
        )


def checked_rewards(entries: Sequence[Mapping[str, Any]]) -> RewardSet:
    """The `rewards` section. Raises ConfigError; the group filter and validation need to know what is correct."""
    rewards = RewardSet.from_config(entries)
    if ACCURACY not in rewards.sample_names:
        raise ConfigError(
            f"rewards: no entry is named `{ACCURACY}`, by which groups are filtered and validation is scored. Add "
            f"{{term: {ACCURACY}, weight: 0}}, with the weight you want"
        )
    return rewards
