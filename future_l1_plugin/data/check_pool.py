"""Frames of many videos decoded in worker processes, of which any may die: a verdict on each clip that is asked for.

A pool of processes is lost as a whole when one of them dies, as decoders do on some broken files. What was under way
then is checked clip by clip, which finds the one at fault, and a new pool goes on with the rest.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from future_l1_plugin.data.container import REPLACE
from future_l1_plugin.data.frame_choice import Pool
from future_l1_plugin.data.frames import Backend, read_frames
from future_l1_plugin.errors import DataError, EnvironmentMismatch

_AHEAD = 2  # chunks a worker: the next one waits while it works on one


class Fault(NamedTuple):
    """Why a row is rejected: a key of `check.FAULTS`, and a sentence that says what to do."""

    kind: str
    reason: str


Frames = tuple[int, ...]  # pool numbers, sorted, each once
Faults = dict[str, Fault | None]  # by the content of the row (its hash); None: clean


@dataclass(frozen=True)
class Clip:
    """What is wanted of a video: its path, its `file_mark`, and the frames by the content of the row that uses them."""

    video: str
    mark: list[Any]
    wanted: dict[str, Frames]


def verdicts(clips: Iterator[Clip], backend: Backend, workers: int, size: int) -> Iterator[list[tuple[Clip, Faults]]]:
    """Decode clips in `workers` processes, `size` at a time. Yields verdicts as they come, in any order.

    Raises EnvironmentMismatch: worker processes do not start, or have no video decoder.
    """
    chunks = iter(lambda: list(islice(clips, size)), [])
    while left := (yield from _until_one_dies(chunks, backend, workers)):
        yield from _one_by_one(left, backend)


def _until_one_dies(
    chunks: Iterator[list[Clip]], backend: Backend, workers: int
) -> Generator[list[tuple[Clip, Faults]], None, list[Clip]]:
    """Returns the clips that were under way when a process died; none if all are done."""
    under_way: dict[Future, list[Clip]] = {}
    with _pool(workers) as pool:
        while True:
            for chunk in islice(chunks, _AHEAD * workers - len(under_way)):
                under_way[_submit(pool, chunk, backend)] = chunk
            if not under_way:
                return []
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                done, _ = wait(under_way)  # the others fail as well, but for what came back just before
            finished = [future for future in done if not isinstance(future.exception(), BrokenProcessPool)]
            if finished:
                yield [pair for future in finished for pair in zip(under_way.pop(future), future.result(), strict=True)]
            if len(finished) < len(done):
                return [clip for chunk in under_way.values() for clip in chunk]


def _submit(pool: ProcessPoolExecutor, clips: list[Clip], backend: Backend) -> Future:
    try:
        return pool.submit(check_clips, clips, backend)
    except BrokenProcessPool as error:  # died since the last look
        future: Future = Future()
        future.set_exception(error)
        return future


def _one_by_one(clips: list[Clip], backend: Backend) -> Iterator[list[tuple[Clip, Faults]]]:
    """Each clip alone, and of a clip each set of frames alone: what a row is told must not depend on rows beside it.

    A clip is at fault if it was the first that a fresh process was given, and the process died of it.
    """
    left = deque(part for clip in clips for part in _by_frames(clip))
    while left:
        with _pool(1) as pool:
            try:
                pool.submit(os.getpid).result()
            except BrokenProcessPool as error:
                raise EnvironmentMismatch(
                    "the processes that decode die before they are given a video; what they said stands above. In a "
                    'script, call check_data under `if __name__ == "__main__":`.'
                ) from error
            fresh = True
            while left:
                try:
                    (found,) = pool.submit(check_clips, [left[0]], backend).result()
                except BrokenProcessPool:
                    if fresh:
                        clip = left.popleft()
                        reason = f"{clip.video}: the process that decoded it died. {REPLACE}"
                        yield [(clip, dict.fromkeys(clip.wanted, Fault("decoder_crash", reason)))]
                    break
                yield [(left.popleft(), found)]
                fresh = False


def _by_frames(clip: Clip) -> list[Clip]:
    parts: dict[Frames, dict[str, Frames]] = {}
    for content, frames in clip.wanted.items():
        parts.setdefault(frames, {})[content] = frames
    return [Clip(clip.video, clip.mark, wanted) for wanted in parts.values()]


# ---- in the worker processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: a fork takes over threads' locks, and decoders have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    # Ctrl-C reaches all processes of a terminal; the parent alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        # A parent that is killed closes no queue, and its workers would wait for work for ever.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_clips(clips: Sequence[Clip], backend: Backend) -> list[Faults]:
    """What worker processes do: decode the frames that are wanted of some videos. One result for each clip."""
    return [_check_clip(clip, backend) for clip in clips]


def _check_clip(clip: Clip, backend: Backend) -> Faults:
    sets = dict.fromkeys(clip.wanted.values())
    union = tuple(sorted({number for frames in sets for number in frames}))
    fault = _frames_fault(clip.video, union, backend)
    if fault is None or len(sets) == 1:
        return dict.fromkeys(clip.wanted, fault)
    # A frame that fails spoils only the rows that use it.
    of_set = {frames: _frames_fault(clip.video, frames, backend) for frames in sets}
    return {content: of_set[frames] for content, frames in clip.wanted.items()}


def _frames_fault(video: str, frames: Frames, backend: Backend) -> Fault | None:
    try:
        read_frames(video, backend=backend, frames=Pool(tuple(frames)))
    except EnvironmentMismatch:
        raise
    except DataError as error:
        return Fault("video_damaged" if os.path.exists(video) else "video_missing", str(error))
    except Exception as error:
        # Whatever a broken file makes a decoder raise must not end the check of all others. It may also be the disk's
        # fault or ours, so the verdict is not kept.
        return Fault("video_unreadable", f"{video}: cannot be read ({type(error).__name__}: {error}). {REPLACE}")
    return None
