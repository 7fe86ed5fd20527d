"""A family's model in vLLM with the latent head of our checkpoints. What makes it latent is in `state`."""

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.model.backbone import QWEN3_VL, Backbone
from future_l1_plugin.model.config import LatentConfig


class LatentModel:
    """What stands before vLLM's own class of a family.

    Attributes:
        latent: the checkpoint's latent keys.
        projection_head: between hidden state and mu; None if the checkpoint has none. Every tensor-parallel rank holds
            it whole: it is small, and its input is.
        sampled_hidden: (N, H), the hidden states after the final norm that the last logits came from.
    """

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


def latent_class(family: Backbone) -> type[LatentModel]:
    """vLLM's class of the family with `LatentModel` before it, registered with vLLM's processor of the family."""
    parts = family.vllm
    base = parts.model.load()
    head = WeightsMapper(orig_to_new_prefix={f"model.{HEAD_NAME}.": f"{HEAD_NAME}."})
    made = type(
        parts.latent,
        (LatentModel, base),
        {"__module__": __name__, "hf_to_vllm_mapper": base.hf_to_vllm_mapper | head},
    )
    register = MULTIMODAL_REGISTRY.register_processor(
        parts.processor.load(), info=parts.info.load(), dummy_inputs=parts.dummy_inputs.load()
    )
    return register(made)


#: vLLM loads each by its name here (`register` of this package).
LatentQwen = latent_class(QWEN3_VL)
