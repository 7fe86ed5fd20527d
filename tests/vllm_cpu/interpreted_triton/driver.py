import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return GPUTarget("cpu", "interpreted", 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None
