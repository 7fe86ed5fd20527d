"""LoRA of EasyR1, with a word of ours before adapters are made and before FSDP divides them. See README.md."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from future_l1_plugin.errors import EnvironmentMismatch

#: Global functions that EasyR1's `FSDPWorker._build_model_optimizer` calls in this order, and their arguments there.
MAKES, WRAPS = "get_peft_model", "get_fsdp_wrap_policy"


@contextmanager
def with_our_word(
    workers: ModuleType,
    before_making: Callable[[nn.Module, Any], None],
    before_wrapping: Callable[[nn.Module, Callable[..., bool]], None],
) -> Iterator[None]:
    """Within, the model of an actor with LoRA passes through these two; both change what they get in place.

    Args:
        workers: the module `verl.workers.fsdp_workers` of EasyR1.
        before_making: gets the bare model and PEFT's configuration as EasyR1 filled it.
        before_wrapping: gets PEFT's model, and the policy by which FSDP will wrap its modules.

    Raises:
        EnvironmentMismatch: EasyR1 does not call these functions any more.
    """
    called = workers.FSDPWorker._build_model_optimizer.__code__.co_names
    if missing := [name for name in (MAKES, WRAPS) if name not in called or not hasattr(workers, name)]:
        raise EnvironmentMismatch(
            f"{workers.__file__}: expected FSDPWorker._build_model_optimizer to call {' and '.join(missing)}. LoRA on "
            "EasyR1 was written for b44b311. Check that commit out, or train without LoRA"
        )
    make, wrap = getattr(workers, MAKES), getattr(workers, WRAPS)

    def making(model: nn.Module, config: Any) -> nn.Module:
        before_making(model, config)
        return make(model, config)

    def wrapping(model: nn.Module, is_lora_model: bool) -> Callable[..., bool]:
        policy = wrap(model, is_lora_model=is_lora_model)
        before_wrapping(model, policy)
        return policy

    setattr(workers, MAKES, making)
    setattr(workers, WRAPS, wrapping)
    try:
        yield
    finally:
        setattr(workers, MAKES, make)
        setattr(workers, WRAPS, wrap)
