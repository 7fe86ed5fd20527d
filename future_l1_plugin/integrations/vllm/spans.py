"""The span grammar for requests that come and go, each with a budget of its own.

`SpanMachine` has B rows that step together under one budget. Here each request has a row in a table; a step gathers the
rows of its batch, lends them to the machine, and scatters what comes back. All on the device, without a host sync.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from future_l1_plugin.latent.spans import SpanBudget, SpanMachine, SpanStep, spans_of
from future_l1_plugin.latent.tokens import LatentTokens


class _Limits(NamedTuple):
    """The machine's budget, with a limit for each row. `exact` has come to its right before the machine steps."""

    limit: Tensor  # Long (B,)
    exact: bool = False


class SpanTable:
    """
    Args:
        rows: how many requests there can be at a time.
        force_start: the first id of each response is `<|latent_start|>`.
    """

    def __init__(self, tokens: LatentTokens, rows: int, device: torch.device | str, force_start: bool = False) -> None:
        self._machine = SpanMachine(tokens, SpanBudget(0), rows, device)
        self._tokens, self._force_start = tokens, force_start
        self._inside, self._length = self._machine.inside, self._machine.length
        self._exact = torch.zeros_like(self._inside)
        self._limit = torch.zeros_like(self._length)
        self._first = torch.zeros_like(self._inside)  # rows whose next id is a forced start marker

    def begin(self, row: int, budget: SpanBudget, response: list[int]) -> None:
        """A request takes the row. `response`: what it has said before, if it was preempted."""
        spans = spans_of(response, self._tokens)
        inside = bool(spans) and not spans[-1][2]
        write(self._inside, row, inside)
        write(self._length, row, spans[-1][1] if inside else 0)
        write(self._limit, row, budget.limit)
        write(self._exact, row, budget.exact)
        write(self._first, row, self._force_start and not response)

    def forbid(self, rows: Tensor, logits: Tensor) -> Tensor:
        """`SpanMachine.forbid` for logits (B, V) of these rows, Long (B,)."""
        self._machine.inside = self._inside[rows]
        return self._machine.forbid(logits)

    def step(self, rows: Tensor, proposal: Tensor, live: Tensor) -> SpanStep:
        """`SpanMachine.step` for these rows.

        Args:
            rows: Long (B,), no row twice.
            proposal: Long (B,), the model's own choices.
            live: Bool (B,). Rows that are not stay as they are, and what is answered for them has no meaning.
        """
        machine, first = self._machine, self._first[rows]
        # A start marker that is forced is a proposal which nothing overrules, and `exact` leaves the model no end.
        proposal = proposal.masked_fill(self._exact[rows] & (proposal == self._tokens.end), self._tokens.latent)
        proposal = proposal.masked_fill(first, self._tokens.start)
        machine.inside, machine.length, machine.budget = (
            self._inside[rows],
            self._length[rows],
            _Limits(self._limit[rows]),
        )
        step = machine.step(proposal)
        self._inside[rows] = torch.where(live, machine.inside, self._inside[rows])
        self._length[rows] = torch.where(live, machine.length, self._length[rows])
        self._first[rows] = first & ~live
        return SpanStep(step.ids, step.latent & live, step.forced | first)


def write(column: Tensor, row: int, value: int | bool) -> None:
    """column[row] = value, which would wait for the device: torch copies a single element, and fills a slice."""
    column[row : row + 1].fill_(value)
