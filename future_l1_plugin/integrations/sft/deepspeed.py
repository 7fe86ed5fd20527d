"""DeepSpeed for an SFT run: the configurations behind the names, and whether a run can start with one.

A checkout of Qwen-VL-Series-Finetune brings files of these names and takes them; transformers.Trainer gets `named`.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import ConfigError, EnvironmentMismatch
from future_l1_plugin.integrations.sft.memory import Sharding

#: What is divided over the GPUs. zero2: gradients and optimiser states. zero3: the weights as well. _offload: optimiser
#: states (of zero3 the weights, too) lie in the CPU's memory.
NAMES = {
    "zero2": Sharding(2),
    "zero3": Sharding(3),
    "zero2_offload": Sharding(2, offload_optimizer=True),
    "zero3_offload": Sharding(3, offload_optimizer=True, offload_weights=True),
}
#: 0.19.8 was run: two processes over gloo.
PIP = f'Run: {sys.executable} -m pip install "deepspeed>=0.17.5,<0.20"'
#: Why no host takes FSDP.
NO_FSDP = (
    "FSDP2 around the whole model fails at the latent targets e*, a pass of the vision tower by itself, for which it "
    "gathers no weights. Around the text decoder alone it trains, but nothing here gathers its weights for a "
    "checkpoint. DeepSpeed does both: use {key}=zero3"
)


def named(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration of that name. "auto" is filled in by transformers from the training arguments."""
    sharding = NAMES[name]
    zero: dict[str, Any] = {
        "stage": sharding.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if sharding.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    on_the_cpu = {"device": "cpu", "pin_memory": True}
    if sharding.offload_optimizer:
        zero["offload_optimizer"] = on_the_cpu
    if sharding.offload_weights:
        zero["offload_param"] = on_the_cpu
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"bf16": {"enabled": "auto"}, "zero_optimization": zero, **dict.fromkeys(sizes, "auto")}


def configuration(value: str, key: str) -> dict[str, Any]:
    """What `key` asks for: `named`, or the JSON file at that path.

    Raises ConfigError: no such name and no such file, or no JSON in it.
    """
    if value in NAMES:
        return named(value)
    return read(Path(value), key)


def read(file: Path, key: str) -> dict[str, Any]:
    """A DeepSpeed configuration file; gradients are clipped at train.max_grad_norm if it says nothing else."""
    if not file.is_file():
        raise ConfigError(f"{key}: expected one of {', '.join(NAMES)} or the path of a JSON, found {str(file)!r}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is no JSON: {error}") from error
    return {"gradient_clipping": "auto"} | config


def check_installed(key: str, pip: str = PIP) -> None:
    """Raises EnvironmentMismatch, with the command that installs it, if DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentMismatch(f"{key}: DeepSpeed is not installed.\n{pip}\nor set {key}=null.")


def join_on_a_cpu() -> None:
    """Let DeepSpeed take over the processes' communication. accelerate does so on GPUs only; on a CPU DeepSpeed would
    take each process for the only one while the model is loaded."""
    from deepspeed import comm

    if not comm.is_initialized():
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def check_startable(key: str, pip: str = PIP) -> None:
    """Raises EnvironmentMismatch (DeepSpeed is missing) or ConfigError (not started by torchrun)."""
    check_installed(key, pip)
    if "RANK" not in os.environ:
        raise ConfigError(f"{key}: DeepSpeed needs torchrun. Start with scripts/sft.sh")
