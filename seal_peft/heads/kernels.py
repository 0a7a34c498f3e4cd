"""Attention by the same kernel wherever a token stands, so that bf16 values depend on the text and not on the batch.

In bf16 the last bit of one attention output, changed in one layer, moves the log-probability of an answer by
hundredths. What is computed in parts equals what is computed in one go only if no such bit changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Without cuDNN's, which torch prefers on some GPUs: it has no kernel for the end of a text behind a cached beginning.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Channels of a head, beyond which the flash kernels do not go.
_WIDEST = 256
_MARK = "_is_causal_to_the_end"


@contextmanager
def one_attention_kernel() -> Iterator[None]:
    """Within it torch's attention takes one kernel for a whole text and for its end behind a cache."""
    make_mask, attend = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["sdpa"]

    @wraps(make_mask)
    def marked(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = make_mask(*args, **kwargs)
        if (
            mask is not None
            and kwargs.get("mask_function") is causal_mask_function
            and kwargs.get("attention_mask") is None
            and kwargs["q_offset"] + kwargs["q_length"] == kwargs["kv_offset"] + kwargs["kv_length"]
        ):
            setattr(mask, _MARK, True)
        return mask

    @wraps(attend)
    def called(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A mask that the model changed has lost its mark, and is used as it is.
        if getattr(attention_mask, _MARK, False):
            attention_mask = causal_lower_right(query.shape[2], key.shape[2])
            # Beside a mask transformers repeats keys and values that several heads share, and another kernel runs.
            if key.shape[-1] == value.shape[-1] <= _WIDEST and kwargs.get("position_bias") is None:
                scale = kwargs.get("scaling")
                heads = scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
                return heads.transpose(1, 2).contiguous(), None
        return attend(module, query, key, value, attention_mask, **kwargs)

    with sdpa_kernel(_KERNELS), _in_place_of(ALL_MASK_ATTENTION_FUNCTIONS, marked):
        with _in_place_of(ALL_ATTENTION_FUNCTIONS, called):
            yield


@contextmanager
def _in_place_of(functions: Any, own: Any) -> Iterator[None]:
    before = functions._local_mapping.get("sdpa")
    functions["sdpa"] = own
    try:
        yield
    finally:
        del functions["sdpa"]
        if before is not None:
            functions["sdpa"] = before
