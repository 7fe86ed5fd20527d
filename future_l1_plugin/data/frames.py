"""How the frames of a clip are read, which `frame_choice` names: one place for SFT, RL and evaluation.

Two decoders give the same pixels, bit for bit, in all cases the tests hold (BT.601 and BT.709, limited and full range):

* PyAV, the default: faster on short clips (64x64, 17 frames, one thread: about 12,000 frames/s against 8,000 with
  decord), knows hidden frames, and is needed for writing anyway;
* decord, where PyAV is missing or where it is asked for. It counts hidden frames and then returns wrong pictures
  without a word (decord 0.6.0), so such clips are refused on this backend.

Nothing here resizes: frames keep the size of the file, and the processor decides.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from future_l1_plugin.data.container import REPLACE, check_file
from future_l1_plugin.data.frame_choice import FrameChoice, chosen
from future_l1_plugin.errors import DataError, EnvironmentMismatch

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

Backend = Literal["auto", "decord", "pyav"]
#: From the number of frames that a clip shows to the indices that are wanted of it.
Choice = Callable[[int], list[int]]

# Compressed packets of files up to this size are kept between counting and decoding, which saves a second pass.
_KEEP_PACKETS_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Decoded frames of one clip.

    Attributes:
        frames: uint8 (N, H, W, 3), RGB.
        indices: zero-based index of each frame in the clip, in the order asked for.
        fps: frames per second of the clip.
        total: number of frames that the clip shows.
        path: the file.
        backend: "pyav" or "decord", the decoder that read it.
    """

    frames: np.ndarray
    indices: list[int]
    fps: float
    total: int
    path: str
    backend: str

    def metadata(self) -> VideoMetadata:
        """What a transformers video processor wants to know beside the frames (Qwen3-VL writes timestamps from it)."""
        from transformers.video_utils import VideoMetadata

        height, width = self.frames.shape[1:3]
        return VideoMetadata(
            total_num_frames=self.total,
            fps=self.fps,
            width=width,
            height=height,
            duration=self.total / self.fps,
            video_backend=self.backend,
            frames_indices=list(self.indices),
        )


def read_frames(
    path: str | os.PathLike,
    indices: Sequence[int] | None = None,
    num_frames: int | None = None,
    pool: Sequence[int] | None = None,
    backend: Backend = "auto",
    frames: FrameChoice | None = None,
) -> VideoFrames:
    """Decode some frames of a clip, or all.

    Args:
        path: a video file.
        indices: zero-based indices, any order, repeats allowed.
        num_frames: that many frames, evenly spread (`uniform_indices`).
        pool: pool numbers 1..8 (`frame_pool`), any order, repeats allowed.
        backend: "pyav", "decord", or "auto": PyAV if it imports, else decord. The result names the one used.
        frames: any choice, which the three above are short for.

    At most one of `indices`, `num_frames`, `pool` and `frames`; none reads every frame.

    Raises:
        DataError: two of the four given; the file is missing, empty, cut off, damaged or no video; it shows no frame;
            an index or pool number lies outside; on decord, a clip that begins with hidden frames.
        EnvironmentMismatch: the decoder asked for (or, with "auto", any decoder) is not installed.
    """
    path = os.fspath(path)
    with _about(path):
        choice = chosen({"indices": indices, "num_frames": num_frames, "pool": pool, "frames": frames})
    reader = _reader(backend)
    check_file(path)

    def choose(total: int) -> list[int]:
        with _about(path):
            return choice.indices(total)

    return reader(path, choose)


@contextmanager
def _about(path: str) -> Iterator[None]:
    """A choice does not know of which clip it is made; its errors do."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _reader(backend: Backend) -> Callable[[str, Choice], VideoFrames]:
    readers = {"pyav": ("av", _read_pyav), "decord": ("decord", _read_decord)}
    if backend not in ("auto", *readers):
        raise DataError(f"unknown video backend {backend!r}, expected auto, pyav or decord")
    for name in readers if backend == "auto" else [backend]:
        module, reader = readers[name]
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return reader
    raise EnvironmentMismatch(f"no video decoder for backend={backend!r} is installed. Fix: pip install av")


def _damaged(path: str, found: str) -> DataError:
    return DataError(f"{path}: cannot be decoded ({found}). {REPLACE}")


def _finish(
    path: str, by_index: dict[int, np.ndarray], wanted: list[int], fps: float, total: int, backend: str
) -> VideoFrames:
    frames = np.stack([by_index[index] for index in wanted])
    return VideoFrames(frames, wanted, fps, total, path, backend)


def _read_pyav(path: str, choose: Choice) -> VideoFrames:
    """Read with PyAV the frames that `choose(total)` names."""
    import av

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise _damaged(path, "no video stream in it")
            stream = container.streams.video[0]
            # One thread: data loaders have a process per core already, and starting threads costs more than a clip.
            stream.thread_type, stream.thread_count = "NONE", 1
            rate = stream.average_rate or stream.guessed_rate
            packets = list(container.demux(stream)) if os.path.getsize(path) <= _KEEP_PACKETS_BYTES else None
            # Only in mp4 and its kin is a packet a frame; others (VP8 in webm) have packets that show nothing.
            if "mp4" in container.format.name:
                total = _count_packets(path, packets)
            else:
                total = sum(1 for packet in packets or container.demux(stream) for _ in packet.decode())
                packets = None
            if total == 0:
                raise _damaged(path, "it shows no frame")
            if not rate:
                raise _damaged(path, "it has no frame rate")
            wanted = choose(total)
        # After a full pass the decoder stands at its end; opening again is as cheap as seeking and never lands wrong.
        if packets is None:
            with av.open(path) as container:
                stream = container.streams.video[0]
                stream.thread_type, stream.thread_count = "NONE", 1
                by_index = _decode_pyav(path, container.demux(stream), wanted)
        else:
            by_index = _decode_pyav(path, packets, wanted)
        missing = sorted(set(wanted) - by_index.keys())
        if missing:
            raise _damaged(path, f"frame {missing[0]} of {total} does not come out")
        return _finish(path, by_index, wanted, float(rate), total, "pyav")
    except av.error.FFmpegError as error:
        raise _damaged(path, f"FFmpeg: {error.strerror}") from error


def _count_packets(path: str, packets) -> int:
    """Frames shown: packets with data that no edit list hides."""
    import av

    if packets is not None:
        return sum(1 for packet in packets if packet.size and not packet.is_discard)
    with av.open(path) as container:
        stream = container.streams.video[0]
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _decode_pyav(path: str, packets, wanted: list[int]) -> dict[int, np.ndarray]:
    """Decode in order up to the last wanted index; only wanted frames are turned into RGB. uint8 (H, W, 3) each."""
    out: dict[int, np.ndarray] = {}
    needed, last, index = set(wanted), max(wanted), 0
    for packet in packets:
        for frame in packet.decode():
            if index in needed:
                if frame.is_corrupt:
                    raise _damaged(path, f"frame {index} is damaged")
                # Both arguments are needed for the colours that decord gives. PyAV keeps libswscale's BT.601 unless the
                # two colour spaces differ (the target's is without effect in RGB), and drops the range unless told.
                rgb = frame.reformat(format="rgb24", dst_colorspace="ITU601", src_color_range=frame.color_range)
                out[index] = rgb.to_ndarray()
            if index == last:
                return out
            index += 1
    return out


def _read_decord(path: str, choose: Choice) -> VideoFrames:
    """Read with decord the frames that `choose(total)` names."""
    import decord

    # decord raises its own error from C++ calls and RuntimeError when a file does not open.
    try:
        reader = decord.VideoReader(path, num_threads=1)
        total = len(reader)
        if total == 0:
            raise _damaged(path, "it shows no frame")
        if reader.get_frame_timestamp(0)[0] < 0:
            raise DataError(
                f"{path}: begins with hidden frames, which decord counts and then confuses with shown ones. "
                "Use backend='pyav' (pip install av), or encode the clip again."
            )
        wanted = choose(total)
        unique = sorted(set(wanted))
        pictures = reader.get_batch(unique).asnumpy()
        fps = float(reader.get_avg_fps())
    except (decord.DECORDError, RuntimeError) as error:
        raise _damaged(path, f"decord: {str(error).strip().splitlines()[0]}") from error
    if not fps > 0:
        raise _damaged(path, "it has no frame rate")
    return _finish(path, dict(zip(unique, pictures, strict=True)), wanted, fps, total, "decord")
