"""Latent decoding inside vLLM's model runner: one row of state a request, on the device, without a host sync.

After each sampling the span grammar (`latent/spans.py`) says what follows, and where that is a latent, z is drawn
around mu and kept for one step. In the next step it is written over the embedding of the `<|latent|>` id.

A request that was preempted comes back as a new one whose prompt holds its response so far. The scheduler sends its
latents along; they are written wherever that prompt, in whatever chunks, is fed again.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from future_l1_plugin.compat import require
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.connector import LatentConnector, LatentStep
from future_l1_plugin.integrations.vllm.noise import draw
from future_l1_plugin.integrations.vllm.params import REPLAY, LatentParams
from future_l1_plugin.integrations.vllm.scheduler import LatentScheduler
from future_l1_plugin.integrations.vllm.spans import SpanTable, write
from future_l1_plugin.latent.policy import build_policy
from future_l1_plugin.model.backbone import placeholder_ids

_GREEDY = 1e-5  # vLLM takes temperatures below this for 0


class LatentSampler:
    """vLLM's sampler with `LatentModelState.sample` around its call; all else is vLLM's own."""

    def __init__(self, base: Any, state: "LatentModelState") -> None:
        self._base, self._state = base, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        return self._state.sample(self._base, logits, batch)


class LatentModelState(DefaultModelState):
    """The rows are those of vLLM's request states: a request keeps its row until it is finished or preempted."""

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        check_supported(vllm_config, encoder_cache is not None)
        super().__init__(vllm_config, model, encoder_cache, device)
        # vLLM's deep sleep discards what is allocated here: no constants, only what is written when a request comes.
        rows, long = self.max_num_reqs, {"dtype": torch.long, "device": device}
        self._seed, self._policy = torch.zeros(rows, **long), torch.zeros(rows, **long)
        self._headless = torch.zeros(rows, dtype=torch.bool, device=device)
        self._next = torch.zeros(rows, self.inputs_embeds_size, dtype=self.dtype, device=device)  # z
        self._next_at = torch.full((rows,), -1, **long)  # its position, -1 if there is none
        # On the host, by row:
        self._params: dict[int, LatentParams] = {}
        self._replay: dict[int, tuple[list[int], Tensor]] = {}  # positions, z (k, H)
        self._numbers: dict[tuple, int] = {}  # of policies, for `_policy`
        self._media = placeholder_ids(self.model_config.hf_config)
        #: Ids from here on have an embedding but no text, and are not sampled. None: all ids have one.
        self.tokenizer_size: int | None = None

    @cached_property
    def _spans(self) -> SpanTable:
        """Made when it is first used, where sleep leaves it alone."""
        latent = self.model.latent
        return SpanTable(latent.tokens, self.max_num_reqs, self.device, latent.force_initial_latent_mode)

    # The life of a request -------------------------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        extra_args = new_req_data.sampling_params.extra_args or {}
        params, latent = LatentParams.parse(extra_args), self.model.latent
        response = list(new_req_data.prefill_token_ids[new_req_data.prompt_len :])  # not empty after preemption
        self._spans.begin(req_index, params.budget(latent.budget), response)
        write(self._seed, req_index, params.seed)
        write(self._headless, req_index, not params.head)
        write(self._policy, req_index, self._numbers.setdefault(params.policy, len(self._numbers)))
        write(self._next_at, req_index, -1)
        self._params[req_index] = params
        self._replay.pop(req_index, None)
        if REPLAY in extra_args:
            positions, latents = extra_args[REPLAY]
            self._replay[req_index] = (positions, latents.to(self.device, non_blocking=True))

    # Before the forward pass -----------------------------------------------------------------------------------------

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> Tensor:
        embeddings = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        rows = input_batch.idx_mapping.long()
        last = input_batch.query_start_loc[1 : len(rows) + 1].long() - 1  # a decoding request feeds one token, its last
        hit = self._next_at[rows] == input_batch.positions[last]
        embeddings[last] = torch.where(hit[:, None], self._next[rows], embeddings[last])
        for i, row in enumerate(input_batch.idx_mapping_np.tolist() if self._replay else ()):
            if row in self._replay and not input_batch.is_prefilling_np[i]:
                del self._replay[row]
            elif row in self._replay:
                positions, latents = self._replay[row]
                begin = int(input_batch.num_computed_tokens_np[i])
                end = begin + int(input_batch.num_scheduled_tokens[i])
                for position, z in zip(positions, latents, strict=True):
                    if begin <= position < end:
                        embeddings[int(input_batch.query_start_loc_np[i]) + position - begin] = z
        return embeddings

    # After it --------------------------------------------------------------------------------------------------------

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return LatentSampler(sampler, self), None

    def sample(self, base: Any, logits: Tensor, batch: Any) -> Any:
        """Sample with vLLM's sampler, then apply the span grammar.

        Args:
            base: vLLM's sampler.
            logits: (B, V), changed in place.
            batch: the step's input batch, B requests. Rows that are in the midst of their prompt sample nothing.

        Returns:
            vLLM's sampler output. Where log-probabilities are asked for, those of the chosen ids are of the full
            softmax at the request's temperature (1 if greedy), and 0 where the grammar chose, as in `LatentOutput`.
        """
        rows = batch.idx_mapping.long()
        position = batch.positions[batch.logits_indices] + 1  # of the ids that are chosen now
        params = [self._params.get(row) for row in batch.idx_mapping_np.tolist()]  # None: a row of a dummy run
        # In vLLM's profiling run, whose rows are nobody's: all that a step may need, so that memory is left for it.
        with_means = not any(params) or any(p is not None and p.returns == "means" for p in params)
        with_logprobs = base.get_logprobs_dims(batch.idx_mapping_np) is not None

        scaled = None
        if with_logprobs or with_means:  # before ids are banned: log-probabilities are of the full softmax
            temperature = base.sampling_states.temperature.gpu[rows]
            temperature = torch.where(temperature < _GREEDY, 1.0, temperature)[:, None]
            scaled = logits / temperature  # float32 (B, V) like the temperatures: one copy, 0.6 GB at B = 1024
            end_id = self.model.latent.latent_end_id
            end = scaled[:, end_id].clone()
            scaled[:, end_id] = -torch.inf
            others = scaled.logsumexp(-1)  # of all ids but the end marker: one pass over the vocabulary serves both
        end_logprobs = logsigmoid(end - others) if with_means else None
        for token in self._media:  # M-RoPE breaks on media placeholders in a response
            logits[:, token] = -torch.inf
        if self.tokenizer_size is not None:
            logits[:, self.tokenizer_size :] = -torch.inf
        self._spans.forbid(rows, logits)
        output = base(logits, batch)
        step = self._spans.step(rows, output.sampled_token_ids[:, 0].long(), live=output.num_sampled > 0)

        mu = self._means(rows)
        z = self._draw(params, rows, mu, position)
        self._next[rows] = z.to(self.dtype)
        self._next_at[rows] = torch.where(step.latent, position, -1)
        if has_kv_transfer_group() and get_tensor_model_parallel_rank() == 0:  # not in vLLM's dummy runs
            values = (step.latent, position, z, mu if with_means else None, end_logprobs)
            on_host = (None if v is None else v.to("cpu", non_blocking=True) for v in values)
            get_kv_transfer_group().step = LatentStep(list(batch.req_ids), *on_host)

        output.sampled_token_ids[:, 0] = step.ids.to(output.sampled_token_ids.dtype)
        if output.logprobs_tensors is not None:
            chosen = torch.where(step.ids == end_id, end, scaled.gather(1, step.ids[:, None]).squeeze(1))
            chosen = chosen - torch.logaddexp(others, end)
            output.logprobs_tensors.logprob_token_ids[:, 0] = step.ids
            output.logprobs_tensors.logprobs[:, 0] = chosen.masked_fill(step.forced, 0.0)
        return output

    def _means(self, rows: Tensor) -> Tensor:
        """mu (B, H) from the hidden states that this step's logits came from."""
        hidden, head = self.model.sampled_hidden, self.model.projection_head
        if head is None:
            return hidden
        return torch.where(self._headless[rows][:, None], hidden, head(hidden))

    def _draw(self, params: list[LatentParams | None], rows: Tensor, mu: Tensor, position: Tensor) -> Tensor:
        """z (B, H). Requests with different policies may share a step; each policy then draws for all rows."""
        z = mu
        for settings in sorted({p.policy for p in params if p is not None}, key=str):
            policy = build_policy(**dict(settings))
            if policy.stochastic:
                own = self._policy[rows] == self._numbers[settings]
                z = torch.where(own[:, None], draw(policy, mu, self._seed[rows], position), z)
        return z


def check_supported(vllm_config: VllmConfig, has_media: bool) -> None:
    """Refuse at start what latent decoding cannot do.

    Raises:
        ConfigError: all the reasons.
        EnvironmentMismatch: a version of vLLM that this was not written for.
    """
    require("vllm")
    parallel, kv = vllm_config.parallel_config, vllm_config.kv_transfer_config
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    why = {
        "pipeline_parallel_size: set it to 1, latents are drawn on the last rank and fed on the first": (
            parallel.pipeline_parallel_size > 1
        ),
        "prefill_context_parallel_size: set it to 1, ranks would hold parts of a prompt": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "speculative_config: leave it out, a draft model cannot propose a hidden state": (
            vllm_config.speculative_config is not None
        ),
        "enable_batch_sharded_sampling: set it to False, each rank would see some rows only": bool(
            parallel.enable_batch_sharded_sampling
        ),
        "limit_mm_per_prompt: allow images or videos, without them vLLM feeds ids and no embeddings": not has_media,
        "kv_transfer_config: expected LatentConnector, through which latents travel": (
            kv is None or kv.kv_connector != LatentConnector.__name__
        ),
        "scheduler_cls: expected LatentScheduler, without which latents are lost": (
            not issubclass(scheduler, LatentScheduler)
        ),
    }
    if found := [reason for reason, applies in why.items() if applies]:
        raise ConfigError(
            "latent decoding in vLLM: "
            + "; ".join(found)
            + ". future_l1_plugin.integrations.vllm.engine_args sets what has to be set"
        )
