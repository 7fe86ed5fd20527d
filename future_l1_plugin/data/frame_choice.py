"""Which frames of a clip are used: one place for SFT, RL and evaluation. Nothing is read here.

Three numbers must not be mixed up:

* a *pool number*, 1..8, as records carry it (`image`, `reasoning_image`);
* a *frame number*: what `frame_pool` returns, eight for a clip of V frames, by TwiFF's rule;
* an *index*, 0..V-1, zero-based: what decoders, `uniform_indices` and `VideoFrames.indices` use.

What a prompt, a dataset or an evaluation shows of a clip is a `FrameChoice`; options that users give (num_frames,
max_num_frames, --frames) become one where they are read. A new kind is a class here, and the option that asks for it.

V counts the frames that a player shows. Clips cut without re-encoding (most of Panda-70M, on which TwiFF stands) begin
with hidden frames, which only help to decode the first one shown; counting them would move every pool frame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

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


# ---- choices --------------------------------------------------------------------------------------------------------


class FrameChoice(Protocol):
    """Which frames of a clip are shown. Choices are values: equal ones are interchangeable, and can be keys."""

    @property
    def most(self) -> int | None:
        """Frames that it takes of a clip at most; None: of a longer clip more."""

    def indices(self, total: int) -> list[int]:
        """Zero-based indices in a clip of `total` frames, in the order in which they are shown. Raises DataError."""


@dataclass(frozen=True)
class Every:
    """All frames."""

    most: None = None

    def indices(self, total: int) -> list[int]:
        return list(range(total))


@dataclass(frozen=True)
class Evenly:
    """`most` frames from the first to the last (`uniform_indices`); a shorter clip gives all it has."""

    most: int

    def indices(self, total: int) -> list[int]:
        return uniform_indices(total, self.most)


@dataclass(frozen=True)
class Pool:
    """Frames of the pool by their numbers, 1..8 (`frame_pool`), any order, repeats allowed."""

    numbers: tuple[int, ...]

    @property
    def most(self) -> int:
        return len(self.numbers)

    def indices(self, total: int) -> list[int]:
        if not self.numbers or not all(1 <= number <= POOL_SIZE for number in self.numbers):
            raise DataError(
                f"pool numbers are 1..{POOL_SIZE}, got {list(self.numbers)}. Correct the record that names them."
            )
        where = pool_indices(total)
        return [where[number - 1] for number in self.numbers]


@dataclass(frozen=True)
class At:
    """Frames at zero-based indices, any order, repeats allowed."""

    where: tuple[int, ...]

    @property
    def most(self) -> int:
        return len(self.where)

    def indices(self, total: int) -> list[int]:
        if outside := [index for index in self.where if not 0 <= index < total]:
            raise DataError(
                f"frame index {outside[0]} is outside 0..{total - 1} (the clip shows {total} frames, indices are "
                "zero-based). Correct the index, or check that this is the clip that was meant."
            )
        if not self.where:
            raise DataError("an empty list of indices was asked for; leave it out to read every frame")
        return list(self.where)


_KINDS = {"every": Every, "evenly": Evenly, "pool": Pool, "at": At}


def to_json(choice: FrameChoice) -> dict[str, Any]:
    """A choice as JSON values. `from_json` reads back an equal one."""
    kind = next(name for name, kind in _KINDS.items() if type(choice) is kind)
    return {"kind": kind} | {key: list(v) if isinstance(v, tuple) else v for key, v in vars(choice).items()}


def from_json(value: Mapping[str, Any]) -> FrameChoice:
    """Raises DataError for a kind that there is not."""
    given = {key: tuple(v) if isinstance(v, Sequence) else v for key, v in value.items() if key != "kind"}
    if value["kind"] not in _KINDS:
        raise DataError(f"frames: expected a kind among {', '.join(_KINDS)}, found {value['kind']!r}")
    return _KINDS[value["kind"]](**given)


def chosen(given: Mapping[str, Any]) -> FrameChoice:
    """The choice that the arguments of `read_frames` make. Raises DataError if they make two."""
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise DataError(
            f"read_frames takes at most one of indices, num_frames, pool and frames, got {' and '.join(given)}"
        )
    for name, value in given.items():
        if name == "indices":
            return At(tuple(map(int, value)))
        if name == "num_frames":
            return Evenly(value)
        return Pool(tuple(value)) if name == "pool" else value
    return Every()
