"""The operation itself: multiply every channel of the heads by its scale, exactly and without extra saved memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels import fits_kernel, multiply_kernel, product_sum_kernel

# Tokens per step when the scale's gradient is summed, which bounds the fp32 copies of input and gradient.
_CHUNK = 4096


def apply_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply by one scale for all rows, see `scale_channels`, or one for each, see `scale_rows`."""
    return scale_channels(x, scale) if scale.dim() == 1 else scale_rows(x, scale)


def scale_channels(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply `x` by `scale`, in fp32 inside and rounded once to the dtype of `x`.

    Args:
        x: Concatenated heads, shape `(..., num_heads * head_dim)`.
        scale: fp32, shape `(num_heads * head_dim,)`.

    Returns:
        A tensor like `x`.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses cast and product, and chooses what to save, better than an opaque function lets it.
        return (x * scale).to(x.dtype)
    # Asking for the gradients alone keeps a decode step from paying for autograd's bookkeeping.
    return _ScaleChannels.apply(x, scale) if x.requires_grad or scale.requires_grad else _product(x, scale)


def scale_rows(x: Tensor, row_scale: Tensor) -> Tensor:
    """Multiply the heads of every row of a batch by the row's own scale, keeping the dtype of `x`.

    Args:
        x: Concatenated heads, shape `(batch, ..., num_heads * head_dim)`.
        row_scale: Shape `(batch, num_heads, 1)` or `(batch, num_heads, head_dim)`, fp32.

    Raises:
        ValueError: The batch has another number of rows than adapter names were given.
    """
    if x.shape[0] != row_scale.shape[0]:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {row_scale.shape[0]} and "
            f"{x.shape[0]} respectively."
        )
    scale = row_scale.view(len(row_scale), *[1] * (x.dim() - 2), *row_scale.shape[1:])
    return (x.unflatten(-1, (scale.shape[-2], -1)) * scale).to(x.dtype).flatten(-2)


def _product(x: Tensor, scale: Tensor) -> Tensor:
    if x.dtype == scale.dtype:
        return x * scale
    if fits_kernel(x):
        return multiply_kernel(x, scale)
    # Writing straight into the narrow output spares a wide copy of the whole activation.
    return torch.mul(x, scale, out=torch.empty_like(x))


class _ScaleChannels(torch.autograd.Function):
    """Saves the input as it is (the attention keeps that tensor anyway) and the small fp32 scale, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)
        return _product(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        grad_x = _product(grad, scale) if ctx.needs_input_grad[0] else None
        grad_scale = _product_sum(x, grad, scale.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scale


def _product_sum(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of `x * grad` over all tokens, in the wide dtype of the scale."""
    if dtype == torch.float32 and fits_kernel(x) and fits_kernel(grad):
        return product_sum_kernel(x, grad)
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    total = torch.zeros(x.shape[-1], dtype=dtype, device=x.device)
    for x_part, grad_part in zip(x.split(_CHUNK), grad.split(_CHUNK), strict=True):
        total += (x_part.to(dtype) * grad_part).sum(0)
    return total
