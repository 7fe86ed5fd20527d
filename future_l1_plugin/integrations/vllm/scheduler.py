"""vLLM's scheduler, which knows that two equal `<|latent|>` ids are not the same input."""

import hashlib
from collections.abc import Callable
from copy import copy
from itertools import count
from typing import Any

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.connector import LatentConnector
from future_l1_plugin.integrations.vllm.lifetime import end_with_parent
from future_l1_plugin.integrations.vllm.params import REPLAY

_Hasher = Callable[[Any], list[Any]]


class LatentScheduler(AsyncScheduler):
    """Serves engines with and without asynchronous scheduling.

    Prefix caching: blocks are shared between requests whose ids agree. A block with generated latents, and every block
    after it, gets a hash of its own instead: other draws, another head or a prompt that merely spells the ids must not
    find it. Its own request does, after preemption. Prompts are shared as ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.connector, LatentConnector):
            raise ConfigError(
                f"latent decoding: expected LatentConnector as kv_connector, found {type(self.connector).__name__}. "
                "Start the engine with future_l1_plugin.integrations.vllm.engine_args"
            )
        if not self.vllm_config.use_v2_model_runner:
            raise ConfigError(
                "latent decoding: expected vLLM's second model runner, found that it chose the first, which would "
                "decode without latents. Unset VLLM_USE_V2_MODEL_RUNNER if it is set; else vLLM has warned of a "
                "feature that the second one lacks: switch that off"
            )
        self._serial = count()
        end_with_parent()  # vLLM makes its scheduler in the engine's process

    def add_request(self, request: Any) -> None:
        if request._block_hasher is not None:
            latent = self.vllm_config.model_config.hf_config.latent_id
            request._block_hasher = private_hasher(request._block_hasher, latent, next(self._serial))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A request that was preempted starts over with its ids as a prompt: its latents go with it."""
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            positions, rows = self.connector.latents_of(self.requests[new.req_id])
            if positions:
                new.sampling_params = copy(new.sampling_params)  # the request's own stays as the user gave it
                replay = (positions, torch.stack([row.z for row in rows]))
                new.sampling_params.extra_args = (new.sampling_params.extra_args or {}) | {REPLAY: replay}
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Latents are taken before the ids: a request that ends here sends its latents off within vLLM's part."""
        transfer = model_runner_output.kv_connector_output
        if transfer is not None and transfer.kv_connector_worker_meta is not None:
            self.connector.keep(transfer.kv_connector_worker_meta, self.requests)
            transfer.kv_connector_worker_meta = None
        return super().update_from_output(scheduler_output, model_runner_output)


def private_hasher(inner: _Hasher, latent: int, serial: int) -> _Hasher:
    """`inner`, but blocks that hold a generated `<|latent|>` get a hash that only the request `serial` has.

    Later blocks follow by themselves: each hash enters the next one.
    """

    def hasher(request: Any) -> list[Any]:
        before = len(request.block_hashes)
        hashes = inner(request)
        if not hashes or not request.num_output_tokens:
            return hashes
        (block,) = hashes  # the prompt's blocks were hashed when the request was made, and one id fills one block
        size = request.num_tokens // (before + 1)
        start = max(request.num_tokens - size, request.num_prompt_tokens)
        if latent in request.all_token_ids[start : request.num_tokens]:
            block = hashlib.sha256(block + b"latent" + serial.to_bytes(8, "big")).digest()[: len(block)]
        return [block]

    return hasher
