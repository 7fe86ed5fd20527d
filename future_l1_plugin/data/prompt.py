"""One question as a model gets it: what it shows, what its answer is compared with, and its encoding."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

from future_l1_plugin.data.frame_cache import FrameCache
from future_l1_plugin.data.frame_choice import FrameChoice, Pool, from_json, to_json
from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.data.records import IMAGE, TwiffRecord
from future_l1_plugin.data.showing import (
    encode,
    processor_media,
    question_text,
    question_video,
    read_picture,
    user_content,
)
from future_l1_plugin.errors import DataError

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class RlPrompt:
    """One prompt.

    Attributes:
        id: unique over all files that were read together.
        question: the text that the model reads; with "images", each `<image>` in it is a place for one.
        media: "images" | "video" | "none".
        video: path of the clip whose frames are shown (as images or as a video); None without one.
        frames: which of its frames are shown: of the pool (TwiFF) or evenly spread (FutureBench); None without a clip.
        images: paths of the pictures shown (plain).
        ground_truth: the reference answer as it was written: an option's letter or its text, a number, a sentence.
        options: option letter -> option text of a multiple-choice question; else None.
        kind: "choice" | "maths" | "text": how an answer is compared. "choice" has options, and the ground truth names
            one of them (`rewards.answer.option_letter` tells which).
        source: name for metrics: "twiff", "futurebench/hop1" .., "plain/NAME_OF_FILE".
    """

    id: str
    question: str
    media: Literal["images", "video", "none"]
    ground_truth: str
    source: str
    kind: Literal["choice", "maths", "text"] = "text"
    options: dict[str, str] | None = None
    video: str | None = None
    frames: FrameChoice | None = None
    images: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The prompt as JSON values. `from_dict` reads back an equal prompt."""
        row = asdict(self)
        return row | {"frames": None if self.frames is None else to_json(self.frames), "images": list(self.images)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "RlPrompt":
        """Raises DataError for fields that a prompt does not have, or lacks."""
        names = [item.name for item in fields(cls)]
        if set(row) != set(names):
            raise DataError(f"expected a prompt with the fields {', '.join(names)}; found {', '.join(map(str, row))}")
        row = dict(row)
        row["frames"] = None if row["frames"] is None else from_json(row["frames"])
        row["images"] = tuple(row["images"])
        return cls(**row)


def twiff_prompt(record: TwiffRecord, question_media: Literal["images", "video"], future: bool = False) -> RlPrompt:
    """A record's question, with the frames that it shows.

    Args:
        record: its answer is the ground truth; its reasoning is not used, but for
        future: True shows the frames of the reasoning as well, behind those of the question (curation by visual gain).
    """
    text = record.question
    if future and question_media == "images":
        *before, last = text.split(IMAGE)
        shown = "".join(f"\nframe_{number}\n{IMAGE}" for number in record.reasoning_image)
        text = f"{IMAGE.join(before)}{IMAGE}{shown}{last}" if before else shown.lstrip("\n") + "\n" + text
    question = question_text(text, question_media)
    options = listed_options(question)
    return RlPrompt(
        id=record.id,
        question=question,
        media=question_media,
        video=record.video,
        frames=Pool((*record.image, *(record.reasoning_image if future else ()))),
        ground_truth=record.answer,
        options=options,
        kind="choice" if options else "text",
        source="twiff",
    )


def listed_options(question: str) -> dict[str, str] | None:
    """Options that a question lists as lines `A. text`, `B. text`, .. (also `A) text`, `(A) text`, `A: text`).

    None unless the letters of all such lines are A, B, .. in this order, two or more.
    """
    lines = _OPTION_LINE.findall(question)
    letters = "".join(letter for letter, _ in lines)
    return dict(lines) if len(lines) >= 2 and letters == ALPHABET[: len(letters)] else None


def chat_messages(prompt: RlPrompt) -> list[dict[str, Any]]:
    """The conversation for a chat template: one user turn whose content is a list of {"type": "text", "text": ..} and
    places for media, {"type": "video"} or {"type": "image"}. No path and no pixel is in it."""
    if prompt.media == "none":
        return [{"role": "user", "content": [{"type": "text", "text": prompt.question}]}]
    images = len(prompt.images) if prompt.frames is None else prompt.frames.most
    return [{"role": "user", "content": user_content(prompt.question, prompt.media, images)}]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it.

    Attributes:
        inputs: what the processor returned, batch dimension 1 (`showing.encode`). In `input_ids` each image or frame is
            already as many pad tokens as it has vision features.
    """

    inputs: dict[str, Tensor]

    @property
    def prompt_ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    @property
    def media(self) -> dict[str, Tensor]:
        """Everything but the ids and their mask: pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw,
        mm_token_type_ids Long (1, P) and the like."""
        return {name: value for name, value in self.inputs.items() if name not in ("input_ids", "attention_mask")}


def encode_prompt(prompt: RlPrompt, processor: Any, cache: FrameCache | None = None) -> EncodedPrompt:
    """Decode what the prompt shows and run the processor.

    Args:
        processor: Qwen3-VL's, with the chat template of a latent checkpoint.
        cache: decoded frames kept in memory. None: every call decodes.

    Raises:
        DataError: a video or picture that cannot be read, or that the processor refuses. Names the prompt.
    """
    try:
        return EncodedPrompt(encode(processor, chat_messages(prompt), _media(prompt, processor, cache)))
    except DataError as error:
        raise DataError(f"prompt {prompt.id}: {error}") from error


def _media(prompt: RlPrompt, processor: Any, cache: FrameCache | None) -> dict[str, Any]:
    if prompt.media == "none":
        return {}
    if prompt.images:
        return processor_media(images=[read_picture(path) for path in prompt.images])
    read = read_frames if cache is None else cache.read
    clip = read(prompt.video, frames=prompt.frames)
    if prompt.media == "images":
        return processor_media(images=list(clip.frames))
    if isinstance(prompt.frames, Pool):
        return processor_media(videos=[question_video(clip, processor.video_processor.temporal_patch_size)])
    return processor_media(videos=[(clip.frames, clip.metadata())])
