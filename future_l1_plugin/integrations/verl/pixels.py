"""Pixels of the prompts under way: written once a prompt, read by the rollout engine and by every pass of the actor.

They lie in Ray's object store, whose arrays all processes of a machine read where they are, without a copy. What
travels through TransferQueue with each of a prompt's rollouts is its name, under `PROMPT` in `multi_modal_inputs`.

    agent loop    `share`     encodes a prompt, puts its pixels into the object store, tells the keeper of them
    rollout       `opened`    the pixels of a request
    actor         `restored`  a micro-batch with its pixels
    trainer       `Keeper.drop`, `Keeper.clear`: groups that are not trained on, and the end of a step

TransferQueue itself cannot hold them once a group: it gives a sample's fields to whoever asks for the sample, and has
no field that several samples share.
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import DictConfig
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor

from future_l1_plugin.errors import DataError
from future_l1_plugin.integrations.verl.keeper import Keeper
from future_l1_plugin.integrations.vllm.media import media_hashes
from future_l1_plugin.model.backbone import MEDIA_KEYS, PIXEL_KEYS

#: Key in a sample's `multi_modal_inputs`: the prompt (its uid) whose pixels belong to it.
PROMPT = "pixels_of_prompt"
#: Key beside the pixels in the object store: `media_hashes` of them.
HASHES = "hashes"
_KEEPER = "future_l1_pixels"

#: A tensor's bytes, its dtype's name and its shape.
Packed = tuple[np.ndarray, str, tuple[int, ...]]


def pack(tensor: Tensor) -> Packed:
    """For the way through Ray, which hands arrays over in shared memory but pickles tensors (7 times slower)."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def unpack(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that was packed, on the same memory: read it only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)


def pixel_dtype(config: DictConfig) -> torch.dtype:
    """bfloat16 where every model of the run computes in it, else float32.

    Qwen3-VL casts pixels to its own dtype before it does anything else, so in such a run bfloat16 pixels give, bit for
    bit, what float32 ones give, at half the bytes.
    """
    actor_ref = config.actor_rollout_ref
    found = [str(actor_ref.rollout.dtype)]
    for engine in (actor_ref.actor.fsdp_config, actor_ref.ref.fsdp_config):
        mixed = engine.get("mixed_precision", None) or {}
        found.append(str(mixed.get("param_dtype", "bf16")))  # verl's default
    return torch.bfloat16 if set(found) <= {"bfloat16", "bf16"} else torch.float32


@dataclass(frozen=True)
class SharedPrompt:
    """What an agent loop keeps of an encoded prompt.

    Attributes:
        prompt_ids: as in `EncodedPrompt`.
        inputs: the processor's output without pixels, and `PROMPT` if there are any.
        pixels: reference to {name: `Packed`} and `HASHES`: what the rollout engine takes. None for text alone.
    """

    prompt_ids: list[int]
    inputs: dict[str, Any]
    pixels: Any


def share(uid: str, encoded: Any, dtype: torch.dtype, hashed: bool, keep: bool) -> SharedPrompt:
    """Put the pixels of an `EncodedPrompt` into the object store.

    Args:
        uid: of the prompt.
        dtype: of the pixels; see `pixel_dtype`.
        hashed: name what is shown for vLLM's caches, once for all rollouts.
        keep: let the keeper hold the pixels until the trainer drops them. Without it, as in validation, they go with
            the last reference to them.
    """
    inputs = encoded.media
    sent = {name: tensor for name, tensor in inputs.items() if name in MEDIA_KEYS}
    if not sent:
        return SharedPrompt(encoded.prompt_ids, inputs, None)
    sent = {name: tensor.to(dtype) if name in PIXEL_KEYS else tensor for name, tensor in sent.items()}
    reference = ray.put({name: pack(tensor) for name, tensor in sent.items()} | {HASHES: _hashes(sent, hashed)})
    if keep:
        size = sum(tensor.nbytes for tensor in sent.values())
        ray.get(keeper().put.remote(uid, [reference], size))  # in a list, or Ray would send the pixels themselves
    inputs = {name: value for name, value in inputs.items() if name not in PIXEL_KEYS}
    return SharedPrompt(encoded.prompt_ids, inputs | {PROMPT: uid}, reference)


def _hashes(sent: Mapping[str, Tensor], hashed: bool) -> dict[str, list[str]] | None:
    return media_hashes(sent) if hashed else None


def opened(shared: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, list[str]] | None]:
    """Pixels and grids of a request, and the names of what they show. Tensors are taken as they are, too."""
    given = dict(shared or {})
    hashes = given.pop(HASHES, None)
    return {n: unpack(*value) if isinstance(value, tuple) else value for n, value in given.items()}, hashes


def restored(batch: TensorDict) -> TensorDict:
    """The batch, its `multi_modal_inputs` with pixels wherever `PROMPT` names them. Siblings share one memory.

    Raises DataError: the keeper has no pixels for a prompt.
    """
    field = batch.get("multi_modal_inputs", None)
    if field is None:
        return batch
    rows = [dict(getattr(row, "data", row) or {}) for row in list(field)]
    uids = sorted({row[PROMPT] for row in rows if PROMPT in row})
    if not uids:
        return batch
    references = ray.get(keeper().get.remote(uids))
    if lost := [uid for uid, found in zip(uids, references, strict=True) if found is None]:
        raise DataError(
            f"prompt {lost[0]}: its pixels are gone, {len(lost)} of {len(uids)} prompts have none. They are kept until "
            "the step ends: check the log for an agent-loop worker that died"
        )
    pixels = dict(zip(uids, (opened(found)[0] for found in ray.get(references)), strict=True))
    rows = [row | pixels.get(row.pop(PROMPT, None), {}) for row in rows]
    batch = batch.copy()
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(row) for row in rows))
    return batch


def keeper() -> Any:
    """The run's keeper; made by whoever asks first, which the trainer does at its start."""
    return _keeper(ray.get_runtime_context().get_job_id())


@functools.cache
def _keeper(run: str) -> Any:
    return ray.remote(Keeper).options(name=f"{_KEEPER}_{run}", get_if_exists=True, num_cpus=0).remote()
