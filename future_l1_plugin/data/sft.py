"""From TwiFF records to training batches for the latent SFT objective.

A record becomes one conversation. User: the question frames (as images or as one video) and the question. Assistant:
each thought as `<reason>thought</reason>`, each future frame as a latent span of k `<|latent|>` tokens, the answer as
`<answer>..</answer>`. k = (h/32) * (w/32) after an aspect-preserving resize to at most max_latent_token * 32 * 32
pixels (sides are multiples of 32), or `train_fixed_latent_budget` if that is set.

Cross-entropy labels: everything after the first assistant header, except padding and `<|latent|>`; the start and end
markers are learned, the latents in between are supervised by the latent loss. That a span goes on with a latent has no
label: `<|latent|>` is what decoding writes there whatever the model proposes, unless it proposes the end; that choice
is trained as such (`model.objective`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from future_l1_plugin.data.container import check_file
from future_l1_plugin.data.frame_cache import FrameCache
from future_l1_plugin.data.frame_choice import Pool
from future_l1_plugin.data.frames import VideoFrames
from future_l1_plugin.data.record_files import BadRecord, Records
from future_l1_plugin.data.records import Frame, TwiffRecord, text_fault
from future_l1_plugin.data.showing import processor_media, question_text, question_video, user_content
from future_l1_plugin.data.sources import listed
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.latent.tokens import END, LATENT, START
from future_l1_plugin.model.backbone import PICTURES, PIXEL_KEYS, by_processor
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.template import ASSISTANT_HEADER

IGNORED = -100  # label of positions without cross-entropy
_TURN = "<|im_start|>"
_NO_FRAMES = "its question has no frames (`image` is empty), and question_media=video shows them as a video"


def check_records(records: Records, on_bad: str = "raise", question_media: str = "images") -> Records:
    """Find records that cannot be trained on before anything is loaded; no video is decoded.

    Bad are: a video that is missing, empty or cut off, words that spell the model's control tokens, and a question
    without frames where they are shown as a video.

    Args:
        records: what `load_records` returned.
        on_bad: "raise" or "skip", as there.
        question_media: as in `SftCollator`.

    Raises:
        DataError: counts the bad records and lists the first ten; with "skip" only if no good one is left.
    """
    good, bad = [], []
    faults: dict[str, str | None] = {}  # of each video, asked once
    for record in records:
        if record.video not in faults:
            try:
                check_file(record.video)
                faults[record.video] = None
            except DataError as error:
                faults[record.video] = str(error)
        reason = faults[record.video] or text_fault(record)
        if not reason and question_media == "video" and not record.image:
            reason = _NO_FRAMES
        if reason:
            bad.append(BadRecord("record", record.id, reason))
        else:
            good.append(record)
    return without_bad(records, good, bad, on_bad)


def without_bad(records: Records, good: list[TwiffRecord], bad: list[BadRecord], on_bad: str) -> Records:
    """The good ones of `records`; raises as `check_records` does."""
    if bad and (on_bad == "raise" or not good):
        way_on = f" Fix them, or go on with the other {len(good):,} by `on_bad: skip`." if good else ""
        shown = listed([f"{item.id}: {item.reason}" for item in bad])
        raise DataError(f"{len(bad):,} of {len(records):,} records cannot be trained on.{way_on}{shown}")
    return Records(good, [*records.bad, *bad])


@dataclass(frozen=True)
class SftSample:
    """One decoded record. question_clip holds the question frames, future the reasoning frames in order.

    failed: records whose place this one takes, because they could not be decoded.
    """

    record: TwiffRecord
    question_clip: VideoFrames
    future: VideoFrames | None
    failed: tuple[BadRecord, ...] = ()


class RecordFailed(DataError):
    """A record that fails in the middle of a run. Where a data loader's process hands it on, its own words are kept."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class SftDataset(Dataset):
    """Decodes the frames of a record when it is asked for.

    Args:
        records: checked records (`load_records`).
        spans: False leaves the future frames out: the text-only control.
        cache_bytes: bound on decoded frames kept in memory, in each worker; 0 = none.
        fault: what else may be wrong with a decoded record (`RecordLengths.fault`): a sentence, or None.
        on_bad: what to do with a record that fails here, although it passed the check. "raise", or "skip": the next
            record stands in for it, which depends on the files alone, not on workers or on what came before.
        max_failed: so many may fail one after the other.

    Raises (on access) RecordFailed: names record, file and reason.
    """

    def __init__(
        self,
        records: list[TwiffRecord],
        spans: bool = True,
        cache_bytes: int = 0,
        fault: Callable[[SftSample], str | None] | None = None,
        on_bad: str = "raise",
        max_failed: int = 0,
    ) -> None:
        self.records, self.spans, self._cache = records, spans, FrameCache(cache_bytes)
        self._fault, self._on_bad, self._max_failed = fault, on_bad, max_failed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> SftSample:
        failed: list[BadRecord] = []
        if not -len(self) <= index < len(self):  # ends a loop over the dataset
            raise IndexError(f"record {index} of {len(self)}")
        while True:
            record = self.records[(index + len(failed)) % len(self)]
            try:
                sample = self._decoded(record)
                if reason := self._fault(sample) if self._fault else None:
                    raise DataError(f"record {record.id}: {record.video}: {reason}")
                return dataclasses.replace(sample, failed=tuple(failed)) if failed else sample
            except DataError as error:
                if self._on_bad == "raise":
                    raise RecordFailed(f"{error} Fix it, or go on without it by data.on_bad=skip.") from error
                failed.append(BadRecord("record", record.id, str(error)))
                if len(failed) > min(self._max_failed, len(self) - 1):
                    raise RecordFailed(too_many_failed(failed, self._max_failed)) from error

    def _decoded(self, record: TwiffRecord) -> SftSample:
        wanted = [*record.image, *(record.reasoning_image if self.spans else ())]
        if not wanted:
            clip = VideoFrames(np.empty((0, 0, 0, 3), np.uint8), [], 0.0, 0, record.video, "")
            return SftSample(record, clip, clip if self.spans else None)
        try:
            clip = self._cache.read(record.video, frames=Pool(tuple(wanted)))
        except DataError as error:
            raise DataError(f"record {record.id}: {error}") from error
        cut = len(record.image)
        return SftSample(record, _part(clip, slice(None, cut)), _part(clip, slice(cut, None)) if self.spans else None)


def too_many_failed(failed: Sequence[BadRecord], most: int) -> str:
    """The one error about records that fail in a run, beyond what the recipe allows: the last five of them."""
    shown = "".join(f"\n  {item.reason}" for item in failed[-5:])
    return (
        f"{len(failed)} records failed in this run, data.max_failed is {most}. Find them all with `future-l1 data "
        f"check`, or raise it:{shown}"
    )


def _part(clip: VideoFrames, which: slice) -> VideoFrames:
    return VideoFrames(clip.frames[which], clip.indices[which], clip.fps, clip.total, clip.path, clip.backend)


class SftCollator:
    """Turns samples into one right-padded batch; the processor runs once a batch.

    Args:
        question_media: "images" (the paper's) or "video": how the question frames are shown.
        spans: as in `SftDataset`.
        max_length: tokens; a longer sample is an error that names it, nothing is cut. `record_lengths` finds it before.

    Returns (on call): what the model takes (input_ids, attention_mask, mm_token_type_ids, pixel values and grids) and
        record_ids list of B texts; failed list of (id, reason), only where a record of the batch stands in for another;
        labels Long (B, T), -100 where there is no cross-entropy;
        response_start Long (B,), index of the first response token;
        latent_frames Long (B,): future frames in each row;
        latent_pixel_values, latent_grid_thw: the future frames of all rows, as the image processor returns them; where
        no row has any, one blank picture that belongs to none. Absent without spans;
        blank_pixel_values, blank_grid_thw: a blank picture, only where no row's question shows one.

    Blank pictures are there because ranks that gather weights as they go (ZeRO-3) must run the vision tower equally
    often, whatever their records hold; see `model.objective`.
    """

    def __init__(
        self,
        processor: Any,
        latent: LatentConfig,
        question_media: str = "images",
        spans: bool = True,
        max_length: int = 16384,
    ) -> None:
        if question_media not in ("images", "video"):
            raise ConfigError(f"question_media: expected images or video, found {question_media!r}")
        self.processor, self.latent, self.max_length = processor, latent, max_length
        self.question_media, self.spans = question_media, spans
        image = processor.image_processor
        self._side = image.patch_size * image.merge_size  # pixels a side that become one token
        self._blank = np.zeros((self._side, self._side, 3), np.uint8)
        self._header = processor.tokenizer(ASSISTANT_HEADER, add_special_tokens=False)["input_ids"]

    def __call__(self, samples: list[SftSample]) -> dict[str, Tensor]:
        frames = [frame for s in samples if s.future is not None for frame in s.future.frames]
        latents = self._latent_images(frames or [self._blank]) if self.spans else None
        lengths = iter(self._span_lengths(latents[PICTURES.grid]) if frames else ())
        texts, turns = zip(*(self._text(sample, lengths) for sample in samples), strict=True)
        media = self._media(samples)
        batch = self.processor(text=list(texts), padding=True, padding_side="right", return_tensors="pt", **media)
        batch = {key: value for key, value in batch.items() if key != "video_metadata"}
        ids = batch["input_ids"]
        if ids.shape[1] > self.max_length:
            row = int(batch["attention_mask"].sum(1).argmax())
            raise DataError(
                f"record {samples[row].record.id}: {ids.shape[1]} tokens, max_length is {self.max_length}. "
                "Raise max_length, or use fewer or smaller question frames."
            )
        batch["response_start"] = self._response_start(ids, turns)
        batch["labels"] = self._labels(ids, batch["attention_mask"], batch["response_start"])
        batch["latent_frames"] = torch.tensor([0 if s.future is None else len(s.future.frames) for s in samples])
        shown = {"latent": latents}
        if not any(key in batch for key in PIXEL_KEYS):
            shown["blank"] = self._latent_images([self._blank])
        for name, pictures in shown.items():
            if pictures:
                batch[f"{name}_pixel_values"] = pictures[PICTURES.pixels]
                batch[f"{name}_grid_thw"] = pictures[PICTURES.grid]
        batch["record_ids"] = [s.record.id for s in samples]
        if failed := [(bad.id, bad.reason) for s in samples for bad in s.failed]:
            batch["failed"] = failed
        return batch

    def _latent_images(self, frames: list[Any]) -> dict[str, Tensor]:
        area = self._side**2
        size = {"shortest_edge": area, "longest_edge": self.latent.max_latent_token * area}
        return self.processor.image_processor(images=frames, size=size, return_tensors="pt")

    def _span_lengths(self, grid: Tensor) -> list[int]:
        """Latents of each future frame."""
        if self.latent.train_fixed_latent_budget:
            return [self.latent.train_fixed_latent_budget] * len(grid)
        return (grid.prod(-1) // self.processor.image_processor.merge_size**2).tolist()

    def _text(self, sample: SftSample, lengths: Any) -> tuple[str, int]:
        """The conversation, and which `<|im_start|>` in it opens the response (a question may spell some, too)."""
        record = sample.record
        if fault := text_fault(record):
            raise DataError(f"record {record.id}: {fault}")
        prompt, response = conversation(self.processor, record, self.question_media, self.spans, lengths)
        return prompt + response, prompt.count(_TURN)

    def _media(self, samples: list[SftSample]) -> dict[str, Any]:
        if self.question_media == "images":
            return processor_media([frame for s in samples for frame in s.question_clip.frames])
        if silent := [s.record.id for s in samples if not s.record.image]:
            raise DataError(f"record {silent[0]}: {_NO_FRAMES}. `check_records` leaves such records out")
        hold = self.processor.video_processor.temporal_patch_size
        return processor_media(videos=[question_video(s.question_clip, hold) for s in samples])

    def _response_start(self, ids: Tensor, turns: Sequence[int]) -> Tensor:
        # The token, not the whole header: what is spelled right behind a header may change how its newline is encoded.
        opens = (ids == self._header[0]).cumsum(1) == torch.tensor(turns)[:, None]  # from the response's header on
        return opens.int().argmax(1) + len(self._header)

    def _labels(self, ids: Tensor, attention: Tensor, start: Tensor) -> Tensor:
        response = torch.arange(ids.shape[1]) >= start[:, None]
        learned = response & attention.bool() & (ids != self.latent.latent_id)
        return ids.masked_fill(~learned, IGNORED)


def conversation(
    processor: Any, record: TwiffRecord, media: str, spans: bool, lengths: Iterator[int]
) -> tuple[str, str]:
    """(prompt with the assistant's header, response) in the template's text.

    Args:
        media, spans: as in `SftCollator`.
        lengths: latents of each future frame's span, in order.
    """
    user = {"role": "user", "content": user_content(question_text(record.question, media), media, len(record.image))}
    assistant = {"role": "assistant", "content": assistant_content(record, spans)}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    response = processor.apply_chat_template([user, assistant], tokenize=False).removeprefix(prompt)
    picture = by_processor(processor).image_text
    while picture in response:
        response = response.replace(picture, f"{START}{LATENT * next(lengths)}{END}", 1)
    return prompt, response


def assistant_content(record: TwiffRecord, spans: bool = True) -> list[dict[str, str]]:
    """The assistant turn: thoughts in `<reason>`, an image for each future frame, the answer in `<answer>`.

    Without spans, thoughts that become neighbours are joined into one.
    """
    parts: list[str | None] = []  # None = a future frame
    for segment in record.reasoning:
        if isinstance(segment, Frame):
            if spans:
                parts.append(None)
        elif parts and parts[-1] is not None:
            parts[-1] += " " + segment.text
        else:
            parts.append(segment.text)
    content = [{"type": "image"} if p is None else {"type": "text", "text": f"<reason>{p}</reason>"} for p in parts]
    return [*content, {"type": "text", "text": f"<answer>{record.answer}</answer>"}]
