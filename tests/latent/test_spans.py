"""The batched span grammar against a single-row automaton that can be read in one breath."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent import LatentTokens, SpanBudget, SpanMachine, spans_of

TOKENS = LatentTokens(latent=7, start=8, end=9)
EOS, VOCABULARY = 2, 12
BUDGETS = [SpanBudget(4, exact=True), SpanBudget(3), SpanBudget(8), SpanBudget(1), SpanBudget(0), SpanBudget(0, True)]


class SlowRow:
    """One row in plain Python: `(token, latent, forced)` for each proposal."""

    def __init__(self, budget, force_start=False):
        self.budget, self.must_start = budget, force_start
        self.held = None  # latents of the open span, None outside

    def step(self, proposal):
        if self.must_start:
            self.must_start, self.held = False, 0
            return TOKENS.start, False, True
        if self.held is None:
            if proposal == TOKENS.start:
                self.held = 0
            return proposal, False, False
        if self.held == self.budget.limit:
            self.held = None
            return TOKENS.end, False, True
        if proposal == TOKENS.end and not self.budget.exact:
            self.held = None
            return TOKENS.end, False, False
        self.held += 1
        return TOKENS.latent, True, True


@pytest.mark.parametrize("force_start", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_machine_equals_the_slow_rows(budget, force_start):
    rows, steps = 24, 250
    rng = random.Random(f"{budget} {force_start}")
    # Rows of their own temper: how eagerly they open and close spans, or end the sequence.
    weights = [[1.0] * VOCABULARY for _ in range(rows)]
    for row in weights:
        row[TOKENS.start], row[TOKENS.end], row[EOS] = (rng.choice((0.5, 3, 12)) for _ in range(3))
    machine = SpanMachine(TOKENS, budget, rows, force_start=force_start)
    slow = [SlowRow(budget, force_start) for _ in range(rows)]
    made = [[] for _ in range(rows)]
    different = 0
    for _ in range(steps):
        # The host masks first: outside a span neither a latent nor an end marker can be proposed.
        allowed = torch.isfinite(machine.forbid(torch.zeros(rows, VOCABULARY)))
        proposals = [
            rng.choices(range(VOCABULARY), [w if ok else 0.0 for w, ok in zip(weight, fine, strict=True)])[0]
            for weight, fine in zip(weights, allowed.tolist(), strict=True)
        ]
        step = machine.step(torch.tensor(proposals))
        assert step.ids.dtype == torch.long and step.latent.dtype == step.forced.dtype == torch.bool
        expected = [row.step(proposal) for row, proposal in zip(slow, proposals, strict=True)]
        assert list(zip(*(part.tolist() for part in step), strict=True)) == expected
        assert machine.inside.tolist() == [row.held is not None for row in slow]
        different += machine.inside.unique().numel() == 2
        for row, token in zip(made, step.ids.tolist(), strict=True):
            row.append(token)
    assert different > steps // 4, "rows in different states"
    for row in made:
        spans = spans_of(row, TOKENS)  # raises where a row breaks the grammar, EOS inside a span included
        assert spans
        lengths = [length for _, length, closed in spans if closed]
        assert all(length == budget.limit if budget.exact else length <= budget.limit for length in lengths)
        assert not force_start or spans[0][0] == 0
        assert sum(length for _, length, _ in spans) == row.count(TOKENS.latent)
    if budget.limit and not budget.exact:
        every = {length for row in made for _, length, closed in spans_of(row, TOKENS) if closed}
        assert every >= {0, budget.limit}, "spans of no latent and spans that spend the budget"


def test_a_row_by_hand():
    machine = SpanMachine(TOKENS, SpanBudget(2), 1)
    proposals = [5, TOKENS.start, EOS, 4, 4, EOS, TOKENS.start, TOKENS.end, TOKENS.start, 4, TOKENS.end]
    steps = [machine.step(torch.tensor([proposal])) for proposal in proposals]
    z = TOKENS.latent
    assert [int(s.ids) for s in steps] == [5, 8, z, z, 9, EOS, 8, 9, 8, z, 9]
    assert [bool(s.latent) for s in steps] == [x == "z" for x in "..zz.....z."]
    assert [bool(s.forced) for s in steps] == [x == "f" for x in "..fff....f."]


def test_an_end_marker_proposed_when_the_budget_is_spent_counts_as_forced():
    """The grammar would have written it anyway, so it carries no log-probability."""
    machine = SpanMachine(TOKENS, SpanBudget(1), 1)
    for proposal in (TOKENS.start, 4):
        machine.step(torch.tensor([proposal]))
    step = machine.step(torch.tensor([TOKENS.end]))
    assert int(step.ids) == TOKENS.end and bool(step.forced)


def test_forbid_masks_two_entries_outside_spans_and_nothing_else():
    machine = SpanMachine(TOKENS, SpanBudget(3), 3)
    machine.step(torch.tensor([4, TOKENS.start, 4]))  # only row 1 is inside
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[1, TOKENS.latent] = -torch.inf  # what others banned stays banned
    before = logits.clone()
    out = machine.forbid(logits)
    assert out.data_ptr() == logits.data_ptr()  # in place, as documented
    expected = before.clone()
    for row in (0, 2):
        expected[row, [TOKENS.latent, TOKENS.end]] = -torch.inf
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbid_in_any_dtype(dtype):
    out = SpanMachine(TOKENS, SpanBudget(3), 2).forbid(torch.zeros(2, VOCABULARY, dtype=dtype))
    assert out.dtype == dtype
    assert out.isinf().nonzero().tolist() == [[0, 7], [0, 9], [1, 7], [1, 9]]


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "budget"),
    [
        (dict(max_latent_token=4), SpanBudget(8)),  # multiplier 2 by default
        (dict(max_latent_token=4, infer_latent_multiplier=1.0), SpanBudget(4)),
        (dict(max_latent_token=5, infer_latent_multiplier=1.5), SpanBudget(8)),  # 7.5
        (dict(max_latent_token=5, infer_latent_multiplier=1.3), SpanBudget(6)),  # 6.5, halves to even
        (dict(max_latent_token=4, infer_latent_multiplier=0.6), SpanBudget(2)),  # 2.4
        (dict(max_latent_token=4, infer_latent_multiplier=0.01), SpanBudget(1)),  # never below 1
        (dict(max_latent_token=4, infer_latent_multiplier="1.5"), SpanBudget(6)),
        (dict(max_latent_token=4, loose_latent_budget=6), SpanBudget(6)),
        (dict(max_latent_token=4, loose_latent_budget=6, infer_latent_multiplier=9), SpanBudget(6)),
        (dict(max_latent_token=4, loose_latent_budget=None, infer_latent_multiplier=3), SpanBudget(12)),
        (dict(max_latent_token=4, loose_latent_budget=0), SpanBudget(8)),  # released checkpoints: 0 is "not set"
        (dict(max_latent_token=4, fixed_latent_budget=True), SpanBudget(4, exact=True)),
        (dict(max_latent_token=4, fixed_latent_budget=True, loose_latent_budget=6), SpanBudget(4, exact=True)),
        (dict(max_latent_token=4, fixed_latent_budget=False, loose_latent_budget=1), SpanBudget(1)),
    ],
    ids=str,
)
def test_budget_from_config(keys, budget):
    assert SpanBudget.from_config(SimpleNamespace(**keys)) == budget


def test_negative_budget():
    with pytest.raises(ConfigError, match="expected a limit >= 0, found -1"):
        SpanBudget(-1)
    with pytest.raises(ConfigError, match="found -3"):
        SpanBudget.from_config(SimpleNamespace(max_latent_token=4, loose_latent_budget=-3))


# ---------------------------------------------------------------------------------------------------------------------
# Finished responses
# ---------------------------------------------------------------------------------------------------------------------


def test_spans_of_by_hand():
    row = [4, 8, 7, 7, 9, 4, 8, 9, 8, 7]
    assert spans_of(row, TOKENS) == [(1, 2, True), (6, 0, True), (8, 1, False)]
    assert spans_of([], TOKENS) == [] == spans_of([4, EOS], TOKENS)
    assert spans_of([8], TOKENS) == [(0, 0, False)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([4, 7], "position 1: id 7 outside of a latent span"),
        ([9], "position 0: id 9 outside of a latent span"),
        ([8, 7, 9, 9], "position 3: id 9 outside of a latent span"),
        ([8, 7, 4, 9], "position 2: expected a latent or its end marker in a span, found id 4"),
        ([8, 7, EOS], "position 2: expected a latent or its end marker in a span, found id 2"),
        ([8, 7, 8], "position 2: expected a latent or its end marker in a span, found id 8"),
    ],
)
def test_spans_of_broken_rows(row, message):
    with pytest.raises(ValueError, match=message):
        spans_of(row, TOKENS)


def test_choices_are_what_decoding_asks_the_model():
    """Two spans of 3 and 1 latents, as bits of two rows; the second row begins with a latent."""
    latent = torch.tensor([[0, 1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1]]).bool()
    for budget, expected in (
        (SpanBudget(8), [[0, 1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1]]),
        (SpanBudget(2), [[0, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1]]),
        (SpanBudget(1), [[0, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1, 0]]),
        (SpanBudget(0), [[0] * 7] * 2),
        (SpanBudget(3, exact=True), [[0] * 7] * 2),
    ):
        assert budget.choices(latent).int().tolist() == expected, budget


@pytest.mark.parametrize("budget", BUDGETS)
def test_choices_are_where_the_machine_listens(budget):
    """A span that goes on as long as it may: does the machine's answer depend on what the model proposes?"""
    machine = SpanMachine(TOKENS, budget, 1)
    machine.step(torch.tensor([TOKENS.start]))
    listens = []
    for _ in range(budget.limit):
        other = copy.deepcopy(machine)
        listens.append(machine.step(torch.tensor([EOS])).ids != other.step(torch.tensor([TOKENS.end])).ids)
    assert machine.step(torch.tensor([EOS])).ids == TOKENS.end
    latent = torch.tensor([[False] + [True] * (budget.limit + 1)])
    assert budget.choices(latent).tolist() == [[False, *map(bool, listens), False]]
