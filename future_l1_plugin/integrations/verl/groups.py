"""Which groups of rollouts a step is trained on: in rounds, so that the same seed gives the same step.

verl's own buffer refills while rollouts come in, so that what it picks depends on who came first. Here a round is
sampled to its end, judged, and what is missing is asked for anew; groups are taken in the order in which their prompts
were submitted. It costs the tail of each round.
"""

import math
import time
from collections import Counter
from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from future_l1_plugin.integrations.verl.reward import DROPPED
from future_l1_plugin.integrations.verl.settings import GroupsSection
from future_l1_plugin.la_dapo import keep_group

#: Tag on a prompt whose rollout failed, with the reason.
ERROR = "error"
POLL_S = 0.05


class RolloutError(RuntimeError):
    """A rollout or its reward failed, or no group is left to train on."""


class GroupBuffer(ReplayBuffer):
    """verl's replay buffer for synchronous training, with DAPO's filter on mean accuracy.

    Args (besides verl's own):
        groups: bounds, refill factor and patience.
        filtered: whether groups outside of the bounds are replaced. Groups that lack a judge's verdict always are.
    """

    def __init__(self, groups: GroupsSection, filtered: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups, self.filtered = groups, filtered

    def sample(self, global_steps: int, partition_id: str, batch_size: int):
        """A batch of `batch_size` groups and the metrics of how it came about.

        Raises:
            RolloutError: a rollout failed, or `groups.max_rounds` rounds did not give enough groups.
        """
        seen: Counter[str] = Counter()
        sampled: dict[str, float] = {}  # mean accuracy of every group of the step, kept or not
        for round_ in range(1, self.groups.max_rounds + 1):
            self._wait(partition_id)
            verdicts = self._verdicts(partition_id, sampled) if partition_id == "train" else {}
            seen.update(verdicts.values())
            self._clear_groups(partition_id, set(verdicts))
            kept = sorted(self.finished_keys[partition_id])
            if len(kept) >= batch_size:
                break
            if round_ == self.groups.max_rounds:
                raise RolloutError(self._starved(len(kept), batch_size, seen))
            self.refill_fn(math.ceil((batch_size - len(kept)) * self.groups.refill))
        chosen, surplus = kept[:batch_size], set(kept[batch_size:])
        self._clear_groups(partition_id, surplus)
        batch = self._materialize_batch(partition_id, chosen, dict(self.partitions[partition_id]))
        order = sorted(range(len(batch.keys)), key=lambda i: _place(batch.keys[i]))
        batch.reorder(order)
        if partition_id != "train":
            return batch, {}
        return batch, {
            "groups/accuracy": sum(sampled.values()) / len(sampled),
            "groups/rounds": round_,
            "groups/too_easy": seen["too_easy"],
            "groups/too_hard": seen["too_hard"],
            "groups/no_verdict": seen["no_verdict"],
            "groups/filtered": sum(seen.values()),
            "groups/surplus": len(surplus),
        }

    def _wait(self, partition_id: str) -> None:
        """Until every prompt submitted has come to its end."""
        while True:
            self._sync_metadata_from_transfer_queue()
            if self.failure_keys[partition_id]:
                raise RolloutError(self._failure(partition_id))
            if not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
                return
            time.sleep(POLL_S)

    def _failure(self, partition_id: str) -> str:
        failed = sorted(self.failure_keys[partition_id])
        tags = tq.kv_list(partition_id)[partition_id]
        reasons = [tags[key].get(ERROR) for key in failed if tags[key].get(ERROR)]
        what = reasons[0] if reasons else "see the AgentLoopWorker's log above"
        return f"{len(failed)} of the step's prompts failed in rollout or reward; the first: {what}"

    def _verdicts(self, partition_id: str, sampled: dict[str, float]) -> dict[str, str]:
        """Why a finished group is not trained on, for those that are not; notes accuracies in `sampled`."""
        keys = [key for key in self.partitions[partition_id] if key.split("_")[0] in self.finished_keys[partition_id]]
        if not keys:
            return {}
        fields = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["extra_fields"])["extra_fields"]
        members: dict[str, list[dict[str, Any]]] = {}
        for key, extra in zip(keys, list(fields), strict=True):
            members.setdefault(key.split("_")[0], []).append(getattr(extra, "data", extra)["reward_extra_info"])
        verdicts = {}
        for uid, infos in members.items():
            accuracies = [float(info["acc"]) for info in infos]
            no_verdict = any(info.get(DROPPED) for info in infos)
            if not no_verdict:
                sampled[uid] = sum(accuracies) / len(accuracies)
            if no_verdict:
                verdicts[uid] = "no_verdict"
            elif self.filtered and not keep_group(accuracies, self.groups.low, self.groups.high):
                verdicts[uid] = "too_easy" if sampled[uid] > self.groups.high else "too_hard"
        return verdicts

    def _starved(self, found: int, wanted: int, seen: Counter[str]) -> str:
        return (
            f"after {self.groups.max_rounds} rounds of sampling {found} of {wanted} groups can be trained on: "
            f"{seen['too_easy']} were too easy (mean accuracy above {self.groups.high:g}), {seen['too_hard']} too hard "
            f"(below {self.groups.low:g}), {seen['no_verdict']} had no verdict from the judge. Start from a better "
            "checkpoint, use data of another difficulty, raise groups.max_rounds, or switch the filter off "
            "(algorithm.filter_groups.enable=False)."
        )


def _place(key: str) -> tuple[str, int, int]:
    """verl's trajectory key `{uid}_{session}_{output}` in the order of submission."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)
