"""Work in threads, ahead of its use: prompts are read and encoded while vLLM decodes others. No vLLM."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

#: Reading and encoding is done by code that lets other threads run; more of them would compete with the engine.
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Ahead(Generic[Item, Result]):
    """Iterates over `work(item)`, in the order of the items, whichever is done first.

        with Ahead(paths, read, limit=16) as frames:
            for one in frames: ..

    What `work` raises is raised in its item's turn. Leaving the block begins no further item and waits for those begun.

    Args:
        work: called in threads.
        limit: items that are begun and not yet taken, at most.
    """

    def __init__(
        self, items: Iterable[Item], work: Callable[[Item], Result], limit: int, threads: int = THREADS
    ) -> None:
        self._items, self._work, self._limit = iter(items), work, limit
        self._begun: deque[Future[Result]] = deque()
        self._pool = ThreadPoolExecutor(min(threads, limit), thread_name_prefix="ahead")

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._begun:
            raise StopIteration
        try:
            return self._begun.popleft().result()
        except StopIteration as error:  # of the work: for whoever iterates it would be the end
            raise RuntimeError("what reads a prompt ahead raised StopIteration") from error
        finally:
            self._begin()

    @property
    def ready(self) -> bool:
        """Whether the next result is there, or there is no next one: whether `next` returns at once."""
        return not self._begun or self._begun[0].done()

    def _begin(self) -> None:
        while len(self._begun) < self._limit:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except Exception as error:  # in its turn, after the results before it
                failed: Future[Result] = Future()
                failed.set_exception(error)
                self._begun.append(failed)
                self._items = iter(())
                return
            self._begun.append(self._pool.submit(self._work, item))
