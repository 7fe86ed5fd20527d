"""TwiFF records: one question about a clip, with thoughts and future frames on the way to the answer.

Three spellings are read into one `TwiffRecord`:

| spelling         | question              | reasoning                       | frames: question, future   |
|------------------|-----------------------|---------------------------------|----------------------------|
| Future-L1-50K    | `conversations` human | `conversations` gpt, `<image>`  | `image`, `reasoning_image` |
| TwiFF interleave | `conversations` human | `conversations` gpt, `<rimage>` | `frames`, `recon_frames`   |
| TwiFF-2.7M, raw  | `question`            | `answer`, `<rimage>`, `<ans>`   | `question_images_index`,   |
|                  |                       |                                 | `reasoning_images_index`   |

Frames are pool numbers, 1..8 (`frame_choice`). No file of rows (`record_files`) and no video is opened here.

Rules that the spellings leave open:

* Every `<image>` of the question stands for one number of `image`, in order. A question without any placeholder gets
  its frames in front. Any other difference between the two counts is an error, and any difference in the reasoning.
* The answer is the `answer` field. Where that holds the whole response (raw spelling) or is missing, it is the content
  of the last closed `<answer>` or `<ans>` in the response. Such blocks never stay in the reasoning.
* `THOUGHT n:` is dropped wherever it stands. A `system` turn is ignored: the system prompt belongs to the model. A
  second human or gpt turn is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from future_l1_plugin.data.frame_choice import POOL_SIZE
from future_l1_plugin.data.sources import RowFault, named_fields
from future_l1_plugin.errors import DataError

IMAGE = "<image>"
#: What a question may not spell, and what an answer or a thought may not. The latent tokens are those of `latent`,
#: written out because that package loads torch; a test holds them equal.
MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CONTROL_TOKENS = (
    *MEDIA_TOKENS,
    *("<|latent|>", "<|latent_start|>", "<|latent_end|>"),
    *("<|im_start|>", "<|im_end|>"),
)
_PLACEHOLDER = re.compile(r"(<r?image>)")
_THOUGHT = re.compile(r"THOUGHT\s*\d+\s*:\s*")
_ANSWER = re.compile(r"<(answer|ans)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Text:
    """A thought in words."""

    text: str


@dataclass(frozen=True)
class Frame:
    """A future frame that the reasoning looks at: its pool number, 1..8. Becomes one latent span in SFT."""

    number: int


class BadRecordError(DataError):
    """One record that cannot be used. `source`, `id` and `reason` are the parts of the message.

    `kind` sorts it for counting: "not_json", "record" (fields missing or of the wrong type), "turns" (not one human and
    one gpt turn), "frames" (numbers outside the pool, or not as many as placeholders), "answer" (empty),
    "duplicate_id".
    """

    def __init__(self, source: str, id: str, reason: str, kind: str = "record"):
        super().__init__(f"{source} (id {id}): {reason}")
        self.source, self.id, self.reason, self.kind = source, id, reason, kind


@dataclass(frozen=True)
class TwiffRecord:
    """One record.

    Attributes:
        id: unique over all files that are read together.
        video: path of the clip.
        question: text in which each `<image>` stands for the frame of `image` at that place.
        image: pool numbers 1..8 of the question's frames.
        reasoning: thoughts and future frames, in order.
        answer: the final answer alone.
        extras: every other field of the row, as it came (`gain`, `correct_in_8_base`, `meta_data`, `cot`, ...).
    """

    id: str
    video: str
    question: str
    image: list[int]
    reasoning: tuple[Text | Frame, ...]
    answer: str
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def reasoning_image(self) -> list[int]:
        """Pool numbers of the future frames, in the order of the reasoning."""
        return [part.number for part in self.reasoning if isinstance(part, Frame)]

    @classmethod
    def from_dict(
        cls,
        d: Mapping[str, Any],
        video_root: str | os.PathLike | None = None,
        source: str = "record",
        unnamed: str | None = None,
    ) -> TwiffRecord:
        """Read a row in any of the three spellings.

        Args:
            d: the row.
            video_root: folder that a relative `video` is joined to; None leaves the path as it is.
            source: where the row stands ("folder/file:line"), for messages.
            unnamed: id of a row without one; None: the last part of `source`, "file:line".

        Raises:
            BadRecordError (a DataError): naming source, id, what is wrong and what to do.
        """
        id = "-"
        try:
            row = named_fields(d)
            id = str(row.pop("id", "")) or unnamed or Path(source).name
            return cls(id=id, **_parts(row, video_root))
        except RowFault as fault:
            raise BadRecordError(source, id, str(fault), fault.kind) from fault

    def to_dict(self, video_root: str | os.PathLike | None = None) -> dict[str, Any]:
        """The record as a Future-L1-50K row. `from_dict` reads back an equal record.

        With `video_root`, `video` is written relative to it. Raises DataError for text that would read back as
        something else (a placeholder or answer tag within a thought, two thoughts in a row).
        """
        gpt = "".join(f"{part.text}\n" if isinstance(part, Text) else f"{IMAGE}\n" for part in self.reasoning)
        row = {
            "id": self.id,
            "conversations": [{"from": "human", "value": self.question}, {"from": "gpt", "value": gpt}],
            "video": self.video if video_root is None else os.path.relpath(self.video, video_root),
            "image": list(self.image),
            "reasoning_image": self.reasoning_image,
            "answer": self.answer,
            **self.extras,
        }
        again = TwiffRecord.from_dict({**row, "video": self.video})
        if again != self:
            name = next(name for name in vars(self) if getattr(self, name) != getattr(again, name))
            raise DataError(
                f"record {self.id}: `{name}` would read back as {getattr(again, name)!r}, not as "
                f"{getattr(self, name)!r}. Take placeholders, answer tags and `THOUGHT n:` out of the text, join "
                "thoughts that follow one another, and leave record fields out of `extras`."
            )
        return row


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a row
# ---------------------------------------------------------------------------------------------------------------------


def _parts(row: dict[str, Any], video_root: str | os.PathLike | None) -> dict[str, Any]:
    """The attributes of a record but its id; takes them out of `row`. Raises RowFault."""
    video = row.pop("video", None)
    if not isinstance(video, str) or not video.strip():
        raise RowFault("`video` is missing. Give the path of the clip, relative to the video root.")
    if video_root is not None:
        video = os.path.join(os.fspath(video_root), video)

    if "conversations" in row:
        question, response = _turns(row.pop("conversations"))
        answer = row.pop("answer", None)
    else:
        question, response = row.pop("question", None), row.pop("answer", None)
        if not isinstance(question, str):
            raise RowFault("no human turn: neither `conversations` nor `question` is there. Add one of them.", "turns")
        if not isinstance(response, str):
            raise RowFault("no gpt turn: neither `conversations` nor `answer` is there. Add one of them.", "turns")
        answer = None

    image = _numbers(row, ("image", "frames", "question_images_index"))
    future = _numbers(row, ("reasoning_image", "recon_frames", "reasoning_images_index"))
    return {
        "video": video,
        "question": _place_images(question, image),
        "image": image,
        "reasoning": _parse_reasoning(response, future),
        "answer": _final_answer(answer, response),
        "extras": row,
    }


def _turns(conversations: Any) -> tuple[str, str]:
    """The one human and the one gpt text. Accepts a list of turns, or `datasets`' dict of two columns."""
    if isinstance(conversations, Mapping):
        roles, values = conversations.get("from") or [], conversations.get("value") or []
        if len(roles) != len(values):
            raise RowFault(
                f"`conversations` holds {len(roles)} roles and {len(values)} texts. Write the row again.", "turns"
            )
        conversations = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise RowFault(
            f"`conversations` is {type(conversations).__name__}, expected a list of {{from, value}}.", "turns"
        )
    texts: dict[str, list[str]] = {"human": [], "gpt": [], "system": []}
    for turn in conversations:
        role = turn.get("from") if isinstance(turn, Mapping) else None
        if role not in texts:
            raise RowFault(
                f"a turn of `conversations` comes from {role!r}, expected human or gpt. Correct `from`.", "turns"
            )
        if not isinstance(turn.get("value"), str):
            raise RowFault(f"the {role} turn has no text in `value`. Add it.", "turns")
        texts[role].append(turn["value"])
    for role in ("human", "gpt"):
        if not texts[role]:
            raise RowFault(f"no {role} turn in `conversations`. Add one, or drop the record.", "turns")
        if len(texts[role]) > 1:
            raise RowFault(
                f"{len(texts[role])} {role} turns, expected one. Split the record into one per question.", "turns"
            )
    return texts["human"][0], texts["gpt"][0]


def _numbers(row: dict[str, Any], names: tuple[str, ...]) -> list[int]:
    """Take the one of `names` that is there out of the row and check it."""
    present = [name for name in names if name in row]
    if len(present) > 1:
        raise RowFault(f"both `{present[0]}` and `{present[1]}` are there and mean the same. Keep one.", "frames")
    if not present:
        return []
    value = row.pop(present[0])
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault(f"`{present[0]}` is {value!r}, expected a list of frame numbers 1..{POOL_SIZE}.", "frames")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= POOL_SIZE:
            raise RowFault(
                f"`{present[0]}` holds {number!r}; frame numbers are whole and within 1..{POOL_SIZE} (they count the "
                "frames of the pool, not of the video). Correct it.",
                "frames",
            )
    return list(value)


def _place_images(question: str, image: list[int]) -> str:
    if not _PLACEHOLDER.sub("", question).strip():
        raise RowFault("the question is empty. Add its text.")
    found = question.count(IMAGE)
    if found == 0:
        return f"{IMAGE}\n" * len(image) + question
    if found != len(image):
        raise RowFault(
            f"the question has {found} `{IMAGE}` and `image` has {len(image)} frames. Make them equal, or remove every "
            f"`{IMAGE}` from the question to put the frames in front.",
            "frames",
        )
    return question


def _parse_reasoning(response: str, future: list[int]) -> tuple[Text | Frame, ...]:
    pieces = _PLACEHOLDER.split(_ANSWER.sub("", response))
    found = len(pieces) // 2  # the split keeps the placeholders: text, placeholder, text, ..., text
    if found != len(future):
        raise RowFault(
            f"the response has {found} image placeholders and `reasoning_image` has {len(future)} frames. Make them "
            "equal: one placeholder for each future frame.",
            "frames",
        )
    parts: list[Text | Frame] = []
    frames = iter(future)
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append(Frame(next(frames)))
        elif text := _THOUGHT.sub("", piece).strip():
            parts.append(Text(text))
    return tuple(parts)


def _final_answer(answer: Any, response: str) -> str:
    if answer is not None and not isinstance(answer, str):
        raise RowFault(f"`answer` is {answer!r}, expected text. Put it in quotes.", "answer")
    blocks = _ANSWER.findall(answer or response)
    text = blocks[-1][1] if blocks else (answer or "")
    if not text.strip():
        raise RowFault(
            "the answer is empty. Fill `answer`, or close an <answer> (or <ans>) block in the response.", "answer"
        )
    return text.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Words that the model reads as control tokens
# ---------------------------------------------------------------------------------------------------------------------


def token_fault(what: str, text: str, reserved: Sequence[str]) -> str | None:
    """Says that `text` (named `what`) spells one of the `reserved` tokens; None if it does not."""
    if found := [token for token in reserved if token in text]:
        return f"{what} spells {found[0]}, which the model reads as a control token. Take it out of the text."
    return None


def text_fault(record: TwiffRecord) -> str | None:
    """What is wrong with the record's words for the model: tokens that would be taken for media, spans or turns.

    A question may spell the latent markers and turn headers (spans and labels are looked for behind the prompt), but
    not the media tokens, each of which the processor takes for a picture.
    """
    parts = [("the question", record.question, MEDIA_TOKENS), ("the answer", record.answer, CONTROL_TOKENS)]
    parts += [("a thought", part.text, CONTROL_TOKENS) for part in record.reasoning if isinstance(part, Text)]
    faults = (token_fault(*part) for part in parts)
    return next((fault for fault in faults if fault), None)
