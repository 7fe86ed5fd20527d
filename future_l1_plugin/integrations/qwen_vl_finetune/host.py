"""A checkout of Qwen-VL-Series-Finetune as the host of an SFT run: its trainer, flags, freezing, LoRA and DeepSpeed.

What its train_sft.py does between its public parts is done here, with these differences:
1. Weights stay float32 under bf16 (autocast), as on transformers.Trainer; it casts them. DeepSpeed casts them anyway.
2. A latent head is trained whole beside LoRA, and the embedding rows of the latent tokens. It knows neither.
3. Gradient checkpointing is never re-entrant: with a frozen vision tower it asks for re-entrant.
4. What is trained beside LoRA (merger, vision tower) comes back when a run resumes. It saves these weights and never
   reads them again. Checkpoints of LoRA runs beyond `log.keep` go, which its own `_save_checkpoint` leaves.
5. DeepSpeed clips gradients at train.max_grad_norm. Its files do not say so, and then DeepSpeed's default holds.
6. Its mixed-modality forward is not put in place: batches of the latent collator have their media in every row or none.
"""

import ast
import difflib
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.qwen_vl_finetune.checkout import open_checkout
from future_l1_plugin.integrations.sft.deepspeed import NO_FSDP, check_startable, read
from future_l1_plugin.integrations.sft.host import RECIPE_KEYS, checked, shared_arguments
from future_l1_plugin.integrations.sft.lora import adapted
from future_l1_plugin.integrations.sft.memory import Sharding
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.model.backbone import core_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

#: Flags that recipe keys decide here, beside those of every host.
KEYS = RECIPE_KEYS | {
    "warmup_ratio": "train.warmup_ratio",
    "fp16": "train.precision",
    "deepspeed": "qwen_vl_finetune.deepspeed",
    "resume_from_checkpoint": "log.resume",
    "disable_flash_attn2": "train.attn_implementation",
    "max_seq_length": "data.max_length",
    "lora_enable": "train.lora.rank",
    "lora_rank": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
}
#: Flags that it has and that would change nothing, or nothing good, and why.
WITHOUT_EFFECT = {
    "use_liger": "it has no Liger kernels for Qwen3-VL",
    "bits": "a latent checkpoint is trained unquantised",
    "double_quant": "a latent checkpoint is trained unquantised",
    "quant_type": "a latent checkpoint is trained unquantised",
    "use_dora": "it never reads this flag",
    "lora_weight_path": "it never reads this flag",
    "cache_dir": "it never reads this flag",
} | dict.fromkeys(("fsdp", "fsdp_config"), NO_FSDP.format(key="qwen_vl_finetune.deepspeed"))


class QwenVlFinetune:
    """See `sft.host.Host`.

    Raises:
        ConfigError: no checkout at `qwen_vl_finetune.path`, or a flag in `qwen_vl_finetune.arguments` that it does not
            have, that has a key of its own in the recipe, or that would have no effect.
        EnvironmentMismatch: an unsupported checkout, or a package that it needs is missing.
    """

    def __init__(self, recipe: SftRecipe) -> None:
        self._checkout = open_checkout(recipe.qwen_vl_finetune.path)
        self._modules = self._checkout.modules()
        asked = recipe.qwen_vl_finetune.deepspeed
        self._config = read(self._checkout.deepspeed(asked), "qwen_vl_finetune.deepspeed") if asked else None
        self.line = f"SFT in Qwen-VL-Series-Finetune {self._checkout.version} at {self._checkout.path}"
        for flag in recipe.qwen_vl_finetune.arguments:
            self._check_flag(flag)

    def _check_flag(self, flag: str) -> None:
        known = [field.name for field in fields(self._modules.arguments) if field.init]
        if flag in KEYS:
            problem = f"the recipe's {KEYS[flag]} decides it. Set that"
        elif flag in WITHOUT_EFFECT:
            problem = f"{WITHOUT_EFFECT[flag]}. Take it out"
        elif flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            problem = (
                f"not a flag of its TrainingArguments.{f' Did you mean `{near[0]}`?' if near else ''} "
                "(In place of its ModelArguments and DataArguments stand the recipe's `model` and `data`.)"
            )
        else:
            return
        raise ConfigError(f"qwen_vl_finetune.arguments.{flag}: {problem}")

    def arguments(self, recipe: SftRecipe, checkpoints: Path) -> "TrainingArguments":
        """Its TrainingArguments, parsed by its parser from the flags that a command line of it would have."""
        from transformers import HfArgumentParser

        class Parser(HfArgumentParser):
            def error(self, message: str) -> NoReturn:  # argparse would print its usage, a thousand lines, and exit
                raise ConfigError(f"qwen_vl_finetune.arguments: {message}")

        values = {**shared_arguments(recipe, checkpoints), **_own_values(recipe), **recipe.qwen_vl_finetune.arguments}
        if recipe.qwen_vl_finetune.deepspeed:
            check_startable("qwen_vl_finetune.deepspeed", self._checkout.pip("deepspeed"))
            values["deepspeed"] = self._config
        try:
            (arguments,) = Parser(self._modules.arguments).parse_args_into_dataclasses(
                args=[text for flag, value in values.items() for text in _spelled(flag, value)],
                look_for_args_file=False,
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"train, qwen_vl_finetune: transformers refuses these settings: {error}") from error
        _check_flags_together(arguments)
        return checked(arguments, recipe.sharding_key)

    def sharding(self) -> Sharding | None:
        return Sharding.from_config(self._config) if self._config else None

    def prepare(self, model: "nn.Module", recipe: SftRecipe, arguments: "TrainingArguments") -> "nn.Module":
        """Freeze and adapt by its functions."""
        do = self._modules
        # It looks for the parts where transformers 4.57 had them.
        core = core_of(model)
        parts = SimpleNamespace(visual=core.vision, language_model=core.text, lm_head=model.lm_head)
        do.configure_llm(parts, arguments)
        do.configure_vision_tower(parts, arguments, model.dtype, model.device)
        do.unfreeze_topk_layers(parts, k_llm=arguments.unfreeze_topk_llm, k_vis=arguments.unfreeze_topk_vision)
        return self._with_lora(model, arguments) if arguments.lora_enable else model

    def _with_lora(self, model: "nn.Module", arguments: "TrainingArguments") -> "nn.Module":
        from future_l1_plugin.latent.channel import HEAD_NAME

        tower = core_of(model).family.vision
        excluded = [*_excluded(arguments), *([] if arguments.vision_lora else [tower]), HEAD_NAME]
        targets = self._modules.find_target_linear_names(
            model,
            num_lora_modules=arguments.num_lora_modules,
            lora_namespan_exclude=excluded,
            verbose=False,
        )
        if model.config.tie_word_embeddings and any(name.endswith(("lm_head", "embed_tokens")) for name in targets):
            raise ConfigError(
                "qwen_vl_finetune.arguments.lora_namespan_exclude: this model's lm_head and embed_tokens are one "
                "weight, into which two adapters cannot be merged. Set it to \"['lm_head', 'embed_tokens']\""
            )
        model = adapted(
            model,
            arguments,
            targets=targets,
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            bias=arguments.lora_bias,
        )
        for name, parameter in model.named_parameters():  # PEFT froze them again
            parameter.requires_grad |= (not arguments.freeze_vision_tower and tower in name) or (
                not arguments.freeze_merger and "merger" in name
            )
        return model

    def trainer(self) -> "type[Trainer]":
        return latent_trainer(self._modules.trainer)


def _own_values(recipe: SftRecipe) -> dict[str, Any]:
    """Flags that only this project has, as the recipe's keys say them; finer ones stand in `arguments`."""
    train, lora = recipe.train, recipe.train.lora
    values: dict[str, Any] = {
        "freeze_vision_tower": not train.train_vision,
        "freeze_merger": not train.train_vision,
        "freeze_llm": bool(lora.rank),
    }
    if lora.rank:
        values |= {
            "lora_enable": True,
            "lora_rank": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
        }
    return values


def _spelled(flag: str, value: Any) -> list[str]:
    """A flag as on a command line; nothing for None."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


def _excluded(arguments: "TrainingArguments") -> list[str]:
    """Parts of names that get no LoRA."""
    text = arguments.lora_namespan_exclude
    try:
        found = ast.literal_eval(text) if text is not None else []
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list):
        raise ConfigError(
            "qwen_vl_finetune.arguments.lora_namespan_exclude: expected a list as one string, such as "
            f"\"['lm_head', 'embed_tokens']\", found {text!r}"
        )
    return found


def _check_flags_together(arguments: "TrainingArguments") -> None:
    """What its train_sft.py checks in the middle of its work, and rates that DeepSpeed's own optimiser never sees."""
    _excluded(arguments)
    own_optimizer = arguments.deepspeed and "optimizer" in arguments.deepspeed
    rates = arguments.vision_lr is not None or arguments.merger_lr is not None
    wrong = (
        (arguments.lora_enable and not arguments.freeze_llm, "freeze_llm: LoRA needs true"),
        (arguments.vision_lora and not arguments.lora_enable, "vision_lora: needs train.lora.rank above 0"),
        (arguments.vision_lora and not arguments.freeze_vision_tower, "freeze_vision_tower: vision_lora needs true"),
        (
            own_optimizer and rates,
            "vision_lr, merger_lr: the DeepSpeed configuration names an `optimizer`, which takes one rate for all "
            "weights. Use another, such as zero3, or take them out",
        ),
    )
    for is_wrong, message in wrong:
        if is_wrong:
            raise ConfigError(f"qwen_vl_finetune.arguments.{message}")


def latent_trainer(base: "type[Trainer]") -> "type[Trainer]":
    """Its trainer with our losses."""
    import torch

    from future_l1_plugin.integrations.sft.trainer import LatentLosses

    class LatentQwenSftTrainer(LatentLosses, base):
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_beside_lora(resume_from_checkpoint, model or self.model)

        def _load_best_model(self) -> None:
            super()._load_best_model()
            self._load_beside_lora(self.state.best_model_checkpoint, self.model)

        def _load_beside_lora(self, checkpoint: str, model: Any) -> None:
            trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
            if self.args.lora_enable and trained:
                state = torch.load(Path(checkpoint) / "non_lora_state_dict.bin", weights_only=True)
                model.load_state_dict({name: state[name] for name in trained}, strict=False)

    return LatentQwenSftTrainer
