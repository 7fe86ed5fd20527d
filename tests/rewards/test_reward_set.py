"""Terms by name and the weighted sum: recipes that are refused, values by hand, what users add."""

import asyncio
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from itertools import count

import numpy as np
import pytest
import torch

import future_l1_plugin.rewards as rewards
from future_l1_plugin.errors import ConfigError, RewardError
from future_l1_plugin.rewards import RewardSet, Sample, reward_term, term_names
from future_l1_plugin.rewards.registry import _TERMS, find_term

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]
LATENT = "<|latent_start|><|latent|><|latent_end|>"
PAPER = [
    {"term": "accuracy", "weight": 0.9},
    {"term": "format", "weight": 0.1},
    {"term": "r_ctr", "weight": 0.2, "temperature": 0.5},
    {"term": "r_div", "weight": 0.1},
]
NAMES = (f"s{number}" for number in count())


def make(answer="B", latents=(EAST, EAST), span=(0, 1), **changes):
    values = dict(
        text=f"<reason>so</reason>{LATENT}<reason>then</reason><answer>{answer}</answer><|im_end|>",
        response_ids=torch.arange(20),
        latents=torch.tensor(latents).reshape(-1, 2),
        span=torch.tensor(span, dtype=torch.long),
        ground_truth="B",
        sample_id=next(NAMES),
        max_response_length=100,
        question="Where to?",
    )
    return Sample(**{**values, **changes})


def score(rewards, samples):
    """Both steps, as a host takes them."""

    async def all_of_them():
        return await asyncio.gather(*(rewards.score_sample(sample) for sample in samples))

    return rewards.score_group(samples, asyncio.run(all_of_them()))


@pytest.fixture
def term():
    """`reward_term`, whose registrations end with the test."""
    before = dict(_TERMS)
    yield reward_term
    _TERMS.clear()
    _TERMS.update(before)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a user's module and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(_TERMS)
    names = []

    def write(source):
        names.append(f"users_rewards_{tmp_path.name}_{len(names)}".replace("-", "_"))
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    _TERMS.clear()
    _TERMS.update(before)
    for name in names:
        sys.modules.pop(name, None)


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_the_papers_reward_by_hand():
    samples = [make("B"), make("B", [EAST, NORTH]), make("C", [NORTH, NORTH]), make("B", [], [])]
    totals, terms = score(RewardSet.from_config(PAPER), samples)
    assert list(terms) == ["accuracy", "format", "r_ctr", "r_div"]
    assert terms["accuracy"] == [1.0, 1.0, 0.0, 1.0]
    assert terms["format"] == [1.0] * 4
    assert terms["r_div"] == pytest.approx([-1.0, 0.0, -1.0, 0.0])
    # Similarities: 0 to 1 3/4, 0 to 2 1/2, 1 to 2 3/4. Rollout 3 has no latents and is nobody's positive.
    e = math.e
    expected = [e**1.5 / (e**1.5 + e), 0.5, 1.0, 0.0]
    assert terms["r_ctr"] == pytest.approx(expected, rel=1e-6)
    assert totals == pytest.approx(
        [0.9 + 0.1 + 0.2 * expected[0] - 0.1, 0.9 + 0.1 + 0.1, 0.1 + 0.2 - 0.1, 0.9 + 0.1], rel=1e-6
    )


def test_weight_0_reports_a_term_without_rewarding_it():
    totals, terms = score(RewardSet.from_config([{"term": "accuracy", "weight": 0}, PAPER[1]]), [make("B"), make("C")])
    assert (totals, terms["accuracy"]) == ([0.1, 0.1], [1.0, 0.0])


def test_order_of_the_recipe_does_not_matter():
    samples = [make("B"), make("C", [NORTH, EAST]), make("B", [NORTH, NORTH])]
    forward, backward = (score(RewardSet.from_config(rows), samples)[0] for rows in (PAPER, PAPER[::-1]))
    assert forward == pytest.approx(backward, abs=1e-15)


def test_one_term_twice_under_two_names():
    rows = [
        {"term": "format", "weight": 1},
        {"term": "format", "weight": 10, "name": "strict", "mode": "reason_first"},
    ]
    latent_first = make(text=f"{LATENT}<reason>a</reason><answer>B</answer>")
    totals, terms = score(RewardSet.from_config(rows), [make(), latent_first])
    assert totals == [11.0, 1.0] and terms == {"format": [1.0, 1.0], "strict": [1.0, 0.0]}


def test_the_terms_on_text_and_length():
    rows = [
        {"term": "repetition", "weight": -1, "n": 1},
        {"term": "length", "weight": -1},
        {"term": "overlong", "weight": 1, "buffer": 90},
    ]
    sample = make(text="a b a b")  # 20 of 100 tokens; (100 - 90 - 20) / 90
    _, terms = score(RewardSet.from_config(rows), [sample])
    assert terms == {"repetition": [0.5], "length": [0.2], "overlong": [pytest.approx(-1 / 9)]}


def test_metrics_are_means_by_name():
    rewards = RewardSet.from_config(PAPER)
    samples = [make("B"), make("C", [EAST], [0])]
    totals, terms = score(rewards, samples)
    metrics = rewards.metrics(samples, totals, terms)
    assert set(metrics) == {
        "reward",
        *("reward/accuracy", "reward/accuracy/repetition"),
        "reward/format",
        "reward/r_ctr",
        *("reward/r_div", "reward/r_div/adjacent_cosine"),
    }
    assert metrics["reward"] == pytest.approx(sum(totals) / 2)
    assert metrics["reward/accuracy"] == 0.5
    assert metrics["reward/r_div/adjacent_cosine"] == pytest.approx(1.0)  # the second sample has no pair of spans
    totals, terms = score(rewards, samples[1:])
    assert "reward/r_div/adjacent_cosine" not in rewards.metrics(samples[1:], totals, terms)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def circles(times):
    return make(text=f"<reason>{'round and round we go ' * times}</reason><answer>B</answer>")


def accuracies(keywords, samples):
    return score(RewardSet.from_config([{"term": "accuracy", "weight": 1, **keywords}]), samples)[1]["accuracy"]


def test_text_that_goes_round_in_circles_counts_as_minus_1():
    assert accuracies({}, [make(), circles(50)]) == [1.0, -1.0]
    assert accuracies({"repetition_limit": None}, [circles(50)]) == [1.0]
    assert accuracies({"repetition_limit": 0.99}, [circles(50)]) == [1.0]
    # "Above", not "at": five equal words hold two 4-grams, half of them repeated.
    assert accuracies({}, [make(text="a a a a a", ground_truth="7"), make(text="a a a a a a", ground_truth="7")]) == [
        0.0,
        -1.0,
    ]


def seen_as_correct(term, samples, **keywords):
    seen = []

    @term("look", scope="group")
    def look(samples):
        seen.extend(sample.correct for sample in samples)
        return [0.0] * len(samples)

    rows = [{"term": "accuracy", "weight": 1, **keywords}, {"term": "look", "weight": 1}]
    score(RewardSet.from_config(rows), samples)
    return seen


def test_correct_is_what_the_accuracy_says(term):
    undecided = make("it falls", ground_truth="it drops")
    assert seen_as_correct(term, [make("B"), make("C"), circles(50), undecided]) == [True, False, False, False]


def test_correct_from_a_half_on_of_whatever_is_named_accuracy(term):
    @term("graded")
    def graded(sample):
        return sample.extra["grade"]

    @term("look", scope="group")
    def look(samples):
        return [float(sample.correct) for sample in samples]

    rows = [{"term": "graded", "name": "accuracy", "weight": 1}, {"term": "look", "weight": 1}]
    samples = [make(extra={"grade": grade}) for grade in (0.49, 0.5, 1)]
    assert score(RewardSet.from_config(rows), samples)[1]["look"] == [0.0, 1.0, 1.0]
    samples = [replace(sample, correct=None) for sample in samples]
    assert RewardSet.from_config(rows).score_group(samples, [{"accuracy": 1.0}] * 3)[1]["look"] == [1.0] * 3
    assert samples[0].correct is None  # the samples of the caller stay as they are


class FakeJudge:
    def __init__(self):
        self.asked = []

    async def judge(self, question, ground_truth, answer, sample_id):
        await asyncio.sleep(0)
        self.asked.append((question, ground_truth, answer, sample_id))
        if answer == "unreachable":
            raise TimeoutError("no verdict")
        return float("drop" in answer)


def test_the_judge_is_asked_only_where_the_rule_cannot_tell(monkeypatch):
    judge, built = FakeJudge(), []
    monkeypatch.setattr("future_l1_plugin.rewards.judge.build_judge", lambda s: built.append(s) or judge)
    rows = [{"term": "accuracy", "weight": 1, "judge": {"model": "m"}}]
    rewards = RewardSet.from_config(rows)
    truth = dict(ground_truth="it falls")
    samples = [make("It falls.", **truth), make("it drops", **truth), make("it flies", **truth), make("", **truth)]
    samples += [make("C"), circles(50)]
    assert score(rewards, samples)[1]["accuracy"] == [1.0, 1.0, 0.0, 0.0, 0.0, -1.0]
    assert judge.asked == [
        ("Where to?", "it falls", "it drops", samples[1].sample_id),
        ("Where to?", "it falls", "it flies", samples[2].sample_id),
    ]
    assert built == [{"model": "m"}] and rows[0]["judge"] == {"model": "m"}
    with pytest.raises(TimeoutError, match="no verdict"):  # as it was raised, not as an error of the term
        score(rewards, [make("unreachable", **truth)])


def test_settings_that_the_judge_refuses_are_told_with_the_recipe():
    with pytest.raises(ConfigError, match=r"entry 1: `accuracy`: judge: .*modle"):
        RewardSet.from_config([{"term": "accuracy", "weight": 1, "judge": {"modle": "m"}}])


# -- recipes that are refused ------------------------------------------------------------------------------------------

FORMAT = {"term": "format", "weight": 0.1}
BAD = [
    ({"term": "format", "weight": 1}, "expected a list of entries such as {term: accuracy, weight: 0.9}"),
    ([], "the list is empty"),
    (["format"], "entry 1: expected keys and values such as .* found 'format'"),
    ([{"weight": 1}], "entry 1: expected one of `term` and `import_path`"),
    ([{**FORMAT, "import_path": "a:b"}], "entry 1: expected one of `term` and `import_path`"),
    ([{"term": "fromat", "weight": 1}], "unknown term 'fromat'. Did you mean `format`\\? Terms: accuracy, format"),
    ([{"term": "format"}], "`format`: `weight` is None, expected a finite number"),
    ([{"term": "format", "weight": "1e-1"}], "`weight` is '1e-1', expected a finite number"),
    ([{"term": "format", "weight": math.nan}], "`weight` is nan"),
    ([{"term": "format", "weight": True}], "`weight` is True"),
    ([{**FORMAT, "mdoe": "any"}], "`format`: unknown keyword `mdoe`. Did you mean `mode`\\? Valid keywords: mode."),
    ([{"term": "r_div", "weight": 1, "n": 1}], "unknown keyword `n`. Valid keywords: none."),
    ([{"term": "overlong", "weight": 1}], "`overlong`: `buffer` must be given"),
    ([{"term": "overlong", "weight": 1, "buffer": "8"}], "`buffer` is '8', expected int"),
    ([{"term": "overlong", "weight": 1, "buffer": 8.5}], "`buffer` is 8.5, expected int"),
    ([{"term": "overlong", "weight": 1, "buffer": True}], "`buffer` is True, expected int"),
    ([{"term": "overlong", "weight": 1, "buffer": 0}], "`overlong`: buffer: expected 1 or more tokens, found 0"),
    ([{**FORMAT, "mode": "some"}], "`format`: mode: expected one of any, reason_first, text, found 'some'"),
    ([{"term": "repetition", "weight": 1, "n": 0}], "`repetition`: n: expected at least 1"),
    ([PAPER[0], {"term": "r_ctr", "weight": 1, "temperature": 0}], "`r_ctr`: temperature: expected a positive number"),
    ([{"term": "accuracy", "weight": 1, "repetition_limit": 50}], "repetition_limit: expected a share"),
    ([{"term": "accuracy", "weight": 1, "judge": "gpt"}], "`judge` is 'gpt', expected"),
    ([FORMAT, FORMAT], "2 entries are named `format`. Give all but one another `name:`"),
    ([FORMAT, {"term": "r_div", "weight": 1, "name": "format"}], "2 entries are named `format`"),
    ([PAPER[2]], "`r_ctr` needs to know which rollouts are correct.* Add {term: accuracy, weight: 0}"),
    ([PAPER[2], {**PAPER[0], "name": "acc"}], "no entry is named `accuracy`"),
    ([{**PAPER[2], "name": "accuracy"}], "`accuracy` is the group term r_ctr, expected a per-sample term"),
    ([{"import_path": "no_such_package.mod:f", "weight": 1}], "there is no module 'no_such_package'"),
    ([{"import_path": "math", "weight": 1}], "import_path 'math': expected \"pkg.mod:name\""),
    ([{"import_path": "json:dunps", "weight": 1}], "json has no function 'dunps'. Did you mean `dumps`\\?"),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_bad_recipes_name_what_is_wrong(config, message):
    with pytest.raises(ConfigError, match=f"(?s)^rewards: .*{message}"):
        RewardSet.from_config(config)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as raised:
        RewardSet.from_config([{"term": "x", "weight": 1}, FORMAT, {"term": "format", "weight": "y"}, FORMAT])
    lines = str(raised.value).split("\n  ")
    assert [line[:17] for line in lines] == ["rewards: entry 1:", "entry 3: `format`", "2 entries are nam"]
    assert "rewards: entry 1: unknown term 'x'" in str(raised.value)


def test_a_group_term_may_carry_no_accuracy_if_it_needs_none(term):
    @term("flat", scope="group")
    def flat(samples):
        return [1.0 for sample in samples if sample.correct is None]

    assert score(RewardSet.from_config([{"term": "flat", "weight": 2}]), [make()])[0] == [2.0]


# -- users' own terms --------------------------------------------------------------------------------------------------


def test_a_function_by_its_path(module):
    name = module("def short(sample, *, limit: int = 5):\n    return len(sample.response_ids) <= limit\n")
    rows = [{"import_path": f"{name}:short", "weight": 0.5, "limit": 20}]
    totals, terms = score(RewardSet.from_config(rows), [make(), make(response_ids=torch.arange(21))])
    assert totals == [0.5, 0.0] and terms == {"short": [1.0, 0.0]}
    with pytest.raises(ConfigError, match=r"`short`: unknown keyword `limti`\. Did you mean `limit`"):
        RewardSet.from_config([{"import_path": f"{name}:short", "weight": 0.5, "limti": 20}])


def test_a_decorated_function_by_its_path_keeps_scope_and_name(module):
    name = module(
        "from future_l1_plugin.rewards import reward_term\n"
        "@reward_term('rank', scope='group')\n"
        "def _any_name(samples, **anything):\n"
        "    return [anything['start'] + i for i, _ in enumerate(samples)]\n"
    )
    rows = [{"import_path": f"{name}:_any_name", "weight": 1, "start": 3}]
    assert score(RewardSet.from_config(rows), [make(), make()])[1] == {"rank": [3.0, 4.0]}
    assert "rank" in term_names()
    assert RewardSet.from_config([{"term": "rank", "weight": 1}]).names == ("rank",)


def test_an_async_function_with_postponed_annotations(module):
    name = module(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "import asyncio\n"
        "if TYPE_CHECKING:\n"
        "    from future_l1_plugin.rewards import Sample\n"
        "async def slow(sample: Sample, wait: float = 0.0) -> float:\n"
        "    await asyncio.sleep(wait)\n"
        "    return 0.25\n"
    )
    assert score(RewardSet.from_config([{"import_path": f"{name}:slow", "weight": 2}]), [make()])[0] == [0.5]


def test_a_module_that_cannot_be_imported_says_so_itself(module):
    name = module("import no_such_package_of_theirs\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_theirs"):
        RewardSet.from_config([{"import_path": f"{name}:f", "weight": 1}])


def test_numbers_of_numpy_and_torch_are_numbers(term):
    values = iter([np.float32(0.5), torch.tensor(0.5), 1, True])

    @term("numbers")
    def numbers(sample):
        return next(values)

    @term("vector", scope="group")
    def vector(samples):
        return torch.arange(len(samples))

    rows = [{"term": "numbers", "weight": 1}, {"term": "vector", "weight": 1}]
    assert score(RewardSet.from_config(rows), [make() for _ in range(4)])[0] == [0.5, 1.5, 3.0, 4.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", [1.0], torch.tensor([1.0]), 1j])
def test_a_term_that_gives_no_finite_number_is_named(term, value):
    @term("odd")
    def odd(sample):
        return value

    with pytest.raises(RewardError, match=r"reward term 'odd', sample 'q7': expected a finite number, found .* Fix"):
        score(RewardSet.from_config([{"term": "odd", "weight": 0}]), [make(sample_id="q7")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "expected a list of 2 numbers, one for each sample, found list of length 1"),
        (1.0, "expected a list of 2 numbers, one for each sample, found float \\(1.0\\)"),
        ([1.0, math.nan], "sample 'q8': expected a finite number, found nan"),
        ([1.0, None], "sample 'q8': expected a finite number, found None"),
    ],
)
def test_a_group_term_that_gives_anything_else_is_named(term, values, message):
    @term("odd", scope="group")
    def odd(samples):
        return values

    with pytest.raises(RewardError, match=f"reward term 'odd', .*{message}"):
        score(RewardSet.from_config([{"term": "odd", "weight": 1}]), [make(sample_id="q7"), make(sample_id="q8")])


def test_bad_registrations_are_refused(term):
    with pytest.raises(ConfigError, match="expected scope sample or group, found 'batch'"):
        term("x", scope="batch")
    with pytest.raises(ConfigError, match="`needs_accuracy` is for terms of scope group"):
        term("x", needs_accuracy=True)
    with pytest.raises(ConfigError, match=r"'format': the name is taken by .*format_term"):
        term("format")(lambda sample: 0.0)
    with pytest.raises(ConfigError, match="takes no positional argument for the sample"):
        term("x")(lambda *, limit: 0.0)

    async def later(samples):
        return []

    with pytest.raises(ConfigError, match="is async, which only terms of scope sample may be"):
        term("x", scope="group")(later)


def test_registering_a_function_again_replaces_it(term):
    """As in a notebook, where a cell is run twice."""
    for value in (1.0, 2.0):

        @term("mine")
        def mine(sample, value=value):
            return value

    assert find_term("mine").function is mine
    assert mine(None) == 2.0  # the decorator leaves the function as it is


# -- samples and scores that do not fit --------------------------------------------------------------------------------


def test_samples_are_checked_and_frozen():
    with pytest.raises(RewardError, match=r"sample 'q7': expected latents .* found \(2, 2\) and \(1,\)"):
        make(span=(0,), sample_id="q7")
    with pytest.raises(RewardError, match=r"sample 'q7': .* found \(2,\) and \(2,\)"):
        replace(make(sample_id="q7"), latents=torch.ones(2))
    with pytest.raises(RewardError, match=r"sample 'q7': expected a kind of answer, one of auto, .* found 'math'"):
        make(kind="math", sample_id="q7")
    with pytest.raises(FrozenInstanceError):
        make().text = ""


def test_errors_of_the_built_in_terms_name_the_samples():
    broken = make(latents=[EAST, [math.nan, 0.0]], sample_id="q8")
    rows = [PAPER[0], PAPER[2]]
    with pytest.raises(RewardError, match=r"'r_ctr', group of the samples 'q7', 'q8': latents of rollout 1: .* NaN"):
        score(RewardSet.from_config(rows), [make(sample_id="q7"), broken])
    with pytest.raises(RewardError, match="'r_div', sample 'q8': latents: expected finite values"):
        score(RewardSet.from_config([PAPER[3]]), [broken])
    with pytest.raises(RewardError, match="sample 'q9': ground_truth: expected the right answer, found ''"):
        score(RewardSet.from_config(rows), [make(ground_truth="", sample_id="q9")])


def test_scores_of_another_recipe_are_refused():
    rewards = RewardSet.from_config(PAPER)
    samples = [make(sample_id="q7")]
    with pytest.raises(RewardError, match="expected the scores of 1 samples, found 0"):
        rewards.score_group(samples, [])
    with pytest.raises(RewardError, match="sample 'q7': expected scores named accuracy, format, r_div, found accuracy"):
        rewards.score_group(samples, [{"accuracy": 1.0}])


# -- imports -----------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert all(callable(getattr(rewards, name)) for name in rewards.__all__)
    assert rewards.accuracy("<answer>7</answer>", "7") == 1.0  # the function, whatever was imported before
    with pytest.raises(AttributeError, match="no_such_name"):
        rewards.no_such_name  # noqa: B018


def test_a_recipe_without_tensors_loads_no_torch_and_no_grader():
    code = (
        "import sys\n"
        "from future_l1_plugin.rewards import RewardSet\n"
        "RewardSet.from_config([{'term': 'accuracy', 'weight': 1}, {'term': 'format', 'weight': 1}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sympy', 'mathruler', 'omegaconf', 'openai')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
