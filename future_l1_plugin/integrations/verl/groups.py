"""Which groups of rollouts per step is trained on: in rounds, so that the same seed gives the same step.

verl's own buffer refills while rollouts come in, so that what it picks depends on who came first. Here a round is
sampled to its end, judged, and what is missing is asked for anew; groups are taken in the order in which their prompts
were submitted. It costs the tail of each round.

A group that failed for a reason of its own (`failures.PromptFailed`) is dropped like one without a signal, counted,
named in the log and replaced. Any other failure stops the run.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transfer_queue as tq

from future_l1_plugin.integrations.rl.groups import GroupFilter, RolloutError, Verdict
from future_l1_plugin.integrations.verl.columns import DROPPED, objects
from future_l1_plugin.integrations.verl.failures import ERROR, FATAL, PROMPT_ID
from future_l1_plugin.integrations.verl.host import ReplayBuffer, calculate_workload, get_seqlen_balanced_partitions
from future_l1_plugin.integrations.verl.settings import GroupsSection
from future_l1_plugin.integrations.verl.watch import GO_ON, Watch

POLL_S = 0.05

logger = logging.getLogger(__name__)


class GroupBuffer(ReplayBuffer):
    """verl's replay buffer for synchronous training, with DAPO's filter on mean accuracy.

    Args (besides verl's own):
        groups: bounds, refill factor and patience.
        filtered: whether groups outside of the bounds are replaced. Groups that lack a judge's verdict always are.
        on_clear: called with the prompts (uids) whose groups are dropped.

    Attributes:
        watch: asked while prompts are waited for; the trainer sets it when the rollout's actors are there.
    """

    watch: Watch | None = None

    def __init__(
        self, groups: GroupsSection, filtered: bool, on_clear: Callable[[set[str]], Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.groups, self.on_clear = groups, on_clear
        bounds = (groups.low, groups.high) if filtered else None
        self.filter = GroupFilter(bounds, "groups.max_rounds", "algorithm.filter_groups.enable=False")

    def sample(self, global_steps: int, partition_id: str, batch_size: int):
        """A batch of `batch_size` groups and the metrics of how it came about.

        In validation nothing is replaced: the batch lacks the groups that failed.

        Raises:
            RolloutError: a rollout failed for a reason that is not its prompt's, more than `groups.max_failed` groups
                of the step failed, or `groups.max_rounds` rounds did not give enough groups.
        """
        seen: Counter[str] = Counter()
        sampled: dict[str, float] = {}  # mean accuracy of every group of the step, kept or not
        training = partition_id == "train"
        for round_ in range(1, self.groups.max_rounds + 1):
            self._wait(partition_id)
            seen[Verdict.FAILED] += self._clear_failed(partition_id, seen[Verdict.FAILED])
            verdicts = self._verdicts(partition_id, sampled) if training else {}
            seen.update(verdicts.values())
            self._clear_groups(partition_id, set(verdicts))
            kept = sorted(self.finished_keys[partition_id])
            if len(kept) >= batch_size or (kept and not training):
                break
            if not training:
                raise RolloutError(
                    f"all {batch_size} questions of a batch of the validation failed; the log names them. Fix them, "
                    "or leave them out of data.val_files"
                )
            if round_ == self.groups.max_rounds:
                raise RolloutError(self.filter.starved(len(kept), batch_size, round_, seen))
            self.refill_fn(math.ceil((batch_size - len(kept)) * self.groups.refill))
        chosen, surplus = kept[:batch_size], set(kept[batch_size:])
        self._clear_groups(partition_id, surplus)
        batch = self._materialize_batch(partition_id, chosen, dict(self.partitions[partition_id]))
        order = sorted(range(len(batch.keys)), key=lambda i: _place(batch.keys[i]))
        batch.reorder(order)
        if not training:
            return batch, {}
        return batch, {
            "groups/accuracy": sum(sampled.values()) / len(sampled),
            "groups/rounds": round_,
            **{f"groups/{verdict}": seen[verdict] for verdict in Verdict if verdict != Verdict.KEPT},
            "groups/filtered": seen[Verdict.TOO_EASY] + seen[Verdict.TOO_HARD] + seen[Verdict.NO_VERDICT],
            "groups/surplus": len(surplus),
        }

    def _wait(self, partition_id: str) -> None:
        """Until every prompt submitted has come to its end.

        Raises RolloutError: one failed for good, an actor of the rollout died, or nothing came for `groups.stall_s`.
        """
        ended, since = (-1, -1), time.monotonic()
        while True:
            self._sync_metadata_from_transfer_queue()
            waited = self.pending_keys[partition_id] | self.running_keys[partition_id]
            if not waited:
                return
            if self.failure_keys[partition_id]:
                self._stop_if_fatal(partition_id)
            if self.watch is not None:
                self.watch.check(waited)
            # Rollouts that are in, and prompts that ended, some of them without any.
            now = len(self.partitions[partition_id]), len(self.failure_keys[partition_id])
            if now != ended:
                ended, since = now, time.monotonic()
            elif self.groups.stall_s is not None and time.monotonic() - since > self.groups.stall_s:
                raise RolloutError(self._stalled(partition_id, waited))
            time.sleep(POLL_S)

    def _stalled(self, partition_id: str, waited: set[str]) -> str:
        where = "the step" if partition_id == "train" else "a batch of the validation"
        names = f"{len(waited)} prompts are waited for." if self.watch is None else self.watch.described(waited)
        return (
            f"no rollout of {where} came to its end for {self.groups.stall_s:g} s (groups.stall_s). {names} If they "
            "take that long, raise groups.stall_s (null: wait for ever). If not, look at the log and the load of the "
            f"rollout's servers. {GO_ON}"
        )

    def _stop_if_fatal(self, partition_id: str) -> dict[str, dict[str, Any]]:
        """The tags of the prompts that failed. Raises RolloutError for a failure that is not its prompt's."""
        failed = sorted(self.failure_keys[partition_id])
        tags = tq.kv_list(partition_id)[partition_id] if failed else {}
        for key in failed:
            if tags[key].get(FATAL) or ERROR not in tags[key]:
                what = tags[key].get(ERROR, "see the AgentLoopWorker's log above")
                counted = f"{len(failed)} of the step's prompts failed in rollout or reward"
                raise RolloutError(f"{counted}; the first: {what}")
        return {key: tags[key] for key in failed}

    def _clear_failed(self, partition_id: str, before: int) -> int:
        """Drop the groups that failed, by name. Raises RolloutError if they are too many."""
        failed = self._stop_if_fatal(partition_id)
        for tag in failed.values():
            logger.warning("prompt %s was dropped: %s", tag[PROMPT_ID], tag[ERROR])
        if before + len(failed) > self.groups.max_failed:
            shown = "".join(f"\n  {tag[PROMPT_ID]}: {tag[ERROR]}" for tag in list(failed.values())[:5])
            raise RolloutError(
                f"{before + len(failed)} prompts of the step failed, groups.max_failed is {self.groups.max_failed}. "
                f"Fix them, or raise it; a new run may also leave them out of the data:{shown}"
            )
        self._clear_groups(partition_id, set(failed))
        return len(failed)

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)
        if uids and self.on_clear is not None:
            self.on_clear(uids)

    def _verdicts(self, partition_id: str, sampled: dict[str, float]) -> dict[str, Verdict]:
        """Why a finished group is not trained on, for those that are not; notes accuracies in `sampled`."""
        keys = [key for key in self.partitions[partition_id] if key.split("_")[0] in self.finished_keys[partition_id]]
        if not keys:
            return {}
        fields = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["extra_fields"])["extra_fields"]
        members: dict[str, list[dict[str, Any]]] = {}
        for key, extra in zip(keys, objects(fields), strict=True):
            members.setdefault(key.split("_")[0], []).append(extra["reward_extra_info"])
        verdicts = {}
        for uid, infos in members.items():
            accuracies = [float(info["acc"]) for info in infos]
            verdict = self.filter.verdict(accuracies, unjudged=any(info.get(DROPPED) for info in infos))
            if verdict != Verdict.NO_VERDICT:
                sampled[uid] = sum(accuracies) / len(accuracies)
            if verdict != Verdict.KEPT:
                verdicts[uid] = verdict
        return verdicts


def whole_groups(keys: list[str], lengths: list[int], ranks: int) -> list[int] | None:
    """An order of a batch's samples in which each rank's share, the next `len(keys) / ranks`, holds whole groups.

    Ranks get about the same work, by verl's estimate. None where groups cannot be dealt out whole: on one rank, with
    groups of different sizes (verl's padding rows among them), or a number of groups that `ranks` does not divide.
    """
    groups: dict[str, list[int]] = {}
    for i, key in sorted(enumerate(keys), key=lambda pair: _place(pair[1])):
        groups.setdefault(_place(key)[0], []).append(i)
    if ranks == 1 or len(groups) % ranks or len({len(members) for members in groups.values()}) > 1:
        return None
    members = list(groups.values())
    work = calculate_workload(torch.tensor(lengths)).tolist()
    shares = get_seqlen_balanced_partitions([sum(work[i] for i in group) for group in members], ranks, equal_size=True)
    return [i for share in shares for group in sorted(share) for i in members[group]]


def rank_metrics(keys: list[str], lengths: list[int], ranks: int) -> dict[str, float]:
    """Ranks among which a group is spread, and tokens of the rank with the fewest and the most, in the batch's order.

    The last two stand in for verl's figures of the order that it had made.
    """
    share = len(keys) // ranks
    of_group: dict[str, set[int]] = {}
    for i, key in enumerate(keys):
        of_group.setdefault(_place(key)[0], set()).add(i // share)
    tokens = [sum(lengths[rank * share : (rank + 1) * share]) for rank in range(ranks)]
    return {
        "actor/ranks_per_group": sum(map(len, of_group.values())) / len(of_group),
        "global_seqlen/balanced_min": min(tokens),
        "global_seqlen/balanced_max": max(tokens),
    }


def _place(key: str) -> tuple[str, int, int]:
    """verl's trajectory key `{uid}_{session}_{output}` in the order of submission."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)
