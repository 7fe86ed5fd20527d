"""`continue_log_prob` at a few rows of large logits, without another buffer of their size.

Indexing rows out of logits (n, V) costs a gradient (n, V) of zeros around them, beside the one that the text's loss
makes: 10 GB for 16,384 tokens of a vocabulary of 151,936 in float32. Here the logits pass through, and on the way back
the few rows are added to the gradient that comes anyway.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

#: Rows taken together; bounds what is held in float32 at a time.
_ROWS = 64


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
        # 1 - p(end) is the sigmoid of (all the others' logit - the end's): no 1 - p is ever formed.
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
    """Scaled logits (k, V) with -inf at the end, and the end's (k,), in float32 or wider."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scaled = rows.to(dtype) / temperature.to(dtype)[:, None]
    end = scaled[:, end_id].clone()
    scaled[:, end_id] = -torch.inf
    return scaled, end
