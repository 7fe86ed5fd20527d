"""From the messages of a request to model inputs, and to what identifies them."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.protocol import ChatMessages
from PIL import Image

from future_l1_plugin.data.frame_choice import FrameChoice
from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.data.showing import encode, processor_media, read_picture
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.journal import file_mark


@dataclass(frozen=True)
class InputBuilder:
    """Runs the processor over messages with text, images (in memory or paths) and videos (paths).

    Attributes:
        frames: which of a video are shown.
        min_pixels, max_pixels: bounds for an image and for a frame of a video (an odd number T of frames may take
            (T + 1) / T of max_pixels each). None: the processor's settings, which bound all frames of a video together.
    """

    processor: Any
    frames: FrameChoice
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __call__(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the processor returns, with a batch dimension of 1.

        Raises:
            DataError: a video or an image that cannot be read, or that the processor refuses.
            ConfigError: audio, or a video that is not given by its path.
        """
        chat = ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if audios:
            raise ConfigError("the request has audio, which Qwen3-VL does not take")
        clips = [read_frames(_path(video), frames=self.frames) for video in videos]
        media = processor_media(
            images=[read_picture(image) for image in images],
            videos=[(clip.frames, clip.metadata()) for clip in clips],
            image_size=self._size(self.processor.image_processor, 1, 1),
            video_size=self._video_size([len(clip.frames) for clip in clips]) if clips else None,
        )
        return encode(self.processor, chat.to_hf_messages(), media)

    def _video_size(self, frames: list[int]) -> dict[str, int]:
        # The processor bounds the pixels of all frames together. It counts a repeated last frame (an odd number is made
        # even) when it asks whether a clip is too large or too small, and leaves it out of the factor to resize by.
        video = self.processor.video_processor
        padded = [-(-n // video.temporal_patch_size) * video.temporal_patch_size for n in frames]
        return self._size(video, min(frames), max(padded))

    def _size(self, processor: Any, least_frames: int, most_frames: int) -> dict[str, int]:
        least, most = self.min_pixels, self.max_pixels
        return {
            "shortest_edge": processor.size["shortest_edge"] if least is None else least * least_frames,
            "longest_edge": processor.size["longest_edge"] if most is None else most * most_frames,
        }


def described(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages as JSON values for a key: files by `file_mark`, pictures in memory by their pixels."""
    parts = []
    for message in messages:
        for part in message["content"]:
            media = part.get("url")
            if isinstance(media, Image.Image):
                media = [media.mode, media.size, hashlib.sha256(media.tobytes()).hexdigest()]
            elif isinstance(media, str):
                media = file_mark(media)
            elif media is not None:
                media = repr(media)
            parts.append([message["role"], part["type"], part.get("text"), media])
    return parts


def _path(video: Any) -> str:
    if not isinstance(video, str):
        raise ConfigError(
            f"future_l1 takes a video as the path of its file, found {type(video).__name__}: {video!r:.200}"
        )
    return video
