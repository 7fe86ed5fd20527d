"""Qwen3-VL of vLLM with the latent head of our checkpoints. What makes it latent is in `state`."""

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.model.config import LatentConfig


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class LatentQwen3VL(Qwen3VLForConditionalGeneration):
    """
    Attributes:
        latent: the checkpoint's latent keys.
        projection_head: between hidden state and mu; None if the checkpoint has none. Every tensor-parallel rank holds
            it whole: it is small, and its input is.
        sampled_hidden: (N, H), the hidden states after the final norm that the last logits came from.
    """

    hf_to_vllm_mapper = Qwen3VLForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={f"model.{HEAD_NAME}.": f"{HEAD_NAME}."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.latent = LatentConfig.from_hf(config)
        self.projection_head = None
        if self.latent.head != "none":
            width = config.text_config.hidden_size
            self.projection_head = build_head(self.latent.head, width, self.latent.projection_hidden_dim)
        self.sampled_hidden: Tensor | None = None

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """Asked for by vLLM's model runner."""
        from future_l1_plugin.integrations.vllm.state import LatentModelState

        return LatentModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        self.sampled_hidden = hidden_states
        return super().compute_logits(hidden_states)
