"""Decoded frames kept in memory, for clips that are read again and again."""

import os
from collections import OrderedDict
from collections.abc import Sequence

from future_l1_plugin.data.frame_choice import FrameChoice, chosen
from future_l1_plugin.data.frames import Backend, VideoFrames, read_frames
from future_l1_plugin.errors import DataError


class FrameCache:
    """A bounded memory of `read_frames`, least recently used out first; for worlds small enough to stay in memory.

    `cache.read(path, ...)` takes the arguments of `read_frames`. Results are shared: treat their arrays as read-only.
    Files are taken to be unchanged while the cache lives. Not safe for use from several threads.

    Args:
        max_bytes: bound on the pixels kept. A clip larger than that is read each time.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise DataError(f"FrameCache: max_bytes={max_bytes}, expected 0 (keep nothing) or more")
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._kept: OrderedDict[tuple, VideoFrames] = OrderedDict()

    def read(
        self,
        path: str | os.PathLike,
        indices: Sequence[int] | None = None,
        num_frames: int | None = None,
        pool: Sequence[int] | None = None,
        backend: Backend = "auto",
        frames: FrameChoice | None = None,
    ) -> VideoFrames:
        """As `read_frames`."""
        choice = chosen({"indices": indices, "num_frames": num_frames, "pool": pool, "frames": frames})
        key = (os.fspath(path), choice, backend)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        video = read_frames(path, backend=backend, frames=choice)
        if video.frames.nbytes <= self.max_bytes:
            self._kept[key] = video
            self.bytes += video.frames.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1].frames.nbytes
        return video
