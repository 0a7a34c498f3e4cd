"""Triton kernels of the scale operation, for long half-precision inputs on a GPU.

PyTorch's own broadcast product of a bf16 activation and an fp32 vector falls short of the memory bandwidth, and its
gradient needs fp32 copies. The results are those of the plain PyTorch code in `scale.py`, which short inputs and
other devices use: fp32 products, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

# Below this many elements a launch costs more than the bandwidth it saves.
_MIN_ELEMENTS = 2**18
_TOKENS, _FEATURES = 16, 256
_SUM_TOKENS = 512


def fits_kernel(x: Tensor) -> bool:
    """Tell whether the kernels apply: a long, contiguous half-precision tensor on a CUDA device, Triton at hand."""
    return (
        x.is_cuda
        and x.numel() >= _MIN_ELEMENTS
        and triton is not None
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
    )


def multiply_kernel(x: Tensor, scale: Tensor) -> Tensor:
    """Return `x * scale` over the last dimension; `x` `(..., features)` half precision, `scale` `(features,)` fp32."""
    out = torch.empty_like(x)
    features = x.shape[-1]
    tokens = x.numel() // features
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(features, _FEATURES))
    with torch.cuda.device(x.device):
        _multiply[grid](x, scale, out, tokens, features, _TOKENS, _FEATURES)
    return out


def product_sum_kernel(x: Tensor, grad: Tensor) -> Tensor:
    """Return the fp32 sum of `x * grad` over all but the last dimension, in a fixed order of summation."""
    features = x.shape[-1]
    tokens = x.numel() // features
    parts = triton.cdiv(tokens, _SUM_TOKENS)
    partial = torch.empty(parts, features, dtype=torch.float32, device=x.device)
    grid = (parts, triton.cdiv(features, _FEATURES))
    with torch.cuda.device(x.device):
        _product_sum[grid](x, grad, partial, tokens, features, _SUM_TOKENS, _TOKENS, _FEATURES)
    return partial.sum(0)


if triton is not None:

    @triton.jit
    def _multiply(x, scale, out, tokens, features, TOKENS: tl.constexpr, FEATURES: tl.constexpr):  # type: ignore[no-untyped-def]
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        # 64 bits: a long context has more than 2**31 elements.
        where = token.to(tl.int64)[:, None] * features + feature[None, :]
        mask = (token < tokens)[:, None] & (feature < features)[None, :]
        factor = tl.load(scale + feature, mask=feature < features, other=0.0)
        value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
        tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _product_sum(  # type: ignore[no-untyped-def]
        x, grad, partial, tokens, features, SUM_TOKENS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr
    ):
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        total = tl.zeros((FEATURES,), dtype=tl.float32)
        for start in range(0, SUM_TOKENS, TOKENS):
            token = tl.program_id(0) * SUM_TOKENS + start + tl.arange(0, TOKENS)
            where = token.to(tl.int64)[:, None] * features + feature[None, :]
            mask = (token < tokens)[:, None] & (feature < features)[None, :]
            a = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(a * b, axis=0)
        tl.store(partial + tl.program_id(0).to(tl.int64) * features + feature, total, mask=feature < features)
