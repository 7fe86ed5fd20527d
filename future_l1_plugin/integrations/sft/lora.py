"""LoRA for an SFT run: PEFT's adapters, and with them the three rows of the latent tokens (`model.token_rows`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from future_l1_plugin.compat import require
from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.model.backbone import BACKBONES
from future_l1_plugin.model.checkpoint import divided, gathered
from future_l1_plugin.model.token_rows import INPUT, OUTPUT, trainable_rows

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


def adapted(
    model: "nn.Module", arguments: "TrainingArguments | None" = None, targets: Any = None, **keys: Any
) -> "nn.Module":
    """The model with LoRA; a latent head is trained whole, of the embeddings the rows of the latent tokens.

    Args:
        arguments: the host's; needed under DeepSpeed's ZeRO-3.
        targets: PEFT's `target_modules`. Embeddings among them learn by these adapters alone.
        keys: more of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    names = [] if isinstance(targets, str) else [name.rpartition(".")[2] for name in targets]
    config = LoraConfig(
        target_modules=targets,
        modules_to_save=[HEAD_NAME] if hasattr(model, HEAD_NAME) else None,
        trainable_token_indices=trainable_rows(model.config, without=[n for n in (INPUT, OUTPUT) if n in names]),
        **keys,
    )
    with _whole(model, arguments):
        return get_peft_model(model, config)


def quantization(bits: int | None, bf16: bool) -> Any:
    """transformers' configuration for QLoRA (arXiv 2305.14314): NF4, its scales quantised too; None = none.

    Only the text decoder's linear layers, which have the adapters, are held so.

    Args:
        bf16: what a pass computes in; else float32.
    """
    if bits is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    require("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=[*{f"model.{family.vision}" for family in BACKBONES.values()}, "lm_head", HEAD_NAME],
    )


@contextmanager
def _whole(model: "nn.Module", arguments: "TrainingArguments | None") -> Iterator[None]:
    """Under ZeRO-3, PEFT would fetch the rows by a broadcast among GPUs, which a CPU has not: here each process holds
    what PEFT copies whole for this moment, and PEFT takes it for undivided."""
    if not divided() or model.device.type == "meta":
        yield
        return
    from torch import nn
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    copied = [model.get_input_embeddings(), model.get_output_embeddings()]
    copied += [getattr(model, HEAD_NAME)] if hasattr(model, HEAD_NAME) else []
    with gathered(nn.ModuleList(copied)):  # a tied weight once
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)
