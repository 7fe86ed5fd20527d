"""Accuracy by rule: tables of answers, and what must never reach a computer-algebra system."""

import sys
import time

import pytest

from future_l1_plugin.errors import EnvironmentMismatch, RewardError
from future_l1_plugin.rewards import accuracy

OPTIONS = {"A": "It rolls left", "B": "It falls", "C": "It stops", "D": "Nothing"}
SPAN = "<|latent_start|><|latent|><|latent_end|>"


def block(answer):
    return f"<reason>It is A, 7.</reason>{SPAN}<reason>so</reason><answer>{answer}</answer><|im_end|>"


CHOICE = [
    (block("B"), "B", 1.0),
    (block("(b)"), "B", 1.0),
    (block("B"), "(B)", 1.0),
    (block("B"), "B. It falls", 1.0),
    (block("B"), "It falls", 1.0),
    (block("it falls."), "B", 1.0),
    (block("B"), "<answer>B</answer>", 1.0),
    (block("C"), "B", 0.0),
    (block("B or C"), "B", 0.0),
    (block("who knows"), "B", 0.0),
    (block(""), "B", 0.0),
    ("", "B", 0.0),
    ("B", "B", 1.0),  # `option_letter` reads bare answers too
]


@pytest.mark.parametrize(("text", "truth", "expected"), CHOICE)
@pytest.mark.parametrize("kind", ["auto", "choice"])
def test_choice(text, truth, expected, kind):
    assert accuracy(text, truth, OPTIONS, kind) == expected


def test_a_letter_without_options_is_a_choice():
    assert accuracy(block("The answer is C."), "C") == 1.0
    assert accuracy(block("C"), "(D)") == 0.0
    assert accuracy(block("E"), "E") == 1.0  # text: no option is called E unless options say so
    assert accuracy(block("E"), "E", {letter: letter * 3 for letter in "ABCDE"}) == 1.0


MATHS = [
    ("7", "7", 1.0),
    ("7.0", "7", 1.0),
    ("-7", "7", 0.0),
    ("1,000", "1000", 1.0),
    ("50%", "50", 1.0),
    ("$7$", "7", 1.0),
    (r"\boxed{7}", "7", 1.0),
    (r"so \boxed{5}, no, \boxed{\frac{1}{2}}", "0.5", 1.0),
    (r"\boxed{7", "7", 1.0),  # mathruler drops a stray brace
    (r"\frac{1}{2}", "0.5", 1.0),
    (r"\frac12", r"\frac{1}{2}", 1.0),
    ("x^2+1", "1+x^2", 1.0),
    ("sqrt(8)", r"2\sqrt{2}", 1.0),
    ("(1, 2)", "(1,2)", 1.0),
    ("(2, 1)", "(1,2)", 0.0),
    ("x^{12}", "x^12", 1.0),
    ("8", "7", 0.0),
    ("seven", "7", 0.0),
    ("", "7", 0.0),
]


@pytest.mark.parametrize(("answer", "truth", "expected"), MATHS)
def test_maths(answer, truth, expected):
    assert accuracy(block(answer), truth, kind="maths") == expected
    if any(sign.isdigit() for sign in truth) and "sqrt" not in truth:
        assert accuracy(block(answer), truth) == expected


TEXT = [
    ("It falls", "it falls.", 1.0),
    ("  It   FALLS! ", "it falls", 1.0),
    ("It drops", "it falls", None),
    ("It falls down", "it falls", None),
    ("", "it falls", 0.0),
    ("   ", "it falls", 0.0),
    ("frame 7", "frame 7", 1.0),
    ("about -5 degrees", "about 5 degrees", None),
    ("about −5 degrees", "about -5 degrees", 1.0),
    ("moves 3.5 metres", "moves 3 5 metres", None),
    ("?", "?", 1.0),
    ("!", "?", None),
    ("球が落ちる", "球が落ちる。", 1.0),
]


@pytest.mark.parametrize(("answer", "truth", "expected"), TEXT)
@pytest.mark.parametrize("kind", ["auto", "text"])
def test_text(answer, truth, expected, kind):
    assert accuracy(block(answer), truth, kind=kind) == expected


@pytest.mark.parametrize("kind", ["maths", "text"])
def test_without_an_answer_block_there_is_nothing_to_judge(kind):
    assert accuracy("<reason>it is 7</reason> 7", "7", kind=kind) == 0.0


@pytest.mark.parametrize(
    ("truth", "kind"),
    [
        ("B", "choice"), ("(B)", "choice"), ("b", "text"), ("I", "text"), ("7", "maths"), ("-3/4", "maths"),
        (r"\pi", "maths"), (r"\frac{a}{b}", "maths"), ("2*sqrt(3)", "maths"), ("x=5", "maths"), ("7 balls", "text"),
        ("yes", "text"), (r"\text{no}", "text"), ("pi", "text"),
    ],
)  # fmt: skip
def test_auto_finds_the_kind(truth, kind):
    from future_l1_plugin.rewards.accuracy import _kind_of

    assert _kind_of(truth, None) == kind
    assert _kind_of(truth, OPTIONS) == "choice"


# Each of these kept the grader, or could keep it, busy for minutes to years.
WILD = [
    "1e9999999", "1 e 9999999", "1e-9999999", "9**9**9**9", "9 * *9* *9", r"9\times\times9\cdot\cdot9", "9^9^9^9",
    "((((9^9)^9)^9)^9)^9", "9^-999999999", "9^{-999999999}", "9^9e9999", "9^.999999999", "2^(9^(9^9))", "99999999!",
    "ff(99999999,9999999)", "f f(99999999,9999999)", r"\mathrm{rf}(99999999,9999999)", "n(pi,99999999)",
    "1<<999999999999", "+".join(f"sqrt({i})" for i in range(2, 24)), "*".join(f"(x+y+{i})" for i in range(20)),
    "(" * 199, "9" * 100_000, r"\boxed{" * 10_000, "9e" * 90, r"9\ast\ast9\ast\ast9\ast\ast9",
]  # fmt: skip


@pytest.mark.parametrize("answer", WILD, ids=lambda answer: answer[:16])
def test_wild_expressions_are_not_evaluated(answer):
    accuracy(block("7"), "7", kind="maths")  # the import is not timed
    start = time.perf_counter()
    assert accuracy(block(answer), "5.5", kind="maths") == 0.0
    assert accuracy(block(answer), answer, kind="maths") == 1.0 or "boxed" in answer  # but compared
    assert time.perf_counter() - start < 2.0


ERRORS = [
    (("x", "7", None, "math"), "kind: expected one of auto, choice, maths, text, found 'math'"),
    (("x", "  ", None, "auto"), "ground_truth: expected the right answer, found '  '"),
    (("x", "<answer></answer>", None, "auto"), "ground_truth: expected the right answer"),
    (("x", "E", OPTIONS, "auto"), "expected an option, one of A, B, C, D, found 'E'"),
    (("x", "It flies", OPTIONS, "auto"), "expected an option, one of A, B, C, D, found 'It flies'. Fix"),
    (("x", "It flies", None, "choice"), r"one of A to D \(no options were given\)"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(RewardError, match=message):
        accuracy(*arguments)


def test_maths_without_mathruler_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mathruler.grader", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install mathruler==0\.1\.0"):
        accuracy(block("7"), "7", kind="maths")
    assert accuracy(block("B"), "B") == 1.0
