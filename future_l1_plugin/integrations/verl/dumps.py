"""What verl's dumps of rollouts (`trainer.rollout_data_dir`, `trainer.validation_data_dir`) say of latent responses.

verl decodes what it writes down without special tokens, and so without a trace of a span. The reward workers, which see
each response as it was, leave its text and lengths beside its scores; the trainer puts them into verl's rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from future_l1_plugin.latent import LatentTokens, spans_of
from future_l1_plugin.rewards import Sample

#: Keys in `reward_extra_info` and in a dump's row. TEXT only where a dump is wanted; the others are validation metrics,
#: too: tokens of the response (each latent counts as one), its spans, its latents.
TEXT = "response_text"
LENGTHS = ("response_tokens", "response_spans", "response_latents")


def is_wanted(config: DictConfig) -> bool:
    """Whether verl writes rollouts down."""
    return bool(config.trainer.get("rollout_data_dir") or config.trainer.get("validation_data_dir"))


def facts(sample: Sample, tokens: LatentTokens, with_text: bool) -> dict[str, Any]:
    """LENGTHS of a response, and its text with the markers of its spans."""
    spans = spans_of(sample.response_ids.tolist(), tokens)
    lengths = len(sample.response_ids), len(spans), sum(length for _, length, _ in spans)
    return dict(zip(LENGTHS, lengths, strict=True)) | ({TEXT: sample.text} if with_text else {})


def is_told(metric: str) -> bool:
    """Whether a metric of a validation says anything: of lengths their mean does, not the best of n."""
    return not any(f"/{name}/" in metric for name in LENGTHS) or "/mean@" in metric


def with_markers(
    outputs: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[list[str], dict[str, list[Any]]]:
    """The outputs and columns of a dump: each output as it was written, and no second copy of it."""
    texts = columns.get(TEXT, [None] * len(outputs))
    shown = [output if text is None else text for output, text in zip(outputs, texts, strict=True)]
    return shown, {name: list(values) for name, values in columns.items() if name != TEXT}
