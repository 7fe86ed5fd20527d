"""Whether a response answers as the ground truth does, by rule.

Three kinds of answer, three rules: an option letter is read by `option_letter`, mathematics is compared by mathruler,
text by its words. A rule decides 1.0 or 0.0, or None where only a reader could tell: text in other words than the
ground truth's. A judge may decide those; without one they count as 0, which `needs_reader` tells before a run.
"""

import re
from collections.abc import Mapping

from future_l1_plugin.errors import EnvironmentMismatch, RewardError
from future_l1_plugin.rewards.answer import DEFAULT_LETTERS, extract_answer, option_letter, plain_text

KINDS = ("auto", "choice", "maths", "text")

_LETTER_ALONE = re.compile(rf"\(?[{DEFAULT_LETTERS}]\)?\.?")
# What tells a formula from a sentence: no word of two letters, once commands and functions are taken out.
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)|\b(?:sqrt|pi|sin|cos|tan|log|ln|exp)\b")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,:/]\d+)*")
_BOX = r"\boxed{"

# What mathruler may evaluate. It hands answers to sympy's parser, which is Python's `eval`, and "1e9999999" or
# "9**9**9" then never returns; there is no stopping it in a reward worker. So only short, tame expressions go there.
_LONGEST = 100
_DROPPED = re.compile(r"[\s{}$%]|\\left|\\right|\\[!,;:]")  # by mathruler as well, before it evaluates
_TAME = re.compile(r"[0-9a-z.,+\-*/^()\[\]\\=√π∞·×°:'′]*")
_COMMANDS = re.compile(r"\\(?!(?:[dt]?frac|sqrt|pi|cdot|times|circ|infty|text|mathrm|boxed)(?![a-z]))")
_WILD = re.compile(
    r"(?:[*·×]|\\times|\\cdot){2}"  # a power in disguise
    r"|//|\^(?![-+]?(?:\d|[a-z]|\\circ)(?![\d.]))"  # exponents of more than one digit or letter
    r"|\d\.?e[-+]?\d"  # 1e9999999
    r"|(?<![a-z])(?!(?:[a-z]*(?:sqrt|sin|cos|tan|log|ln)|[a-z])\()[a-z]+[(\[]"  # calls of other functions
)
_MOST = {"^": 2, "sqrt": 3, "√": 3, "(": 8}


def accuracy(
    text: str, ground_truth: str, options: Mapping[str, str] | None = None, kind: str = "auto"
) -> float | None:
    """1.0 for a right answer, 0.0 for a wrong or missing one, None if no rule can tell.

    - "choice": the letter that the response chooses against the letter of the ground truth (`B`, `(B)`, `B. text`, or
      the text of an option). A response that chooses no option, or two, is wrong.
    - "maths": the content of the answer block (of its last `\\boxed{}`, if any) is equal by mathruler's grader:
      numbers, fractions, LaTeX, tuples. Never None.
    - "text": 1.0 if words and numbers are the same (case, punctuation and spacing apart), else None; 0.0 for an empty
      answer.
    - "auto": choice if there are options or the ground truth is one of the letters A to D; maths if it has a digit or a
      LaTeX command and no word; else text.

    In maths and text a response without an answer block is wrong: there is nothing for a judge to read.

    Args:
        text: a response, special tokens kept or not.
        ground_truth: the right answer, bare or in an answer block.
        options: option letter -> option text.
        kind: "auto", "choice", "maths" or "text".

    Raises:
        RewardError: another kind, an empty ground truth, or one that names no option of a choice.
        EnvironmentMismatch: maths without mathruler.
    """
    truth, kind = _truth_and_kind(ground_truth, options, kind)
    if kind == "choice":
        right = option_letter(truth, options)
        if right is None:
            known = ", ".join(sorted(options)) if options else "A to D (no options were given)"
            raise RewardError(
                f"ground_truth: expected an option, one of {known}, found {ground_truth!r}. "
                "Fix it or the options in the data, or set the sample's kind."
            )
        return float(option_letter(text, options) == right)
    answer = extract_answer(text)
    if not answer:
        return 0.0
    if kind == "maths":
        return float(_same_maths(_unboxed(answer), _unboxed(truth)))
    return 1.0 if _same_words(answer, truth) else None


def needs_reader(ground_truth: str, options: Mapping[str, str] | None = None, kind: str = "auto") -> bool:
    """Whether right answers may be worded so that `accuracy` cannot tell: text of more than one word.

    One word either stands there or does not; a sentence is hardly ever said again in its own words.

    Args:
        ground_truth, options, kind: as in `accuracy`, which raises alike.
    """
    truth, kind = _truth_and_kind(ground_truth, options, kind)
    return kind == "text" and len(plain_text(truth).split()) > 1


def _truth_and_kind(ground_truth: str, options: Mapping[str, str] | None, kind: str) -> tuple[str, str]:
    if kind not in KINDS:
        raise RewardError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    truth = extract_answer(ground_truth)
    truth = (ground_truth if truth is None else truth).strip()
    if not truth:
        raise RewardError(f"ground_truth: expected the right answer, found {ground_truth!r}. Fill it in the data.")
    return truth, _kind_of(truth, options) if kind == "auto" else kind


def _kind_of(truth: str, options: Mapping[str, str] | None) -> str:
    if options or _LETTER_ALONE.fullmatch(truth):
        return "choice"
    formula = any(sign.isdigit() or sign == "\\" for sign in truth)
    return "maths" if formula and not _WORD.search(_COMMAND.sub(" ", truth)) else "text"


def _same_words(answer: str, truth: str) -> bool:
    if not plain_text(truth):  # signs only
        return answer == truth
    # To the words alone, -5 is 5 and 3.5 is 3 5.
    return plain_text(answer) == plain_text(truth) and _numbers(answer) == _numbers(truth)


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(text.replace("−", "-"))


def _unboxed(answer: str) -> str:
    """The content of the last `\\boxed{..}`, braces matched; the answer itself if there is none, or none closed."""
    start = answer.rfind(_BOX)
    if start < 0:
        return answer
    depth = 0
    for position in range(start + len(_BOX) - 1, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[position], 0)
        if depth == 0:
            return answer[start + len(_BOX) : position].strip()
    return answer


def _same_maths(answer: str, truth: str) -> bool:
    try:
        from mathruler.grader import grade_answer
        from mathruler.math_normalize import normalize_answer
    except ImportError as error:
        raise EnvironmentMismatch(
            "accuracy of kind maths needs mathruler.\nRun: pip install mathruler==0.1.0\n"
            "Or let answers be compared by their words: set the kind of the samples to text."
        ) from error
    if _tame(answer) and _tame(truth):
        return bool(grade_answer(answer, truth))
    return _compact(answer) == _compact(truth) or normalize_answer(answer) == normalize_answer(truth)


def _compact(answer: str) -> str:
    return _DROPPED.sub("", answer).lower()


def _tame(answer: str) -> bool:
    """Whether mathruler can be trusted to be done with it in a moment."""
    if len(answer) > _LONGEST:
        return False
    compact = _compact(answer)
    return (
        _TAME.fullmatch(compact) is not None
        and not _COMMANDS.search(_DROPPED.sub(" ", answer))
        and not _WILD.search(compact)
        and all(compact.count(sign) <= most for sign, most in _MOST.items())
    )
