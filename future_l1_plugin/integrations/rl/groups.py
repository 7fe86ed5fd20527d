"""Which groups of rollouts are trained on, and what to do where there are too few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from future_l1_plugin.la_dapo import keep_group


class RolloutError(RuntimeError):
    """A rollout or its reward failed, or no group is left to train on."""


class NotFinite(RuntimeError):
    """A loss or a gradient of a step is NaN or infinite."""


class Verdict(StrEnum):
    """What becomes of a group; as a word, the end of its metric `groups/..`."""

    KEPT = "kept"
    TOO_EASY = "too_easy"
    TOO_HARD = "too_hard"
    NO_VERDICT = "no_verdict"  # the judge of a member's answer did not reply
    FAILED = "failed"  # it could not be rolled out


@dataclass(frozen=True)
class GroupFilter:
    """DAPO's filter on a group's mean accuracy. bounds: (least, greatest); None = every group with a verdict is kept.

    On the keys of its host: `rounds_key` bounds the rounds of sampling, `off` (key=value) switches the filter off.
    """

    bounds: tuple[float, float] | None
    rounds_key: str
    off: str

    def verdict(self, correct: Sequence[float], unjudged: bool) -> Verdict:
        """Of a finished group. correct: 1.0 for each member that is right. unjudged: a member lacks its verdict."""
        if unjudged:
            return Verdict.NO_VERDICT
        if self.bounds is None or keep_group(correct, *self.bounds):
            return Verdict.KEPT
        return Verdict.TOO_EASY if sum(correct) / len(correct) > self.bounds[1] else Verdict.TOO_HARD

    def starved(self, found: int, wanted: int, rounds: int, seen: Mapping[str, int]) -> str:
        """What `rounds` rounds of sampling found in the place of `wanted` groups, and what to do about it."""
        low = high = ""
        if self.bounds is not None:
            low, high = f" (below {self.bounds[0]:g})", f" (mean accuracy above {self.bounds[1]:g})"
        return (
            f"after {rounds} rounds of sampling {found} of {wanted} groups can be trained on: "
            f"{seen.get(Verdict.TOO_EASY, 0)} were too easy{high}, {seen.get(Verdict.TOO_HARD, 0)} too hard{low}, "
            f"{seen.get(Verdict.NO_VERDICT, 0)} had no verdict from the judge, {seen.get(Verdict.FAILED, 0)} failed. "
            f"{self.way_out(seen)}"
        )

    def way_out(self, seen: Mapping[str, int]) -> str:
        """Advice that fits what was found most: `seen` has the number of groups of each verdict."""
        causes = (Verdict.NO_VERDICT, Verdict.FAILED, Verdict.TOO_HARD, Verdict.TOO_EASY)
        most = max(causes, key=lambda cause: seen.get(cause, 0))
        if most == Verdict.NO_VERDICT:
            return (
                "The judge is what is missing, not the model: see that it answers at the address, with the key and the "
                f"model, that `judge` of the entry `accuracy` in `rewards` names, or raise {self.rounds_key}."
            )
        if most == Verdict.FAILED:
            return "See in the log why prompts fail and fix them; a new run may also leave them out of the data."
        harder, better = "harder", ""
        if most == Verdict.TOO_HARD:
            harder, better = "easier", "start from a better checkpoint, "
        return (
            f"Raise {self.rounds_key}, with which this run may go on; a new one may also {better}use {harder} data, or "
            f"switch the filter off ({self.off})."
        )
