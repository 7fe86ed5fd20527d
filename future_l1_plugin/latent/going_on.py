"""The choice to go on: the log-probability that the model does not end a span, for RL's losses and SFT's alike.

Inside a span the model proposes a token; if it is `<|latent_end|>` the span ends, whatever else it proposes the span
goes on with a latent. So the choice to go on has the probability 1 - p(end).

`continue_log_prob_at` is `continue_log_prob` at a few rows of large logits, without another buffer of their size.
Indexing rows out of logits (n, V) costs a gradient (n, V) of zeros around them, beside the one that the text's loss
makes: 10 GB for 16,384 tokens of a vocabulary of 151,936 in float32. Here the logits pass through, and on the way back
the few rows are added to the gradient that comes anyway. `overhear` does this inside a model's forward pass.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

#: Rows taken together; bounds what is held in float32 at a time.
_ROWS = 64


def continue_log_prob(logits: Tensor, end_id: int, temperature: float = 1.0) -> Tensor:
    """log(1 - p(end)): the log-probability that the model does not end the span at this position.

    Where the budget leaves that choice (`SpanBudget.choices`), SFT trains it, and in RL the action at a latent position
    is "go on, and with this z": hosts add this to `latent_log_prob`. It is a probability already and is not tempered.
    With a fixed budget there is no choice and nothing to add; an end marker that the budget forces is no action either
    and belongs in no mask.

    Args:
        logits: floating (N, V), N >= 0, V >= 2, of the position before the latent (the one that gave mu).
        end_id: id of `<|latent_end|>`.
        temperature: the rollout's, above 0. Top-p is ignored, as in the log-probabilities of tokens.

    Returns:
        (N,), float32 (float64 if logits are), at most 0, differentiable. Full relative precision for p(end) near 0
        (-p(end)) and near 1.

    Raises:
        ValueError, TypeError: shape, dtype, id outside the vocabulary, temperature.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"continue_log_prob: expected logits (N, V) with V >= 2, found {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"continue_log_prob: expected floating logits, found {logits.dtype}")
    if not 0 <= end_id < logits.shape[1]:
        raise ValueError(f"continue_log_prob: expected end_id in [0, {logits.shape[1]}), found {end_id}")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"continue_log_prob: expected a temperature above 0, found {temperature}; greedy decoding explores nothing."
            " Roll out and train at one temperature above 0."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled, end = _others_and_end(logits, logits.new_full((len(logits),), temperature, dtype=dtype), end_id)
    return logsigmoid(scaled.logsumexp(1) - end)


def continue_log_prob_at(logits: Tensor, at: Tensor, end_id: int, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """`continue_log_prob(logits.view(-1, V)[at] / temperature[:, None], end_id)`, with the gradient of it.

    Args:
        logits: floating (.., V).
        at: Long (K,), K >= 0: different rows of `logits.view(-1, V)`.
        end_id: id of `<|latent_end|>`.
        temperature: floating (K,), the rollout's, above 0.

    Returns:
        (logits, values). logits: the same tensor, for everything else that is made of them, or their gradient and this
        one would not meet; it must not be changed in place. values: (K,), float32 (float64 if logits are), at most 0.

    The gradient that reaches the returned logits is added to in place: it must belong to nobody else. What is computed
    from logits makes such a one, except where it hands its own gradient on (a plain sum of logits with a tensor).

    Raises:
        ValueError: `at` and `temperature` differ in length, or an id outside the vocabulary.
    """
    if at.shape != temperature.shape or at.ndim != 1:
        raise ValueError(
            f"going on: expected rows (K,) and their temperatures (K,), found {at.shape} and {temperature.shape}"
        )
    if not 0 <= end_id < logits.shape[-1]:
        raise ValueError(f"going on: expected end_id in [0, {logits.shape[-1]}), found {end_id}")
    return _GoingOn.apply(logits, at, temperature, end_id)


class _GoingOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, at: Tensor, temperature: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # zeros (n, V), if only the values are used
        rows = logits.reshape(-1, logits.shape[-1])[at]  # a copy: flash-attn's loss writes its gradient over logits
        ctx.save_for_backward(rows, at, temperature)
        ctx.end_id, ctx.shape, ctx.dtype = end_id, logits.shape, logits.dtype
        parts = [_others_and_end(rows[i : i + _ROWS], temperature[i : i + _ROWS], end_id) for i in _starts(rows)]
        values = [logsigmoid(scaled.logsumexp(1) - end) for scaled, end in parts]
        return logits.view_as(logits), torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_values: Tensor | None):
        if grad_values is None:
            return grad, None, None, None
        rows, at, temperature = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=rows.device)
        grad = grad.contiguous()
        flat = grad.view(-1, ctx.shape[-1])
        for i in _starts(rows):
            part = slice(i, i + _ROWS)
            scaled, end = _others_and_end(rows[part], temperature[part], ctx.end_id)
            # d/ds logsigmoid(logsumexp(others) - end): p(end) times the softmax of the others, and -p(end) at the end.
            p_end = (end - scaled.logsumexp(1)).sigmoid()
            slope = scaled.softmax(1)
            slope[:, ctx.end_id] = -1.0
            slope *= (grad_values[part].to(slope) * p_end / temperature[part].to(slope))[:, None]
            flat.index_add_(0, at[part], slope.to(flat.dtype))
        return grad, None, None, None


def _starts(rows: Tensor) -> range:
    return range(0, max(1, len(rows)), _ROWS)  # none at all are one empty part


def _others_and_end(rows: Tensor, temperature: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """Scaled logits (k, V) with -inf at the end, and the end's (k,), in float32 or wider.

    1 - p(end) is the sigmoid of (all the others' logit - the end's): no 1 - p is ever formed.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scaled = rows.to(dtype) / temperature.to(dtype)[:, None]
    end = scaled[:, end_id].clone()
    scaled[:, end_id] = -torch.inf
    return scaled, end


@contextmanager
def overhear(model: nn.Module, choices: Tensor, end_id: int) -> Iterator[list[Tensor]]:
    """What a model's forward pass, made within, says of going on.

    The logits stay the model's one tensor, from which it makes its own loss; no class is patched.

    Args:
        choices: Bool (B, T), True at the latents that are asked for, none in column 0.
        end_id: id of `<|latent_end|>`.

    Yields:
        A list to which the pass appends log(1 - p(end)) (K,), float32 with gradient, in reading order, p of the logits
        one position before each latent. It stays empty where K is 0.

    Raises (in the pass):
        RuntimeError: logits of other positions than those of `choices`.
    """
    rows, columns = choices.nonzero().T
    at = rows * choices.shape[1] + columns - 1
    found: list[Tensor] = []

    def listen(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if logits.shape[:2] != choices.shape:
            raise RuntimeError(f"overhear: expected logits of {tuple(choices.shape)}, found {tuple(logits.shape)}")
        ones = torch.ones_like(at, dtype=torch.float32)  # the temperature
        logits, values = continue_log_prob_at(logits, at, end_id, ones)
        found.append(values)
        return logits

    if not len(at):
        yield found
        return
    handle = _lm_head(model).register_forward_hook(listen)
    try:
        yield found
    finally:
        handle.remove()


def _lm_head(model: nn.Module) -> nn.Module:
    """The module that makes logits, inside any wrapper and with what an adapter wraps around it."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "lm_head":
            return module
    raise TypeError(f"{type(model).__name__}: found no `lm_head` in it")
