"""What a training run leaves beside its final checkpoint: told apart, loaded, and exported as a latent checkpoint.

Kinds: a folder of weights without a processor, a folder of adapters, and folders of DeepSpeed, FSDP and verl, of which
a tool of theirs makes weights first. The checkpoint that a run started from, its base, is found in adapter_config.json
or in the run's recipe.yaml, or is given.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from future_l1_plugin.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

#: Subfolder of a final checkpoint: the adapters that were merged into it. Loaders look for adapters in the folder only.
ADAPTER = "adapter"
#: What Qwen-VL-Series-Finetune trained beside its adapters.
_BESIDE = "non_lora_state_dict.bin"


@dataclass(frozen=True)
class Sources:
    """Where the parts of a model lie; adapter: folder of what is merged into the weights, None: nothing is."""

    config: str
    weights: str
    processor: str
    adapter: Path | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is one folder that any tool for Qwen3-VL reads."""
        return self.adapter is None and self.processor == self.weights


def sources(path: str | Path, base: str | Path | None = None) -> Sources:
    """The parts of what lies at `path`: a checkpoint, a hub id, or a checkpoint of a run in training.

    Args:
        base: the checkpoint that the run started from, where the folder does not tell.

    Raises:
        CheckpointError: the folder holds parts that another tool must put together first, or needs a base that cannot
            be found; says the command.
    """
    folder, text = Path(path), str(path)
    if not folder.is_dir():
        return Sources(text, text, text)
    adapter = (folder / "adapter_config.json").exists()
    if not adapter:
        _check_has_weights(folder)
        if _has_processor(folder) or not (folder / "trainer_state.json").exists():
            return Sources(text, text, text)
    start = base_of(folder, base)
    processor = text if _has_processor(folder) else start
    if not adapter:
        return Sources(text, text, processor)
    return Sources(text if (folder / "config.json").exists() else start, start, processor, folder)


def base_of(path: str | Path, base: str | Path | None = None) -> str:
    """The checkpoint that the run started from which left `path`. Raises CheckpointError: it cannot be told."""
    if base is not None:
        return str(base)
    folder = Path(path)
    found = []
    if (file := folder / "adapter_config.json").exists():
        found.append(json.loads(file.read_text()).get("base_model_name_or_path"))
    for place in (folder, *folder.resolve().parents[:2]):  # output/checkpoints/checkpoint-N, output/final
        if (file := place / "recipe.yaml").exists():
            found.append(yaml.safe_load(file.read_text()).get("model"))
    for name in filter(None, found):
        if Path(name).exists() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):  # else: a hub id
            return name
    said = f"it names {found[0]}, which is not here" if any(found) else "it does not say"
    raise CheckpointError(
        f"{path}: a checkpoint of a run in training. Which checkpoint did that run start from? ({said}.) Tell it: "
        f"future-l1 export {path} OUT --base START"
    )


def check_whole(path: str | Path, key: str) -> None:
    """For hosts that read a folder themselves. Raises CheckpointError with the command that makes a whole one."""
    if not sources(path).is_whole:
        raise CheckpointError(
            f"{key}: {path} holds a run's {'adapters' if sources(path).adapter else 'weights without a processor'}. "
            f"Run: future-l1 export {path} OUT, and name OUT"
        )


def _has_processor(folder: Path) -> bool:
    """A tokenizer alone will not do: a processor reads images and videos."""
    return (folder / "tokenizer_config.json").exists() and any(folder.glob("*processor_config.json"))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _check_has_weights(folder: Path) -> None:
    """Raises CheckpointError for a folder of parts, with the command that puts them together."""
    if _has_weights(folder):
        return
    for actor in (folder, folder / "actor"):  # of verl, whose weights are divided over model_world_size_N_rank_I.pt
        if any(actor.glob("model_world_size_*.pt")) or (actor / "huggingface" / "config.json").exists():
            ready, adapters = actor / "huggingface", actor / "lora_adapter"
            if _has_weights(ready):
                raise CheckpointError(f"{folder}: a checkpoint that verl resumes from. Use {ready}")
            if (actor.parent / "checkpoint_tracker.json").exists():  # EasyR1's, of which we leave a copy there
                make = f"future-l1 export {adapters} OUT"
                if not adapters.is_dir():
                    make = f"python EasyR1/scripts/model_merger.py --local_dir {actor}, and use {ready}"
                raise CheckpointError(f"{folder}: a checkpoint that EasyR1 resumes from. Run {make}")
            raise CheckpointError(
                f"{folder}: a checkpoint that verl resumes from, without whole weights, because hf_model is not among "
                "actor_rollout_ref.actor.checkpoint.save_contents. Add it for the steps to come; or, of a run without "
                f"LoRA: python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir OUT"
            )
    if (folder / "zero_to_fp32.py").exists():
        raise CheckpointError(
            f"{folder}: DeepSpeed's parts, no whole weights. Run: python {folder}/zero_to_fp32.py {folder} {folder} "
            f"--safe_serialization, then: future-l1 export {folder} OUT"
        )
    if parts := sorted(folder.glob("pytorch_model_fsdp*")):
        raise CheckpointError(
            f"{folder}: FSDP's parts, no whole weights. Run: accelerate merge-weights {parts[0]} {folder}, then: "
            f"future-l1 export {folder} OUT"
        )
    inside = sorted(one for one in folder.glob("checkpoint-*") if one.is_dir())
    inside += [one for one in (folder / "final",) if (one / "config.json").exists()]
    if inside and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: a run's folder. Name one of {', '.join(map(str, inside))}")


def stored_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a transformers configuration says its weights are stored in; None: it does not say."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


def merged(model: "nn.Module", adapter: Path) -> "nn.Module":
    """The model with a run's adapters, and what it trained beside them, merged in. Raises CheckpointError: no fit."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        if (file := adapter / _BESIDE).exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            unknown = adapted.load_state_dict(state, strict=False).unexpected_keys
            if unknown:
                raise CheckpointError(f"{file}: weights of another model: {', '.join(unknown[:3])}")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{adapter}: its adapters do not fit {model.config.name_or_path}: {error}") from error
    return adapted.merge_and_unload()
