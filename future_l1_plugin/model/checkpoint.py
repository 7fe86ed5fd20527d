"""Convert a Qwen3-VL checkpoint into a latent one, load it, save it.

A latent checkpoint is an ordinary Qwen3-VL checkpoint (model_type `qwen3_vl`, stock class) with three more tokens, the
keys of `LatentConfig` in `config.json`, our chat template and, if it has one, a `projection_head`. Any tool that reads
Qwen3-VL reads it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.journal import to_disk
from future_l1_plugin.latent.channel import HEAD_NAME, latent_head
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.latent.tokens import TOKENS, LatentTokens
from future_l1_plugin.model.backbone import NAMES, by_config, by_processor
from future_l1_plugin.model.card import write_card
from future_l1_plugin.model.config import LatentConfig, check_tokenizer
from future_l1_plugin.model.folders import check_folder, check_new, is_absent, reading
from future_l1_plugin.model.template import SYSTEM_PROMPT, chat_template
from future_l1_plugin.model.token_rows import part_rows
from future_l1_plugin.model.training import ADAPTER, merged, sources, stored_dtype


def attach_head(model: nn.Module, config: LatentConfig) -> None:
    """Hang a freshly initialised head on the model if the configuration asks for one.

    Under DeepSpeed's ZeRO-3 the head's weights are divided over the processes as the model's are: each process must
    call this, and all get the first one's values. A model on the meta device has no weights to divide.
    """
    if config.head == "none":
        return
    shape = config.head, model.config.get_text_config().hidden_size, config.projection_hidden_dim
    if divided() and model.device.type != "meta":
        from deepspeed import zero
        from transformers.integrations import deepspeed_config

        with zero.Init(config_dict_or_path=deepspeed_config()):  # in its dtype, on its device
            head = build_head(*shape)
    else:
        head = build_head(*shape).to(device=model.device, dtype=model.dtype)
    setattr(model, HEAD_NAME, head)


def load_head(model: nn.Module, path: str | Path) -> None:
    """from_pretrained of the stock class leaves our head's weights out; read them from the checkpoint's files.

    Under DeepSpeed's ZeRO-3 each process must call this; each ends with its part of them.
    """
    from safetensors import safe_open

    head = latent_head(model)
    state = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if f"{HEAD_NAME}." in name:
                    state[name.split(f"{HEAD_NAME}.", 1)[1]] = tensors.get_tensor(name)
    missing = sorted(set(head.state_dict()) - set(state))
    if missing:
        raise CheckpointError(
            f"{path}: config.json asks for a {type(head).__name__} (use_projection_head), but its weights are missing: "
            f"{', '.join(missing)}. Use the folder that holds them, or set use_projection_head to false."
        )
    try:
        with gathered(head, modifier=0):
            head.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: the weights of its {type(head).__name__} do not fit config.json: {error}. "
            "Set projection_head_type and projection_hidden_dim as they were in training."
        ) from error


def divided() -> bool:
    """Whether DeepSpeed's ZeRO-3 is on in this process: transformers then divides the weights of what it loads."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gathered(module: nn.Module, modifier: int | None = None) -> Iterator[None]:
    """Under DeepSpeed's ZeRO-3 a process holds a part of each weight; within, it holds them whole. All must enter.

    modifier: the rank whose changes all others take over at the end; None = nothing is changed.
    """
    if not divided():
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(list(module.parameters()), modifier_rank=modifier):
        yield


def load_processor(path: str | Path, latent: LatentConfig) -> Any:
    """The processor of a latent checkpoint, with left padding and the latent chat template.

    Raises CheckpointError: files missing, tokenizer and configuration disagree.
    """
    from transformers import AutoProcessor

    with reading(path):
        processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    check_tokenizer(latent, processor.tokenizer, path)
    if "default_system" not in (processor.chat_template or ""):
        processor.chat_template = chat_template(family=by_processor(processor))
    return processor


def load(
    path: str | Path,
    device: str | torch.device | None = "cpu",
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    base: str | Path | None = None,
    quantization: Any = None,
    **overrides: Any,
) -> tuple[nn.Module, Any]:
    """Load a latent checkpoint as a stock Qwen3-VL model and its processor.

    Checkpoints whose architectures say SwimBird_Qwen3VL, FutureL1_Qwen3VL or RICE_Qwen3VL load the same way. So does a
    checkpoint-N of an SFT run: adapters are merged, in float32 (`model.training`).

    Args:
        path: folder or hub id of a latent checkpoint, or a run's checkpoint-N.
        device: None = leave every weight and buffer where transformers put it, which is the only way under DeepSpeed's
            ZeRO-3: it has the weights divided over the processes and placed already.
        dtype: torch dtype, its name, or "auto" for the checkpoint's own.
        base: the checkpoint that a run started from, where its checkpoint-N does not tell.
        quantization: transformers' configuration of it, such as BitsAndBytesConfig, for a model to train adapters on.
        overrides: latent keys to set instead of the checkpoint's (e.g. `max_latent_token=8`).

    Returns:
        (model in eval mode on `device`, processor with left padding and the latent chat template).

    Raises:
        CheckpointError: not a Qwen3-VL, files missing, no latent tokens, tokenizer and config disagree, head weights
            that are missing or do not fit; parts that another tool must put together first (says the command).
        ConfigError: unknown dtype; under ZeRO-3 a device, or adapters.
    """
    from transformers import AutoConfig

    if device is not None and divided():
        raise ConfigError(
            f"load: device={str(device)!r} would move weights that DeepSpeed's ZeRO-3 has divided and placed. "
            "Pass device=None"
        )
    if is_absent(path):
        raise CheckpointError(f"{path}: no such folder. Expected a latent {NAMES} checkpoint or a hub id.")
    parts = sources(path, base)
    if parts.adapter and divided():
        raise ConfigError(
            f"load: {path} holds adapters, which are not merged under ZeRO-3. Run: future-l1 export first"
        )
    for folder in (parts.config, parts.weights):
        check_folder(folder)
    with reading(parts.config):
        hf_config = AutoConfig.from_pretrained(parts.config)
    family = by_config(hf_config, parts.config)
    if parts.adapter and hasattr(hf_config, "quantization_config"):  # of the QLoRA run, not of the weights below
        del hf_config.quantization_config
    stored = stored_dtype(AutoConfig.from_pretrained(parts.weights) if parts.adapter else hf_config)
    latent = LatentConfig.from_hf(hf_config)
    unknown = sorted(set(overrides) - set(LatentConfig.__dataclass_fields__))
    if unknown:
        raise CheckpointError(f"unknown latent keys {unknown}; known are {sorted(LatentConfig.__dataclass_fields__)}")
    latent = LatentConfig(**{**vars(latent), **overrides})
    latent.to_hf(hf_config)
    processor = load_processor(parts.processor, latent)
    dtype = "auto" if dtype == "auto" else _dtype(dtype)
    weights = parts.weights
    # The released architecture names have no class in transformers: the stock class is named here, not looked up.
    with reading(weights):
        model = family.model.load().from_pretrained(
            weights,
            config=hf_config,
            dtype=torch.float32 if parts.adapter else dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization,
            device_map=None if quantization is None or torch.device(device).type == "cpu" else {"": device},
        )
    model.config.architectures = [family.model.name]
    attach_head(model, latent)
    if latent.head != "none":
        if not Path(weights).exists():
            from huggingface_hub import snapshot_download

            weights = snapshot_download(str(weights), allow_patterns=["*.safetensors"])
        load_head(model, Path(weights))
    if parts.adapter:
        model = merged(model, parts.adapter)
        _cast(model, stored if dtype == "auto" else dtype)
    model.stored_dtype = stored  # of the files: a run trains in float32 and writes what it found
    model.latent_tokenizer = processor.tokenizer  # generate() decodes with it
    return (model if device is None else model.to(device)).eval(), processor


def _dtype(given: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype: expected auto or a torch dtype such as bfloat16, found {given!r}")
    return found


def convert(
    base_path: str | Path,
    out_path: str | Path,
    max_latent_token: int = 4,
    system_prompt: str = SYSTEM_PROMPT,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    **latent_keys: Any,
) -> Path:
    """Make a latent checkpoint from a Qwen3-VL one. The base is only read.

    The three tokens are added in the released order. The embedding is resized only if its rows do not suffice (those of
    the real Qwen3-VL do). Rows of the three that are alike, new or never trained, are drawn anew: `token_rows`.

    Args:
        system_prompt: opens conversations that bring no system turn; "" = none.
        seed: for new rows of the embedding, and for a head if `latent_keys` ask for one.
        dtype: of the weights; None = the base's. What is trained from here on is written in it, too.
        latent_keys: further keys of `LatentConfig`.

    Raises:
        CheckpointError: the base is no Qwen3-VL, or `out_path` is the base or holds files already.
        ConfigError: unknown dtype, or a latent key with a value that it cannot have.
    """
    from transformers import AutoConfig, AutoProcessor

    out, dtype = Path(out_path), _dtype(dtype) if dtype is not None else None
    if is_absent(base_path):
        raise CheckpointError(f"{base_path}: no such folder. Expected a {NAMES} checkpoint or a hub id.")
    check_folder(base_path)
    if Path(base_path).exists() and Path(base_path).resolve() == out.resolve():
        raise CheckpointError(f"{out}: is the base itself, which is never changed. Name another output folder.")
    check_new(out)
    with reading(base_path):
        family = by_config(AutoConfig.from_pretrained(base_path), base_path)
        processor = AutoProcessor.from_pretrained(base_path)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    tokens = LatentTokens.from_tokenizer(tokenizer)
    processor.chat_template = tokenizer.chat_template = chat_template(system_prompt, family)
    with reading(base_path):
        model = family.model.load().from_pretrained(base_path, dtype="auto")
    latent = LatentConfig(
        latent_id=tokens.latent,
        latent_start_id=tokens.start,
        latent_end_id=tokens.end,
        max_latent_token=max_latent_token,
        **latent_keys,
    )
    latent.to_hf(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)  # draws the new rows
        attach_head(model, latent)
    part_rows(model, tokens, len(tokenizer), seed)
    save(model, processor, out, dtype)
    return out


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Parameters in place; buffers stay: M-RoPE's frequencies in bfloat16 are wrong by radians."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)


def save(
    model: nn.Module,
    processor: Any,
    out_path: str | Path,
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
) -> None:
    """Write a latent checkpoint; the folder appears only when it is whole.

    Args:
        dtype: of the weights on disk; None = as they are. The model stays as it is.
        adapter: a folder with the adapters that were merged into the model; moves to the subfolder "adapter".
    """
    out = Path(out_path)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if dtype is None or dtype == model.dtype:
        model.save_pretrained(part)
    else:
        state = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", {})  # name -> source; of a tied weight one copy is written
        tied = {name for name, source in tied.items() if state[name].data_ptr() == state[source].data_ptr()}
        state = {name: _stored(value, dtype) for name, value in state.items() if name not in tied}
        model.save_pretrained(part, state_dict=state)
        config = json.loads((part / "config.json").read_text())
        for section in (config, *(v for v in config.values() if isinstance(v, dict) and "dtype" in v)):
            section["dtype"] = str(dtype).removeprefix("torch.")
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(part)
    write_card(part, model.config)
    if adapter is not None:
        adapter.rename(part / ADAPTER)
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
    to_disk(part)
    part.rename(out)


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
