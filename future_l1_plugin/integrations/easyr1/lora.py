"""LoRA on EasyR1: its own, with the rows of the latent tokens and the latent head trained beside the adapters.

EasyR1 makes the adapters (`worker.actor.model.lora`) and takes the model without them for the reference. It knows no
trained rows: `patches/easyr1_lora.py` lets the functions here have their word.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.channel import HEAD_NAME, latent_head
from future_l1_plugin.model.backbone import by_config
from future_l1_plugin.model.token_rows import trainable_rows


def with_latent_parts(model: nn.Module, config: Any) -> None:
    """Say in PEFT's configuration that the latent tokens' rows learn, and the latent head, if there is one, as a whole.

    Raises ConfigError: adapters were asked for elsewhere than in the text decoder.
    """
    decoder = f"model.{by_config(model.config).text}.layers."
    names = [name for name, _ in model.named_modules()]
    for target in config.target_modules:
        found = [name for name in names if f".{name}".endswith(f".{target}")]
        others = [name for name in found if not name.startswith(decoder)]
        if not found or others:
            raise ConfigError(
                "worker.actor.model.lora.target_modules: expected names of linear layers of the text decoder, such as "
                f"q_proj, found {target}, which is {others[0] if others else 'no module of the model'}. The latent "
                "tokens' rows and a latent head are trained anyway; the vision tower stays as it is"
            )
    config.trainable_token_indices = trainable_rows(model.config)
    config.modules_to_save = [HEAD_NAME] if latent_head(model) is not None else None


def of_one_dtype(model: nn.Module, policy: Callable[..., bool]) -> None:
    """FSDP puts what `policy` does not wrap, the trained rows among it, into one flat tensor, of one dtype: theirs.

    EasyR1 gives frozen weights bfloat16 and trained ones `worker.actor.fsdp.torch_dtype`.
    """
    wrapped = {
        id(weight)
        for module in model.modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
        for weight in module.parameters()
    }
    rows = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    dtype = next(iter(rows[0].trainable_tokens_delta.values())).dtype
    for weight in model.parameters():
        if id(weight) not in wrapped:
            weight.data = weight.data.to(dtype)
    for layer in rows:  # needed to unmerge only; a rank that starts without weights would have none to share
        layer.trainable_tokens_original.clear()


def like(copy: nn.Module, actor: nn.Module) -> PeftModel:
    """`copy`, changed in place, with adapters of the actor's shapes: `actor` is FSDP's."""
    return get_peft_model(copy, deepcopy(actor.peft_config["default"])).requires_grad_(False).eval()


def save(actor: nn.Module, held: PeftModel, folder: str | os.PathLike) -> None:
    """An adapter folder as PEFT writes it, in the place of EasyR1's; all ranks take part.

    PEFT (0.21) looks for adapters by the names of modules, among which FSDP puts its own: of EasyR1's actor it finds
    the rows alone. `held`, from `like`, has the names without FSDP's.
    """
    trained = get_model_state_dict(actor, options=StateDictOptions(ignore_frozen_params=True))
    whole = {n: (w.full_tensor() if isinstance(w, DTensor) else w).cpu() for n, w in trained.items()}
    if dist.get_rank() == 0:
        held.save_pretrained(folder, state_dict=whole)


class Merged:
    """While weights are copied in: adapters apart. Afterwards they are part of the weights, as decoding wants them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model if isinstance(model, PeftModel) else None
        self._merged = False

    def __enter__(self) -> None:
        if self._merged:
            self._model.unmerge_adapter()  # inexact; the weights that are copied in now are not
            self._merged = False

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._model is not None and kind is None:
            with torch.no_grad():
                self._model.merge_adapter()
            self._merged = True
