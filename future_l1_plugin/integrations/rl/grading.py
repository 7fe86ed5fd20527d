"""The judgement of a round of groups: what its responses earn, and which of its groups are trained on."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from future_l1_plugin.integrations.rl.groups import GroupFilter, Verdict
from future_l1_plugin.integrations.rl.samples import group_rewards
from future_l1_plugin.rewards import RewardSet, Sample
from future_l1_plugin.rewards.judge import JudgeUnavailable
from future_l1_plugin.rewards.reward_set import ACCURACY, CORRECT_FROM


async def score_samples(rewards: RewardSet, samples: list[Sample]) -> list[dict[str, float] | None]:
    """Each sample's own terms; None where the judge did not reply. Raises what else a term raises."""
    found = await asyncio.gather(*(rewards.score_sample(s) for s in samples), return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException) and not isinstance(result, JudgeUnavailable):
            raise result
    return [None if isinstance(result, JudgeUnavailable) else result for result in found]


@dataclass
class Grades:
    """Of N responses. totals: 0 where the group is left out. terms: values of the responses that are kept, in order.

    seen: groups by verdict. accuracies: mean accuracy of every group that has a verdict.
    """

    totals: list[float]
    kept: list[bool]
    terms: dict[str, list[float]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    accuracies: list[float] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """Of the responses that are kept."""
        return [i for i, is_kept in enumerate(self.kept) if is_kept]


async def grade(rewards: RewardSet, rule: GroupFilter, samples: list[Sample], group: list[str]) -> Grades:
    """Whole groups; `group` names each sample's prompt. Raises RewardError as `group_rewards`."""
    scores = await score_samples(rewards, samples)
    grades = Grades([0.0] * len(samples), [False] * len(samples))
    for name in dict.fromkeys(group):
        members = [i for i, other in enumerate(group) if other == name]
        judged = [scores[i] for i in members if scores[i] is not None]
        correct = [float(terms[ACCURACY] >= CORRECT_FROM) for terms in judged]
        verdict = rule.verdict(correct, unjudged=len(judged) < len(members))
        grades.seen[verdict] += 1
        if verdict != Verdict.NO_VERDICT:
            grades.accuracies.append(sum(correct) / len(correct))
        for i in members:
            grades.kept[i] = verdict == Verdict.KEPT
    if kept := grades.places:
        found = group_rewards(rewards, *([column[i] for i in kept] for column in (samples, scores, group)))
        grades.terms = found.terms
        for i, total in zip(kept, found.totals, strict=True):
            grades.totals[i] = total
    return grades
