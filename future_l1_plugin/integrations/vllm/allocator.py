"""Refuses a setting of torch's allocator that vLLM refuses for engines with a KV connector. No vLLM."""

import os
from collections.abc import Mapping

from future_l1_plugin.errors import ConfigError

#: What vLLM 0.31 looks at, in `VllmConfig._verify_kv_transfer_compat`. PYTORCH_ALLOC_CONF it does not.
VARIABLE, SETTING = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
#: Arguments of vLLM with which it allows the two together: KV blocks then come from an allocator of its own.
SLEEPS = ("enable_sleep_mode", "enable_cumem_allocator")


def check_allocator(sleeps: bool, key: str = "enable_sleep_mode", environment: Mapping[str, str] = os.environ) -> None:
    """Latents leave the engine through a KV connector. vLLM takes it for one that pins KV memory (ours pins none).

    Args:
        sleeps: whether one of `SLEEPS` is on.
        key: how the user sets it, for the message.
        environment: of the engine's process, which has its parent's. Settings that a process makes for itself after it
            was started, as verl's do around training, do not count: the engine's workers are processes of their own.

    Raises:
        ConfigError: the environment asks for expandable segments, and the engine has no allocator of its own.
    """
    if sleeps or SETTING not in environment.get(VARIABLE, ""):
        return
    raise ConfigError(
        f"{VARIABLE}={environment[VARIABLE]}: expected no {SETTING}, with which vLLM starts no engine that has a KV "
        f"connector, and latents come through one. Unset it (unset {VARIABLE}), or set {key}=true, with which vLLM "
        "keeps KV blocks out of that allocator"
    )
