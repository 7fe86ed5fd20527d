"""What verl loads in each of its processes (entry point `verl.plugins`): registrations, and nothing that costs time.

verl only imports this module, so registering is a side effect of the import. Most of what is registered would pull in
Ray, FSDP and the trainer (8 s a process); it waits until verl itself imports the module in question.

verl logs a plugin that fails at DEBUG and goes on without it. A failure here is therefore printed, too.
"""

import os
import sys
from collections.abc import Callable

from wrapt import register_post_import_hook

from future_l1_plugin.compat import require
from future_l1_plugin.integrations.verl.host import PlatformRegistry, get_platform, set_platform
from future_l1_plugin.integrations.verl.names import AGENT_LOOP, ROLLOUT, VLLM_ROLLOUT

_HERE = __name__.rpartition(".")[0]


def _imports(name: str) -> Callable[[object], None]:
    """A hook that imports one of our modules, which registers itself, once verl has imported its counterpart."""

    def hook(module: object) -> None:
        # One of ours asked for verl's module, half-way through its own import: what it needs it imports itself.
        if not any(_is_being_imported(other) for other in list(sys.modules) if other.startswith(f"{_HERE}.")):
            __import__(f"{_HERE}.{name}")

    return hook


def _is_being_imported(name: str) -> bool:
    return name != __name__ and getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False)


def _rollout(module) -> None:  # verl has no setter for its registry
    module._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = f"{_HERE}.rollout.LatentHFAdapter"
    module._ROLLOUT_REGISTRY[(VLLM_ROLLOUT, "async")] = module._ROLLOUT_REGISTRY[("vllm", "async")]


def _replica(module) -> None:
    def load_hf():
        from future_l1_plugin.integrations.verl.rollout import LatentHFReplica

        return LatentHFReplica

    def load_vllm():
        require("vllm")
        from future_l1_plugin.integrations.verl.rollout_vllm import LatentVLLMReplica

        return LatentVLLMReplica

    module.RolloutReplicaRegistry.register(ROLLOUT, load_hf)
    module.RolloutReplicaRegistry.register(VLLM_ROLLOUT, load_vllm)


def _agent_loop(module) -> None:
    module._agent_loop_registry[AGENT_LOOP] = {"_target_": f"{_HERE}.agent_loop.LatentAgentLoop"}


def _register() -> None:
    require("verl")
    if _no_accelerator() and get_platform().device_name != "cpu":
        from future_l1_plugin.integrations.verl.platform import PlatformCPU

        set_platform(PlatformCPU())
    register_post_import_hook(_imports("advantage"), "verl.trainer.ppo.core_algos")
    register_post_import_hook(_imports("trainer"), "verl.trainer.ppo.v1")
    register_post_import_hook(_imports("engine"), "verl.workers.engine")
    register_post_import_hook(_rollout, "verl.workers.rollout.base")
    register_post_import_hook(_replica, "verl.workers.rollout.replica")
    register_post_import_hook(_agent_loop, "verl.experimental.agent_loop.agent_loop")


def _no_accelerator() -> bool:
    """No accelerator on this machine, and none named by verl's own VERL_PLATFORM (a GPU cluster's CPU-only head)."""
    if "VERL_PLATFORM" in os.environ or get_platform().is_available():
        return False
    known = (PlatformRegistry.get(name)() for name in PlatformRegistry.registered_names())
    # By the vendor's tools, not by torch: an actor without a GPU of its own on a GPU machine must keep verl's platform.
    return not any(platform.is_platform_available(use_smi_check=True) for platform in known)


try:
    _register()
except Exception as error:
    print(f"future_l1_plugin could not register with verl: {error}", file=sys.stderr, flush=True)
    raise
