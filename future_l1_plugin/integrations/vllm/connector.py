"""The way of latents through the engine: worker -> scheduler -> the finished request's `kv_transfer_params`.

vLLM's KV connector is its only channel from the workers' step to the scheduler and on to the request's output. Ours
moves no KV cache; it fills that channel.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from future_l1_plugin.integrations.vllm.params import LatentParams
from future_l1_plugin.integrations.vllm.results import Latents, forced_ids, pack
from future_l1_plugin.model.config import LatentConfig


class Drawn(NamedTuple):
    """One latent on its way to the request's end: z (H,), and mu (H,) and log p(end), a scalar, if it wants them."""

    z: Tensor
    mu: Tensor | None
    end_logprob: Tensor | None


@dataclass
class LatentStep(KVConnectorWorkerMetadata):
    """What one step of B requests drew, on the host. Complete once the step's sampled ids are."""

    request_ids: list[str]
    drawn: Tensor  # Bool (B,): rows that drew a latent; the others hold nothing of use
    position: Tensor  # Long (B,): where in its request the latent stands, prompt included
    latents: Tensor  # (B, H)
    means: Tensor | None  # (B, H), if a request of the step wants them; so are
    end_logprobs: Tensor | None  # float32 (B,)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "LatentStep":
        """Of tensor-parallel ranks, which all draw the same, the first one's is taken."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes only the rows with a latent are sent."""
        rows = self.drawn.nonzero().squeeze(1)
        tensors = (self.drawn, self.position, self.latents, self.means, self.end_logprobs)
        picked = (None if tensor is None else tensor[rows] for tensor in tensors)
        return LatentStep, ([self.request_ids[row] for row in rows.tolist()], *picked)


class LatentConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in each worker, where `step` is left, and one in the scheduler, which keeps the latents."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._latent = LatentConfig.from_hf(vllm_config.model_config.hf_config)
        self._none = torch.empty(0, vllm_config.model_config.get_hidden_size(), dtype=vllm_config.model_config.dtype)
        self.step: LatentStep | None = None
        self._kept: dict[str, dict[int, Drawn]] = {}  # request -> position

    # In the worker ---------------------------------------------------------------------------------------------------

    def build_connector_worker_meta(self) -> LatentStep | None:
        step, self.step = self.step, None
        return step

    # In the scheduler ------------------------------------------------------------------------------------------------

    def keep(self, step: LatentStep, alive: dict[str, Any]) -> None:
        """Store a step's latents. Those of requests that are not in `alive` are dropped."""
        rows = step.drawn.nonzero().squeeze(1)
        positions = step.position[rows].tolist()
        # A copy of the rows with a latent, since a view would keep the whole step in memory.
        columns = (
            [None] * len(positions) if value is None else value[rows].unbind()
            for value in (step.latents, step.means, step.end_logprobs)
        )
        for row, position, *found in zip(rows.tolist(), positions, *columns, strict=True):
            if step.request_ids[row] in alive:
                # A latent whose token the scheduler drops is overwritten when the position is decoded again, or never
                # asked for.
                self._kept.setdefault(step.request_ids[row], {})[position] = Drawn(*found)

    def latents_of(self, request: Any) -> tuple[list[int], list[Drawn]]:
        """Positions of the latents among the request's ids so far, and what was drawn there.

        Raises:
            RuntimeError: a latent id without a latent.
        """
        start, kept = request.num_prompt_tokens, self._kept.get(request.request_id, {})
        where = [start + i for i, token in enumerate(request.output_token_ids) if token == self._latent.latent_id]
        if missing := [position for position in where if position not in kept]:
            raise RuntimeError(f"request {request.request_id}: no latent came back for its positions {missing[:5]}")
        return where, [kept[position] for position in where]

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        params = LatentParams.parse(request.sampling_params.extra_args)
        _, rows = self.latents_of(request)
        self._kept.pop(request.request_id, None)
        if params.returns == "none":
            return False, None
        limit = params.budget(self._latent.budget).limit
        response, forced_start = list(request.output_token_ids), self._latent.force_initial_latent_mode
        found = Latents(
            latents=torch.stack([row.z for row in rows]) if rows else self._none,
            forced=forced_ids(response, self._latent.tokens, limit, forced_start),
        )
        if params.returns == "means":
            means = torch.stack([row.mu for row in rows]) if rows else self._none
            ends = torch.stack([row.end_logprob for row in rows]) if rows else torch.empty(0)
            found = replace(found, means=means, end_logprobs=ends)
        return False, pack(found, params.form)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @property
    def requires_kv_delivery(self) -> bool:
        """vLLM asks producers: ids that were under way when a request was preempted are good, as are their latents."""
        return False

    # Of a connector that moves no KV cache ---------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def reset_cache(self) -> bool:
        return True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
