"""Who keeps the pixels of a step. A module of its own: its process starts in a second, without torch and verl."""

from collections.abc import Iterable
from typing import Any


class Keeper:
    """References to the pixels of the groups under way: a Ray actor, one a run."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, int]] = {}

    def put(self, uid: str, references: list[Any], size: int) -> None:
        self._kept[uid] = (references[0], size)

    def get(self, uids: list[str]) -> list[Any]:
        """One reference a prompt; None for one that is not kept."""
        return [self._kept.get(uid, (None, 0))[0] for uid in uids]

    def drop(self, uids: Iterable[str]) -> None:
        for uid in uids:
            self._kept.pop(uid, None)

    def clear(self) -> dict[str, float]:
        """Drop all; says how much it was."""
        found = {"pixels/prompts": len(self._kept), "pixels/gib": sum(size for _, size in self._kept.values()) / 2**30}
        self._kept.clear()
        return found
