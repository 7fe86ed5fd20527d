"""Part d. What latents cost in time.

Decoding    `future_l1_plugin.model.generate`, half of whose tokens are latents, against `generate` of transformers:
            same model, same prompts, same number of new tokens, greedy. The micro base and an 8B-shaped model of 8
            layers, at batch 1, 16 and 64. The two take turns; the ratio is the median over turns of that within a turn.
            Goal 1.05 (`scripts/bench_generate.py`, on a CPU). Rule at real width: 1.25 at most; the micro base's steps
            last about as long as launching their kernels, so its ratio is only reported.
SFT step    Forward and backward pass of `sft_losses`, four future frames per row, against the cross-entropy alone on
            the same ids. The difference is the vision tower's pass over the frames. Rule: 1.5 at most.

On a CPU times are only reported: machines that run tests are busy.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from future_l1_plugin.gpu_check.models import FULL, TINY, OpenSpans, build, prompts, ready, text_ids
from future_l1_plugin.gpu_check.results import Recorder
from future_l1_plugin.latent import SpanBudget
from future_l1_plugin.model.backbone import QWEN3_VL
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.decode import generate
from future_l1_plugin.model.objective import sft_losses
from future_l1_plugin.model.tiny import MICRO_BASE

RATIO, SFT_RATIO = 1.25, 1.5
LAYERS = 8


def run(results: Recorder, setting) -> None:
    """The micro base, then the wide model: decoding, SFT step."""
    tokens, repeats = (16, 2) if setting.small else (64, 3)
    batches = (1, 4) if setting.small else (1, 16, 64)
    decoding(results, "micro base", micro_base(setting.device), batches, tokens, repeats, judged=False)
    if setting.small:
        name, model = "tiny", build(TINY, setting.device, torch.float32)
    else:
        name, model = f"8B shape, {LAYERS} layers", build(FULL, setting.device, torch.bfloat16, layers=LAYERS)
    decoding(results, name, model, batches, tokens, repeats, judged=not setting.small)
    sft_step(results, name, model, setting, repeats)


def micro_base(device: torch.device) -> nn.Module:
    """The shipped base without its processor, so that neither torchvision nor a video reader is needed."""
    return ready(QWEN3_VL.model.load().from_pretrained(MICRO_BASE, dtype="auto").to(device))


def decoding(
    results: Recorder, name: str, model: nn.Module, batches: tuple[int, ...], tokens: int, repeats: int, judged: bool
) -> None:
    """Milliseconds per token of both, and their ratio."""
    start = LatentConfig.from_hf(model.config).latent_start_id
    plain_ms, latent_ms, ratios = {}, {}, {}
    for batch in batches:
        inputs = prompts(model, batch, 24, 32)
        spans = LogitsProcessorList([OpenSpans(start, inputs["input_ids"].shape[1], (0,))])

        def plain(inputs: dict[str, Tensor] = inputs) -> Any:
            return model.generate(**inputs, do_sample=False, max_new_tokens=tokens)

        def latent(inputs: dict[str, Tensor] = inputs, spans: LogitsProcessorList = spans) -> Any:
            half = SpanBudget(tokens // 2, exact=True)
            return generate(model, inputs, max_new_tokens=tokens, budget=half, logits_processor=spans)

        plain()
        fed = sum(map(len, latent().latents))
        if fed != batch * (tokens // 2):
            raise RuntimeError(f"{name}: expected {batch * (tokens // 2)} latents, found {fed}")
        a, b, ratios[f"{batch}"] = in_turn(plain, latent, repeats, model.device)
        plain_ms[f"{batch}"], latent_ms[f"{batch}"] = a * 1000 / tokens, b * 1000 / tokens
    results.number(f"{name}: transformers' generate, by batch", plain_ms, "ms per token")
    results.number(f"{name}: generate with spans, by batch", latent_ms, "ms per token")
    results.number(f"{name}: ratio, by batch (goal 1.05)", ratios, most=RATIO if judged else None)


def sft_step(results: Recorder, name: str, model: nn.Module, setting, repeats: int) -> None:
    """Seconds of a step with latents, of one without, and their ratio."""
    config = LatentConfig.from_hf(model.config)
    batch = sft_batch(model, config, *((2, 64, 4) if setting.small else (2, 2048, 16)))
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "labels")}
    model.train()

    def plain() -> None:
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad()

    def latent() -> None:
        losses = sft_losses(model, config, batch)
        losses.total.backward()
        model.zero_grad()
        if not losses.latents:
            raise RuntimeError(f"{name}: the SFT batch has no latents")

    plain()
    latent()
    a, b, ratio = in_turn(plain, latent, repeats, model.device)
    results.number(f"{name}: SFT step, cross-entropy alone / with latents", {"plain": a, "latent": b}, "s")
    limit = None if setting.small or not setting.cuda else SFT_RATIO
    results.number(f"{name}: SFT step, ratio", ratio, most=limit)
    model.eval()


def sft_batch(model: nn.Module, config: LatentConfig, rows: int, length: int, patches: int) -> dict[str, Tensor]:
    """As `SftCollator` makes it: rows whose response, their second half, holds four frames of patches^2 / 4 latents."""
    vision = model.config.vision_config
    frames, held = 4, patches * patches // vision.spatial_merge_size**2
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, text_ids(model), (rows, length), generator=draw)
    for frame in range(frames):
        begin = length // 2 + frame * (held + 2)
        ids[:, begin] = config.latent_start_id
        ids[:, begin + 1 : begin + 1 + held] = config.latent_id
        ids[:, begin + 1 + held] = config.latent_end_id
    labels = ids.masked_fill(ids == config.latent_id, -100)
    labels[:, : length // 2] = -100
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "latent_pixel_values": torch.randn(rows * frames * patches**2, size, generator=draw).to(model.dtype),
        "latent_grid_thw": torch.tensor([[1, patches, patches]] * (rows * frames)),
        "latent_frames": torch.tensor([frames] * rows),
        "response_start": torch.tensor([length // 2] * rows),
    }
    return {key: value.to(model.device) for key, value in batch.items()}


def in_turn(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio second / first within a turn."""
    times = [(seconds(first, device), seconds(second, device)) for _ in range(repeats)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return a, b, statistics.median(y / x for x, y in times)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
