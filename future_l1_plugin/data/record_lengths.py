"""How many tokens a training record makes, told without encoding it: from its words and the size of its frames.

Overlong records are then found when data are loaded, from the headers of their videos, and not in the middle of a run.
What a header says can be wrong, so `SftDataset` asks again about each record that it decoded (`RecordLengths.fault`).
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any, Literal
from unicodedata import normalize

from tqdm import tqdm

from future_l1_plugin.data.frame_choice import pool_indices
from future_l1_plugin.data.lengths import ClipHeader, clip_header, picture_tokens, video_tokens
from future_l1_plugin.data.record_files import BadRecord, Records
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.sft import SftSample, assistant_content, conversation, without_bad
from future_l1_plugin.data.showing import question_text
from future_l1_plugin.errors import DataError
from future_l1_plugin.model.config import LatentConfig

_THREADS = 8
_SHOW_PROGRESS_FROM = 2000
_A_PART = 32  # more tokens than markers, tags and a time stamp around a part of a conversation can be


class RecordLengths:
    """Tokens of records in a batch of `SftCollator`, whose first four arguments these are."""

    def __init__(
        self,
        processor: Any,
        latent: LatentConfig,
        question_media: str = "images",
        spans: bool = True,
        max_length: int = 16384,
    ) -> None:
        self.processor, self.latent, self.max_length = processor, latent, max_length
        self.question_media, self.spans = question_media, spans
        image = processor.image_processor
        area = (image.patch_size * image.merge_size) ** 2
        self._future = {"shortest_edge": area, "longest_edge": latent.max_latent_token * area}
        empty = [{"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant")]
        self._frame = len(processor.apply_chat_template(empty, tokenize=False).encode())  # of the conversation

    def tokens(self, record: TwiffRecord, clip: ClipHeader) -> int:
        """Exact, if the clip is as its header says. Raises ValueError for frames that the processor refuses."""
        text = "".join(conversation(self.processor, record, self.question_media, self.spans, repeat(0)))
        shown = self._shown(record, clip)
        if self.question_media == "video":
            hold = self.processor.video_processor.temporal_patch_size
            pool = pool_indices(clip.total)  # as `question_video` shows them
            fps = clip.fps * hold / max(1, pool[1] - pool[0])
            times = self.processor._calculate_timestamps(list(range(len(shown) * hold)), fps, hold)
            mark = f"{self.processor.vision_start_token}{self.processor.video_token}{self.processor.vision_end_token}"
            frames = "".join(f"<{time:.1f} seconds>{mark}" for time in times)
            text = text.replace(self.processor.video_token, frames, 1)
        words = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return words + sum(shown) - len(shown) + self._latents(record, clip)  # a frame has one token in the text

    def at_most(self, record: TwiffRecord, clip: ClipHeader) -> int:
        """At least `tokens`, and far cheaper: a token is a byte or more of the text, normalised as tokenizers do."""
        parts = [part.get("text", "") for part in assistant_content(record, self.spans)]
        parts += [question_text(record.question, self.question_media), *("" for _ in record.image), ""]
        words = sum(len(normalize("NFC", part).encode()) + _A_PART for part in parts)
        return self._frame + words + sum(self._shown(record, clip)) + self._latents(record, clip)

    def fault(self, sample: SftSample) -> str | None:
        """What is wrong with a decoded record: too long, or frames that the processor refuses. None: nothing."""
        clip = sample.question_clip
        size = clip.frames.shape[1:3] if len(clip.frames) or sample.future is None else sample.future.frames.shape[1:3]
        return self.fault_of(sample.record, ClipHeader(clip.total, *size, clip.fps))

    def fault_of(self, record: TwiffRecord, clip: ClipHeader) -> str | None:
        """The same of a clip that is as `clip` says."""
        try:
            if self.at_most(record, clip) <= self.max_length or (found := self.tokens(record, clip)) <= self.max_length:
                return None
        except ValueError as error:  # an extreme aspect ratio
            return f"the processor refuses its frames: {error}"
        return (
            f"{found:,} tokens, data.max_length is {self.max_length:,}. Raise it; a new run may also use fewer or "
            "smaller question frames."
        )

    def _shown(self, record: TwiffRecord, clip: ClipHeader) -> list[int]:
        """Tokens of each question frame."""
        if not record.image:
            return []
        if self.question_media == "images":
            one = picture_tokens(self.processor, clip.height, clip.width)
        else:
            frames = len(record.image) * self.processor.video_processor.temporal_patch_size
            one = video_tokens(self.processor, frames, clip.height, clip.width)
        return [one] * len(record.image)

    def _latents(self, record: TwiffRecord, clip: ClipHeader) -> int:
        """Latents of all spans."""
        if not self.spans or not record.reasoning_image:
            return 0
        # Asked under a fixed budget, too: the processor may refuse the frames.
        tokens = picture_tokens(self.processor, clip.height, clip.width, self._future)
        return len(record.reasoning_image) * (self.latent.train_fixed_latent_budget or tokens)


def check_record_lengths(
    records: Records, lengths: RecordLengths, on_bad: Literal["raise", "skip"] = "raise"
) -> Records:
    """Records that fit `lengths.max_length`, told from the headers of their videos; no pixel is decoded.

    Raises DataError: as `check_records`, for records that are too long or whose video cannot be opened.
    """
    good, bad = [], []
    videos = list(dict.fromkeys(record.video for record in records if record.image or record.reasoning_image))
    with ThreadPoolExecutor(_THREADS) as pool:  # headers are read from disk
        found, few = pool.map(_header, videos), len(videos) < _SHOW_PROGRESS_FROM
        headers = dict(zip(videos, tqdm(found, "record lengths", len(videos), disable=few), strict=True))
    for record in records:
        clip = headers.get(record.video, ClipHeader(1, 0, 0, 1.0))  # no frame is shown
        reason = str(clip) if isinstance(clip, DataError) else lengths.fault_of(record, clip)
        if reason:
            bad.append(BadRecord("record", record.id, reason))
        else:
            good.append(record)
    return without_bad(records, good, bad, on_bad)


def _header(video: str) -> ClipHeader | DataError:
    try:
        return clip_header(video)
    except DataError as error:
        return error
