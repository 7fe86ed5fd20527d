"""Prompts whose answers nobody can decide, and what is advised where groups are missing."""

import json
import re

import pytest
from omegaconf import OmegaConf

from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.rl.groups import GroupFilter
from future_l1_plugin.integrations.rl.prompts import check_judged
from future_l1_plugin.integrations.verl.dataset import LatentRLDataset
from future_l1_plugin.rewards import RewardSet, Sample, reward_term
from future_l1_plugin.rewards.accuracy import needs_reader

SENTENCE = "It bounces off the wall and rolls back."
ROWS = [
    {"id": "f0", "question": "What happens?", "answer": SENTENCE},
    {"id": "f1", "question": "What happens next?", "answer": "rolls left"},
    {"id": "w", "question": "Which colour?", "answer": "red"},
    {"id": "m", "question": "6 times 7?", "answer": 42},
    {"id": "s", "question": "Say it.", "answer": "forty two", "kind": "maths"},
    {"id": "c", "question": "What happens?", "answer": "It falls down", "options": ["It stops", "It falls down"]},
]
NONE = [{"term": "accuracy", "weight": 0.9}, {"term": "format", "weight": 0.1}]


@reward_term("test_rl_prompts_own")
def own(sample: Sample) -> float:
    return 1.0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "plain.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def rewards(**keys):
    return RewardSet.from_config([{"term": "accuracy", "weight": 0.9, **keys}])


@pytest.mark.parametrize(
    ("truth", "options", "kind", "needed"),
    [
        (SENTENCE, None, "text", True),
        (SENTENCE, None, "auto", True),
        ("<answer>rolls left</answer>", None, "auto", True),
        ("Red.", None, "text", False),
        ("left-right", None, "text", True),
        ("B", None, "auto", False),
        ("It falls", {"A": "It stops", "B": "It falls"}, "auto", False),
        (r"\frac{1}{2}", None, "auto", False),
        ("rolls left", None, "maths", False),
    ],
)
def test_what_needs_a_reader(truth, options, kind, needed):
    assert needs_reader(truth, options, kind) == needed


def test_free_text_without_a_judge_is_counted_and_named(file):
    prompts = load_prompts(file)
    with pytest.raises(DataError, match=r"2 of 6 prompts have a free-text answer \(ids f0, f1\)") as error:
        check_judged(prompts, rewards(), "raise")
    assert "`judge: {base_url: .., model: ..}`" in str(error.value) and "the other 4 prompts" in str(error.value)
    kept = check_judged(prompts, rewards(), "skip")
    assert [p.id for p in kept] == ["w", "m", "s", "c"]
    assert [bad.id for bad in kept.bad] == ["f0", "f1"] and "has no `judge`" in kept.bad[0].reason


def test_only_free_text_leaves_nothing_to_skip(file):
    prompts = load_prompts(file)
    with pytest.raises(DataError, match="2 of 2 prompts") as error:
        check_judged(type(prompts)(prompts[:2]), rewards(), "skip")
    assert "on_bad" not in str(error.value)


def test_who_decides_free_text(file, tmp_path):
    prompts = load_prompts(file)
    judge = {"base_url": "http://localhost:1/v1", "model": "judge", "cache": str(tmp_path / "judge.db")}
    mine = RewardSet.from_config([{"term": "test_rl_prompts_own", "name": "accuracy", "weight": 1}])
    for decided in (rewards(judge=judge), rewards(exact_text=True), mine):
        assert check_judged(prompts, decided, "raise") is prompts
    beside = RewardSet.from_config([*NONE, {"term": "test_rl_prompts_own", "weight": 1}])  # does not say what is right
    with pytest.raises(DataError, match="2 of 6"):
        check_judged(prompts, beside, "raise")
    with pytest.raises(ConfigError, match="exact_text: true asks no judge"):
        rewards(judge=judge, exact_text=True)


def test_verl_s_dataset_asks_the_section_beside_its_own(file):
    data = {"max_prompt_length": 512, "future_l1": {"on_bad": "raise"}}
    whole = OmegaConf.create({"data": data, "weight": 0.9, "rewards": [{"term": "accuracy", "weight": "${weight}"}]})
    with pytest.raises(DataError, match="2 of 6 prompts"):
        LatentRLDataset([str(file)], None, whole.data)
    whole.data.future_l1.on_bad = "skip"
    assert [p.id for p in LatentRLDataset([str(file)], None, whole.data).prompts] == ["w", "m", "s", "c"]
    whole.rewards[0].exact_text = True
    assert len(LatentRLDataset([str(file)], None, whole.data)) == 6
    # Another host hands its own over.
    with pytest.raises(DataError, match="2 of 6 prompts"):
        LatentRLDataset([str(file)], None, data, rewards=rewards())


@pytest.mark.parametrize(
    ("seen", "said", "not_said"),
    [
        ({"no_verdict": 9, "too_hard": 3}, "`judge` of the entry `accuracy`", "checkpoint"),
        (
            {"too_hard": 9, "too_easy": 3},
            "Raise R, with which this run may go on; a new one may also start from a better checkpoint, use easier",
            "judge",
        ),
        ({"too_easy": 9}, "a new one may also use harder data, or switch the filter off (F).", "checkpoint"),
        ({"failed": 3, "too_hard": 1}, "why prompts fail", "checkpoint"),
    ],
)
def test_advice_fits_what_was_found(seen, said, not_said):
    found = GroupFilter((0.1, 0.9), "R", "F").way_out(seen)
    assert re.search(re.escape(said), found) and not_said not in found
