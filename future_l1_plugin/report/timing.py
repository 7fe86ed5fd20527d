"""Timing two ways to do one thing against each other, for `scripts/bench_*.py`.

The ways take turns, and a ratio is the median over the turns of the ratio within a turn: a machine that slows down
meanwhile slows both. Wall time and processor time stand side by side, because a busy machine stretches only the first.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

#: Wall and processor seconds of one call.
Took = tuple[float, float]


def clock(run: Callable[[], Any]) -> Took:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def in_turns(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[Took]]:
    """`clock` of each run in each turn; the order is reversed every other turn."""
    times: dict[str, list[Took]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            times[name].append(clock(runs[name]))
        last = ", ".join(f"{name} {took[-1][0]:.3f} s" for name, took in times.items())
        print(f"  turn {turn + 1} of {turns}: {last}", file=sys.stderr, flush=True)
    return times


def ratio(ours: list[Took], peer: list[Took], which: int = 0) -> float:
    """Median over the turns of ours / peer; `which`: 0 = wall time, 1 = processor time."""
    return statistics.median(a[which] / b[which] for a, b in zip(ours, peer, strict=True))


def median(times: list[Took]) -> float:
    """Median of the wall seconds."""
    return statistics.median(wall for wall, _ in times)
