"""Answers EasyR1's questions to CUDA with the CPU, for this process: gloo for nccl, sdpa for flash-attn."""

import torch
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_mesh, _group = device_mesh.DeviceMesh.__init__, torch.distributed.init_process_group
_load = PreTrainedModel.from_pretrained.__func__


def _cpu_mesh(self, device_type, *args, **kwargs):
    _mesh(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _gloo_group(backend=None, *args, **kwargs):
    _group("gloo" if backend == "nccl" else backend, *args, **kwargs)


def _on_cpu(cls, *args, **kwargs):
    cpu = {"attn_implementation": "sdpa", "device_map": "cpu"}
    return _load(cls, *args, **kwargs | {key: cpu[key] for key in cpu if key in kwargs})


def _to_cpu(self, *args, **kwargs):
    return torch.Tensor.to(self, *("cpu" if torch.device("cuda") == to else to for to in args), **kwargs)


device_mesh.DeviceMesh.__init__ = _cpu_mesh
DTensor.to = _to_cpu
torch.distributed.init_process_group = _gloo_group
PreTrainedModel.from_pretrained = classmethod(_on_cpu)
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.get_device_name = lambda: "CPU"
torch.cuda.mem_get_info = lambda: (0, 0)
torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
