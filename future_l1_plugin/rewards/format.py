"""Whether a response keeps to the grammar of interleaved reasoning: 1 or 0.

    L = <|latent_start|> <|latent|>* <|latent_end|>      R = <reason>..</reason>      A = <answer>..</answer>

Reason and answer hold some text and no tag. White space may stand between all parts (decoders put some between special
tokens), end-of-text tokens after the last; nothing else may stand outside of the parts. Tags count only as spelled
above; anything that reads as a tag in another spelling (`<Answer>`, `</ reason>`) is a fault, for the parser of answers
would take it for one.

The response is first cut into tags and text in one pass, then its shape, one letter a piece, is matched. So no pattern
ever runs over the text itself, and a rambling response takes time in proportion to its length.
"""

import re

from future_l1_plugin.errors import RewardError

#: One letter for each piece; x for text, ? for a tag or special token that has no place in a response.
_LETTERS = {
    "<|latent_start|>": "s",
    "<|latent|>": "z",
    "<|latent_end|>": "e",
    "<reason>": "r",
    "</reason>": "R",
    "<answer>": "a",
    "</answer>": "A",
    "<|im_end|>": "i",
    "<|endoftext|>": "i",
}
_TAG = re.compile(r"(<\|\w+\|>|<\s*(?:/\s*)?(?:reason|answer)\s*>)", re.IGNORECASE)

_LATENT, _REASON, _END = "sz*e", "rxR", "axAi*"
_SHAPES = {
    "any": re.compile(rf"(?:{_REASON})?(?:{_LATENT}{_REASON})+{_END}"),
    "reason_first": re.compile(rf"{_REASON}(?:{_LATENT}{_REASON})+{_END}"),
    "text": re.compile(rf"(?:{_REASON})+{_END}"),
}


def format_reward(text: str, mode: str = "any") -> float:
    """1.0 if the whole response has the shape that the mode asks for, else 0.0.

    Args:
        text: the response, special tokens kept.
        mode: "any": latent-first `(L R)+ A` or reason-first `R (L R)+ A` (Future-L1, format reward), at least one span;
            "reason_first": the second only; "text": `R+ A` without a span, for the text-only ablation.

    Raises:
        RewardError: another mode.
    """
    check_mode(mode)
    pieces = []
    for piece in _TAG.split(text):
        if _TAG.fullmatch(piece):
            pieces.append(_LETTERS.get(piece, "?"))
        elif piece and not piece.isspace():
            pieces.append("x")
    return float(_SHAPES[mode].fullmatch("".join(pieces)) is not None)


def check_mode(mode: str) -> None:
    """Raises RewardError unless `format_reward` knows the mode."""
    if mode not in _SHAPES:
        raise RewardError(f"mode: expected one of {', '.join(_SHAPES)}, found {mode!r}")
