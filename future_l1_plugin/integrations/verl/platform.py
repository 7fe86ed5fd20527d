"""A CPU platform for verl, which ships CUDA, ROCm and Ascend only.

verl asks its platform for the device's name, memory and collectives; on a machine without an accelerator it would fall
back to CUDA. Registered through verl's own `PlatformRegistry`; nothing of verl is changed.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from future_l1_plugin.integrations.verl.host import PlatformBase, PlatformRegistry


class _Cpu(str):
    """What verl takes for a device index: "cpu" for `.to()` and `torch.device`, 0 inside f"{name}:{index}"."""

    def __new__(cls) -> "_Cpu":
        return super().__new__(cls, "cpu")

    def __format__(self, spec: str) -> str:
        return "0"

    def __reduce__(self) -> tuple:
        return (_Cpu, ())


def _device_module() -> types.ModuleType:
    """Stands for `torch.cuda`: nothing to wait for, nothing to free, no memory of its own."""
    module = types.ModuleType("torch_cpu_as_device")
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args: 0)
    for name in ("empty_cache", "synchronize", "ipc_collect", "set_device", "reset_peak_memory_stats"):
        setattr(module, name, lambda *args: None)
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    module.get_rng_state = lambda *args: torch.get_rng_state()
    module.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = _Cpu
    module.get_device_name = lambda *args: "CPU"
    module.mem_get_info = lambda *args: (psutil.virtual_memory().available, psutil.virtual_memory().total)
    module.Stream, module.stream, module.current_stream = torch.cpu.Stream, torch.cpu.stream, torch.cpu.current_stream
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One logical device, gloo, no inter-process sharing of device memory."""

    _module = _device_module()
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: self._module)

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never chosen by probing: an accelerator that is probed later must win. See plugin.py.

    def current_device(self) -> str:
        return _Cpu()

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs asynchronously."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The CPU allocator has none."""

    def empty_cache(self) -> None:
        """The CPU allocator keeps nothing back."""

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        return "GPU"  # a logical resource: the recipe gives Ray `num_gpus`, one a rank

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
