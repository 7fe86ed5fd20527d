"""Refuses wrong requests where they arrive."""

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.params import REPLAY, LatentParams

#: Parameters that choose or count ids as if latents were any others: a span is a run of equal ids, which "repeats".
_KNOW_NO_SPANS = ("structured_outputs", "allowed_token_ids", "repetition_detection", "trace_decode_token_ids")


def _is_step_of_a_beam_search(params: Any) -> bool:
    """vLLM does not say so: told from what its two beam searches ask for, and nobody else who cares for latents."""
    ours = any(key.startswith("latent_") for key in params.extra_args or {})
    return not ours and params.max_tokens == 1 and not params.detokenize and (params.logprobs or 0) >= 2


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
        if sampling_params.stop and params.returns != "none":
            raise ConfigError(
                f"stop={sampling_params.stop}: vLLM looks for stop strings outside of its engine and ends the request "
                "from there, which loses its latents. Set latent_return=none if they are not wanted, or stop at tokens "
                "(stop_token_ids)"
            )
        for name in _KNOW_NO_SPANS:
            if getattr(sampling_params, name, None) is not None:
                raise ConfigError(f"{name}: know no latent spans; leave them out")
        if _is_step_of_a_beam_search(sampling_params):
            raise ConfigError(
                "a request for one token with its alternatives and no text is how vLLM searches with beams: each token "
                "is a request of its own, to which the ids before it are a prompt, without their latents. Sample "
                "instead; if this is no beam search, set latent_return=none"
            )

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
