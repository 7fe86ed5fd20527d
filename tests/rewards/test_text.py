"""Repetition, length and the overlong punishment: values worked out by hand."""

import time

import pytest

from future_l1_plugin.errors import RewardError
from future_l1_plugin.rewards import length_share, overlong, repetition

# text, n, share of repeated n-grams
REPETITIONS = [
    ("", 4, 0.0),
    ("a b c d", 4, 0.0),  # one 4-gram
    ("a b c d e f g", 4, 0.0),
    ("a a a a a", 4, 1 / 2),  # two 4-grams, one of them new
    ("a b a b a b a b", 4, 3 / 5),  # abab baba abab baba abab
    ("a b a b a b a b", 2, 5 / 7),
    ("a b c a", 1, 1 / 4),
    ("A b. a B.", 3, 1 / 4),  # case does not count; signs do: "a b ." "b . a" ". a b" "a b ."
    ("!!!!!!!", 4, 3 / 4),
    ("球球球球球", 4, 1 / 2),  # one unit a character
    ("おおおおお", 4, 1 / 2),
    ("<|latent_start|>" + "<|latent|>" * 50 + "<|latent_end|>", 4, 0.0),
    ("a b <|latent|> c d e", 4, 0.0),
    ("word " * 103, 4, 0.99),  # 100 4-grams
]


@pytest.mark.parametrize(("text", "n", "share"), REPETITIONS)
def test_repetition(text, n, share):
    assert repetition(text, n) == pytest.approx(share, abs=1e-12)


def test_repetition_counts_4_grams_by_default():
    assert repetition("a a a a a") == 0.5


def test_a_phrase_said_k_times_comes_close_to_1_minus_1_over_k():
    phrase = " ".join(f"word{i}" for i in range(200))
    assert repetition(f"{phrase} {phrase} {phrase}") == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("piece", ["a ", "a", "<|", "<|x|>", "!", "球", "é́ "])
def test_long_text_is_read_quickly(piece):
    start = time.perf_counter()
    repetition(piece * (100_000 // len(piece)))
    assert time.perf_counter() - start < 1.0


def test_length_share():
    assert [length_share(n, 8) for n in (0, 2, 8, 9)] == [0.0, 0.25, 1.0, 1.0]


def test_overlong_is_equation_13_of_dapo():
    # max 20, buffer 4: free up to 16, then a quarter a token, -1 from 20 on.
    assert [overlong(n, 20, 4) for n in (0, 15, 16, 17, 18, 19, 20, 21, 99)] == [
        0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0,
    ]  # fmt: skip
    assert [overlong(n, 2, 2) for n in (0, 1, 2)] == [0.0, -0.5, -1.0]


ERRORS = [
    (lambda: repetition("a", 0), "n: expected at least 1 unit an n-gram, found 0"),
    (lambda: length_share(-1, 8), "expected a length >= 0 and a max_length >= 1, found -1 and 8"),
    (lambda: length_share(1, 0), "found 1 and 0. Set `max_response_length`"),
    (lambda: overlong(1, 0, 1), "found 1 and 0"),
    (lambda: overlong(1, 8, 0), "buffer: expected 1 to 8, the longest response, tokens, found 0"),
    (lambda: overlong(1, 8, 9), "buffer: expected 1 to 8, the longest response, tokens, found 9"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(RewardError, match=message):
        call()
