"""Self-Extend by torch's flash kernel: without a matrix of scores, forward and backward.

Shapes: queries `(batch, heads, queries, channels)`, keys and values `(batch, key heads, keys, channels)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FlashSelfExtend(torch.autograd.Function):
    """Two flash attentions, merged by their log-sum-exp: exact, and no score is kept.

    Neighbours are a causal sliding window. What lies further away is causal attention with the window cut off: query
    `i` reads the keys up to `i - window`. Backward, each part is flash's own with the output and log-sum-exp of the
    whole: its probabilities are then those of the one softmax over both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        far_query: Tensor,
        far_key: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        """Attend.

        Args:
            ctx: autograd's.
            query: Rotated to true positions; the last keys are those of the queries.
            key: Rotated to true positions.
            value: Values.
            far_query: Rotated to grouped positions: the queries that see a key beyond the window.
            far_key: Rotated to grouped positions: all keys but the last `window`.
            scale: Of the scores.
            window: Distance from which grouped positions count.
        """
        out, log_sum, state = flash_forward(query, key, value, scale, window)
        if far_query.shape[2]:
            rows = slice(query.shape[2] - far_query.shape[2], None)
            far_value = value[:, :, : far_key.shape[2]]
            far_out, far_sum, far_state = flash_forward(far_query, far_key, far_value, scale, None)
            near_sum = log_sum[:, :, rows].clone()
            log_sum[:, :, rows] = torch.logaddexp(near_sum, far_sum)
            near_part, far_part = ((part - log_sum[:, :, rows]).exp().unsqueeze(-1) for part in (near_sum, far_sum))
            out[:, :, rows] = (out[:, :, rows] * near_part + far_out * far_part).to(out.dtype)
            state += far_state
        ctx.save_for_backward(query, key, value, far_query, far_key, out, log_sum, *state)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of both parts."""
        query, key, value, far_query, far_key, out, log_sum, *states = ctx.saved_tensors
        (grad,) = grads
        dq, dk, dv = flash_backward(grad, query, key, value, out, log_sum, states[:2], ctx.scale, ctx.window)
        if not far_query.shape[2]:
            return dq, dk, dv, None, None, None, None
        rows, far_value = slice(query.shape[2] - far_query.shape[2], None), value[:, :, : far_key.shape[2]]
        far = (grad[:, :, rows], far_query, far_key, far_value, out[:, :, rows], log_sum[:, :, rows].contiguous())
        far_dq, far_dk, far_dv = flash_backward(*far, states[2:], ctx.scale, None)
        dv[:, :, : far_key.shape[2]] += far_dv
        return dq, dk, dv, far_dq, far_dk, None, None


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run torch's flash kernel: causal, aligned at the last query and key, within a window if one is given.

    Returns:
        Output, natural log-sum-exp of the scores `(batch, heads, queries)`, and the two tensors that backward wants.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, log_sum, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, window is None, False, scale=scale, **limits
    )
    return out.transpose(1, 2), log_sum, tuple(state)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    state: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward of `flash_forward` for an output and log-sum-exp that may be those of a larger softmax."""
    g, q, k, v, o = (x.transpose(1, 2) for x in (grad.contiguous(), query, key, value, out))
    limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    grads = torch.ops.aten._flash_attention_backward(
        g, q, k, v, o, log_sum, None, None, q.shape[1], k.shape[1], 0.0, window is None, *state, scale=scale, **limits
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def fits_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernel takes these heads."""
    channels = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[2] > 1
        and channels == value.shape[-1]
        and channels % 8 == 0
        and channels <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and not torch.compiler.is_compiling()
    )
