"""Latent decoding in vLLM, for rollouts and serving. Nothing of vLLM is patched.

    from future_l1_plugin.integrations.vllm import engine_args
    llm = LLM(**engine_args("outputs/latent-8b", max_model_len=8192))
    latent = {"latent_policy": "vmf", "latent_mean_cosine": 0.9, "latent_seed": 7}
    out = llm.generate(prompt, SamplingParams(logprobs=0, extra_args=latent))
    read_latents(out[0])

vLLM's second model runner lets a model bring its own state and sampler. Who does what:

    model       the stock model with the latent head; hands out the hidden states that were sampled from
    state       beside the model, one row a request: runs the span grammar after each sampling, draws z, feeds it
    connector   carries z from the workers to the scheduler, and out of the engine with the finished request
    scheduler   gives latents back to a request that was preempted; keeps its KV blocks out of other requests' prompts
    spans       the span grammar for requests that come and go
    params      what a request may ask for in `SamplingParams.extra_args`; `admission` checks it where it arrives
    results     latents as they stand in a finished request's output
    noise       random numbers that depend on seed and position only, so that preemption does not change them
"""

from typing import TYPE_CHECKING, Any

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.integrations.vllm.allocator import SLEEPS, check_allocator

if TYPE_CHECKING:
    from future_l1_plugin.integrations.vllm.results import Latents

_HERE = "future_l1_plugin.integrations.vllm"


def register() -> None:
    """What the entry point `vllm.general_plugins` calls, in each of vLLM's processes."""
    from vllm import ModelRegistry

    from future_l1_plugin.model.backbone import BACKBONES

    for family in BACKBONES.values():
        for name in {family.latent_architecture, *family.released}:
            ModelRegistry.register_model(name, f"{_HERE}.model:{family.vllm.latent}")


def engine_args(model: str, **more: Any) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` or `EngineArgs` for latent decoding.

    Args:
        model: folder or hub id of a latent checkpoint.
        more: further arguments of vLLM; none of those that are set here.

    Raises:
        ConfigError: `more` sets one of ours; see `check_allocator`. CheckpointError: no latent checkpoint there.
    """
    check_allocator(any(more.get(name) for name in SLEEPS))
    return {"model": str(model), "hf_overrides": overrides(read_config(model)), **with_own(more)}


def with_own(args: dict[str, Any]) -> dict[str, Any]:
    """`args` and what latent decoding itself sets, whatever the checkpoint. Raises ConfigError if `args` set it."""
    ours = {
        "scheduler_cls": f"{_HERE}.scheduler.LatentScheduler",
        "logits_processors": [f"{_HERE}.admission:AdmissionCheck"],
        "kv_transfer_config": {
            "kv_connector": "LatentConnector",
            "kv_connector_module_path": f"{_HERE}.connector",
            "kv_role": "kv_producer",  # of latents; a consumer would have to wait with freeing blocks
        },
    }
    if taken := sorted({*ours, "hf_overrides"} & set(args)):
        raise ConfigError(f"engine_args: {', '.join(taken)} is set by latent decoding itself; leave it out")
    return {**ours, **args}


def overrides(config: Any) -> dict[str, Any]:
    """`hf_overrides` for a checkpoint's configuration: our class, and what only the name of its own class tells.

    Raises CheckpointError: not a latent checkpoint.
    """
    from future_l1_plugin.model.backbone import by_config
    from future_l1_plugin.model.config import LatentConfig

    latent, family = LatentConfig.from_hf(config), by_config(config)
    return {
        "architectures": [family.latent_architecture],
        "force_initial_latent_mode": latent.force_initial_latent_mode,
    }


def read_config(model: str) -> Any:
    """A checkpoint's configuration. Raises CheckpointError: no checkpoint there."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: expected a checkpoint folder or a hub id: {error}") from error


def read_latents(output: Any) -> "Latents":
    """The latents of a finished `RequestOutput`. Raises ConfigError if it brought none."""
    from future_l1_plugin.integrations.vllm.results import unpack

    return unpack(output.kv_transfer_params)
