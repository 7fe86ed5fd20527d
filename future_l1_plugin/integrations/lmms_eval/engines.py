"""The engine vllm of the model `future_l1`."""

from collections.abc import Mapping
from typing import Any

from future_l1_plugin.compat import require
from future_l1_plugin.integrations.vllm.params import LatentParams
from future_l1_plugin.latent import SpanBudget
from future_l1_plugin.model.engine import Engine


def vllm_engine(
    path: str, dtype: str, budget: SpanBudget, policy: Mapping[str, Any], args: Mapping[str, Any]
) -> Engine:
    """vLLM with the settings of an evaluation, checked; it starts at the first answer.

    Args:
        path, dtype: the checkpoint.
        budget: of spans.
        policy: keys of `build_policy`.
        args: of vLLM.

    Raises:
        ConfigError, EnvironmentMismatch: an argument that vLLM does not have; no vLLM.
    """
    from future_l1_plugin.integrations.vllm.engine import VllmEngine, check_args

    check_args(args)
    policy = {f"latent_{'policy' if name == 'name' else name}": value for name, value in policy.items()}
    latent = {**policy, "latent_limit": budget.limit, "latent_exact": int(budget.exact)}
    LatentParams.parse(latent)
    return VllmEngine(path, args, dtype, latent)


def describe_engine(engine: Engine) -> dict[str, Any]:
    """What the engine says of itself, and which vLLM it is: part of a response's key and of results.json."""
    found = engine.describe()
    return found | {"version": require("vllm")} if found["name"] == "vllm" else found
