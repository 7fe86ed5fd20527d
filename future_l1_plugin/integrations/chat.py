"""`future-l1 generate`: ask a latent checkpoint about images or a video and watch it think."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, TextIO

import torch
from torch import Tensor

from future_l1_plugin.data.frame_choice import Evenly
from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.data.showing import encode, processor_media, read_picture
from future_l1_plugin.latent.tokens import LatentTokens
from future_l1_plugin.model import load
from future_l1_plugin.model.engine import Answer, Decoding, Request, TransformersEngine


class SpanStreamer:
    """Prints one row's text as it comes; a latent span shows as `[latent x4]` once it is closed."""

    def __init__(self, tokenizer: Any, tokens: LatentTokens, out: TextIO) -> None:
        self._tokenizer, self._tokens, self._out = tokenizer, tokens, out
        self._ids: list[int] = []
        self._printed = ""
        self._length: int | None = None  # latents of the open span

    def __call__(self, ids: Tensor, latent: Tensor) -> None:
        token = int(ids[0])
        if token == self._tokens.start:
            self._flush()
            self._length = 0
        elif token == self._tokens.latent:
            self._length += 1
        elif token == self._tokens.end:
            self._close()
        elif token not in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                self._write(text[len(self._printed) :])
                self._printed = text

    def finish(self) -> None:
        if self._length is not None:
            self._close(" (cut off)")
        self._flush()
        self._write("\n")

    def _flush(self) -> None:
        """Show half of a character, too, whose rest will not come."""
        self._write(self._tokenizer.decode(self._ids)[len(self._printed) :])
        self._ids, self._printed = [], ""

    def _close(self, note: str = "") -> None:
        self._write(f"[latent x{self._length}{note}]")
        self._length = None

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def answer(
    model_path: str,
    question: str,
    images: Sequence[str] = (),
    video: str | None = None,
    num_frames: int = 32,
    device: str | None = None,
    policy: Any = "deterministic",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    out: TextIO | None = None,
) -> Answer:
    """Load the checkpoint, show it the media, stream its answer to `out` (default: standard output).

    Raises CheckpointError for a checkpoint without latent tokens, DataError for media that cannot be read.
    """
    clip = None if video is None else read_frames(video, frames=Evenly(num_frames))
    pictures = [read_picture(path) for path in images]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(
        partial(load, model_path, device=device), lambda requests: {"policy": policy, "on_token": streamer}
    )
    processor, tokens = engine.processor, LatentTokens.from_config(engine.model.config)
    streamer = SpanStreamer(processor.tokenizer, tokens, out or sys.stdout)
    content = [{"type": "video"}] if clip else []
    content += [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    media = processor_media(pictures, [(clip.frames, clip.metadata())] if clip else [])
    inputs = encode(processor, [{"role": "user", "content": content}], media)
    asked = [Request(question, inputs, Decoding(max_new_tokens, temperature), seed)]
    ((_, found),) = next(engine.answers([asked], list))
    streamer.finish()
    return found
