"""Which frames of a clip are used: one place for SFT, RL and evaluation. Nothing is read here.

Three numbers must not be mixed up:

* a *pool number*, 1..8, as records carry it (`image`, `reasoning_image`);
* a *frame number*: what `frame_pool` returns, eight for a clip of V frames, by TwiFF's rule;
* an *index*, 0..V-1, zero-based: what decoders, `uniform_indices` and `VideoFrames.indices` use.

V counts the frames that a player shows. Clips cut without re-encoding (most of Panda-70M, on which TwiFF stands) begin
with hidden frames, which only help to decode the first one shown; counting them would move every pool frame.
"""

from itertools import pairwise

import numpy as np

from future_l1_plugin.data.container import REPLACE
from future_l1_plugin.errors import DataError

POOL_SIZE = 8


def frame_pool(num_frames: int) -> list[int]:
    """The eight frames of a clip that records speak about, by TwiFF's rule.

    Frame 1; the middle of six intervals, whose edges are linspace(2, V-2, 7) truncated to whole numbers (an interval
    ends one frame before its next edge, the middle is rounded down); frame V-2. Clips of fewer than 9 frames have fewer
    intervals, and the last frame is repeated up to eight.

    Args:
        num_frames: V, the number of frames that the clip shows, at least 1.

    Returns:
        Eight frame numbers, never decreasing. V=240 gives [1, 21, 60, 99, 139, 178, 217, 238], V=10 gives [1, .., 8],
        V=5 gives [1, 1, 2, 3, 3, 3, 3, 3], V <= 3 gives eight times 1. `pool_indices` says where they lie in the file.

    Raises:
        DataError: num_frames < 1.
    """
    if num_frames < 1:
        raise DataError(f"frame_pool: a clip of {num_frames} frames has no frame to choose. {REPLACE}")
    first, last = 1, max(1, num_frames - 2)
    intervals = min(POOL_SIZE - 2, last - first)
    edges = np.linspace(first + 1, last, intervals + 1).astype(int).tolist() if intervals else []
    middle = [(left + right - 1) // 2 for left, right in pairwise(edges)]
    pool = [first, *middle, last]
    return pool + [last] * (POOL_SIZE - len(pool))


def pool_indices(num_frames: int) -> list[int]:
    """Where the frames of `frame_pool` lie for a decoder, zero-based. The only place where the two are converted.

    TwiFF hands its numbers to the decoder as they are, so number 1 is the second frame of the file; its published
    pictures show that. Only a clip of one frame needs another index, 0.
    """
    return [min(number, num_frames - 1) for number in frame_pool(num_frames)]


def uniform_indices(total: int, n: int) -> list[int]:
    """Evenly spread frames for evaluation: min(n, total) zero-based indices from the first frame to the last.

    `linspace(0, total-1, n)`, rounded to the nearest index, halves to the even one, as the video processor of Qwen3-VL
    in transformers does it. One frame of many is the first.

    Raises DataError if total < 1 or n < 1.
    """
    if total < 1:
        raise DataError(f"uniform_indices: a clip of {total} frames has no frame to choose. {REPLACE}")
    if n < 1:
        raise DataError(f"uniform_indices: asked for {n} frames, expected at least 1")
    return np.linspace(0, total - 1, min(n, total)).round().astype(int).tolist()
