"""Which prompts can be rewarded at all."""

from future_l1_plugin.data.record_files import BadRecord
from future_l1_plugin.data.rl import Prompts
from future_l1_plugin.errors import DataError
from future_l1_plugin.rewards import RewardSet
from future_l1_plugin.rewards.accuracy import needs_reader

_SHOWN = 5  # ids that an error names


def check_judged(prompts: Prompts, rewards: RewardSet, on_bad: str) -> Prompts:
    """The prompts whose answers the terms of `rewards` can decide.

    Without a judge, an answer in other words than the ground truth's counts as wrong: groups would be all wrong, and
    the policy would be blamed for it.

    Args:
        on_bad: "raise", or "skip" to leave the others out; they join `.bad`.

    Raises:
        DataError: prompts that no rule can decide; with "skip", only if no other is left.
    """
    if rewards.reads_text:
        return prompts
    unread = [p for p in prompts if needs_reader(p.ground_truth, p.options, p.kind)]
    if not unread:
        return prompts
    what = "its answer is free text, which no rule can decide, and the entry `accuracy` of `rewards` has no `judge`"
    if on_bad == "skip" and len(unread) < len(prompts):
        left_out = set(map(id, unread))
        bad = [BadRecord(p.source, p.id, what) for p in unread]
        return Prompts([p for p in prompts if id(p) not in left_out], [*prompts.bad, *bad])
    shown = ", ".join(p.id for p in unread[:_SHOWN]) + (", .." if len(unread) > _SHOWN else "")
    others = len(prompts) - len(unread)
    skip = f"; or go on with the other {others:,} prompts: data.future_l1.on_bad=skip" if others else ""
    raise DataError(
        f"{len(unread):,} of {len(prompts):,} prompts have a free-text answer (ids {shown}), which no rule can decide, "
        "and the entry `accuracy` of `rewards` has no judge: every response in other words than the ground truth's "
        "would count as wrong. Give that entry its key `judge: {base_url: .., model: ..}`; or set its "
        f"`exact_text: true`, if only the ground truth's own words shall count{skip}"
    )
