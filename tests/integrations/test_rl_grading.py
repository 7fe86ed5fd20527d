"""Rewards and verdicts of a round of groups."""

import asyncio

import pytest

from future_l1_plugin.integrations.rl.grading import grade
from future_l1_plugin.integrations.rl.groups import GroupFilter, Verdict
from future_l1_plugin.rewards.judge import JudgeUnavailable


class Rewards:
    """Samples are the accuracies themselves; None: the judge does not reply. The total is what the group has beside."""

    async def score_sample(self, sample):
        if sample is None:
            raise JudgeUnavailable("no verdict")
        if sample == "broken":
            raise ZeroDivisionError
        return {"accuracy": sample}

    def score_group(self, samples, scores):
        values = [terms["accuracy"] for terms in scores]
        return [sum(values) - value for value in values], {"accuracy": values}


def graded(samples, bounds=(0.1, 0.9)):
    return asyncio.run(grade(Rewards(), GroupFilter(bounds, "rounds", "off"), samples, list("abcdabcd")))


def test_groups_are_judged_whole_wherever_their_members_stand():
    found = graded([1.0, 0.0, 1.0, None, 0.0, 0.0, 1.0, 1.0])
    assert found.seen == {Verdict.KEPT: 1, Verdict.TOO_HARD: 1, Verdict.TOO_EASY: 1, Verdict.NO_VERDICT: 1}
    assert found.kept == [True, False, False, False] * 2 and found.places == [0, 4]
    assert found.totals == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert found.terms == {"accuracy": [1.0, 0.0]} and found.accuracies == [0.5, 0.0, 1.0]


def test_without_bounds_only_what_has_no_verdict_is_left_out():
    assert graded([1.0, 0.0, 1.0, None, 0.0, 0.0, 1.0, 1.0], None).places == [0, 1, 2, 4, 5, 6]
    nothing = graded([None] * 8)
    assert nothing.places == [] and nothing.terms == {} and nothing.accuracies == []


def test_another_failure_of_a_term_is_raised():
    with pytest.raises(ZeroDivisionError):
        graded(["broken"] * 8)
