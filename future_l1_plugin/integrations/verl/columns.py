"""Names under which our data travels in verl's containers: the one place where a string key stands for a type of ours.

verl hands samples on as tables: an output's `extra_fields`, TransferQueue's columns, a batch's `extra_info`. One row is
one response of T ids with k latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.la_dapo import Rollout

# In `extra_fields` of a request's output: from the rollout engine to the agent loop and the reward workers.
ROLLOUT = "rollout"  # `Rollout`
ENGINE_NUMBER = "engine_number"  # int: which engine (verl: replica) gave the response

# In the row of a prompt.
PROMPT = "rl_prompt"  # `RlPrompt.to_dict()`
WAVE = "wave"  # dict, see `sampling.Wave`: which decoding wave it belongs to

# In `reward_extra_info` of a response.
DROPPED = "dropped"  # str: why the sample's group must not be trained on

# Columns of a sample in TransferQueue, beside verl's own.
LATENTS = "latents"  # floating (k, H)
MEANS = "latent_means"  # floating (k, H), the rollout's mu
MU = "latent_mu"  # float32 (k, H), the reference's mu; in the output of a pass, that pass's
ANGLE = "latent_angle"  # float32 (k, 1), radians between the rollout's mu and the actor's
WEIGHTS = "rollout_is_weights"  # (T,), verl's own name for importance weights; its values are replaced by ours
#: verl's columns and ours that together are a rollout; MEANS is asked for where it is needed.
OF_ACTIONS = ("responses", "response_mask", "rollout_log_probs")
OF_ROLLOUT = (*OF_ACTIONS, LATENTS)

# In `extra_info` of a batch, from the trainer to the engine.
RETURN_MU, RETURN_ANGLE = "return_latent_mu", "return_latent_angle"  # bool: what an inference pass gives back
# In a mini-batch, from the engine to the loss.
NUM_LATENTS = "num_latents"  # int, over all ranks
FIRST = "first_update"  # bool: no update since the last inference pass


def rows(field: Any) -> list[Tensor]:
    """The rows of a column. TransferQueue hands equal lengths back as a dense tensor, others as a nested one."""
    return list(field.unbind())


def objects(field: Any) -> list[Any]:
    """The rows of a column that is no tensor."""
    return [getattr(row, "data", row) for row in list(field)]


def to_columns(rollout: Rollout) -> dict[str, Tensor]:
    """What a sample's row gets of its rollout, but for its ids, which verl writes itself."""
    return {
        "response_mask": rollout.actions.long(),
        "rollout_log_probs": rollout.log_probs,
        LATENTS: rollout.latents,
        MEANS: rollout.means,
    }


def from_columns(data: Any, with_latents: bool = True) -> list[Rollout]:
    """The rollouts of rows that hold `OF_ROLLOUT`, or without latents, which are large, `OF_ACTIONS`."""
    ids, actions, log_probs = (rows(data[name]) for name in OF_ACTIONS)
    latents = rows(data[LATENTS]) if with_latents else [torch.empty(0, 0)] * len(ids)
    return [Rollout(*row) for row in zip(ids, [row.bool() for row in actions], log_probs, latents, strict=True)]


def nested(values: Sequence[Tensor]) -> Tensor:
    """A column of tensors of different lengths."""
    return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)
