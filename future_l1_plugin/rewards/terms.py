"""The terms that come with the package.

Paper (Future-L1, arXiv 2606.05769): R = 0.9 accuracy + 0.1 format + 0.2 r_ctr + 0.1 r_div.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from future_l1_plugin.errors import RewardError
from future_l1_plugin.rewards import text as _text
from future_l1_plugin.rewards.accuracy import accuracy
from future_l1_plugin.rewards.answer import extract_answer
from future_l1_plugin.rewards.format import check_mode, format_reward
from future_l1_plugin.rewards.registry import Sample, reward_term

#: Repetition above this makes an answer count as -1 (Future-L1).
REPETITION_LIMIT = 0.5


def _prepare_accuracy(judge: Mapping[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
    limit = keywords.get("repetition_limit", REPETITION_LIMIT)
    if limit is not None and not 0 <= limit <= 1:
        raise RewardError(f"repetition_limit: expected a share between 0 and 1, or null for no limit, found {limit!r}")
    if judge is None:
        return keywords
    if keywords.get("exact_text"):
        raise RewardError("exact_text: true asks no judge, and `judge` is given. Leave one of the two out")
    from future_l1_plugin.rewards.judge import build_judge

    return {**keywords, "judge": build_judge(judge)}


@reward_term(
    "accuracy", prepare=_prepare_accuracy, metrics={"repetition": lambda sample: _text.repetition(sample.text)}
)
async def accuracy_term(
    sample: Sample,
    *,
    judge: Mapping[str, Any] | None = None,
    repetition_limit: float | None = REPETITION_LIMIT,
    exact_text: bool = False,
) -> float:
    """1.0 right, 0.0 wrong, between them what a judge says, -1.0 for text that goes round in circles.

    The rule (`accuracy`) decides first. Where it cannot, the judge is asked; without one the answer counts as 0.

    Args:
        judge: settings of the judge, see `judge.build_judge`; None for none.
        repetition_limit: share of repeated n-grams (`repetition`) above which the answer is not looked at; None for
            no limit.
        exact_text: text in other words than the ground truth's shall count as wrong: hosts then take prompts with
            sentences as answers without a judge.
    """
    if repetition_limit is not None and _text.repetition(sample.text) > repetition_limit:
        return -1.0
    try:
        value = accuracy(sample.text, sample.ground_truth, sample.options, sample.kind)
    except RewardError as error:
        raise RewardError(f"sample {sample.sample_id!r}: {error}") from error
    if value is not None:
        return value
    if judge is None:
        return 0.0
    return await judge.judge(
        question=sample.question,
        ground_truth=sample.ground_truth,
        answer=extract_answer(sample.text),
        sample_id=sample.sample_id,
    )


def _prepare_format(mode: str = "any") -> dict[str, Any]:
    check_mode(mode)
    return {"mode": mode}


@reward_term("format", prepare=_prepare_format)
def format_term(sample: Sample, *, mode: str = "any") -> float:
    """1.0 if the response keeps to the grammar, else 0.0: `format_reward`."""
    return format_reward(sample.text, mode)


def _prepare_contrastive(temperature: float = 0.5) -> dict[str, Any]:
    from future_l1_plugin.rewards.contrastive import check_temperature

    check_temperature(temperature)
    return {"temperature": temperature}


@reward_term("r_ctr", scope="group", needs_accuracy=True, prepare=_prepare_contrastive)
def contrastive_term(samples: list[Sample], *, temperature: float = 0.5) -> list[float]:
    """Resemblance to the latents of correct rollouts rather than wrong ones: `outcome_contrastive`."""
    import torch

    from future_l1_plugin.rewards.contrastive import outcome_contrastive

    correct = torch.tensor([bool(sample.correct) for sample in samples])
    try:
        return outcome_contrastive([sample.latents for sample in samples], correct, temperature).tolist()
    except RewardError as error:
        names = ", ".join(repr(sample.sample_id) for sample in samples)
        raise RewardError(f"reward term 'r_ctr', group of the samples {names}: {error}") from error


def _adjacent_cosine(sample: Sample) -> float | None:
    from future_l1_plugin.rewards.diversity import mean_adjacent_cosine

    return mean_adjacent_cosine(sample.latents, sample.span)


@reward_term("r_div", metrics={"adjacent_cosine": _adjacent_cosine})
def diversity_term(sample: Sample) -> float:
    """Minus the squared cosine of adjacent spans: `temporal_diversity`."""
    from future_l1_plugin.rewards.diversity import temporal_diversity

    try:
        return temporal_diversity(sample.latents, sample.span)
    except RewardError as error:
        raise RewardError(f"reward term 'r_div', sample {sample.sample_id!r}: {error}") from error


def _prepare_repetition(n: int = _text.NGRAM) -> dict[str, Any]:
    _text.check_ngram(n)
    return {"n": n}


@reward_term("repetition", prepare=_prepare_repetition)
def repetition_term(sample: Sample, *, n: int = _text.NGRAM) -> float:
    """Share of repeated n-grams, `repetition`: give it a negative weight."""
    return _text.repetition(sample.text, n)


@reward_term("length")
def length_term(sample: Sample) -> float:
    """Share of the token budget that the response uses, `length_share`: with a negative weight, brevity pays."""
    return _text.length_share(_length(sample), sample.max_response_length)


def _prepare_overlong(buffer: int) -> dict[str, Any]:
    _text.check_buffer(buffer)
    return {"buffer": buffer}


@reward_term("overlong", prepare=_prepare_overlong)
def overlong_term(sample: Sample, *, buffer: int) -> float:
    """DAPO's soft punishment of the last `buffer` tokens of the budget, `overlong`: give it a positive weight."""
    return _text.overlong(_length(sample), sample.max_response_length, buffer)


def _length(sample: Sample) -> int:
    return len(sample.response_ids)
