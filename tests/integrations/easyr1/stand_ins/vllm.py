"""Stands in for vLLM as far as EasyR1 imports it. On the path of the tests only: scripts/test_easyr1.sh.

EasyR1 imports it in the driver and in every worker, which makes it the place to stand in for CUDA as well.
"""

import sys
from types import ModuleType

import torch

if not torch.cuda.is_available():
    import cuda_is_cpu  # noqa: F401

__path__ = []  # a package: its modules are made here
__version__ = "0.12.0"


class Missing:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("this is a stand-in for vLLM, which the latent rollout does not use")


LLM = RequestOutput = SamplingParams = Missing
_NAMES = {
    "distributed": [],
    "distributed.parallel_state": [],
    "lora": [],
    "lora.models": ["LoRAModel"],
    "lora.request": [],
    "lora.utils": ["get_adapter_absolute_path"],
    "lora.worker_manager": ["LRUCacheWorkerLoRAManager"],
}
for _name, _classes in _NAMES.items():
    _module = ModuleType(f"{__name__}.{_name}")
    _module.__path__ = []
    for _class in _classes:
        setattr(_module, _class, Missing)
    sys.modules[_module.__name__] = _module


class LoRARequest:
    """EasyR1 subclasses it."""


sys.modules[f"{__name__}.lora.request"].LoRARequest = LoRARequest
sys.modules[f"{__name__}.distributed"].parallel_state = sys.modules[f"{__name__}.distributed.parallel_state"]
