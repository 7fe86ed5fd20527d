"""The rollout server's weights: written in buckets as the actor sends them, and complete or not."""

import torch
from torch import Tensor, nn

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.pixels import Packed, unpack


class ServedWeights:
    """
    Attributes:
        version: the trainer's step that they are of; None until a first update.
        updating: an update has begun and is not finished.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict()  # tied weights stand there twice, on the same memory
        self._written: set[int] = set()  # addresses of the weights that the update under way has brought
        self.version: int | None = None
        self.updating = False

    def write(self, bucket: dict[str, Tensor | Packed]) -> None:
        """Some of the weights: name in the model's state dict -> the weight in any dtype, as a tensor or from `pack`.

        Raises ConfigError: a name that the model does not have, or another shape.
        """
        bucket = {name: weight if isinstance(weight, Tensor) else unpack(*weight) for name, weight in bucket.items()}
        unknown = [name for name in bucket if name not in self._state]
        shapes = [name for name in bucket if name not in unknown and bucket[name].shape != self._state[name].shape]
        if unknown or shapes:
            self._written.clear()
        if unknown:
            raise ConfigError(
                f"weights: the rollout's model has no {_first(unknown)}. Trainer and rollout must load the same "
                "checkpoint; LoRA needs actor_rollout_ref.model.lora.merge=True"
            )
        if shapes:
            name = shapes[0]
            raise ConfigError(
                f"weights: {name}: expected the shape {tuple(self._state[name].shape)}, found "
                f"{tuple(bucket[name].shape)}. Trainer and rollout must load the same checkpoint"
            )
        with torch.no_grad():
            for name, tensor in bucket.items():
                self._state[name].copy_(tensor)
                self._written.add(self._state[name].data_ptr())

    def finish(self, version: int | None) -> None:
        """All have come. Raises ConfigError: weights of the model that none brought (of tied ones one will do)."""
        written = self._written.copy()
        self._written.clear()
        missing = [name for name, weight in self._state.items() if weight.data_ptr() not in written]
        if missing:
            raise ConfigError(
                f"weights: the update brought no {_first(missing)}. Trainer and rollout must load the same checkpoint"
            )
        self.version, self.updating = version, False


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
