"""The operation itself: multiply every head of a tensor by its scale, exactly and without extra saved memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Tokens per step when the scale's gradient is summed, which bounds the fp32 copies of input and gradient.
_CHUNK = 4096


def scale_heads(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply the heads of `x` by `scale`, in fp32 inside, keeping the dtype of `x`.

    Args:
        x: Concatenated heads, shape `(..., num_heads * head_dim)`.
        scale: Shape `(num_heads, 1)` or `(num_heads, head_dim)`.

    Returns:
        A tensor like `x`.
    """
    heads = x.unflatten(-1, (scale.shape[-2], -1))
    if torch.compiler.is_compiling():
        # The compiler fuses cast and product, and chooses what to save, better than an opaque function lets it.
        return (heads * scale).to(x.dtype).flatten(-2)
    return _ScaleHeads.apply(heads, scale).flatten(-2)


def scale_rows(x: Tensor, row_scale: Tensor) -> Tensor:
    """Multiply the heads of every row of a batch by the row's own scale, keeping the dtype of `x`.

    Args:
        x: Concatenated heads, shape `(batch, tokens, num_heads * head_dim)`.
        row_scale: Shape `(batch, num_heads, 1)` or `(batch, num_heads, head_dim)`, fp32.

    Raises:
        ValueError: The batch has another number of rows than adapter names were given.
    """
    if x.shape[0] != row_scale.shape[0]:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {row_scale.shape[0]} and "
            f"{x.shape[0]} respectively."
        )
    scale = row_scale.unsqueeze(1)
    return (x.unflatten(-1, (scale.shape[-2], -1)) * scale).to(x.dtype).flatten(-2)


def _product(x: Tensor, scale: Tensor) -> Tensor:
    """Product in the wider dtype of the two, rounded once to the dtype of `x`."""
    if x.dtype == scale.dtype:
        return x * scale
    # Writing straight into the narrow output spares a wide copy of the whole activation.
    return torch.mul(x, scale, out=torch.empty_like(x))


class _ScaleHeads(torch.autograd.Function):
    """Saves the input as it is (the attention keeps that tensor anyway) and the small fp32 scale, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return _product(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        grad_x = _product(grad, scale) if ctx.needs_input_grad[0] else None
        grad_scale = _scale_gradient(x, grad, scale) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scale


def _scale_gradient(x: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """Sum of `x * grad` over all tokens (and over the channels of a head, for one scale per head), in fp32."""
    x, grad = x.reshape(-1, *x.shape[-2:]), grad.reshape(-1, *grad.shape[-2:])
    total = torch.zeros(x.shape[-2:], dtype=scale.dtype, device=x.device)
    for x_part, grad_part in zip(x.split(_CHUNK), grad.split(_CHUNK), strict=True):
        total += (x_part.to(scale.dtype) * grad_part).sum(0)
    return total if scale.shape[-1] > 1 or x.shape[-1] == 1 else total.sum(-1, keepdim=True)
