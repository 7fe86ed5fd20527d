"""Latent rollouts in EasyR1's workers: decoding with transformers, on a copy of the actor.

EasyR1's own rollout is vLLM 0.12 or older; latents need vLLM 0.30 or newer, which wants transformers 5, which EasyR1
does not take. Another decoder takes the place of `LatentRollout.decode`; nothing else here knows transformers.
"""

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from verl.protocol import DataProto
from verl.utils.fsdp_utils import load_fsdp_model, offload_fsdp_model
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout
from verl.workers.sharding_manager.base import BaseShardingManager

from future_l1_plugin.data.prompt import EncodedPrompt
from future_l1_plugin.integrations.easyr1.actor import ROLLOUT, object_array
from future_l1_plugin.integrations.easyr1.config import VALIDATE, LatentRolloutConfig
from future_l1_plugin.integrations.easyr1.dataset import PROMPT, EasyR1Dataset, media
from future_l1_plugin.integrations.easyr1.lora import Merged
from future_l1_plugin.integrations.easyr1.model import FAMILIES, LatentModel, latent_class
from future_l1_plugin.integrations.rl.rollouts import rollouts_of
from future_l1_plugin.integrations.rl.settings import LatentSection
from future_l1_plugin.model import LatentConfig, LatentOutput, generate
from future_l1_plugin.model.backbone import by_config
from future_l1_plugin.model.batch import left_padded

#: By family; taken when this module is imported. With `padding_free` EasyR1 then replaces them by ones that keep no
#: cache.
_FORWARDS = {each.name: (each.model.load().forward, each.inner.load().forward) for each in FAMILIES}


def build_model(path: str, config: Any, dtype: str) -> LatentModel:
    """The copy that decodes, with the actor's `config`; EasyR1 replaces `flash_attention_2` as well, hence sdpa."""
    family = by_config(config or AutoConfig.from_pretrained(path), path)
    model = (
        latent_class(family)
        .from_pretrained(path, config=config, dtype=PrecisionType.to_dtype(dtype), attn_implementation="sdpa")
        .eval()
    )
    outer, inner = _FORWARDS[family.name]
    model.forward, model.model.forward = MethodType(outer, model), MethodType(inner, model.model)
    return model.requires_grad_(False)


class LatentRollout(BaseRollout):
    """
    Args:
        config: `worker.rollout`.
        latent: how latents are drawn.
        processor: of the checkpoint, with its chat template.
        model: from `build_model`.
        rank: of this worker among those that decode; with `config.seed` it seeds the process's random numbers, from
            which tokens and latents are drawn and which EasyR1 keeps in its checkpoints.
    """

    def __init__(
        self,
        config: LatentRolloutConfig,
        latent: LatentSection,
        processor: Any,
        model: LatentModel,
        device: str | torch.device,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.latent, self.processor, self.model, self.device = config, latent, processor, model, device
        torch.manual_seed(config.seed * 1_000_003 + rank)

    @torch.no_grad()
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """n responses for each prompt, in EasyR1's layout: prompts left-padded, responses right-padded.

        `meta_info` may set n, temperature, top_p and top_k, as EasyR1's `val_override_config` does in validation, where
        n is 1 by default. Besides EasyR1's fields the batch has ROLLOUT; see `actor`.
        """
        asked = prompts.meta_info
        validate = asked.get(VALIDATE, False)
        n = asked.get("n", 1 if validate else self.config.n)
        scoring = self.latent.scoring(validate)
        sampling = {key: asked.get(key, getattr(self.config, key)) for key in ("temperature", "top_p", "top_k")}
        sampling |= {"top_k": max(0, sampling["top_k"]), "policy": scoring.policy}
        encoded = [EasyR1Dataset.encode(row, self.processor) for row in prompts.non_tensor_batch[PROMPT]]
        wanted = [prompt for prompt in encoded for _ in range(n)]
        outputs = [
            self.decode(wanted[i : i + self.config.batch_size], sampling)
            for i in range(0, len(wanted), self.config.batch_size)
        ]
        config = LatentConfig.from_hf(self.model.config)
        rollouts = [r.on("cpu") for output in outputs for r in rollouts_of(output, config, scoring)]
        rollouts = [replace(r.checked(f"response {i}"), means=None) for i, r in enumerate(rollouts)]  # nobody asks
        tokens = self._padded([r.ids for r in rollouts], self.processor.tokenizer.pad_token_id)
        answered = self._padded([torch.ones_like(r.ids) for r in rollouts], 0)
        prompt = {k: prompts.batch[k].repeat_interleave(n, 0) for k in ("input_ids", "attention_mask", "position_ids")}
        after = prompt["position_ids"][..., -1:] + torch.arange(1, tokens.shape[1] + 1)
        return DataProto.from_dict(
            tensors={
                "prompts": prompt["input_ids"],
                "responses": tokens,
                "response_mask": self._padded([r.actions.long() for r in rollouts], 0),
                "input_ids": torch.cat([prompt["input_ids"], tokens], 1),
                "attention_mask": torch.cat([prompt["attention_mask"], answered], 1),
                "position_ids": torch.cat([prompt["position_ids"], after], -1),
            },
            non_tensors={
                PROMPT: prompts.non_tensor_batch[PROMPT].repeat(n),
                ROLLOUT: object_array(rollouts),
            },
        )

    def decode(self, prompts: list[EncodedPrompt], sampling: dict[str, Any]) -> LatentOutput:
        """One response a prompt; of the result all but `sequences` and `text` is used."""
        rows = [{name: one.inputs[name] for name in ("input_ids", "attention_mask")} | media(one) for one in prompts]
        tokenizer = self.processor.tokenizer
        return generate(
            self.model,
            left_padded(rows, tokenizer.pad_token_id, self.device),
            max_new_tokens=self.config.response_length,
            tokenizer=tokenizer,
            record_means=True,
            **sampling,
        )

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        length = self.config.response_length
        return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])


class RolloutWeights(BaseShardingManager):
    """Brings the actor's weights into the copy that decodes; between rollouts the copy rests in host memory.

    model: the copy, or with LoRA the copy as PEFT wraps it (`lora.like`).
    """

    freed_bytes = 0  # EasyR1's memory metrics ask for it

    def __init__(self, actor: nn.Module, model: nn.Module, device: str | torch.device, offload: bool) -> None:
        self.actor, self.model, self.device, self.offload = actor, model, device, offload
        self._merged = Merged(model)

    @torch.no_grad()
    def load_vllm_and_sync_weights(self) -> None:
        """EasyR1's name for: make ready to decode. All ranks take part."""
        if self.offload:
            load_fsdp_model(self.actor)
        self.model.to(self.device)
        with self._merged:
            own = self.model.state_dict()
            for name, weight in get_model_state_dict(self.actor).items():
                own.pop(name).copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        if own:
            raise RuntimeError(f"the actor gave no weights for {', '.join(sorted(own))}")
        if self.offload:
            offload_fsdp_model(self.actor)

    def offload_vllm(self) -> None:
        """EasyR1's name for: the rollout is done."""
        self.model.to("cpu")
        self.actor.train()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
