"""What a response answers: the content of its `<answer>` block and the option letter in it.

Used by the accuracy reward and by the evaluation tasks, so that training and evaluation read an answer alike. Works on
text only (no torch, no tokenizer); special tokens may still stand in the text.

A parser of answers errs in two ways: it misses an answer, or it invents one. A missed answer is counted (parse-failure
rate), an invented one is not. So whatever is ambiguous ("A or B", an article that looks like option A) is no answer.
"""

import re
import unicodedata
from collections.abc import Mapping

#: Letters that count as options when the caller does not give the options.
DEFAULT_LETTERS = "ABCD"

_OPEN = r"<\s*answer\s*>"
_CLOSE = r"<\s*/\s*answer\s*>"
# The content may not hold another opening tag: in "<answer>x <answer>B</answer>" the closed block is "B".
_CLOSED_BLOCK = re.compile(rf"{_OPEN}((?:(?!{_OPEN}).)*?){_CLOSE}", re.IGNORECASE | re.DOTALL)
_OPENING = re.compile(_OPEN, re.IGNORECASE)
_STRAY_CLOSE = re.compile(_CLOSE, re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")
# Thoughts are no answer; one that was never closed runs to the end of the text.
_THOUGHT = re.compile(r"<\s*(reason|think|thinking)\s*>.*?(?:<\s*/\s*\1\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_THOUGHT_END = re.compile(r"<\s*/\s*(?:reason|think|thinking)\s*>", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:boxed|text|mathrm|textbf)\s*\{([^{}]*)\}")

_WRAP = r"[\s*_`\"'“”‘’(\[{$]*"  # what may stand before a letter
_UNWRAP = r"[\s*_`\"'“”‘’)\]}$.,:;!]*"  # and after it


def extract_answer(text: str) -> str | None:
    """The content of the answer block, stripped, special-token markers such as `<|im_end|>` removed.

    1. The last CLOSED block `<answer>..</answer>` (tags in any case, spaces inside the brackets allowed). An unclosed
       block after it does not count.
    2. Else everything after the last `<answer>`, which was never closed.
    3. Else None. An empty block gives "" (there is a block, and nothing in it).
    """
    if closed := _CLOSED_BLOCK.findall(text):
        return _SPECIAL_TOKEN.sub("", closed[-1]).strip()
    *_, unclosed = [None, *_OPENING.finditer(text)]
    return _SPECIAL_TOKEN.sub("", text[unclosed.end() :]).strip() if unclosed else None


def option_letter(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """The option that a response to a multiple-choice question chooses, as a capital letter, or None.

    Read is the answer block (`extract_answer`); in a text without one, what is left after thoughts (`<reason>..`,
    `<think>..`) and special tokens are taken out. Recognised, in this order:

    1. the letter alone: `B`, `b`, `(B)`, `B.`, `**B**`, `\\boxed{B}`
    2. the full text of exactly one option (needs `options`)
    3. a statement: `Answer: B`, `Correct: B`, `The answer is B.`, `B is correct`
    4. the letter before its option: `B) text`, `(B) text`, `B. text`, `B: text`; `B text` if text is option B's
    5. a mention: `Option C: ..`, `I choose C`
    6. a first or last line that is a letter alone
    7. one line that contains the full text of exactly one option (needs `options`)

    Two different letters on the same footing (`A or B`, a list of all options) are no answer, nor is an article or
    any other stray capital (`A man walks in`).

    Args:
        text: a model's response.
        options: option letter -> option text, as asked. Without it the letters A to D count.
    """
    answer = extract_answer(text)
    if answer is None:
        # A template that opens the thought in the prompt leaves only its end in the response.
        after_thoughts = _THOUGHT_END.split(_THOUGHT.sub("", text))[-1]
        answer = _STRAY_CLOSE.sub("", _SPECIAL_TOKEN.sub("", after_thoughts))
    body = unicodedata.normalize("NFKC", answer).strip()
    body = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", body))
    for _ in range(2):  # \boxed{\text{B}}
        body = _LATEX.sub(r"\1", body)
    letters = "".join(options).upper() if options else DEFAULT_LETTERS
    options = {letter.upper(): option for letter, option in (options or {}).items()}
    if not body:
        return None
    return (
        _alone(body, letters)
        or _full_text(body, options)
        or _statement(body, letters)
        or _before_option(body, letters, options)
        or _mention(body, letters)
        or _own_line(body, letters)
        or _contained_text(body, options)
    )


def _one(found: set[str]) -> str | None:
    return found.pop() if len(found) == 1 else None


def _alone(body: str, letters: str) -> str | None:
    match = re.fullmatch(rf"{_WRAP}([{letters}]){_UNWRAP}", body, re.IGNORECASE)
    return match.group(1).upper() if match else None


def plain_text(text: str) -> str:
    """Lower case, words only, single spaces: what two spellings of one option have in common."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _full_text(body: str, options: Mapping[str, str]) -> str | None:
    return _one(
        {letter for letter, option in options.items() if plain_text(option) and plain_text(option) == plain_text(body)}
    )


def _contained_text(body: str, options: Mapping[str, str]) -> str | None:
    if "\n" in body:  # several lines are a discussion, in which options are also mentioned to be ruled out
        return None
    padded = f" {plain_text(body)} "
    return _one(
        {letter for letter, option in options.items() if plain_text(option) and f" {plain_text(option)} " in padded}
    )


def _alternative(letters: str) -> str:
    """Pattern of what makes a letter one of several: `or B`, `/B`, `, (B)`."""
    return rf"\W*?(?:\bor\b|\band\b|/|,|&)\s*(?:option\s+)?\(?[{letters}](?![\w'])"


def _letters_after(cue: str, body: str, letters: str, article_is_letter: bool = False) -> set[str]:
    """Letters that stand behind the pattern `cue`; "?" for one of several.

    A capital stands for an option before any word, except `A`, which is an article there unless `article_is_letter`;
    a small letter only before punctuation or the end.
    """
    sure = rf"[{letters}](?=[*_`\"')\]}}$]*\s*(?:$|[.,:;!)\]\n]))"
    capital = rf"(?-i:[{letters}](?![\w'])" + ("" if article_is_letter else r"(?<!A)") + ")"
    explained = rf"(?-i:[{letters}])(?=\s+(?:because|since|as|is|or|and|/|&)\b)"
    pattern = rf"{cue}{_WRAP}({sure}|{capital}|{explained})"
    found = set()
    for match in re.finditer(pattern, body, re.IGNORECASE | re.MULTILINE):
        rest = body[match.end() :]
        if re.match(r"\W*(?:is|seems|looks)?\s*(?:not|wrong|incorrect|false|impossible)\b", rest, re.IGNORECASE):
            continue
        several = re.match(_alternative(letters), rest)
        found.add("?" if several else match.group(1).upper())
    return found


def _statement(body: str, letters: str) -> str | None:
    what = r"(?:answer|correct\s+(?:answer|option|choice)|right\s+(?:answer|option|choice)|correct)"
    # Counted, not starred: neighbouring stars over the same characters take cubic time on a long run of them.
    link = r"(?:\W{0,6}\b(?:is|would\s+be|should\s+be|must\s+be)\b\s*:?|\W{0,6}[:=]|\s+-)"
    noun = r"\W{0,6}(?:(?:the\s+)?(?:option|choice|letter)\b\s*:?)?"
    found = _letters_after(rf"\b{what}{link}{noun}", body, letters)
    right = rf"(?<![\w'])([{letters}])[)\"'*\]]*\s+is\s+(?:the\s+)?(?:correct|right|answer)\b"
    found |= {match.group(1) for match in re.finditer(right, body)}
    return _known(found)


def _mention(body: str, letters: str) -> str | None:
    cue = r"\b(?:options?|choices?|choose|select|pick|go\s+with)\s*:?\s+(?:option\s+|choice\s+)?"
    return _known(_letters_after(cue, body, letters, article_is_letter=True))


def _known(found: set[str]) -> str | None:
    letter = _one(found)
    return None if letter == "?" else letter


def _before_option(body: str, letters: str, options: Mapping[str, str]) -> str | None:
    match = re.match(rf"{_WRAP}([{letters}])(?:[*_`\"']*[).:\]][*_`\"']*\s*|\s+[-–—]\s+)(?=\S)", body, re.IGNORECASE)
    if match:
        letter, rest = match.group(1).upper(), body[match.end() :]
        others = letters.replace(letter, "")
        listed = others and re.search(rf"^{_WRAP}[{others}][).:\]]", rest, re.MULTILINE)
        joined = others and re.search(rf"(?:\bor\b|\band\b|/|,|&)\s*\(?[{others}](?![\w'])", rest)
        if plain_text(rest) == plain_text(options.get(letter, "")) != "":
            return letter
        return None if listed or joined else letter
    bare = re.match(rf"{_WRAP}([{letters}])[*_`\"')]*\s+(.+)", body, re.DOTALL)
    if bare and plain_text(bare.group(2)) == plain_text(options.get(bare.group(1), "")) != "":
        return bare.group(1)
    return None


def _own_line(body: str, letters: str) -> str | None:
    lines = [line for line in body.splitlines() if line.strip()]
    return _one({letter for line in (lines[0], lines[-1]) if (letter := _alone(line, letters))})
