"""verl's FSDP2 engine, fed with the recorded latents: `actor.strategy: fsdp2_latent`.

The engine's own forward pass runs unchanged inside a `LatentChannel`, which writes the latents of the rollout over the
input embeddings and reads mu. At latent positions the log-probability of the id is replaced by the action's: the
latent's density plus log(1 - p(end)) (`la_dapo.action_log_probs`).
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.batch import (
    flat,
    laid_out,
    latent_rows,
    response_positions,
    trained_latents,
)
from future_l1_plugin.integrations.verl.columns import (
    ANGLE,
    FIRST,
    MEANS,
    MU,
    NUM_LATENTS,
    RETURN_ANGLE,
    RETURN_MU,
    rows,
)
from future_l1_plugin.integrations.verl.host import (
    EngineRegistry,
    FSDPEngineWithLMHead,
    PrecisionType,
    convert_weight_keys,
    drop_tied_target_keys,
    get_device_id,
    get_device_name,
    merged_lora_context,
    normalize_peft_param_name,
    tu,
    unfuse_moe_params,
)
from future_l1_plugin.integrations.verl.lora import add_rows, embeddings_in_the_outermost_unit
from future_l1_plugin.integrations.verl.names import ENGINE
from future_l1_plugin.integrations.verl.pixels import restored
from future_l1_plugin.integrations.verl.vision import as_images
from future_l1_plugin.la_dapo import LatentScoring, action_log_probs, angle_between, continue_log_prob_at
from future_l1_plugin.latent import LatentChannel
from future_l1_plugin.model.card import write_card
from future_l1_plugin.model.checkpoint import attach_head, load_head
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.token_rows import parted_state
from future_l1_plugin.model.training import stored_dtype


@EngineRegistry.register(model_type="language_model", backend=ENGINE, device=["cuda", "cpu"])
class LatentEngine(FSDPEngineWithLMHead):
    """See the module. Raises CheckpointError for a checkpoint without latent tokens, ConfigError for Ulysses."""

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config) -> None:
        # verl looks the engine up by its name and then asks in several places whether it is fsdp or fsdp2.
        object.__setattr__(engine_config, "strategy", "fsdp2")
        if engine_config.ulysses_sequence_parallel_size > 1:
            raise ConfigError(
                "ulysses_sequence_parallel_size: latents need 1 (a latent and the hidden state before it would sit on "
                f"two ranks), found {engine_config.ulysses_sequence_parallel_size}"
            )
        if model_config.lora_rank and checkpoint_config.get("save_lora_only", False):
            raise ConfigError(
                "checkpoint.save_lora_only: the trained rows of the latent tokens would not be saved: verl knows "
                "adapters by `lora_` in their names. Set it to false"
            )
        super().__init__(
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=optimizer_config,
            checkpoint_config=checkpoint_config,
        )
        self.latent = LatentConfig.from_hf(model_config.hf_config)
        self._stored = stored_dtype(model_config.hf_config)  # of the checkpoint that the run starts from
        self._channel: LatentChannel | None = None  # found in the module once, entered for each micro-batch
        self._fed: tuple[list[Tensor], Tensor] | None = None  # latents of each row; Bool (n,) where they stand
        self._updates = 0  # since the last inference pass
        self.scoring: LatentScoring | None = None  # of the rollouts' latents; the trainer sets it before the first pass
        self.sync_dtype: torch.dtype | None = None  # of the weights that the rollout gets; None = the actor's own

    def _build_module(self):
        dtype = self.engine_config.model_dtype or ("bf16" if self.engine_config.forward_only else "fp32")  # as verl
        # verl casts the whole module, buffers too: M-RoPE's frequencies in bfloat16 are wrong by radians after a few
        # thousand tokens. Parameters are cast here, and buffers stay in float32, as they do in a float32 actor.
        object.__setattr__(self.engine_config, "model_dtype", "fp32")
        try:
            module = super()._build_module()
        finally:
            object.__setattr__(self.engine_config, "model_dtype", dtype)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(PrecisionType.to_dtype(dtype))
        attach_head(module, self.latent)
        if self.latent.head != "none" and module.device.type != "meta":  # other ranks get rank 0's weights by broadcast
            load_head(module, self.model_config.local_path)
        return module

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        add_rows(module)
        return module

    def _build_fsdp_module(self, module):
        with embeddings_in_the_outermost_unit(module.config) if self._is_lora else nullcontext():
            if get_device_name() != "cpu":
                return super()._build_fsdp_module(module)
            # A forward-only engine (the reference) is offloaded into pinned memory, which needs an accelerator.
            forward_only = self.engine_config.forward_only
            object.__setattr__(self.engine_config, "forward_only", False)
            try:
                return super()._build_fsdp_module(module)
            finally:
                object.__setattr__(self.engine_config, "forward_only", forward_only)

    def get_per_tensor_param(self, **kwargs: Any):
        """verl's, with each weight in `sync_dtype` before it is gathered: fewer bytes, the same values in the rollout.

        Merged adapters come from `_merged_lora_per_tensor_param`.
        """
        if self.sync_dtype is None or self._is_lora or self._qat_enabled:
            return super().get_per_tensor_param(**kwargs)
        return unfuse_moe_params(self._gathered(self.sync_dtype), self.model_config.hf_config.model_type), None

    def _gathered(self, dtype: torch.dtype | None):
        for name, value in self._hf_names(self.module.state_dict()).items():
            yield name, _whole(value, dtype)

    def _merged_lora_per_tensor_param(self):
        """verl's, not always in bfloat16, in which a float32 rollout would differ from the actor by 1e-2 nats."""
        return self._merged(self.sync_dtype)

    def _merged(self, dtype: torch.dtype | None):
        with merged_lora_context(self.module, backup_adapters=True):
            # verl merges within FSDP2's inner units; adapters that are the outermost unit's (latent head, vision
            # mergers) are left out.
            with torch.no_grad():
                for module in self.module.modules():
                    if isinstance(module, LoraLayer) and not module.merged:
                        module.merge()
            state, rows = parted_state(self.module.state_dict())
            params, rows = (self._hf_names(normalize_peft_param_name(part)) for part in (state, rows))
            ids = torch.tensor(self.latent.tokens.ids, device=get_device_id())
            for name, value in params.items():
                whole = _whole(value, dtype)
                if name in rows:
                    whole = whole.index_copy(0, ids, _whole(rows[name], dtype))
                # The context takes the adapters out again: what is yielded must be a copy, which the whole of a single
                # rank's part is not.
                part = value.to_local() if isinstance(value, DTensor) else value
                yield name, whole.detach().clone() if whole.data_ptr() == part.data_ptr() else whole

    def _hf_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_weight_keys(state, self.module)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        manager = self.checkpoint_manager
        contents = manager.checkpoint_save_contents
        manager.checkpoint_save_contents = [part for part in contents if part != "hf_model"]
        try:
            super().save_checkpoint(local_path, *args, **kwargs)
        finally:
            manager.checkpoint_save_contents = contents
        if manager.should_save_hf_model:
            self._save_hf(Path(local_path) / "huggingface")

    def _save_hf(self, folder: Path) -> None:
        """The model for other tools, in the dtype of the checkpoint that the run started from, adapters merged.

        verl would write float32 under a configuration that says bfloat16, and under LoRA weights with PEFT's names.
        """
        first = torch.distributed.get_rank() == 0
        whole = self._merged(self._stored) if self._is_lora else self._gathered(self._stored)
        weights = {}
        for name, weight in whole:  # gathers: all ranks take part
            if first:
                weights[name] = weight.cpu()
        if first:
            base = self.module.get_base_model() if self._is_lora else self.module
            with torch.device("meta"):
                model = type(base)(base.config).to(next(iter(weights.values())).dtype)
            model.generation_config = base.generation_config
            drop_tied_target_keys(weights, model, model.config)
            model.save_pretrained(folder, state_dict=weights)
            write_card(folder, base.config)
        torch.distributed.barrier()

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False):
        latents = torch.tensor(trained_latents(data, self.latent.tokens), device=get_device_id())
        torch.distributed.all_reduce(latents, group=self.get_data_parallel_group())
        if forward_only:
            self._updates = 0
        tu.assign_non_tensor(data, **{NUM_LATENTS: int(latents), FIRST: self._updates == 0})
        return super().forward_backward_batch(data, loss_function, forward_only)

    def optimizer_step(self) -> float:
        self._updates += 1
        return super().optimizer_step()

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only: bool):
        self._channel = self._channel or LatentChannel(self.module, self.latent.tokens)
        with self._channel:
            try:
                return super().forward_step(micro_batch, loss_function, forward_only)
            finally:
                self._fed = self._channel.mu = None  # their graph ends here

    def prepare_model_inputs(self, micro_batch: TensorDict):
        inputs, output_args = super().prepare_model_inputs(restored(micro_batch))
        where = response_positions(micro_batch)
        latents = latent_rows(micro_batch, self.latent.tokens)
        self._channel.feed(latents, where=laid_out(where, micro_batch, inputs["input_ids"].shape))
        self._fed = latents, where & (micro_batch["input_ids"].values() == self.latent.tokens.latent)
        return as_images(inputs, micro_batch["input_ids"].values(), self.model_config.hf_config), output_args

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        latents, where = self._fed
        offsets = micro_batch["input_ids"].offsets()
        before = where.roll(-1)  # verl keeps the log-probability of a token at the position before it
        went_on = None
        if not self.latent.budget.exact:
            at = laid_out(before, micro_batch, output.logits.shape[:2])
            output.logits, went_on = self._went_on(output.logits, at, output_args)
        result = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        mu = self._channel.mu
        log_probs = action_log_probs(flat(result["log_probs"]), before, self.scoring, mu, torch.cat(latents), went_on)
        result["log_probs"] = torch.nested.nested_tensor_from_jagged(log_probs, offsets)
        if "entropy" in result:  # of a choice among all ids, which is not the choice to end a span or to go on
            ended = (micro_batch["input_ids"].values() == self.latent.tokens.end).roll(-1)
            entropy = flat(result["entropy"]).masked_fill(before | ended, 0.0)
            result["entropy"] = torch.nested.nested_tensor_from_jagged(entropy, offsets)
        counts = torch.tensor([0, *map(len, latents)], device=mu.device).cumsum(0)
        if logits_processor_func is not None:
            result[MU] = mu  # for the loss, with its graph
        elif tu.get_non_tensor_data(micro_batch, RETURN_MU, False):
            result[MU] = torch.nested.nested_tensor_from_jagged(mu.float(), counts)
        if tu.get_non_tensor_data(micro_batch, RETURN_ANGLE, False):
            means = [row[: len(z)] for row, z in zip(rows(micro_batch[MEANS]), latents, strict=True)]
            angle = angle_between(mu, torch.cat(means).to(mu.device))[:, None]
            result[ANGLE] = torch.nested.nested_tensor_from_jagged(angle, counts)
        return result

    def _went_on(self, logits: Tensor, before: Tensor, output_args: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """log(1 - p(end)) at each latent (K,), where the model could have ended the span; after the logits to use."""
        temperature = output_args.get("temperature_rmpad", output_args.get("temperature"))
        if "temperature_rmpad" in output_args:
            temperature = temperature[: before.shape[1]][before[0]]
        else:
            temperature = temperature[:, None].expand_as(before)[before]
        at = before.flatten().nonzero()[:, 0]
        return continue_log_prob_at(logits, at, self.latent.tokens.end, temperature.clamp(min=1e-8))


def _whole(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight, gathered; in `dtype` if it is floating and one is given. The same values as if it were cast after."""
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.to(get_device_id()).full_tensor() if isinstance(value, DTensor) else value
