"""log(1 - p(end)) at a few rows of large logits: against the plain form and autograd, and what it costs."""

import pytest
import torch

from future_l1_plugin.la_dapo import continue_log_prob, continue_log_prob_at

END = 3


def case(dtype=torch.float64, rows=(1, 4, 5), shape=(2, 3, 7)):
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, torch.tensor(rows, dtype=torch.long), torch.tensor([0.5, 0.8, 1.3][: len(rows)])


def text_loss(logits, temperature=0.7):
    return (logits / temperature).log_softmax(-1)[..., 2].sum()


def by_indexing(logits, at, temperature):
    return continue_log_prob(logits.view(-1, logits.shape[-1])[at] / temperature[:, None], END)


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("rows", [(1, 4, 5), ()])
def test_value_and_gradient_are_those_of_indexing(rows, with_text):
    logits, at, temperature = case(rows=rows)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[: len(rows)]
    expected = by_indexing(logits, at, temperature)
    loss = (expected * weights).sum() + (text_loss(logits) if with_text else 0.0)
    (gradient,) = torch.autograd.grad(loss, logits)

    through, values = continue_log_prob_at(logits, at, END, temperature)
    assert torch.equal(through, logits) and through.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    loss = (values * weights).sum() + (text_loss(through) if with_text else 0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, rtol=1e-12, atol=1e-15)


def test_a_gradient_that_is_one_number_seen_many_times_is_not_written_to():
    logits, at, temperature = case()
    through, values = continue_log_prob_at(logits, at, END, temperature)
    (through.sum() + values.sum()).backward()
    (plain,) = torch.autograd.grad(by_indexing(logits, at, temperature).sum(), logits)
    torch.testing.assert_close(logits.grad, plain + 1)


def test_by_finite_differences_and_in_bfloat16():
    logits, at, temperature = case()

    def loss(logits):
        through, values = continue_log_prob_at(logits, at, END, temperature)
        return values.sum() + text_loss(through)

    assert torch.autograd.gradcheck(loss, (logits,))
    half, at, temperature = case(torch.bfloat16)
    values = continue_log_prob_at(half, at, END, temperature)[1]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, by_indexing(half.detach().float(), at, temperature))
    with torch.no_grad():
        assert torch.equal(continue_log_prob_at(half, at, END, temperature)[1], values)


def test_many_rows_go_in_parts():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    at, temperature = torch.randperm(200, generator=rng)[:150], torch.rand(150, generator=rng) + 0.5
    expected = by_indexing(logits, at, temperature)
    (gradient,) = torch.autograd.grad(expected.square().sum() + text_loss(logits), logits)
    through, values = continue_log_prob_at(logits, at, END, temperature)
    torch.testing.assert_close(values, expected)
    (found,) = torch.autograd.grad(values.square().sum() + text_loss(through), logits)
    torch.testing.assert_close(found, gradient)


def peak(run):
    """Bytes allocated by torch at the worst moment of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_it_costs_rows_and_not_logits():
    n, vocabulary, k = 1024, 4000, 16
    whole, rows = 4 * n * vocabulary, 4 * k * vocabulary
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(8, vocabulary)
    at, temperature = torch.arange(k) * 60, torch.full((k,), 0.7)

    def text():
        return text_loss(hidden @ weight)

    def both():
        logits, values = continue_log_prob_at(hidden @ weight, at, END, temperature)
        return text_loss(logits) + values.sum()

    def indexed():
        logits = hidden @ weight
        return text_loss(logits) + by_indexing(logits, at, temperature).sum()

    costs = {run.__name__: peak(lambda run=run: run().backward()) for run in (text, both, indexed)}
    assert costs["both"] - costs["text"] < 5 * rows
    assert costs["indexed"] - costs["text"] > 0.9 * whole  # what it was; the counter sees it


def test_errors():
    logits, at, temperature = case()
    with pytest.raises(ValueError, match=r"going on: expected rows \(K,\) and their temperatures"):
        continue_log_prob_at(logits, at, END, temperature[:2])
    with pytest.raises(ValueError, match=r"expected end_id in \[0, 7\), found 7"):
        continue_log_prob_at(logits, at, 7, temperature)
