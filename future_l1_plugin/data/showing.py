"""How a question shows pictures and videos, said once for SFT, RL, evaluation, curation and chat.

A conversation has places for media, in the order in which the model sees them; the pixels go beside it. No model is
needed; where frames are the same, two callers show the model the same numbers.
"""

import os
import re
import threading
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageFile
from torch import Tensor

from future_l1_plugin.data.frame_choice import pool_indices
from future_l1_plugin.data.frames import VideoFrames
from future_l1_plugin.errors import DataError

_FLAG = threading.Lock()  # PIL's flag is the process', and prompts are encoded in several threads
_QUESTION_FRAME = re.compile(r"(?:frame_\d+\s*)?<image>\n?")


# ---- the conversation -----------------------------------------------------------------------------------------------


def question_text(question: str, media: str) -> str:
    """A record's question as the model reads it: shown as a video, its frames have no place in the text."""
    return _QUESTION_FRAME.sub("", question) if media == "video" else question


def user_content(question: str, media: str, images: int) -> list[dict[str, str]]:
    """The user turn: text with images where `<image>` stands; without placeholders, and for a video, media come first.

    Args:
        question: text (`question_text`).
        media: "images" or "video".
        images: how many images there are; as many as placeholders, if there are any.
    """
    if media == "video":
        return [{"type": "video"}, {"type": "text", "text": question}]
    if "<image>" not in question:
        return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    first, *rest = question.split("<image>")
    content = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


# ---- the pixels -----------------------------------------------------------------------------------------------------


def question_video(clip: VideoFrames, hold: int = 2) -> tuple[Any, Any]:
    """The question frames as a clip of their own: (uint8 (N * hold, H, W, 3), VideoMetadata).

    Each frame is held for `hold` frames (the model's temporal patch), so that it becomes one temporal patch, as a still
    image does. Frames are spaced as the frame pool is, whatever lies between them: a cut is a jump.
    """
    metadata = clip.metadata()
    pool = pool_indices(clip.total)
    metadata.fps = clip.fps * hold / max(1, pool[1] - pool[0])
    frames = clip.frames.repeat(hold, axis=0)
    metadata.frames_indices = list(range(len(frames)))
    metadata.total_num_frames = len(frames)
    return frames, metadata


def processor_media(
    images: Sequence[Any] = (),
    videos: Sequence[tuple[Any, Any]] = (),
    image_size: dict[str, int] | None = None,
    video_size: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The media arguments of a call of the processor: the one way in which SFT, RL and evaluation show pictures.

    Args:
        images: RGB pictures, PIL or uint8 (H, W, 3).
        videos: (frames, VideoMetadata) pairs; frames uint8 (N, H, W, 3), none of which is left out.
        image_size, video_size: {"shortest_edge": .., "longest_edge": ..} in pixels of area. None: the processor's.
    """
    media: dict[str, Any] = {}
    if images:
        media["images"] = list(images)
        media["images_kwargs"] = {} if image_size is None else {"size": image_size}
    if videos:
        frames, metadata = zip(*videos, strict=True)
        media["videos"] = list(frames)
        media["videos_kwargs"] = {"video_metadata": list(metadata), "do_sample_frames": False}
        media["videos_kwargs"] |= {} if video_size is None else {"size": video_size}
    return media


def read_picture(picture: Image.Image | str | os.PathLike) -> Image.Image:
    """A picture, in memory or in a file, as RGB; whole or not at all. Raises DataError for a file that is none."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with _FLAG:
        # Other packages (lmms-eval is one) set this flag for the whole process; half a picture is then grey below.
        truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            with Image.open(picture) as file:
                return file.convert("RGB")
        except (OSError, SyntaxError) as error:  # missing, a folder, cut off; PIL says SyntaxError of a broken PNG
            raise DataError(f"{picture}: expected a whole picture: {error}. Check the path or the file.") from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def encode(
    processor: Any, messages: Sequence[dict[str, Any]], media: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """What the processor makes of one conversation, up to the header of the answer.

    Args:
        messages: turns of the chat template, whose content is a list of {"type": "text", "text": ..} and places for
            media, {"type": "video"} or {"type": "image"}.
        media: from `processor_media`, as many as there are places.

    Returns:
        its tensors, batch dimension 1: input_ids, attention_mask, mm_token_type_ids Long (1, P); pixel values and
        grids.

    Raises DataError: the processor refuses the media (smaller than a patch, or of an extreme aspect ratio).
    """
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    try:
        encoded = processor(text=[text], return_tensors="pt", **(media or {}))
    except ValueError as error:
        raise DataError(f"the processor refuses its images or videos: {error}") from error
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
