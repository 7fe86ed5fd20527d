"""Terms about the length of a response and about text that goes round in circles. Plain Python, no tokenizer."""

import re

from future_l1_plugin.errors import RewardError

_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")
#: A word, a sign, or one character of a script that is written without spaces.
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+|[^\w\s]")

NGRAM = 4


def repetition(text: str, n: int = NGRAM) -> float:
    """The share of n-grams that occurred before in the text: 1 - distinct / all.

    Units are words, punctuation marks and single Chinese or Japanese characters, in lower case; special tokens such as
    `<|latent|>` are left out, because their repetition is dictated. A text of fewer than n + 1 units gives 0.0.

    Args:
        text: a response.
        n: units that make one n-gram, >= 1.

    Returns:
        A number in [0, 1): 0.0 if nothing repeats; a phrase said k times over comes close to 1 - 1/k.

    Raises:
        RewardError: n below 1.
    """
    check_ngram(n)
    units = _UNIT.findall(_SPECIAL_TOKEN.sub(" ", text).casefold())
    total = len(units) - n + 1
    if total < 2:
        return 0.0
    return 1.0 - len(set(zip(*(units[start:] for start in range(n)), strict=False))) / total


def length_share(length: int, max_length: int) -> float:
    """The share of its budget that a response uses, in [0, 1]; with a negative weight it rewards brevity.

    Args:
        length: tokens of the response, latents included.
        max_length: the most tokens that a response may have, >= 1.

    Raises:
        RewardError: a length below 0, or a `max_length` below 1.
    """
    _check_length(length, max_length)
    return min(1.0, length / max_length)


def overlong(length: int, max_length: int, buffer: int) -> float:
    """Soft overlong punishment: DAPO (arXiv 2503.14476), equation 13.

    0 up to max_length - buffer, then linear down to -1 at max_length, and -1 beyond it.

    Args:
        length: tokens of the response, latents included.
        max_length: the most tokens that a response may have, >= 1.
        buffer: the last tokens of it, over which the punishment grows (L_cache), 1 to max_length.

    Raises:
        RewardError: a length below 0, a `max_length` below 1, or a buffer out of range.
    """
    _check_length(length, max_length)
    check_buffer(buffer, max_length)
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))


def check_ngram(n: int) -> None:
    """Raises RewardError unless n >= 1."""
    if n < 1:
        raise RewardError(f"n: expected at least 1 unit an n-gram, found {n}")


def check_buffer(buffer: int, max_length: int | None = None) -> None:
    """Raises RewardError unless 1 <= buffer <= max_length (no upper bound if that is not known yet)."""
    if buffer < 1 or (max_length is not None and buffer > max_length):
        upper = "" if max_length is None else f" to {max_length}, the longest response,"
        raise RewardError(f"buffer: expected 1{upper or ' or more'} tokens, found {buffer}")


def _check_length(length: int, max_length: int) -> None:
    if length < 0 or max_length < 1:
        raise RewardError(
            f"expected a length >= 0 and a max_length >= 1, found {length} and {max_length}. "
            "Set `max_response_length` of the sample."
        )
