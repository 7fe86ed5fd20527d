"""Refuses wrong requests where they arrive."""

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.params import REPLAY, LatentParams


class AdmissionCheck(LogitsProcessor):
    """Changes no logits: vLLM shows the parameters of a new request to these classes, and a ValueError refuses it.

    Without it a wrong key would first be met in the engine's loop, and stop the engine.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        extra_args = sampling_params.extra_args or {}
        params = LatentParams.parse(extra_args)
        if sampling_params.n > 1 and (params.returns != "none" or params.build_policy().stochastic):
            raise ConfigError(
                f"n={sampling_params.n}: vLLM's output holds the latents of one response, and all n would draw with "
                "one latent_seed. Send as many requests, with seeds of their own, or set latent_return=none and "
                "latent_policy=deterministic"
            )
        if REPLAY in extra_args:
            raise ConfigError(f"extra_args: {REPLAY} is set by the scheduler; leave it out")
        for name in ("structured_outputs", "allowed_token_ids"):
            if getattr(sampling_params, name) is not None:
                raise ConfigError(f"{name}: know no latent spans; leave them out")

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
