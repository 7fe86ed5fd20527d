"""How many tokens per prompt will have, from what its files declare: no pixel is decoded.

A clip that is too long for the run is then found when data are loaded, in seconds, and not hours later by the rollout.
What a file declares can be wrong, so whoever encodes a prompt checks again.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import av
from PIL import Image
from tqdm import tqdm

from future_l1_plugin.data.container import check_file
from future_l1_plugin.data.frame_choice import POOL_SIZE, Pool, pool_indices
from future_l1_plugin.data.prompt import RlPrompt, chat_messages
from future_l1_plugin.data.record_files import BadRecord
from future_l1_plugin.data.rl import Prompts, bad_prompts_error
from future_l1_plugin.errors import DataError
from future_l1_plugin.model.backbone import by_processor

_THREADS = 8
_SHOW_PROGRESS_FROM = 2000


@dataclass(frozen=True)
class ClipHeader:
    """What a video file says of itself: frames in it, pixels, frames per second."""

    total: int
    height: int
    width: int
    fps: float


def clip_header(path: str | os.PathLike, unknown_total: int = 1) -> ClipHeader:
    """Read the header of a video file.

    Args:
        unknown_total: frames to assume where the file gives neither their number nor its duration.

    Raises:
        DataError: no such file, a damaged one, or one without a video stream.
    """
    check_file(path)
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream. A video file was expected.")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 24)
            seconds = container.duration / av.time_base if container.duration else 0.0
            total = stream.frames or round(seconds * fps) or unknown_total
            return ClipHeader(total, stream.height, stream.width, fps)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be opened as a video ({error}). Download or convert it again.") from error


def prompt_length(prompt: RlPrompt, processor: Any) -> int:
    """Tokens of `encode_prompt(prompt, processor)`, from headers.

    Exact where the files' headers are; with a wrong frame rate a timestamp may have a digit more or less.

    Raises DataError: a file that cannot be opened, or that the processor refuses. Names the prompt.
    """
    try:
        return _length(prompt, processor)
    except DataError as error:
        raise DataError(f"prompt {prompt.id}: {error}") from error


def _length(prompt: RlPrompt, processor: Any) -> int:
    try:
        pictures, clip = _shown(prompt, processor)
    except DataError:
        raise
    except ValueError as error:  # smaller than a patch, or an extreme aspect ratio
        raise DataError(f"the processor refuses its images or video: {error}") from error
    text = processor.apply_chat_template(chat_messages(prompt), tokenize=False, add_generation_prompt=True)
    more = sum(tokens - 1 for tokens in pictures)  # the template has one placeholder for a picture
    if clip is not None:
        times, tokens = clip
        family = by_processor(processor)
        text = text.replace(family.video_token, family.spelled_video(times), 1)
        more += (tokens - 1) * len(times)
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + more


def check_lengths(
    prompts: Prompts, processor: Any, most: int, on_bad: Literal["raise", "skip"], hint: str = ""
) -> Prompts:
    """Prompts of at most `most` tokens; the others are bad, as rows are in `load_prompts`.

    Args:
        hint: what to do about a prompt that is too long, in whole sentences.

    Raises:
        DataError: with "raise", one error for all bad prompts; with "skip", if none is left.
    """
    bad: list[BadRecord] = []
    with ThreadPoolExecutor(_THREADS) as pool:  # headers are read from disk
        found = pool.map(partial(_length_or_fault, processor=processor), prompts)
        bar = tqdm(found, "prompt lengths", len(prompts), disable=len(prompts) < _SHOW_PROGRESS_FROM)
        good = [prompt for prompt, length in zip(prompts, bar, strict=True) if _fits(prompt, length, most, hint, bad)]
    if bad and (on_bad == "raise" or not good):
        raise bad_prompts_error(bad, len(prompts), len(good))
    return Prompts(good, [*prompts.bad, *bad])


def too_long(length: int, most: int, hint: str) -> str:
    """The one sentence about a prompt that is too long."""
    return f"{length:,} tokens, data.max_prompt_length is {most:,}. {hint}".rstrip()


def _fits(prompt: RlPrompt, found: int | DataError, most: int, hint: str, bad: list[BadRecord]) -> bool:
    if isinstance(found, int) and found <= most:
        return True
    reason = too_long(found, most, hint) if isinstance(found, int) else str(found)
    bad.append(BadRecord(prompt.source, prompt.id, reason))
    return False


def _length_or_fault(prompt: RlPrompt, processor: Any) -> int | DataError:
    try:
        return _length(prompt, processor)
    except DataError as error:
        return error


def _shown(prompt: RlPrompt, processor: Any) -> tuple[list[int], tuple[list[float], int] | None]:
    """Tokens of each picture, and of a video the time of each temporal patch, in seconds, and its tokens."""
    if prompt.media == "none":
        return [], None
    if prompt.images:
        return [picture_tokens(processor, *_picture_size(path)) for path in prompt.images], None
    of_pool = isinstance(prompt.frames, Pool)
    header = clip_header(prompt.video, POOL_SIZE if of_pool else prompt.frames.most or POOL_SIZE)
    if prompt.media == "images":
        return [picture_tokens(processor, header.height, header.width)] * prompt.frames.most, None
    hold = processor.video_processor.temporal_patch_size
    if of_pool:  # as `question_video` shows them
        pool = pool_indices(header.total)
        indices, fps = list(range(prompt.frames.most * hold)), header.fps * hold / max(1, pool[1] - pool[0])
    else:
        indices, fps = prompt.frames.indices(header.total), header.fps
    family = by_processor(processor)
    tokens = family.video_tokens(processor, len(indices), header.height, header.width)
    return [], (family.video_times(processor, list(indices), fps), tokens)


def _picture_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError) as error:  # PIL says SyntaxError of a broken PNG
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def picture_tokens(processor: Any, height: int, width: int, size: dict[str, int] | None = None) -> int:
    """Tokens of a picture by the image processor's rule. size: its bounds in pixels of area, as `processor_media`'s.

    Raises ValueError for what the processor refuses: an extreme aspect ratio.
    """
    bounds = {} if size is None else {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    patches = processor.image_processor.get_number_of_image_patches(height, width, bounds)
    return patches // processor.image_processor.merge_size**2
